"""The table of a mixture and its baselines."""

import csv
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.cli import _run
from moectl.engine import plot
from moectl.taskmoe import eval as evaluation
from moectl.taskmoe import heat_maps, pictures
from moectl.taskmoe.compare import NAMES

Call = Callable[..., tuple[int, str, str]]

TINY = (
    *("--task", "digits", "--width", "4", "--num-epochs", "2", "--quiet"),
    *("--set", "train.batch_size=64", "--set", "train.precision=no"),
)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave pictures empty: what they show has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heat_maps, pictures, plot):
            patch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))
        patch.setattr(evaluation, "sample_predictions", lambda path, _: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def own(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the finished runs that may be written to, where commands look for runs."""
    root = shutil.copytree(finished_runs, tmp_path_factory.mktemp("own") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_RUNS", str(root))
        yield root / "taskmoe"


@pytest.fixture(autouse=True)
def in_own(own: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands look there in the tests themselves too."""
    monkeypatch.setenv("MOECTL_RUNS", str(own.parent))


def compared(folder: Path, *words: str) -> Any:
    """Return the document, and the table under `table`."""
    assert _run(["taskmoe", "compare", "--run", str(folder), "--quiet", *words]) == 0
    place = folder / "evals" / "comparison@best"
    with (place / "comparison.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return {**json.loads((place / "comparison.json").read_text()), "table": table}


def measured(reference: str, out: Path) -> float:
    words = ("eval", "--run", reference, "--quiet", "--out", str(out))
    assert _run(["taskmoe", *words]) == 0
    return float(json.loads((out / "results.json").read_text())["overall_accuracy"])


@pytest.fixture(scope="module")
def document(own: Path) -> Any:
    """The comparison before there is any other training."""
    return compared(own / "t")


@pytest.fixture(scope="module")
def rows(document: Any) -> dict[str, Any]:
    return {row["key"]: row for row in document["rows"]}


@pytest.fixture(scope="module")
def later(own: Path, document: Any) -> Any:
    """The comparison after another seed, random weights and a dense network were trained."""
    trainings = {
        "seed": ("train", "--merged", f"{own}/m", "--seed", "101"),
        "scratch": ("train", "--merged", "none", "--seed", "102"),
        "dense": ("specialist", "--specialist", "0"),
    }
    for name, (command, *words) in trainings.items():
        assert _run(["taskmoe", command, *TINY, *words, "--out", f"{own}/{name}"]) == 0
    return compared(own / "t", "--against", "dense")


def test_rows_stand_in_the_order_of_the_table(document: Any) -> None:
    assert [row["key"] for row in document["rows"]] == list(NAMES)
    assert [row["name"] for row in document["rows"]] == list(NAMES.values())
    assert {row["n"] for row in document["rows"]} == {document["images"]} == {647}


def test_start_and_mixture_are_what_evaluation_finds(
    own: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    assert rows["start"]["accuracy"] == pytest.approx(measured(f"{own}/m", tmp_path / "m"))
    assert rows["mixture"]["accuracy"] == pytest.approx(measured(f"{own}/t", tmp_path / "t"))
    assert rows["start"]["accuracy"] != rows["mixture"]["accuracy"]


def test_the_row_compared_with_differs_by_nothing(document: Any, rows: dict[str, Any]) -> None:
    assert document["against"] == "mixture"
    names = ("difference", "difference_low", "difference_high", "p_value")
    assert [rows["mixture"][name] for name in names] == [0, 0, 0, 1]


def test_differences_are_those_of_the_accuracies(rows: dict[str, Any]) -> None:
    for row in rows.values():
        if row["accuracy"] is not None:
            gain = row["accuracy"] - rows["mixture"]["accuracy"]
            assert row["difference"] == pytest.approx(gain)
            assert row["difference_low"] <= row["difference"] <= row["difference_high"]
            assert row["low"] < row["accuracy"] < row["high"]


def test_knowing_the_owner_is_the_mean_of_the_specialists(
    document: Any, rows: dict[str, Any], runs: Path
) -> None:
    own = document["own_classes"]
    assert [one["specialist"] for one in own] == ["012", "345", "678"]
    for number, one in enumerate(own, 1):
        summary = json.loads((runs / f"s{number}" / "summary.json").read_text())
        assert one["accuracy"] == pytest.approx(100 * summary["best"]["accuracy"], abs=0.5)
        assert one["n"] == summary["best"]["images"]
    mean = sum(one["n"] * one["accuracy"] for one in own) / 647
    assert rows["oracle"]["accuracy"] == pytest.approx(mean)


def test_what_was_not_trained_is_not_measured_and_says_how(rows: dict[str, Any]) -> None:
    empty = {name for name, row in rows.items() if row["accuracy"] is None}
    assert empty == {"scratch", "dense"}
    assert "moectl taskmoe train --merged none" in rows["scratch"]["note"]
    assert "moectl taskmoe specialist --specialist 0" in rows["dense"]["note"]
    assert not any(row["note"] for name, row in rows.items() if name not in empty)


def test_the_table_holds_the_same_rows(document: Any) -> None:
    for row, shown in zip(document["rows"], document["table"], strict=True):
        for name, value in row.items():
            assert shown[name] == ("" if value is None else str(value))


def test_a_row_without_a_run_is_no_reference(
    taskmoe: Call, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path))
    code, out, err = taskmoe("compare", "--run", f"{own}/t", "--against", "dense")
    assert (code, out) == (2, "")
    assert "--against dense: moectl taskmoe specialist --specialist 0" in err


def test_an_unknown_row_is_refused_with_those_there_are(taskmoe: Call, own: Path) -> None:
    code, out, err = taskmoe("compare", "--run", f"{own}/t", "--against", "nothing")
    assert (code, out) == (2, "")
    assert "--against nothing: no such row" in err
    assert ", ".join(NAMES) in err


# With the other trainings


def test_other_trainings_are_found_and_measured(later: Any, own: Path, tmp_path: Path) -> None:
    rows = {row["key"]: row for row in later["rows"]}
    assert rows["scratch"]["accuracy"] == pytest.approx(measured(f"{own}/scratch", tmp_path / "s"))
    summary = json.loads((own / "dense" / "summary.json").read_text())
    assert rows["dense"]["accuracy"] == pytest.approx(100 * summary["best"]["accuracy"])
    assert rows["scratch"]["note"] == f"{own}/scratch"
    assert rows["dense"]["note"] == f"{own}/dense"


def test_another_row_may_be_compared_with(later: Any, rows: dict[str, Any]) -> None:
    found = {row["key"]: row for row in later["rows"]}
    assert later["against"] == "dense"
    assert (found["dense"]["difference"], found["dense"]["p_value"]) == (0, 1)
    gain = found["mixture"]["accuracy"] - found["dense"]["accuracy"]
    assert found["mixture"]["difference"] == pytest.approx(gain)
    assert found["mixture"]["accuracy"] == rows["mixture"]["accuracy"]


def test_a_single_seed_has_no_deviation(document: Any, rows: dict[str, Any]) -> None:
    accuracy = pytest.approx(rows["mixture"]["accuracy"])
    assert document["seeds"] == {"accuracies": {"100": accuracy}, "mean": accuracy, "std": None}


def test_seeds_have_a_mean_and_a_deviation(later: Any, own: Path) -> None:
    found = later["seeds"]
    assert list(found["accuracies"]) == ["100", "101"]
    values = [
        json.loads((own / name / "results.json").read_text())["final_test_accuracy"]
        for name in ("t", "seed")
    ]
    assert list(found["accuracies"].values()) == pytest.approx(values)
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))


def test_specialists_may_be_named(later: Any, own: Path, rows: dict[str, Any]) -> None:
    named = ",".join(f"{own}/s{number}" for number in "123")
    found = {row["key"]: row for row in compared(own / "scratch", "--specialists", named)["rows"]}
    for name in ("oracle", "concatenated_logits", "entropy", "align"):
        assert found[name]["accuracy"] == pytest.approx(rows[name]["accuracy"])
    assert found["mixture"]["accuracy"] == found["scratch"]["accuracy"]
    assert found["start"]["accuracy"] is None
    assert "--merged none has no start" in found["start"]["note"]


def test_specialists_that_are_not_known_are_asked_for(taskmoe: Call, own: Path, later: Any) -> None:
    code, out, err = taskmoe("compare", "--run", f"{own}/scratch")
    assert (code, out) == (2, "")
    assert "the specialists of this mixture are not known" in err
    assert "name them with --specialists" in err
