"""Tilings of LLaVA-NeXT, the tokens that come of them, and views that are not encoded twice."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moectl.controller import tiny
from moectl.controller.llava import TIERS, LlavaNext

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 6
"""Patches along the edge of a crop."""


def image(width: int, height: int) -> "Image":
    from PIL import Image

    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def predicted(size: tuple[int, int], tiling: tuple[int, int]) -> int:
    """Tokens of an image: the whole, and the crops without padding, with a mark behind each row."""
    (width, height), (rows, columns) = size, (SIDE * count for count in tiling)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    return SIDE * SIDE + rows * (columns + 1)


SIZES = [(84, 84), (260, 150), (150, 260), (500, 100), (90, 700), (401, 299), (1000, 30)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_tokens_are_as_predicted_and_crops_stay_in_the_tier(
    nano: LlavaNext, size: tuple[int, int], tier: Any
) -> None:
    inputs = nano.prepare(image(*size), "what?", "vqa", tier.name)
    assert tier.fewest <= inputs.crops <= tier.most
    assert inputs.vision_tokens == predicted(size, inputs.tiling)
    assert inputs.tokens == inputs.tensors["input_ids"].shape[1]
    assert inputs.text_tokens == len("\nQ: what?\nA:") + 1
    assert inputs.tensors["pixel_values"].shape[1] == inputs.crops + 1
    seen = nano.encode(inputs).pooler_output
    assert sum(len(part) for part in seen) == inputs.vision_tokens


def test_the_tiling_has_the_shape_of_the_image(nano: LlavaNext) -> None:
    chosen = {
        size: [nano.prepare(image(*size), "", "vqa", tier.name).tiling for tier in TIERS]
        for size in ((200, 200), (400, 200), (200, 400))
    }
    assert chosen[200, 200] == [(1, 1), (2, 2), (3, 3)]
    assert chosen[400, 200] == [(1, 2), (2, 3), (2, 4)]
    assert chosen[200, 400] == [(2, 1), (3, 2), (4, 2)]
    # 2 x 3 mismatches ln(4/3), 1 x 4 and 2 x 2 mismatch ln 2.
    assert math.log(4 / 3) < math.log(2)


def test_no_tiling_outlives_the_call(nano: LlavaNext, picture: "Image") -> None:
    before = tiny.pinpoints(12)
    holders = (nano.model.config, nano.processor.image_processor)
    view = nano.look(picture)
    inputs = nano.prepare(picture, "what?", "vqa", "medium")
    nano.encode(inputs, view)
    assert all(holder.image_grid_pinpoints == before for holder in holders)
    with pytest.raises(StopIteration):
        nano.prepare(picture, "what?", "vqa", "huge")
    with pytest.raises(RuntimeError), nano._pinpoint(1, 1):
        raise RuntimeError
    assert all(holder.image_grid_pinpoints == before for holder in holders)


def test_tiers_may_be_prepared_before_they_are_encoded(nano: LlavaNext, picture: "Image") -> None:
    inputs = [nano.prepare(picture, "what?", "vqa", tier.name) for tier in TIERS]
    for each in reversed(inputs):
        assert len(nano.encode(each).pooler_output[0]) == each.vision_tokens


@pytest.mark.parametrize("tier", ["low", "medium", "high"])
@pytest.mark.parametrize("size", [(84, 84), (260, 150), (90, 700)])
def test_a_view_seen_before_gives_the_same_bits(
    nano: LlavaNext, size: tuple[int, int], tier: str
) -> None:
    inputs = nano.prepare(image(*size), "what?", "vqa", tier)
    view = nano.look(image(*size))
    (again,), (reused,) = (nano.encode(inputs, given).pooler_output for given in (None, view))
    assert torch.equal(again, reused)


def test_a_view_seen_before_is_not_encoded_again(nano: LlavaNext, picture: "Image") -> None:
    inputs, view = nano.prepare(picture, "what?", "vqa", "medium"), nano.look(picture)
    crops: list[int] = []
    tower = nano.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda _, given: crops.append(len(given[0])))
    nano.encode(inputs, view)
    nano.encode(inputs)
    handle.remove()
    assert crops == [6, 7]


def test_what_is_seen_is_what_transformers_sees(nano: LlavaNext, picture: "Image") -> None:
    inputs = nano.prepare(picture, "what?", "vqa", "medium")
    with nano._pinpoint(*inputs.tiling), torch.no_grad():
        expected = nano.model.get_image_features(
            inputs.tensors["pixel_values"], inputs.tensors["image_sizes"], return_dict=True
        )
    assert torch.equal(nano.encode(inputs).pooler_output[0], expected.pooler_output[0])


@torch.no_grad()
def test_the_feature_is_the_mean_over_the_patches_of_the_whole_image(
    nano: LlavaNext, picture: "Image"
) -> None:
    inputs = nano.prepare(picture, "what?", "vqa", "low")
    whole = inputs.tensors["pixel_values"][0, :1]
    states = nano.model.model.vision_tower(whole, output_hidden_states=True).hidden_states
    feature = nano.look(picture).feature
    torch.testing.assert_close(feature, states[-2][0, 1:].mean(0))
    assert feature.shape == (nano.vision_dim,)


def test_several_layers_of_the_tower_may_be_seen(
    enliven: Callable[[Any], Any], picture: "Image"
) -> None:
    from transformers import LlavaNextForConditionalGeneration

    model, processor = tiny.build("nano")
    model.config.vision_feature_layer = [-2, -4]
    model.config.vision_feature_select_strategy = "full"
    processor.vision_feature_select_strategy = "full"
    model = LlavaNextForConditionalGeneration(model.config)
    backbone = LlavaNext(enliven(model), processor, name="two", instruct=False)
    view = backbone.look(picture)
    assert backbone.vision_dim == len(view.feature) == 128
    assert view.hidden.shape == (1, SIDE * SIDE + 1, 128)
