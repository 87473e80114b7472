# ruff: noqa: ARG002 - the network of this file does not care what it is asked
"""Greedy answers of a network that says what it is told to say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.controller.backbone import Backbone, Inputs, View, generate
from moectl.controller.plans import Plan, Space, Tier
from moectl.controller.timing import Clock

END = 9
INPUTS = Inputs({}, (2, 3), 40, 7)


class Scripted(Backbone):
    """Says the tokens of a script and writes down what is asked of it."""

    def __init__(self, *script: int) -> None:
        self.name, self.device = "scripted", torch.device("cpu")
        self.space = Space(2, (False,) * 2, 0, (), (0,), 1, 2, (Tier("low", 1, 3, 3),))
        self.vision_dim = self.text_dim = 1
        self.end_tokens = frozenset({END})
        self.script, self.calls = script, list[Any]()
        self.plan: Plan | None = None

    def prepare(self, image: Any, question: str, style: str, tier: str) -> Inputs:
        return INPUTS

    def overview(self, image: Any) -> Tensor:
        return torch.full((2,), float(image))

    def glance(self, pixels: Tensor) -> View:
        return View(pixels + 1, None)

    def text_feature(self, question: str) -> Tensor:
        return torch.zeros(1)

    def encode(self, inputs: Inputs, view: View | None = None) -> str:
        self.calls.append("encode")
        return "seen"

    @contextmanager
    def apply(self, plan: Plan) -> Iterator[None]:
        self.plan = plan
        yield
        self.plan = None

    def prefill(self, inputs: Inputs, vision: Any) -> tuple[Tensor, dict[str, int]]:
        self.calls.append(("prefill", vision, self.plan, torch.is_inference_mode_enabled()))
        return self.logits(0), {"said": 1}

    def step(self, token: int, state: dict[str, int]) -> Tensor:
        self.calls.append(("step", token, self.plan))
        state["said"] += 1
        return self.logits(state["said"] - 1)

    def logits(self, place: int) -> Tensor:
        return torch.eye(10)[self.script[place]]

    def gflop(self, plan: Plan, inputs: Inputs, new_tokens: int) -> float:
        return 0.0

    def decode(self, tokens: tuple[int, ...]) -> str:
        return " ".join(map(str, tokens))


class Ticking(Clock):
    """Every reading is a second after the one before."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.second = 0

    def now(self) -> float:
        self.second += 1
        return self.second


def answer(backbone: Scripted, most: int = 8, **given: Any) -> Any:
    plan = backbone.space.full
    return generate(backbone, INPUTS, plan, max_new_tokens=most, clock=Ticking(), **given)


def test_an_answer_ends_with_the_end_mark() -> None:
    backbone = Scripted(3, 4, END, 5)
    said = answer(backbone)
    assert said.tokens == (3, 4, END)
    assert said.text == "3 4 9"
    assert said.timings.new_tokens == 3
    assert [call[1] for call in backbone.calls if call[0] == "step"] == [3, 4]


def test_an_answer_may_end_at_once() -> None:
    backbone = Scripted(END, 5)
    assert answer(backbone).tokens == (END,)
    assert not [call for call in backbone.calls if call[0] == "step"]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_an_answer_is_cut(most: int) -> None:
    backbone = Scripted(3, 4, 5, 6)
    assert answer(backbone, most).tokens == (3, 4, 5)[:most]
    assert len([call for call in backbone.calls if call[0] == "step"]) == most - 1


def test_the_whole_answer_runs_by_the_plan_without_gradients() -> None:
    backbone = Scripted(3, 4, END)
    answer(backbone)
    plan = backbone.space.full
    assert backbone.calls == [
        "encode",
        ("prefill", "seen", plan, True),
        ("step", 3, plan),
        ("step", 4, plan),
    ]
    assert backbone.plan is None


def test_what_was_seen_before_is_not_encoded_again() -> None:
    backbone = Scripted(3, END)
    said = answer(backbone, vision="given", vision_ms=12.5)
    assert backbone.calls[0][:2] == ("prefill", "given")
    assert said.timings.vision == 12.5


def test_each_stage_is_timed_by_itself() -> None:
    timings = answer(Scripted(3, END)).timings
    assert (timings.vision, timings.prefill, timings.decode) == (1000, 1000, 1000)
    assert timings.controller == 0


def test_an_answer_of_one_token_takes_no_time_to_decode() -> None:
    assert answer(Scripted(END)).timings.decode == 0.0
    assert answer(Scripted(3, 4), 1).timings.decode == 0.0


def test_a_look_is_a_glance_at_the_overview() -> None:
    backbone = Scripted(END)
    image: Any = 4
    assert backbone.look(image).feature.tolist() == [5, 5]
    assert backbone.reuses_view("low")


def test_inputs_count_crops_and_tokens() -> None:
    assert INPUTS.crops == 6
    assert INPUTS.tokens == 47
