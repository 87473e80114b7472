"""Drawing plans from the controller's scores, and the probability of a plan.

Letters: B samples, T tiers, N counts of active blocks, O optional blocks, L blocks, J numbers of
experts.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moectl.controller.model import Scores

Blocks = Literal["learned", "fixed"]
"""Who chooses the blocks: the controller, or a fixed order that is cut off after the count."""


class Choice(NamedTuple):
    """Plans as indices into the choices."""

    tier: Tensor
    """(B,) of the tiers."""
    count: Tensor
    """(B,) of the counts."""
    order: Tensor
    """(B, O) optional blocks in the order in which they were drawn; the first ones run."""
    top_k: Tensor
    """(B, L) of the numbers of experts."""


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


def log_prob(
    scores: Scores,
    choice: Choice,
    chosen: Tensor,
    free: Tensor,
    blocks: Blocks = "learned",
) -> Tensor:
    """Return the log-probability of plans, (B,), differentiable in the scores.

    Args:
        scores: of the controller.
        choice: the plans.
        chosen: (B,) optional blocks that run.
        free: (B, L) whether a block runs and its number of experts was chosen: what was drawn for
            the others changes nothing and counts nothing.
        blocks: whether the controller chose them.
    """
    tier = scores.tier.log_softmax(1).gather(1, choice.tier[:, None])[:, 0]
    count = scores.count.log_softmax(1).gather(1, choice.count[:, None])[:, 0]
    top_k = scores.top_k.log_softmax(2).gather(2, choice.top_k[:, :, None])[:, :, 0]
    total = tier + count + (top_k * free).sum(1)
    if blocks == "learned":
        total = total + order_log_prob(scores.blocks, choice.order, chosen)
    return total


def entropies(scores: Scores) -> dict[str, Tensor]:
    """Return the mean entropy of each head over its largest possible value; scalars in 0 to 1."""

    def share(logits: Tensor) -> Tensor:
        sizes = logits.shape[-1]
        if sizes == 1:
            return logits.sum() * 0
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).mean() / torch.log(torch.tensor(float(sizes)))

    return {name: share(logits) for name, logits in scores._asdict().items()}
