"""From the published weights of MolmoE to those of our network of native parts.

The published code does not run on today's transformers; the weights say all that is needed.

Letters: E experts.

Source: the key layout of the weights published with Deitke et al. 2024 (Molmo).
"""

import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.controller.molmoe import INDEX
from moectl.controller.molmoe_model import Config, MolmoeModel, check
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, is_folder, read_json, sync_folder, write_json

log = logging.getLogger(__name__)

Make = Callable[[list[Tensor]], list[Tensor]]

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_FIXED = {
    "image_pooling_2d": ("attention-meanq", "attention_meanq"),
    "image_padding_embed": ("pad_and_partial_pad",),
    "clip_qkv": (None,),
    "norm_after": (False,),
    "normalize_input_embeds": (False,),
    "use_cls_feature": (False,),
}
"""What a configuration may say, if it speaks of it: our network knows nothing else."""
_PAIRWISE = ("cockatoo", "interleave")
"""Ways to turn queries and keys that take neighbours for pairs; all others take halves, as we."""

_VIT = "vision_backbone.image_vit"
_BLOCK = "transformer.blocks"


@dataclass(frozen=True)
class Rule:
    """Some of the original's tensors and what becomes of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    make: Make = list


def convert(source: Path, out: Path) -> dict[str, Any]:
    """Write the weights of MolmoE under the names and in the shapes of our network.

    Every tensor of the original is used once. Weights keep their precision. At most a block of the
    network is in memory at a time. The folder appears whole or not at all.

    Args:
        source: folder with the original's config.json, safetensors files and tokenizer.
        out: new folder; an empty one is taken too.

    Returns:
        What was done, in plain values.

    Raises:
        UserError: if the source is not a whole MolmoE, or the folder holds something.
    """
    if is_file(out) or (is_folder(out) and any(out.iterdir())):
        raise UserError(f"{out}: is there already", "Give a folder that does not exist.")
    with ExitStack() as stack:
        tensors = _Original(source, stack)
        config = _config(tensors, _values(source))
        shards = rules(config)
        _check_keys(tensors, [rule for shard in shards for rule in shard])
        _check_shapes(tensors, config, shards)
        files = [name for name in _TOKENIZER if is_file(source / name)]
        if "tokenizer.json" not in files:
            raise UserError(f"{source}: has no tokenizer.json", "Download the whole repository.")
        staging = out.with_name(f".{out.name}.{os.getpid()}.part")
        staging.mkdir(parents=True)
        try:
            size = _write(staging, tensors, shards)
            write_json(staging / "config.json", config.plain())
            for name in files:
                shutil.copyfile(source / name, staging / name)
            sync_folder(staging)
            staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    sync_folder(out.parent)
    return {
        "folder": str(out),
        "tensors_read": len(tensors.files),
        "tensors_written": sum(len(rule.targets) for shard in shards for rule in shard),
        "files": len(shards),
        "bytes": size,
        "config": config.plain(),
    }


def rules(config: Config) -> list[list[Rule]]:
    """Return what is made of which tensors, file by file."""
    image = [*_tower(config), *_connector()]
    ends = [
        Rule(
            ("transformer.wte.embedding", "transformer.wte.new_embedding"),
            ("text.embed_tokens.weight",),
            lambda parts: [torch.cat(parts)],
        ),
        Rule(("transformer.ln_f.weight",), ("text.norm.weight",)),
        Rule(("lm_head.weight",), ("head.weight",)),
    ]
    blocks = [_block(number, config.experts) for number in range(config.blocks)]
    return [image, ends, *blocks]


def _tower(config: Config) -> list[Rule]:
    patch, width = config.patch, config.image_hidden

    def as_convolution(parts: list[Tensor]) -> list[Tensor]:
        # A row of the matrix holds a patch's pixels by row, column and colour.
        return [parts[0].reshape(width, patch, patch, 3).permute(0, 3, 1, 2).contiguous()]

    found = [
        Rule(
            (f"{_VIT}.patch_embedding.weight",),
            ("tower.embeddings.patch_embedding.weight",),
            as_convolution,
        ),
        Rule((f"{_VIT}.class_embedding",), ("tower.embeddings.class_embedding",)),
        Rule((f"{_VIT}.positional_embedding",), ("tower.embeddings.position_embedding.weight",)),
        *_renamed(_VIT, "tower", {"pre_ln": "pre_layrnorm"}),
    ]
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.out_proj",
        "feed_forward.w1": "mlp.fc1",
        "feed_forward.w2": "mlp.fc2",
        "attention_norm": "layer_norm1",
        "ffn_norm": "layer_norm2",
    }
    for layer in range(config.image_blocks):
        old, new = f"{_VIT}.transformer.resblocks.{layer}", f"tower.encoder.layers.{layer}"
        found += _renamed(old, new, names)
    return found


def _connector() -> list[Rule]:
    pool = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "out_proj"}
    projector = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return [
        Rule(("vision_backbone.pad_embed",), ("padding",)),
        *_renamed("vision_backbone.image_pooling_2d", "pool", pool),
        *_renamed("vision_backbone.image_projector", "projector", projector, ("weight",)),
    ]


def _block(number: int, experts: int) -> list[Rule]:
    old, new = f"{_BLOCK}.{number}", f"text.layers.{number}"
    same = {
        "attn.attn_out": "self_attn.o_proj",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "attn.attn_norm": "input_layernorm",
        "mlp.ff_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate",
    }
    each = [f"{old}.mlp.experts.{expert}" for expert in range(experts)]
    pairs = [f"{one}.{part}_proj.weight" for one in each for part in ("gate", "up")]
    return [
        Rule(
            (f"{old}.attn.att_proj.weight",),
            tuple(f"{new}.self_attn.{part}_proj.weight" for part in "qkv"),
            lambda parts: [part.clone() for part in parts[0].chunk(3)],
        ),
        *_renamed(old, new, same, ("weight",)),
        Rule(tuple(pairs), (f"{new}.mlp.experts.gate_up_proj",), _gates_and_ups),
        Rule(
            tuple(f"{one}.down_proj.weight" for one in each),
            (f"{new}.mlp.experts.down_proj",),
            lambda parts: [torch.stack(parts)],
        ),
    ]


def _gates_and_ups(parts: list[Tensor]) -> list[Tensor]:
    """Stack the experts; in each the rows of the gate come before those of the other half."""
    return [torch.stack(parts).unflatten(0, (-1, 2)).flatten(1, 2)]  # type: ignore[no-untyped-call]


def _renamed(
    old: str, new: str, names: Mapping[str, str], kinds: Sequence[str] = ("weight", "bias")
) -> list[Rule]:
    return [
        Rule((f"{old}.{before}.{kind}",), (f"{new}.{after}.{kind}",))
        for before, after in names.items()
        for kind in kinds
    ]


class _Original:
    """The original's tensors, read one at a time.

    Args:
        folder: with safetensors files.
        stack: that closes them.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.files: dict[str, tuple[Any, str]] = {}
        """Of each key without the prefix: the open file and the key there."""
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path}: cannot be read ({error})", "Download the file again."
                ) from None
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                plain = key.removeprefix("model.")
                if plain in self.files:
                    raise UserError(f"{path}: {key} is there twice, with and without model.")
                self.files[plain] = file, key
        if not self.files:
            raise UserError(f"{folder}: holds no safetensors files")

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if key not in self.files:
            raise UserError(f"{self.folder}: has no {key}", "Only MolmoE can be converted.")
        file, name = self.files[key]
        return tuple(file.get_slice(name).get_shape())

    def read(self, key: str) -> Tensor:
        """A tensor as it stands in the file."""
        file, name = self.files[key]
        return file.get_tensor(name)

    def count(self, prefix: str) -> int:
        """Different numbers that follow a prefix."""
        start = f"{prefix}."
        return len({key[len(start) :].split(".")[0] for key in self.files if key.startswith(start)})


def _values(source: Path) -> dict[str, Any]:
    """Read the original's configuration and refuse what our network cannot be."""
    path = source / "config.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object")
    for name, known in _FIXED.items():
        if name in values and values[name] not in known:
            raise UserError(f"{path}: {name} = {values[name]!r}: expected {known[0]!r}")
    if values.get("rope_impl") in _PAIRWISE:
        raise UserError(f"{path}: rope_impl = {values['rope_impl']!r}: expected 'llama'")
    return values


def _config(tensors: _Original, values: dict[str, Any]) -> Config:
    """Take sizes from the weights, and what they do not show from the configuration."""
    embedding, extra = (
        tensors.shape(f"transformer.wte.{name}") for name in ("embedding", "new_embedding")
    )
    positions, width = tensors.shape(f"{_VIT}.positional_embedding")
    pixels = tensors.shape(f"{_VIT}.patch_embedding.weight")[1]
    patch = math.isqrt(pixels // 3)
    first = f"{_BLOCK}.0.mlp"
    config = Config(
        embeddings=embedding[0] + extra[0],
        outputs=tensors.shape("lm_head.weight")[0],
        hidden=embedding[1],
        blocks=tensors.count(_BLOCK),
        experts=tensors.shape(f"{first}.gate.weight")[0],
        inner=tensors.shape(f"{first}.experts.0.gate_proj.weight")[0],
        crop=math.isqrt(positions - 1) * patch,
        patch=patch,
        image_hidden=width,
        image_inner=tensors.shape(f"{_VIT}.transformer.resblocks.0.feed_forward.w1.weight")[0],
        image_blocks=tensors.count(f"{_VIT}.transformer.resblocks"),
        projector_inner=tensors.shape("vision_backbone.image_projector.w1.weight")[0],
        **_unseen(values),
    )
    try:
        check(config)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{tensors.folder}: {error}") from None
    return config


def _unseen(values: dict[str, Any]) -> dict[str, Any]:
    """Those fields of `Config` that a configuration speaks of and weights do not show."""
    image = values.get("vision_backbone") or {}
    margins = set(values.get("overlap_margins", [])) or {4}
    if len(margins) > 1:
        raise UserError(f"config.json: overlap_margins: expected two equal numbers, not {margins}")
    found = {
        "heads": values.get("n_heads"),
        "top_k": values.get("moe_top_k"),
        "norm_eps": values.get("layer_norm_eps"),
        "rope_theta": values.get("rope_theta"),
        "positions": values.get("max_position_embeddings") or values.get("max_sequence_length"),
        "image_heads": image.get("image_num_heads"),
        "image_norm_eps": image.get("image_norm_eps"),
        "image_layers": tuple(values.get("vit_layers") or ()) or None,
        "margin": margins.pop(),
        "pooling": values.get("image_pooling_h"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _check_keys(tensors: _Original, wanted: list[Rule]) -> None:
    uses = Counter(key for rule in wanted for key in rule.sources)
    assert max(uses.values()) == 1
    if missing := sorted(set(uses) - set(tensors.files)):
        raise UserError(
            f"{tensors.folder}: has no {missing[0]}, {len(missing)} tensors in all missing",
            "Download all files again.",
        )
    if strange := sorted(set(tensors.files) - set(uses)):
        raise UserError(
            f"{tensors.folder}: {strange[0]} has no place in the network, nor have"
            f" {len(strange) - 1} others",
            "Only MolmoE can be converted.",
        )


def _check_shapes(tensors: _Original, config: Config, shards: list[list[Rule]]) -> None:
    """Convert shapes alone and compare them with the network's, before anything is written."""
    with torch.device("meta"):
        wanted = {name: one.shape for name, one in MolmoeModel(config).state_dict().items()}
    for rule in (rule for shard in shards for rule in shard):
        shapes = [tensors.shape(key) for key in rule.sources]
        try:
            made = rule.make([torch.empty(shape, device="meta") for shape in shapes])
        except RuntimeError as error:
            raise UserError(f"{tensors.folder}: {rule.sources[0]}: {error}") from None
        for target, tensor in zip(rule.targets, made, strict=True):
            if tensor.shape != wanted.pop(target):
                raise UserError(
                    f"{tensors.folder}: {rule.sources[0]} has the shape {list(shapes[0])},"
                    f" which does not fit the other sizes"
                )
    assert not wanted


def _write(folder: Path, tensors: _Original, shards: list[list[Rule]]) -> int:
    """Write all files and their index, and return the bytes of all weights."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = dict(_made(tensors, shard))
        save_file(made, folder / name, metadata={"format": "pt"})
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        places |= dict.fromkeys(made, name)
        size += sum(tensor.nbytes for tensor in made.values())
        log.info("wrote %s, %d of %d", name, number, len(shards))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)
    return size


def _made(tensors: _Original, shard: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    for rule in shard:
        parts = [tensors.read(key) for key in rule.sources]
        yield from zip(rule.targets, rule.make(parts), strict=True)
