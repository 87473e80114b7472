"""The plug-in as plain loops over items and classes: slow, and easy to check against the paper."""

from collections.abc import Sequence

Row = Sequence[float]


def judge(p: Row, groups: Sequence[int], alpha: Row, mu: Row) -> tuple[float, int]:
    """Score and class of one item."""
    best = max(range(len(p)), key=lambda y: (p[y] / alpha[groups[y]], -groups[y], -y))
    against = sum((1 / alpha[groups[y]] - mu[groups[y]]) * p[y] for y in range(len(p)))
    return p[best] / alpha[groups[best]] - against, best


def threshold(scores: Row, weights: Row, rate: float) -> float:
    """Score of the first item that is kept when the lowest scores are rejected up to the rate."""
    if rate == 0:
        return float("-inf")
    rejected = 0.0
    for score, weight in sorted(zip(scores, weights, strict=True), key=lambda pair: pair[0]):
        rejected += weight
        if rejected > rate + 1e-9:
            return score
    return float("inf")


def measure(
    posteriors: Sequence[Row],
    labels: Sequence[int],
    weights: Row,
    groups: Sequence[int],
    rule: tuple[Row, Row],
    rate: float,
) -> tuple[list[float], list[float], float]:
    """Joint acceptance shares and errors of the groups, and the threshold, at a rejection rate."""
    judged = [judge(p, groups, *rule) for p in posteriors]
    limit = threshold([score for score, _ in judged], weights, rate)
    count = max(groups) + 1
    shares, wrong = [0.0] * count, [0.0] * count
    for (score, guess), label, weight in zip(judged, labels, weights, strict=True):
        if score >= limit:
            shares[groups[label]] += weight
            wrong[groups[label]] += weight * (guess != label)
    errors = [miss / share if share else 1.0 for miss, share in zip(wrong, shares, strict=True)]
    return shares, errors, limit


def fit(
    posteriors: Sequence[Row],
    labels: Sequence[int],
    weights: Row,
    groups: Sequence[int],
    rate: float,
    iterations: int = 30,
) -> tuple[list[float], list[float], float, float]:
    """Alpha, mu, threshold and balanced error of the best fixed-point iterate."""
    total = sum(weights)
    weights = [weight / total for weight in weights]
    count = max(groups) + 1
    prior = [
        sum(w for w, y in zip(weights, labels, strict=True) if groups[y] == k) for k in range(count)
    ]
    best: tuple[list[float], list[float], float, float] | None = None
    for start in (1.0, 0.5, 0.25):
        share, mu = [start * part for part in prior], [0.0] * count
        for _ in range(iterations):
            alpha = [count * part for part in share]
            seen, errors, limit = measure(posteriors, labels, weights, groups, (alpha, mu), rate)
            balanced = sum(errors) / count
            if best is None or balanced < best[3] - 1e-12:
                best = (alpha, mu, limit, balanced)
            share = [max((a + b) / 2, 1e-6) for a, b in zip(share, seen, strict=True)]
            mu = [(m + e / (count * s)) / 2 for m, e, s in zip(mu, errors, share, strict=True)]
    assert best is not None
    return best
