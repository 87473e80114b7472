"""How much each block matters, against a direct computation."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moectl.controller.influence import block_influence, divergences

if TYPE_CHECKING:
    from moectl.controller.llava import LlavaNext


@pytest.fixture(scope="module")
def seen(nano: "LlavaNext", picture: Any) -> tuple[Any, Any]:
    inputs = nano.prepare(picture, "How many?", "vqa", nano.space.full.tier)
    return inputs, nano.encode(inputs)


@torch.no_grad()
def hidden_states(nano: "LlavaNext", inputs: Any, vision: Any) -> Any:
    """What transformers itself calls the hidden states: before each block, and after the norm."""
    return nano.model(
        input_ids=inputs.tensors["input_ids"],
        position_ids=inputs.tensors["position_ids"],
        mm_encoder_outputs={"image": vision},
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states


def test_influence_is_how_far_a_block_turns_its_input(
    nano: "LlavaNext", seen: tuple[Any, Any]
) -> None:
    states = hidden_states(nano, *seen)
    found = block_influence(nano, *seen)
    assert len(found) == nano.space.blocks == 6
    for block in range(5):  # what leaves the last block is not among the hidden states
        before, after = (states[block + shift][0].double() for shift in (0, 1))
        cosines = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
        assert found[block] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)
    assert len(set(found)) == 6
    assert all(0 < value < 2 for value in found)


def test_blocks_are_watched_no_longer(
    nano: "LlavaNext", seen: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def watchers() -> list[int]:
        return [len(layer._forward_hooks) for layer in nano.layers]

    before = watchers()
    block_influence(nano, *seen)
    assert watchers() == before
    monkeypatch.setattr(nano, "prefill", lambda *_: watchers()[10])
    with pytest.raises(IndexError):
        block_influence(nano, *seen)
    assert watchers() == before


def test_a_block_that_does_nothing_has_no_influence(
    nano: "LlavaNext", seen: tuple[Any, Any]
) -> None:
    full = nano.space.full
    with nano.apply(replace(full, active=tuple(block != 3 for block in range(6)))):
        found = block_influence(nano, *seen)
    assert found[3] == pytest.approx(0, abs=1e-6)


def test_divergence_is_that_of_the_first_token(nano: "LlavaNext", seen: tuple[Any, Any]) -> None:
    full = nano.space.full
    plans = [
        full,
        *(replace(full, active=tuple(block != out for block in range(6))) for out in (1, 5)),
    ]
    found = divergences(nano, *seen, plans)
    logits = []
    for plan in plans:
        with nano.apply(plan), torch.no_grad():
            logits.append(nano.prefill(*seen)[0].double())
    whole = logits[0].softmax(0)
    expected = [float((whole * (whole.log() - less.log_softmax(0))).sum()) for less in logits]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert min(found[1:]) > 1e-3
