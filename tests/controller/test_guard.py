"""The guard on a hand-made network: what it gives up, in which order, and when it stops."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from moectl.controller.guard import cheaper, expected_accuracy, fit_budget
from moectl.controller.plans import Plan, Space, Tier, top_k_choices
from moectl.controller.table import Row, Table

SPACE = Space(
    blocks=6,
    mixtures=(True,) * 6,
    default_top_k=8,
    top_k_choices=top_k_choices(8),
    always_on=(0,),
    min_active=4,
    max_active=6,
    tiers=(Tier("low", 1, 3, 3), Tier("medium", 4, 6, 6), Tier("high", 7, 12, 12)),
)
DENSE = replace(SPACE, mixtures=(False,) * 6, default_top_k=0, top_k_choices=())
ORDER = (0, 4, 2, 5, 1, 3)
MS = {"low": 10.0, "medium": 20.0, "high": 40.0}
LOST = {"low": 0.3, "medium": 0.05, "high": 0.0}


def experts(plan: Plan) -> float:
    return sum(plan.top_k[block] for block in plan.blocks)


def predict(plan: Plan) -> float:
    """91 ms for the full plan, 32 for the cheapest."""
    return MS[plan.tier] + len(plan.blocks) * 0.5 + experts(plan)


def value(plan: Plan) -> float:
    lost = 0.01 * (8 - experts(plan) / len(plan.blocks)) + 0.1 * (6 - len(plan.blocks))
    return 1.0 - LOST[plan.tier] - lost


def fitted(limit: float, plan: Plan = SPACE.full, **changes: Callable[[Plan], float]) -> Plan:
    given = {"predict": predict, "value": value} | changes
    return fit_budget(plan, limit, given["predict"], given["value"], SPACE, ORDER)


def plan(tier: str, top_k: int, *blocks: int) -> Plan:
    return Plan(tier, tuple(block in blocks for block in range(6)), SPACE.uniform(top_k))


CHEAPEST = plan("low", 4, 0, 2, 4, 5)


def test_a_plan_that_fits_stays_as_it_is() -> None:
    assert fitted(predict(SPACE.full)) == SPACE.full
    odd = Plan("medium", (True, False, True, True, True, True), (8, 5, 7, 4, 6, 8))
    assert fitted(1000, odd) == odd


@pytest.mark.parametrize("limit", [predict(CHEAPEST), 36.6, 50, 60.3, 75, 90.9])
def test_what_can_fit_does(limit: float) -> None:
    found = fitted(limit)
    found.check(SPACE)
    assert predict(found) <= limit
    assert value(found) > value(CHEAPEST) or limit < 40


@pytest.mark.parametrize("limit", [predict(CHEAPEST) - 1e-6, 5.0, -3.0])
def test_where_nothing_fits_the_cheapest_plan_is_left(limit: float) -> None:
    assert fitted(limit) == CHEAPEST
    assert fitted(limit, CHEAPEST) == CHEAPEST
    everything = [
        predict(Plan(tier.name, CHEAPEST.active, SPACE.uniform(top_k)))
        for tier, top_k in product(SPACE.tiers, SPACE.top_k_choices)
    ]
    assert predict(CHEAPEST) == min(everything)


def test_that_move_is_made_that_saves_most_for_what_it_costs() -> None:
    # 5 ms are too many: a tier saves them for 0.05, an expert less in all blocks for about 0.01,
    # a block for 0.1.
    limit = predict(SPACE.full) - 5
    assert fitted(limit) == replace(SPACE.full, top_k=SPACE.uniform(7))
    dear = {7: 0.4, 8: 0.0}

    def other(plan: Plan) -> float:
        return value(plan) - dear[plan.top_k[1]]

    assert fitted(limit, value=other) == replace(SPACE.full, tier="medium")


def test_to_save_more_than_is_asked_for_is_worth_nothing() -> None:
    # A tier saves 20 ms and a block 8.5; of both, 8 are needed.
    def cost(plan: Plan) -> float:
        return {"medium": -0.02, "high": 0.0}[plan.tier] - 0.01 * (6 - len(plan.blocks))

    def time(plan: Plan) -> float:
        return MS[plan.tier] + 8.5 * len(plan.blocks)

    found = fitted(time(SPACE.full) - 8, predict=time, value=cost)
    assert found == plan("high", 8, 0, 1, 2, 4, 5)


def test_a_move_that_saves_nothing_is_never_made() -> None:
    found = fitted(0.0, predict=lambda plan: MS[plan.tier], value=lambda _: 0.5)
    assert found == replace(SPACE.full, tier="low")
    slower = {"low": 50.0, "medium": 45.0, "high": 40.0}
    assert fitted(0.0, predict=lambda plan: slower[plan.tier]) == SPACE.full


def test_a_harmless_move_is_taken_before_a_costly_one() -> None:
    gains = {"low": 0.2, "medium": 0.1, "high": 0.0}  # the coarser, the better
    found = fitted(predict(SPACE.full) - 1, value=lambda plan: gains[plan.tier] + value(plan) / 9)
    assert found == replace(SPACE.full, tier="medium")


def test_one_move_changes_one_thing() -> None:
    odd = Plan("medium", (True, True, False, True, True, True), (8, 4, 8, 6, 5, 8))
    assert list(cheaper(odd, SPACE, ORDER)) == [
        replace(odd, tier="low"),
        replace(odd, top_k=(8, 4, 7, 5, 4, 7)),
        # Of the blocks that run, 3 matters least.
        replace(odd, active=(True, True, False, False, True, True)),
    ]
    assert list(cheaper(CHEAPEST, SPACE, ORDER)) == []
    for move in cheaper(odd, SPACE, ORDER):
        move.check(SPACE)


def test_blocks_that_always_run_are_kept_however_little_they_matter() -> None:
    space = replace(SPACE, always_on=(0, 3))
    (move,) = cheaper(plan("low", 4, 0, 1, 2, 3, 4, 5), space, ORDER)
    assert move.blocks == (0, 2, 3, 4, 5)


def test_a_network_without_experts_has_two_kinds_of_moves() -> None:
    moves = list(cheaper(DENSE.full, DENSE, ORDER))
    assert [move.key().count("/") for move in moves] == [1, 1]
    assert [move.tier for move in moves] == ["medium", "high"]
    assert [len(move.blocks) for move in moves] == [6, 5]


def row(tier: str, top_k: int, count: int, accuracy: float) -> Row:
    return Row(tier, top_k, count, accuracy, 10.0, 4, 0.0, 0.0)


def table(*rows: Row) -> Table:
    return Table(rows, "total", "ms")


ADDITIVE = table(
    *(
        row(tier, top_k, count, 0.2 + more + top_k / 40 + count / 50)
        for (tier, more), top_k, count in product(
            {"low": 0.0, "high": 0.25}.items(), (4, 6, 8), (4, 6)
        )
    )
)


def test_parts_that_add_up_are_found_again() -> None:
    expected = expected_accuracy(ADDITIVE, SPACE)
    for one in ADDITIVE.rows:
        plan = ADDITIVE.plan(one, SPACE, ORDER)
        assert expected(plan) == pytest.approx(one.accuracy)


def test_between_rows_a_straight_line_is_drawn() -> None:
    expected = expected_accuracy(ADDITIVE, SPACE)
    between = plan("low", 5, 0, 1, 2, 3, 4)
    assert expected(between) == pytest.approx(0.2 + 5 / 40 + 5 / 50)
    # Blocks of 4, 6 and 8 experts that run, and one of 7 that does not.
    mixed = Plan("high", (True, True, True, False, True, False), (8, 4, 6, 7, 8, 7))
    assert expected(mixed) == pytest.approx(0.45 + 6 / 40 + 4 / 50)


def test_a_tier_that_the_table_lacks_counts_as_the_mean() -> None:
    expected = expected_accuracy(ADDITIVE, SPACE)
    low, medium, high = (expected(plan(tier, 6, 0, 1, 2, 3)) for tier in MS)
    assert medium == pytest.approx((low + high) / 2)


def test_without_experts_tier_and_blocks_count() -> None:
    rows = [row("low", 0, 5, 0.3), row("low", 0, 6, 0.4), row("high", 0, 6, 0.6)]
    expected = expected_accuracy(table(*rows), DENSE)
    assert expected(DENSE.full) > expected(replace(DENSE.full, tier="low"))
    less = replace(DENSE.full, active=(True,) * 5 + (False,))
    assert expected(DENSE.full) - expected(less) == pytest.approx(0.5 - 0.3)
