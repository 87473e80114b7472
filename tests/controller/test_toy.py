"""Teaching: it sees what is executed later, can be stopped, and leaves what can be opened."""

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moectl.controller import toy
from moectl.controller.data import _synthetic, load, load_test
from moectl.controller.llava import LlavaNext
from moectl.controller.open import FACTS, WEIGHTS, open_backbone
from moectl.controller.plans import Plan
from moectl.controller.samples import Sample
from moectl.engine.errors import Interrupted, UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

VALUES: dict[str, Any] = {
    "data__dataset": ("synth_vqa",),
    "toy__train_samples": 12,
    "toy__val_samples": 4,
    "toy__epochs": 2,
    "toy__batch_size": 2,
    "toy__depth_drop": 0.3,
    "train__log_every": 1,
}


@pytest.fixture(scope="module")
def pictures() -> list[list[Sample]]:
    """Two pictures of noise, the first with two questions, the second with one."""
    from PIL import Image

    source = _synthetic(1, "train")
    noise = np.random.default_rng(0).integers(0, 256, (2, 252, 252, 3), dtype=np.uint8)
    first, second = toy.by_image([next(source) for _ in range(4)])
    return [
        [replace(sample, open=partial(Image.fromarray, pixels)) for sample in samples]
        for pixels, samples in zip(noise, (first, second[1:]), strict=True)
    ]


@pytest.fixture(scope="module")
def backbone(simulated: Callable[..., Any]) -> LlavaNext:
    return toy.build(simulated(**VALUES), torch.device("cpu"))


@pytest.fixture(scope="module")
def teach(open_sim: Callable[..., Any]) -> Callable[..., Path]:
    """Teach in a folder, or go on there."""

    def call(folder: Path, *, stop_after: int = 0, plans: "list[Plan] | None" = None) -> Path:
        own = toy.draw_plan
        with pytest.MonkeyPatch.context() as patch, open_sim(folder, "toy", **VALUES) as run:
            if not stop_after:
                toy.train_toy(run.settings, run)
                return folder
            updates = iter(range(1, 100))

            def drawn(*given: Any) -> Plan:
                if next(updates) == stop_after:
                    run.stop.reason = "asked to"
                plan = own(*given)
                if plans is not None:
                    plans.append(plan)
                return plan

            patch.setattr(toy, "draw_plan", drawn)
            try:
                toy.train_toy(run.settings, run)
            except Interrupted:
                return folder
            raise AssertionError("it went on")

    return call


@pytest.fixture(scope="module")
def taught(teach: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(tmp_path_factory.mktemp("toy") / "run")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("elapsed_seconds", None)
    return rows


# What it sees


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_is_asked_as_it_will_be(
    backbone: LlavaNext, pictures: list[list[Sample]], place: int
) -> None:
    tier, sample = backbone.space.tiers[place].name, pictures[0][1]
    batch = toy.read(backbone, [[sample]], tier)
    later = backbone.prepare(sample.open(), sample.question, sample.dataset, tier)
    answer = batch.targets[0, batch.targets[0] != -100].tolist()

    assert later.tiling == (place + 1, place + 1)
    assert batch.ids[0].tolist() == later.tensors["input_ids"][0].tolist() + answer[:-1]
    assert torch.allclose(batch.pixels, later.tensors["pixel_values"], atol=1e-5)
    assert backbone.decode(tuple(answer[:-1])) == sample.answers[0]
    assert answer[-1] in backbone.end_tokens


def test_questions_about_an_image_are_answered_as_if_alone(
    backbone: LlavaNext, pictures: list[list[Sample]]
) -> None:
    batch = toy.read(backbone, pictures, "medium")
    with torch.no_grad():
        together = toy.answers(backbone.model, batch)
        for row, samples in enumerate(pictures):
            asked = batch.targets[row] != -100
            alone = [toy.read(backbone, [[sample]], "medium") for sample in samples]
            logits = [toy.answers(backbone.model, one)[one.targets != -100] for one in alone]
            wanted = [one.targets[one.targets != -100] for one in alone]

            assert torch.equal(batch.targets[row][asked], torch.cat(wanted))
            assert torch.allclose(together[row][asked], torch.cat(logits), atol=1e-4)


@pytest.mark.parametrize("skipped", [0, 3])
def test_its_logits_are_those_of_an_execution(
    backbone: LlavaNext, pictures: list[list[Sample]], skipped: int
) -> None:
    space, sample = backbone.space, pictures[1][0]
    active = tuple(block != skipped or not skipped for block in range(space.blocks))
    plan = Plan("medium", active, space.uniform(5))
    batch = toy.read(backbone, [[sample]], plan.tier)
    later = backbone.prepare(sample.open(), sample.question, sample.dataset, plan.tier)
    answer = batch.targets[0, batch.targets[0] != -100].tolist()
    with torch.no_grad(), backbone.apply(plan):
        found = toy.answers(backbone.model, batch)[0, -len(answer) :]
        logits, state = backbone.prefill(later, backbone.encode(later))
        expected: list[Tensor] = [logits, *(backbone.step(one, state) for one in answer[:-1])]

    assert torch.allclose(found, torch.stack(expected), atol=1e-4)


def test_right_is_every_word_of_an_answer(
    backbone: LlavaNext, pictures: list[list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [*pictures[0], *pictures[1]]
    active = (True, True, False, True, True, True)
    plan = Plan("low", active, backbone.space.uniform(8))

    def guess(wrong: int) -> Callable[..., "Tensor"]:
        def logits(_: Any, batch: toy.Batch) -> "Tensor":
            assert ["forward" in vars(layer) for layer in backbone.layers] == [
                not runs for runs in active
            ]
            targets = batch.targets.clamp(min=0)
            last = (batch.targets != -100).sum(1) - 1
            if wrong >= 0:  # one word of one answer
                place = int((batch.targets[wrong] != -100).nonzero()[last[wrong]])
                targets[wrong, place] = 9
            return torch.nn.functional.one_hot(targets, 260).float()

        return logits

    for wrong in (-1, 0, 2):
        monkeypatch.setattr(toy, "answers", guess(wrong))
        assert toy.right(backbone, samples, plan) == [row != wrong for row in range(3)]


# What it learns from


def test_its_pictures_are_not_those_of_the_policy(simulated: Callable[..., Any]) -> None:
    settings = simulated(**VALUES)
    own = toy.load_apart(settings)
    policy = load(settings.data, settings.train.seed)
    others = [*policy.train, *policy.val, *load_test(settings.data, settings.train.seed)]
    train, val, used = (
        {sample.image_id for sample in samples} for samples in (own.train, own.val, others)
    )
    chosen = {sample.image_id for sample in policy.val}

    assert (len(own.train), len(own.val)) == (12, 4)
    assert own.facts["samples"] == {"train": 12, "val": 4}
    assert not train & val
    assert not train & used
    assert val <= chosen


def test_a_file_that_the_policy_needs_whole_teaches_nothing(
    simulated: Callable[..., Any], tmp_path: Path, picture: "Image"
) -> None:
    lines = []
    for number in range(6):
        picture.save(tmp_path / f"{number}.png")
        lines.append({"id": number, "image": f"{number}.png", "question": "?", "answers": ["a"]})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        **VALUES, "data__dataset": ("jsonl",), "data__file": file, "data__root": tmp_path,
        "data__train_samples": 2, "data__val_samples": 1, "data__test_samples": 3,
        "toy__val_samples": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="jsonl: no images but those of the policy"):
        toy.load_apart(simulated(**values))


# What is drawn


def test_plans_of_updates_begin_coarse_and_stay_in_the_space(backbone: LlavaNext) -> None:
    space = backbone.space
    early = [toy.draw_plan(space, 0.1, 0.5, random.Random(n)) for n in range(200)]
    late = [toy.draw_plan(space, 0.9, 0.5, random.Random(n)) for n in range(600)]
    for plan in early + late:
        plan.check(space)
    tiers = Counter(plan.tier for plan in late)

    assert {plan.tier for plan in early} == {"low"}
    assert tiers["low"] / 600 == pytest.approx(0.15, abs=0.06)
    assert tiers["medium"] / 600 == pytest.approx(0.5, abs=0.06)
    assert {block for plan in late for block in range(6) if not plan.active[block]} == {
        1, 2, 3, 4, 5,
    }  # fmt: skip
    fewer = [plan for plan in late if set(plan.top_k) != {8}]
    assert len(fewer) / 600 == pytest.approx(0.1, abs=0.04)
    assert {top_k for plan in fewer for top_k in plan.top_k} == {4, 5, 6, 7, 8}
    assert late[7] == toy.draw_plan(space, 0.9, 0.5, random.Random(7))
    never = [toy.draw_plan(space, 0.9, 0.0, random.Random(n)) for n in range(50)]
    assert all(all(plan.active) for plan in never)


def test_a_network_without_experts_has_none_to_leave_out(simulated: Callable[..., Any]) -> None:
    dense = toy.build(simulated(**VALUES, toy__text="dense"), torch.device("cpu"))
    plans = [toy.draw_plan(dense.space, 0.9, 0.3, random.Random(n)) for n in range(40)]
    assert {plan.top_k for plan in plans} == {(0,) * 6}
    names = [name for name, _ in toy.plans_of(dense.space)]
    assert names == ["low", "medium", "high", *(f"without block {n}" for n in range(1, 6))]


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [toy.rate(step / 100) for step in range(101)]
    top = rates.index(max(rates))
    assert rates[0] == 0
    assert top == 5
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_questions_about_an_image_come_together(pictures: list[list[Sample]]) -> None:
    flat = [pictures[0][0], pictures[1][0], pictures[0][1]]
    assert toy.by_image(flat) == pictures


def test_kinds_are_those_of_drawn_questions_or_of_answers(pictures: list[list[Sample]]) -> None:
    def asked(question: str, answer: str) -> Any:
        return SimpleNamespace(question=question, answers=(answer,))

    assert toy.kind_of(pictures[0][0]) == "colour"
    assert toy.kind_of(asked("Which small digit?", "7")) == "small"
    assert toy.kind_of(asked("Is it red?", "yes")) == "yes/no"
    assert toy.kind_of(asked("What is it?", "square")) == "other"


# What it leaves


def test_a_training_leaves_what_can_be_opened(taught: Path, simulated: Callable[..., Any]) -> None:
    opened = open_backbone(str(taught), device="cpu")
    assert isinstance(opened, LlavaNext)
    facts = json.loads((taught / FACTS).read_text())
    before = toy.build(simulated(**VALUES), torch.device("cpu")).model.state_dict()
    moved = [
        name
        for name, value in opened.model.state_dict().items()
        if not torch.equal(value, before[name])
    ]

    assert (facts["size"], facts["text"], facts["seed"]) == ("nano", "olmoe", 42)
    assert any(name.startswith("model.vision_tower") for name in moved)
    assert any("experts" in name for name in moved)
    source = _synthetic(9, "test")
    samples = [next(source) for _ in range(2)]
    assert toy.right(opened, samples, opened.space.full) == [False, False]


def test_a_training_leaves_a_page(taught: Path, parsed: Callable[[Path], Any]) -> None:
    page = parsed(taught / "report.html")
    assert "What plans are worth" in page.words
    assert "without block 1" in page.words
    assert [one["alt"] for one in page.all("img")] == ["toy curves"]


def test_a_training_lowers_the_loss_and_measures_plans(taught: Path) -> None:
    losses = [
        float(row["running/loss"]) for row in table(taught / "metrics.csv") if row["running/loss"]
    ]
    rows = table(taught / toy.TABLE)

    assert losses[-1] < losses[0] - 0.5
    assert [row["plan"] for row in rows] == [
        "low", "medium", "high", "top_k 4", "top_k 5", "top_k 6", "top_k 7",
        *(f"without block {block}" for block in range(1, 6)),
    ]  # fmt: skip
    assert all(0 <= float(row["all"]) <= 1 and "colour" in row for row in rows)
    accuracy = json.loads((taught / "run.json").read_text())["scores"]["accuracy"]
    assert accuracy == {row["plan"]: float(row["all"]) for row in rows}


def test_a_stop_changes_nothing(taught: Path, teach: Callable[..., Path], tmp_path: Path) -> None:
    plans: list[Plan] = []
    folder = teach(tmp_path / "run", stop_after=5, plans=plans)
    assert len({plan.key() for plan in plans}) > 2  # every update has its own
    assert not (folder / toy.TABLE).exists()
    teach(folder)

    for name in ("metrics.csv", toy.TABLE):
        assert table(folder / name) == table(taught / name), name
    for name in (WEIGHTS, FACTS):
        assert (folder / name).read_bytes() == (taught / name).read_bytes(), name


def test_it_runs_in_one_process(simulated: Callable[..., Any]) -> None:
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match="one process"):
        toy.train_toy(simulated(**VALUES), run)
