"""What the three stages minimise: concepts and their boxes, prototypes, and targets.

Letters: B batch, K concepts, M prototypes per concept, C classes, D projection width, H W feature
grid, P present (image, concept) pairs. Losses are computed in float32, or float64 where that is
what comes in, under autocast as well. Cross-entropy of single-label targets is torch's own.

A loss over pairs or groups is their sum over a `count`, by default their own number. Processes that
share a batch pass the number of all of them together: their losses then add up to the loss of the
whole batch. Where gradients of processes are averaged, as usual, multiply by their number. Without
pairs or groups a loss is 0 and its gradients are zeros, so that no process stays behind.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, float, float, float, float]
"""Concept index, then left, top, right and bottom as shares of the image's sides."""

BoxLoss = Literal["mse", "hinge"]
Margin = Literal["subtract", "add", "numerator", "none"]

# A box reaches into the next cell only by more than what rounding its corners in float32 explains.
_SLACK = 1e-5


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def concept_bce(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over images and columns.

    Args:
        logits: (B, K).
        targets: (B, K) in 0 to 1; readers may disagree.
        pos_weight: (K,) factors of the positive part, see `pos_weights`.
    """
    logits = _wide(logits)
    weight = None if pos_weight is None else pos_weight.to(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits), pos_weight=weight)


def pos_weights(positives: Tensor, count: int, cap: float = 20.0) -> Tensor:
    """Negatives per positive of each column, (K,), at most `cap`; a cap of 0 is none.

    Args:
        positives: (K,) positives among the training images.
        count: training images.
        cap: 13 positives among 15,000 images would otherwise weigh 1153 times a negative.

    Raises:
        ValueError: if there is no image, or there are more positives than images.
    """
    if count < 1 or positives.min() < 0 or positives.max() > count:
        raise ValueError(f"between 0 and {count} positives expected, got {positives.tolist()}")
    positives = _wide(positives)
    weights = (count - positives) / positives.clamp_min(1)
    return weights.clamp_max(cap) if cap else weights


def focal(
    logits: Tensor,
    targets: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy that looks away from what is right already; mean over (B, C).

    With gamma 0 and without alpha it is binary cross-entropy.

    Args:
        logits: (B, C).
        targets: (B, C) in 0 to 1.
        alpha: weight of positives, the rest is that of negatives; None weighs neither.
        gamma: power of the share that is still wrong.
        weights: (C,) of the classes, see `class_balanced_weights`.

    Source: Lin et al. 2017.
    """
    logits, targets = _wide(logits), _wide(targets)
    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers of logs, whose gradients stay finite where a probability rounds to 0 or 1.
    losses = -positive * targets * (gamma * wrong).exp() * right
    losses = losses - negative * (1 - targets) * (gamma * right).exp() * wrong
    return (losses if weights is None else losses * weights.to(losses)).mean()


def asymmetric(
    logits: Tensor,
    targets: Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
) -> Tensor:
    """Focal loss with a power for each sign that forgets negatives below a probability of `clip`.

    Args:
        logits: (B, C).
        targets: (B, C) in 0 to 1.
        gamma_negative: power for negatives.
        gamma_positive: power for positives.
        clip: what is taken off the probabilities of negatives.

    Returns:
        Mean over (B, C).

    Source: Ridnik et al. 2021.
    """
    logits, targets = _wide(logits), _wide(targets)
    tiny = torch.finfo(logits.dtype).tiny  # no log of 0 without a clip
    wrong = logits.sigmoid().sub(clip).clamp_min(0)
    right = (logits.neg().sigmoid() + clip).clamp(tiny, 1)
    positive = (gamma_positive * F.logsigmoid(-logits)).exp() * F.logsigmoid(logits)
    negative = wrong**gamma_negative * right.log()
    return -(targets * positive + (1 - targets) * negative).mean()


def class_balanced_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Weights of the classes by their effective numbers of images, (C,), of mean 1.

    Equal at beta 0; towards 1 they become inverse frequencies. A class without images counts as one
    with a single image. With `focal` and alpha None they make the class-balanced focal loss.

    Args:
        counts: (C,) training images of each class.
        beta: 0 or more, below 1.

    Source: Cui et al. 2019.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta {beta}: expected 0 or more, below 1")
    decay = torch.tensor(beta, dtype=torch.float64).log()
    weights = 1 / -torch.expm1(counts.double().clamp_min(1) * decay)
    return (weights / weights.mean()).to(_wide(counts).dtype)


def box_masks(
    boxes: Sequence[Sequence[Box]], num_concepts: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Draw the boxes of a batch on its feature grid.

    Every cell that a box touches is its own, at least one; boxes of the same concept in the same
    image, whoever drew them, are united.

    Args:
        boxes: of each of the B images.
        num_concepts: K.
        grid: H and W.

    Returns:
        (B, K, H, W) bool, inside a box or not, and (B, K) bool, whether there is any.

    Raises:
        ValueError: if a concept is not in 0 to K - 1, or a corner not in 0 to 1, or corners are
            swapped.
    """
    height, width = grid
    masks = torch.zeros(len(boxes) * num_concepts, height, width)
    flat = [(image, *box) for image, drawn in enumerate(boxes) for box in drawn]
    if flat:
        for image, *box in flat:
            concept, left, top, right, bottom = box
            fits = 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1
            if not (fits and 0 <= concept < num_concepts):
                expected = (
                    f"a concept below {num_concepts}, then left, top, right, bottom in 0 to 1"
                )
                raise ValueError(f"box {box} of image {image} in the batch: expected {expected}")
        corners = torch.tensor(flat, dtype=torch.float64)
        group = corners[:, 0].long() * num_concepts + corners[:, 1].long()
        columns = _touched(corners[:, 2], corners[:, 4], width)
        rows = _touched(corners[:, 3], corners[:, 5], height)
        masks.index_add_(0, group, rows[:, :, None] * columns[:, None, :])
    found = masks.view(len(boxes), num_concepts, height, width) > 0
    return found, found.flatten(2).any(2)


def _touched(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Which of the cells along one side the intervals (n,) touch, (n, cells) of 0 and 1."""
    first = (low * cells + _SLACK).floor().clamp_max(cells - 1)[:, None]
    last = (high * cells - _SLACK).ceil()[:, None]
    index = torch.arange(cells)
    return ((index == first) | ((index > first) & (index < last))).float()


def localisation_loss(
    cams: Tensor,
    mask: Tensor,
    exists: Tensor,
    kind: BoxLoss = "mse",
    count: Tensor | float | None = None,
) -> Tensor:
    """Ask a concept's map to be high inside its boxes and low outside.

    Each group, an image and a concept with boxes, gives the mean over cells inside plus the mean
    over cells outside, whatever the boxes' size. Groups without boxes have no say.

    Args:
        cams: (B, K, H, W) logits.
        mask: (B, K, H, W), inside or not, see `box_masks`.
        exists: (B, K), which groups have boxes.
        kind: "mse" takes squared distances of probabilities to 1 and 0; "hinge" asks for the sign
            of the logits only and grows with them.
        count: groups over which to average.

    Returns:
        A scalar.

    Raises:
        ValueError: if the kind is unknown.
    """
    cams = _wide(cams)
    match kind:
        case "mse":
            high, low = cams.neg().sigmoid().square(), cams.sigmoid().square()
        case "hinge":
            high, low = cams.neg().relu(), cams.relu()
        case _:
            raise ValueError(f"box loss {kind!r}: expected 'mse' or 'hinge'")
    inside = mask.to(cams)
    groups = _mean_of(high, inside) + _mean_of(low, 1 - inside)
    return _average(groups, exists.to(groups), count)


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen cells, (B, K), and 0 where there are none."""
    return (values * chosen).sum((2, 3)) / chosen.sum((2, 3)).clamp_min(1)


def _average(losses: Tensor, weights: Tensor | None, count: Tensor | float | None) -> Tensor:
    if weights is None:
        weights = torch.ones_like(losses)
    total = (weights * losses).sum()
    if count is None:
        count = weights.sum()
    # No pairs at all: 0 over 1, not 0 over 0.
    return total / torch.where(torch.as_tensor(count) > 0, count, 1)


def present_pairs(vectors: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the local vectors of concepts that are present, by targets of at least one half.

    The number of pairs differs from batch to batch. Where shapes must not, give a loss all B K
    vectors, their concepts, and the targets rounded as weights.

    Args:
        vectors: (B, K, D).
        targets: (B, K).

    Returns:
        (P, D) vectors and their concepts, (P,).
    """
    present = targets >= 0.5
    return vectors[present], present.nonzero()[:, 1]


def cosines(vectors: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every vector with every prototype, in float32 or more under autocast as well.

    Args:
        vectors: (P, D), of any length.
        prototypes: (K, M, D), of any length.

    Returns:
        (P, K, M).

    Raises:
        ValueError: if the shapes do not fit.
    """
    if vectors.ndim != 2 or prototypes.ndim != 3 or vectors.shape[1] != prototypes.shape[2]:
        shapes = f"{tuple(vectors.shape)} and {tuple(prototypes.shape)}"
        raise ValueError(f"vectors (P, D) and prototypes (K, M, D) expected, got {shapes}")
    # Autocast would round the products to 16 bits, and the losses multiply them by up to 1000.
    with torch.autocast(vectors.device.type, enabled=False):
        rows = F.normalize(_wide(prototypes).flatten(0, 1), dim=1)
        found = F.normalize(_wide(vectors), dim=1) @ rows.T
    return found.view(len(vectors), *prototypes.shape[:2])


def soft_triple(  # noqa: PLR0913 - options after the pairs
    vectors: Tensor,
    concepts: Tensor,
    prototypes: Tensor,
    *,
    scale: float = 20.0,
    gamma: float = 1000.0,
    margin: float = 0.1,
    mode: Margin = "subtract",
    count: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Tell concepts apart by each one's nearest prototypes.

    A concept's similarity is the mean of its cosines, weighted by their softmax at `gamma`; the
    loss is cross-entropy over K of the similarities times `scale`. As only near prototypes take
    part, those of a concept spread over the forms that it has.

    Args:
        vectors: (P, D), normalised here.
        concepts: (P,), the concept that each vector shows.
        prototypes: (K, M, D), normalised here.
        scale: of the similarities.
        gamma: the larger, the more the nearest prototype counts alone.
        margin: lead asked of the true concept.
        mode: "subtract" takes the margin off the true similarity. For comparison: "add" grants it
            as a bonus, "numerator" only shifts the loss by a constant, "none" leaves it out.
        count: pairs over which to average; with weights, their sum.
        weights: (P,) of the pairs.

    Source: Qian et al. 2019; Huy et al. 2025, eqs. 6-9, who print "+ margin".
    """
    if mode not in ("subtract", "add", "numerator", "none"):
        raise ValueError(f"mode {mode!r}: expected 'subtract', 'add', 'numerator' or 'none'")
    near = cosines(vectors, prototypes)
    logits = scale * ((gamma * near).softmax(2) * near).sum(2)
    if mode in ("subtract", "add"):
        lead = scale * margin * F.one_hot(concepts, logits.shape[1]).to(logits)
        logits = logits - lead if mode == "subtract" else logits + lead
    losses = F.cross_entropy(logits, concepts, reduction="none")
    if mode == "numerator":
        losses = losses - scale * margin
    return _average(losses, weights, count)


def info_nce(
    vectors: Tensor,
    concepts: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.3,
    count: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Pull all M prototypes of the shown concept, of K M in all, to each vector.

    Limit: never below log M, and lowest where the M prototypes of a concept are the same.

    Args:
        vectors: (P, D), normalised here.
        concepts: (P,), the concept that each vector shows.
        prototypes: (K, M, D), normalised here.
        temperature: by which cosines are divided.
        count: pairs over which to average; with weights, their sum.
        weights: (P,) of the pairs.

    Source: van den Oord et al. 2018.
    """
    logits = cosines(vectors, prototypes) / temperature
    own = logits[torch.arange(len(concepts), device=concepts.device), concepts]
    return _average(logits.flatten(1).logsumexp(1) - own.mean(1), weights, count)


def diversity_loss(prototypes: Tensor, threshold: float = 0.3) -> Tensor:
    """Push apart prototypes (K, M, D) of a concept whose cosine is above a threshold.

    Mean over all pairs of different prototypes of the same concept; 0 where M is 1.
    """
    num_prototypes = prototypes.shape[1]
    with torch.autocast(prototypes.device.type, enabled=False):
        rows = F.normalize(_wide(prototypes), dim=2)
        excess = (rows @ rows.mT - threshold).relu()
    excess = excess * (1 - torch.eye(num_prototypes, device=excess.device))
    pairs = len(prototypes) * num_prototypes * (num_prototypes - 1)
    return excess.sum() / max(pairs, 1)
