"""Answers of networks of transformers against transformers' own, with and without a plan."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from moectl.controller import tiny
from moectl.controller.backbone import generate
from moectl.controller.llava import LlavaNext
from moectl.controller.plans import Plan
from moectl.controller.timing import Clock

if TYPE_CHECKING:
    from PIL.Image import Image

ACTIVE = (True, True, False, True, True, True)
CLOCK = Clock(torch.device("cpu"))


def opened(text: tiny.Text, enliven: Callable[[Any], Any], **options: Any) -> LlavaNext:
    model, processor = tiny.build("nano", text)
    return LlavaNext(enliven(model), processor, name="nano", instruct=False, **options)


def plan_of(backbone: LlavaNext) -> Plan:
    top_k = (8, 4, 5, 6, 7, 8) if any(backbone.space.mixtures) else (0,) * 6
    return Plan("low", ACTIVE, top_k)


def test_the_space_is_read_from_the_network(nano: LlavaNext) -> None:
    space = nano.space
    assert (space.blocks, space.default_top_k, space.top_k_choices) == (6, 8, (4, 5, 6, 7, 8))
    assert (space.always_on, space.min_active, space.max_active) == ((0,), 5, 6)
    assert all(space.mixtures)
    assert (nano.vision_dim, nano.text_dim, nano.end_tokens) == (64, 64, {2})


def test_a_dense_network_has_no_experts_to_choose(enliven: Callable[[Any], Any]) -> None:
    space = opened("dense", enliven).space
    assert (space.default_top_k, space.top_k_choices, any(space.mixtures)) == (0, (), False)
    assert space.full.top_k == (0,) * 6


def test_the_network_is_frozen_and_evaluates(nano: LlavaNext) -> None:
    assert not nano.model.training
    assert not any(weight.requires_grad for weight in nano.model.parameters())


@pytest.mark.parametrize("text", ["olmoe", "qwen3_moe", "dense"])
def test_a_full_answer_is_transformers_own(
    text: tiny.Text,
    enliven: Callable[[Any], Any],
    picture: "Image",
    own_answer: Callable[..., tuple[int, ...]],
) -> None:
    backbone = opened(text, enliven)
    inputs = backbone.prepare(picture, "what is it?", "vqa", "low")
    answer = generate(backbone, inputs, backbone.space.full, max_new_tokens=12, clock=CLOCK)
    edges = [[84 * count for count in inputs.tiling]]
    backbone.model.config.image_grid_pinpoints = edges
    assert answer.tokens == own_answer(backbone, inputs, 12)
    assert len(set(answer.tokens)) > 2


@pytest.mark.parametrize("text", ["olmoe", "qwen3_moe", "dense"])
def test_decoding_with_a_cache_is_decoding_without(
    text: tiny.Text,
    enliven: Callable[[Any], Any],
    picture: "Image",
    uncached_logits: Callable[..., torch.Tensor],
) -> None:
    backbone = opened(text, enliven)
    inputs = backbone.prepare(picture, "what is it?", "vqa", "low")
    plan = plan_of(backbone)
    said: list[int] = []
    with backbone.apply(plan):
        logits, state = backbone.prefill(inputs, backbone.encode(inputs))
        for _ in range(6):
            expected = uncached_logits(backbone, inputs, said)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
            assert logits.argmax() == expected.argmax()
            said.append(int(logits.argmax()))
            logits = backbone.step(said[-1], state)
    answer = generate(backbone, inputs, plan, max_new_tokens=6, clock=CLOCK)
    assert answer.tokens == tuple(said)


def test_skipping_is_the_network_without_those_blocks_in_every_step(
    enliven: Callable[[Any], Any], nano: LlavaNext, picture: "Image"
) -> None:
    model, processor = tiny.build("nano")
    text = enliven(model).model.language_model
    text.layers = nn.ModuleList(text.layers[block] for block in range(6) if ACTIVE[block])
    for place, layer in enumerate(text.layers):
        layer.self_attn.layer_idx = place
    text.config.num_hidden_layers = 5
    shorter = LlavaNext(model, processor, name="shorter", instruct=False)
    inputs = nano.prepare(picture, "what is it?", "vqa", "low")
    plan = replace(nano.space.full, tier="low", active=ACTIVE)
    with nano.apply(plan):
        ours, our_state = nano.prefill(inputs, nano.encode(inputs))
        theirs, their_state = shorter.prefill(inputs, shorter.encode(inputs))
        for _ in range(4):
            assert torch.equal(ours, theirs)
            token = int(ours.argmax())
            ours, theirs = nano.step(token, our_state), shorter.step(token, their_state)


def test_a_skipped_block_leaves_nothing_in_the_cache(nano: LlavaNext, picture: "Image") -> None:
    inputs = nano.prepare(picture, "what is it?", "vqa", "low")
    with nano.apply(replace(nano.space.full, tier="low", active=ACTIVE)):
        _, state = nano.prefill(inputs, nano.encode(inputs))
    lengths = [layer.get_seq_length() for layer in state.cache.layers]
    assert lengths == [inputs.tokens * runs for runs in ACTIVE]


def test_an_answer_leaves_the_network_as_it_was(nano: LlavaNext, picture: "Image") -> None:
    inputs = nano.prepare(picture, "what is it?", "vqa", "low")
    vision = nano.encode(inputs)
    before, _ = nano.prefill(inputs, vision)
    plan = Plan("low", ACTIVE, (8, 4, 5, 6, 7, 8))
    generate(nano, inputs, plan, max_new_tokens=3, clock=CLOCK, vision=vision)
    after, _ = nano.prefill(inputs, vision)
    assert torch.equal(before, after)


def test_the_feature_of_a_question_is_the_mean_of_its_embeddings(nano: LlavaNext) -> None:
    table = nano.model.model.language_model.embed_tokens.weight
    ids = nano.processor.tokenizer.convert_tokens_to_ids(["a", "b", "b"])
    feature = nano.text_feature("abb")
    torch.testing.assert_close(feature, (table[ids[0]] + 2 * table[ids[1]]) / 3)
    assert torch.equal(nano.text_feature(""), torch.zeros(64))
    assert torch.equal(nano.text_feature("a" * 512 + "b"), nano.text_feature("a" * 512))


def test_features_may_be_learned_from(nano: LlavaNext, picture: "Image") -> None:
    for feature in (nano.look(picture).feature, nano.text_feature("what?")):
        assert feature.dtype == torch.float32
        head = nn.Linear(64, 1)
        head(feature).backward()
        assert head.weight.grad is not None


@pytest.mark.parametrize(("experts", "expected"), [("auto", "eager"), ("batched_mm", "batched_mm")])
def test_experts_run_as_they_are_told(
    enliven: Callable[[Any], Any], experts: str, expected: str
) -> None:
    text = opened("olmoe", enliven, experts=experts).model.model.language_model
    assert text.config._experts_implementation == expected


def test_experts_run_alike_however_they_run(
    enliven: Callable[[Any], Any], nano: LlavaNext, picture: "Image"
) -> None:
    inputs = nano.prepare(picture, "what is it?", "vqa", "low")
    plan = Plan("low", ACTIVE, (8, 4, 5, 6, 7, 8))
    answers = []
    for backbone in (nano, opened("olmoe", enliven, experts="batched_mm")):
        with backbone.apply(plan):
            answers.append(backbone.prefill(inputs, backbone.encode(inputs))[0])
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-3)


def test_the_prompt_asks_for_what_the_data_set_wants(
    enliven: Callable[[Any], Any], picture: "Image"
) -> None:
    model, processor = tiny.build("nano")
    backbone = LlavaNext(model, processor, name="nano")

    def prompt(question: str, style: str) -> str:
        ids = backbone.prepare(picture, question, style, "low").tensors["input_ids"][0]
        return str(processor.tokenizer.decode(ids)).replace("<image>", "")

    assert prompt("how many?", "vqa") == (
        "<s>\nQ: how many?\nReply with one word or a short phrase.\nA:"
    )
    assert "one short sentence" in prompt("describe it", "coco_caption")
    assert "one short sentence" not in prompt("how many?", "text_vqa")


def test_a_question_that_spells_the_image_s_mark_stays_a_question(
    nano: LlavaNext, picture: "Image"
) -> None:
    marked = nano.prepare(picture, "what is <image>it?", "vqa", "low")
    plain = nano.prepare(picture, "what is it?", "vqa", "low")
    assert torch.equal(marked.tensors["input_ids"], plain.tensors["input_ids"])


def test_special_tokens_are_no_part_of_an_answer(nano: LlavaNext) -> None:
    ids = nano.processor.tokenizer.convert_tokens_to_ids(["t", "w", "o", "</s>"])
    assert nano.decode(tuple(ids)) == "two"
