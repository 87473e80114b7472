import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moectl.balpoe.report import report
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import plot
from moectl.engine.settings import from_toml, to_toml
from moectl.engine.tracking import MetricsFile

PLOTS = (
    "accuracy", "classes", "confusion", "learning_rate", "loss", "reliability", "shifted",
)  # fmt: skip
SHOTS = {"accuracy_many": 0.7, "accuracy_medium": 0.5, "accuracy_few": None}


def settings(text: str = "") -> BalpoeSettings:
    path = Path("given.toml")
    path.write_text(text or '[model]\nexperts = 2\n[loss]\ntau_list = "0.5;1.5"\n')
    return from_toml(BalpoeSettings, path)


def evaluation(accuracy: float, epoch: int) -> dict[str, Any]:
    """Write what an evaluation of two experts on three classes leaves."""
    row = {"accuracy": accuracy, "balanced_accuracy": 0.44, **SHOTS, "top5": 0.99}
    errors = dict.fromkeys(
        ("accuracy", "confidence", "overconfidence", "ace_top", "ace_class"), 0.1
    )
    errors |= {"ece": 0.123, "mce": 0.2, "nll": 1.5, "brier": 0.6, "kl": 0.01}
    names = ("ensemble", "expert_0", "expert_0_adjusted", "expert_1", "expert_1_adjusted")
    bins = [
        {
            "lower": 0.0,
            "upper": 0.5,
            "count": 0,
            "weight": 0.0,
            "accuracy": None,
            "confidence": None,
        },
        {"lower": 0.5, "upper": 1.0, "count": 9, "weight": 1.0, "accuracy": 0.6, "confidence": 0.8},
    ]
    calibration = {name: dict(errors) for name in names}
    calibration["ensemble"]["temperature"] = 1.25
    return {
        "weights": {"file": "model_best.pth", "sha256": "0", "epoch": epoch},
        "scores": {**row, "ece": 0.123, "mce": 0.2, "nll": 1.5},
        "accuracy": dict.fromkeys((*names, "ensemble_adjusted"), row),
        "per_class": [0.9, None, 0.2],
        "confusion": [[9, 1, 0], [0, 0, 0], [4, 4, 2]],
        "shifted": [
            {"profile": profile, "ratio": ratio, "images": 20, "accuracy": 0.61,
             "accuracy_estimated_prior": 0.63, "accuracy_known_prior": 0.64}
            for profile, ratio in (("forward", 50.0), ("uniform", 1.0), ("backward", 50.0))
        ],
        "calibration": calibration,
        "reliability": dict.fromkeys(("ensemble", "expert_0", "expert_1"), bins),
        "diversity": {
            "disagreement": [[0.0, 0.25], [0.25, 0.0]],
            "accuracy": [0.41, 0.43],
            "ensemble_accuracy": 0.42,
            "ensemble_gain": -0.01,
            "oracle_accuracy": 0.55,
            "leave_one_out": [0.43, 0.41],
            "winners": {"many": 0, "medium": 1, "few": None},
        },
        "class_names": ["cat", "dog|wolf", "$x$"],
        "class_counts": [500, 50, 5],
        "images": 20,
    }  # fmt: skip


@pytest.fixture
def drawing() -> None:
    """Asked for by the tests that look at pictures."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures empty where only the text matters, for rendering takes most of the time."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr(plot, "write_png", lambda _, path: path.write_bytes(b""))


@pytest.fixture
def folder() -> Path:
    """A run folder as training leaves it."""
    folder = Path("runs/balpoe/try-1")
    (folder / "evals").mkdir(parents=True)
    (folder / "settings.toml").write_text(to_toml(settings()))
    record = {
        "argv": "moectl balpoe train --name try",
        "status": "finished",
        "reason": "",
        "started": "2026-01-01T00:00:00+00:00",
        "wall_seconds": 3700.0,
        "device": "some processor",
        "processes": 1,
        "threads": 2,
        "precision": "bf16",
        "seed": 7,
        "versions": {"moectl": "0.1.0", "torch": "2.15.0"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "settings": {"model.experts": "flag", "loss.tau_list": "small.toml"},
        "pid": 0,
    }
    (folder / "run.json").write_text(json.dumps(record))
    metrics = MetricsFile(folder / "metrics.csv")
    metrics.write({"update": 1, "epoch": 1, "elapsed_seconds": 1.0, "lr": 0.1, "running/loss": 9})
    for epoch in (1, 2, 3):
        losses = {"train/loss": 3 / epoch, "train/loss_expert_0": 2 / epoch}
        scores = {"val/loss": 1.0, "val/balanced_accuracy": 0.2 * epoch, "val/accuracy_many": 0.5}
        place = {"update": 5 * epoch, "epoch": epoch, "elapsed_seconds": 1.0}
        metrics.write({**place, "lr": 0.1, **losses, **scores, "val/accuracy_few": None})
    for tag, accuracy in (("best", 0.45), ("last", 0.42)):
        document = evaluation(accuracy, 3)
        (folder / "evals" / f"test@{tag}.json").write_text(json.dumps(document))
    summary = {tag: {"epoch": 3, "accuracy": 0.31} for tag in ("last", "best")}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def rejection(error: float) -> dict[str, Any]:
    """Write what an evaluation of Chow's rule at two rates leaves."""
    flat = {"balanced_error": [error] * 2, "worst_error": [error] * 2}
    curve = {**flat, "standard_error": [error] * 2, "gap": [0.0] * 2}
    curve |= {"group_errors": [[error] * 2] * 2, "group_coverage": [[1.0] * 2, [0.6] * 2]}
    areas = {kind: {"normalised": error, "span": 0.4} for kind in ("balanced", "worst")}
    method = {"aurc": areas, "curve": {"matched": curve}}
    return {
        "weights": {"file": "model_best.pth", "sha256": "0", "epoch": 3},
        "groups": {"names": ["head", "tail"], "of_class": [0, 1, 1]},
        "rates": [0.0, 0.4],
        "test_images": 16,
        "val_images": 4,
        "priors": {"train": {"methods": {"chow": method}, "costs": []}},
    }


def write_rejection(folder: Path, tag: str, error: float) -> None:
    place = folder / "evals" / f"rejection@{tag}"
    place.mkdir()
    accuracies = json.loads((folder / "evals" / f"test@{tag}.json").read_text())
    document = {**rejection(error), "weights": accuracies["weights"]}
    (place / "metrics.json").write_text(json.dumps(document))


def written(folder: Path) -> str:
    report(folder)
    return (folder / "report.md").read_text()


def row(text: str, start: str) -> list[str]:
    """Return the cells of the first table row that begins with a text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_plot_is_drawn_and_shown(folder: Path, drawing: None) -> None:
    text = written(folder)
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == sorted(PLOTS)
    for name in PLOTS:
        assert f"(plots/{name}.png)" in text
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_run_is_said(folder: Path) -> None:
    text = written(folder)
    assert row(text, "command") == ["command", "`moectl balpoe train --name try`"]
    assert row(text, "status")[1] == "finished"
    assert row(text, "time")[1] == "1 h 02 min"
    assert row(text, "versions")[1] == "moectl 0.1.0, torch 2.15.0"
    assert row(text, "git commit")[1] == "0123456789ab with changes"


def test_the_report_of_a_run_by_itself_does_not_say_that_it_still_runs(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    record |= {"pid": os.getpid(), "status": "running"}
    (folder / "run.json").write_text(json.dumps(record))
    assert row(written(folder), "status")[1] == "finished"


def test_only_settings_that_differ_are_listed(folder: Path) -> None:
    text = written(folder)
    assert row(text, "`model.experts`")[1:] == ["2", "3", "flag"]
    assert row(text, "`loss.tau_list`")[1:] == ["0.5;1.5", "0;1;2", "small.toml"]
    differing = text[text.index("## Settings that differ") : text.index("## How to reproduce")]
    assert differing.count("\n| `") == 2


def test_results_stand_in_percent_next_to_the_published_ones(folder: Path) -> None:
    text = written(folder)
    expected = ["3", "42.0", "44.0", "70.0", "50.0", "–", "99.0", "12.3", "20.0", "1.5"]
    assert row(text, "last")[1:] == expected
    assert row(text, "best")[2] == "45.0"
    published = row(text, "published: Sanchez Aimar et al. 2023")
    assert (published[2], published[8], published[9]) == ("52.0", "4.9", "11.3")
    assert "this run has 2 experts and 200 epochs" in text


def test_a_configuration_that_was_not_published_stands_alone(folder: Path) -> None:
    (folder / "settings.toml").write_text(to_toml(settings("[data]\nimbalance_ratio = 20\n")))
    assert "ublished" not in written(folder)


def test_experts_are_named_with_their_taus(folder: Path) -> None:
    text = written(folder)
    assert row(text, "expert 0 (tau 0.5)")[1] == "42.0"
    assert row(text, "expert 1 (tau 1.5), adjusted")[4] == "50.0"
    calibration = text[text.index("## Calibration") :]
    assert row(calibration, "expert 1 (tau 1.5)")[2] == "12.3"
    assert "Temperature of the ensemble, fitted on the validation images: 1.250." in text


def test_diversity_says_what_the_ensemble_gains_or_loses(folder: Path) -> None:
    text = written(folder)
    assert "right on 55.0; the ensemble reaches 42.0, 1.0 less than the best expert." in text
    diversity = text[text.index("## Diversity") :]
    assert row(diversity, "expert 1")[1:] == ["43.0", "41.0", "25.0", "0.0", "medium"]


def test_shifted_accuracies_stand_beside_the_published_ones(folder: Path) -> None:
    text = written(folder)
    assert row(text, "forward 50")[1:] == ["20", "61.0", "63.0", "64.0", "65.1", "70.3"]
    assert row(text, "backward 50")[1:] == ["20", "61.0", "63.0", "64.0", "36.1", "46.1"]


def test_rejection_stands_after_the_shifted_test_sets(folder: Path) -> None:
    write_rejection(folder, "last", 0.25)
    text = written(folder)
    assert text.index("## Shifted") < text.index("## Rejection, weights `last`")
    assert text.index("## Rejection") < text.index("## Plots")
    assert row(text, "`chow`")[1] == "25.0"
    assert row(text, "published: Chow")[1] == "50.9 ± 0.2"
    assert "(plots/risk_coverage_curves.png)" in text
    assert (folder / "plots" / "risk_coverage_groups.png").exists()


def test_rejection_is_told_of_the_last_epoch_then_the_best_then_any(folder: Path) -> None:
    (folder / "evals" / "test@epoch50.json").write_text(json.dumps(evaluation(0.4, 50)))
    for tag, error in (("epoch50", 0.1), ("best", 0.2), ("last", 0.3)):
        write_rejection(folder, tag, error)
        text = written(folder)
        assert f"## Rejection, weights `{tag}`" in text
        assert row(text, "`chow`")[1] == f"{100 * error:.1f}"


def test_rejection_by_weights_that_were_replaced_is_left_out(folder: Path) -> None:
    write_rejection(folder, "last", 0.3)
    place = folder / "evals" / "test@last.json"
    document = json.loads(place.read_text())
    document["weights"]["sha256"] = "1"
    place.write_text(json.dumps(document))
    assert "## Rejection" not in written(folder)


def test_a_torn_evaluation_of_rejection_is_left_out(folder: Path) -> None:
    write_rejection(folder, "last", 0.3)
    (folder / "evals" / "rejection@last" / "metrics.json").write_text('{"priors": ')
    assert "## Rejection" not in written(folder)


def test_the_best_epoch_is_shown_in_detail_where_the_last_was_not_measured(folder: Path) -> None:
    (folder / "evals" / "test@last.json").unlink()
    assert "weights `best`" in written(folder)


def test_a_single_expert_has_a_report(folder: Path) -> None:
    document = evaluation(0.4, 3)
    document["diversity"] |= {"disagreement": [[0.0]], "accuracy": [0.4], "leave_one_out": []}
    for name in list(document["accuracy"]):
        if "expert_1" in name:
            del document["accuracy"][name]
            del document["calibration"][name]
    (folder / "evals" / "test@last.json").write_text(json.dumps(document))
    (folder / "settings.toml").write_text(
        to_toml(settings('[model]\nexperts = 1\n[loss]\ntau_list = "1"\n'))
    )
    assert row(written(folder), "expert 0")[2] == "–"


@pytest.mark.parametrize(
    "gone", ["run.json", "settings.toml", "metrics.csv", "evals", "summary.json"]
)
def test_any_file_may_be_missing(folder: Path, gone: str) -> None:
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = written(folder)
    assert text.startswith("# try-1\n")
    assert ("(plots/loss.png)" in text) == (gone != "metrics.csv")
    assert ("(plots/confusion.png)" in text) == (gone != "evals")
    assert "## Results" in text


def test_the_summary_stands_in_for_missing_evaluations(folder: Path) -> None:
    shutil.rmtree(folder / "evals")
    assert row(written(folder), "last")[2] == "31.0"


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert written(folder) == "# empty\n"


def test_a_torn_evaluation_is_left_out(folder: Path) -> None:
    (folder / "evals" / "test@last.json").write_text('{"scores": ')
    assert "weights `best`" in written(folder)


def test_drawing_again_changes_nothing(folder: Path, drawing: None) -> None:
    report(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report(folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before == after


def test_no_torch_is_needed(folder: Path, root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from moectl.balpoe.report import report\n"
        f"report(Path({str(folder)!r})); assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
