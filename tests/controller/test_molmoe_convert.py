import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moectl.controller.molmoe import INDEX, open_molmoe
from moectl.controller.molmoe_convert import convert, rules
from moectl.controller.molmoe_model import config_from
from moectl.engine.errors import UserError

_SPEC = importlib.util.spec_from_file_location(
    "molmo_reference", Path(__file__).with_name("molmo_reference.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
reference: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["molmo_reference"] = reference
_SPEC.loader.exec_module(reference)

SIZES = reference.Sizes(blocks=2, experts=4, top_k=2, image_blocks=3)
WEIGHTS = SIZES.weights()


@pytest.fixture
def original(tmp_path: Path) -> Path:
    reference.write_original(tmp_path / "original", SIZES, WEIGHTS)
    return tmp_path / "original"


def converted(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap(folder: Path, old: str, new: dict[str, torch.Tensor]) -> None:
    """Put other tensors in the place of one."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if old in weights:
            del weights[old]
            save_file({**weights, **new}, path)


@pytest.mark.parametrize(("prefix", "files"), [("model.", 3), ("", 1)])
def test_every_number_arrives_where_it_belongs(tmp_path, prefix, files):
    reference.write_original(tmp_path / "a", SIZES, WEIGHTS, prefix=prefix, files=files)
    convert(tmp_path / "a", tmp_path / "b")
    found = {name: tensor.numpy() for name, tensor in converted(tmp_path / "b").items()}
    block, vit = "transformer.blocks.1", "vision_backbone.image_vit"
    fused = WEIGHTS[f"{block}.attn.att_proj.weight"]
    for number, part in enumerate("qkv"):
        rows = fused[16 * number : 16 * (number + 1)]
        assert (found[f"text.layers.1.self_attn.{part}_proj.weight"] == rows).all()
    expert = f"{block}.mlp.experts.3"
    stacked = found["text.layers.1.mlp.experts.gate_up_proj"]
    assert stacked.shape == (4, 10, 16)
    assert (stacked[3, :5] == WEIGHTS[f"{expert}.gate_proj.weight"]).all()
    assert (stacked[3, 5:] == WEIGHTS[f"{expert}.up_proj.weight"]).all()
    down = found["text.layers.1.mlp.experts.down_proj"]
    assert (down[3] == WEIGHTS[f"{expert}.down_proj.weight"]).all()
    table = found["text.embed_tokens.weight"]
    assert (table[:260] == WEIGHTS["transformer.wte.embedding"]).all()
    assert (table[260:] == WEIGHTS["transformer.wte.new_embedding"]).all()
    kernel = found["tower.embeddings.patch_embedding.weight"]
    square = np.random.default_rng(0).normal(size=(4, 4, 3))
    wanted = WEIGHTS[f"{vit}.patch_embedding.weight"] @ square.reshape(-1)
    assert np.allclose((kernel * square.transpose(2, 0, 1)).sum(axis=(1, 2, 3)), wanted)
    layer = f"{vit}.transformer.resblocks.2"
    wo = WEIGHTS[f"{layer}.attention.wo.bias"]
    assert (found["tower.encoder.layers.2.self_attn.out_proj.bias"] == wo).all()
    assert sum(one.size for one in found.values()) == sum(one.size for one in WEIGHTS.values())


def test_every_tensor_is_used_once_and_makes_all_of_the_network(original, tmp_path):
    report = convert(original, tmp_path / "out")
    config = config_from(report["config"])
    used = [key for shard in rules(config) for rule in shard for key in rule.sources]
    assert sorted(used) == sorted(WEIGHTS)
    assert report["tensors_read"] == len(WEIGHTS)
    network = open_molmoe(tmp_path / "out", torch.device("cpu"), torch.float32).model
    assert report["tensors_written"] == len(network.state_dict())
    assert config == network.config
    assert (config.crop, config.patch, config.margin, config.pooling) == (32, 4, 2, 2)
    assert (config.heads, config.top_k, config.image_layers) == (2, 2, (-2, -3))


def test_the_index_names_the_file_of_every_tensor(original, tmp_path):
    report = convert(original, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {index["weight_map"][name] for name in load_file(path)} == {path.name}
    assert set(index["weight_map"]) == set(converted(tmp_path / "out"))
    size = sum(one.nbytes for one in WEIGHTS.values())
    assert index["metadata"]["total_size"] == report["bytes"] == size
    # The image's part, both ends of the text network, and its blocks.
    assert report["files"] == len(set(index["weight_map"].values())) == 4


def test_weights_keep_their_precision(original, tmp_path):
    for path in original.glob("*.safetensors"):
        save_file({key: one.bfloat16() for key, one in load_file(path).items()}, path)
    convert(original, tmp_path / "out")
    assert {one.dtype for one in converted(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_tokenizer_comes_along(original, tmp_path):
    convert(original, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()


def test_sizes_that_the_configuration_does_not_tell_are_molmoes(original, tmp_path):
    values = json.loads((original / "config.json").read_text())
    for name in ("layer_norm_eps", "rope_theta", "max_position_embeddings", "rope_impl"):
        del values[name]
    (original / "config.json").write_text(json.dumps({**values, "max_sequence_length": 77}))
    config = config_from(convert(original, tmp_path / "out")["config"])
    assert (config.norm_eps, config.rope_theta, config.positions) == (1e-5, 10000.0, 77)


def test_an_empty_folder_is_taken(original, tmp_path):
    (tmp_path / "out").mkdir()
    convert(original, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_not_overwritten(original, tmp_path, kind):
    out = tmp_path / "out"
    mine = out / "mine.txt" if kind == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        convert(original, out)
    assert mine.read_text() == "mine"


KEY = "model.transformer.blocks.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (KEY, {}, r"has no transformer\.blocks\.1\.mlp\.experts\.2\.up_proj\.weight, 1 tensors"),
        (KEY, {"model.a": torch.ones(1)}, "has no transformer.blocks.1"),
        ("lm_head.weight", {}, "has no lm_head.weight"),
        (KEY, {KEY: torch.ones(5, 16), "model.strange": torch.ones(1)}, "strange has no place"),
        (KEY, {KEY: torch.ones(5, 16), KEY[6:]: torch.ones(5, 16)}, "is there twice"),
        (KEY, {KEY: torch.ones(5, 15)}, r"blocks\.1\.mlp\.experts\.0\.gate_proj"),
        (
            "model.transformer.blocks.0.attn.attn_out.weight",
            {"model.transformer.blocks.0.attn.attn_out.weight": torch.ones(16, 8)},
            r"attn_out\.weight has the shape \[16, 8\]",
        ),
        (
            "model.transformer.blocks.0.attn.att_proj.weight",
            {"model.transformer.blocks.0.attn.att_proj.weight": torch.ones(32, 16)},
            r"att_proj\.weight",
        ),
    ],
    ids=["missing", "renamed", "head", "strange", "twice", "expert", "shape", "grouped"],
)
def test_a_source_that_is_no_whole_molmoe_is_refused_before_anything_is_written(
    original, tmp_path, old, new, said
):
    swap(original, old, new)
    with pytest.raises(UserError, match=said):
        convert(original, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "work"] == ["original"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_pooling_2d": "stack"}, "image_pooling_2d = 'stack'"),
        ({"rope_impl": "interleave"}, "rope_impl = 'interleave'"),
        ({"norm_after": True}, "norm_after = True"),
        ({"overlap_margins": [4, 2]}, "overlap_margins"),
        ({"overlap_margins": [3, 3]}, "margin = 3"),
        ({"n_heads": 5}, "hidden = 16: no multiple of heads"),
        ({"moe_top_k": 9}, "top_k = 9"),
    ],
)
def test_a_configuration_of_another_network_is_refused(original, tmp_path, changes, said):
    edit(original / "config.json", **changes)
    with pytest.raises(UserError, match=said):
        convert(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "*.safetensors"])
def test_a_file_that_is_missing_is_named(original, tmp_path, name):
    for path in original.glob(name):
        path.unlink()
    with pytest.raises(UserError, match=name.strip("*.")):
        convert(original, tmp_path / "out")


def test_a_file_that_was_cut_off_is_named(original, tmp_path):
    path = min(original.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
        convert(original, tmp_path / "out")


def test_nothing_is_left_when_writing_fails(original, tmp_path, monkeypatch):
    import safetensors.torch

    calls = []

    def full(weights: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError("no space left")
        save_file(weights, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        convert(original, tmp_path / "out")
    assert calls[1].parent != tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir() if path.name != "work"] == ["original"]


def test_a_file_of_the_new_folder_is_in_memory_at_a_time(original, tmp_path, monkeypatch):
    """Tensors are read for the file that is written next, none before."""
    import safetensors
    import safetensors.torch

    events = []
    openly = safetensors.safe_open

    class Watched:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = openly(*arguments, **options)

        def __enter__(self) -> "Watched":
            self.file.__enter__()
            return self

        def __exit__(self, *reason: Any) -> None:
            self.file.__exit__(*reason)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, key: str) -> torch.Tensor:
            events.append(key)
            return self.file.get_tensor(key)

    def watched(weights: Any, path: Path, **options: Any) -> None:
        events.append("write")
        save_file(weights, path, **options)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    monkeypatch.setattr(safetensors.torch, "save_file", watched)
    convert(original, tmp_path / "out")
    last = events[events.index("write", events.index("write", events.index("write") + 1) + 1) :]
    assert all(event == "write" or ".blocks.1." in event for event in last)
    assert len([event for event in events if event != "write"]) == len(WEIGHTS)
