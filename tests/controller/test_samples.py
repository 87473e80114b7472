"""The order in which questions are taken."""

import torch

from moectl.controller.samples import shuffled


def test_order_is_a_permutation_that_goes_with_the_coordinates():
    items = [f"item {number}" for number in range(50)]
    first = shuffled(items, 7, "data")
    assert sorted(first) == sorted(items)
    assert first != items
    assert shuffled(items, 7, "data") == first
    assert shuffled(items, 8, "data") != first
    assert shuffled(items, 7, "other") != first


def test_order_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = shuffled(range(20), 1)
    assert torch.equal(torch.rand(3), expected)
    assert shuffled(range(20), 1) == first


def test_nothing_stays_nothing():
    assert shuffled([], 1) == []
