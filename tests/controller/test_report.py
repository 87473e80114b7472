"""Reports: what stands in them, and that nothing missing or torn stops them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moectl.controller import report as module
from moectl.controller.report import (
    draw_evaluation,
    evaluation_text,
    report,
    report_again,
    verdict,
)

HISTORY = "epoch,reward_mean,accuracy_mean,latency_mean,budget_violation_rate"


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Draw nothing, but keep what would be drawn."""
    kept: dict[str, Any] = {}

    def curves(path: Path, *rows: Any) -> None:
        kept[path.name] = rows
        path.write_bytes(b"")

    def pictures(folder: Path, found: Any) -> None:
        kept[folder.name] = found
        (folder / "a_knobs.png").write_bytes(b"")

    monkeypatch.setattr(module, "training_curves", curves)
    monkeypatch.setattr(module, "evaluation_pictures", pictures)
    return kept


def gain(difference: float, low: float, high: float) -> dict[str, float]:
    return {"difference": difference, "low": low, "high": high, "p_value": 0.5}


def compared(against: str, timely: dict[str, float], every: dict[str, float]) -> dict[str, Any]:
    values = {"accuracy": every, "accuracy_in_time": timely}
    return {"against": against, "latency_budget": None, **values}


def metrics(accuracy: float, late: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "accuracy_in_time": accuracy / 2,
        "avg_latency_ms": 123.456,
        "budget_violation_rate": late,
    }


def document(**values: Any) -> dict[str, Any]:
    policies = {"controller": (0.75, 0.125), "lut": (0.5, 0.25), "random": (0.25, 1.0)}
    results = [
        {"policy": name, "latency_budget": budget, "metrics": metrics(*pair)}
        for name, pair in policies.items()
        for budget in (100.0, 200.5)
    ]
    summary = {name: {"hypervolume": 12.3456, "budget_area": 0.625} for name in policies}
    part = {
        "num_samples": 40,
        "results": results,
        "comparisons": [
            compared("lut", gain(0.05, 0.01, 0.09), gain(0.25, 0.2, 0.3)),
            compared("random", gain(0.5, 0.4, 0.6), gain(0.5, 0.4, 0.6)),
            {"against": "lut", "latency_budget": 100.0},
        ],
        "pareto": {"summary": {"corner": 326.5, **summary}},
    }
    return {
        "weights": {"file": "best_model.pt", "sha256": "0", "epoch": 7},
        "model": "nano",
        "device": "x86_64",
        "split": "test",
        "unit": "ms",
        "latency": {"source": "measured", "objective": "ttft", "clock": "cpu", "repeats": 5},
        "full_latency": 326.5,
        "decide_ms": 0.345,
        "controller_ms": 1.5,
        "policies": list(policies),
        "budgets": [100.0, 200.5],
        "datasets": {"easy_vqa": part},
        **values,
    }


def row(text: str, start: str, number: int = 0) -> list[str]:
    """Return the cells of a table row that begins with a text."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")][1:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a training, as far as a report reads it."""
    folder = tmp_path / "t"
    folder.mkdir()
    world = {"budgets": [170.0, 380.0], "unit": "ms"}
    (folder / "run.json").write_text(json.dumps({"seed": 42, "world": world}))
    (folder / "settings.toml").write_text("[grpo]\ngroup_size = 7\n")
    lines = ["1,-0.5,0.5,200.25,0.5", "2,0.25,0.75,180.5,0.125", "3,0.125,0.7,170,0.25"]
    (folder / "validation_history.csv").write_text("\n".join([HISTORY, *lines, ""]))
    lines = [f"{epoch},0.1,0.625,190,0.375" for epoch in (1, 2, 3)]
    (folder / "training_history.csv").write_text("\n".join([HISTORY, *lines, ""]))
    return folder


def written(folder: Path) -> str:
    report(folder)
    return (folder / "report.md").read_text()


def keep(folder: Path, name: str, found: Any) -> None:
    place = folder / "evals" / name
    place.mkdir(parents=True)
    (place / "eval.json").write_text(json.dumps(found))
    draw_evaluation(place, found)


# Runs


def test_the_training_is_summed_up(folder: Path, drawn: dict[str, Any]) -> None:
    text = written(folder)
    assert text.startswith("# t\n")
    assert row(text, "`grpo.group_size`")[:2] == ["7", "5"]
    assert "Budgets from 170 to 380 ms." in text
    assert row(text, "validation, epoch 1") == ["-0.5000", "50.0 %", "200.2", "50.0 %"]
    assert row(text, "validation, epoch 2, the best") == ["0.2500", "75.0 %", "180.5", "12.5 %"]
    assert row(text, "validation, epoch 3") == ["0.1250", "70.0 %", "170", "25.0 %"]
    assert row(text, "training, epoch 3") == ["0.1000", "62.5 %", "190", "37.5 %"]
    training, validation = drawn["training_curves.png"]
    assert [line["epoch"] for line in training] == ["1", "2", "3"]
    assert validation[1]["reward_mean"] == "0.25"
    assert "![training curves](plots/training_curves.png)" in text


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    assert written(tmp_path) == f"# {tmp_path.name}\n"


def test_no_report_is_written_where_there_is_no_run(folder: Path, tmp_path: Path) -> None:
    report_again(tmp_path)
    assert not (tmp_path / "report.md").exists()
    report_again(folder)
    assert (folder / "report.md").exists()


def test_every_evaluation_is_told_of_with_its_pictures(folder: Path) -> None:
    for name in ("test@b", "test@a"):
        keep(folder, name, document())
    torn = folder / "evals" / "torn"
    torn.mkdir()
    (torn / "eval.json").write_text('{"weights": ')
    text = written(folder)
    assert text.index("## `test@a`") < text.index("(evals/test%40a/a_knobs.png)")
    assert text.index("(evals/test%40a/a_knobs.png)") < text.index("## `test@b`")
    assert "## `torn`" not in text
    alone = (folder / "evals" / "test@a" / "eval.md").read_text()
    assert alone == evaluation_text(document())
    assert alone.strip() in text


def test_a_process_without_torch_can_write_reports(folder: Path, root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from moectl.controller.report import report;"
        "report(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    keep(folder, "test@a", document())
    rows = (folder / "training_history.csv").read_text().replace("epoch,", "epoch,entropy_tier,")
    (folder / "training_history.csv").write_text(rows.replace(",0.1,", ",0.5,0.1,"))
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=root, check=False)
    assert done.returncode == 0


# Evaluations


def test_conditions_are_said() -> None:
    text = evaluation_text(document())
    assert "`best_model.pt`, epoch 7; answers of nano. Latency: ttft in ms, measured" in text
    assert "on x86_64, cpu clock, repeats 5. The full plan takes 326.5 ms." in text
    assert "To choose a plan takes 0.345 ms; 1.5 ms are counted for it." in text
    assert "### easy_vqa: 40 test questions" in text
    predicted = {"source": "table", "objective": "total", "clock": "wall", "repeats": 1}
    assert "total in ms, predicted from tables" in evaluation_text(document(latency=predicted))
    work = evaluation_text(document(latency={**predicted, "source": "flops"}, unit="GFLOP"))
    assert "total in GFLOP, work in place of time" in work
    assert "Mean latency in GFLOP:" in work


def test_policies_and_budgets_span_the_tables() -> None:
    text = evaluation_text(document())
    assert row(text, "budget (ms)") == ["100", "200.5"]
    assert row(text, "lut") == ["50.0", "50.0"]
    assert row(text, "lut", 1) == ["25.0", "25.0"], "late answers are wrong"
    assert row(text, "lut", 2) == ["123.5", "123.5"]
    assert row(text, "random", 3) == ["100.0", "100.0"]
    assert row(text, "lut", 4) == ["62.5", "12.35"]
    assert "accuracy 0 at 326.5 ms" in text


def test_gains_have_intervals() -> None:
    text = evaluation_text(document())
    assert row(text, "lut", 5) == ["+25.00 [+20.00, +30.00]", "+5.00 [+1.00, +9.00]"]
    assert row(text, "random", 5) == ["+50.00 [+40.00, +60.00]"] * 2


def test_scores_of_others_are_those_of_the_largest_budget() -> None:
    found = document()
    for place, one in enumerate(found["datasets"]["easy_vqa"]["results"]):
        one["metrics"]["vqa_official"] = place / 10
    text = evaluation_text(found)
    assert "Under a budget of 200.5 ms:" in text
    assert row(text, "controller", 5) == ["0.1000"]
    assert row(text, "random", 5) == ["0.5000"]
    assert "Under a budget" not in evaluation_text(document())


def test_a_controller_alone_is_compared_with_nothing() -> None:
    found = document(policies=["controller"])
    found["datasets"]["easy_vqa"]["comparisons"] = []
    assert "more on the same questions" not in evaluation_text(found)


# The sentence about the lookup table


@pytest.mark.parametrize(
    ("timely", "every", "words", "note"),
    [
        (gain(0.05, 0.01, 0.09), gain(0.2, 0.1, 0.3), "is more accurate when", ""),
        (gain(-0.05, -0.09, -0.01), gain(-0.2, -0.3, -0.1), "is less accurate when", ""),
        (gain(0.05, -0.01, 0.09), gain(0, -1, 1), "is neither better nor worse beyond", ""),
        (
            gain(0.05, -0.01, 0.09), gain(0.2, 0.1, 0.3), "is neither better nor worse beyond",
            "When late answers count too, it is more accurate.",
        ),
    ],
)  # fmt: skip
def test_what_is_said_follows_from_the_interval(
    timely: dict[str, float], every: dict[str, float], words: str, note: str
) -> None:
    part = document()["datasets"]["easy_vqa"]
    text = verdict(compared("lut", timely, every), part)
    assert f"Against the lookup table the controller {words}" in text
    assert ("late answers count too" in text) == bool(note)
    assert note in text
    assert "12.5 % come late, of the table's 25.0 %." in text
    assert f"({100 * timely['difference']:+.2f} [" in text


def test_only_the_lookup_table_has_a_sentence() -> None:
    assert evaluation_text(document()).count("Against the lookup table") == 1
    found = document()
    found["datasets"]["easy_vqa"]["comparisons"] = found["datasets"]["easy_vqa"]["comparisons"][1:]
    assert "Against the lookup table" not in evaluation_text(found)
