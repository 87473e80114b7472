"""Convolutional experts whose weights are stacked, and two ways to run only the chosen ones.

Letters: R rows (an image and one of its experts), E experts, C channels, H W pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Dispatch = Literal["auto", "grouped", "stacked"]
Norm = Literal["group", "batch"]

_EPS = 1e-5
_MOMENTUM = 0.1
_LARGEST = 2**28  # gathered weights of a block: a gigabyte of float32
_FEW = 4  # rows per expert; with more of them it pays on CPUs to call experts one by one

Layer = Callable[[Tensor], Tensor]


def groups_of(channels: int) -> int:
    """Groups of a group norm: 32, or a quarter of the channels where that is fewer."""
    wanted = max(min(32, channels // 4), 1)
    return wanted if channels % wanted == 0 else math.gcd(channels, wanted)


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """Draw as PyTorch's convolutions do."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in))


class ExpertConv(nn.Module):
    """A 3 x 3 convolution for each expert: depthwise, then pointwise, or one dense kernel.

    Args:
        experts: E.
        channels: C, in and out.
        separable: depthwise and pointwise without biases, or dense with one.
    """

    def __init__(self, experts: int, channels: int, *, separable: bool) -> None:
        super().__init__()
        self.separable = separable
        if separable:
            self.depthwise = _uniform(experts, channels, 1, 3, 3, fan_in=9)
            self.pointwise = _uniform(experts, channels, channels, fan_in=channels)
        else:
            fan_in = 9 * channels
            self.weight = _uniform(experts, channels, channels, 3, 3, fan_in=fan_in)
            self.bias = _uniform(experts, channels, fan_in=fan_in)

    def one(self, rows: Tensor, expert: int) -> Tensor:
        """Apply one expert to (R, C, H, W)."""
        if not self.separable:
            return F.conv2d(rows, self.weight[expert], self.bias[expert], padding=1)
        rows = F.conv2d(rows, self.depthwise[expert], padding=1, groups=rows.shape[1])
        return F.conv2d(rows, self.pointwise[expert][:, :, None, None])

    def each(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Apply to each row of (R, C, H, W) its own expert, (R,)."""
        count, channels, height, width = rows.shape
        wide = rows.reshape(1, count * channels, height, width)
        if not self.separable:
            weight = self.weight[experts].flatten(0, 1)
            bias = self.bias[experts].flatten()
            return F.conv2d(wide, weight, bias, padding=1, groups=count).view_as(rows)
        weight = self.depthwise[experts].flatten(0, 1)
        wide = F.conv2d(wide, weight, padding=1, groups=count * channels)
        flat = torch.bmm(self.pointwise[experts], wide.view(count, channels, height * width))
        return flat.view_as(rows)


class ExpertNorm(nn.Module):
    """A norm for each expert.

    "group" normalises an image by itself, always. "batch" does so in training, with one group per
    channel, and by running averages in evaluation, as batch norm does that sees one image at a
    time.

    Args:
        experts: E.
        channels: C.
        kind: which.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, experts: int, channels: int, kind: Norm) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(experts, channels))
        self.bias = nn.Parameter(torch.zeros(experts, channels))
        if kind == "batch":
            self.register_buffer("running_mean", torch.zeros(experts, channels))
            self.register_buffer("running_var", torch.ones(experts, channels))

    def each(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Normalise each row of (R, C, H, W) for its own expert, (R,)."""
        rows = self._normalised(rows, experts)
        weight, bias = self.weight[experts], self.bias[experts]
        return rows * weight[:, :, None, None] + bias[:, :, None, None]

    def one(self, rows: Tensor, expert: int) -> Tensor:
        """Normalise (R, C, H, W) for one expert."""
        if self.kind == "group":
            groups = groups_of(rows.shape[1])
            return F.group_norm(rows, groups, self.weight[expert], self.bias[expert], _EPS)
        return self.each(rows, torch.full((len(rows),), expert, device=rows.device))

    def _normalised(self, rows: Tensor, experts: Tensor) -> Tensor:
        if self.kind == "group":
            return F.group_norm(rows, groups_of(rows.shape[1]), eps=_EPS)
        if self.training:
            self._remember(rows.detach(), experts)
            return F.instance_norm(rows, eps=_EPS)
        mean, variance = self.running_mean[experts], self.running_var[experts]
        return (rows - mean[:, :, None, None]) * (variance + _EPS).rsqrt()[:, :, None, None]

    @torch.no_grad()
    def _remember(self, rows: Tensor, experts: Tensor) -> None:
        """Move the running averages, a row after the other."""
        variance, mean = torch.var_mean(rows.to(self.running_mean.dtype), dim=(2, 3))
        for row, expert in enumerate(experts.tolist()):
            self.running_mean[expert].lerp_(mean[row], _MOMENTUM)
            self.running_var[expert].lerp_(variance[row], _MOMENTUM)


class Experts(nn.Module):
    """E experts: convolution, norm, GELU, convolution, norm, beside a shortcut, and GELU.

    Args:
        experts: E.
        channels: C.
        separable: see `ExpertConv`.
        norm: see `ExpertNorm`.
    """

    def __init__(self, experts: int, channels: int, *, separable: bool, norm: Norm) -> None:
        super().__init__()
        self.count = experts
        self.conv1 = ExpertConv(experts, channels, separable=separable)
        self.norm1 = ExpertNorm(experts, channels, norm)
        self.conv2 = ExpertConv(experts, channels, separable=separable)
        self.norm2 = ExpertNorm(experts, channels, norm)

    def forward(
        self, rows: Tensor, experts: Tensor, film: Tensor | None = None, how: Dispatch = "auto"
    ) -> Tensor:
        """Apply to each row its own expert.

        Args:
            rows: (R, C, H, W).
            experts: (R,).
            film: (R, 3 C), scale and shift in the middle and a gate at the end; None for none.
            how: "grouped" runs each expert once on all of its rows, which asks the device for their
                numbers; "stacked" gathers the weights of every row and runs all at once, without
                waiting. "auto" takes the first on CPUs for many rows, and where the gathered
                weights would fill the memory.
        """
        if how == "auto":
            size = len(rows) * sum(one[0].numel() for one in self.parameters())
            on_cpu = rows.device.type == "cpu"
            many = len(rows) > _FEW * self.count if on_cpu else size > _LARGEST
            how = "grouped" if many else "stacked"
        if how == "stacked":
            return self._run(
                rows, [partial(one.each, experts=experts) for one in self._parts], film
            )
        return self._grouped(rows, experts, film)

    def _grouped(self, rows: Tensor, experts: Tensor, film: Tensor | None) -> Tensor:
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.count).tolist()
        parts = torch.split(rows[order], counts)
        films = [None] * self.count if film is None else torch.split(film[order], counts)
        found = []
        for expert, (part, own) in enumerate(zip(parts, films, strict=True)):
            if len(part):
                layers = [partial(one.one, expert=expert) for one in self._parts]
                found.append(self._run(part, layers, own))
        sorted_rows = torch.cat(found)
        return sorted_rows[order.argsort()]

    @property
    def _parts(self) -> tuple[ExpertConv | ExpertNorm, ...]:
        return self.conv1, self.norm1, self.conv2, self.norm2

    @staticmethod
    def _run(x: Tensor, layers: Sequence[Layer], film: Tensor | None) -> Tensor:
        conv1, norm1, conv2, norm2 = layers
        hidden = norm1(conv1(x))
        if film is None:
            return F.gelu(x + norm2(conv2(F.gelu(hidden))))
        scale, shift, gate = film[:, :, None, None].chunk(3, dim=1)
        hidden = hidden * (1 + scale) + shift
        return F.gelu(x + (1 + gate) * norm2(conv2(F.gelu(hidden))))
