"""Whether maps point at what experts drew boxes around.

Letters: N images, K concepts, H W feature grid. Boxes are those of `losses`: concept, then left,
top, right and bottom as shares of the image's sides.

The peak of a map is the centre of its highest cell. That is where the highest point of the map lies
after bilinear enlargement to ever more pixels, without depending on their number, and without the
flat border that an enlarged map has, where a peak would slide into the corner of the image. Of
several highest cells each is the peak with the same probability, so that an empty map scores what
chance scores, wherever its first cell is.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moectl.csr.losses import Box, box_masks


def pointing(maps: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Probability that the peak lies in any box of that concept in that image.

    Args:
        maps: (N, K, H, W), concept maps, or similarity maps with the highest of the M prototypes.
        boxes: of each of the N images.

    Returns:
        (N, K) float64: 0 or 1, or between for several peaks; `nan` without boxes.

    Source: Zhang et al. 2016 (the pointing game).
    """
    if maps.isnan().any():
        raise ValueError("maps without nan expected")
    _, exists = _masks(maps, boxes)
    peaks = (maps == maps.amax((2, 3), keepdim=True)).cpu()
    hits = (peaks & _centres_inside(maps, boxes)).sum((2, 3))
    return (hits.double() / peaks.sum((2, 3))).masked_fill(~exists, math.nan)


def overlap(cams: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Cells where sigmoid(cam) is above 0.5 and that a box touches, over cells with either.

    Args:
        cams: (N, K, H, W) logits.
        boxes: of each of the N images.

    Returns:
        (N, K) float64 in 0 to 1; `nan` without boxes.
    """
    inside, exists = _masks(cams, boxes)
    found = cams.cpu() > 0
    union = (found | inside).sum((2, 3)).double()
    return ((found & inside).sum((2, 3)) / union).masked_fill(~exists, math.nan)


def _masks(maps: Tensor, boxes: Sequence[Sequence[Box]]) -> tuple[Tensor, Tensor]:
    if maps.ndim != 4 or len(maps) != len(boxes):
        shapes = f"{tuple(maps.shape)} and boxes of {len(boxes)} images"
        raise ValueError(f"maps (N, K, H, W) and boxes of N images expected, got {shapes}")
    return box_masks(boxes, maps.shape[1], (maps.shape[2], maps.shape[3]))


def _centres_inside(maps: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Cells whose centre lies in a box, (N, K, H, W) bool; right and lower edges are outside."""
    inside = torch.zeros(maps.shape, dtype=torch.bool)
    y, x = ((torch.arange(size, dtype=torch.float64) + 0.5) / size for size in maps.shape[2:])
    for image, drawn in enumerate(boxes):
        for concept, left, top, right, bottom in drawn:
            rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
            inside[image, concept] |= rows[:, None] & columns
    return inside


def covered(boxes: Sequence[Sequence[Box]], num_concepts: int) -> Tensor:
    """Share of each image that the union of a concept's boxes covers, (N, K) float64."""
    areas = torch.zeros(len(boxes), num_concepts, dtype=torch.float64)
    for image, drawn in enumerate(boxes):
        for concept in {box[0] for box in drawn}:
            areas[image, concept] = _union([box[1:] for box in drawn if box[0] == concept])
    return areas


def _union(corners: list[tuple[float, float, float, float]]) -> float:
    """Area of boxes without counting twice, on the grid that their edges make."""
    edges = torch.tensor(corners, dtype=torch.float64)
    x, y = torch.unique(edges[:, 0::2]), torch.unique(edges[:, 1::2])
    left, top, right, bottom = edges.T[:, :, None]
    columns = (left <= x[:-1]) & (x[:-1] < right)
    rows = (top <= y[:-1]) & (y[:-1] < bottom)
    inside = (rows[:, :, None] & columns[:, None, :]).any(0)
    return float((inside * y.diff()[:, None] * x.diff()).sum())


def localise(
    maps: Tensor, boxes: Sequence[Sequence[Box]], names: Sequence[str], *, logits: bool = False
) -> dict[str, Any]:
    """Play the pointing game, and measure overlap, as plain JSON values.

    Args:
        maps: (N, K, H, W).
        boxes: of each of the N images.
        names: of the K concepts.
        logits: whether maps are logits, so that `iou` has a meaning.

    Returns:
        `pairs`, the images and concepts with boxes; over them `rate_micro`, that of hits, and
        `chance_micro`, that of a random point, which is the mean area of the boxes; `rate_macro`
        and `chance_macro`, means of the concepts; and `columns`: `pairs hits rate chance` of each.
        With logits also `iou_micro iou_macro`, and `iou` of each. What has no boxes is None.
    """
    if maps.ndim == 4 and maps.shape[1] != len(names):
        raise ValueError(f"maps of {maps.shape[1]} concepts, but {len(names)} names")
    hits = pointing(maps, boxes)
    known = ~hits.isnan()
    values = {"rate": hits, "chance": covered(boxes, len(names))}
    if logits:
        values["iou"] = overlap(maps, boxes)
    # 0 over 0 is nan.
    means = {name: part.where(known, 0).sum(0) / known.sum(0) for name, part in values.items()}
    pairs = known.sum(0).tolist()
    columns = {
        name: {
            "pairs": pairs[place],
            "hits": hits[:, place].nansum().item(),
            **{score: _plain(mean[place].item()) for score, mean in means.items()},
        }
        for place, name in enumerate(names)
    }
    found = {"pairs": sum(pairs), "columns": columns}
    for score, part in values.items():
        found[f"{score}_micro"] = _plain(part[known].mean().item())
        found[f"{score}_macro"] = _plain(means[score].nanmean().item())
    return found


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def out_of_box_rates(
    maps: Tensor, concepts: Tensor, boxes: Sequence[Sequence[Sequence[Box]]]
) -> list[float | None]:
    """Share of each prototype's exemplars on which its peak lies outside its concept's boxes.

    A high rate points to a shortcut: the prototype looks at something that comes with the finding.

    Args:
        maps: (Q, n, H, W), of Q prototypes the similarity maps of their n best training images.
        concepts: (Q,), the concept of each prototype.
        boxes: of each of the n images of each of the Q prototypes.

    Returns:
        Of each prototype, over the exemplars that have boxes; None without any.
    """
    rates = []
    for rows, concept, drawn in zip(maps, concepts.tolist(), boxes, strict=True):
        own = [[(0, *box[1:]) for box in image if box[0] == concept] for image in drawn]
        rates.append(_plain(1 - pointing(rows[:, None], own).nanmean().item()))
    return rates
