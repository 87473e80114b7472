"""Spaces and plans against counting and enumerating them one by one."""

import json
from dataclasses import replace
from itertools import product
from math import comb
from typing import Any

import pytest

from moectl.controller.plans import Plan, Space, Tier, plan_from, top_k_choices

TIERS = (Tier("low", 1, 3, 3), Tier("medium", 4, 8, 6), Tier("high", 9, 12, 12))


def space(**changes: Any) -> Space:
    """Four blocks with experts, of which two to four run."""
    values: dict[str, Any] = {
        "blocks": 4,
        "mixtures": (True,) * 4,
        "default_top_k": 4,
        "top_k_choices": (2, 3, 4),
        "always_on": (0,),
        "min_active": 2,
        "max_active": 4,
        "tiers": TIERS,
    }
    return Space(**{**values, **changes})


DENSE = {"mixtures": (False,) * 4, "default_top_k": 0, "top_k_choices": ()}
SPACES = [
    {},
    DENSE,
    {"always_on": (0, 2)},
    {"always_on": (0, 3), "max_active": 3},
    {"mixtures": (False, True, True, True)},
    {"mixtures": (True, False, False, False)},
    {"mixtures": (True, True, False, True)},
    {"mixtures": (False, True, False, True), "always_on": (0, 1), "min_active": 3},
    {"mixtures": (True, False, True, False), "always_on": (0, 3), "tiers": TIERS[:1]},
    {"min_active": 4},
    {"top_k_choices": (4,)},
]


def every_plan(of: Space) -> list[Plan]:
    """All plans that a space lets pass, one by one."""
    numbers = sorted({0, of.default_top_k, *of.top_k_choices})
    found = []
    for tier, active, top_k in product(
        [tier.name for tier in of.tiers],
        product([False, True], repeat=of.blocks),
        product(numbers, repeat=of.blocks),
    ):
        plan = Plan(tier, active, top_k)
        try:
            plan.check(of)
        except ValueError:
            continue
        found.append(plan)
    return found


@pytest.mark.parametrize("changes", SPACES, ids=str)
def test_size_counts_the_plans_that_compute_different_things(changes: dict[str, Any]) -> None:
    of = space(**changes)
    plans = every_plan(of)
    assert of.size == len({plan.key() for plan in plans})
    assert of.size == len(
        {
            (plan.tier, plan.active, tuple(plan.top_k[block] for block in plan.blocks))
            for plan in plans
        }
    )


def test_the_size_of_the_released_network_is_the_formula() -> None:
    of = space(
        blocks=16,
        mixtures=(True,) * 16,
        default_top_k=8,
        top_k_choices=top_k_choices(8),
        min_active=12,
        max_active=16,
    )
    assert of.size == 3 * sum(comb(15, n - 1) * 5 ** (n - 1) for n in range(12, 17))


@pytest.mark.parametrize(
    ("default", "choices"),
    [
        (0, ()),
        (1, (1,)),
        (2, (1, 2)),
        (3, (2, 3)),
        (6, (3, 4, 5, 6)),
        (8, (4, 5, 6, 7, 8)),
        (10, (6, 7, 8, 9, 10)),
    ],
)
def test_choices_are_the_five_largest_from_half_the_default(
    default: int, choices: tuple[int, ...]
) -> None:
    assert top_k_choices(default) == choices


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixtures": (True,) * 3}, "3 marks of experts for 4 blocks"),
        ({"always_on": (1,)}, "expected block 0"),
        ({"always_on": (0, 0)}, "expected block 0"),
        ({"always_on": (0, 4)}, "not all blocks"),
        ({"always_on": (0, 1, 2, 3), "min_active": 4}, "not all blocks"),
        ({"min_active": 0}, "0 to 4 active blocks"),
        ({"always_on": (0, 2, 3)}, "expected at least 3"),
        ({"min_active": 4, "max_active": 3}, "4 to 3 active blocks"),
        ({"max_active": 5}, "at most 4"),
        ({"default_top_k": 5}, "without 5"),
        ({"top_k_choices": (4, 3, 2)}, "rising"),
        ({"top_k_choices": (2, 4, 4)}, "rising"),
        ({"tiers": ()}, "at least one"),
        ({"tiers": TIERS[:1] * 2}, "different names"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(**changes)


def test_views_of_a_space_agree() -> None:
    of = space(mixtures=(True, True, False, True), always_on=(0, 2), min_active=3)
    assert of.optional == (1, 3)
    assert of.counts == (3, 4)
    assert of.free == (False, True, False, True)
    assert of.uniform(2) == (4, 2, 0, 2)
    assert of.full == Plan("high", (True,) * 4, (4, 4, 0, 4))


@pytest.mark.parametrize("changes", SPACES, ids=str)
def test_the_full_and_every_uniform_plan_belong_to_the_space(changes: dict[str, Any]) -> None:
    of = space(**changes)
    if of.max_active == of.blocks:
        of.full.check(of)
    active = tuple(block in of.always_on for block in range(of.blocks))
    for top_k in of.top_k_choices or (0,):
        Plan("low", active, of.uniform(top_k)).check(
            replace(of, min_active=len(of.always_on), max_active=of.blocks)
        )


GOOD = Plan("medium", (True, False, True, True), (4, 3, 2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tier": "huge"}, "tier huge: expected one of low, medium, high"),
        ({"active": (True,) * 3}, "a plan of 3 blocks: expected 4"),
        ({"top_k": (4,) * 5}, "expected 4"),
        ({"active": (False, True, True, True)}, "block 0 always runs"),
        ({"active": (True, False, False, False)}, "1 active blocks: expected 2 to 4"),
        ({"top_k": (4, 3, 1, 4)}, "top_k = 1 in block 2"),
        ({"top_k": (3, 3, 3, 3)}, "top_k = 3 in block 0"),
        ({"top_k": (4, 0, 2, 4)}, "top_k = 0 in block 1"),
    ],
)
def test_plans_of_other_spaces_are_refused(changes: dict[str, Any], message: str) -> None:
    GOOD.check(space())
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **changes).check(space())


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="4 active blocks: expected 2 to 3"):
        space().full.check(space(max_active=3))


def test_experts_in_a_block_without_any_are_refused() -> None:
    of = space(mixtures=(True, True, False, True))
    with pytest.raises(ValueError, match="top_k = 2 in block 2"):
        GOOD.check(of)


def test_experts_of_skipped_blocks_are_no_part_of_the_key() -> None:
    assert GOOD.key() == "medium/0:4,2:2,3:4"
    assert replace(GOOD, top_k=(4, 2, 2, 4)).key() == GOOD.key()
    assert replace(GOOD, top_k=(4, 3, 3, 4)).key() != GOOD.key()
    assert replace(GOOD, tier="low").key() != GOOD.key()


@pytest.mark.parametrize("changes", SPACES, ids=str)
def test_plans_survive_json(changes: dict[str, Any]) -> None:
    of = space(**changes)
    for plan in every_plan(of)[::7]:
        assert plan_from(json.loads(json.dumps(plan.plain())), of) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [0, 1, 4]}, "block 4: expected 0 to 3"),
        ({"blocks": [0, -1]}, "block -1"),
        ({"blocks": [1, 2]}, "block 0 always runs"),
        ({"blocks": [0, "1"]}, "two lists of numbers"),
        ({"blocks": 3}, "two lists of numbers"),
        ({"top_k": [4, 4.0, 4, 4]}, "two lists of numbers"),
        ({"top_k": None}, "two lists of numbers"),
        ({"tier": None}, "a name"),
    ],
)
def test_what_is_no_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_from({**GOOD.plain(), **changes}, space())


@pytest.mark.parametrize("key", ["tier", "blocks", "top_k"])
def test_a_plan_without_a_part_is_refused(key: str) -> None:
    values = GOOD.plain()
    del values[key]
    with pytest.raises(ValueError, match="expected the keys"):
        plan_from(values, space())
