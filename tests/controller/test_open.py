"""Networks from every place that they may be in, and clear words where there are none."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moectl.controller import tiny
from moectl.controller.llava import LlavaNext
from moectl.controller.open import FAMILIES, open_backbone
from moectl.controller.qwen_vl import QwenVl
from moectl.controller.smolvlm import SmolVlm
from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def weights(backbone: Any) -> dict[str, torch.Tensor]:
    return dict(backbone.model.state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved(backbone: Any, folder: Path) -> str:
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return str(folder)


def test_nano_is_the_same_whenever_it_is_opened() -> None:
    one, other = (open_backbone("nano", device="cpu") for _ in range(2))
    assert equal(weights(one), weights(other))
    assert one.name == "nano"
    assert one.space.blocks == 6


def test_a_small_network_may_be_had_in_other_numbers(picture: "Image") -> None:
    backbone = open_backbone("nano", device="cpu", dtype="bfloat16", experts="batched_mm")
    assert {weight.dtype for weight in weights(backbone).values()} == {torch.bfloat16}
    inputs = backbone.prepare(picture, "what?", "vqa", "low")
    view = backbone.look(picture)
    logits, _ = backbone.prefill(inputs, backbone.encode(inputs, view))
    assert logits.dtype == torch.bfloat16
    assert view.feature.dtype == backbone.text_feature("what?").dtype == torch.float32


@pytest.mark.parametrize("text", ["olmoe", "dense"])
def test_a_network_that_was_taught_comes_back(tmp_path: Path, text: tiny.Text) -> None:
    model, _ = tiny.build("nano", text, seed=5)
    save_file(model.state_dict(), tmp_path / "vlm.safetensors")
    facts = {"size": "nano", "text": text, "questions": 7}
    (tmp_path / "vlm.json").write_text(json.dumps(facts))
    backbone = open_backbone(str(tmp_path), device="cpu")
    assert equal(weights(backbone), dict(model.state_dict()))
    assert backbone.name == str(tmp_path)


def damaged(folder: Path, how: str) -> None:
    model, _ = tiny.build("nano")
    state = dict(model.state_dict())
    facts: dict[str, Any] = {"size": "nano", "text": "olmoe"}
    if how == "part":
        state.popitem()
    if how == "size":
        facts["size"] = "large"
    if how == "family":
        facts["text"] = "dense"
    save_file(state, folder / "vlm.safetensors")
    if how == "cut":
        data = (folder / "vlm.safetensors").read_bytes()
        (folder / "vlm.safetensors").write_bytes(data[:1000])
    if how == "absent":
        (folder / "vlm.safetensors").unlink()
    text = "[]" if how == "list" else json.dumps(facts)
    (folder / "vlm.json").write_text(text)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("part", "vlm.safetensors: .*Missing key"),
        ("cut", "vlm.safetensors: "),
        ("absent", "vlm.safetensors: "),
        ("size", "vlm.json: does not say how"),
        ("list", "vlm.json: does not say how"),
        ("family", "vlm.safetensors: .*Missing key"),
    ],
)
def test_a_damaged_network_is_refused(tmp_path: Path, how: str, words: str) -> None:
    damaged(tmp_path, how)
    with pytest.raises(UserError, match=words):
        open_backbone(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("family", "kind"), [("nano", LlavaNext), ("qwen", QwenVl), ("idefics", SmolVlm)]
)
def test_a_folder_of_transformers_says_its_family(
    family: str, kind: type, tmp_path: Path, picture: "Image", request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(family)
    backbone = open_backbone(saved(source, tmp_path), device="cpu")
    assert type(backbone) is kind
    assert equal(weights(backbone), weights(source))
    assert backbone.space == source.space
    assert {weight.dtype for weight in weights(backbone).values()} == {torch.float32}
    inputs = backbone.prepare(picture, "what?", "vqa", "low")
    assert inputs.text_tokens > source.prepare(picture, "what?", "vqa", "low").text_tokens


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, nano: LlavaNext) -> None:
    folder = saved(nano, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[next(name for name in state if "0.self_attn.q_norm" in name)]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its weights are missing, .*q_norm"):
        open_backbone(folder, device="cpu")


def test_weights_that_could_run_code_are_not_read(tmp_path: Path, nano: LlavaNext) -> None:
    folder = saved(nano, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(nano.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be opened"):
        open_backbone(folder, device="cpu")


@pytest.mark.parametrize("kind", ["bert", "molmo"])
def test_another_family_is_refused_with_those_that_are_known(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=r"family") as caught:
        open_backbone(str(tmp_path), device="cpu")
    assert str(tmp_path) in caught.value.message
    assert all(family in caught.value.hint for family in FAMILIES)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    remote = {"AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": remote}))
    with pytest.raises(UserError):
        open_backbone(str(tmp_path), device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["nothing", "/nobody/nothing", "../nothing", "./nothing", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(name)}: no such network"):
        open_backbone(name, device="cpu")


def test_a_name_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing: no network of a known family"):
        open_backbone("nobody/nothing", device="cpu")


@pytest.mark.parametrize("value", ["1", ""])
def test_the_hub_is_left_alone_if_told_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    import transformers

    asked: list[dict[str, Any]] = []

    def refuse(source: str, **options: Any) -> None:
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setenv("MOECTL_OFFLINE", value)
    with pytest.raises(UserError, match="not here"):
        open_backbone("nobody/nothing", device="cpu")
    assert asked == [{"trust_remote_code": False, "local_files_only": bool(value)}]
    assert ("fetching nobody/nothing from the hub" in caplog.text) is not bool(value)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.bfloat16),
    ],
)
def test_a_converted_molmoe_is_opened_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, expected: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moectl_molmoe"}))
    monkeypatch.setattr("moectl.controller.molmoe.open_molmoe", lambda *given: given)
    given: Any = open_backbone(str(tmp_path), device=device, dtype=dtype, experts="eager")
    assert given == (tmp_path, torch.device(device), expected, "eager")
