"""How sure measured shares and differences are."""

from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """How often one classifier is right where another is not, on the same items."""

    difference: float
    """Accuracy of the first less that of the second."""
    low: float
    """95 % bootstrap interval of the difference."""
    high: float
    p_value: float
    """Of McNemar's exact test that both are right equally often."""


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's score.

    Raises:
        ValueError: if there is no item.
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    if count < 1:
        raise ValueError("a share needs at least one item")
    found = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired(first: Tensor, second: Tensor, draws: int = 1000, seed: int = 0) -> Difference:
    """Compare two classifiers on the same items.

    Args:
        first: (N,) bool, where the first is right.
        second: (N,) bool, where the second is.
        draws: bootstrap resamples of the items.
        seed: which.

    Sources: McNemar 1947; Efron 1979.
    """
    from scipy.stats import binomtest

    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError("a comparison needs the same items, at least one")
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    # Resampling items resamples the differences +1, 0 and -1 with their shares.
    count = len(first)
    shares = torch.tensor([only_first, only_second, count - discordant], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.multinomial(
        shares.expand(draws, -1), count, replacement=True, generator=generator
    )
    gains = ((picks == 0).double() - (picks == 1).double()).mean(1)
    low, high = gains.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference((only_first - only_second) / count, low, high, p_value)
