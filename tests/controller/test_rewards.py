"""Prices of executions: which latency, what share of the network, which reward."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.controller.execution import Execution, Timings
from moectl.controller.losses import hinge
from moectl.controller.plans import Plan, Space, Tier, top_k_choices
from moectl.controller.rewards import Pricing
from moectl.controller.settings import LatencySection, RewardSection

SPACE = Space(
    blocks=16,
    mixtures=(True,) * 16,
    default_top_k=8,
    top_k_choices=top_k_choices(8),
    always_on=(0,),
    min_active=12,
    max_active=16,
    tiers=(Tier("low", 1, 3, 3), Tier("medium", 4, 8, 6), Tier("high", 9, 12, 12)),
)
MEASURED = Execution("yes", 0.8, Timings(10.0, 20.0, 30.0, 4), 7.5, 5, 864, 24)
MEDIUM = Plan("medium", (True,) * 16, (8,) * 16)


class Foretold:
    """Stands for fitted tables: its times tell what it was asked."""

    def timings(self, plan: Plan, crops: int, tokens: int, new_tokens: int) -> Timings:
        return Timings(float(crops), float(tokens), len(plan.blocks) / 100, new_tokens)


def pricing(
    space: Space = SPACE,
    controller_ms: float = 5.0,
    reward: dict[str, Any] | None = None,
    **latency: Any,
) -> Pricing:
    settings = SimpleNamespace(
        reward=RewardSection(**(reward or {})), latency=LatencySection(**latency)
    )
    estimator: Any = Foretold()
    return Pricing(settings, space, estimator, controller_ms)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("source", "objective", "latency"),
    [
        ("measured", "total", 65), ("measured", "ttft", 35), ("measured", "prefill", 20),
        ("measured", "per_token", 10),
        ("table", "total", 5 + 888 + 0.16 + 5), ("table", "ttft", 5 + 888 + 5),
        ("table", "prefill", 888), ("table", "per_token", 0.16 / 3),
        ("flops", "total", 7.5),
    ],
)  # fmt: skip
def test_latencies_come_from_where_the_settings_say(
    source: str, objective: str, latency: float
) -> None:
    found = pricing(source=source, objective=objective)
    assert found.latency(MEDIUM, MEASURED) == pytest.approx(latency)
    assert found.unit == ("GFLOP" if source == "flops" else "ms")


def test_the_cost_counts_crops_experts_and_blocks() -> None:
    cost = pricing().cost
    assert cost(SPACE.full) == 1
    assert cost(MEDIUM) == pytest.approx((0.5 + 1 + 1) / 3)
    active = tuple(block not in (2, 4, 10, 13) for block in range(16))
    least = Plan("low", active, SPACE.uniform(4))
    assert cost(least) == pytest.approx((3 / 12 + (8 + 11 * 4) / 12 / 8 + 12 / 16) / 3)
    # What a skipped block would have used is not used.
    top_k = tuple(8 if block == 4 else k for block, k in enumerate(least.top_k))
    assert cost(replace(least, top_k=top_k)) == cost(least)


def test_the_mean_number_of_experts_is_not_rounded() -> None:
    top_k = (8, 7, *[8] * 14)
    assert pricing().cost(replace(SPACE.full, top_k=top_k)) == pytest.approx(1 - 1 / 16 / 8 / 3)


def test_blocks_without_experts_do_not_count_among_them() -> None:
    mixed = replace(SPACE, mixtures=(True, True, *[False] * 14))
    plan = replace(MEDIUM, top_k=mixed.uniform(4))
    assert pricing(mixed).cost(plan) == pytest.approx((0.5 + 6 / 8 + 1) / 3)
    none = replace(SPACE, mixtures=(False,) * 16, default_top_k=0, top_k_choices=())
    assert pricing(none).cost(none.full) == 1
    assert pricing(none).cost(replace(none.full, tier="medium")) == pytest.approx(2.5 / 3)


def test_networks_that_do_not_tile_have_no_crops_to_pay() -> None:
    whole = replace(SPACE, tiers=(Tier("only", 0, 0, 0),))
    assert pricing(whole).cost(whole.full) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("accuracy", "latency", "reward"),
    [(0.8, 160, 0.7312), (0.8, 200, 0.5208), (0.8, 220, 0.3053), (0.8, 300, -2.2258),
     (1, 200, 0.7208)],
)  # fmt: skip
def test_the_default_reward_has_the_originals_values(
    accuracy: float, latency: float, reward: float
) -> None:
    parts = (doubles(value) for value in (accuracy, latency, 200, 1.75 / 3))
    accuracies, latencies, budgets, costs = parts
    found = pricing().rewards(accuracies, latencies, budgets, costs)
    assert found.item() == pytest.approx(reward, abs=5e-5)
    # With experts counted as they are, the same plan costs a little more.
    costs = doubles(pricing().cost(MEDIUM))
    dearer = pricing().rewards(accuracies, latencies, budgets, costs)
    assert (found - dearer).item() == pytest.approx(0.05 * 0.25)


@pytest.mark.parametrize(
    ("name", "change"),
    [("accuracy", 0.8), ("latency", -0.7310586), ("over", -0.01), ("cost", -0.9), ("under", 0)],
)
def test_weights_of_the_composite_reward_are_the_settings(name: str, change: float) -> None:
    parts = [doubles(value) for value in (0.8, 110, 100, 0.9)]
    default = getattr(RewardSection(), name)
    more = pricing(reward={name: default + 2}).rewards(*parts) - pricing().rewards(*parts)
    assert more.item() == pytest.approx(2 * change, abs=1e-6)


def test_the_hinge_reward_takes_its_numbers_from_the_settings() -> None:
    accuracy, latency, budget = doubles(0.8, 0.8, 0.5), doubles(90, 110, 101), doubles(*[100] * 3)
    default = pricing(reward={"kind": "hinge"}).rewards(accuracy, latency, budget, budget)
    torch.testing.assert_close(default, hinge(accuracy, latency, budget))
    own = {"over": 2.0, "margin": 0.2, "violation": 0.4}
    found = pricing(reward={"kind": "hinge", "accuracy": 3.0, **own}).rewards(
        accuracy, latency, budget, budget
    )
    expected = doubles(2.4 - 2 * 0.1**2, 2.4 - 2 * 0.3**2 - 0.4, 1.5 - 2 * 0.21**2 - 0.4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["composite", "hinge"])
def test_prices_of_many_are_those_of_each(kind: str) -> None:
    of = pricing(reward={"kind": kind})
    plans = [MEDIUM, SPACE.full, replace(MEDIUM, tier="low")]
    executions = [
        MEASURED,
        replace(MEASURED, accuracy=1.0),
        replace(MEASURED, accuracy=0.0, timings=Timings(100.0, 20.0, 30.0, 4)),
    ]
    budgets = torch.tensor([70.0, 60.0, 100.0])
    accuracy, latency, reward = of.price(plans, executions, budgets)
    assert accuracy.tolist() == pytest.approx([0.8, 1, 0])
    assert latency.tolist() == [65, 65, 155]
    for place in range(3):
        cost = torch.tensor([of.cost(plans[place])])
        one = slice(place, place + 1)
        single = of.rewards(accuracy[one], latency[one], budgets[one], cost)
        torch.testing.assert_close(reward[one], single)
