"""Policies beside the controller: which plans they take, and that they are plans of the network."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from moectl.controller import rivals
from moectl.controller.plans import Plan, Space, Tier
from moectl.controller.rivals import (
    Scene,
    by_importance,
    grid,
    oracle,
    plans_of,
    random_plan,
    tabled,
)
from moectl.controller.simulator import space as simulated
from moectl.controller.table import Row, Table
from moectl.engine.errors import UserError

ORDER = (0, 1, 5, 8, 9, 12, 14, 15, 7, 6, 11, 3, 2, 10, 13, 4)


def row(tier: str, top_k: int, count: int, accuracy: float, latency: float) -> Row:
    return Row(tier, top_k, count, accuracy, latency, 9, 0.1, 1.0)


TABLE = Table(
    (
        row("low", 4, 12, 0.2, 50),
        row("low", 8, 16, 0.4, 100),
        row("medium", 8, 16, 0.6, 200),
        row("high", 8, 12, 0.55, 250),
        row("high", 4, 16, 0.65, 260),
        row("high", 6, 16, 0.7, 280),
        row("high", 8, 16, 0.8, 300),
    ),
    "total",
    "ms",
)


def scene(space: Space | None = None, **values: Any) -> Scene:
    space = space or simulated()
    given: dict[str, Any] = {
        "order": ORDER,
        "table": TABLE,
        "ids": ["a/1", "a/2", "b/1"],
        "seed": 0,
        "decide": lambda _: [space.full] * 3,
    }
    return Scene(space, **(given | values))


def small() -> Space:
    """Two blocks that may be skipped, one of them without experts."""
    return Space(
        blocks=4,
        mixtures=(True, True, True, False),
        default_top_k=2,
        top_k_choices=(1, 2),
        always_on=(0, 1),
        min_active=2,
        max_active=4,
        tiers=(Tier("low", 1, 1, 1), Tier("high", 2, 2, 2)),
    )


# Plans that never change


def test_the_full_plan_is_everything() -> None:
    (plan, *others) = plans_of("static_full", 1.0, scene())
    assert plan == simulated().full
    assert others == [plan, plan]


@pytest.mark.parametrize(
    ("policy", "tier", "top_k", "count"),
    [("static_medium", "medium", 6, 14), ("static_min", "low", 4, 12)],
)
def test_static_plans_keep_the_blocks_that_matter(
    policy: Any, tier: str, top_k: int, count: int
) -> None:
    plan = plans_of(policy, 1.0, scene())[0]
    plan.check(simulated())
    assert plan.tier == tier
    assert plan.blocks == tuple(sorted(ORDER[:count]))
    assert plan.top_k == (8, *[top_k] * 15)


def test_of_an_even_number_of_settings_the_lower_middle_is_taken() -> None:
    plan = plans_of("static_medium", 1.0, scene(small(), order=(0, 1, 3, 2)))[0]
    assert (plan.tier, plan.top_k, plan.blocks) == ("low", (2, 1, 1, 0), (0, 1, 3))


def test_networks_without_experts_have_static_and_random_plans() -> None:
    dense = replace(small(), mixtures=(False,) * 4, default_top_k=0, top_k_choices=())
    for policy in ("static_full", "static_medium", "static_min", "random"):
        for plan in plans_of(policy, 1.0, scene(dense, order=(0, 1, 3, 2))):
            plan.check(dense)
            assert plan.top_k == (0, 0, 0, 0)


# Chance


def test_every_plan_is_drawn_as_often_as_any_other() -> None:
    space, generator, draws = small(), torch.Generator().manual_seed(1), 6000
    counts = Counter(random_plan(space, generator).key() for _ in range(draws))
    assert len(counts) == space.size == 24
    expected = draws / space.size
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 49.7, "the 99.9 % quantile for 23 degrees of freedom"


def test_random_plans_are_of_the_space_and_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [random_plan(simulated(), generator) for _ in range(50)]
    for plan in drawn:
        plan.check(simulated())
    assert {plan.tier for plan in drawn} == {"low", "medium", "high"}
    assert {len(plan.blocks) for plan in drawn} == {12, 13, 14, 15, 16}


def test_a_random_plan_depends_on_question_and_seed_alone() -> None:
    plans = plans_of("random", 100.0, scene())
    assert plans_of("random", 300.0, scene()) == plans
    assert plans_of("random", 100.0, scene(ids=["b/1"])) == plans[2:]
    assert plans_of("random", 100.0, scene(seed=1)) != plans
    assert len({plan.key() for plan in plans}) == 3


# The controller's own


def test_the_controller_is_asked_with_the_budget() -> None:
    asked = []

    def decide(budget: float) -> list[Plan]:
        asked.append(budget)
        return [simulated().full] * 3

    assert plans_of("controller", 123.0, scene(decide=decide)) == [simulated().full] * 3
    assert asked == [123.0]


def test_importance_changes_the_blocks_alone() -> None:
    active = tuple(block not in (1, 5) for block in range(16))
    own = Plan("medium", active, (8, *range(4, 9), *[7] * 10))
    plan = by_importance(own, scene())
    assert plan == replace(own, active=tuple(block not in (13, 4) for block in range(16)))
    found = plans_of("importance", 1.0, scene(decide=lambda _: [own, simulated().full, own]))
    assert found == [plan, simulated().full, plan]


# The lookup table


@pytest.mark.parametrize(
    ("policy", "budget", "name"),
    [
        ("lut", 210, "medium_8_16"),
        ("lut", 255, "medium_8_16"),
        ("lut", 299, "high_6_16"),
        ("lut", 10, "low_4_12"),
        ("token_only", 210, "medium_8_16"),
        ("token_only", 10, "low_8_16"),
        ("depth_only", 210, "high_8_12"),
        ("depth_only", 300, "high_8_16"),
        ("width_only", 210, "high_4_16"),
        ("width_only", 290, "high_6_16"),
    ],
)
def test_the_table_is_asked_with_one_knob_or_all(policy: Any, budget: float, name: str) -> None:
    (expected,) = (TABLE.plan(row, simulated(), ORDER) for row in TABLE.rows if row.name == name)
    assert plans_of(policy, budget, scene()) == [expected] * 3


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("token_only", "top_k and count"),
        ("depth_only", "tier and top_k"),
        ("width_only", "tier and count"),
    ],
)
def test_a_table_without_such_rows_is_refused(policy: Any, kept: str) -> None:
    poor = replace(TABLE, rows=TABLE.rows[:1])
    with pytest.raises(UserError, match=f"eval.policies = {policy}: no row .* has {kept} in full"):
        tabled(policy, 100, scene(table=poor))


def test_the_grid_is_every_row() -> None:
    found = grid(scene())
    assert [plan.tier for plan in found] == [row.tier for row in TABLE.rows]
    assert found[3] == TABLE.plan(TABLE.rows[3], simulated(), ORDER)


# Afterwards


def test_the_oracle_takes_the_best_answer_in_time() -> None:
    accuracies, latencies = [0.0, 0.5, 1.0, 0.5], [10.0, 30.0, 40.0, 20.0]
    chosen = [oracle(accuracies, latencies, budget) for budget in (40, 39, 30, 19, 9)]
    assert chosen == [2, 3, 3, 0, 0], "of equals the fastest, and the fastest if none is in time"


def test_policies_that_need_a_table_are_known() -> None:
    without = scene(table=None)
    for policy in ("controller", "static_full", "static_min", "random", "importance"):
        assert policy not in rivals.TABLED
        assert len(plans_of(policy, 1.0, without)) == 3
