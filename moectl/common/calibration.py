"""Whether probabilities mean what they say, and one number that mends them.

Letters: N items, K classes, R ranges of equal mass. Item weights let a test set stand for another
label distribution: an item of weight 2 counts like the same item twice. Everything is computed in
float64 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = torch.finfo(torch.float32).tiny  # keeps logarithms and quotients of zero finite


@dataclass(frozen=True)
class ReliabilityBin:
    """The items whose confidence lies in (lower, upper]."""

    lower: float
    upper: float
    count: int
    weight: float
    """Share of the total weight; the shares of all bins add up to 1."""
    accuracy: float | None
    """None in an empty bin."""
    confidence: float | None


def calibration(
    probabilities: Tensor, labels: Tensor, bins: int = 15, weights: Tensor | None = None
) -> dict[str, float]:
    """Summarise calibration in plain numbers.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class indices.
        bins: equal-width bins for `ece`, `mce`, `overconfidence`; ranges for `ace_*`.
        weights: (N,), not negative; equal when left out.

    Returns:
        `accuracy confidence ece mce overconfidence ace_top ace_class nll brier`.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.
    """
    filled = reliability(probabilities, labels, bins, weights)
    return {
        "accuracy": sum(entry.weight * (entry.accuracy or 0) for entry in filled),
        "confidence": sum(entry.weight * (entry.confidence or 0) for entry in filled),
        "ece": expected_calibration_error(filled),
        "mce": maximum_calibration_error(filled),
        "overconfidence": overconfidence_error(filled),
        "ace_top": ace_top(probabilities, labels, bins, weights),
        "ace_class": ace_class(probabilities, labels, bins, weights),
        "nll": negative_log_likelihood(probabilities, labels, weights),
        "brier": brier_score(probabilities, labels, weights),
    }


def reliability(
    probabilities: Tensor, labels: Tensor, bins: int = 15, weights: Tensor | None = None
) -> list[ReliabilityBin]:
    """Compare confidence with accuracy in bins of equal width of the highest probability.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class indices.
        bins: of equal width, from 0 to 1.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.

    Source: Guo et al. 2017.
    """
    _, labels, shares = _checked(probabilities, labels, weights)
    confidence, predictions = probabilities.detach().cpu().max(dim=1)
    # Edges are rounded to the type of the probabilities, so that 0.6 is not above the edge 0.6.
    edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(confidence.dtype)
    index = torch.bucketize(confidence, edges)

    def total(values: Tensor) -> list[float]:
        return torch.bincount(index, values, minlength=bins).tolist()

    counts = torch.bincount(index, minlength=bins).tolist()
    rows = zip(
        counts,
        total(shares),
        total(shares * (predictions == labels)),
        total(shares * confidence.double()),
        strict=True,
    )
    return [
        ReliabilityBin(
            lower=position / bins,
            upper=(position + 1) / bins,
            count=count,
            weight=weight,
            accuracy=hits / weight if weight else None,
            confidence=belief / weight if weight else None,
        )
        for position, (count, weight, hits, belief) in enumerate(rows)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean gap between accuracy and confidence over items. Source: Guo et al. 2017."""
    return sum(weight * abs(gap) for weight, gap, _ in _gaps(bins))


def maximum_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Largest gap of any bin that has items. Source: Guo et al. 2017."""
    return max(abs(gap) for _, gap, _ in _gaps(bins))


def overconfidence_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean gap where confidence is too high, times confidence. Source: Thulasidasan et al. 2019."""
    return sum(weight * confidence * max(gap, 0.0) for weight, gap, confidence in _gaps(bins))


def _gaps(bins: Sequence[ReliabilityBin]) -> list[tuple[float, float, float]]:
    """Weight, confidence less accuracy, and confidence of every bin that has items."""
    return [
        (entry.weight, entry.confidence - entry.accuracy, entry.confidence)
        for entry in bins
        if entry.accuracy is not None and entry.confidence is not None
    ]


def ace_top(
    probabilities: Tensor, labels: Tensor, ranges: int = 15, weights: Tensor | None = None
) -> float:
    """Mean gap between accuracy and confidence over ranges that hold the same share of the items.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class indices.
        ranges: R.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.

    Source: Nixon et al. 2019.
    """
    probabilities, labels, shares = _checked(probabilities, labels, weights)
    confidence, predictions = probabilities.max(dim=1)
    residuals = confidence - (predictions == labels).double()
    return float(_range_sums(confidence[None], residuals[None], shares, ranges).abs().sum())


def ace_class(
    probabilities: Tensor, labels: Tensor, ranges: int = 15, weights: Tensor | None = None
) -> float:
    """Mean over classes and ranges of the gap between a class's mean probability and frequency.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class indices.
        ranges: R of each class.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.

    Source: Nixon et al. 2019.
    """
    probabilities, labels, shares = _checked(probabilities, labels, weights)
    total = 0.0
    classes = torch.arange(probabilities.shape[1])
    for start in range(0, len(classes), 64):  # bounds the memory
        chunk = classes[start : start + 64]
        scores = probabilities[:, chunk].T.contiguous()
        residuals = scores - (labels == chunk[:, None]).double()
        total += float(_range_sums(scores, residuals, shares, ranges).abs().sum())
    return total / len(classes)


def _range_sums(scores: Tensor, residuals: Tensor, shares: Tensor, ranges: int) -> Tensor:
    """Sum weighted residuals over ranges of equal weight along the sorted scores.

    An item on the edge of two ranges is divided between them, and items of equal score are
    divided alike, so neither the order of the items nor a repeated item matters.

    Args:
        scores: (S, N), S rows that are sorted independently.
        residuals: (S, N).
        shares: (N,) with sum 1.
        ranges: R.

    Returns:
        (S, R).
    """
    scores, order = scores.sort(dim=-1)
    zero = torch.zeros(len(scores), 1, dtype=torch.float64)
    mass = torch.cat([zero, shares[order].cumsum(-1)], dim=-1)
    sums = torch.cat([zero, (shares * residuals).gather(-1, order).cumsum(-1)], dim=-1)
    edges = mass[:, -1:] * torch.arange(ranges + 1) / ranges
    item = torch.searchsorted(mass[:, 1:].contiguous(), edges).clamp(max=scores.shape[1] - 1)
    value = scores.gather(-1, item)
    first = torch.searchsorted(scores, value)  # the run of items that share the edge's score
    last = torch.searchsorted(scores, value, right=True)
    start, end = mass.gather(-1, first), mass.gather(-1, last)
    part = (edges - start) / (end - start).clamp(min=_SMALLEST)
    return torch.lerp(sums.gather(-1, first), sums.gather(-1, last), part).diff(dim=-1)


def negative_log_likelihood(
    probabilities: Tensor, labels: Tensor, weights: Tensor | None = None
) -> float:
    """Mean of -log of the probability given to the label; at most 87.3 per item.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class indices.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.
    """
    probabilities, labels, shares = _checked(probabilities, labels, weights)
    chosen = probabilities.gather(1, labels[:, None])[:, 0].clamp(min=_SMALLEST)
    return float(-(shares * chosen.log()).sum())


def brier_score(probabilities: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Mean squared distance between probabilities and the one-hot label, from 0 to 2.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) class indices.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.

    Source: Brier 1950.
    """
    probabilities, labels, shares = _checked(probabilities, labels, weights)
    chosen = probabilities.gather(1, labels[:, None])[:, 0]
    # Expanded so that no one-hot matrix is built.
    return float((shares * (probabilities.square().sum(1) - 2 * chosen + 1)).sum())


def marginal_kl(
    probabilities: Tensor, target_prior: Tensor, weights: Tensor | None = None
) -> float:
    """Divergence KL(target prior ‖ mean prediction), 0 if every class is predicted as often as due.

    Args:
        probabilities: (N, K), rows sum to 1.
        target_prior: (K,) with sum 1, of the items.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if rows are not probabilities or no item has weight.

    Source: Sanchez Aimar et al. 2023.
    """
    labels = torch.zeros(len(probabilities), dtype=torch.long)
    probabilities, _, shares = _checked(probabilities, labels, weights)
    marginal = (shares @ probabilities).clamp(min=_SMALLEST)
    target = target_prior.cpu().double()
    return float((torch.xlogy(target, target) - target * marginal.log()).sum())


def fit_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Find T in [0.01, 100] for which softmax(logits / T) gives the labels the most likelihood.

    Source: Guo et al. 2017.
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    logits = logits.cpu().double()
    _, labels, shares = _checked(logits.softmax(-1), labels, weights)

    def loss(log_temperature: float) -> float:
        log_probabilities = torch.log_softmax(logits * 10**-log_temperature, dim=-1)
        return float(-(shares * log_probabilities.gather(1, labels[:, None])[:, 0]).sum())

    # Convex in 1/T, so there is one valley.
    best = minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-8})
    return float(10**best.x)


def _checked(
    probabilities: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give float64 probabilities, labels and weights with sum 1, all on the CPU."""
    probabilities = probabilities.detach().cpu().double()
    weights = torch.ones(len(probabilities)) if weights is None else weights
    weights = weights.detach().cpu().double()
    if weights.shape != (len(probabilities),) or not weights.sum() > 0 or weights.min() < 0:
        raise ValueError("weights must be one number per item, not negative, with a positive sum")
    # Loose enough for bfloat16; written so that NaN fails too.
    if not (probabilities.min() >= 0 and (probabilities.sum(1) - 1).abs().max() < 0.02):
        raise ValueError("probabilities must be rows from 0 to 1 with sum 1, not logits")
    return probabilities, labels.cpu(), weights / weights.sum()
