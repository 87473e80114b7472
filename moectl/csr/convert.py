"""Weights of other programs under the names of ours; state dicts in, state dicts out.

Letters: B batch, K concepts, M prototypes per concept, C classes, D projection width.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WRAPPERS = ("model", "state_dict", "model_state_dict")
_NORM = ("task_mean", "task_std", "kept")
"""Buffers of our networks that an original checkpoint does not have."""

# Encoders by timm and the authors of masked autoencoders, then by transformers before version 5.
_VIT_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.(\d+)\.norm1\.", r"layers.\1.layernorm_before."),
        (r"^blocks\.(\d+)\.norm2\.", r"layers.\1.layernorm_after."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"layers.\1.attention.o_proj."),
        (r"^blocks\.(\d+)\.attn\.([qkv]_proj)\.", r"layers.\1.attention.\2."),
        (r"^blocks\.(\d+)\.mlp\.", r"layers.\1.mlp."),
        (r"^norm\.", "layernorm."),
        (r"^encoder\.layer\.(\d+)\.", r"layers.\1."),
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
]
_VIT_EXTRAS = re.compile(
    r"^(decoder|mask_token|embeddings\.mask_token|(head|head_dist|fc_norm|pre_logits|pooler"
    r"|classifier)\.)"
)
_RESNET = {
    "0": "conv1",
    "1": "bn1",
    **{str(number + 3): f"layer{number}" for number in range(1, 5)},
}


class VitShape(NamedTuple):
    """Size of a vision transformer's encoder; the defaults are ViT-B/16."""

    width: int = 768
    layers: int = 12
    hidden: int = 3072
    """Width inside the two-layer networks."""
    patch: int = 16
    image_size: int = 224
    """Side in pixels of the images for which there are position embeddings."""
    eps: float = 1e-6
    """Of the layer norms; transformers says 1e-12, timm and masked autoencoders 1e-6."""


class Converted(NamedTuple):
    """Weights of a backbone under our names."""

    state: dict[str, Tensor]
    left_out: tuple[str, ...]
    """Names in the file that are no part of the backbone: decoder, classifier, pooler."""


def network_weights(payload: Any) -> dict[str, Tensor]:
    """Find the weights in what a file holds: under `model` or `state_dict`, named `module.…`.

    Raises:
        ValueError: if there are none.
    """
    for name in _WRAPPERS:
        if isinstance(payload, Mapping) and isinstance(payload.get(name), Mapping):
            payload = payload[name]
    state = {
        name.removeprefix("module."): value
        for name, value in (payload.items() if isinstance(payload, Mapping) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not state:
        raise ValueError("holds no weights, neither alone nor as model or state_dict")
    return state


def backbone_weights(payload: Any) -> dict[str, Tensor]:
    """Find the weights of the backbone in what a file holds.

    Of a whole network whose names begin with `backbone.` only that part is taken.

    Raises:
        ValueError: if there are none.
    """
    state = network_weights(payload)
    part = {name: value for name, value in state.items() if name.startswith("backbone.")}
    return {name.removeprefix("backbone."): value for name, value in (part or state).items()}


def vit_weights(state: Mapping[str, Tensor]) -> tuple[Converted, VitShape]:
    """Rename the encoder of a vision transformer for transformers' `ViTModel` without pooler.

    Takes the names of timm and of masked autoencoders, and those of transformers 4 and 5.

    Raises:
        ValueError: if the names are of none of these.

    Source: Dosovitskiy et al. 2021; He et al. 2022.
    """
    plain = {name.removeprefix("vit."): value for name, value in state.items()}
    kept = {name: value for name, value in plain.items() if not _VIT_EXTRAS.match(name)}
    left_out = tuple(name for name in plain if name not in kept)
    found = {_vit_name(name): value for name, value in _thirds(kept).items()}
    eps = 1e-6 if "patch_embed.proj.weight" in kept else 1e-12
    return Converted(found, left_out), _vit_shape(found, eps)


def _vit_name(name: str) -> str:
    for pattern, ours in _VIT_NAMES:
        name = pattern.sub(ours, name)
    return name


def _thirds(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split weights and biases that make queries, keys and values at once."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        before, joint, after = name.partition(".attn.qkv.")
        if not joint:
            found[name] = value
            continue
        if len(value) % 3:
            raise ValueError(f"{name} has {len(value)} rows, expected a multiple of 3")
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            found[f"{before}.attn.{letter}_proj.{after}"] = part
    return found


def _vit_shape(state: Mapping[str, Tensor], eps: float) -> VitShape:
    patches = _sizes(state, "embeddings.patch_embeddings.projection.weight", 4)
    positions = _sizes(state, "embeddings.position_embeddings", 3)[1]
    side = math.isqrt(max(positions - 1, 0))
    if side**2 != positions - 1 or not side:
        raise ValueError(f"has {positions} position embeddings, expected a square number and one")
    if patches[0] % 64:
        raise ValueError(f"is {patches[0]} wide, expected a multiple of 64, the width of a head")
    numbers = [int(name.split(".")[1]) for name in state if re.match(r"layers\.\d+\.", name)]
    return VitShape(
        width=patches[0],
        layers=max(numbers, default=-1) + 1,
        hidden=_sizes(state, "layers.0.mlp.fc1.weight", 2)[0],
        patch=patches[3],
        image_size=side * patches[3],
        eps=eps,
    )


def _sizes(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(
            f"lacks {name}: expected a vision transformer as timm or transformers names it"
        )
    sizes = tuple(state[name].shape)
    if len(sizes) != dimensions:
        raise ValueError(f"{name} has shape {sizes}, expected {dimensions} dimensions")
    return sizes


def convolution_weights(state: Mapping[str, Tensor]) -> Converted:
    """Rename the weights of a torchvision classifier for its feature stack."""
    kept, left_out = {}, []
    for name, value in state.items():
        if name.startswith(("fc.", "classifier.")):
            left_out.append(name)
            continue
        name = f"features.{name.removeprefix('features.')}"
        # The names that torchvision's own files of dense networks have.
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)
        kept[name] = value
    return Converted(kept, tuple(left_out))


def load_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an original checkpoint for `CSRNet.load_state_dict`.

    Takes checkpoints with a vision transformer, whose pooler is dropped, or a residual network. The
    task head sees similarities as they are.

    Raises:
        ValueError: if it is no such checkpoint.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    if ours := [name for name in _NORM if name in plain]:
        raise ValueError(f"has {ours[0]}, so it is no original checkpoint but one of csr train")
    rows, concepts = len(_head(plain, "prototypes", 4)), len(_head(plain, "concept_head.weight", 4))
    found = {
        _original_name(name): value
        for name, value in plain.items()
        if not name.startswith("backbone.vit.pooler.")
    }
    device = plain["prototypes"].device
    norm = {
        "task_mean": torch.zeros(rows),
        "task_std": torch.ones(rows),
        "kept": torch.ones(concepts, rows // concepts, dtype=torch.bool),
    }
    return {**{name: value.to(device) for name, value in norm.items()}, **found}


def _original_name(name: str) -> str:
    if name.startswith("backbone.vit."):
        return f"backbone.vit.{_vit_name(name.removeprefix('backbone.vit.'))}"
    number = re.match(r"backbone\.(\d+)\.", name)
    if not number:
        return name
    if number[1] not in _RESNET:
        raise ValueError(f"{name}: a residual network has no part {number[1]}")
    return f"backbone.features.{_RESNET[number[1]]}.{name[number.end() :]}"


def original_arguments(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the form of a network off weights from `load_original`.

    Returns:
        What `rebuild_backbone` takes, and the other arguments of `CSRNet`.

    Raises:
        ValueError: if the weights do not belong together.
    """
    concepts = len(_head(state, "concept_head.weight", 4))
    rows, projection = _head(state, "prototypes", 4).shape[:2]
    classes, inputs = _head(state, "task_head.weight", 2).shape
    if rows % concepts or inputs != rows:
        raise ValueError(f"{rows} prototypes of {concepts} concepts, but a head for {inputs}")
    arguments = {
        "concepts": concepts,
        "prototypes": rows // concepts,
        "classes": classes,
        "projection": projection,
    }
    if "backbone.vit.embeddings.cls_token" in state:
        _, shape = vit_weights(backbone_weights(state))
        return {"kind": "medmae", **shape._asdict()}, arguments
    return {"kind": _resnet_kind(state)}, arguments


def _resnet_kind(state: Mapping[str, Tensor]) -> str:
    if "backbone.features.layer3.0.conv1.weight" not in state:
        raise ValueError("has neither a vision transformer nor a residual network as its backbone")
    deep = "backbone.features.layer3.5.conv1.weight" in state
    bottlenecks = "backbone.features.layer3.0.conv3.weight" in state
    if bottlenecks and not deep:
        raise ValueError("has a residual network other than resnet18, resnet34 and resnet50")
    return "resnet50" if bottlenecks else "resnet34" if deep else "resnet18"


def _head(state: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    if name not in state or state[name].ndim != dimensions or not len(state[name]):
        raise ValueError(f"has no {name} of {dimensions} dimensions")
    return state[name]
