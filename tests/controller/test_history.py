"""Tallies, histories and the file of executions."""

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.controller import history
from moectl.controller.execution import Execution, Timings
from moectl.controller.history import Executions, Tally, append


def line(**values: Any) -> dict[str, Any]:
    given = {"reward": 0.0, "accuracy": 1.0, "latency": 10, "budget": 20}
    return {**given, "flat": False, "first": True, **values}


def test_deviations_are_those_of_executions_not_of_batches() -> None:
    tally = Tally()
    tally.add([line(reward=1.0), line(reward=2.0, accuracy=0.5)])
    tally.add([line(reward=3.0, latency=30), line(reward=6.0, flat=True, first=False)])
    tally.norms += [1.0, 4.0]
    found = tally.summary(2)
    assert found == pytest.approx(
        {
            "reward_mean": 3, "reward_std": (14 / 3) ** 0.5,
            "accuracy_mean": 0.875, "accuracy_std": 0.25,
            "latency_mean": 15, "latency_std": 10, "budget_violation_rate": 0.25,
            "reward_min": 1, "reward_max": 6, "num_groups": 2, "num_valid_groups": 1.5,
            "num_configs": 3, "frac_zero_std": 0.25, "grad_norm": 2.5,
        }
    )  # fmt: skip


def test_a_single_execution_has_no_deviation() -> None:
    tally = Tally()
    tally.add([line()])
    assert tally.summary(1)["reward_std"] == 0
    assert tally.summary(1)["grad_norm"] == 0


def test_a_tally_goes_on_from_its_state() -> None:
    tally, other = Tally(), Tally()
    tally.add([line(reward=1.0), line(reward=5.0)])
    tally.norms.append(2.0)
    state = json.loads(json.dumps(tally.state_dict()))
    other.load_state_dict(state)
    other.add([line(reward=7.0)])
    assert len(tally.rows) == 2, "the state is a copy"
    tally.add([line(reward=7.0)])
    assert other.summary(1) == tally.summary(1)
    tally.clear()
    assert (tally.rows, tally.norms) == ([], [])


# Histories


def test_rows_after_an_epoch_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    for epoch in (1, 2, 3):
        append(path, {"epoch": epoch, "x": epoch / 3})
    before = path.read_text()
    assert before == f"epoch,x\n1,{1 / 3}\n2,{2 / 3}\n3,1.0\n"
    history.keep_until(path, 3)
    assert path.read_text() == before
    history.keep_until(path, 1)
    assert path.read_text() == f"epoch,x\n1,{1 / 3}\n"
    append(path, {"epoch": 2, "x": 5})
    assert path.read_text() == f"epoch,x\n1,{1 / 3}\n2,5\n"
    history.keep_until(path, 0)
    assert not path.exists()
    history.keep_until(path, 0)


# Executions


def executed(answer: str = "a", accuracy: float = 1.0) -> Execution:
    return Execution(answer, accuracy, Timings(1.5, 2.5, 3.5, 4), 0.1, 2, 3, 4)


def entry(update: int, name: str, answer: str = "a") -> dict[str, Any]:
    place = {"update": update, "sample_id": name, "plan_key": "low/0:8"}
    return {**place, "execution": executed(answer).plain()}


def test_a_torn_last_line_is_left_out_and_then_removed(tmp_path: Path) -> None:
    file = Executions(tmp_path / "e.jsonl")
    file.add([entry(1, "q"), entry(2, "r")])
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + json.dumps(entry(3, "s")).encode()[:40])
    assert [found["sample_id"] for found in file.lines()] == ["q", "r"]
    file.keep_until(3)
    assert file.path.read_bytes() == whole
    file.add([entry(3, "t")])
    assert [found["sample_id"] for found in file.lines()] == ["q", "r", "t"]


def test_lines_after_an_update_are_dropped(tmp_path: Path) -> None:
    file = Executions(tmp_path / "e.jsonl")
    file.keep_until(0)
    assert not file.path.exists()
    assert file.lines() == []
    file.add([entry(update, "q") for update in (1, 1, 2, 3)])
    file.keep_until(2)
    assert [found["update"] for found in file.lines()] == [1, 1, 2]


def test_the_first_of_equal_executions_is_known(tmp_path: Path) -> None:
    file = Executions(tmp_path / "e.jsonl")
    file.add([entry(1, "q", "first"), entry(1, "r"), entry(2, "q", "second")])
    assert file.known() == {
        ("q", "low/0:8"): executed("first"),
        ("r", "low/0:8"): executed(),
    }


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Executions(tmp_path / "e.jsonl").add([{"update": 1, "reward": float("nan")}])
