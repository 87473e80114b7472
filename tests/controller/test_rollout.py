"""Plans drawn, answered and compared: what they depend on, and what is done only once.

Letters: B questions, G plans of each, P = B x G.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.controller.environment import Features, Remembered
from moectl.controller.execution import Execution
from moectl.controller.importance import MOLMOE, order_of
from moectl.controller.losses import Scale, advantages
from moectl.controller.model import Policy, Scores, build
from moectl.controller.plans import Plan
from moectl.controller.policy import chosen_parts, log_prob
from moectl.controller.rewards import Pricing
from moectl.controller.rollout import Player, Rollout, draw_groups, features_of, repeat
from moectl.controller.settings import ControllerSettings
from moectl.controller.simulator import Simulator, space

SPACE = space()
ORDER = tuple(order_of(MOLMOE, SPACE.always_on)[1:])
ROWS, BUDGETS = torch.tensor([7, 2, 9]), torch.tensor([150.0, 250.0, 330.0])
SEEDS = (11, 12, 13)
ARGUMENTS: dict[str, Any] = {
    "budget_encoder": {"width": 16},
    "controller": {
        "vision": 32, "language": 32, "budget": 16, "tiers": 3, "counts": 5, "optional": 15,
        "blocks": 16, "choices": 5, "hidden": 16, "dropout": 0.5,
    },
}  # fmt: skip


class Counted(Simulator):
    """Counts how often it is asked."""

    looked = 0
    calls = 0

    def features(self) -> Features:
        self.looked += 1
        return super().features()

    def execute(self, row: int, plan: Plan) -> Execution:
        self.calls += 1
        return super().execute(row, plan)


def policy(seed: int = 0, sharpness: float = 1.0, rows: int = 16) -> Policy:
    torch.manual_seed(seed)
    built = build({**ARGUMENTS, "controller": {**ARGUMENTS["controller"], "blocks": rows}})
    with torch.no_grad():
        for head in ("tier_head", "count_head", "block_head", "top_k_head"):
            getattr(built.controller, head).weight.mul_(sharpness)
    return built


def player(of: Policy | None = None, fixed: tuple[int, ...] = ()) -> Player:
    environment = Remembered(Counted(12, 0, "train"))
    pricing = Pricing(ControllerSettings(), SPACE, None, 3.0)
    return Player(of or policy(), environment, pricing, fixed)


def roll_out(of: Player, group: int = 5, scale: Scale = "group") -> Rollout:
    return of.roll_out(ROWS, BUDGETS, group, SEEDS, scale)


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_rollout_holds_the_groups_one_after_another() -> None:
    of = player()
    found = roll_out(of)
    assert found.rows.tolist() == [7] * 5 + [2] * 5 + [9] * 5
    assert found.budgets.tolist() == [150] * 5 + [250] * 5 + [330] * 5
    simulated = Simulator(12, 0, "train")
    for place, (plan, execution) in enumerate(zip(found.plans, found.executions, strict=True)):
        plan.check(SPACE)
        row = int(found.rows[place])
        assert execution == simulated.execute(row, plan)
        assert found.accuracy[place].item() == pytest.approx(execution.accuracy)
        total = execution.timings.latency("total") + 3
        assert found.latency[place].item() == pytest.approx(total)
    priced = of.pricing.price(found.plans, found.executions, found.budgets)
    assert same(priced, (found.accuracy, found.latency, found.rewards))


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_plans_are_compared_within_their_groups(scale: Scale) -> None:
    found = roll_out(player(), scale=scale)
    groups = torch.tensor([0] * 5 + [1] * 5 + [2] * 5)
    assert same(advantages(found.rewards, groups, scale), (found.advantage, found.flat))
    torch.testing.assert_close(found.advantage.view(3, 5).sum(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_a_questions_plans_do_not_depend_on_what_it_is_batched_with() -> None:
    together = roll_out(player())
    for place in range(3):
        one = slice(place, place + 1)
        alone = player().roll_out(ROWS[one], BUDGETS[one], 5, SEEDS[place : place + 1])
        part = slice(5 * place, 5 * place + 5)
        assert alone.plans == together.plans[part]
        assert alone.executions == together.executions[part]
        torch.testing.assert_close(alone.advantage, together.advantage[part])
    order = torch.tensor([2, 0, 1])
    turned = player().roll_out(ROWS[order], BUDGETS[order], 5, [SEEDS[i] for i in order.tolist()])
    assert turned.plans == [*together.plans[10:], *together.plans[:10]]


def test_other_seeds_and_budgets_draw_other_plans() -> None:
    first = roll_out(player())
    other = player().roll_out(ROWS, BUDGETS, 5, (21, 22, 23))
    assert not any(a == b for a, b in zip(first.plans, other.plans, strict=True))
    sharp = policy(sharpness=200)
    scores = player(sharp).scores(ROWS[:1].expand(2), torch.tensor([150.0, 330.0]))
    assert not torch.equal(scores.tier[0], scores.tier[1])


def test_drawing_leaves_the_global_generator_alone() -> None:
    of = player()
    before = torch.get_rng_state()
    roll_out(of)
    of.decide(ROWS, BUDGETS)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_plans_are_executed_once() -> None:
    sure = policy()
    with torch.no_grad():
        for head in ("tier_head", "count_head"):
            getattr(sure.controller, head).weight.mul_(1000)
        sure.controller.count_head.bias.copy_(torch.tensor([0.0, 0, 0, 0, 1e6]))
        sure.controller.top_k_head.bias.copy_(torch.tensor([0.0] * 4 + [1e6]).repeat(16))
        sure.controller.top_k_head.bias[5:10] = 0  # one block has a choice left
    of = player(sure)
    found = roll_out(of, 8)
    keys = [(row, plan.key()) for row, plan in zip(found.rows.tolist(), found.plans, strict=True)]
    assert 3 < len(set(keys)) < 24
    assert found.distinct == len(set(keys))
    environment = of.environment
    assert isinstance(environment, Remembered)
    assert isinstance(environment.inner, Counted)
    assert (environment.asked, environment.answered) == (24, found.distinct)
    assert environment.inner.calls == found.distinct
    by_key = dict(zip(keys, found.rewards.tolist(), strict=True))
    assert [by_key[key] for key in keys] == found.rewards.tolist()
    roll_out(of, 8)
    assert environment.inner.calls == found.distinct, "nor in a later epoch"
    assert environment.inner.looked == 1, "features are computed once"


def test_the_same_plan_for_two_questions_is_two_plans() -> None:
    found = replace(roll_out(player()), plans=[SPACE.full] * 15)
    assert found.distinct == 3


CHOOSE: list[Callable[[Player], list[Plan]]] = [
    lambda of: roll_out(of).plans,
    lambda of: of.decide(ROWS, BUDGETS),
]


def test_plans_are_drawn_and_decided_without_dropout() -> None:
    of = player()
    for choose in CHOOSE:
        found = []
        for seed in (1, 2):
            of.policy.train()
            torch.manual_seed(seed)
            found.append(choose(of))
            assert not of.policy.training
        assert found[0] == found[1]
    assert not of.scores(ROWS, BUDGETS).tier.requires_grad


def test_scores_are_those_of_the_questions_and_their_budgets() -> None:
    of = player()
    vision, text = Simulator(12, 0, "train").features()
    with torch.no_grad():
        expected = of.policy.eval()(vision[ROWS], text[ROWS], BUDGETS)
    assert same(of.scores(ROWS, BUDGETS), expected)
    assert same(
        features_of(Features(vision, text), ROWS, torch.device("cpu")), (vision[ROWS], text[ROWS])
    )


def test_a_fixed_order_rules_draws_and_decisions() -> None:
    of = player(fixed=ORDER)
    rolled = roll_out(of)
    for plan in [*rolled.plans, *of.decide(ROWS, BUDGETS)]:
        assert plan.blocks == tuple(sorted((0, *ORDER[: len(plan.blocks) - 1])))
    assert len({len(plan.blocks) for plan in rolled.plans}) > 1


@pytest.mark.parametrize("rows", [16, 1])
@pytest.mark.parametrize("fixed", [(), ORDER])
def test_log_probabilities_are_those_of_the_draws(fixed: tuple[int, ...], rows: int) -> None:
    of = player(policy(rows=rows), fixed)
    found = roll_out(of)
    scores = repeat(of.scores(ROWS, BUDGETS), 5)
    parts = chosen_parts(found.plans, SPACE, shared=rows == 1)
    expected = log_prob(scores, found.choice, *parts, learned=not fixed)
    log_probs = of.log_probs(scores, found)
    assert torch.equal(log_probs, expected)
    assert (log_probs < 0).all()


def test_all_blocks_may_share_a_number_of_experts() -> None:
    of = player(policy(rows=1))
    chosen = [plan.top_k for plan in [*roll_out(of).plans, *of.decide(ROWS, BUDGETS)]]
    assert all(len(set(top_k[1:])) == 1 and top_k[0] == 8 for top_k in chosen)
    assert len(set(chosen)) > 1


def test_scores_are_repeated_question_by_question() -> None:
    logits = torch.arange(6.0).view(2, 3)
    top_k = torch.arange(24.0).view(2, 4, 3)
    found = repeat(Scores(logits, logits, logits, top_k), 3)
    assert found.tier.tolist() == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3
    assert torch.equal(found.top_k, torch.stack([top_k[0]] * 3 + [top_k[1]] * 3))


def test_each_question_draws_from_its_own_scores() -> None:
    def sure(places: list[int], sizes: int) -> Tensor:
        return 1e6 * torch.nn.functional.one_hot(torch.tensor(places), sizes).float()

    scores = Scores(
        sure([0, 2], 3),
        sure([1, 4], 5),
        torch.zeros(2, 15),
        sure([3, 0], 5)[:, None].repeat(1, 16, 1),
    )
    choice = draw_groups(scores, 2, (1, 2))
    assert choice.tier.tolist() == [0, 0, 2, 2]
    assert choice.active.tolist() == [1, 1, 4, 4]
    assert choice.top_k[:, 0].tolist() == [3, 3, 0, 0]
    assert len({tuple(order) for order in choice.order.tolist()}) == 4
