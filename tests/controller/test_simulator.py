"""The simulated network: what depends on what, and that looking at questions pays.

Letters: N questions, P plans.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moectl.controller import simulator
from moectl.controller.importance import MOLMOE, order_of
from moectl.controller.losses import hinge
from moectl.controller.model import Scores
from moectl.controller.plans import Plan
from moectl.controller.policy import draw, plans
from moectl.controller.records import record
from moectl.controller.simulator import Simulator, space
from moectl.controller.table import build

SPACE = space()
ORDER = order_of(MOLMOE, SPACE.always_on)
GRID = [
    Plan(tier.name, tuple(block in ORDER[:count] for block in range(16)), SPACE.uniform(top_k))
    for tier in SPACE.tiers
    for top_k in (4, 6, 8)
    for count in SPACE.counts
]


def randoms(count: int) -> list[Plan]:
    """Plans drawn evenly."""
    shapes = ((count, 3), (count, 5), (count, 15), (count, 16, 5))
    even = Scores(*(torch.zeros(shape) for shape in shapes))
    return plans(draw(even, torch.Generator().manual_seed(0)), SPACE)


def dearer(plan: Plan) -> list[Plan]:
    """Plans that do one thing more."""
    names = [tier.name for tier in SPACE.tiers]
    found = [replace(plan, tier=name) for name in names[names.index(plan.tier) + 1 :][:1]]
    for block in range(1, 16):
        if not plan.active[block]:
            active = tuple(runs or b == block for b, runs in enumerate(plan.active))
            found.append(replace(plan, active=active))
        elif plan.top_k[block] < 8:
            top_k = tuple(k + (b == block) for b, k in enumerate(plan.top_k))
            found.append(replace(plan, top_k=top_k))
    return found


def test_plans_are_those_of_the_released_network() -> None:
    assert SPACE.size == 3 * sum(math.comb(15, n - 1) * 5 ** (n - 1) for n in range(12, 17))
    assert [tier.nominal for tier in SPACE.tiers] == [3, 6, 12]


def test_the_same_seed_and_split_are_the_same_questions() -> None:
    first, again = Simulator(20, 3, "train"), Simulator(20, 3, "train")
    assert first.ids == again.ids
    assert all(torch.equal(*pair) for pair in zip(first.features(), again.features(), strict=True))
    for row, plan in enumerate(randoms(20)):
        assert first.execute(row, plan) == again.execute(row, plan) == first.execute(row, plan)


@pytest.mark.parametrize("other", [(3, "val"), (3, "test"), (4, "train")])
def test_other_seeds_and_splits_are_other_questions(other: tuple[int, str]) -> None:
    first, second = Simulator(20, 3, "train"), Simulator(20, *other)
    assert not torch.equal(first.detail, second.detail)
    assert not torch.equal(first.depth, second.depth)
    assert not any(map(torch.equal, first.features(), second.features()))
    if other[1] != "train":
        assert not set(first.ids) & set(second.ids)


def test_each_step_up_costs_time_and_work_and_loses_no_accuracy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(simulator, "_NOISE", 0.0)
    environment = Simulator(60, 0, "train")
    steps = 0
    for row, plan in enumerate([*GRID, *randoms(15)]):
        before = environment.execute(row, plan)
        for more in dearer(plan):
            after = environment.execute(row, more)
            steps += 1
            assert after.timings.latency("total") > before.timings.latency("total")
            assert after.timings.prefill > before.timings.prefill
            assert after.gflop > before.gflop
            assert after.accuracy >= before.accuracy
    assert steps > 500


def test_latency_varies_by_2_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Simulator(800, 0, "train")
    pairs = list(enumerate(randoms(800)))

    def latencies() -> Tensor:
        times = [environment.execute(*pair).timings.latency("total") for pair in pairs]
        return torch.tensor(times, dtype=torch.float64)

    noisy = latencies()
    monkeypatch.setattr(simulator, "_NOISE", 0.0)
    ratio = noisy / latencies() - 1
    assert ratio.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(ratio.mean().item()) < 0.02 * 3 / math.sqrt(800)
    assert ratio.abs().max() < 0.1


def test_answers_suffer_as_their_questions_need() -> None:
    environment = Simulator(2, 0, "train")
    environment.detail, environment.depth = torch.tensor([0.2, 1.0]), torch.tensor([0.0, 1.0])
    full = SPACE.full
    assert environment.accuracy(0, full) == environment.accuracy(1, full) == pytest.approx(0.9)
    coarse = replace(full, tier="low")
    assert environment.accuracy(0, coarse) == pytest.approx(0.9)
    assert environment.accuracy(1, coarse) == pytest.approx(0.9 * math.exp(-((0.7 / 0.25) ** 2)))
    narrow = replace(full, top_k=SPACE.uniform(4))
    assert environment.accuracy(0, narrow) == pytest.approx(0.9)
    assert environment.accuracy(1, narrow) == pytest.approx(0.9 * (1 - 0.6 * 15 / 32))
    shallow = replace(full, active=tuple(block not in (4, 5) for block in range(16)))
    assert environment.accuracy(0, shallow) == pytest.approx(0.9 * 0.999 * 0.92)
    assert environment.accuracy(1, shallow) == pytest.approx(0.9 * 0.999 * 0.92 * (1 - 0.6 / 8))


def test_tiers_differ_in_crops_and_tokens() -> None:
    environment = Simulator(1, 0, "train")
    found = [environment.execute(0, replace(SPACE.full, tier=tier.name)) for tier in SPACE.tiers]
    assert [execution.crops for execution in found] == [3, 6, 12]
    assert [execution.vision_tokens for execution in found] == [576, 1008, 1872]


def explained(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of variance that a line explains of the second half of the questions."""
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    half, targets = len(inputs) // 2, targets.double()
    weights = torch.linalg.lstsq(inputs[:half], targets[:half]).solution
    errors = targets[half:] - inputs[half:] @ weights
    return 1 - errors.var(0) / targets[half:].var(0)


def test_needs_can_be_read_from_the_features() -> None:
    environment = Simulator(400, 0, "train")
    seen = environment.features()
    assert seen.vision.shape == seen.text.shape == (400, 32)
    angles = torch.arange(1, 4) * math.pi / 2
    needs = {"vision": (environment.detail, seen.vision), "text": (environment.depth, seen.text)}
    for need, feature in needs.values():
        waves = need[:, None] * angles
        assert (explained(feature, torch.cat([waves.sin(), waves.cos()], 1)) > 0.9).all()
        assert explained(feature, need[:, None]) > 0.9
    # Not from the other feature.
    assert explained(seen.text, environment.detail[:, None]) < 0.2


def test_one_reading_holds_for_all_splits() -> None:
    train, test = Simulator(200, 1, "train"), Simulator(200, 1, "test")
    both = torch.cat([train.features().vision, test.features().vision])
    assert explained(both, torch.cat([train.detail, test.detail])[:, None]) > 0.9


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_choosing_by_question_beats_the_lookup_table(seed: int) -> None:
    held, profiled = Simulator(80, seed, "test"), Simulator(40, seed, "val")
    table = build(
        [
            record(profiled.ids[row], plan, profiled.execute(row, plan))
            for plan in GRID
            for row in range(40)
        ],
        "total",
    )
    answers = [[held.execute(row, plan) for plan in GRID] for row in range(80)]
    budgets = 100 + 240 * torch.rand(80, 1, generator=torch.Generator().manual_seed(seed)).double()
    accuracy = torch.tensor([[one.accuracy for one in row] for row in answers]).double()
    latency = torch.tensor([[one.timings.latency("total") for one in row] for row in answers])
    rewards = hinge(accuracy, latency.double(), budgets)
    looked_up = [GRID.index(table.plan(table.best(float(b)), SPACE, ORDER)) for b in budgets]
    by_table = rewards[torch.arange(80), looked_up].mean()
    by_question = rewards.amax(1).mean()
    fixed = rewards.mean(0).amax()
    assert by_question - by_table >= 0.02
    assert by_table > fixed, "the table uses the budget"
