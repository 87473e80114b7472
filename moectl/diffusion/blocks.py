"""Parts of the U-Net: separable convolutions, router, mixture, dilated fusion, embeddings.

Letters: B images, C channels, D width of an embedding, E experts, K chosen experts, H W pixels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.diffusion.experts import Dispatch, Experts, Norm, groups_of


class Form(NamedTuple):
    """How all blocks are made."""

    num_experts: int
    """E; 0 for blocks without experts."""
    k_active: int
    """K."""
    separable: bool
    """Depthwise and pointwise convolutions, or dense ones."""
    norm: Norm
    """"batch" as the original has it."""
    film: bool
    """Whether time and class reach the features, and not the routers alone."""
    time: int
    """Width of the embedding of the time step."""
    label: int
    """Width of the embedding of the class."""
    dispatch: Dispatch = "auto"


def convolution(inputs: int, outputs: int, *, separable: bool, dilation: int = 1) -> nn.Module:
    """Return a 3 x 3 convolution that keeps the size: separable without bias, or dense with one."""
    if not separable:
        return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(
        nn.Conv2d(
            inputs, inputs, 3, padding=dilation, dilation=dilation, groups=inputs, bias=False
        ),
        nn.Conv2d(inputs, outputs, 1, bias=False),
    )


def _norm(channels: int, kind: Norm) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(groups_of(channels), channels)


def _film(form: Form, channels: int) -> nn.Linear | None:
    """Scale, shift and gate of each channel from time and class; all of them 0 at the start."""
    if not form.film:
        return None
    linear = nn.Linear(form.time + form.label, 3 * channels)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _wide(values: Tensor) -> Tensor:
    """Float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Router(nn.Module):
    """Logits of the experts from the mean of each channel, time and class."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        width = channels + form.time + form.label
        self.mlp = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, form.num_experts)
        )

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Map (B, C, H, W), (B, D) and (B, D) to (B, E), in float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            inputs = torch.cat([_wide(x).mean((2, 3)), _wide(time), _wide(label)], 1)
            found: Tensor = self.mlp(inputs)
        return found


class MixtureBlock(nn.Module):
    """Let K of E experts see an image, and add what they say by their weights.

    The weights are a softmax over the K highest logits.
    """

    def __init__(self, inputs: int, channels: int, form: Form) -> None:
        super().__init__()
        self.k_active, self.dispatch = form.k_active, form.dispatch
        self.proj = convolution(inputs, channels, separable=form.separable)
        self.router = Router(channels, form)
        self.experts = Experts(form.num_experts, channels, separable=form.separable, norm=form.norm)
        self.film = _film(form, channels)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (B, C, H, W) to the same size, and return the router's logits (B, E)."""
        x = self.proj(x)
        logits = self.router(x, time, label)
        values, chosen = logits.topk(self.k_active, dim=1)
        weights = values.softmax(1).to(x)
        film = None
        if self.film is not None:
            film = self.film(F.gelu(torch.cat([time, label], 1)))
            film = film.repeat_interleave(self.k_active, 0)
        rows = x.repeat_interleave(self.k_active, 0)
        found = self.experts(rows, chosen.flatten(), film, self.dispatch)
        found = found.view(len(x), self.k_active, *found.shape[1:])
        return torch.einsum("bk,bkchw->bchw", weights, found.to(weights)), logits


class DilatedBlock(nn.Module):
    """Without experts: three convolutions of growing dilation side by side."""

    def __init__(self, inputs: int, channels: int, form: Form) -> None:
        super().__init__()
        self.proj = convolution(inputs, channels, separable=form.separable)
        self.branches = nn.ModuleList(
            convolution(channels, channels, separable=form.separable, dilation=dilation)
            for dilation in (1, 2, 4)
        )
        self.fuse = nn.Conv2d(3 * channels, channels, 1)
        self.norm = _norm(channels, form.norm)
        self.film = _film(form, channels)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (B, C, H, W) to the same size; there are no logits."""
        x = self.proj(x)
        fused = self.fuse(torch.cat([branch(x) for branch in self.branches], 1))
        if self.film is None:
            return F.gelu(self.norm(x + fused)), None
        film = self.film(F.gelu(torch.cat([time, label], 1)))
        scale, shift, gate = film[:, :, None, None].chunk(3, dim=1)
        return F.gelu(self.norm(x + (1 + gate) * fused) * (1 + scale) + shift), None


def block(inputs: int, channels: int, form: Form) -> nn.Module:
    """Return the block of a form."""
    kind = MixtureBlock if form.num_experts else DilatedBlock
    return kind(inputs, channels, form)


def sinusoid(steps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of time steps (B,) at falling frequencies: (B, D) float32.

    Source: Vaswani et al. 2017.
    """
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=steps.device)
    angles = steps[:, None].float() * torch.exp(-math.log(10000.0) * places / half)
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimeEmbedding(nn.Module):
    """Embed time steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, steps: Tensor) -> Tensor:
        """Map (B,) to (B, D)."""
        dtype = next(self.mlp.parameters()).dtype
        found: Tensor = self.mlp(sinusoid(steps, self.width).to(dtype))
        return found
