"""Accuracy against latency: fronts, areas, and how sure differences between policies are.

Letters: N samples.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """What a policy reached."""

    accuracy: float
    latency: float


class Comparison(NamedTuple):
    """How much better one policy is than another on the same samples."""

    difference: float
    """Mean of the first less that of the second."""
    low: float
    """95 % bootstrap interval of the difference."""
    high: float
    p_value: float
    """Two-sided, of no difference."""


def dominates(first: Point, second: Point) -> bool:
    """Whether the first is no worse in both respects and better in one."""
    no_worse = first.accuracy >= second.accuracy and first.latency <= second.latency
    return no_worse and first != second


def front(points: Sequence[Point]) -> list[int]:
    """Return the places of the points that no other dominates, the fastest first."""
    free = [
        place
        for place, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]
    return sorted(free, key=lambda place: (points[place].latency, place))


def hypervolume(points: Sequence[Point], latency_ref: float) -> float:
    """Return the area between the front and the corner (`latency_ref`, accuracy 0).

    It is the integral over budgets from 0 to `latency_ref` of the best accuracy within the budget;
    points at or beyond the corner add nothing.

    Source: Zitzler & Thiele 1999.
    """
    area = best = 0.0
    for accuracy, latency in sorted(points, key=lambda point: point.latency):
        if accuracy > best and latency < latency_ref:
            area += (accuracy - best) * (latency_ref - latency)
            best = accuracy
    return area


def budget_area(budgets: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return the mean accuracy over the range of budgets, straight lines between them.

    That is the area under the curve over the width of the range; of one budget, its accuracy.

    Raises:
        ValueError: if there is no budget, one occurs twice, or the numbers differ.
    """
    if not budgets or len(set(budgets)) != len(budgets) or len(budgets) != len(accuracies):
        raise ValueError("a curve needs different budgets with one accuracy each")
    pairs = sorted(zip(budgets, accuracies, strict=True))
    if len(pairs) == 1:
        return pairs[0][1]
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(pairs))
    return area / (pairs[-1][0] - pairs[0][0])


def mean_interval(values: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean.

    Args:
        values: (N,).
        draws: resamples.
        seed: which.

    Raises:
        ValueError: if there is no value.

    Source: Efron 1979.
    """
    low, high = np.quantile(_means(values, draws, seed), [0.025, 0.975])
    return float(low), float(high)


def compare(
    first: Sequence[float], second: Sequence[float], draws: int = 1000, seed: int = 0
) -> Comparison:
    """Compare two policies on the same samples by resampling the samples.

    The p-value is the share of resampled differences that lie as far from the measured one as that
    lies from 0, itself counted.

    Args:
        first: (N,) of the first policy.
        second: (N,) of the second, in the same order.
        draws: resamples.
        seed: which.

    Raises:
        ValueError: if the samples are not the same, or there is none.

    Source: Efron & Tibshirani 1993, chapter 16.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} samples: expected the same samples")
    gains = np.asarray(first, float) - np.asarray(second, float)
    means = _means(gains.tolist(), draws, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = gains.mean()
    # Equal gains differ by a last bit once they are summed in another order.
    far = np.abs(means - mean) >= np.abs(mean) - 1e-12
    p_value = (1 + int(far.sum())) / (draws + 1)
    return Comparison(float(mean), float(low), float(high), p_value)


def _means(
    values: Sequence[float], draws: int, seed: int
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    if len(values) == 0:
        raise ValueError("an interval needs at least one sample")
    array = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(len(array), size=(draws, len(array)))
    return array[picks].mean(1)
