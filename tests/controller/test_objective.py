"""What a step minimises: its gradient plan by plan, and the terms beside it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.controller.losses import divergence, policy_loss
from moectl.controller.model import Policy, build
from moectl.controller.objective import Objective
from moectl.controller.policy import entropies
from moectl.controller.rewards import Pricing
from moectl.controller.rollout import Player, Rollout
from moectl.controller.settings import ControllerSettings, GrpoSection
from moectl.controller.simulator import Simulator, space

SPACE = space()
ROWS, BUDGETS = torch.tensor([4, 1, 6]), torch.tensor([140.0, 230.0, 320.0])
GROUP = 4


def policy(seed: int = 0, dropout: float = 0.0) -> Policy:
    torch.manual_seed(seed)
    controller = {
        "vision": 32, "language": 32, "budget": 16, "tiers": 3, "counts": 5, "optional": 15,
        "blocks": 16, "choices": 5, "hidden": 16, "dropout": dropout,
    }  # fmt: skip
    return build({"budget_encoder": {"width": 16}, "controller": controller}).double()


def section(**changes: Any) -> GrpoSection:
    return GrpoSection(**{"group_size": GROUP, "entropy_coef": 0.0, **changes})


class Setting:
    """A policy, the plans it drew, and what it is to learn from them."""

    def __init__(self, of: Policy, fixed: tuple[int, ...] = ()) -> None:
        environment = Simulator(8, 0, "train")
        features = environment.features()
        exact = type(features)(*(part.double() for part in features))
        environment.features = lambda: exact  # type: ignore[method-assign]
        pricing = Pricing(ControllerSettings(), SPACE, None, 0.0)
        self.policy = of
        self.player = Player(of, environment, pricing, fixed)
        self.rollout = self.player.roll_out(ROWS, BUDGETS, GROUP, (1, 2, 3))

    def objective(
        self, rollout: Rollout | None = None, reference: Policy | None = None, **changes: Any
    ) -> Objective:
        return Objective(section(**changes), self.player, rollout or self.rollout, reference)

    def log_probability(self, number: int) -> Tensor:
        """Of one plan alone, part by part and block by block."""
        row, plan = int(self.rollout.rows[number]), self.rollout.plans[number]
        seen = (part[row : row + 1] for part in self.player.environment.features())
        scores = self.policy(*seen, self.rollout.budgets[number : number + 1])
        tiers = [tier.name for tier in SPACE.tiers]
        total = scores.tier[0].log_softmax(0)[tiers.index(plan.tier)]
        total = total + scores.count[0].log_softmax(0)[len(plan.blocks) - 12]
        for block in plan.blocks[1:]:
            total = total + scores.top_k[0, block].log_softmax(0)[plan.top_k[block] - 4]
        left = list(range(15))
        if not self.player.fixed and len(plan.blocks) < 16:
            for place in self.rollout.choice.order[number].tolist()[: len(plan.blocks) - 1]:
                total = total + scores.blocks[0, left].log_softmax(0)[left.index(place)]
                left.remove(place)
        return total


def slopes(loss: Tensor, of: Policy) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*of.parameters()], materialize_grads=True))


def move(of: Policy, scale: float = 0.05) -> None:
    """Take the policy a step away from where it was."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weights in of.parameters():
            noise = torch.randn(weights.shape, generator=generator)
            weights.add_(scale * noise.to(weights))


ORDER = tuple(range(15, 0, -1))


@pytest.mark.parametrize("fixed", [(), ORDER], ids=["learned", "fixed"])
def test_the_first_gradient_is_the_mean_of_minus_advantage_times_that_of_each_plan(
    fixed: tuple[int, ...],
) -> None:
    of = Setting(policy(), fixed)
    loss, _ = of.objective()(of.policy)
    found = slopes(loss, of.policy)
    expected = [torch.zeros_like(weights) for weights in of.policy.parameters()]
    for number, advantage in enumerate(of.rollout.advantage.double()):
        for total, slope in zip(
            expected, slopes(of.log_probability(number), of.policy), strict=True
        ):
            total -= advantage * slope / (3 * GROUP)
    assert max(slope.abs().max().item() for slope in expected) > 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert loss.item() == pytest.approx(0, abs=1e-6), "centred advantages"


def test_log_probabilities_of_the_first_call_are_kept_for_the_ratios() -> None:
    of = Setting(policy())
    objective = of.objective()
    assert objective.old is None
    objective(of.policy)
    old = torch.stack([of.log_probability(number) for number in range(3 * GROUP)]).detach()
    torch.testing.assert_close(objective.old, old)
    move(of.policy)
    loss, _ = objective(of.policy)
    now = torch.stack([of.log_probability(number) for number in range(3 * GROUP)])
    assert (now - old).abs().max() > math.log(1.2), "some ratios are clipped"
    torch.testing.assert_close(objective.old, old)
    expected = policy_loss(now, old, of.rollout.advantage.double(), 0.2)
    torch.testing.assert_close(loss, expected)
    narrower = of.objective(clip=0.01)
    narrower.old = objective.old
    assert narrower(of.policy)[0] > loss


def test_groups_without_a_spread_move_nothing() -> None:
    of = Setting(policy())
    nothing = replace(of.rollout, advantage=torch.zeros(3 * GROUP))
    loss, _ = of.objective(nothing)(of.policy)
    assert not any(slope.any() for slope in slopes(loss, of.policy))


@pytest.mark.parametrize("fixed", [(), ORDER], ids=["learned", "fixed"])
def test_entropy_of_each_head_is_rewarded(fixed: tuple[int, ...]) -> None:
    of = Setting(policy(), fixed)
    plain, _ = of.objective()(of.policy)
    loss, found = of.objective(entropy_coef=0.25)(of.policy)
    scores = of.player.scores(ROWS, BUDGETS)
    spread = entropies(scores, SPACE, learned=not fixed)
    assert found.keys() == {f"entropy_{name}" for name in spread}
    assert ("entropy_blocks" in found) == (not fixed)
    for name, value in spread.items():
        torch.testing.assert_close(found[f"entropy_{name}"], value)
    torch.testing.assert_close(loss, plain - 0.25 * torch.stack([*spread.values()]).sum())


def test_the_way_from_the_reference_costs() -> None:
    of, reference = Setting(policy()), policy().requires_grad_(False)
    near, _ = of.objective(reference=reference, kl_coef=0.5)(of.policy)
    plain, _ = of.objective()(of.policy)
    torch.testing.assert_close(near, plain)
    for one, other in zip(slopes(near, of.policy), slopes(plain, of.policy), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    kept = of.objective()
    kept(of.policy)
    move(of.policy)
    objective = of.objective(reference=reference, kl_coef=0.5)
    far, _ = objective(of.policy)
    plain, _ = of.objective()(of.policy)
    assert objective.old is not None
    assert kept.old is not None
    torch.testing.assert_close(far - plain, 0.5 * divergence(objective.old, kept.old))
    assert far > plain


def test_the_reference_has_no_dropout() -> None:
    of, reference = Setting(policy()), policy(dropout=0.9).train()
    near, _ = of.objective(reference=reference, kl_coef=0.5)(of.policy)
    torch.testing.assert_close(near, of.objective()(of.policy)[0])


def test_dropout_is_the_same_in_each_inner_iteration_that_is_seeded_alike() -> None:
    of = Setting(policy(dropout=0.4))
    objective = of.objective()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss, _ = objective(of.policy.train())
        found.append((loss, slopes(loss, of.policy)))
    (first, slope), (again, same), (other, _) = found
    assert torch.equal(first, again)
    assert all(map(torch.equal, slope, same))
    assert not torch.isclose(first, other), "other masks, other ratios"


def test_rows_and_budgets_are_seen_once_a_group() -> None:
    of = Setting(policy())
    objective = of.objective()
    assert objective.rows.tolist() == ROWS.tolist()
    assert objective.budgets.tolist() == BUDGETS.tolist()
    calls: list[int] = []
    of.policy.controller.register_forward_hook(lambda _, seen, __: calls.append(len(seen[0])))
    objective(of.policy)
    assert calls == [3]


def test_steps_along_the_gradient_raise_the_reward_of_what_was_drawn() -> None:
    of = Setting(policy())
    objective = of.objective()
    optimizer = torch.optim.SGD(of.policy.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        loss, _ = objective(of.policy)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
