"""Gains of spatial frequencies at the bottleneck.

Letters: B images, C channels, G groups of channels, H W pixels, J bands.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BANDS = 8
_GROUPS = 32


@lru_cache(maxsize=32)
@torch.inference_mode(mode=False)  # what is kept must serve training too
def hats(height: int, width: int, device: torch.device) -> Tensor:
    """Triangular bands over the radius of real frequencies, (J, H, W // 2 + 1); they sum to 1."""
    rows = torch.fft.fftfreq(height, device=device)
    columns = torch.fft.rfftfreq(width, device=device)
    radius = (rows[:, None].square() + columns.square()).sqrt() / 0.5**0.5
    places = torch.arange(BANDS, device=device)[:, None, None]
    return (1 - ((BANDS - 1) * radius - places).abs()).clamp(min=0)


class BandModule(nn.Module):
    """Amplify or damp bands of spatial frequency by what the image, the time and the class say.

    Gains are real and the same for opposite frequencies, so images stay real. They are 0 at the
    start: the module changes nothing. It fits any size of image.

    Args:
        channels: C.
        time: width of the embedding of the time step.
        label: width of the embedding of the class.
    """

    def __init__(self, channels: int, time: int, label: int) -> None:
        super().__init__()
        self.groups = channels if channels < _GROUPS else math.gcd(channels, _GROUPS)
        self.hidden = nn.Linear(channels + time + label, channels)
        self.gains = nn.Linear(channels, channels + self.groups * BANDS)
        nn.init.zeros_(self.gains.weight)
        nn.init.zeros_(self.gains.bias)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same size."""
        size, channels, height, width = x.shape
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.hidden.weight.dtype)
            inputs = torch.cat([wide.mean((2, 3)), time.to(wide), label.to(wide)], 1)
            found = self.gains(F.gelu(self.hidden(inputs)))
            own, shared = found.split([channels, self.groups * BANDS], dim=1)
            bands = hats(height, width, x.device).to(wide)
            table = torch.einsum("bgj,jhw->bghw", shared.view(size, self.groups, BANDS), bands)
            table = table.repeat_interleave(channels // self.groups, 1)
            spectrum = torch.fft.rfft2(wide, norm="ortho") * (own[:, :, None, None] + table)
            changed = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
        return x + changed.to(x)


class ChannelGain(nn.Module):
    """The original's frequency module: one gain per channel for its whole spectrum.

    A gain that is the same for all frequencies needs no transform: x (1 + w), w in 0 to 1.

    Args:
        channels: C.
        time: width of the embedding of the time step.
    """

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.modulation_mlp = nn.Sequential(
            nn.Linear(channels + time, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:  # noqa: ARG002
        """Map (B, C, H, W) to the same size."""
        means = torch.cat([x.mean((2, 3)), time.to(x)], 1)
        return x * (1 + self.modulation_mlp(means).sigmoid()[:, :, None, None])
