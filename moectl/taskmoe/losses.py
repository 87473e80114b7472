"""What the mixture minimises, how its gates are measured, and how their temperature falls.

Letters: B batch, E experts, C classes. Gates g are (B, E) with rows of sum 1; the usage u, (E,), is
their mean over the whole batch, on all processes. Neither diversity nor balance sees what is in an
image: any balanced assignment of whole images to single experts brings both to 0.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.taskmoe.model import MoEOutput

Diversity = Literal["gini", "entropy"]
Balance = Literal["l2", "kl", "switch", "importance"]
Schedule = Literal["cosine", "linear", "constant"]


def top_shares(gates: Tensor) -> Tensor:
    """Share of the images on which each expert has the largest gate, (E,), without gradient."""
    return F.one_hot(gates.argmax(1), gates.shape[1]).to(gates).mean(0)


def diversity_loss(gates: Tensor, kind: Diversity = "gini") -> Tensor:
    """Penalise gates that are shared among experts: 0 for one-hot gates, largest for equal ones.

    Args:
        gates: (B, E).
        kind: "gini" is the sum of all products of two different gates, at most 1 - 1 / E; "entropy"
            is at most log E.

    Returns:
        (B,), one value per image.

    Raises:
        ValueError: if the kind is unknown.

    Source: Simpson 1949 (gini); Shannon 1948 (entropy).
    """
    if kind == "gini":
        return gates.sum(1).square() - gates.square().sum(1)
    if kind == "entropy":
        return _entropy(gates)
    raise ValueError(f"diversity {kind!r}: expected 'gini' or 'entropy'")


def _entropy(shares: Tensor) -> Tensor:
    # Not `entr`, whose gradient at 0 is infinite and makes that of left-out experts nan.
    return -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(-1)


def balance_loss(usage: Tensor, kind: Balance = "l2", shares: Tensor | None = None) -> Tensor:
    """Penalise a usage of the experts, (E,), that is not equal.

    All are smallest at equal usage: 0, but 1 for "switch".

    Args:
        usage: of the global batch. The mean of what parts of a batch would give on their own is
            never smaller, and punishes parts that differ from each other.
        kind: "l2" sums squared distances to 1 / E; "importance" is the squared coefficient of
            variation, with the unbiased variance; "kl" is log E less the entropy; "switch" is
            E times the scalar product with `shares`.
        shares: see `top_shares`, of the global batch as well; for "switch" only.

    Source: Shazeer et al. 2017 (importance), Fedus et al. 2022 (switch).
    """
    experts = len(usage)
    squares = (usage - 1 / experts).square().sum()
    match kind:
        case "l2":
            return squares
        case "importance":
            return squares * experts**2 / max(experts - 1, 1)  # the usage's mean is 1 / E
        case "kl":
            return math.log(experts) - _entropy(usage)
        case "switch":
            if shares is None:
                raise ValueError("balance 'switch' needs the shares of the experts")
            return experts * (usage * shares).sum()
    raise ValueError(f"balance {kind!r}: expected 'l2', 'kl', 'switch' or 'importance'")


def gate_supervision(gates: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
    """Ask the gates to go to owners of the image's class, no matter which of several.

    Args:
        gates: (B, E).
        labels: (B,) class indices.
        owners: (C, E), 1 where an expert knows a class, else 0.

    Returns:
        (B,), minus the log of the gates of all owners together. Limit: no gradient pulls an owner
        back whom `top_k` left out.
    """
    owned = (gates * owners[labels].to(gates)).sum(1)
    return -owned.clamp_min(1e-8).log()


def z_loss(gate_logits: Tensor) -> Tensor:
    """Keep gate logits (B, E) small: squared log of the sum of their exponentials, (B,).

    Source: Zoph et al. 2022.
    """
    return gate_logits.logsumexp(1).square()


def owner_targets(
    specialist_logits: Tensor, labels: Tensor, owners: Tensor, temperature: float
) -> Tensor:
    """Average what the owners of each image's class make of it.

    Args:
        specialist_logits: (B, E, C); those of classes that a specialist does not know are ignored.
        labels: (B,) class indices.
        owners: (C, E), 1 where a specialist knows a class; every class has an owner.
        temperature: divides the logits.

    Returns:
        (B, C) rows with sum 1.

    Source: Vongkulbhisal et al. 2019.
    """
    owners = owners.to(specialist_logits.device)
    # The lowest number, not minus infinity, which would make a specialist without classes nan.
    lowest = torch.finfo(specialist_logits.dtype).min
    known = (specialist_logits / temperature).masked_fill(owners.T == 0, lowest)
    weights = owners[labels].to(known)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("be,bec->bc", weights, known.softmax(2))


def distillation(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened logits (B, C) from soft targets (B, C), times temperature².

    Returns:
        (B,), 0 where both agree.

    Source: Hinton et al. 2015.
    """
    log_probabilities = (logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_probabilities, targets, reduction="none").sum(1)


def moe_loss(  # noqa: PLR0913
    output: MoEOutput,
    labels: Tensor,
    owners: Tensor,
    *,
    usage: Tensor | None = None,
    shares: Tensor | None = None,
    targets: Tensor | None = None,
    diversity_weight: float = 0.1,
    balance_weight: float = 0.5,
    diversity: Diversity = "gini",
    balance: Balance = "l2",
    reduction: Literal["mean", "sum"] = "mean",
    gate_supervision_weight: float = 0.0,
    z_loss_weight: float = 0.0,
    distill_weight: float = 0.0,
    distill_temperature: float = 4.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up cross-entropy and the weighted terms on the gates.

    With the mean, a balance weight below the diversity weight lets all images collapse on one
    expert; with the sum, one below B times the diversity weight does.

    Args:
        output: of the model for the batch.
        labels: (B,) class indices.
        owners: (C, E), 1 where an expert knows a class.
        usage: (E,) of the global batch; that of `output` by default.
        shares: (E,) of the global batch, see `top_shares`; those of `output` by default.
        targets: (B, C) soft targets at the `distill_temperature`, see `owner_targets`.
        diversity_weight: of `diversity_loss`, the sharpness of the gates.
        balance_weight: of `balance_loss`.
        diversity: kind of the first.
        balance: kind of the second.
        reduction: of all that there is one of per image; the balance is of the batch.
        gate_supervision_weight: of `gate_supervision`.
        z_loss_weight: of `z_loss`.
        distill_weight: of `distillation`.
        distill_temperature: of the targets.
        label_smoothing: share of each label that is spread over all classes.

    Returns:
        The scalar to minimise, and without gradient its terms before their weights, `loss_…`; those
        of weight 0 are left out, but never task, diversity and balance.

    Raises:
        ValueError: if a kind or the reduction is unknown, or distillation has no targets.
    """
    if distill_weight and targets is None:
        raise ValueError(f"distill_weight = {distill_weight} needs targets")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: expected 'mean' or 'sum'")
    logits, gates, gate_logits = (part.float() for part in output)
    task = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    terms = {"task": (1.0, task), "diversity": (diversity_weight, diversity_loss(gates, diversity))}
    if gate_supervision_weight:
        owned = gate_supervision(gates, labels, owners)
        terms["gate_supervision"] = (gate_supervision_weight, owned)
    if z_loss_weight:
        terms["z"] = (z_loss_weight, z_loss(gate_logits))
    if distill_weight and targets is not None:
        terms["distill"] = (distill_weight, distillation(logits, targets, distill_temperature))
    reduced = {
        name: (weight, each.mean() if reduction == "mean" else each.sum())
        for name, (weight, each) in terms.items()
    }
    used = gates.mean(0) if usage is None else usage
    if balance == "switch" and shares is None:
        shares = top_shares(gates)
    reduced["balance"] = (balance_weight, balance_loss(used, balance, shares))
    total = torch.stack([weight * term for weight, term in reduced.values()]).sum()
    return total, {f"loss_{name}": term.detach() for name, (_, term) in reduced.items()}


def effective_experts(gates: Tensor) -> Tensor:
    """Mean over images of one over the sum of squared gates: 1 for one-hot gates, E for equal."""
    return (1 / gates.square().sum(1)).mean()


def gate_entropy(gates: Tensor) -> Tensor:
    """Mean entropy of the gates (B, E) in nats: 0 for one-hot gates, log E for equal ones."""
    return _entropy(gates).mean()


def temperature_at(
    epoch: int, epochs: int, initial: float, final: float, schedule: Schedule = "cosine"
) -> float:
    """Temperature of the gates in an epoch.

    Args:
        epoch: counted from 0.
        epochs: after how many the temperature is `final`, and stays so; at least 1.
        initial: of epoch 0.
        final: not that of "constant", which stays at `initial`.
        schedule: how it falls.

    Raises:
        ValueError: if the schedule is unknown.

    Source: Loshchilov and Hutter 2017 (cosine).
    """
    progress = min(epoch / epochs, 1.0)
    match schedule:
        case "cosine":
            return final + 0.5 * (initial - final) * (1 + math.cos(math.pi * progress))
        case "linear":
            return initial + (final - initial) * progress
        case "constant":
            return initial
    raise ValueError(f"schedule {schedule!r}: expected 'cosine', 'linear' or 'constant'")
