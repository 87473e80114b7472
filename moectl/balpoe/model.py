"""The network of the balanced product of experts: one shared trunk, E expert branches.

Letters: B batch, E experts, K classes, C channels, H W pixels, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.common.arithmetic import traced_outputs
from moectl.common.precision import without_autocast


class PaddedShortcut(nn.Module):
    """Carry the input past a block that shrinks the image and widens the channels, without weights.

    Every `stride`-th pixel is kept and the missing channels are zeros, half on either side.

    Source: He et al. 2016, shortcut option A.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        # A pool of one pixel: two strided slices would fill two gradients with zeros.
        return F.pad(F.avg_pool2d(x, 1, self.stride), self.padding)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Source: He et al. 2016.
    """

    def __init__(self, inputs: int, width: int, stride: int, *, shortcut: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            make = PaddedShortcut if shortcut == "A" else _projection
            self.shortcut = make(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        # Batch norm's gradient needs its input, not its output, so the output may be overwritten.
        return F.relu(out.add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """A 3x3 convolution, grouped in ResNeXt, between two 1x1 convolutions; it carries the stride.

    Source: He et al. 2016; Xie et al. 2017.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, *, groups: int = 1, group_width: int = 64
    ) -> None:
        super().__init__()
        inner, outputs = width * group_width // 64 * groups, 4 * width
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 4 width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out.add_(self.downsample(x)), inplace=True)


class CosineLinear(nn.Module):
    """Score each class by the cosine between the features and a class direction, times a scale.

    Source: Sanchez Aimar et al. 2023; the scale is theirs, 30 by default.
    """

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        directions = torch.empty(features, classes).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(directions, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, K) in [-scale, scale]."""
        return self.scale * (F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0))


@dataclass(frozen=True)
class _Plan:
    """One architecture; tuples go by stage, and the last two stages branch into experts."""

    block: Callable[[int, int, int], nn.Module]  # input channels, width, stride
    expansion: int  # a block's output channels per width
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    reduced: tuple[int, ...]
    large_images: bool  # whether the stem quarters the image first


_BASIC = _Plan(BasicBlock, 1, (5, 5, 5), (16, 32, 64), (16, 24, 48), large_images=False)
_BOTTLENECK = _Plan(
    Bottleneck, 4, (3, 4, 6, 3), (64, 128, 256, 512), (64, 128, 192, 384), large_images=True
)
_PLANS = {
    ("resnet32", "A"): _BASIC,
    ("resnet32", "B"): replace(_BASIC, block=partial(BasicBlock, shortcut="B")),
    ("resnet50", "A"): _BOTTLENECK,
    ("resnext50", "A"): replace(_BOTTLENECK, block=partial(Bottleneck, groups=32, group_width=4)),
}


def _widths(plan: _Plan, reduce_dimension: bool, chosen: Mapping[int, int]) -> list[int]:
    """Width per stage: what was chosen, else the standard or reduced one.

    Raises:
        ValueError: if a width is negative, or chosen for a stage that is not an expert's.
    """
    widths = list(plan.reduced if reduce_dimension else plan.widths)
    for stage, width in chosen.items():
        if width < 0 or (width and not len(widths) - 2 < stage <= len(widths)):
            branches = f"layer{len(widths) - 1}_dimension and layer{len(widths)}_dimension"
            message = f"layer{stage}_dimension = {width}: this network has {branches}, 0 or more"
            raise ValueError(message)
        if width:
            widths[stage - 1] = width
    return widths


class _Backbone(nn.Module):
    """Stem, shared stages, then two stages and a head per expert.

    Modules are named so that public checkpoints load: `layer3` where there is one for everybody,
    `layer3s.{e}` where each of several experts has a place. Experts that share a stage hold one
    module in all their places: once among the parameters, under E names in the state dict.
    """

    def __init__(
        self,
        plan: _Plan,
        widths: Sequence[int],
        head: Callable[[int], nn.Module],
        experts: int,
        shared: Sequence[int],
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if plan.large_images else (3, 1)
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if plan.large_images else nn.Identity()
        self.stages: list[str] = []
        for number, (width, depth) in enumerate(zip(widths, plan.depths, strict=True), start=1):
            copies = experts if number > len(widths) - 2 else 1
            make = partial(_stage, plan, channels, width, depth, 1 if number == 1 else 2)
            self.stages.append(self._add(f"layer{number}", make, copies, number in shared))
            channels = width * plan.expansion
        self.head = self._add("linear", partial(head, channels), experts, shared=False)

    def _add(self, name: str, make: Callable[[], nn.Module], copies: int, shared: bool) -> str:
        """Register what `make` builds, once or per expert, and return its name."""
        if copies == 1:
            self.add_module(name, make())
            return name
        modules = [make()] * copies if shared else [make() for _ in range(copies)]
        self.add_module(f"{name}s", nn.ModuleList(modules))
        return f"{name}s"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to expert logits (B, E, K)."""
        maps = [self.pool(F.relu(self.bn1(self.conv1(images)), inplace=True))]
        for stage in self.stages:
            maps = _advance(getattr(self, stage), maps)
        # A logit is a cosine times 30; in bfloat16 it would be off by up to 0.06.
        with without_autocast(images.device.type):
            features = [x.mean((2, 3), dtype=self.conv1.weight.dtype) for x in maps]
            return torch.stack(_advance(getattr(self, self.head), features), dim=1)


def _stage(plan: _Plan, inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
    rest = [plan.block(plan.expansion * width, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(plan.block(inputs, width, stride), *rest)


def _advance(stage: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Pass one tensor for everybody, or one per expert, through a stage; what is shared runs once.

    A loop, because one grouped convolution over all experts' channels is slower: measured on a CPU,
    the loop is 1.2 (channels last) to 1.7 times (NCHW) faster in float32, and equal in bfloat16.
    """
    if not isinstance(stage, nn.ModuleList):
        return [stage(x) for x in inputs]
    if len(inputs) == 1 and stage[0] is stage[-1]:
        return [stage[0](inputs[0])]
    per_expert = inputs if len(inputs) > 1 else inputs * len(stage)
    return [module(x) for module, x in zip(stage, per_expert, strict=True)]


class BalpoeNet(nn.Module):
    """Residual network whose last two stages and classifier exist once per expert.

    State-dict names are those of the authors' checkpoints (see `load_public`).

    Args:
        arch: "resnet32" for 32x32 images; "resnet50" and "resnext50" for 224x224.
        classes: K.
        experts: E; one expert is the plain network.
        reduce_dimension: make the expert stages a quarter narrower.
        layer2_dimension: width of the first expert stage of resnet32; 0 takes the usual one.
        layer3_dimension: width of stage 3; 0 takes the usual one.
        layer4_dimension: width of the last stage of resnet50 and resnext50; 0 takes the usual one.
        share_layer2: let all experts of a resnet32 use one stage 2.
        share_layer3: let them use one stage 3 as well, so that only the classifiers differ.
        use_norm: classify by scaled cosines; otherwise by a linear layer with bias.
        norm_scale: factor of the cosines.
        shortcut: "A" pads with zeros, "B" projects by 1x1 convolutions (resnet32 only).

    Raises:
        ValueError: if an option does not apply to `arch`, or options contradict each other.

    Source: Sanchez Aimar et al. 2023; He et al. 2016.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        arch: Literal["resnet32", "resnet50", "resnext50"] = "resnet32",
        classes: int,
        experts: int = 3,
        reduce_dimension: bool = False,
        layer2_dimension: int = 0,
        layer3_dimension: int = 0,
        layer4_dimension: int = 0,
        share_layer2: bool = False,
        share_layer3: bool = False,
        use_norm: bool = True,
        norm_scale: float = 30.0,
        shortcut: Literal["A", "B"] = "A",
    ) -> None:
        super().__init__()
        if experts < 1 or classes < 1:
            raise ValueError(f"experts = {experts}, classes = {classes}: each must be at least 1")
        if share_layer3 and not share_layer2:
            raise ValueError("share_layer3 needs share_layer2: a stage takes one input")
        if (arch, shortcut) not in _PLANS:
            raise ValueError(
                f"arch = {arch!r} with shortcut = {shortcut!r}: not one of {[*_PLANS]}"
            )
        if share_layer2 and arch != "resnet32":
            raise ValueError(f"share_layer2 applies to resnet32 only, not to {arch}")
        plan = _PLANS[arch, shortcut]
        chosen = {2: layer2_dimension, 3: layer3_dimension, 4: layer4_dimension}
        widths = _widths(plan, reduce_dimension, chosen)
        if shortcut == "A" and arch == "resnet32" and widths != sorted(widths):
            raise ValueError(f"widths {widths}: shortcut A cannot drop channels, use shortcut B")
        head: Callable[[int], nn.Module] = partial(nn.Linear, out_features=classes)
        if use_norm:
            head = partial(CosineLinear, classes=classes, scale=norm_scale)
        shared = [stage for stage, share in ((2, share_layer2), (3, share_layer3)) if share]
        self.backbone = _Backbone(plan, widths, head, experts, shared)
        self.apply(_fan_out_normal if plan.large_images else _kaiming_normal)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to expert logits (B, E, K), float32 also under autocast."""
        return self.backbone(images)


def _kaiming_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


def _fan_out_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        # Not PyTorch's fan-out: a grouped convolution counts all its output channels.
        kernel = module.kernel_size[0] * module.kernel_size[1]
        nn.init.normal_(module.weight, std=(2 / (kernel * module.out_channels)) ** 0.5)


def load_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a public checkpoint for `BalpoeNet.load_state_dict`.

    Names are equal but for the prefix `module.` that a checkpoint written on several GPUs has.
    """
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def multiply_adds(model: nn.Module, size: int) -> tuple[int, int]:
    """Count the multiply-adds for one image of `size` x `size` pixels.

    Returns:
        Those of the convolutions and those of the classifiers.
    """
    convolutions, heads = 0, 0

    def count(_name: str, module: nn.Module, output: Tensor) -> None:
        nonlocal convolutions, heads
        if isinstance(module, nn.Conv2d):
            convolutions += output.numel() * module.weight[0].numel()
        elif isinstance(module, CosineLinear | nn.Linear):
            heads += module.weight.numel()

    traced_outputs(model, size, count)
    return convolutions, heads
