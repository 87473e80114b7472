"""Losses of the noise and of the routers' balance.

Letters: B images, E experts, K chosen experts, T diffusion steps.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Balance = Literal["switch", "variance", "none"]
Weight = Literal["none", "min_snr"]
Prediction = Literal["epsilon", "v_prediction"]


class Load(NamedTuple):
    """How the experts of one block share the images."""

    shares: Tensor
    """(E,) of the assignments; they sum to 1."""
    largest: Tensor
    """Largest share times E: 1 when all are equal, E / K when K take all."""
    entropy: Tensor
    """Of the shares, over log E: 1 when all are equal."""


def shares(logits: Tensor, k_active: int) -> Tensor:
    """Share of the B K assignments that each expert gets, (E,), without a gradient."""
    chosen = logits.detach().topk(k_active, dim=1).indices
    hot = torch.zeros_like(logits).scatter_(1, chosen, 1.0)
    return hot.sum(0) / (len(logits) * k_active)


def load(share: Tensor) -> Load:
    """Describe shares (E,)."""
    experts = len(share)
    entropy = (
        -torch.special.xlogy(share, share).sum() / math.log(experts) if experts > 1 else share[0]
    )
    return Load(share, share.max() * experts, entropy)


def switch_balance(logits: Tensor, share: Tensor) -> Tensor:
    """E times the sum of an expert's share and its mean probability; 1 at the least.

    Args:
        logits: (B, E) of one block.
        share: (E,), see `shares`; of the whole batch where that is cut or dealt out.

    Source: Fedus et al. 2022.
    """
    return logits.shape[1] * (share * logits.float().softmax(1).mean(0)).sum()


def variance_balance(logits: Tensor) -> Tensor:
    """Mean over images of the variance of an image's probabilities, as the original has it.

    It pushes every image to all experts alike, whatever their load. At most 1 / E.

    Args:
        logits: (B, E) of one block.

    Returns:
        A scalar.
    """
    experts = logits.shape[1]
    apart = logits.float().softmax(1) - 1 / experts
    return apart.square().sum(1).mean() / max(experts - 1, 1)


def balance_loss(
    logits: Sequence[Tensor], kind: Balance, shares_of: Sequence[Tensor]
) -> Tensor | None:
    """Mean over blocks of the balance of their routers; None without any block of experts.

    Args:
        logits: (B, E) of each block.
        kind: which.
        shares_of: (E,) of each block.
    """
    if not logits or kind == "none":
        return None
    if kind == "variance":
        return torch.stack([variance_balance(one) for one in logits]).mean()
    pairs = zip(logits, shares_of, strict=True)
    return torch.stack([switch_balance(one, share) for one, share in pairs]).mean()


def loss_weights(alphas: Tensor, kind: Weight, prediction: Prediction, gamma: float = 5) -> Tensor:
    """Weight of the squared error at each step, (T,).

    Args:
        alphas: (T,) cumulative products, see `process`.
        kind: "min_snr" lets easy steps count no more than those of signal-to-noise ratio gamma.
        prediction: what the network predicts.
        gamma: of "min_snr".

    Source: Hang et al. 2023.
    """
    if kind == "none":
        return torch.ones_like(alphas)
    ratio = alphas / (1 - alphas)
    below = ratio.clamp(max=gamma)
    return below / ratio if prediction == "epsilon" else below / (ratio + 1)


class Terms(NamedTuple):
    """What a network learns by, as scalars."""

    loss: Tensor
    """The sum of the next one and of the last one by its weight."""
    dm_loss: Tensor
    """Weighted squared error."""
    load_loss: Tensor
    """Balance of the routers."""


def diffusion_loss(  # noqa: PLR0913 - what a loss is made of
    predicted: Tensor,
    target: Tensor,
    logits: Sequence[Tensor],
    shares_of: Sequence[Tensor],
    *,
    weights: Tensor | float = 1.0,
    balance: Balance = "switch",
    lambda_load: float = 0.01,
) -> Terms:
    """Return the loss of a batch and its two terms.

    Args:
        predicted: (B, C, H, W) what the network says.
        target: of the same size, in float32 also under autocast; see
            `process.GaussianDiffusion.target`.
        logits: (B, E) of each block of experts.
        shares_of: (E,) of each block, see `shares`.
        weights: (B,) of the images, see `loss_weights`.
        balance: of the routers.
        lambda_load: weight of that.
    """
    errors = (predicted.to(target) - target).square().mean((1, 2, 3))
    dm_loss = (weights * errors).mean()
    load_loss = balance_loss(logits, balance, shares_of)
    if load_loss is None:
        load_loss = torch.zeros_like(dm_loss)
    return Terms(dm_loss + lambda_load * load_loss, dm_loss, load_loss)
