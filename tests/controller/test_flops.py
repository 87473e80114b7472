"""Counted work against torch's own counter and against counting by hand."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moectl.controller import flops, tiny
from moectl.controller.backbone import generate
from moectl.controller.llava import LlavaNext
from moectl.controller.plans import Plan
from moectl.controller.timing import Clock

if TYPE_CHECKING:
    from PIL.Image import Image

BLOCK = flops.Block(dense=100, expert=7, pair=3)


def test_text_by_hand() -> None:
    # Two blocks run, with 2 and 3 experts; 5 tokens are read, then 2 more one by one.
    plan = Plan("low", (True, False, True), (2, 9, 3))
    pairs = 5 * 5 + 6 + 7
    tokens = 7 * (100 + 2 * 7) + 7 * (100 + 3 * 7)
    assert flops.text([BLOCK] * 3, 11, plan, 5, 3) == tokens + 2 * pairs * 3 + 3 * 11


def test_an_answer_of_one_token_is_the_prefill() -> None:
    plan = Plan("low", (True,), (0,))
    assert flops.text([BLOCK], 11, plan, 5, 1) == 5 * 100 + 25 * 3 + 11


def test_a_layer_counts_two_per_weight_and_tables_and_vectors_nothing() -> None:
    module = nn.ModuleList([nn.Linear(3, 4), nn.Embedding(9, 3), nn.LayerNorm(3)])
    assert flops.linear(module) == 24
    assert flops.linear(module[1]) == 0


def test_experts_count_one_of_a_stack() -> None:
    module = nn.Module()
    module.register_parameter("up", nn.Parameter(torch.zeros(5, 2, 3)))
    module.register_parameter("kernel", nn.Parameter(torch.zeros(4, 1, 3)))
    module.register_parameter("gate", nn.Parameter(torch.zeros(5, 3)))
    assert flops.expert(module, 5) == 12
    assert flops.linear(module) == 30
    assert flops.convolution(nn.Conv2d(3, 4, 2)) == 96


def test_a_tower_attends_in_every_layer() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert flops.tower(layers, width=2, tokens=3) == 3 * 16 + 2 * 9 * 8


@pytest.fixture(params=["olmoe", "qwen3_moe", "dense"])
def backbone(request: pytest.FixtureRequest) -> LlavaNext:
    model, processor = tiny.build("nano", request.param)
    backbone = LlavaNext(model, processor, name="nano", instruct=False)
    backbone.end_tokens = frozenset()
    return backbone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_count_of_an_answer_is_torch_s_own(
    backbone: LlavaNext, picture: "Image", attention: str
) -> None:
    backbone.model.set_attn_implementation(attention)
    inputs = backbone.prepare(picture, "what?", "vqa", "low")
    full = backbone.space.full
    top_k = (8, 4, 5, 6, 7, 8) if any(full.top_k) else full.top_k
    plan = replace(full, tier="low", active=(True, True, False, True, True, True), top_k=top_k)
    for new_tokens in (1, 4):
        with FlopCounterMode(display=False) as counter:
            generate(
                backbone, inputs, plan, max_new_tokens=new_tokens, clock=Clock(backbone.device)
            )
        assert backbone.gflop(plan, inputs, new_tokens) * 1e9 == counter.get_total_flops()


def test_every_knob_costs_work(nano: LlavaNext, picture: "Image") -> None:
    full = nano.space.full
    inputs = {
        tier.name: nano.prepare(picture, "what?", "vqa", tier.name) for tier in nano.space.tiers
    }
    high = inputs["high"]
    assert [nano.gflop(full, inputs[tier], 3) for tier in ("low", "medium", "high")] == sorted(
        {nano.gflop(full, inputs[tier], 3) for tier in inputs}
    )
    widths = [replace(full, top_k=nano.space.uniform(k)) for k in nano.space.top_k_choices]
    work = [nano.gflop(plan, high, 3) for plan in widths]
    assert work == sorted(set(work))
    for block in range(1, 6):
        fewer = replace(full, active=tuple(other != block for other in range(6)))
        narrower = replace(full, top_k=tuple(7 if other == block else 8 for other in range(6)))
        assert nano.gflop(fewer, high, 3) < nano.gflop(narrower, high, 3) < work[-1]
    assert nano.gflop(full, high, 2) < nano.gflop(full, high, 3)
