"""The U-Net: convolutional blocks of experts, a frequency module at the bottleneck.

Letters: B images, C channels, E experts, H W pixels, L levels, T diffusion steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from moectl.diffusion.blocks import Form, TimeEmbedding, block
from moectl.diffusion.experts import Dispatch
from moectl.diffusion.frequency import BandModule, ChannelGain

Compat = Literal["none", "seed"]


@contextmanager
def _forgetting(part: nn.Module) -> Iterator[None]:
    """Let copies of the running averages move, and not these themselves."""
    kept = [(one, *named) for one in part.modules() for named in one.named_buffers(recurse=False)]
    for one, name, values in kept:
        setattr(one, name, values.clone())
    try:
        yield
    finally:
        for one, name, values in kept:
            setattr(one, name, values)


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first pass through a part, and for the one that repeats it in the backward pass."""
    return nullcontext(), _forgetting(part)


class _Down(nn.Module):
    def __init__(self, inputs: int, channels: int, form: Form) -> None:
        super().__init__()
        self.conv_block = block(inputs, channels, form)
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class _Up(nn.Module):
    def __init__(self, inputs: int, skip: int, channels: int, form: Form) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(inputs, inputs, 4, stride=2, padding=1)
        self.conv_block = block(inputs + skip, channels, form)


def _bottleneck(channels: int, form: Form, *, freq: bool) -> nn.Module:
    if not freq:
        return block(channels, channels, form)
    if form.film:
        return BandModule(channels, form.time, form.label)
    return ChannelGain(channels, form.time)


def _head(channels: int, outputs: int, *, zero: bool) -> nn.Module:
    """Return the last layers; zero predicts no noise before the first update."""
    last = nn.Conv2d(channels, outputs, 3, padding=1)
    if zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.GroupNorm(8, channels), nn.GELU(), last)


def _names(levels: int, *, freq: bool) -> list[str]:
    first = [f"encoder {number}" for number in range(levels - 1)]
    last = [f"decoder {number}" for number in range(levels)]
    return [*first, *([] if freq else ["bottleneck"]), *last]


class UNet(nn.Module):
    """Predict the noise in images, given the step and the class.

    The form "none" normalises every image by itself (group norm), lets time and class reach the
    features of every block (scale, shift, gate) and modulates real bands of frequency. The form
    "seed" is the original's, with its wiring mended: batch norm that sees one image at a time, time
    and class in the routers alone, and one gain per channel.

    Args:
        in_channels: of the images.
        model_channels: C of the first level.
        channel_mults: factors of the L levels.
        time_dim: width of the embedding of the step.
        class_dim: width of the embedding of the class.
        num_classes: classes; the label of that number is "no class" where there is one.
        null_class: whether there is.
        moe: blocks of experts, or of dilated convolutions.
        num_experts: E.
        k_active: experts that see an image.
        freq: a frequency module at the bottleneck, or one more block.
        dsconv: depthwise-separable convolutions in the blocks, or dense ones.
        compat: the form.
        dispatch: how experts are run, see `experts.Experts`.
        checkpointing: compute blocks again in the backward pass, to save memory.

    Raises:
        ValueError: if a number does not fit.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 4, 8),
        time_dim: int = 512,
        class_dim: int = 512,
        num_classes: int = 10,
        null_class: bool = True,
        moe: bool = True,
        num_experts: int = 8,
        k_active: int = 2,
        freq: bool = True,
        dsconv: bool = True,
        compat: Compat = "none",
        dispatch: Dispatch = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if moe and not 1 <= k_active <= num_experts:
            raise ValueError(f"k_active = {k_active}: expected 1 to num_experts = {num_experts}")
        if len(channel_mults) < 1 or model_channels % 8 or time_dim % 2:
            raise ValueError(
                f"model_channels = {model_channels}, channel_mults = {list(channel_mults)},"
                f" time_dim = {time_dim}: expected a multiple of 8, one level at least, an even"
                " number"
            )
        own = compat == "none"
        form = Form(
            num_experts=num_experts if moe else 0,
            k_active=k_active,
            separable=dsconv,
            norm="group" if own else "batch",
            film=own,
            time=time_dim,
            label=class_dim,
            dispatch=dispatch,
        )
        self.num_classes, self.checkpointing = num_classes, checkpointing
        self.num_experts, self.k_active = form.num_experts, k_active
        self.levels = len(channel_mults)
        widths = [model_channels * mult for mult in channel_mults]
        first, last = model_channels, widths[-1]
        self.time_embed = TimeEmbedding(time_dim)
        self.class_embed = nn.Embedding(num_classes + null_class, class_dim)
        self.input_proj = nn.Conv2d(in_channels, first, 3, padding=1)
        inputs = [first, *widths[:-2]] if self.levels > 1 else []
        self.encoder = nn.ModuleList(
            _Down(before, after, form) for before, after in zip(inputs, widths[:-1], strict=True)
        )
        before = widths[-2] if self.levels > 1 else first
        self.bottleneck_proj = nn.Conv2d(before, last, 3, stride=2, padding=1)
        self.bottleneck = _bottleneck(last, form, freq=freq)
        skips = [first, *widths[:-1]]  # of the input, then of every level
        outputs = [first, *widths[:-1]]
        rising = [last, *reversed(outputs)][: self.levels]
        self.decoder = nn.ModuleList(
            _Up(before, skip, after, form)
            for before, skip, after in zip(rising, reversed(skips), reversed(outputs), strict=True)
        )
        self.output_proj = _head(first, in_channels, zero=own)
        self.blocks = _names(self.levels, freq=freq) if moe else []
        """Names of the blocks of experts, in the order of their logits."""
        if not own and not moe:  # nothing but routers would hear of the class
            self.class_embed.requires_grad_(False)
            self.time_embed.requires_grad_(freq)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Predict the noise.

        Args:
            x: (B, 3, H, W), about -1 to 1; H and W divisible by 2^L.
            t: (B,) int64, steps from 0 to T - 1.
            c: (B,) int64 classes.

        Returns:
            The noise, of the size of x; and of every block of experts the router's logits (B, E),
            encoder first, decoder last.
        """
        if x.shape[2] % 2**self.levels or x.shape[3] % 2**self.levels:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels: expected multiples of"
                f" {2**self.levels}"
            )
        time, label = self.time_embed(t), self.class_embed(c)
        logits: list[Tensor] = []

        def run(part: nn.Module, x: Tensor) -> Tensor:
            if self.checkpointing and self.training:
                again = partial(_contexts, part) if list(part.buffers()) else noop_context_fn
                found, own = checkpoint(part, x, time, label, use_reentrant=False, context_fn=again)
            else:
                found, own = part(x, time, label)
            if own is not None:
                logits.append(own)
            assert isinstance(found, Tensor)
            return found

        x = self.input_proj(x)
        skips = [x]
        for stage in self.encoder:
            assert isinstance(stage, _Down)
            x = stage.downsample(run(stage.conv_block, x))
            skips.append(x)
        x = self.bottleneck_proj(x)
        if isinstance(self.bottleneck, BandModule | ChannelGain):
            x = self.bottleneck(x, time, label)
        else:
            x = run(self.bottleneck, x)
        for stage in self.decoder:
            assert isinstance(stage, _Up)
            x = torch.cat([stage.upsample(x), skips.pop()], 1)
            x = run(stage.conv_block, x)
        found: Tensor = self.output_proj(x)
        return found, logits


def build(arguments: dict[str, Any]) -> UNet:
    """Build a network from plain values, such as a sidecar holds."""
    return UNet(**arguments)
