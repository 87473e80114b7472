"""Plans drawn for questions under budgets, answered and compared within their groups.

Letters: B questions of a step, G plans of each, P = B x G plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moectl.controller.environment import Environment, Features
from moectl.controller.execution import Execution
from moectl.controller.losses import Scale, advantages
from moectl.controller.model import Policy, Scores
from moectl.controller.plans import Plan, Space
from moectl.controller.policy import Choice, chosen_parts, decide, draw, log_prob, plans
from moectl.controller.rewards import Pricing


@dataclass(frozen=True)
class Rollout:
    """What a step learns from."""

    rows: Tensor
    """(P,) questions, those of a group one after another."""
    budgets: Tensor
    """(P,)."""
    choice: Choice
    plans: list[Plan]
    executions: list[Execution]
    log_prob: Tensor
    """(P,) of drawing these plans, without dropout."""
    accuracy: Tensor
    """(P,), as the next ones."""
    latency: Tensor
    rewards: Tensor
    advantage: Tensor
    flat: Tensor
    """(P,) whether all rewards of the group were the same."""

    @property
    def distinct(self) -> int:
        """Plans that differ within their groups."""
        pairs = zip(self.rows.tolist(), self.plans, strict=True)
        return len({(row, plan.key()) for row, plan in pairs})


class Player:
    """Lets a policy choose plans for the questions of an environment.

    Args:
        policy: that chooses; put into evaluation mode for it.
        environment: that answers.
        pricing: of the answers.
        fixed: optional blocks in the order in which they are taken; empty if the policy chooses.
    """

    def __init__(
        self,
        policy: Policy,
        environment: Environment,
        pricing: Pricing,
        fixed: Sequence[int] = (),
    ) -> None:
        self.policy, self.environment, self.pricing = policy, environment, pricing
        self.fixed = fixed

    @property
    def space(self) -> Space:
        """The plans there are."""
        return self.environment.space

    @torch.no_grad()
    def scores(self, rows: Tensor, budgets: Tensor) -> Scores:
        """Return the policy's scores without dropout, of questions and budgets (B,)."""
        device = next(self.policy.parameters()).device
        seen = features_of(self.environment.features(), rows, device)
        return self.policy.eval()(*seen, budgets.to(device))

    def decide(self, rows: Tensor, budgets: Tensor) -> list[Plan]:
        """Return the most probable plan of each question, (B,)."""
        return plans(decide(self.scores(rows, budgets)), self.space, self.fixed)

    def roll_out(
        self,
        rows: Tensor,
        budgets: Tensor,
        group: int,
        seeds: Sequence[int],
        scale: Scale = "group",
    ) -> Rollout:
        """Draw plans, answer by each of them, and compare.

        Args:
            rows: (B,) questions.
            budgets: (B,).
            group: G.
            seeds: B of them, one for the draws of each question.
            scale: of the advantages.
        """
        scores = Scores(*(logits.cpu() for logits in self.scores(rows, budgets)))
        choice = draw_groups(scores, group, seeds)
        rows, budgets = rows.repeat_interleave(group), budgets.repeat_interleave(group)
        drawn = plans(choice, self.space, self.fixed)
        pairs = zip(rows.tolist(), drawn, strict=True)
        executions = [self.environment.execute(row, plan) for row, plan in pairs]
        accuracy, latency, rewards = self.pricing.price(drawn, executions, budgets)
        groups = torch.arange(len(rows)) // group
        advantage, flat = advantages(rewards, groups, scale)
        drawn_with = self._log_probs(repeat(scores, group), choice, drawn)
        return Rollout(
            rows, budgets, choice, drawn, executions, drawn_with, accuracy, latency, rewards,
            advantage, flat,
        )  # fmt: skip

    def log_probs(self, scores: Scores, rollout: Rollout) -> Tensor:
        """Return the log-probability of drawn plans, (P,), under other scores of them."""
        return self._log_probs(scores, rollout.choice, rollout.plans)

    def _log_probs(self, scores: Scores, choice: Choice, drawn: Sequence[Plan]) -> Tensor:
        device = scores.tier.device
        chosen, free = (
            part.to(device) for part in chosen_parts(drawn, self.space, shared=scores.shared)
        )
        choice = Choice(*(part.to(device) for part in choice))
        return log_prob(scores, choice, chosen, free, learned=not self.fixed)


def draw_groups(scores: Scores, group: int, seeds: Sequence[int]) -> Choice:
    """Draw `group` plans of each question with a generator of its own.

    So a question's plans do not depend on what it shares a step or a process with.
    """
    drawn = []
    for place, seed in enumerate(seeds):
        own = Scores(*(logits[place : place + 1] for logits in scores))
        drawn.append(draw(repeat(own, group), torch.Generator().manual_seed(seed)))
    return Choice(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def repeat(scores: Scores, group: int) -> Scores:
    """Return each question's scores `group` times."""
    return Scores(*(logits.repeat_interleave(group, 0) for logits in scores))


def features_of(features: Features, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the features of some questions.

    Args:
        features: of N questions, see `environment.Features`.
        rows: (B,) indices of questions, 0 to N - 1.
        device: for the result.

    Returns:
        Vision and text, each with B as its first dimension.
    """
    return features.vision[rows].to(device), features.text[rows].to(device)
