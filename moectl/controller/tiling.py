"""How Molmo cuts an image into overlapping crops, and where their patches stand among the tokens.

A view of the whole image comes first, then an enlarged one cut into rows and columns of crops that
overlap. Every pixel of the enlarged one is read from one crop only, far from its edges if possible.

Letters: r c rows and columns of crops, n crops with the view of the whole image, p pooling,
N patches of a crop, V tokens that stand for a part of the image.

Source: Deitke et al. 2024 (Molmo), and the preprocessing code published with its weights.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.controller.plans import Tier

if TYPE_CHECKING:
    from PIL.Image import Image

TIERS = (Tier("low", 1, 3, 3), Tier("medium", 4, 8, 6), Tier("high", 9, 12, 12))
PREFERRED = {"low": (2, 3), "medium": (6, 4, 8), "high": (12, 9)}
"""Numbers of crops that win when two tilings fit an image equally well."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of crops and patches; MolmoE's unless told otherwise.

    Raises:
        ValueError: if the sizes do not divide one another.
    """

    crop: int = 336
    """Pixels of an edge of a crop."""
    patch: int = 14
    """Pixels of an edge of a patch."""
    margin: int = 4
    """Patches at an edge that lie inside the neighbouring crop too."""
    pooling: int = 2
    """p, patches of an edge of the window that becomes one token."""

    def __post_init__(self) -> None:
        if self.crop % (self.patch * self.pooling):
            raise ValueError(f"crop = {self.crop}: no multiple of {self.patch} x {self.pooling}")
        if self.margin % self.pooling:
            raise ValueError(f"margin = {self.margin}: no multiple of {self.pooling}")
        if self.step < 1:
            raise ValueError(f"margin = {self.margin}: nothing is left of {self.side} patches")

    @property
    def side(self) -> int:
        """Patches of an edge of a crop; N is its square."""
        return self.crop // self.patch

    @property
    def step(self) -> int:
        """Patches from one crop to the next."""
        return self.side - 2 * self.margin

    def patches(self, crops: int) -> int:
        """Patches of an edge along which so many crops lie."""
        return crops * self.step + 2 * self.margin

    def size(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Height and width, in pixels, of the image that is cut into r x c crops."""
        rows, columns = tiling
        return self.patches(rows) * self.patch, self.patches(columns) * self.patch

    def tokens(self, tiling: tuple[int, int]) -> int:
        """All tokens of an image: parts, ends of rows, beginning and end of both views."""
        rows, columns = (self.patches(crops) // self.pooling for crops in tiling)
        whole = self.side // self.pooling
        return whole * (whole + 1) + 2 + rows * (columns + 1) + 2


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that stand for an image."""

    start: int
    end: int
    part: int
    """The place of a part of the image, to which what is seen there is added."""
    row: int
    """The end of a row of parts."""


def choose(width: int, height: int, tier: Tier) -> tuple[int, int]:
    """Return rows and columns of crops, of a tier's number, that distort the image least.

    Least by |ln((c/r) / (W/H))|, compared exactly. Ties go to the preferred number of crops, then
    to the smaller number, then to fewer rows.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        tier: whose range of crops is never left.
    """
    preferred = PREFERRED.get(tier.name, ())

    def rank(tiling: tuple[int, int]) -> tuple[Fraction, int, int, int]:
        rows, columns = tiling
        ratio = Fraction(columns * height, rows * width)
        crops = rows * columns
        place = preferred.index(crops) if crops in preferred else len(preferred)
        return max(ratio, 1 / ratio), place, crops, rows

    return min(tilings(tier.fewest, tier.most), key=rank)


def tilings(fewest: int, most: int) -> list[tuple[int, int]]:
    """Return rows and columns of all tilings whose number of crops lies in a range."""
    sides = range(1, most + 1)
    return [(r, c) for r in sides for c in sides if fewest <= r * c <= most]


def token_ids(tiling: tuple[int, int], geometry: Geometry, marks: Marks) -> list[int]:
    """Return the ids that stand for an image in the text: the whole first, then the crops."""
    whole = geometry.side // geometry.pooling
    rows, columns = (geometry.patches(crops) // geometry.pooling for crops in tiling)
    return [*_view(whole, whole, marks), *_view(rows, columns, marks)]


def _view(rows: int, columns: int, marks: Marks) -> list[int]:
    return [marks.start, *([marks.part] * columns + [marks.row]) * rows, marks.end]


def windows(tiling: tuple[int, int], geometry: Geometry) -> Tensor:
    """Return which patches are pooled into which token, (V, p²) integers below n·N.

    Patches are numbered crop by crop, row by row; the view of the whole is crop 0. Tokens are in
    the order of `token_ids`: left to right through all crops of a row of the image.
    """
    side, pooling = geometry.side, geometry.pooling
    whole = np.arange(side * side).reshape(side, side)
    crop_row, row = _origins(tiling[0], geometry)
    crop_column, column = _origins(tiling[1], geometry)
    crop = 1 + crop_row[:, None] * tiling[1] + crop_column[None, :]
    cut = (crop * side + row[:, None]) * side + column[None, :]
    return torch.from_numpy(np.concatenate([_pooled(view, pooling) for view in (whole, cut)]))


def _origins(crops: int, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """The crop that each patch along an edge is read from, and the patch's place in it."""
    patch = np.arange(geometry.patches(crops))
    crop = np.clip((patch - geometry.margin) // geometry.step, 0, crops - 1)
    return crop, patch - crop * geometry.step


def _pooled(view: np.ndarray, pooling: int) -> np.ndarray:
    rows, columns = view.shape
    cells = view.reshape(rows // pooling, pooling, columns // pooling, pooling)
    return cells.transpose(0, 2, 1, 3).reshape(-1, pooling * pooling)


def cut(image: "Image", tiling: tuple[int, int], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Cut an image into crops.

    The second result follows the published code in a slip that the weights were trained with: its
    rows stand one crop too early. The view of the whole has the values of the first crop, and the
    last crop has -1, which counts as partly padded.

    Args:
        image: RGB.
        tiling: rows and columns.
        geometry: sizes.

    Returns:
        (n, 3, H, W) pixels of the view of the whole and the crops, standardised, and (n, N) the
        share of each patch that is image and not padding.
    """
    enlarged, inside = _fitted(image, geometry.size(tiling))
    edge, step = geometry.crop, geometry.step * geometry.patch
    corners = [(y * step, x * step) for y in range(tiling[0]) for x in range(tiling[1])]
    crops = [enlarged[:, y : y + edge, x : x + edge] for y, x in corners]
    masks = torch.stack([inside[y : y + edge, x : x + edge] for y, x in corners])
    cover = F.avg_pool2d(masks[:, None], geometry.patch).flatten(1)
    last = torch.full_like(cover[:1], -1.0)
    return torch.stack([overview(image, geometry), *crops]), torch.cat([cover, last])


def overview(image: "Image", geometry: Geometry) -> Tensor:
    """Return the view of the whole image, (3, H, W), standardised."""
    return _fitted(image, (geometry.crop, geometry.crop))[0]


def _fitted(image: "Image", size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image into a frame, centred on black; and a mask, 1 inside the image."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    height, width = _scaled(pixels.shape[1:], size)
    resized = F.interpolate(
        pixels[None], (height, width), mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padding = (left, size[1] - width - left, top, size[0] - height - top)
    # Black is padded before the pixels are standardised, as the network was trained.
    framed = F.pad(resized, padding)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (framed - mean) / std, F.pad(torch.ones(height, width), padding)


def _scaled(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that fit into a frame; in single precision, as the network was trained."""
    height, width = (np.float32(edge) for edge in shape)
    scale = min(np.float32(size[0]) / height, np.float32(size[1]) / width)
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
