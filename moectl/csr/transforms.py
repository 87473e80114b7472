"""What an image goes through before the network sees it, and its boxes with it.

Legend: C channels, H W pixels of the file, S side that the network sees.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from moectl.csr.boxes import Box

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of three channels, of values in 0..1."""

STATISTICS: dict[Literal["imagenet", "medmae"], Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "medmae": ((0.5056,) * 3, (0.252,) * 3),
}
"""`medmae` is what the masked autoencoders for radiographs were trained with (Xiao et al. 2023)."""
_GONE = 1e-3
"""Sides below this share of the image: a box that has left it."""


class Transform:
    """Resizes to a square, moves and brightens at random, normalises; boxes follow the image.

    Draws from torch's global generator alone, and the same numbers with boxes as without.

    Args:
        size: S.
        statistics: mean and standard deviation to normalise with.
        hflip: probability of mirroring left and right.
        degrees: largest turn either way; what comes in from outside is black.
        brightness: factor drawn from 1 - brightness to 1 + brightness.
        contrast: as `brightness`.
    """

    def __init__(
        self,
        size: int,
        statistics: Statistics,
        *,
        hflip: float = 0.0,
        degrees: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
    ) -> None:
        from torchvision.transforms import v2

        steps: list[Any] = [v2.Resize((size, size), antialias=True)]
        if hflip:
            steps.append(v2.RandomHorizontalFlip(hflip))
        if degrees:
            steps.append(v2.RandomRotation(degrees, v2.InterpolationMode.BILINEAR))
        if brightness or contrast:
            steps.append(v2.ColorJitter(brightness, contrast))
        self.size = size
        self._move = v2.Compose(steps)
        self._normalise = v2.Normalize(*statistics)

    def __call__(
        self, image: Tensor | NDArray[Any], boxes: "Sequence[Box]" = ()
    ) -> "tuple[Tensor, list[Box]]":
        """Map float (C, H, W) in 0..1, C 1 or 3, and boxes to normalised (3, S, S) and boxes.

        A turned box becomes the upright one around it. Boxes that leave the image are dropped.
        """
        from torchvision import tv_tensors

        image = tv_tensors.Image(torch.as_tensor(image))
        height, width = image.shape[-2:]
        scale = torch.tensor([width, height, width, height])
        corners = tv_tensors.BoundingBoxes(
            torch.tensor([box[1:] for box in boxes]).reshape(-1, 4) * scale,
            format="XYXY",
            canvas_size=(height, width),
        )
        moved, corners = self._move(image, corners)
        shares = corners.as_subclass(Tensor).div(self.size).clamp(0, 1).tolist()
        kept: list[Box] = [
            (box[0], left, top, right, bottom)
            for box, (left, top, right, bottom) in zip(boxes, shares, strict=True)
            if right - left > _GONE and bottom - top > _GONE
        ]
        moved = moved.as_subclass(Tensor).expand(3, -1, -1)
        return self._normalise(moved), kept


def training(
    size: int,
    statistics: Statistics,
    *,
    hflip: float = 0.5,
    degrees: float = 10.0,
    brightness: float = 0.2,
    contrast: float = 0.2,
) -> Transform:
    """Return the random transform of training images."""
    return Transform(
        size, statistics, hflip=hflip, degrees=degrees, brightness=brightness, contrast=contrast
    )


def evaluation(size: int, statistics: Statistics) -> Transform:
    """Return the transform of all other images, which draws nothing."""
    return Transform(size, statistics)


def measured(images: Iterable[Tensor | NDArray[Any]]) -> Statistics:
    """Return the statistics of images (C, H, W) in 0..1, C 1 or 3, every pixel counting the same.

    Raises:
        ValueError: if there is no image, or a channel has one value only.
    """
    count, sums, squares = 0, torch.zeros(3).double(), torch.zeros(3).double()
    for image in images:
        pixels = torch.as_tensor(image).double().flatten(1)
        count += pixels.shape[1]
        sums += pixels.sum(1)
        squares += pixels.square().sum(1)
    mean = sums / max(count, 1)
    std = (squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()
    if not bool((std > 0).all()):
        raise ValueError("images without any variation have no statistics to normalise with")
    return tuple(mean.tolist()), tuple(std.tolist())
