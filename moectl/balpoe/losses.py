"""What balanced experts minimise, how batches are mixed, and how experts become one posterior.

Letters: B batch, N items, E experts, K classes, C channels, H W pixels. An expert with tau trains
against tau times the log of the training prior, so its bare logits aim at the prior to the power
1 - tau: tau 0 is the training prior, 1 the uniform one, 2 the inverted one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["default", "mixup", "cutmix", "mixup_cutmix"]


@dataclass(frozen=True)
class Mixed:
    """A batch in which each image carries `lam` of its own label and the rest of its partner's."""

    images: Tensor  # (B, C, H, W)
    labels: Tensor  # (B,)
    partners: Tensor  # (B,)
    lam: float


def mix(
    images: Tensor, labels: Tensor, mode: Mode, mixup_alpha: float, cutmix_alpha: float
) -> Mixed:
    """Blend every image of a batch with another one, by one share drawn from Beta(alpha, alpha).

    An alpha of 0 leaves the batch as it is. All draws come from torch's global CPU generator, and
    nothing waits for an accelerator. The input is never written to.

    Args:
        images: (B, C, H, W), floating point.
        labels: (B,) class indices.
        mode: `mixup_cutmix` tosses a fair coin between the two per batch.
        mixup_alpha: concentration for `mixup`, 0 or more.
        cutmix_alpha: concentration for `cutmix`, 0 or more.

    Source: Zhang et al. 2018 (mixup), Yun et al. 2019 (CutMix).
    """
    if mode == "mixup_cutmix":
        mode = "mixup" if torch.rand(()).item() < 0.5 else "cutmix"
    alpha = {"default": 0.0, "mixup": mixup_alpha, "cutmix": cutmix_alpha}[mode]
    if alpha == 0:
        return Mixed(images, labels, labels, lam=1.0)
    lam = torch.distributions.Beta(alpha, alpha).sample().item()
    order = torch.randperm(len(labels)).to(images.device, non_blocking=True)
    if mode == "mixup":
        blended = torch.lerp(images, images[order], 1 - lam)
    else:
        blended, lam = _paste(images, order, lam)
    return Mixed(blended, labels, labels[order], lam)


def _paste(images: Tensor, order: Tensor, lam: float) -> tuple[Tensor, float]:
    """Paste one box of the partner's pixels; return the share of pixels that stayed."""
    height, width = images.shape[-2:]
    top, bottom = _side(height, math.sqrt(1 - lam))
    left, right = _side(width, math.sqrt(1 - lam))
    pasted = images.clone()
    pasted[..., top:bottom, left:right] = images[..., top:bottom, left:right][order]
    # The box is cut off at the border, so its share is counted, not assumed.
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def _side(size: int, share: float) -> tuple[int, int]:
    length = int(size * share)
    start = int(torch.randint(size, ()).item()) - length // 2
    return max(start, 0), min(start + length, size)


def log_prior(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Turn training images per class into log frequencies, finite for empty classes too.

    Args:
        class_counts: (K,).

    Returns:
        (K,) float32.

    Raises:
        ValueError: if a count is negative or their sum is 0.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or counts.sum() <= 0 or counts.min() < 0:
        raise ValueError("class_counts must be one list of counts with a positive sum")
    return torch.log(counts / counts.sum() + 1e-9).float()


def expert_losses(logits: Tensor, labels: Tensor, log_prior: Tensor, taus: Tensor) -> Tensor:
    """Cross-entropy of every expert after tau times the log prior is added to its logits.

    With tau = 0 this is plain cross-entropy, with tau = 1 balanced softmax.

    Args:
        logits: (B, E, K), any floating type; the loss is computed in float32.
        labels: (B,) class indices.
        log_prior: (K,).
        taus: (E,).

    Returns:
        (E,) means over the batch.

    Raises:
        ValueError: if there is not one tau per expert.

    Source: Sanchez Aimar et al. 2023; Ren et al. 2020 (balanced softmax).
    """
    experts = logits.shape[1]
    if taus.shape != (experts,):
        raise ValueError(f"taus of shape {tuple(taus.shape)} for {experts} experts")
    adjusted = logits.float() + taus[:, None] * log_prior
    repeated = labels[:, None].expand(-1, experts)
    losses = F.cross_entropy(adjusted.flatten(0, 1), repeated.flatten(), reduction="none")
    return losses.view(-1, experts).mean(0)


def balpoe_loss(
    logits: Tensor, mixed: Mixed, log_prior: Tensor, taus: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Average the experts' losses over both labels of a mixed batch.

    Equal to cross-entropy against the blended one-hot labels.

    Args:
        logits: (B, E, K) of the mixed images.
        mixed: the batch, see `mix`.
        log_prior: (K,) of the training set.
        taus: (E,).

    Returns:
        The scalar to minimise, and each expert's own loss as `loss_expert_0`, `loss_expert_1`, …
        without gradient.

    Raises:
        ValueError: if there is not one tau per expert.

    Source: Sanchez Aimar et al. 2023; Zhang et al. 2018 (two labels).
    """
    losses = expert_losses(logits, mixed.labels, log_prior, taus)
    if mixed.lam < 1:
        others = expert_losses(logits, mixed.partners, log_prior, taus)
        losses = mixed.lam * losses + (1 - mixed.lam) * others
    parts = {f"loss_expert_{index}": loss for index, loss in enumerate(losses.detach())}
    return losses.mean(), parts


def mixed_accuracy(predictions: Tensor, mixed: Mixed) -> Tensor:
    """Count a hit on the own label as `lam` and one on the partner's as the rest; scalar."""
    own = (predictions == mixed.labels).float().mean()
    partner = (predictions == mixed.partners).float().mean()
    return mixed.lam * own + (1 - mixed.lam) * partner


def target_log_priors(log_prior: Tensor, taus: Tensor) -> Tensor:
    """Give the label distribution, (E, K) in logs, for which each expert's bare logits stand."""
    return torch.log_softmax((1 - taus)[:, None] * log_prior, dim=-1)


def to_uniform(logits: Tensor, log_prior: Tensor, taus: Tensor) -> Tensor:
    """Move the experts' logits, (N, E, K), from their own priors to the uniform one."""
    return logits + (taus - 1)[:, None] * log_prior


def log_posterior(
    logits: Tensor,
    log_prior: Tensor,
    taus: Tensor,
    target_log_prior: Tensor,
    kind: str = "poe",
    weights: Tensor | None = None,
) -> Tensor:
    """Combine the experts into one posterior for items whose labels follow a given prior.

    Experts are moved to one common prior before they are combined: posteriors under different
    priors average to the posterior of no distribution.

    Args:
        logits: (N, E, K) as the model gives them.
        log_prior: (K,) of the training set.
        taus: (E,) with which the experts were trained.
        target_log_prior: (K,) of the items to be judged; an additive constant has no effect.
        kind: `poe` (normalised geometric mean), `mixture` (arithmetic mean) or `single:e` (expert
            e alone, counted from 0).
        weights: (E,) of `poe` and `mixture`, not negative, with sum 1; equal when left out.

    Returns:
        (N, K) log-probabilities.

    Raises:
        ValueError: if the kind is unknown or the weights are no shares.

    Source: Sanchez Aimar et al. 2023.
    """
    balanced = to_uniform(logits, log_prior, taus)
    if kind.startswith("single:"):
        return _single(balanced, kind.removeprefix("single:"), target_log_prior)
    if weights is None:
        weights = torch.full_like(taus, 1 / len(taus), dtype=balanced.dtype)
    elif weights.shape != taus.shape or weights.min() < 0 or abs(weights.sum() - 1) > 1e-4:
        raise ValueError(f"weights must be {len(taus)} shares with sum 1, got {weights.tolist()}")
    match kind:
        case "poe":
            pooled = torch.einsum("nek,e->nk", balanced, weights.to(balanced))
            return torch.log_softmax(pooled + target_log_prior, dim=-1)
        case "mixture":
            each = torch.log_softmax(balanced + target_log_prior, dim=-1)
            return torch.logsumexp(each + weights.log()[:, None], dim=1)
    raise ValueError(f"posterior kind {kind!r}: expected 'poe', 'mixture' or 'single:e'")


def _single(balanced: Tensor, expert: str, target_log_prior: Tensor) -> Tensor:
    experts = balanced.shape[1]
    if not (expert.isdecimal() and int(expert) < experts):
        raise ValueError(f"posterior kind 'single:{expert}': experts are 0 to {experts - 1}")
    return torch.log_softmax(balanced[:, int(expert)] + target_log_prior, dim=-1)
