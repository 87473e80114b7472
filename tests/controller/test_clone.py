"""A policy that copies a lookup table."""

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch

from moectl.controller.clone import choice_of, clone
from moectl.controller.importance import MOLMOE, order_of
from moectl.controller.model import Policy, build
from moectl.controller.plans import Plan, Space, Tier
from moectl.controller.policy import decide, plans
from moectl.controller.simulator import Simulator, space
from moectl.controller.table import Row, Table

SPACE = space()
ORDER = order_of(MOLMOE, SPACE.always_on)
TABLE = Table(
    (
        Row("low", 4, 12, 0.4, 100.0, 9, 0.0, 0.0),
        Row("low", 8, 14, 0.5, 160.0, 9, 0.0, 0.0),
        Row("medium", 6, 15, 0.7, 230.0, 9, 0.0, 0.0),
        Row("low", 8, 16, 0.6, 260.0, 9, 0.0, 0.0),
        Row("high", 8, 16, 0.9, 310.0, 9, 0.0, 0.0),
    ),
    "total",
    "ms",
)
LIMITS = (80.0, 380.0)


def policy(rows: int = 16) -> Policy:
    torch.manual_seed(0)
    controller = {
        "vision": 32, "language": 32, "budget": 64, "tiers": 3, "counts": 5, "optional": 15,
        "blocks": rows, "choices": 5, "hidden": 64, "dropout": 0.3,
    }  # fmt: skip
    return build({"budget_encoder": {"width": 64}, "controller": controller})


def copied(of: Policy, steps: int, *, learned: bool = True, seed: int = 1) -> float:
    features = Simulator(40, 0, "train").features()
    return clone(
        of, TABLE, features, SPACE, budgets=LIMITS, order=ORDER, learned=learned, steps=steps,
        seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [16, 1], ids=["a number each", "one for all"])
def test_the_copy_decides_as_the_table_does(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    of = policy(rows)
    with caplog.at_level(logging.INFO, "moectl.controller.clone"):
        loss = copied(of, 250)
    assert loss < 0.5
    assert "in 250 updates" in caplog.text
    # Of questions that were not copied, and of budgets not right at a step of the table.
    vision, text = Simulator(70, 5, "test").features()
    edges = [80.0, 100.0, 160.0, 230.0, 310.0, 380.0]
    budgets = [
        low + share * (high - low)
        for low, high in pairwise(edges)
        for share in torch.linspace(0.2, 0.8, 14).tolist()
    ]
    found = plans(decide(of(vision, text, torch.tensor(budgets))), SPACE)
    expected = [TABLE.plan(TABLE.best(budget), SPACE, ORDER) for budget in budgets]
    assert len({plan.key() for plan in expected}) == 4, "one row is never the best"
    right = [mine.key() == theirs.key() for mine, theirs in zip(found, expected, strict=True)]
    assert sum(right) / len(right) > 0.95


def test_copies_are_a_function_of_the_seed() -> None:
    found = []
    for place, seed in enumerate((1, 1, 2)):
        of = policy()
        torch.manual_seed(place)  # neither dropout nor another draw comes from here
        loss = copied(of, 3, seed=seed)
        found.append((loss, of.controller.tier_head.weight))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_head_of_the_blocks_rests_where_others_choose_them() -> None:
    of, before = policy(), policy()
    copied(of, 2, learned=False)
    states = [dict(part.controller.named_parameters()) for part in (of, before)]
    same = {name for name, value in states[0].items() if torch.equal(value, states[1][name])}
    assert same == {"block_head.weight", "block_head.bias"}


def test_choices_lead_back_to_their_plans() -> None:
    wanted = [TABLE.plan(row, SPACE, ORDER) for row in TABLE.rows]
    assert plans(choice_of(wanted, SPACE, ORDER), SPACE) == wanted


def test_blocks_are_drawn_in_the_order_of_importance() -> None:
    active = tuple(block not in (9, 3) for block in range(16))
    plan = Plan("low", active, SPACE.uniform(5))
    (order,) = choice_of([plan], SPACE, ORDER).order.tolist()
    first = [block for block in ORDER[1:] if block not in (9, 3)]
    last = [block for block in ORDER if block in (9, 3)]
    assert [SPACE.optional[place] for place in order] == [*first, *last]


def test_choices_of_networks_with_experts_in_some_blocks() -> None:
    values: dict[str, Any] = {
        "blocks": 5,
        "mixtures": (True, False, True, True, False),
        "default_top_k": 4,
        "top_k_choices": (2, 3, 4),
        "always_on": (0, 3),
        "min_active": 3,
        "max_active": 5,
        "tiers": (Tier("low", 1, 3, 3), Tier("high", 9, 12, 12)),
    }
    mixed = Space(**values)
    wanted = [
        Plan("high", (True, False, True, True, False), (4, 0, 3, 2, 0)),
        Plan("low", (True, True, True, True, True), (4, 0, 2, 4, 0)),
    ]
    found = choice_of(wanted, mixed, (0, 3, 4, 2, 1))
    assert found.tier.tolist() == [1, 0]
    assert found.active.tolist() == [0, 2]
    # Places among the blocks 1, 2 and 4.
    assert found.order.tolist() == [[1, 2, 0], [2, 1, 0]]
    assert found.top_k.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 2, 0]]
    assert plans(found, mixed) == wanted
