"""What a controller costs itself."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moectl.controller import overhead as module
from moectl.controller import policy
from moectl.controller.executor import Executor
from moectl.controller.overhead import overhead
from moectl.controller.samples import Sample
from moectl.controller.simulator import Simulator
from moectl.controller.timing import Clock

if TYPE_CHECKING:
    from moectl.controller.llava import LlavaNext


def test_shares_are_of_the_answer_by_the_full_plan(simulated: Callable[..., Any]) -> None:
    questions = Simulator(2, 0, "val")
    found = overhead(questions, simulated())
    assert list(found) == ["controller_ms", "apply_ms", "full_ms", "share", "break_even"]
    full = questions.execute(0, questions.space.full).timings.latency("total")
    own = found["controller_ms"]
    assert found["full_ms"] == full
    assert found["apply_ms"] == 0
    assert 0 < own < full
    assert found["share"] == pytest.approx(own / (own + full))
    assert found["break_even"] == pytest.approx(own / full)


def test_the_choice_itself_is_timed(
    simulated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    own = policy.plans

    def plans(*given: Any) -> Any:
        clock[0] += 0.25
        return own(*given)

    monkeypatch.setattr(module, "plans", plans)
    monkeypatch.setattr(Clock, "now", lambda _: clock[0])
    assert overhead(Simulator(1, 0, "val"), simulated())["controller_ms"] == pytest.approx(250)


def test_a_network_adds_the_question_and_the_plan(
    nano: "LlavaNext",
    picture: Any,
    simulated: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = Sample("a", "a", "How many?", ("1",), "vqa", "vqa", lambda: picture)
    executor = Executor(nano, [sample], Clock(torch.device("cpu")), max_new_tokens=1)
    clock, own = [0.0], nano.text_feature

    def text_feature(question: str) -> Any:
        assert question == "How many?"
        clock[0] += 0.002
        return own(question)

    monkeypatch.setattr(nano, "text_feature", text_feature)
    monkeypatch.setattr(Clock, "now", lambda _: clock[0])
    monkeypatch.setattr(executor, "execute", lambda *_: Simulator(1, 0, "val").execute(0, FULL))
    found = overhead(executor, simulated())
    assert found["controller_ms"] == pytest.approx(2)
    before, enter = nano.apply, nano.apply

    def apply(plan: Any) -> Any:
        clock[0] += 0.003
        return enter(plan)

    monkeypatch.setattr(nano, "apply", apply)
    assert before is not nano.apply
    found = overhead(executor, simulated())
    assert (found["controller_ms"], found["apply_ms"]) == pytest.approx((2, 3))
    assert found["break_even"] == pytest.approx(5 / found["full_ms"])


FULL = Simulator(1, 0, "val").space.full
