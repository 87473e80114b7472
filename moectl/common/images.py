"""Random image transforms of whole batches, written as pure functions of uniform numbers.

Legend: b images, C channels, H W pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pick(uniforms: Tensor, count: int) -> Tensor:
    """Map uniforms in [0, 1) to integers 0..count-1, all equally likely."""
    return (uniforms * count).long().clamp_(max=count - 1)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Return the maps (b, 6) that turn images about their centre, counter-clockwise.

    A row (p, q, r, s, t, u) sends the output point (x, y) to the input point
    (px + qy + r, sx + ty + u). The point of a pixel is its middle, half a pixel from its corner.

    Args:
        degrees: (b,) angles.
        height: H.
        width: W.
    """
    angle = degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    rows = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    return torch.stack(rows, dim=1)


def source_pixels(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the input pixel under the middle of every output pixel.

    Positions are integers in 16.16 fixed point, as in Pillow: every device finds the same pixels.

    Args:
        maps: (b, 6) as in `rotation`.
        height: H, below 2^13.
        width: W, below 2^13.

    Returns:
        Columns, rows and whether they lie inside the image, each (b, H, W); int32, int32, bool.
    """
    p, q, r, s, t, u = maps.unbind(1)
    steps = torch.stack((p, q, r + (p + q) / 2, s, t, u + (s + t) / 2))  # from the first middle
    p, q, r, s, t, u = (steps * 65536).add_(0.5).floor_().int()[:, :, None, None]
    down = torch.arange(height, dtype=torch.int32, device=maps.device)[:, None]
    along = torch.arange(width, dtype=torch.int32, device=maps.device)
    x = (p * along + (q * down + r)) >> 16
    y = (s * along + (t * down + u)) >> 16
    return x, y, (x >= 0) & (x < width) & (y >= 0) & (y < height)


def crop(
    images: Tensor, corners: Tensor, mirrored: Tensor, padding: int, degrees: Tensor | None = None
) -> Tensor:
    """Pad with zeros, cut a frame of the old size out, mirror it, turn it: all in one gather.

    Args:
        images: (b, C, H, W).
        corners: (b, 2) row and column of the frame's corner in the padded image, 0..2 * padding.
        mirrored: (b,) whether left and right are swapped.
        padding: pixels on every side.
        degrees: (b,) angles of the turn, nearest pixel, zero outside the frame; None for no turn.
    """
    count, channels, height, width = images.shape
    margin = padding + 1  # the extra ring stays outside every frame: pixel 0 is zero
    stride = width + 2 * margin
    flat = F.pad(images, (margin, margin, margin, margin)).flatten(2)
    top, left = (corners.int() + 1).T[:, :, None, None]
    side = mirrored.int()[:, None, None]
    step, start = 1 - 2 * side, top * stride + left + side * (width - 1)
    if degrees is None:
        down = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
        along = torch.arange(width, dtype=torch.int32, device=images.device)
        index = down * stride + (along * step + start)
    else:
        x, y, inside = source_pixels(rotation(degrees, height, width), height, width)
        index = y.mul_(stride).add_(x.mul_(step)).add_(start).mul_(inside)
    index = index.long().view(count, 1, -1).expand(-1, channels, -1)
    return flat.gather(2, index).view_as(images)


def random_frame(uniforms: Tensor, padding: int, flip: bool) -> tuple[Tensor, Tensor]:
    """Draw the `corners` and `mirrored` of `crop` from uniforms (b, 3)."""
    return pick(uniforms[:, :2], 2 * padding + 1), (uniforms[:, 2] < 0.5) & flip


@lru_cache(maxsize=16)
def _line(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Slope and offset (C, 1, 1) that bring bytes to zero mean and unit variance."""
    centre, spread = torch.tensor([mean, std], dtype=torch.float64)[:, :, None, None]
    slope, offset = 1 / (255 * spread), -centre / spread
    return slope.float().to(device), offset.float().to(device)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map uint8 (b, C, H, W) to float32 (value / 255 - mean) / std, channel by channel."""
    slope, offset = _line(tuple(mean), tuple(std), images.device)
    return images.float().mul_(slope).add_(offset)


def cut_out(images: Tensor, uniforms: Tensor, size: int) -> Tensor:
    """Zero one square per image, centred on any pixel and clipped at the borders.

    Args:
        images: (b, C, H, W).
        uniforms: (b, 2) for the row and the column of the centre.
        size: side of the square in pixels, even; 0 for none.

    Source: DeVries and Taylor 2017.
    """
    if size == 0:
        return images
    height, width = images.shape[-2:]
    down = torch.arange(height, device=images.device) - pick(uniforms[:, :1], height)
    along = torch.arange(width, device=images.device) - pick(uniforms[:, 1:], width)
    half = size // 2
    rows, columns = (down >= -half) & (down < half), (along >= -half) & (along < half)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Plain:
    """No randomness: uint8 to normalised float32.

    Args:
        mean: per channel, of values in 0..1.
        std: per channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 (b, C, H, W) to float32 (b, C, H, W)."""
        return normalise(images, self.mean, self.std)


class Framed:
    """What random transforms of small images share: a shifted, mirrored frame and its finish.

    Args:
        mean: per channel, of values in 0..1.
        std: per channel.
        padding: largest shift in pixels.
        flip: mirror every second image; not for digits.
        cutout: side of a zeroed square in pixels; 0 for none.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
    ) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.padding, self.flip, self.cutout = padding, flip, cutout

    def framed(self, images: Tensor, uniforms: Tensor, degrees: Tensor | None = None) -> Tensor:
        """Shift, mirror and perhaps turn uint8 images, drawing from uniforms (b, 3)."""
        corners, mirrored = random_frame(uniforms, self.padding, self.flip)
        return crop(images, corners, mirrored, self.padding, degrees)

    def finished(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Normalise uint8 images, then cut a square out where uniforms (b, 2) say."""
        return cut_out(normalise(images, self.mean, self.std), uniforms, self.cutout)


class Standard(Framed):
    """Shifted crop, mirror and small turn, then normalised: the usual recipe for small images.

    The same distribution, and for the same draws the same pixels, as torchvision's RandomCrop with
    padding, RandomHorizontalFlip and RandomRotation on Pillow images.

    Args:
        mean: per channel, of values in 0..1.
        std: per channel.
        degrees: largest angle either way; 0 turns nothing.
        frame: `padding`, `flip` and `cutout` of `Framed`.
    """

    draws = 6

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, degrees: float = 15.0, **frame: Any
    ) -> None:
        super().__init__(mean, std, **frame)
        self.degrees = degrees

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Map uint8 (b, C, H, W) and uniforms (b, draws) to float32 (b, C, H, W)."""
        degrees = (uniforms[:, 3].double() * 2 - 1) * self.degrees if self.degrees else None
        moved = self.framed(images, uniforms[:, :3], degrees)
        return self.finished(moved, uniforms[:, 4:])
