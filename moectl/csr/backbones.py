"""Networks that turn images into features: vision transformers and convolutions.

Letters: B batch, F channels, H W feature grid, S side of an image in pixels.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from moectl.csr.convert import (
    Converted,
    VitShape,
    backbone_weights,
    convolution_weights,
    vit_weights,
)
from moectl.csr.model import Backbone
from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.files import read_bytes
from moectl.engine.launch import offline

log = logging.getLogger(__name__)

Kind = Literal[
    "medmae", "vit", "resnet18", "resnet34", "resnet50", "densenet121", "convnext_tiny", "tiny"
]

_HUB = {"medmae": "facebook/vit-mae-base", "vit": "google/vit-base-patch16-224-in21k"}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


class _Stack(NamedTuple):
    """A stack of convolutions; its grid is S / up rounded up, then / down rounded down."""

    channels: int
    up: int
    down: int


_STACKS = {
    "resnet18": _Stack(512, 32, 1),
    "resnet34": _Stack(512, 32, 1),
    "resnet50": _Stack(2048, 32, 1),
    "densenet121": _Stack(1024, 4, 8),
    "convnext_tiny": _Stack(768, 1, 32),
    "tiny": _Stack(64, 8, 1),
}


class Loaded(NamedTuple):
    """Which weights a backbone started from."""

    source: str
    tensors: int
    """Found in the file."""
    expected: int
    """Of the backbone, counters aside."""
    left_out: tuple[str, ...]
    """Names in the file that are no part of the backbone."""

    @property
    def percent(self) -> float:
        """Share of the backbone's tensors that the file gave, in percent."""
        return 100 * self.tensors / self.expected

    def __str__(self) -> str:
        rest = f", {len(self.left_out)} others left out" if self.left_out else ""
        count = f"{self.tensors} of {self.expected} tensors of the backbone"
        return f"{self.source}: {count} ({self.percent:.0f} %){rest}"


class VitBackbone(Backbone):
    """Encoder of a vision transformer whose patch tokens are put back in their places.

    Images of other sizes than the position embeddings were made for get interpolated ones.

    Source: Dosovitskiy et al. 2021.
    """

    def __init__(self, kind: str, shape: VitShape) -> None:
        from transformers import ViTConfig, ViTModel

        super().__init__(shape.width, {"kind": kind, **shape._asdict()})
        self.patch = shape.patch
        config = ViTConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.width // 64,
            intermediate_size=shape.hidden,
            patch_size=shape.patch,
            image_size=shape.image_size,
            layer_norm_eps=shape.eps,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Return H and W for images of a size, one side or height and width."""
        height, width = (size, size) if isinstance(size, int) else size
        if height % self.patch or width % self.patch or not height * width:
            message = f"images of {height} x {width} pixels: expected multiples of {self.patch}"
            raise ValueError(f"{message}, the side of a patch")
        return height // self.patch, width // self.patch

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S), or other rectangles, to features (B, F, H, W)."""
        grid = self.grid((images.shape[2], images.shape[3]))
        tokens = self.vit(images, interpolate_pos_encoding=True).last_hidden_state
        return tokens[:, 1:].mT.unflatten(2, grid)


class ConvolutionBackbone(Backbone):
    """The convolutions of a torchvision classifier, or four small ones of our own ("tiny").

    Source: He et al. 2016; Huang et al. 2017; Liu et al. 2022.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(_STACKS[kind].channels, {"kind": kind})
        self.stack = _STACKS[kind]
        self.features = _tiny() if kind == "tiny" else _features(kind)

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Return H and W for images of a size, one side or height and width."""
        height, width = (size, size) if isinstance(size, int) else size
        _, up, down = self.stack
        return -(-height // up) // down, -(-width // up) // down

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S), or other rectangles, to features (B, F, H, W)."""
        return self.features(images)


def _tiny() -> nn.Sequential:
    widths, strides = (3, 16, 32, 64, 64), (2, 2, 2, 1)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _features(kind: str) -> nn.Sequential:
    from torchvision.models import get_model

    network = get_model(kind, weights=None)
    features = nn.Sequential()
    if not kind.startswith("resnet"):
        features = network.features
    else:
        for name, layer in network.named_children():
            if name not in ("avgpool", "fc"):
                features.add_module(name, layer)
    if kind == "densenet121":  # torchvision does this last step in the classifier's forward
        features.add_module("relu", nn.ReLU(inplace=True))
    return features


def build_backbone(
    kind: Kind,
    model_name: str = "",
    *,
    pretrained: bool = False,
    image_size: int = 224,
    allow_pickle: bool = False,
) -> Backbone:
    """Make a backbone, with random weights unless others are asked for.

    Its `loaded` says which weights it starts from, None for random ones; from its `arguments`,
    plain values, `rebuild_backbone` makes one of the same form.

    Args:
        kind: architecture.
        model_name: a weights file, .pth or .safetensors, which is always read; or, with
            `pretrained`, a model on the Hugging Face hub or a folder with one. Empty takes the
            usual one of the kind.
        pretrained: start from the usual public weights; they are downloaded if they are not there,
            unless MOECTL_OFFLINE forbids it.
        image_size: S. Transformers from a file keep the position embeddings that it has.
        allow_pickle: read a weights file that holds more than tensors, and run its code.

    Raises:
        UserError: if there is no such model or file, or a file lacks a single tensor of the
            backbone, or the features would be fewer than 2 x 2.
    """
    if kind not in get_args(Kind):
        raise UserError(f"backbone {kind!r}: expected one of {', '.join(get_args(Kind))}")
    source, payload = _weights(kind, model_name, pretrained, allow_pickle)
    try:
        backbone = _build(kind, source, payload, image_size)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    try:
        grid = backbone.grid(image_size)
    except ValueError as error:
        raise UserError(f"backbone {kind}: {error}") from None
    if min(grid) < 2:
        raise UserError(
            f"backbone {kind}: images of {image_size} x {image_size} pixels have only"
            f" {grid[0]} x {grid[1]} features, expected 2 x 2 or more"
        )
    return backbone


def _build(kind: Kind, source: str, payload: Any, image_size: int) -> Backbone:
    if kind not in _HUB:
        backbone: Backbone = ConvolutionBackbone(kind)
        if payload is None:
            return backbone
        return _load(backbone, convolution_weights(backbone_weights(payload)), source)
    if payload is None:
        eps = 1e-6 if kind == "medmae" else 1e-12
        patch = VitShape().patch
        side = max(image_size // patch, 1) * patch
        return VitBackbone(kind, VitShape(image_size=side, eps=eps))
    converted, shape = vit_weights(backbone_weights(payload))
    named = {f"vit.{name}": value for name, value in converted.state.items()}
    return _load(VitBackbone(kind, shape), converted._replace(state=named), source)


def rebuild_backbone(arguments: Mapping[str, Any]) -> Backbone:
    """Make a backbone of the form that another one's `arguments` tell, with random weights."""
    form = dict(arguments)
    kind = form.pop("kind")
    return VitBackbone(kind, VitShape(**form)) if kind in _HUB else ConvolutionBackbone(kind)


def _load(backbone: Backbone, converted: Converted, source: str) -> Backbone:
    """Load weights strictly, in both directions; counters of batches may be missing."""
    own, given = backbone.state_dict(), converted.state
    expected = [name for name in own if not name.endswith(".num_batches_tracked")]
    missing = [name for name in expected if name not in given]
    found = Loaded(source, len(expected) - len(missing), len(expected), converted.left_out)
    if missing:
        raise ValueError(
            f"lacks {missing[0]}; only {found.tensors} of {found.expected} tensors of the backbone"
            f" ({found.percent:.0f} %) are there"
        )
    for name, value in given.items():
        if name not in own:
            raise ValueError(f"has {name}, which is no part of the backbone")
        if own[name].shape != value.shape:
            shapes = f"shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            raise ValueError(f"{name} has {shapes}")
    # Missing counters only: everything else has just been found.
    backbone.load_state_dict(given, strict=False)
    backbone.loaded = found
    return backbone


def _weights(kind: Kind, model_name: str, pretrained: bool, trust: bool) -> tuple[str, Any]:
    """Find what the backbone starts from: its name, and what the file holds or None."""
    if model_name.endswith(_SUFFIXES):
        return model_name, _read(Path(model_name), trust)
    usual = _HUB.get(kind, kind)
    if kind not in _HUB and model_name not in ("", kind):
        raise UserError(
            f"model_name {model_name!r} does not apply to the backbone {kind}",
            f"leave it empty, or give a weights file that ends in {' or '.join(_SUFFIXES)}",
        )
    if not pretrained:
        if model_name not in ("", usual):
            raise UserError(
                f"model_name {model_name!r}: the form of this model is in its weights, which are"
                " not asked for",
                f"ask for pretrained weights, or leave the name at {usual}",
            )
        return kind, None
    if kind == "tiny":
        raise UserError(
            "backbone tiny: there are no pretrained weights of it", "--no-pretrained goes without"
        )
    name = model_name or usual
    return name, _read(_hub_file(name), trust) if kind in _HUB else _torchvision(kind)


def _read(path: Path, trust: bool) -> Any:
    data = read_bytes(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(data)
        except SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
    if trust:
        return artefact.trusting_load(data, str(path))
    return artefact.safe_load(
        data, str(path), hint="if you trust where it comes from, allow its code with --allow-pickle"
    )


def _hub_file(name: str) -> Path:
    """Return the weights file of a model on the hub, from the cache if it is there."""
    from transformers.utils.hub import cached_file

    reason = ""
    for local in (True,) if offline() else (True, False):
        if not local:
            log.warning("downloading %s from the Hugging Face hub", name)
        for file in _HUB_FILES:
            try:
                found = cached_file(name, file, local_files_only=local)
            except (OSError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                continue
            if found:
                return Path(found)
    why = "MOECTL_OFFLINE is set" if offline() else reason
    raise UserError(
        f"{name}: its weights are not in the cache and could not be downloaded ({why})",
        f"fetch {_HUB_FILES[0]} of https://huggingface.co/{name} and give its path as model_name",
    )


def _torchvision(kind: str) -> Any:
    """Return the ImageNet weights of a kind, from the cache if they are there."""
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(kind)["IMAGENET1K_V1"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    hint = f"put {weights.url} there, or give the path of such a file as model_name"
    if not file.is_file():
        if offline():
            raise UserError(f"{file} not found, and MOECTL_OFFLINE forbids the download", hint)
        log.warning("downloading %s to %s", weights.url, file.parent)
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: could not be downloaded or read ({error})", hint) from None
