"""Intervals of scores by drawing the images again, for all draws at once.

Letters: N images, C columns, R draws. A draw is a row of (R, N): how often it holds each image. In
a draw without positives, or where it needs them, negatives, the score of a column is `nan`.

Source: Efron 1979.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Interval = list[float] | None
"""Low and high of 95 %, None where no draw has the score."""


def draw(images: int, draws: int = 1000, seed: int = 0) -> Counts:
    """Draw as many images as there are, with replacement.

    Args:
        images: N.
        draws: R.
        seed: of all draws.

    Returns:
        (R, N), how often each draw holds each image; rows sum to N.

    Raises:
        ValueError: if there is no image.
    """
    if images < 1:
        raise ValueError("at least one image expected to draw from")
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=draws)


def interval(values: Floats) -> Interval:
    """Middle 95 % of the draws (R,) that have the score.

    Limit: where a column has two or three positives, the draws without any say nothing, and the
    interval is too narrow.
    """
    known = values[~np.isnan(values)]
    return np.quantile(known, (0.025, 0.975)).tolist() if len(known) else None


def bootstrap(
    score: Callable[[NDArray[np.int64]], float], images: int, draws: int = 1000, seed: int = 0
) -> Interval:
    """Interval of any score, given the rows of the images of a draw, repeated as drawn."""
    rows = np.arange(images)
    counts = draw(images, draws, seed)
    return interval(np.array([score(np.repeat(rows, row)) for row in counts]))


def auroc(scores: Floats, actual: Flags, counts: Counts) -> Floats:
    """Share of the pairs of a positive and a negative that are in order, ties half: (R, C).

    Args:
        scores: (N, C).
        actual: (N, C).
        counts: (R, N).
    """
    found = [_auroc(*column, counts) for column in zip(scores.T, actual.T, strict=True)]
    return np.stack(found, axis=1)


def _auroc(scores: Floats, actual: Flags, counts: Counts) -> Floats:
    order = np.argsort(scores)
    scores, actual, counts = scores[order], actual[order], counts[:, order]
    negatives = np.zeros((len(counts), len(scores) + 1))
    np.cumsum(counts * ~actual, axis=1, out=negatives[:, 1:])
    own = scores[actual]
    below = negatives[:, np.searchsorted(scores, own)]
    up_to = negatives[:, np.searchsorted(scores, own, side="right")]
    positives = counts[:, actual].astype(float)
    wins = np.einsum("rp,rp->r", positives, below + up_to) / 2
    return _divided(wins, positives.sum(1) * negatives[:, -1])


def average_precision(scores: Floats, actual: Flags, counts: Counts) -> Floats:
    """Mean precision at the positives, equal scores taken together: (R, C).

    Args:
        scores: (N, C).
        actual: (N, C).
        counts: (R, N).
    """
    found = [_average_precision(*column, counts) for column in zip(scores.T, actual.T, strict=True)]
    return np.stack(found, axis=1)


def _average_precision(scores: Floats, actual: Flags, counts: Counts) -> Floats:
    order = np.argsort(-scores)
    scores, actual, counts = -scores[order], actual[order], counts[:, order]
    last = np.searchsorted(scores, scores[actual], side="right") - 1
    found = np.cumsum(counts, axis=1)[:, last]
    right = np.cumsum(counts * actual, axis=1)[:, last]
    positives = counts[:, actual].astype(float)
    # Nothing is found at a positive only where the draw has neither it nor any before.
    total = np.einsum("rp,rp->r", positives, right / np.maximum(found, 1))
    return _divided(total, positives.sum(1))


def f1(predicted: Flags, actual: Flags, counts: Counts) -> Floats:
    """Harmonic mean of precision and recall of the columns with positives: (R, C).

    Args:
        predicted: (N, C).
        actual: (N, C).
        counts: (R, N).
    """
    hits, guesses, positives = _totals(predicted, actual, counts)
    return np.where(positives > 0, _divided(2 * hits, guesses + positives), np.nan)


def f1_micro(predicted: Flags, actual: Flags, counts: Counts) -> Floats:
    """F1 of all cells together: (R,)."""
    hits, guesses, positives = (part.sum(1) for part in _totals(predicted, actual, counts))
    return _divided(2 * hits, guesses + positives)


def recall(predicted: Flags, actual: Flags, counts: Counts) -> Floats:
    """Share of the positives that are predicted: (R, C)."""
    hits, _, positives = _totals(predicted, actual, counts)
    return _divided(hits, positives)


def _totals(predicted: Flags, actual: Flags, counts: Counts) -> tuple[Floats, Floats, Floats]:
    """Hits, predicted and actual positives of each draw and column."""
    weights = counts.astype(float)
    return weights @ (predicted & actual), weights @ predicted, weights @ actual


def _divided(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean_known(values: Floats) -> Floats:
    """Mean along the last axis of what is not `nan`."""
    known = ~np.isnan(values)
    return _divided(np.where(known, values, 0).sum(-1), known.sum(-1).astype(float))


def multilabel_intervals(
    scores: Floats,
    predicted: Flags,
    actual: Flags,
    names: Sequence[str],
    counts: Counts,
) -> dict[str, Any]:
    """Intervals of what a multi-label model is judged by.

    Macro scores of a draw are means over the columns that have the score in it.

    Args:
        scores: (N, C).
        predicted: (N, C).
        actual: (N, C).
        names: of the columns.
        counts: (R, N).

    Returns:
        `auroc_macro map f1_macro f1_micro`, and `columns`: `auroc ap f1` of each.
    """
    parts = {
        "auroc": auroc(scores, actual, counts),
        "ap": average_precision(scores, actual, counts),
        "f1": f1(predicted, actual, counts),
    }
    return {
        "auroc_macro": interval(mean_known(parts["auroc"])),
        "map": interval(mean_known(parts["ap"])),
        "f1_macro": interval(mean_known(parts["f1"])),
        "f1_micro": interval(f1_micro(predicted, actual, counts)),
        "columns": {
            name: {score: interval(values[:, place]) for score, values in parts.items()}
            for place, name in enumerate(names)
        },
    }


def multiclass_intervals(
    scores: Floats, labels: NDArray[np.int64], counts: Counts
) -> dict[str, Any]:
    """Intervals of what a single-label model is judged by.

    Args:
        scores: (N, C).
        labels: (N,).
        counts: (R, N).

    Returns:
        `accuracy balanced_accuracy f1_macro auroc_macro`.
    """
    classes = np.arange(scores.shape[1])
    actual = labels[:, None] == classes
    predicted = scores.argmax(1)[:, None] == classes
    right = (predicted & actual).any(1)
    return {
        "accuracy": interval(counts @ right / len(labels)),
        "balanced_accuracy": interval(mean_known(recall(predicted, actual, counts))),
        "f1_macro": interval(mean_known(f1(predicted, actual, counts))),
        "auroc_macro": interval(mean_known(auroc(scores, actual, counts))),
    }
