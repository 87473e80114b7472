"""What a person can change about what the model sees: concepts, places, prototypes.

Letters: B batch, N training images, K concepts, M prototypes per concept, C classes, H W feature
grid. Scores s (B, K, M) are the highest cells of similarity maps S (B, K, M, H, W). Nothing here
changes its arguments.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from moectl.csr.losses import box_masks
from moectl.csr.model import CSRNet, weigh

Corners = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the image's sides."""
Mode = Literal["zero", "absent-median", "absent-mean", "clip", "drop"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Norm(NamedTuple):
    """Fixed values by which scores are standardised before the task head."""

    mean: Tensor
    """(K, M), or (K, 1) of the highest scores."""
    deviation: Tensor
    """Of the same shape."""


class Head(NamedTuple):
    """The linear task head."""

    weight: Tensor
    """(C, K M), or (C, K) of the highest score of each concept."""
    bias: Tensor
    """(C,)."""
    norm: Norm | None = None
    kept: Tensor | None = None
    """(K, M) bool, the prototypes that have a say; None for all."""

    @property
    def neutral(self) -> Tensor | None:
        """Scores that contribute exactly 0, (K, M) or (K, 1); None where these are zeros."""
        return None if self.norm is None else self.norm.mean


def head_of(model: CSRNet) -> Head:
    """Take the task head out of a model, without gradients."""
    tables = (
        part.detach().view(model.num_concepts, -1) for part in (model.task_mean, model.task_std)
    )
    weight, bias = model.task_head.weight.detach(), model.task_head.bias.detach()
    return Head(weight, bias, Norm(*tables), model.kept)


class Statistics(NamedTuple):
    """Scores of training images without and with each concept, (K, M); `nan` without images."""

    absent_median: Tensor
    absent_mean: Tensor
    absent_low: Tensor
    """5 % are below."""
    absent_high: Tensor
    """5 % are above."""
    present_median: Tensor
    present_mean: Tensor
    present_low: Tensor
    present_high: Tensor


def statistics(scores: Tensor, concepts: Tensor) -> Statistics:
    """Summarise training scores.

    Args:
        scores: (N, K, M).
        concepts: (N, K) in 0 to 1; present from 0.5 on.
    """
    if scores.ndim != 3 or concepts.shape != scores.shape[:2]:
        shapes = f"{tuple(scores.shape)} and {tuple(concepts.shape)}"
        raise ValueError(f"scores (N, K, M) and concepts (N, K) expected, got {shapes}")
    values = scores.detach().double().cpu().numpy()
    present = concepts.cpu().numpy() >= 0.5
    parts: list[Tensor] = []
    for group in (~present, present):
        found = np.full((4, *values.shape[1:]), math.nan)
        for concept in range(values.shape[1]):
            rows = values[group[:, concept], concept]
            if len(rows):
                median, low, high = np.quantile(rows, (0.5, 0.05, 0.95), axis=0)
                found[:, concept] = median, rows.mean(0), low, high
        parts.extend(torch.from_numpy(found).to(scores))
    return Statistics(*parts)


def statistics_to_plain(found: Statistics) -> dict[str, list[list[float | None]]]:
    """Lists that JSON can hold, with None for `nan`."""
    return {
        name: [[None if math.isnan(value) else value for value in row] for row in table.tolist()]
        for name, table in found._asdict().items()
    }


def statistics_from_plain(plain: Mapping[str, Sequence[Sequence[float | None]]]) -> Statistics:
    """Undo `statistics_to_plain`, in float32."""
    return Statistics(
        *(
            torch.tensor([[math.nan if value is None else value for value in row] for row in table])
            for table in (plain[name] for name in Statistics._fields)
        )
    )


# Places


def importance(
    positive: Sequence[Corners],
    negative: Sequence[Corners],
    alpha: float,
    grid: tuple[int, int],
) -> Tensor:
    """Weights of the cells: 0 in negative boxes, else 1 in positive ones, else alpha.

    Without any positive box the rest weighs 1: to say where not to look says nothing about where to
    look. Every cell that a box touches is its own.

    Args:
        positive: boxes to look into.
        negative: boxes to ignore, also inside of positive ones.
        alpha: 0 or more, below 1.
        grid: H and W.

    Returns:
        (H, W) float32.

    Source: Huy et al. 2025, eq. 12.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha {alpha}: expected 0 or more, below 1")
    drawn = [[(0, *box) for box in boxes] for boxes in (positive, negative)]
    masks, _ = box_masks(drawn, 1, grid)
    inside, ignored = masks[:, 0]
    weights = torch.full(grid, alpha if positive else 1.0)
    return weights.masked_fill(inside, 1).masked_fill(ignored, 0)


def edited_maps(maps: Tensor, weights: Tensor) -> Tensor:
    """Weigh the cells of similarity maps, without their negatives; where the weight is 1, nothing.

    Args:
        maps: (B, K, M, H, W).
        weights: (H, W), or (B, H, W) of each image, or (B, K, H, W) of each concept in it.

    Raises:
        ValueError: if the weights fit none of these.
    """
    batch, concepts, _, *grid = maps.shape
    fitting = ([*grid], [batch, *grid], [batch, concepts, *grid])
    if [*weights.shape] not in fitting:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit maps {tuple(maps.shape)}")
    # Else the batch of (B, H, W) would meet the axis of concepts.
    weights = weights[:, None] if weights.ndim == 3 else weights
    return weigh(maps, weights.to(maps).expand(batch, concepts, *grid))


def edited_scores(maps: Tensor, weights: Tensor) -> Tensor:
    """Highest cells of `edited_maps`, (B, K, M).

    A larger positive box never lowers a score, as long as negative ones count as 0.
    """
    return edited_maps(maps, weights).amax((3, 4))


# Concepts


def reject(
    scores: Tensor,
    concept: int | Tensor,
    mode: Mode = "zero",
    known: Statistics | None = None,
    neutral: Tensor | None = None,
) -> Tensor:
    """Say that a concept is not there.

    Args:
        scores: (B, K, M).
        concept: its index, or (B, K) bool, which concepts of which images.
        mode: "zero", as published; the "absent-median" or "absent-mean" of images without it;
            "clip" at that mean; or "drop" all that it contributes.
        known: statistics of training images, for all modes but "zero" and "drop".
        neutral: scores that contribute nothing, for "drop", see `Head.neutral`.

    Raises:
        ValueError: if the statistics are missing, or no training image was without the concept.

    Source: Huy et al. 2025, for "zero".
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "zero" or (mode == "drop" and neutral is None):
        values = torch.zeros_like(scores)
    elif mode == "drop" and neutral is not None:
        values = neutral.to(scores)
    elif known is None:
        raise ValueError(f"rejecting by {mode} needs statistics of training images")
    elif mode == "clip":
        values = torch.minimum(scores, known.absent_mean.to(scores))
    else:
        values = known.absent_median if mode == "absent-median" else known.absent_mean
        values = values.to(scores)
    return _replaced(scores, concept, values)


def confirm(scores: Tensor, concept: int | Tensor, known: Statistics) -> Tensor:
    """Say that a concept is there: scores are at least those of the median image with it.

    Args:
        scores: (B, K, M).
        concept: its index, or (B, K) bool, which concepts of which images.
        known: statistics of training images.

    Raises:
        ValueError: if no training image had the concept.
    """
    return _replaced(scores, concept, torch.maximum(scores, known.present_median.to(scores)))


def set_value(scores: Tensor, concept: int | Tensor, value: float) -> Tensor:
    """Give all M scores of a concept, or of those in (B, K) bool, one value from -1 to 1."""
    if not -1 <= value <= 1:
        raise ValueError(f"value {value}: expected a cosine, -1 to 1")
    return _replaced(scores, concept, torch.full_like(scores, value))


def _replaced(scores: Tensor, concept: int | Tensor, values: Tensor) -> Tensor:
    num_concepts = scores.shape[1]
    if isinstance(concept, int):
        if not 0 <= concept < num_concepts:
            raise ValueError(f"concept {concept}: expected 0 to {num_concepts - 1}")
        concept = torch.arange(num_concepts) == concept
    chosen = concept.to(scores.device).expand(scores.shape[:2])[:, :, None]
    found = torch.where(chosen, values, scores)
    unknown = found.isnan() & ~scores.isnan()
    if unknown.any():
        places = unknown.any(2).any(0).nonzero()[:, 0].tolist()
        raise ValueError(f"no training image tells how concepts {places} score then")
    return found


# What follows


class Contributions(NamedTuple):
    """What makes up the logits."""

    values: Tensor
    """(B, C, K), of each concept to each class."""
    bias: Tensor
    """(C,)."""
    logits: Tensor
    """(B, C), bias and all contributions."""


def contributions(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None = None,
    kept: Tensor | None = None,
) -> Contributions:
    """Split the logits of a linear task head by concepts.

    Args:
        scores: (B, K, M).
        weight: (C, K M), or (C, K) of the highest score of each concept.
        bias: (C,).
        norm: of what the weights apply to.
        kept: (K, M) bool; what others say is 0, and their scores are never the highest.
    """
    table = weight.view(len(weight), scores.shape[1], -1)
    if table.shape[2] < scores.shape[2]:
        if kept is not None:
            scores = scores.masked_fill(~kept, -1)
            kept = kept.any(1, keepdim=True)
        scores = scores.amax(2, keepdim=True)
    if norm is not None:
        scores = (scores - norm.mean) / norm.deviation
    if kept is not None:
        scores = scores * kept
    values = torch.einsum("bkm,ckm->bck", scores, table)
    return Contributions(values, bias, bias + values.sum(2))


def margins(logits: Tensor, *, multilabel: bool) -> Tensor:
    """How far each image is from another decision, (B,) in 0 to 1.

    Of one class per image, the lead of the highest probability over the next; of several, the least
    |2 p - 1| of any class.

    Args:
        logits: (B, C).
        multilabel: whether an image may have several classes.
    """
    if multilabel:
        return (2 * logits.sigmoid() - 1).abs().amin(1)
    top = logits.softmax(1).topk(2, dim=1).values
    return top[:, 0] - top[:, 1]
