"""Idefics3 and SmolVLM: crops along the longest edge."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

from moectl.controller.smolvlm import SmolVlm

if TYPE_CHECKING:
    from PIL.Image import Image


def image(width: int, height: int) -> "Image":
    from PIL import Image

    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(params=["idefics", "smol"])
def backbone(request: pytest.FixtureRequest) -> SmolVlm:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("size", "medium", "high"),
    [
        ((200, 200), (2, 2), (4, 4)),
        ((400, 300), (2, 2), (3, 4)),
        ((100, 400), (2, 1), (4, 1)),
        ((20, 10), (1, 2), (2, 4)),
    ],
)
def test_crops_lie_along_the_longest_edge(
    backbone: SmolVlm, size: tuple[int, int], medium: tuple[int, int], high: tuple[int, int]
) -> None:
    for tier, tiling in (("low", (0, 0)), ("medium", medium), ("high", high)):
        inputs = backbone.prepare(image(*size), "what?", "vqa", tier)
        assert inputs.tiling == tiling
        assert inputs.tensors["pixel_values"].shape[1] == inputs.crops + 1
        assert inputs.vision_tokens == 4 * (inputs.crops + 1)


def test_the_finest_tier_is_what_the_network_was_made_for(backbone: SmolVlm) -> None:
    picture = image(400, 300)
    own = backbone.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    inputs = backbone.prepare(picture, "what?", "vqa", backbone.space.full.tier)
    assert (inputs.tensors["pixel_values"] == own).all()


def test_a_plan_sets_tier_and_blocks_alone(backbone: SmolVlm) -> None:
    space = backbone.space
    assert (space.top_k_choices, any(space.mixtures), space.always_on) == ((), False, (0,))
    assert [tier.nominal for tier in space.tiers] == [0, 4, 12]
    assert space.size == 3 * (5 + 1)
