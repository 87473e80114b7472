"""The size of a training, before it begins."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.controller import size as module
from moectl.controller.simulator import Simulator
from moectl.controller.size import size
from moectl.engine.errors import UserError

Settings = Callable[..., Any]


def test_updates_executions_and_plans_are_counted(simulated: Settings) -> None:
    found = size(simulated(train__batch_size=4, train__epochs=3))
    assert found["updates per epoch"] == 2
    assert found["updates"] == 6
    assert found["executions per epoch"] == 6 * 3 + 4
    assert found["executions at most"] == 66
    # Tiers x numbers of blocks, the first of which always runs, x experts of the others.
    plans = 3 * sum(math.comb(15, count - 1) * 5 ** (count - 1) for count in range(12, 17))
    assert found["plans"] == plans


def test_time_is_that_of_three_executions(
    simulated: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked = [0.0], []

    def execute(simulator: Simulator, row: int, plan: Any) -> None:
        asked.append((simulator.ids[row], plan.key()))
        clock[0] += (2.0, 90.0, 3.0)[len(asked) - 1]

    monkeypatch.setattr(Simulator, "execute", execute)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    found = size(simulated(train__epochs=100))
    assert found["seconds per execution"] == 3
    assert found["hours of executions at most"] == pytest.approx(2200 * 3 / 3600, rel=1e-2)
    assert [row for row, _ in asked] == ["sim/val/0", "sim/val/1", "sim/val/2"]
    assert len({plan for _, plan in asked}) == 3


def test_nothing_is_opened_that_would_have_to_be_fetched(
    simulated: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for name in ("open_backbone", "open_environments"):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: opened.append(name))
    found = size(simulated(backbone__model="allenai/MolmoE-1B-0924", data__dataset="synth_vqa"))
    assert list(found) == [
        *("updates per epoch", "updates", "executions per epoch", "executions at most"),
    ]
    assert opened == []


def test_plans_of_a_network_at_hand_are_counted_without_its_questions(
    simulated: Settings, monkeypatch: pytest.MonkeyPatch, nano: Any
) -> None:
    monkeypatch.setattr(module, "open_backbone", lambda *_, **__: nano)
    found = size(simulated(backbone__model="nano", data__dataset="synth_vqa,okvqa"))
    assert found["plans"] == nano.space.size == 3 * (5 * 5**4 + 5**5)
    assert "seconds per execution" not in found


def test_a_network_and_questions_at_hand_are_timed(simulated: Settings) -> None:
    values = {"backbone__model": "nano", "data__dataset": "synth_vqa", "data__val_samples": 50}
    found = size(simulated(**values, latency__warmup=0, backbone__max_new_tokens=2))
    assert 0 < found["seconds per execution"] < 60
    assert found["plans"] == 18750


def test_missing_questions_are_said(simulated: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        size(simulated(
            backbone__model="nano", data__dataset="jsonl", data__file=tmp_path / "gone.jsonl"
        ))  # fmt: skip


def test_few_questions_are_timed_more_than_once(
    simulated: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Simulator(1, 0, "val")
    monkeypatch.setattr(module, "open_environments", lambda *_: ({"val": alone}, {}))
    assert "plans" in size(simulated())
