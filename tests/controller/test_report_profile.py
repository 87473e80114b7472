"""What a report tells of a profile and of a taught network, from their files alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.controller.importance import Removal, write_importance
from moectl.controller.report import report
from moectl.controller.report_profile import profile, toy
from moectl.engine import plot

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep what would be drawn."""
    kept: dict[str, Any] = {}

    def draw(path: Path, *given: Any, **named: Any) -> None:
        kept[path.name] = (*given, named)
        path.write_bytes(PNG)

    for name in ("line_panels", "bar_panels"):
        monkeypatch.setattr(plot, name, draw)
    return kept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "t"
    (folder / "plots").mkdir(parents=True)
    return folder


@pytest.fixture
def tables(sim_tables: Path, tmp_path: Path) -> Path:
    left_out = shutil.ignore_patterns("*.jsonl", "plots", "report.*")
    folder = Path(shutil.copytree(sim_tables, tmp_path / "tables", ignore=left_out))
    (folder / "plots").mkdir()
    return folder


def row(text: str, start: str, number: int = 0) -> list[str]:
    """Return the cells of a table row that begins with a text."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")][1:]


def test_a_profile_has_a_report(
    tables: Path, drawn: dict[str, Any], parsed: Callable[[Path], Any]
) -> None:
    report(tables)
    text, page = (tables / "report.md").read_text(), parsed(tables / "report.html")
    for title in ("Which blocks matter", "Latency by formula", "Grid of plans"):
        assert f"## {title}" in text
        assert title in page.words
    assert set(drawn) == {"importance.png", "grid.png"}
    assert [one["alt"] for one in page.all("img")] == ["grid", "importance"]


def test_every_file_of_a_profile_is_told_as_it_is(tables: Path, drawn: dict[str, Any]) -> None:
    text = "\n\n".join(profile(tables))
    scores = json.loads((tables / "importance.json").read_text())["importance_scores"]
    assert row(text, "1")[1] == f"{scores['1']:.4g}"
    names, panels, _ = drawn["importance.png"]
    assert names == list(scores)
    assert panels["score"][0] is None, "it always runs"
    assert panels["score"][1:] == list(scores.values())[1:]
    fitted = json.loads((tables / "latency.json").read_text())["stages"]["vision"]
    assert row(text, "vision")[0] == f"{fitted['r2']:.3f}"
    assert row(text, "vision", 1) == ["crops", f"{fitted['weights']['crops']:.4g}"]
    plans = json.loads((tables / "lut.json").read_text())["config_table"]
    curves = drawn["grid.png"][0]
    found = [curve for panel in curves.values() for curve in panel.values()]
    shown = [point for curve in found for point in zip(*curve, strict=True)]
    assert sorted(shown) == sorted((one["latency"], one["accuracy"]) for one in plans.values())
    assert all(list(latencies) == sorted(latencies) for latencies, _ in found)


def test_a_budget_begins_a_row_only_where_the_plan_changes(folder: Path) -> None:
    def plan(accuracy: float, latency: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "latency": latency, "num_samples": 9, "latency_std": 0.25}

    lut = {
        "config_table": {"very_low_4_12": plan(0.5, 100.04), "high_8_16": plan(0.75, 111)},
        "lookup_table": {"100": "very_low_4_12", "105": "very_low_4_12", "110": "high_8_16"},
        "metadata": {"unit": "GFLOP", "objective": "ttft"},
    }
    (folder / "lut.json").write_text(json.dumps(lut))
    text = "\n\n".join(profile(folder))
    assert "2 plans on 9 questions each; latency: ttft." in text
    assert "budget from (GFLOP)" in text
    assert row(text, "100") == ["very_low", "4", "12", "50.0", "100.0", "0.2"]
    assert row(text, "110") == ["high", "8", "16", "75.0", "111.0", "0.2"]
    assert "| 105 |" not in text


def test_blocks_are_ranked_and_sets_of_them_listed(folder: Path) -> None:
    beam = [Removal((1,), 0.5, 0.25), Removal((1, 2), 0.75, 0.0)]
    meta = {"method": "kl", "samples": 8, "split": "val", "not_measured": [0]}
    write_importance(
        folder / "importance.json",
        {0: 1.0, 1: 0.1, 2: 0.3},
        {**meta, "spearman_of_halves": None},
        beam,
    )
    text = "\n\n".join(profile(folder))
    assert "Score: divergence of the answer without the block, mean over 8 val questions." in text
    assert "Always run, and not measured: block 0." in text
    assert "Rank correlation" not in text
    assert row(text, "1") == ["3", "0.1"]
    assert row(text, "2") == ["2", "0.3"]
    assert row(text, "1, 2") == ["75.0", "0.0"]
    assert text.index("| 1, 2 |") < text.index("| 1 | 50.0 |"), "what costs least comes first"


def test_the_overhead_is_in_milliseconds_and_percent(folder: Path) -> None:
    found = {"controller_ms": 0.5, "apply_ms": 0.0, "full_ms": 50.0, "share": 0.0099}
    (folder / "overhead.json").write_text(json.dumps(found))
    text = "\n\n".join(profile(folder))
    assert row(text, "controller, ms") == ["0.5"]
    assert row(text, "share of controller and setting in that, percent") == ["0.99"]
    assert "must save" not in text


def test_a_folder_without_tables_tells_nothing(folder: Path, drawn: dict[str, Any]) -> None:
    assert not any([*profile(folder), *toy(folder)])
    (folder / "lut.json").write_text("{torn")
    assert not any(profile(folder))
    assert drawn == {}


def test_a_taught_network_shows_its_plans_and_its_training(
    folder: Path, drawn: dict[str, Any], parsed: Callable[[Path], Any]
) -> None:
    (folder / "vlm.json").write_text("{}")
    (folder / "toy.csv").write_text("plan,all,digit\nlow,0.5,0.25\nwithout block 1,0.125,0\n")
    lines = ["update,epoch,elapsed_seconds,train/loss,val/accuracy,val/low", "1,1,1,3,,"]
    (folder / "metrics.csv").write_text("\n".join([*lines, "2,2,2,1.5,0.5,0.25", ""]))
    report(folder)
    text = (folder / "report.md").read_text()
    assert row(text, "low") == ["50.0", "25.0"]
    assert row(text, "without block 1") == ["12.5", "0.0"]
    panels, _ = drawn["toy_curves.png"]
    assert panels["loss"] == {"training": ([1.0, 2.0], [3.0, 1.5])}
    assert panels["accuracy"]["low"] == ([1.0, 2.0], [None, 0.25])
    assert len(parsed(folder / "report.html").all("img")) == 1


def test_curves_of_a_controller_are_not_those_of_a_toy(folder: Path, drawn: dict[str, Any]) -> None:
    lines = ["update,epoch,elapsed_seconds,train/loss,val/accuracy", "1,1,1,3,0.5", ""]
    (folder / "metrics.csv").write_text("\n".join(lines))
    assert toy(folder) == []
    assert drawn == {}
