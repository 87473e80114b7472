"""A start for a policy: what the lookup table would do, learned without a single answer.

Letters: B questions, N questions in all.
"""

import logging
from collections.abc import Sequence

import torch

from moectl.controller.environment import Features
from moectl.controller.model import Policy
from moectl.controller.plans import Plan, Space
from moectl.controller.policy import Choice, chosen_parts, log_prob
from moectl.controller.table import Table
from moectl.engine.seeding import key

log = logging.getLogger(__name__)

_BATCH = 64
_RATE = 1e-3


def choice_of(plans: Sequence[Plan], space: Space, order: Sequence[int]) -> Choice:
    """Return the choices that lead to plans, their blocks drawn in an order of importance.

    Args:
        plans: B of them.
        space: that they are of.
        order: all blocks, the most important first.
    """
    tiers = [tier.name for tier in space.tiers]
    optional = list(space.optional)
    ranked = [block for block in order if block in optional]
    tier, count, blocks, top_k = [], [], [], []
    for plan in plans:
        tier.append(tiers.index(plan.tier))
        count.append(space.counts.index(len(plan.blocks)))
        # Stable: those that run first, each part in the order of importance.
        drawn = sorted(ranked, key=lambda block: not plan.active[block])
        blocks.append([optional.index(block) for block in drawn])
        top_k.append(
            [
                space.top_k_choices.index(chosen) if free else 0
                for chosen, free in zip(plan.top_k, space.free, strict=True)
            ]
        )
    return Choice(*(torch.tensor(part) for part in (tier, count, blocks, top_k)))


def clone(  # noqa: PLR0913 - what is copied, from where, and how long
    policy: Policy,
    table: Table,
    features: Features,
    space: Space,
    *,
    budgets: tuple[float, float],
    order: Sequence[int],
    learned: bool,
    steps: int,
    seed: int,
) -> float:
    """Train a policy to do what a lookup table says, and return the last loss.

    Args:
        policy: on the CPU, changed in place.
        table: what to copy.
        features: of the training questions.
        space: of the plans.
        budgets: smallest and largest.
        order: all blocks, the most important first.
        learned: whether the policy chooses the blocks.
        steps: updates.
        seed: of the questions and budgets.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=_RATE)
    draws = torch.Generator().manual_seed(key(seed, "clone"))
    policy.eval()
    last = 0.0
    for _ in range(steps):
        rows = torch.randint(len(features.vision), (_BATCH,), generator=draws)
        low, high = budgets
        wanted = low + (high - low) * torch.rand(_BATCH, generator=draws)
        plans = [table.plan(table.best(budget), space, order) for budget in wanted.tolist()]
        scores = policy(features.vision[rows], features.text[rows], wanted)
        choice = choice_of(plans, space, order)
        if scores.shared:
            free_block = space.free.index(True) if any(space.free) else 0
            choice = choice._replace(top_k=choice.top_k[:, free_block, None])
        chosen, free = chosen_parts(plans, space, shared=scores.shared)
        loss = -log_prob(scores, choice, chosen, free, learned=learned).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        last = loss.item()
    log.info("copied the lookup table in %d updates; loss %.3f", steps, last)
    return last
