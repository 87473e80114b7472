"""What brings features into the space where they are compared with prototypes.

Letters: B batch, F backbone channels, D projection width, H W feature grid.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Projector = Literal["mlp", "ibn"]


class HalfNorm(nn.Module):
    """Normalise half of the channels of each cell by themselves, and the others over the batch.

    A cell's own half needs no neighbours, so a projected vector is the same on a map and alone.

    Source: Pan et al. 2018, who normalise that half over the whole image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alone = channels // 2
        self.own = nn.LayerNorm(self.alone)
        self.batch = nn.BatchNorm2d(channels - self.alone)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) to the same shape."""
        own = self.own(x[:, : self.alone].movedim(1, 3)).movedim(3, 1)
        return torch.cat([own, self.batch(x[:, self.alone :])], 1)


class ResidualBlock(nn.Module):
    """Convolution of single cells, norm and ReLU beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.norm = HalfNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) to the same shape."""
        return x + self.norm(self.conv(x)).relu()


def build_projector(kind: Projector, channels: int, projection: int) -> nn.Sequential:
    """Map (B, F, H, W) to (B, D, H, W), every cell by itself."""
    if kind == "ibn":
        blocks = [ResidualBlock(projection) for _ in range(3)]
        return nn.Sequential(nn.Conv2d(channels, projection, 1), *blocks)
    first, last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, projection, 1)
    return nn.Sequential(first, nn.ReLU(inplace=True), last)
