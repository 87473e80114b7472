"""Running means and the file of metrics."""

import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.engine.errors import UserError
from moectl.engine.tracking import (
    Means,
    MetricsFile,
    Trackers,
    loads_or_none,
    mean_over,
)


def test_means_are_weighted_by_share() -> None:
    means = Means()
    means.add(("loss", "x"), torch.tensor([1.0, 10.0]), 0.75)
    means.add(("loss", "x"), torch.tensor([5.0, 30.0]), 0.25)
    assert mean_over([means.state()]) == {"loss": 2.0, "x": 15.0}
    other = Means()
    other.add(("loss", "x"), torch.tensor([6.0, 0.0]), 1.0)
    assert mean_over([means.state(), other.state()]) == {"loss": 4.0, "x": 7.5}
    means.clear()
    assert mean_over([means.state()]) == {}


def test_means_continue_from_their_state() -> None:
    values = torch.rand(6, 2, dtype=torch.float64)
    whole, first, second = Means(), Means(), Means()
    for row in values:
        whole.add(("a", "b"), row, 1.0)
    for row in values[:3]:
        first.add(("a", "b"), row, 1.0)
    second.restore(first.state(), torch.device("cpu"))
    for row in values[3:]:
        second.add(("a", "b"), row, 1.0)
    assert second.state() == whole.state()
    empty = Means()
    empty.restore(Means().state(), torch.device("cpu"))
    assert empty.state() == {"": 0.0}


def row(update: int, **values: Any) -> dict[str, Any]:
    return {"update": update, "epoch": 1, "elapsed_seconds": 0.5, **values}


def points(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every column as (update, value); empty cells are left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in MetricsFile(path).rows():
        for name, text in list(line.items())[3:]:
            if text:
                series.setdefault(name, []).append((int(line["update"]), float(text)))
    return series


def test_a_new_column_joins_the_old_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv")
    file.write(row(1, a=1.5))
    file.write(row(2, b=None, a=0.1 + 0.2))
    assert (tmp_path / "m.csv").read_bytes() == (
        b"update,epoch,elapsed_seconds,a\n1,1,0.5,1.5\n2,1,0.5,0.30000000000000004\n"
    )
    again = MetricsFile(tmp_path / "m.csv")
    again.write(row(3, a=1, b=2))
    assert points(tmp_path / "m.csv") == {
        "a": [(1, 1.5), (2, 0.1 + 0.2), (3, 1.0)],
        "b": [(3, 2.0)],
    }


def test_rows_after_the_checkpoint_are_dropped_with_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    file = MetricsFile(path)
    for number in (1, 2, 3):
        file.write(row(number, a=number))
    before = path.read_bytes()
    file.write(row(4, late=1))
    MetricsFile(path).keep_until(3)
    assert path.read_bytes() == before
    MetricsFile(path).keep_until(-1)
    assert MetricsFile(path).rows() == []


def test_what_never_has_a_value_moves_no_column(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    values = [{"never": None, "a": 1, "late": None}, {"a": 2, "late": 3}]
    for number, own in enumerate(values):
        MetricsFile(path).write(row(number, **own))
    before = path.read_bytes()
    MetricsFile(path).keep_until(0)
    MetricsFile(path).write(row(1, **values[1]))
    assert path.read_bytes() == before
    MetricsFile(path).keep_until(1)
    assert path.read_bytes() == before


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    file = MetricsFile(path)
    file.write(row(1, a=1))
    file.write(row(2, a=2))
    path.write_bytes(path.read_bytes()[:-3])
    assert [line["update"] for line in MetricsFile(path).rows()] == ["1"]
    again = MetricsFile(path)
    again.keep_until(1)
    again.write(row(2, a=2))
    assert points(path) == {"a": [(1, 1.0), (2, 2.0)]}


@pytest.mark.parametrize("content", [b"", b"upd", b"update,epoch,elapsed_seconds,a"])
def test_a_torn_header_is_started_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    file = MetricsFile(path)
    file.keep_until(-1)
    file.write(row(1, a=2))
    assert points(path) == {"a": [(1, 2.0)]}


def test_a_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv")
    file.keep_until(5)
    assert file.rows() == []
    assert not (tmp_path / "m.csv").exists()


def a_run(tmp_path: Path, **train: Any) -> Any:
    wandb = {"wandb": False, "wandb_project": "", "wandb_entity": "", "wandb_name": ""}
    settings = SimpleNamespace(train=SimpleNamespace(**{"tensorboard": False, **wandb, **train}))
    return SimpleNamespace(
        is_main=train.pop("main", True), folder=tmp_path, settings=settings, record={"room": "toy"}
    )


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moectl.engine import tracking

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="wandb is not installed") as refusal:
        Trackers(a_run(tmp_path, wandb=True), 0)
    assert refusal.value.hint == "pip install 'moectl[wandb]'"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("moectl-toy", None, "run-1")),
        (
            {"wandb_project": "p", "wandb_entity": "team", "wandb_name": "first"},
            ("p", "team", "first"),
        ),
    ],
    ids=["defaults", "named"],
)
def test_wandb_goes_where_the_settings_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    expected: tuple[str, str | None, str],
) -> None:
    from accelerate import PartialState

    calls: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []
    own = SimpleNamespace(
        log=lambda values, step, **_: logged.append((values, step)), finish=lambda: None
    )
    wandb = ModuleType("wandb")
    wandb.init = lambda **named: calls.append(named) or own  # type: ignore[attr-defined]
    wandb.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    PartialState(cpu=True)
    folder = tmp_path / "run-1"
    run = a_run(folder, wandb=True, **given)
    run.record["id"] = "toy-12ab"
    trackers = Trackers(run, 0)
    trackers.log({"a": 1.5, "b": None}, 3)
    trackers.close()
    names = ("project", "entity", "name", "id", "dir", "resume")
    assert calls == [dict(zip(names, (*expected, "toy-12ab", str(folder), "allow"), strict=True))]
    assert logged == [({"a": 1.5}, 3)]


def test_tensorboard_gets_the_values_that_there_are(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        trackers = Trackers(a_run(tmp_path, tensorboard=True), 0)
        trackers.log({"a": 1.5, "b": None}, 3)
        trackers.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
    assert events.Tags()["scalars"] == ["a"]
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(3, 1.5)]


def test_other_processes_track_nothing(tmp_path: Path) -> None:
    trackers = Trackers(a_run(tmp_path, tensorboard=True, main=False), 0)
    trackers.log({"a": 1.0}, 1)
    trackers.close()
    assert not (tmp_path / "tensorboard").exists()


def test_torn_json_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert loads_or_none(path) is None
    path.write_text('{"a": 1')
    assert loads_or_none(path) is None
    path.write_text('{"a": 1}')
    assert loads_or_none(path) == {"a": 1}
