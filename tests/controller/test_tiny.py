"""The small networks: their size, seeds, tokens and prompt."""

from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

from moectl.controller import tiny
from moectl.controller.apply import routers

if TYPE_CHECKING:
    from PIL.Image import Image


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("name", "millions", "blocks", "experts"), [("tiny", 51.85, 16, 64), ("nano", 0.978, 6, 16)]
)
def test_networks_have_the_size_of_their_name(
    name: tiny.Name, millions: float, blocks: int, experts: int
) -> None:
    model, _ = tiny.build(name)
    layers = model.model.language_model.layers

    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.01
    )
    assert len(layers) == blocks
    assert [vars(router)["top_k"] for layer in layers for router in routers(layer)] == [8] * blocks
    assert layers[0].mlp.experts.down_proj.shape[0] == experts
    assert not model.training


@pytest.mark.parametrize("text", get_args(tiny.Text))
def test_weights_are_those_of_the_seed_alone(text: tiny.Text) -> None:
    torch.manual_seed(1)
    first = weights(tiny.build("nano", text, seed=5)[0])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = weights(tiny.build("nano", text, seed=5)[0])

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = weights(tiny.build("nano", text, seed=6)[0])
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_only_the_dense_network_has_no_experts() -> None:
    counts = {
        text: len(routers(tiny.build("nano", text)[0].model.language_model))
        for text in get_args(tiny.Text)
    }
    assert counts == {"olmoe": 6, "qwen3_moe": 6, "dense": 0}


def test_any_text_is_bytes_and_comes_back() -> None:
    tokenizer = tiny.build("nano")[1].tokenizer
    text = "Größe:  7\n<ok> 日本"
    ids = tokenizer(text)["input_ids"]

    assert len(tokenizer) == 256 + 4
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    marks = (tiny.PAD, tiny.BEGIN, tiny.END, tiny.IMAGE)
    assert tokenizer.convert_tokens_to_ids(list(marks)) == [0, 1, 2, 3]
    assert tokenizer(tiny.END, add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_the_chat_template_is_the_prompt() -> None:
    processor = tiny.build("nano")[1]
    parts: list[Any] = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    chat: list[Any] = [{"role": "user", "content": parts}]

    assert processor.apply_chat_template(chat) == tiny.prompt("Which colour?")
    assert tiny.prompt("Which colour?") == "<image>\nQ: Which colour?\nA:"


def test_tilings_have_no_more_crops_than_allowed() -> None:
    assert tiny.pinpoints(3) == [[84, 84], [84, 168], [168, 84], [84, 252], [252, 84]]
    assert len(tiny.pinpoints(12)) == sum(12 // rows for rows in range(1, 13))


def test_the_processor_asks_for_as_many_tokens_as_the_network_gives(picture: "Image") -> None:
    model, processor = tiny.build("nano")
    read = processor(images=picture, text=tiny.prompt("What?"), return_tensors="pt")
    state = torch.get_rng_state()
    with torch.inference_mode():
        logits = model(**read).logits  # refuses if they do not agree

    assert logits.shape == (1, read["input_ids"].shape[1], 260)
    assert read["pixel_values"].shape[-3:] == (3, tiny.CROP, tiny.CROP)
    assert torch.equal(torch.get_rng_state(), state)
