"""The report of a run: what stands in it, and that nothing missing or torn stops it."""

import json
import shutil
from pathlib import Path

import pytest

from moectl.csr import charts
from moectl.csr.html_report import DISCLAIMER
from moectl.csr.report import report, report_again

TAG = "test@best_model_stage3"


@pytest.fixture
def run(measured_run: Path, isolated: Path) -> Path:
    left_out = shutil.ignore_patterns("*.pth", "checkpoints", "report.*", "plots")
    return Path(shutil.copytree(measured_run, isolated / "tiny", ignore=left_out))


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """The epochs that the learning curves mark, by stage."""
    found: dict[str, int | None] = {}

    def draw(path: Path, stages: object, marked: dict[str, int | None]) -> None:
        found.update(marked)
        path.write_bytes(b"")

    monkeypatch.setattr("moectl.csr.report.learning_curves", draw)
    return found


def written(folder: Path) -> str:
    report(folder)
    return (folder / "report.md").read_text()


def row(text: str, start: str) -> list[str]:
    """Return the cells of the first table row that begins with a text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_run_and_scores_are_told(run: Path) -> None:
    text = written(run)
    assert text.startswith("# tiny\n")
    assert DISCLAIMER in text
    assert row(text, "`data.image_size`")[1:] == ["64", "224", "flag"]
    found = json.loads((run / "evals" / TAG / "metrics.json").read_text())
    assert row(text, "AUROC of the verdict")[1] == f"{found['task']['auroc_macro']:.3f}"
    square = found["concepts"]["columns"]["square"]
    assert row(text, "square")[1:3] == [str(square["positives"]), f"{square['auroc']:.3f}"]
    assert row(text, "mean of the concepts")[4] == "0.062"
    assert f"All of it: `evals/{TAG}/report.html`" in text
    assert (run / "evals" / TAG / "report.html").is_file()
    assert "![learning curves](plots/learning_curves.png)" in text
    assert (run / "plots" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_report_changes_nothing(run: Path) -> None:
    names = ("report.md", "plots/learning_curves.png", f"evals/{TAG}/report.html")
    report(run)
    before = [(run / name).read_bytes() for name in names]
    report(run)
    assert [(run / name).read_bytes() for name in names] == before


def test_the_epochs_of_the_weights_are_marked(run: Path, marks: dict[str, int | None]) -> None:
    report(run)
    sidecars = {
        stage: json.loads((run / f"best_model_stage{number}.pth.json").read_text())
        for stage, number in (("concept", 1), ("task", 3))
    }
    epochs = {stage: facts["epoch"] for stage, facts in sidecars.items()}
    assert marks == {**epochs, "prototype": None}, "the last prototypes are taken"
    settings = run / "settings.toml"
    settings.write_text(settings.read_text().replace('start = "last"', 'start = "best"'))
    report(run)
    assert marks["prototype"] is not None


def test_stages_that_are_not_done_are_left_out(run: Path, marks: dict[str, int | None]) -> None:
    (run / "metrics_concept.csv").unlink()
    (run / "metrics_task.csv").write_text("update,epoch,elapsed_seconds,running/loss\n1,1,1,2\n")
    shutil.rmtree(run / "evals")
    text = written(run)
    assert set(marks) == {"prototype"}
    assert "## Results" not in text
    assert DISCLAIMER in text


def test_a_run_that_has_done_nothing_has_a_report(isolated: Path) -> None:
    text = written(isolated)
    assert text.startswith("# work\n")
    assert "## Pictures" not in text
    assert not (isolated / "plots").exists()


def test_torn_scores_are_left_out(run: Path) -> None:
    (run / "evals" / TAG / "metrics.json").write_text('{"images": 4')
    assert "## Results" not in written(run)


def test_every_evaluation_is_told(run: Path) -> None:
    folder = run / "evals" / TAG
    shutil.copytree(folder, folder.with_name("val@best_model_stage3"))
    shutil.copytree(folder, folder.with_name(f"{TAG}-mine"))
    found = json.loads((folder / "metrics.json").read_text())
    rows = [{"name": "linear head", "inputs": 64, "parameters": 195, "p_value": 0.01}]
    baselines = {"weights": found["weights"], "rows": [{**rows[0], "task": found["task"]}]}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    text = written(run)
    titles = [line for line in text.splitlines() if line.startswith("## Results")]
    assert titles == [
        "## Results: test images, `best_model_stage3`",
        "## Results: test images, `best_model_stage3-mine`",
        "## Results: validation images, `best_model_stage3`",
    ]
    assert text.count("were chosen on these very images") == 1
    assert row(text, "linear head")[1:3] == ["64", "195"]
    assert len(list(run.glob("evals/*/report.html"))) == 3


def test_only_runs_are_reported_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "write_png", lambda _, path: path.write_bytes(b""))
    (run / "plots").mkdir()
    report_again(run)
    assert (run / "report.md").is_file()
    (run / "report.md").unlink()
    (run / "run.json").unlink()
    report_again(run)
    assert not (run / "report.md").exists()


def test_the_runs_tool_finds_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moectl.cli import _run

    assert _run(["runs", "report", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(run / "report.md")
    assert document["plots"] == [str(run / "plots" / "learning_curves.png")]
    assert (run / "report.md").is_file()
