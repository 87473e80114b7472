"""Qwen3-VL: pixels of a tier, positions, and features of inner layers of the tower."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moectl.controller.qwen_vl import TIERS, QwenVl

if TYPE_CHECKING:
    from PIL.Image import Image


def image(width: int, height: int) -> "Image":
    from PIL import Image

    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", [(20, 20), (64, 64), (640, 480), (90, 400), (33, 31)])
def test_tokens_of_a_tier_hardly_depend_on_the_image(qwen: QwenVl, size: tuple[int, int]) -> None:
    for tier in TIERS:
        inputs = qwen.prepare(image(*size), "what?", "vqa", tier.name)
        wanted = 4 * tier.nominal
        # Both edges are rounded to whole tokens, in the same direction.
        assert wanted / 1.9 <= inputs.vision_tokens <= 1.9 * wanted
        assert inputs.crops == tier.nominal
        _, height, width = inputs.tensors["image_grid_thw"][0].tolist()
        assert inputs.vision_tokens == height * width // 4


def test_real_tiers_stay_apart(qwen: QwenVl) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    edge = 32
    for width, height in [(100, 100), (640, 480), (300, 2000), (4000, 3000), (1000, 990)]:
        tokens = []
        for tier in TIERS:
            pixels = tier.nominal * 144 * edge * edge
            rows, columns = smart_resize(height, width, edge, pixels, pixels)
            tokens.append(rows * columns // edge**2)
            assert abs(tokens[-1] / (144 * tier.nominal) - 1) < 0.2
        assert tokens == sorted(set(tokens))


def test_blocks_that_features_are_added_behind_always_run(qwen: QwenVl) -> None:
    assert qwen.space.always_on == (0, 1)
    assert qwen.space.top_k_choices == (2, 3, 4)


@torch.no_grad()
def test_features_of_inner_layers_reach_the_text_network(qwen: QwenVl, picture: "Image") -> None:
    inputs = qwen.prepare(picture, "what?", "vqa", "low")
    seen = qwen.encode(inputs)
    with_them, _ = qwen.prefill(inputs, seen)
    seen.deepstack_features = [[torch.zeros_like(part)] for (part,) in seen.deepstack_features]
    without, _ = qwen.prefill(inputs, seen)
    assert not torch.allclose(with_them, without)


def test_positions_follow_the_image_s_shape_and_go_on_behind_it(
    qwen: QwenVl, picture: "Image"
) -> None:
    inputs = qwen.prepare(picture, "what?", "vqa", "high")
    positions = inputs.tensors["position_ids"]
    assert positions.shape == (3, 1, inputs.tokens)
    _, state = qwen.prefill(inputs, qwen.encode(inputs))
    assert state.position.shape == (3, 1, 1)
    assert set(state.position.flatten().tolist()) == {int(positions.max()) + 1}
    assert int(positions.max()) + 1 < inputs.tokens
    qwen.step(5, state)
    assert set(state.position.flatten().tolist()) == {int(positions.max()) + 2}


def test_hybrid_attention_keeps_the_first_block_of_each_kind_and_agrees(
    qwen: QwenVl,
    enliven: Callable[[Any], Any],
    picture: "Image",
    uncached_logits: Callable[..., torch.Tensor],
) -> None:
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text, vision = qwen.model.config.text_config, qwen.model.config.vision_config
    shared = ("vocab_size", "hidden_size", "num_key_value_heads", "num_experts_per_tok")
    sizes = {name: getattr(text, name) for name in shared}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen3_5MoeConfig(
        text_config={
            **{**sizes, **linear, "num_experts": 16, "num_attention_heads": 4, "head_dim": 16},
            **{"num_hidden_layers": 8, "moe_intermediate_size": 32},
            "shared_expert_intermediate_size": 32,
            "rope_parameters": {**turns, "partial_rotary_factor": 0.5},
        },
        vision_config={
            name: value
            for name, value in vision.to_dict().items()
            if name not in ("model_type", "deepstack_visual_indexes", "rope_parameters")
        },
        image_token_id=qwen.model.config.image_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enliven(Qwen3_5MoeForConditionalGeneration(config))
    backbone = QwenVl(model, qwen.processor, name="hybrid", instruct=False, crop_tokens=4)
    assert backbone.space.always_on == (0, 3)
    plan = backbone.space.full
    skips = type(plan)("low", tuple(block not in (1, 6) for block in range(8)), plan.top_k)
    inputs = backbone.prepare(picture, "what is it?", "vqa", "low")
    said: list[int] = []
    with backbone.apply(skips):
        logits, state = backbone.prefill(inputs, backbone.encode(inputs))
        for _ in range(4):
            expected = uncached_logits(backbone, inputs, said)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)
            said.append(int(logits.argmax()))
            logits = backbone.step(said[-1], state)
    dense = [block for block in backbone._blocks if block.pair]
    assert len(dense) == 2
