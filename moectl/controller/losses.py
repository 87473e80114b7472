"""Group-relative policy optimisation, and rewards of accuracy under a latency budget.

Letters: B plans, G plans of a group.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]

_EPS = 1e-4
_SAME = 1e-6  # a group whose rewards spread less says nothing


def advantages(rewards: Tensor, groups: Tensor, scale: Scale = "group") -> tuple[Tensor, Tensor]:
    """Return how much better than its group each plan did.

    Args:
        rewards: (B,).
        groups: (B,) number of the group of each plan, from 0 on.
        scale: divide by the deviation of the group, of all, or not.

    Returns:
        (B,) advantages, 0 in groups whose rewards are all the same; and (B,) whether they are.

    Source: Shao et al. 2024.
    """
    # Single precision would see a spread among equal rewards far below 0.
    exact = rewards.double()
    sizes = groups.bincount()
    means = groups.bincount(exact) / sizes
    centred = exact - means[groups]
    squares = groups.bincount(centred.square())
    spread = (squares / (sizes - 1).clamp(min=1)).sqrt()[groups]
    flat = spread < _SAME
    centred = centred.masked_fill(flat, 0)
    if scale != "none":
        centred = centred / ((spread if scale == "group" else exact.std()) + _EPS)
    return centred.to(rewards), flat


def policy_loss(log_probs: Tensor, old: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """Return the clipped surrogate to minimise.

    At equal probabilities its gradient is that of the mean of -A log p.

    Args:
        log_probs: (B,) of the plans now.
        old: (B,) at the first update from these plans, without a gradient.
        advantage: (B,).
        clip: of the ratio.

    Source: Schulman et al. 2017; Shao et al. 2024.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return the estimate of the divergence from a reference policy, never negative.

    Args:
        log_probs: (B,) of the plans now.
        reference: (B,) by the reference policy.

    Source: Shao et al. 2024, equation 4.
    """
    ratio = reference - log_probs
    return (ratio.exp() - ratio - 1).mean()


def composite(
    accuracy: Tensor, latency: Tensor, budget: Tensor, cost: Tensor, weights: Mapping[str, float]
) -> Tensor:
    """Return the original's reward, (B,).

    Its sigmoid costs a quarter at the budget and falls below it, and so do the bonus for being
    fast and the cost: it hardly uses the budget.

    Args:
        accuracy: (B,).
        latency: (B,) of the same unit as the budget.
        budget: (B,).
        cost: (B,) share of the full network that a plan uses.
        weights: of `accuracy`, `latency`, `over`, `cost` and `under`.
    """
    ratio = latency / budget
    return (
        weights["accuracy"] * accuracy
        - weights["latency"] * (10 * (ratio - 1)).sigmoid()
        - weights["over"] * (ratio - 1).clamp(min=0).square()
        - weights["cost"] * cost
        + weights["under"] * (1 - ratio).clamp(min=0)
    )


def hinge(
    accuracy: Tensor,
    latency: Tensor,
    budget: Tensor,
    *,
    over: float = 10.0,
    margin: float = 0.03,
    violation: float = 0.1,
) -> Tensor:
    """Return accuracy less what a missed budget costs, (B,): nothing where it is met.

    Args:
        accuracy: (B,).
        latency: (B,).
        budget: (B,).
        over: weight of the square of what is above the budget, less the margin.
        margin: share of the budget that is kept free.
        violation: cost of any violation.
    """
    ratio = latency / budget
    above = (ratio - (1 - margin)).clamp(min=0).square()
    return accuracy - over * above - violation * (ratio > 1).to(accuracy)
