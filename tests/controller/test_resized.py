"""Networks that see an image at the resolution of a tier: both families alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moectl.controller.backbone import generate
from moectl.controller.timing import Clock

if TYPE_CHECKING:
    from PIL.Image import Image

    from moectl.controller.resized import Resized

CLOCK = Clock(torch.device("cpu"))
TIERS = ["low", "medium", "high"]


@pytest.fixture(params=["qwen", "idefics", "smol"])
def backbone(request: pytest.FixtureRequest) -> "Resized":
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("tier", TIERS)
def test_a_full_answer_is_transformers_own(
    backbone: "Resized", picture: "Image", tier: str, own_answer: Callable[..., tuple[int, ...]]
) -> None:
    inputs = backbone.prepare(picture, "what is it?", "vqa", tier)
    answer = generate(backbone, inputs, backbone.space.full, max_new_tokens=10, clock=CLOCK)
    assert answer.tokens == own_answer(backbone, inputs, 10)
    assert len(set(answer.tokens)) > 2


def test_decoding_with_a_cache_is_decoding_without(
    backbone: "Resized", picture: "Image", uncached_logits: Callable[..., torch.Tensor]
) -> None:
    inputs = backbone.prepare(picture, "what is it?", "vqa", "medium")
    space = backbone.space
    top_k = space.uniform(space.top_k_choices[0]) if space.top_k_choices else (0,) * 6
    plan = replace(space.full, active=(True, True, True, False, True, True), top_k=top_k)
    said: list[int] = []
    with backbone.apply(plan):
        logits, state = backbone.prefill(inputs, backbone.encode(inputs))
        for _ in range(5):
            expected = uncached_logits(backbone, inputs, said)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
            said.append(int(logits.argmax()))
            logits = backbone.step(said[-1], state)
    assert len(set(said)) > 1


def test_a_finer_tier_has_more_tokens_and_costs_more(backbone: "Resized", picture: "Image") -> None:
    inputs = [backbone.prepare(picture, "what?", "vqa", tier) for tier in TIERS]
    tokens = [each.vision_tokens for each in inputs]
    work = [backbone.gflop(backbone.space.full, each, 4) for each in inputs]
    assert tokens == sorted(set(tokens))
    assert work == sorted(set(work))
    for each, tier in zip(inputs, backbone.space.tiers, strict=True):
        assert tier.fewest <= each.crops <= tier.most
        assert sum(map(len, backbone.encode(each).pooler_output)) == each.vision_tokens


def test_the_view_of_the_coarsest_tier_is_taken_over_bit_by_bit(
    backbone: "Resized", picture: "Image"
) -> None:
    view = backbone.look(picture)
    inputs = {tier: backbone.prepare(picture, "what?", "vqa", tier) for tier in TIERS}
    assert backbone.encode(inputs["low"], view) is view.hidden[1]
    for each_tier, each in inputs.items():
        reused, again = backbone.encode(each, view), backbone.encode(each)
        assert all(map(torch.equal, reused.pooler_output, again.pooler_output))
        assert backbone.reuses_view(each_tier) == (reused is view.hidden[1])
    assert view.feature.shape == (backbone.vision_dim,)
    torch.testing.assert_close(
        view.feature, view.hidden[1].last_hidden_state.flatten(0, -2).mean(0)
    )


def test_the_view_of_another_image_is_not_taken_over(backbone: "Resized", picture: "Image") -> None:
    other = backbone.look(picture.transpose(0))
    inputs = backbone.prepare(picture, "what?", "vqa", "low")
    assert backbone.encode(inputs, other) is not other.hidden[1]


@pytest.mark.parametrize("tier", TIERS)
def test_the_count_of_an_answer_is_torch_s_own(
    backbone: "Resized", picture: "Image", tier: str
) -> None:
    inputs = backbone.prepare(picture, "what?", "vqa", tier)
    plan = replace(backbone.space.full, active=(True, True, True, True, False, True))
    with FlopCounterMode(display=False) as counter:
        answer = generate(backbone, inputs, plan, max_new_tokens=3, clock=CLOCK)
    work = backbone.gflop(plan, inputs, len(answer.tokens)) * 1e9
    assert work == pytest.approx(counter.get_total_flops(), rel=1e-12)
