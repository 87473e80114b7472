import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from moectl.controller.backbone import Inputs, generate
from moectl.controller.molmoe import INDEX, Molmoe, open_molmoe, prompt
from moectl.controller.molmoe_convert import convert
from moectl.controller.plans import Plan
from moectl.controller.timing import Clock
from moectl.engine.errors import UserError

_SPEC = importlib.util.spec_from_file_location(
    "molmo_reference", Path(__file__).with_name("molmo_reference.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
reference: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["molmo_reference"] = reference
_SPEC.loader.exec_module(reference)

SIZES = reference.Sizes()
CPU = torch.device("cpu")
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("molmoe")
    reference.write_original(folder / "original", SIZES, SIZES.weights())
    convert(folder / "original", folder / "converted")
    return folder / "converted"


@pytest.fixture(scope="module")
def network(folder: Path) -> Molmoe:
    """In double precision, so that what is equal is seen to be."""
    return open_molmoe(folder, CPU, torch.float64)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def picture(width: int = 60, height: int = 45) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def first(network: Molmoe, inputs: Inputs) -> torch.Tensor:
    return network.prefill(inputs, network.encode(inputs))[0]


def plan(*top_k: int, tier: str = "low") -> Plan:
    return Plan(tier, tuple(map(bool, top_k)), tuple(one or 4 for one in top_k))


def test_the_space_is_that_of_the_network(network):
    space = network.space
    assert (space.blocks, space.mixtures, space.default_top_k) == (4, (True,) * 4, 4)
    assert space.top_k_choices == (2, 3, 4)
    assert (space.always_on, space.min_active, space.max_active) == ((0,), 3, 4)
    assert [tier.name for tier in space.tiers] == ["low", "medium", "high"]
    assert (network.vision_dim, network.text_dim) == (24, 16)
    assert network.end_tokens == {0}


@pytest.mark.parametrize(
    ("style", "asked"),
    [
        ("text_vqa", "text_vqa: who?"),
        ("coco_2014_vqa", "vqa2: who?"),
        ("okvqa", "okvqa: who?"),
        ("vqa", "vqa2: who?"),
    ],
)
def test_questions_are_asked_in_the_style_that_the_network_was_taught(style, asked):
    assert prompt("who?", style) == f" User: {asked} Assistant:"


def test_captions_are_asked_for_in_a_sentence_of_ours():
    text = prompt("", "coco_caption")
    assert text == prompt("who?", "coco_caption")
    assert text.startswith(" User: ")
    assert text.endswith("sentence what this image shows. Assistant:")


def test_a_sequence_is_end_mark_image_and_prompt(network):
    inputs = network.prepare(picture(), QUESTION, "okvqa", "medium")
    ids = inputs.tensors["ids"][0].tolist()
    assert inputs.tiling == (2, 3)
    assert inputs.vision_tokens == network.model.config.geometry.tokens((2, 3))
    assert inputs.tokens == len(ids)
    words = prompt(QUESTION, "okvqa")
    assert inputs.text_tokens == 1 + len(words)  # the tokenizer's tokens are bytes
    assert ids[0] == network.tokenizer.eos_token_id
    assert network.tokenizer.convert_ids_to_tokens(ids[1]) == "<im_start>"
    assert network.tokenizer.decode(ids[1 + inputs.vision_tokens :]) == words
    part = network.tokenizer.convert_tokens_to_ids("<im_patch>")
    places = [place for place, one in enumerate(ids) if one == part]
    assert inputs.tensors["places"].tolist() == places
    assert len(places) == len(inputs.tensors["windows"])


def test_the_tier_sets_the_number_of_tokens(network):
    image = picture(400, 300)
    tokens = {}
    for tier in network.space.tiers:
        inputs = network.prepare(image, QUESTION, "vqa", tier.name)
        assert tier.fewest <= inputs.crops <= tier.most
        assert len(inputs.tensors["pixels"]) == 1 + inputs.crops
        tokens[tier.name] = inputs.vision_tokens
    assert tokens["low"] < tokens["medium"] < tokens["high"]


def test_marks_in_a_question_stay_text(network):
    inputs = network.prepare(picture(), "is <im_patch> <|endoftext|> here?", "vqa", "low")
    ids = inputs.tensors["ids"][0, 1 + inputs.vision_tokens :]
    assert ids.min() > 0
    assert ids.max() < SIZES.rows
    assert "is <im_patch> <|endoftext|> here?" in network.tokenizer.decode(ids.tolist())


def test_a_view_that_was_looked_at_is_not_encoded_again(network, monkeypatch):
    image = picture()
    inputs, view = network.prepare(image, QUESTION, "vqa", "medium"), network.look(image)
    assert view.feature.shape == (network.vision_dim,)
    alone = network.encode(inputs)
    crops = []
    look = network.model.look
    monkeypatch.setattr(
        network.model, "look", lambda some: (crops.append(len(some)), look(some))[1]
    )
    torch.testing.assert_close(network.encode(inputs, view), alone)
    assert crops == [inputs.crops]
    other = network.encode(inputs, network.look(picture(45, 60)))
    assert not torch.allclose(other, alone)


def test_the_feature_of_a_question_is_its_mean_embedding(network):
    ids = network.tokenizer("ab", add_special_tokens=False)["input_ids"]
    table = network.model.text.embed_tokens.weight
    torch.testing.assert_close(network.text_feature("ab"), table[ids].mean(0).float())
    long = network.text_feature("a" * 512 + "b" * 90)
    torch.testing.assert_close(long, network.text_feature("a"))
    assert not network.text_feature("").any()


def test_steps_with_a_cache_are_the_whole_sequence_again(network):
    inputs = network.prepare(picture(), QUESTION, "vqa", "low")
    vision, tensors = network.encode(inputs), inputs.tensors
    for some in (network.space.full, plan(4, 2, 0, 3)):
        ids = tensors["ids"]
        with network.apply(some):
            logits, state = network.prefill(inputs, vision)
            for _ in range(5):
                token = int(logits.argmax())
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
                logits = network.step(token, state)
                again = network.model.head(network.model(ids, vision, tensors["places"])[0, -1])
                torch.testing.assert_close(logits, again, rtol=1e-5, atol=1e-5)


def test_a_skipped_block_is_as_if_it_were_not_there(folder, network):
    inputs = network.prepare(picture(), QUESTION, "vqa", "low")
    with network.apply(plan(4, 4, 0, 4)):
        skipped = first(network, inputs)
    shorter = open_molmoe(folder, CPU, torch.float64)
    layers = shorter.model.text.layers
    del layers[2]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    hidden = shorter.model(inputs.tensors["ids"], shorter.encode(inputs), inputs.tensors["places"])
    assert torch.equal(shorter.model.head(hidden[0, -1]), skipped)


def test_a_plan_leaves_no_trace(network):
    inputs = network.prepare(picture(), QUESTION, "vqa", "low")
    before = first(network, inputs)
    with network.apply(plan(4, 2, 0, 3)):
        assert not torch.allclose(first(network, inputs), before)
    assert torch.equal(first(network, inputs), before)
    with network.apply(network.space.full):
        assert torch.equal(first(network, inputs), before)


def test_work_is_what_torch_counts(network):
    inputs = network.prepare(picture(), QUESTION, "vqa", "medium")
    for some in (network.space.full, plan(4, 2, 0, 3, tier="medium")):
        with FlopCounterMode(display=False) as counter, network.apply(some):
            _, state = network.prefill(inputs, network.encode(inputs))
            for token in (5, 6):
                network.step(token, state)
        assert network.gflop(some, inputs, 3) * 1e9 == pytest.approx(counter.get_total_flops())


def test_an_answer_ends_at_the_end_mark(network, monkeypatch):
    inputs = network.prepare(picture(), QUESTION, "vqa", "low")
    full = network.space.full
    answer = generate(network, inputs, full, max_new_tokens=6, clock=Clock(CPU))
    assert len(answer.tokens) == 6
    assert answer.text == network.decode(answer.tokens)
    monkeypatch.setattr(network, "end_tokens", frozenset({answer.tokens[2]}))
    stopped = generate(network, inputs, full, max_new_tokens=6, clock=Clock(CPU))
    assert stopped.tokens == answer.tokens[:3]


def test_the_text_of_an_answer_has_no_marks(network):
    ids = network.tokenizer("two", add_special_tokens=False)["input_ids"]
    assert network.decode((*ids, 0)) == "two"


def test_nothing_of_the_network_is_trained(network):
    assert not any(weight.requires_grad for weight in network.model.parameters())
    assert not network.model.training
    inputs = network.prepare(picture(), QUESTION, "vqa", "low")
    assert not first(network, inputs).requires_grad


def test_half_precision_keeps_the_angles_of_positions_whole(folder, network):
    half = open_molmoe(folder, CPU, torch.bfloat16)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    rotary = half.model.text.rotary_emb.inv_freq
    assert torch.equal(rotary, network.model.text.rotary_emb.inv_freq)
    inputs = half.prepare(picture(), QUESTION, "vqa", "low")
    assert first(half, inputs).isfinite().all()
    assert half.look(picture()).feature.dtype == half.text_feature("a").dtype == torch.float32


@pytest.mark.parametrize(
    ("experts", "used"), [("auto", "eager"), ("eager", "eager"), ("batched_mm", "batched_mm")]
)
def test_experts_run_as_they_are_told(folder, network, experts, used):
    opened = open_molmoe(folder, CPU, torch.float64, experts)
    assert opened.model.text.config._experts_implementation == used
    inputs = network.prepare(picture(30, 30), "", "vqa", "low")
    torch.testing.assert_close(first(opened, inputs), first(network, inputs), rtol=1e-5, atol=1e-5)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def some_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[2]


def damage(folder: Path, kind: str) -> None:
    path = some_file(folder)
    weights = load_file(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "gone":
        path.unlink()
    elif kind == "less":
        save_file({key: weights[key] for key in list(weights)[1:]}, path)
    elif kind == "more":
        save_file({**weights, "strange": torch.zeros(1)}, path)
    else:
        name = min(weights)
        save_file({**weights, name: torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", "cannot be read"),
        ("gone", "cannot be read"),
        ("less", "no weights for text.layers.0"),
        ("more", "strange is not expected there"),
        ("shape", "cannot be read.*size mismatch"),
    ],
)
def test_a_damaged_folder_is_not_opened(copy, kind, said):
    damage(copy, kind)
    with pytest.raises(UserError, match=f"(?s){said}"):
        open_molmoe(copy, CPU, torch.float32)


def test_a_folder_of_another_kind_is_not_opened(copy):
    edit(copy / "config.json", model_type="molmo")
    with pytest.raises(UserError, match="model_type is not moectl_molmoe"):
        open_molmoe(copy, CPU, torch.float32)


def test_a_wrong_size_in_the_configuration_is_named(copy):
    edit(copy / "config.json", top_k=9)
    with pytest.raises(UserError, match=r"config\.json: top_k = 9"):
        open_molmoe(copy, CPU, torch.float32)


def test_an_index_without_files_is_refused(copy):
    (copy / INDEX).write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        open_molmoe(copy, CPU, torch.float32)


def test_a_folder_without_tokenizer_is_not_opened(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        open_molmoe(copy, CPU, torch.float32)


@pytest.mark.parametrize("rows", [258, 280])
def test_a_tokenizer_of_another_network_is_refused(copy, rows):
    """Its marks of an image lie beyond the embedding, or are not there."""
    tokenizer = reference.tokenizer(280)
    if rows == 258:
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        for token in tokenizer["added_tokens"]:
            token["content"] = token["content"].replace("<im_", "<picture_")
        (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        (copy / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    else:
        tokenizer.save_pretrained(copy)
    with pytest.raises(UserError, match="<im_start>: expected one below 268"):
        open_molmoe(copy, CPU, torch.float32)


def test_a_tokenizer_without_end_mark_is_refused(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no eos_token"):
        open_molmoe(copy, CPU, torch.float32)
