import math

import pytest
import torch
from scipy.stats import binom

from moectl.common.intervals import paired, wilson


def test_wilson_known_values() -> None:
    """By the formula written out, for 1183 of 1500 and at both ends."""
    for hits, count in ((1183, 1500), (0, 10), (10, 10), (1, 2)):
        z, share = 1.959963984540054, hits / count
        middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        half = (
            z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
        )
        assert wilson(hits, count) == pytest.approx((middle - half, middle + half), abs=1e-12)
    with pytest.raises(ValueError, match="at least one item"):
        wilson(0, 0)


def test_paired_difference_and_exact_p_value() -> None:
    first = torch.tensor([True] * 12 + [False] * 3 + [True] * 80 + [False] * 5)
    second = torch.tensor([False] * 12 + [True] * 3 + [True] * 80 + [False] * 5)
    found = paired(first, second)
    assert found.difference == pytest.approx(0.09)
    assert found.p_value == pytest.approx(2 * binom.cdf(3, 15, 0.5))
    # Standard error of the mean of +1 (12 %), -1 (3 %) and 0.
    error = math.sqrt((0.15 - 0.09**2) / 100)
    assert found.low == pytest.approx(0.09 - 1.96 * error, abs=0.015)
    assert found.high == pytest.approx(0.09 + 1.96 * error, abs=0.015)
    swapped = paired(second, first)
    assert swapped.difference == pytest.approx(-0.09)
    assert swapped.p_value == pytest.approx(found.p_value)


def test_equal_classifiers_do_not_differ() -> None:
    right = torch.arange(20) % 3 == 0
    assert paired(right, right) == (0.0, 0.0, 0.0, 1.0)


def test_other_items_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="the same items"):
        paired(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
