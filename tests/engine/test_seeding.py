"""Randomness as a function of coordinates."""

import random

import numpy
import torch

from moectl.engine.seeding import key, seed_all


def test_key_is_the_same_on_every_machine() -> None:
    assert key(1, "step", 17) == 1884350940579218420


def test_keys_differ_in_every_coordinate_and_fit_63_bits() -> None:
    seen = {key(s, n, i) for s in range(5) for n in ("step", "order") for i in range(100)}
    assert len(seen) == 1000
    assert all(0 <= value < 2**63 for value in seen)
    assert max(seen) > 2**62, "all bits are used"
    assert key(1, 23) != key(12, 3)
    assert key(1) != key("1")


def test_all_three_generators_follow_the_seed() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seed_all(1, "a")
    first = draw()
    following = draw()
    seed_all(1, "a")
    assert draw() == first
    assert following != first
    seed_all(1, "b")
    assert all(one != other for one, other in zip(draw(), first, strict=True))
