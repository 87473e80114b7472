"""Answers for real: what is computed once, what is timed, and how answers are scored."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moectl.controller.backbone import generate
from moectl.controller.executor import Executor, longest
from moectl.controller.plans import Plan
from moectl.controller.samples import Sample
from moectl.controller.timing import Clock
from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from moectl.controller.llava import LlavaNext

CPU = torch.device("cpu")


@pytest.fixture
def samples(picture: Any) -> list[Sample]:
    """Two questions about two pictures."""
    pictures = (picture, picture.rotate(90, expand=True))
    questions = ("How many?", "What colour is the sky?")

    def sample(n: int) -> Sample:
        answers = ("no", "yes")
        return Sample(
            f"vqa/{n}", f"image/{n}", questions[n], answers, "vqa", "vqa", lambda: pictures[n]
        )

    return [sample(0), sample(1)]


@pytest.fixture
def executor(nano: "LlavaNext", samples: list[Sample]) -> Callable[..., Executor]:
    def call(**options: Any) -> Executor:
        clock = options.pop("clock", Clock(CPU))
        return Executor(nano, samples, clock, **{"max_new_tokens": 3, **options})

    return call


@pytest.fixture
def calls(nano: "LlavaNext", monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each part of the network was asked."""
    counts = dict.fromkeys(("glance", "encode", "prepare", "prefill", "step"), 0)

    def counted(name: str) -> Callable[..., Any]:
        own = getattr(nano, name)

        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return own(*given, **named)

        return call

    for name in counts:
        monkeypatch.setattr(nano, name, counted(name))
    return counts


def plans_of(nano: "LlavaNext") -> list[Plan]:
    """Plans of two tiers."""
    full = nano.space.full
    skipped = replace(full, active=(True, True, True, False, True, True))
    few = replace(full, top_k=nano.space.uniform(4))
    return [full, skipped, few, *(replace(plan, tier="low") for plan in (full, skipped))]


def test_an_image_is_encoded_once_for_each_tier(
    nano: "LlavaNext", executor: Callable[..., Executor], calls: dict[str, int]
) -> None:
    found = executor()
    for plan in [*plans_of(nano), *plans_of(nano)]:
        found.execute(1, plan)
    assert (calls["glance"], calls["encode"], calls["prepare"]) == (1, 2, 2)
    assert calls["prefill"] == 10
    found.execute(0, nano.space.full)
    assert (calls["glance"], calls["encode"]) == (2, 3)


def test_the_view_is_not_encoded_again(
    nano: "LlavaNext", executor: Callable[..., Executor]
) -> None:
    crops: list[int] = []
    tower = nano.model.get_submodule("model.vision_tower")
    hook = tower.register_forward_pre_hook(
        lambda _, given, named: crops.append(len(next(iter((*given, *named.values()))))),
        with_kwargs=True,
    )
    try:
        found = executor().execute(0, nano.space.full)
    finally:
        hook.remove()
    assert crops[0] == 1
    assert sum(crops) == 1 + found.crops


def test_answers_are_those_of_the_network_alone(
    nano: "LlavaNext", samples: list[Sample], executor: Callable[..., Executor]
) -> None:
    found = executor(max_new_tokens=5)
    for row, sample in enumerate(samples):
        for plan in plans_of(nano):
            inputs = nano.prepare(sample.open(), sample.question, "vqa", plan.tier)
            answer = generate(nano, inputs, plan, max_new_tokens=5, clock=Clock(CPU))
            execution = found.execute(row, plan)
            assert execution.answer == answer.text
            assert execution.timings.new_tokens == len(answer.tokens)
            assert execution.gflop == nano.gflop(plan, inputs, len(answer.tokens))
            assert (execution.crops, execution.vision_tokens, execution.text_tokens) == (
                inputs.crops, inputs.vision_tokens, inputs.text_tokens,
            )  # fmt: skip


def test_answers_are_scored_by_those_of_people(
    nano: "LlavaNext", samples: list[Sample], executor: Callable[..., Executor]
) -> None:
    plan = nano.space.full
    answer = executor().execute(0, plan).answer
    assert executor().execute(0, plan).accuracy == 0
    samples[0] = replace(samples[0], answers=(answer,) * 2)
    samples[1] = replace(
        samples[1], answers=("a", executor().execute(1, plan).answer), metric="exact"
    )
    assert executor().execute(0, plan).accuracy == pytest.approx(2 / 3)
    assert executor().execute(1, plan).accuracy == 1


def test_features_are_those_of_whole_images_and_bare_questions(
    nano: "LlavaNext", samples: list[Sample], executor: Callable[..., Executor]
) -> None:
    found = executor().features()
    assert found.vision.shape == (2, nano.vision_dim)
    for row, sample in enumerate(samples):
        assert torch.equal(found.vision[row], nano.look(sample.open()).feature)
        assert torch.equal(found.text[row], nano.text_feature(sample.question))
    assert executor().ids == ["vqa/0", "vqa/1"]


# Lengths


@pytest.mark.parametrize(
    ("dataset", "most"), [("text_vqa", 64), ("coco_caption", 64), ("okvqa", 16), ("vqa", 16)]
)
def test_answers_are_as_long_as_suits_the_data_set(
    nano: "LlavaNext",
    samples: list[Sample],
    executor: Callable[..., Executor],
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    most: int,
) -> None:
    asked: list[int] = []

    def answered(*given: Any, max_new_tokens: int, **named: Any) -> Any:
        asked.append(max_new_tokens)
        return generate(*given, max_new_tokens=1, **named)

    monkeypatch.setattr("moectl.controller.executor.generate", answered)
    samples[0] = replace(samples[0], dataset=dataset)
    executor(max_new_tokens=0).execute(0, nano.space.full)
    executor(max_new_tokens=7).execute(0, nano.space.full)
    assert asked == [most, 7]
    assert longest(dataset) == most


# Times


class Ticks(Clock):
    """A clock that only moves when a part of the network works."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds


@pytest.fixture
def ticks(nano: "LlavaNext", monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """Times in milliseconds: some for the view, 10 and more for the crops, 100 for the prefill."""
    clock = Ticks()
    prefills = iter((100, 400, 130, 500, 120))

    def slow(name: str, cost: Callable[[], float]) -> None:
        own = getattr(nano, name)

        def call(*given: Any) -> Any:
            clock.seconds += cost() / 1000
            return own(*given)

        monkeypatch.setattr(nano, name, call)

    views, crops = cycle((1, 7, 3)), cycle((10, 70, 20))
    slow("overview", lambda: 1e5)  # no work of the network
    slow("glance", lambda: next(views))
    slow("encode", lambda: next(crops))
    slow("prefill", lambda: next(prefills))
    slow("step", lambda: 1000)
    slow("prepare", lambda: 1e6)  # no work of the network
    monkeypatch.setattr(nano, "end_tokens", frozenset())
    return clock


def test_stages_add_up(nano: "LlavaNext", executor: Callable[..., Executor], ticks: Ticks) -> None:
    found = executor(clock=ticks)
    times = found.execute(0, nano.space.full).timings
    stages = (times.vision, times.prefill, times.decode, times.per_token)
    assert stages == pytest.approx((11, 100, 2000, 1000))
    assert times.latency("total") == pytest.approx(2111)
    assert times.latency("ttft") == pytest.approx(111)
    # The view counts in every tier, and in every answer.
    again = found.execute(0, replace(nano.space.full, tier="low")).timings
    assert (again.vision, again.prefill) == pytest.approx((71, 400))


def test_the_view_counts_only_where_it_is_taken_over(
    nano: "LlavaNext",
    executor: Callable[..., Executor],
    ticks: Ticks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nano, "reuses_view", lambda tier: tier == "low")
    found = executor(clock=ticks, max_new_tokens=1)
    times = {
        tier: found.execute(0, replace(nano.space.full, tier=tier)).timings.vision
        for tier in ("medium", "low", "high")
    }
    assert times == pytest.approx({"medium": 10, "low": 71, "high": 20})


def test_the_median_of_repeats_counts(
    nano: "LlavaNext", executor: Callable[..., Executor], ticks: Ticks, calls: dict[str, int]
) -> None:
    found = executor(clock=ticks, repeats=3, max_new_tokens=1).execute(0, nano.space.full)
    assert found.timings.vision == pytest.approx(3 + 20)
    assert found.timings.prefill == pytest.approx(130)
    assert found.timings.decode == 0
    counts = [calls[name] for name in ("prepare", "glance", "encode", "prefill")]
    assert counts == [1, 3, 3, 3]


def test_real_times_are_above_nothing(nano: "LlavaNext", executor: Callable[..., Executor]) -> None:
    times = executor().execute(0, nano.space.full).timings
    assert min(times.vision, times.prefill) > 0


def test_a_warm_up_answers_in_every_tier_for_nothing(
    executor: Callable[..., Executor], calls: dict[str, int]
) -> None:
    found = executor()
    found.warm_up(2)
    assert (calls["glance"], calls["encode"], calls["prefill"]) == (6, 6, 6)
    found.warm_up(0)
    assert calls["glance"] == 6


# Captions


def test_captions_are_compared_with_those_of_all_images(
    nano: "LlavaNext", samples: list[Sample], executor: Callable[..., Executor]
) -> None:
    answers = [executor().execute(row, nano.space.full).answer for row in (0, 1)]
    words = ("a red house", "two dogs in the snow")
    for row in (0, 1):
        samples[row] = replace(
            samples[row], metric="caption", answers=(words[row], answers[row] or "x")
        )
    found = executor().execute(0, nano.space.full)
    assert 0 <= found.accuracy <= 1.5


def test_captions_of_one_image_are_refused(
    samples: list[Sample], executor: Callable[..., Executor]
) -> None:
    samples[0] = replace(samples[0], metric="caption", answers=("a", "b"))
    with pytest.raises(UserError, match="captions of 1 image"):
        executor()
    samples[1] = replace(samples[1], metric="caption", image_id="image/0")
    with pytest.raises(UserError, match="captions of 1 image"):
        executor()
