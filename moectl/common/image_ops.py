"""Image operations in which every sample of a batch has its own kind and magnitude.

They fall into four families: moves (a map of positions), tables (a map of grey levels),
equalisation, and blends with a grey or a blurred copy. A family is computed in one go.

Legend: b images, C channels, H W pixels.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.common.images import rotation, source_pixels


class Op(IntEnum):
    """An image operation; what its magnitude means stands behind it."""

    Identity = 0
    ShearX = 1  # columns per row
    ShearY = 2  # rows per column
    TranslateX = 3  # pixels to the right, truncated
    TranslateY = 4  # pixels down, truncated
    Rotate = 5  # degrees, counter-clockwise
    Brightness = 6  # 1 + magnitude times the image
    Contrast = 7  # the same about the mean grey level
    AutoContrast = 8
    Posterize = 9  # bits kept
    Solarize = 10  # grey level from which on levels are inverted
    SolarizeAdd = 11  # grey levels added to the darker half
    Invert = 12
    Equalize = 13
    Color = 14  # 1 + magnitude times the distance from grey
    Sharpness = 15  # 1 + magnitude times the distance from the blurred image


MOVES = (Op.ShearX, Op.ShearY, Op.TranslateX, Op.TranslateY, Op.Rotate)
TABLES = (
    *(Op.Brightness, Op.Contrast, Op.AutoContrast),
    *(Op.Posterize, Op.Solarize, Op.SolarizeAdd, Op.Invert),
)
EQUALISE = (Op.Equalize,)
BLENDS = (Op.Color, Op.Sharpness)
ENHANCE = (Op.Brightness, Op.Contrast, *BLENDS)
TWO_WAY = MOVES + ENHANCE


def among(ops: Tensor, family: Sequence[Op]) -> Tensor:
    """Return (b,) bool: whether each operation belongs to a family."""
    mask = ops == family[0]
    for op in family[1:]:
        mask = mask | (ops == op)
    return mask


def _rows(mask: Tensor) -> Tensor | None:
    """Return the rows of a mask; on an accelerator None, for all: asking would wait for it."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else None


def _maps(ops: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """Return the maps (b, 6) of positions, see `rotation`; the identity for what is no move."""
    turned = rotation(magnitudes * (ops == Op.Rotate), height, width)
    p, q, r, s, t, u = turned.unbind(1)
    whole = magnitudes.trunc()
    q = q + magnitudes * (ops == Op.ShearX)
    s = s + magnitudes * (ops == Op.ShearY)
    r = r - whole * (ops == Op.TranslateX)
    u = u - whole * (ops == Op.TranslateY)
    return torch.stack((p, q, r, s, t, u), dim=1)


def _move_nearest(images: Tensor, maps: Tensor, fill: int) -> Tensor:
    height, width = images.shape[-2:]
    x, y, inside = source_pixels(maps, height, width)
    index = y.mul_(width).add_(x).mul_(inside).long().flatten(1)[:, None]
    moved = images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)
    return moved.masked_fill_(~inside[:, None], fill)


def _move_bilinear(images: Tensor, maps: Tensor, fill: int) -> Tensor:
    height, width = images.shape[-2:]
    down = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    along = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    p, q, r, s, t, u = maps.T[:, :, None, None]
    x, y = (p * along + q * down + r) / width, (s * along + t * down + u) / height
    grid = torch.stack((x, y), dim=3).mul_(2).sub_(1).float()
    # Shifting the levels makes `fill` the zero that lies outside.
    shifted = images.float() - fill
    moved = F.grid_sample(shifted, grid, align_corners=False)
    return (moved + fill).round_().to(torch.uint8)


def _mean_grey(images: Tensor) -> Tensor:
    return _grey(images).float().mean(dim=(1, 2, 3), keepdim=True)


def _grey(images: Tensor) -> Tensor:
    """Return the luminance (b, 1, H, W), truncated to whole levels."""
    red, green, blue = images[:, :3].unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)[:, None]


def _blurred(images: Tensor) -> Tensor:
    """Smooth with the 3x3 kernel of ones and a 5 in the middle; the outermost pixels stay."""
    levels = images.int()
    lines = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * levels[..., 1:-1, 1:-1]
    result = images.clone()
    result[..., 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return result


def _tables(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Return where each grey level goes (b, C, 256), uint8; the identity for what is no table."""

    def chosen(*family: Op) -> Tensor:
        return among(ops, family)[:, None, None]

    levels = torch.arange(256, dtype=torch.float32, device=images.device)
    strength = magnitudes[:, None, None]
    factor, threshold = 1 + strength, (strength * ~chosen(Op.Invert)).float()
    anchor = _mean_grey(images)[:, 0] * chosen(Op.Contrast)
    low = images.flatten(2).amin(2, keepdim=True).float()
    high = images.flatten(2).amax(2, keepdim=True).float()
    flat = low == high
    grain = torch.exp2(8 - strength.clamp(0, 8).trunc()).float()
    table = levels.expand(*images.shape[:2], 256)
    for family, levelled in (
        ((Op.Brightness, Op.Contrast), factor.float() * levels + (1 - factor).float() * anchor),
        ((Op.AutoContrast,), torch.where(flat, levels, (levels - low) * (255 / (high - low)))),
        ((Op.Posterize,), levels - levels.remainder(grain)),
        ((Op.Solarize, Op.Invert), torch.where(levels >= threshold, 255 - levels, levels)),
        ((Op.SolarizeAdd,), levels + strength.float().trunc() * (levels < 128)),
    ):
        table = torch.where(chosen(*family), levelled, table)
    return table.clamp(0, 255).to(torch.uint8)


def _look_up(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    tables = _tables(images, ops, magnitudes)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _equalise(images: Tensor, _ops: Tensor, _magnitudes: Tensor) -> Tensor:
    """Make every grey level about equally frequent, channel by channel."""
    count, channels = images.shape[:2]
    first = torch.arange(count * channels, device=images.device).view(count, channels, 1) * 256
    places = (images.flatten(2).long() + first).flatten()
    ones = torch.ones_like(places, dtype=torch.int32)
    counts = torch.zeros(count * channels * 256, dtype=torch.int32, device=images.device)
    counts = counts.scatter_add_(0, places, ones).view(count, channels, 256)
    highest = images.flatten(2).amax(2, keepdim=True).long()
    step = (counts.sum(2, keepdim=True) - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    levels = torch.arange(256, device=images.device)
    table = torch.where(step == 0, levels, table).to(torch.uint8)
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _blend(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Push images away from their grey or blurred copy, or towards it."""
    factor = 1 + magnitudes[:, None, None, None]
    other = torch.where((ops == Op.Color)[:, None, None, None], _grey(images), _blurred(images))
    mixed = factor.float() * images + (1 - factor).float() * other
    return mixed.clamp_(0, 255).to(torch.uint8)


def apply(
    images: Tensor, ops: Tensor, magnitudes: Tensor, *, bilinear: bool = False, fill: int = 0
) -> Tensor:
    """Apply one operation to each image.

    Agrees with torchvision's functions on uint8 tensors, but for rare single pixels of the moves.

    Args:
        images: (b, 3, H, W) uint8.
        ops: (b,) values of `Op`.
        magnitudes: (b,) float64, in the units of `Op`.
        bilinear: whether moves mix four pixels instead of taking the nearest.
        fill: grey level that moves bring in from outside.

    Returns:
        (b, 3, H, W) uint8.

    Raises:
        ValueError: if images have other than three channels.
    """
    if images.shape[1] != 3:
        raise ValueError(f"images have {images.shape[1]} channels, expected 3")

    def move(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
        maps = _maps(ops, magnitudes, *images.shape[-2:])
        return (_move_bilinear if bilinear else _move_nearest)(images, maps, fill)

    families = ((MOVES, move), (TABLES, _look_up), (EQUALISE, _equalise), (BLENDS, _blend))
    for family, change in families:
        mask = among(ops, family)
        rows = _rows(mask)
        if rows is None:
            images = torch.where(mask[:, None, None, None], change(images, ops, magnitudes), images)
        elif len(rows):
            changed = change(images[rows], ops[rows], magnitudes[rows])
            images = images.index_copy(0, rows, changed)
    return images
