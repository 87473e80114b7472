"""Specialists, and the mixture that holds one expert for each on a shared trunk.

Letters: B batch, E experts, C classes, D features of an expert, G gating features, H W pixels.
"""

import copy
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.common.arithmetic import traced_outputs
from moectl.common.precision import without_autocast

LAYERS: Mapping[str, int] = {"conv1": 0, "residual1": 1, "residual2": 3, "conv2": 5}
"""Place of a specialist's layer in the mixture; a max pool follows both residual blocks."""


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class ResidualBlock(nn.Module):
    """Convolution blocks beside a 1x1 convolution that widens the input."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * depth
        self.main_path = nn.Sequential(*map(ConvBlock, widths[:-1], widths[1:]))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        # A convolution's gradient does not need its output, so that may be overwritten.
        return F.relu(self.shortcut(x).add_(self.main_path(x)), inplace=True)


class ReluDropoutMean(nn.Module):
    """ReLU, dropout of single pixels, mean over all pixels: (B, D, H, W) to (B, D).

    On a CPU the share that is dropped is rounded to 1/256, and the rest scaled accordingly.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Do what three modules do in turn, several times faster on a CPU."""
        if not (self.training and self.dropout):
            return _mean(F.relu(x))
        if x.device.type != "cpu":
            return _mean(F.dropout(F.relu(x), self.dropout))
        level = min(round(256 * self.dropout), 255)
        keep = (_random_bytes(x) >= level).logical_and_(x > 0).to(x.dtype)
        return _mean(x * keep) / (1 - level / 256)


def _mean(x: Tensor) -> Tensor:
    """Mean over pixels, float32 at least, of (B, D, H, W).

    On a CPU by a sum in the input's precision: the gradients of a mean and of a cast are written
    out for every pixel, in a layout of their own that slows down what comes before.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        return x.mean((2, 3), dtype=dtype)
    return x.sum((2, 3)).to(dtype) / x[0, 0].numel()


def _random_bytes(like: Tensor) -> Tensor:
    """Draw uniform bytes in the shape and layout of a dense tensor, eight from each number."""
    words = torch.randint(-(2**63), 2**63 - 1, (like.numel() // 8 + 1,))
    return words.view(torch.uint8).as_strided(like.shape, like.stride())


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution, then batch norm; the ReLU is left to others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W) to the same shape."""
        return self.bn(self.pointwise(self.depthwise(x)))


class Specialist(nn.Module):
    """Classifier of a few classes, from which an expert is made.

    Args:
        classes: C.
        width: channels of the first layer; the others have 2, 4 and 8 times as many.
        dropout: of pixels before the mean over the image, and of features after it.

    Source: state-dict names are those of the public checkpoints.
    """

    def __init__(self, classes: int, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        if classes < 1 or width < 1:
            raise ValueError(f"classes = {classes}, width = {width}: each must be at least 1")
        self.conv1 = ConvBlock(3, width)
        self.residual1 = ResidualBlock(width, 2 * width, depth=1)
        self.residual2 = ResidualBlock(2 * width, 4 * width, depth=2)
        self.conv2 = ConvBlock(4 * width, 8 * width, kernel=1)
        self.conv3 = nn.Sequential(SeparableConv(8 * width))
        self.classifier = nn.Sequential(
            ReluDropoutMean(dropout),
            nn.Flatten(),  # does nothing, but gives the last layer its public number
            nn.Dropout(dropout),
            nn.Linear(8 * width, classes),
        )
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, C), float32 also under autocast."""
        x = F.max_pool2d(self.residual1(self.conv1(images)), 2)
        x = F.max_pool2d(self.residual2(x), 2)
        x = self.conv3(self.conv2(x))
        with without_autocast(x.device.type):
            return self.classifier(x)


class GatingNetwork(nn.Module):
    """Judge the trunk's mean features: a logit per expert, and `features` for the classifier."""

    def __init__(
        self, inputs: int, hidden: int, experts: int, *, features: int, dropout: float
    ) -> None:
        super().__init__()
        self.feature_net: nn.Module | None = None
        if features:
            first, second = _hidden_layer(inputs, features), _hidden_layer(features, features)
            self.feature_net = nn.Sequential(*first, nn.Dropout(dropout), *second)
        self.gate_net = nn.Sequential(
            *_hidden_layer(inputs, hidden), nn.Dropout(dropout), nn.Linear(hidden, experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, inputs) to gate logits (B, E) and gating features (B, G)."""
        features = x[:, :0] if self.feature_net is None else self.feature_net(x)
        return self.gate_net(x), features


def _hidden_layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)


class MoEOutput(NamedTuple):
    """What the mixture says, and whom it asked."""

    logits: Tensor  # (B, C)
    gates: Tensor  # (B, E), rows with sum 1
    gate_logits: Tensor  # (B, E), before temperature, noise and softmax


class Parts(NamedTuple):
    """Everything the logits are made of, for the gates to be chosen afterwards."""

    trunk: Tensor  # (B, channels, H, W), shared by all experts
    gate_logits: Tensor  # (B, E)
    gating_features: Tensor  # (B, G), G = 0 without the by-pass
    expert_features: Tensor  # (B, E, D)


class MergedMoE(nn.Module):
    """Experts on a shared trunk, mixed per image by a gating network.

    Args:
        classes: C.
        num_experts: E.
        width: channels of the first layer; the others have 2, 4 and 8 times as many.
        combine: "features" mixes the experts' features before one classifier, which also sees the
            gating features; "logits" gives each expert a head of its own and mixes their logits.
        gating_feature_dim: G of "features"; 0 lets the classifier see the experts alone.
        gating_feature_dropout: share of the images that train without gating features.
        dropout_expert: of pixels before an expert's mean over the image, and of features after it.
        dropout_gate: in the gating network.
        gate_noise_std: of the noise on the gate logits in training, after the temperature.
        top_k: experts that act on an image; 0 for all.
        shared_until: last layer of the trunk; every expert has its own of what follows. Limit: the
            gating network sees the trunk's mean, which says little about an image after "conv1".
        temperature: divides the gate logits; a buffer, so that it is saved with the weights.

    Raises:
        ValueError: if an option is out of range.

    Source: Jacobs et al. 1991 (mixtures of experts); Shazeer et al. 2017 (noise, top k).
    """

    temperature: Tensor

    def __init__(  # noqa: PLR0913
        self,
        *,
        classes: int,
        num_experts: int = 3,
        width: int = 64,
        combine: Literal["features", "logits"] = "features",
        gating_feature_dim: int = 256,
        gating_feature_dropout: float = 0.0,
        dropout_expert: float = 0.5,
        dropout_gate: float = 0.2,
        gate_noise_std: float = 0.1,
        top_k: int = 0,
        shared_until: Literal["conv1", "residual1", "residual2", "conv2"] = "conv2",
        temperature: float = 2.0,
    ) -> None:
        super().__init__()
        if min(classes, num_experts, width) < 1 or temperature <= 0:
            raise ValueError(
                f"classes = {classes}, num_experts = {num_experts}, width = {width}, temperature = "
                f"{temperature}: counts must be at least 1, the temperature above 0"
            )
        if not 0 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k}: 0 (all) to {num_experts}, the number of experts")
        if combine not in ("features", "logits") or shared_until not in LAYERS:
            message = f"combine = {combine!r}, shared_until = {shared_until!r}: expected 'features'"
            raise ValueError(f"{message} or 'logits', and one of {', '.join(LAYERS)}")
        self.combine, self.shared_until, self.top_k = combine, shared_until, top_k
        self.gate_noise_std, self.gating_feature_dropout = gate_noise_std, gating_feature_dropout
        self.features = features = 8 * width
        depth = [*LAYERS].index(shared_until)
        own_from = [*LAYERS.values(), 6][depth + 1]
        self.feature_extractor = nn.Sequential(*_layers(width)[:own_from])
        self.experts = nn.ModuleList(
            nn.Sequential(*_layers(width)[own_from:], *_expert(features, dropout_expert))
            for _ in range(num_experts)
        )
        by_pass = gating_feature_dim if combine == "features" else 0
        self.gating_network = GatingNetwork(
            width * 2**depth, features // 2, num_experts, features=by_pass, dropout=dropout_gate
        )
        if combine == "features":
            self.classifier = nn.Linear(features + by_pass, classes)
        else:
            self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(num_experts))
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.apply(_initialise)

    def forward(self, images: Tensor, gates: Tensor | None = None) -> MoEOutput:
        """Map images (B, 3, H, W) to logits (B, C), float32 also under autocast.

        `gates`, (B, E) or (E,), take the place of the gating network's. In evaluation, experts that
        they or `top_k` leave out for a whole batch are not computed.
        """
        may_skip = not self.training and (gates is not None or self.top_k > 0)
        trunk = self.feature_extractor(images)
        gate_logits, h = self._gate(trunk)
        used = self.route(gate_logits) if gates is None else gates.expand_as(gate_logits)
        acting = used.any(0).tolist() if may_skip else [True] * len(self.experts)
        parts = Parts(trunk, gate_logits, h, self._ask(trunk, acting))
        return MoEOutput(self.combine_parts(parts, used), used, gate_logits)

    def parts(self, images: Tensor) -> Parts:
        """Compute once what the logits are made of, with all experts; see `combine_parts`."""
        trunk = self.feature_extractor(images)
        return Parts(trunk, *self._gate(trunk), self._ask(trunk, [True] * len(self.experts)))

    def combine_parts(self, parts: Parts, gates: Tensor) -> Tensor:
        """Mix the parts to logits (B, C) with gates (B, E) or (E,).

        In evaluation this is `forward`, if the gates are `route(parts.gate_logits)`. Parts may be
        replaced, say by zeros, with `parts._replace`.
        """
        gates = gates.expand_as(parts.gate_logits).to(parts.expert_features)
        with without_autocast(gates.device.type):
            if self.combine == "features":
                mixed = torch.einsum("be,bed->bd", gates, parts.expert_features)
                return self.classifier(torch.cat([mixed, parts.gating_features], 1))
            return torch.einsum("be,bec->bc", gates, self._head_logits(parts.expert_features))

    def split_logits(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """Split what `combine_parts` adds up, which is linear in the gates.

        Returns:
            What each expert adds with a gate of 1, (B, E, C); what the gating features add,
            (B, C); and the bias, (C,), which is 0 where every expert has a head.
        """
        experts, gating = parts.expert_features, parts.gating_features
        with without_autocast(gating.device.type):
            if self.combine == "features":
                weight, features = self.classifier.weight, experts.shape[2]
                by_pass = gating @ weight[:, features:].T
                return experts @ weight[:, :features].T, by_pass, self.classifier.bias
            logits = self._head_logits(experts)
        return logits, torch.zeros_like(logits[:, 0]), torch.zeros_like(logits[0, 0])

    def route(self, gate_logits: Tensor) -> Tensor:
        """Turn gate logits (B, E) into gates (B, E): temperature, noise in training, top k."""
        scaled = gate_logits / self.temperature
        if self.training and self.gate_noise_std:
            scaled = scaled + self.gate_noise_std * torch.randn_like(scaled)
        return softmax_of_largest(scaled, self.top_k)

    def _gate(self, trunk: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate logits (B, E) and gating features (B, G)."""
        with without_autocast(trunk.device.type):
            gate_logits, features = self.gating_network(_mean(trunk))
        ones = features.new_ones(len(features), 1)
        return gate_logits, features * F.dropout(ones, self.gating_feature_dropout, self.training)

    def _ask(self, trunk: Tensor, acting: list[bool]) -> Tensor:
        """Return the experts' features, (B, E, D); zeros of those who do not act."""
        # A loop, because one grouped convolution over the channels of all experts makes a training
        # step 1 to 17 % slower on a CPU, and a batched matrix product for their 1x1 part more so.
        dtype = torch.promote_types(trunk.dtype, torch.float32)
        silent = trunk.new_zeros(len(trunk), self.features, dtype=dtype)
        each = zip(self.experts, acting, strict=True)
        return torch.stack([expert(trunk) if acts else silent for expert, acts in each], 1)

    def _head_logits(self, features: Tensor) -> Tensor:
        return torch.stack([head(features[:, j]) for j, head in enumerate(self.heads)], 1)


def softmax_of_largest(logits: Tensor, count: int) -> Tensor:
    """Softmax over the largest logits of each row, (B, E), with zeros elsewhere; 0 keeps all."""
    if count:
        largest = logits.topk(count, dim=1)
        logits = torch.full_like(logits, -torch.inf).scatter(1, largest.indices, largest.values)
    return logits.softmax(1)


def _layers(width: int) -> list[nn.Module]:  # at their places in LAYERS
    return [
        ConvBlock(3, width),
        ResidualBlock(width, 2 * width, depth=1),
        nn.MaxPool2d(2),
        ResidualBlock(2 * width, 4 * width, depth=2),
        nn.MaxPool2d(2),
        ConvBlock(4 * width, 8 * width, kernel=1),
    ]


def _expert(channels: int, dropout: float) -> tuple[nn.Module, ...]:
    layers = SeparableConv(channels).children()
    return *layers, ReluDropoutMean(dropout), nn.Dropout(dropout)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        # Small also in the last layer of the gate, so that all gates start equal.
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def load_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a public checkpoint for `MergedMoE`; its temperature was always 2."""
    # The two other names are those of checkpoints that mix logits.
    renamed = {
        name.removeprefix("module.")
        .replace("gating_network.net.", "gating_network.gate_net.")
        .replace("classifiers.", "heads."): tensor
        for name, tensor in state.items()
    }
    return {"temperature": torch.tensor(2.0), **renamed}


def multiply_adds(model: nn.Module, size: int) -> dict[str, int]:
    """Count the multiply-adds for one image of `size` x `size` pixels, by part of the network.

    All experts are counted, even if `top_k` lets some rest.
    """
    counts = {name: 0 for name, _ in model.named_children()}
    whole = copy.copy(model)
    if isinstance(whole, MergedMoE):
        whole.top_k = 0

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            counts[name.partition(".")[0]] += output.numel() * module.weight[0].numel()

    traced_outputs(whole, size, count)
    return counts
