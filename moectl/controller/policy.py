"""Drawing plans from the controller's scores, and the probability of a plan.

Letters: B samples, T tiers, N counts of active blocks, O optional blocks, L blocks, J numbers of
experts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.controller.model import Scores
from moectl.controller.plans import Plan, Space


class Choice(NamedTuple):
    """Plans as indices into the choices."""

    tier: Tensor
    """(B,) of the tiers."""
    active: Tensor
    """(B,) of the counts."""
    order: Tensor
    """(B, O) optional blocks in the order in which they were drawn; the first ones run."""
    top_k: Tensor
    """(B, L) of the numbers of experts; (B, 1) if all blocks share one."""


def ranked(logits: Tensor) -> Tensor:
    """Return places from the largest logit to the smallest, the first of equals first."""
    return logits.argsort(dim=1, descending=True, stable=True)


def draw(scores: Scores, generator: torch.Generator | None = None) -> Choice:
    """Draw plans: tier, count, blocks without putting back, experts of each block.

    Blocks come in the order of their logits with Gumbel noise, which is Plackett and Luce's model.

    Source: Kool et al. 2019 (Gumbel top-k).
    """

    def one(logits: Tensor) -> Tensor:
        flat = logits.softmax(-1).reshape(-1, logits.shape[-1])
        found = flat.multinomial(1, generator=generator)
        return found.view(logits.shape[:-1])

    noise = torch.empty_like(scores.blocks).exponential_(generator=generator)
    order = ranked(scores.blocks - noise.log())
    return Choice(one(scores.tier), one(scores.count), order, one(scores.top_k))


def decide(scores: Scores) -> Choice:
    """Return the most probable choices, without any random number."""
    return Choice(
        scores.tier.argmax(1), scores.count.argmax(1), ranked(scores.blocks), scores.top_k.argmax(2)
    )


def order_log_prob(logits: Tensor, order: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probability of drawing blocks in an order, (B,).

    Args:
        logits: (B, O).
        order: (B, O) all blocks; those after the chosen ones play no part.
        chosen: (B,) how many were drawn. All of them is certain whatever the order: 0.

    Sources: Plackett 1975; Luce 1959.
    """
    sorted_logits = logits.gather(1, order)
    # What is left before each draw: the logits from that place on.
    left = sorted_logits.flip(1).logcumsumexp(1).flip(1)
    places = torch.arange(logits.shape[1], device=logits.device)
    counted = (places < chosen[:, None]) & (chosen < logits.shape[1])[:, None]
    return ((sorted_logits - left) * counted).sum(1)


def plans(choice: Choice, space: Space, fixed: Sequence[int] = ()) -> list[Plan]:
    """Return the plans that choices mean, B of them.

    Args:
        choice: indices.
        space: what they point into.
        fixed: optional blocks in the order in which they are taken, if not the controller chooses
            them.
    """
    found = []
    optional = space.optional
    for tier, count, order, top_k in zip(*(part.tolist() for part in choice), strict=True):
        numbers = top_k * space.blocks if len(top_k) == 1 else top_k
        wanted = space.counts[count] - len(space.always_on)
        taken = fixed[:wanted] if fixed else [optional[place] for place in order[:wanted]]
        runs = {*space.always_on, *taken}
        experts = tuple(
            space.top_k_choices[chosen] if free else space.default_top_k * mixture
            for chosen, free, mixture in zip(numbers, space.free, space.mixtures, strict=True)
        )
        active = tuple(block in runs for block in range(space.blocks))
        found.append(Plan(space.tiers[tier].name, active, experts))
    return found


def chosen_parts(
    plans: Sequence[Plan], space: Space, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Return what of plans was a choice, for `log_prob`.

    Args:
        plans: B of them.
        space: that they are of.
        shared: whether all blocks share a number of experts.

    Returns:
        (B,) optional blocks that run, and (B, L) whether a block runs with experts of its choice;
        (B, 1) if that is shared.
    """
    counts = [len(plan.blocks) - len(space.always_on) for plan in plans]
    free = [
        [runs and own for runs, own in zip(plan.active, space.free, strict=True)] for plan in plans
    ]
    if shared:
        free = [[any(blocks)] for blocks in free]
    return torch.tensor(counts), torch.tensor(free)


def log_prob(
    scores: Scores,
    choice: Choice,
    chosen: Tensor,
    free: Tensor,
    *,
    learned: bool = True,
) -> Tensor:
    """Return the log-probability of plans, (B,), differentiable in the scores.

    Args:
        scores: of the controller.
        choice: the plans.
        chosen: (B,) optional blocks that run.
        free: (B, L) whether a block runs and its number of experts was chosen: what was drawn for
            the others changes nothing and counts nothing.
        learned: whether the controller chose the blocks.
    """
    tier = scores.tier.log_softmax(1).gather(1, choice.tier[:, None])[:, 0]
    count = scores.count.log_softmax(1).gather(1, choice.active[:, None])[:, 0]
    top_k = scores.top_k.log_softmax(2).gather(2, choice.top_k[:, :, None])[:, :, 0]
    if not learned:
        # All of them is certain: no gradient, but the head has its part in it, as processes that
        # average gradients expect of every weight.
        chosen = torch.full_like(chosen, scores.blocks.shape[1])
    blocks = order_log_prob(scores.blocks, choice.order, chosen)
    return tier + count + (top_k * free).sum(1) + blocks


def entropies(scores: Scores, space: Space, *, learned: bool = True) -> dict[str, Tensor]:
    """Return the mean entropy of each head over its largest possible value; scalars in 0 to 1.

    Heads and blocks without a choice are left out: they would never look collapsed, or always.

    Args:
        scores: of the controller.
        space: of the plans.
        learned: whether the controller chooses the blocks.
    """

    def share(logits: Tensor) -> Tensor:
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).mean() / math.log(logits.shape[-1])

    heads = scores._asdict()
    free = [any(space.free)] if scores.shared else list(space.free)
    heads["top_k"] = scores.top_k[:, free]
    if not learned:
        del heads["blocks"]
    return {
        name: share(logits)
        for name, logits in heads.items()
        if logits.shape[-1] > 1 and logits.numel()
    }
