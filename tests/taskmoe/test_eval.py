"""Measuring a mixture: the files of an evaluation, and that they agree with each other."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.engine import plot
from moectl.taskmoe import eval as evaluation
from moectl.taskmoe import heat_maps, pictures
from moectl.taskmoe.files import write_data_file
from moectl.taskmoe.manifest import DIGITS, write_manifest
from moectl.taskmoe.model import MergedMoE
from moectl.taskmoe.pictures import Sample

Call = Callable[..., tuple[int, str, str]]
Row = dict[str, str]

FILES = {
    *("results.json", "predictions.csv", "confusion_matrix.csv", "report.md"),
    *("confusion_matrix.png", "expert_analysis.png", "sample_predictions.png"),
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave pictures empty: what they show has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heat_maps, pictures, plot):
            patch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))
        patch.setattr(evaluation, "sample_predictions", lambda path, _: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def own(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished runs that may be written to."""
    return shutil.copytree(finished_runs, tmp_path_factory.mktemp("own") / "runs") / "taskmoe"


@pytest.fixture(scope="module")
def measured(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of the finished training."""
    folder = tmp_path_factory.mktemp("measured") / "new" / "folder"
    words = ("--run", f"{own}/t", "--out", str(folder), "--quiet")
    assert _run(["taskmoe", "eval", *words]) == 0
    return folder


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of specialists that share classes."""
    folder = tmp_path_factory.mktemp("overlapping") / "run"
    words = (
        *("--task", "digits_overlap", "--width", "4", "--num-epochs", "1", "--lr", "0.003"),
        *("--merged", "none", "--expert-analysis-interval", "0", "--precision", "no", "--quiet"),
    )
    assert _run(["taskmoe", "train", *words, "--out", str(folder)]) == 0
    return folder


def read(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path) -> list[Row]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def gates(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([[float(row[f"gate_{number}"]) for number in range(3)] for row in rows])


def accuracy(rows: list[Row]) -> float:
    return 100 * sum(row["label"] == row["prediction"] for row in rows) / len(rows)


# The files agree


def test_an_evaluation_leaves_its_files(measured: Path) -> None:
    assert {path.name for path in measured.iterdir()} == FILES


def test_results_have_the_keys_of_the_original_and_more(measured: Path) -> None:
    results = read(measured)
    assert {
        *("overall_accuracy", "class_accuracies"),
        *("macro_accuracy", "n", "classes", "per_task_accuracy", "group_accuracy"),
        *("within_group_accuracy", "nll", "ece15", "top_confusions", "usage", "temperature"),
        *("dedup", "ablations"),
    } <= set(results)
    assert list(results["class_accuracies"]) == list("012345678")
    assert set(results["classes"]["3"]) == {"n", "correct", "wilson_low", "wilson_high"}
    parts = {"gating_only", "experts_only", "uniform_gate", "top1_gate"}
    assert parts <= set(results["ablations"])


def test_accuracies_are_those_of_the_predictions(measured: Path) -> None:
    results, rows = read(measured), predictions(measured)
    assert [int(row["row"]) for row in rows] == list(range(results["n"]))
    assert results["overall_accuracy"] == pytest.approx(accuracy(rows))
    by_class = {name: [row for row in rows if row["label"] == name] for name in "012345678"}
    for name, own in by_class.items():
        found = results["classes"][name]
        assert found["n"] == len(own)
        assert results["class_accuracies"][name] == pytest.approx(accuracy(own))
        assert 100 * found["correct"] / found["n"] == pytest.approx(accuracy(own))
        assert found["wilson_low"] <= accuracy(own) <= found["wilson_high"]
    macro = sum(map(accuracy, by_class.values())) / 9
    assert results["macro_accuracy"] == pytest.approx(macro)


def test_group_and_within_group_accuracy_multiply_to_the_whole(measured: Path) -> None:
    results, rows = read(measured), predictions(measured)
    inside = [row for row in rows if int(row["label"]) // 3 == int(row["prediction"]) // 3]
    assert results["group_accuracy"] == pytest.approx(100 * len(inside) / len(rows))
    assert results["within_group_accuracy"] == pytest.approx(accuracy(inside))
    joint = results["group_accuracy"] * results["within_group_accuracy"] / 100
    assert results["overall_accuracy"] == pytest.approx(joint)


def test_use_and_gates_agree(measured: Path) -> None:
    results, rows = read(measured), predictions(measured)
    assert gates(rows).sum(1).tolist() == pytest.approx([1] * len(rows), abs=1e-5)
    assert results["usage"] == pytest.approx(gates(rows).mean(0).tolist(), abs=1e-5)
    assert all(1 / 9 <= float(row["confidence"]) <= 1 for row in rows)


def test_the_confusion_matrix_counts_the_predictions(measured: Path) -> None:
    rows = predictions(measured)
    with (measured / "confusion_matrix.csv").open(newline="") as file:
        cells = {row.pop("true"): row for row in csv.DictReader(file)}
    for true in cells:
        for seen in cells:
            count = sum(row["label"] == true and row["prediction"] == seen for row in rows)
            assert int(cells[true][seen]) == count


def test_original_ids_are_those_of_the_files(measured: Path) -> None:
    assert all(row["original_id"] == row["label"] for row in predictions(measured))


def test_training_and_evaluation_find_the_same(measured: Path, runs: Path) -> None:
    found, trained = measured, runs / "t" / "evals" / "test@best"
    one, other = read(found), read(trained)
    assert one["class_accuracies"] == other["class_accuracies"]
    assert one["nll"] == pytest.approx(other["nll"], abs=1e-6)
    assert one["weights"]["sha256"] == other["weights"]["sha256"]
    columns = ("row", "original_id", "label", "prediction")
    for mine, theirs in zip(predictions(found), predictions(trained), strict=True):
        assert [mine[name] for name in columns] == [theirs[name] for name in columns]


# Where results go


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_with_a_folder_named_results_go_nowhere_else(
    taskmoe: Call, own: Path, isolated: Path
) -> None:
    before = contents(own)
    assert taskmoe("eval", "--run", f"{own}/t", "--out", "here", "--quiet")[0] == 0
    assert contents(own) == before
    assert [path.name for path in isolated.iterdir()] == ["here"]


def test_without_one_results_go_into_the_run_and_its_report(
    taskmoe: Call, own: Path, isolated: Path
) -> None:
    before = contents(own)
    code, out, _ = taskmoe("eval", "--run", f"{own}/t@last", "--json")
    assert code == 0
    assert json.loads(out)["folder"] == str(own / "t" / "evals" / "test@last")
    new = {name for name, data in contents(own).items() if before.get(name) != data}
    new.discard("t/plots/learning_curve.png")  # drawn anew
    assert {f"t/evals/test@last/{name}" for name in FILES} | {"t/report.md", "t/report.html"} == new
    assert "weights `last`" in (own / "t" / "report.md").read_text()
    assert list(isolated.iterdir()) == []


def test_a_merge_is_measured_too(taskmoe: Call, own: Path) -> None:
    code, out, _ = taskmoe("eval", "--run", f"{own}/m", "--json", "--out", "here")
    assert code == 0
    document = json.loads(out)
    assert document["weights"]["file"].endswith("m/merged_model.pth")
    assert document["temperature"] == 2.0
    assert {path.name for path in Path("here").iterdir()} == FILES


def test_the_newest_run_is_measured_if_none_is_named(
    taskmoe: Call, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(own.parent))
    code, out, _ = taskmoe("eval", "--json", "--out", "here")
    assert code == 0
    assert json.loads(out)["weights"]["file"] == f"{own}/t/best_model.pth"


# Options


def test_a_low_temperature_sharpens_the_gates(taskmoe: Call, own: Path, measured: Path) -> None:
    words = ("--temperature", "0.01", "--json", "--out", "cold")
    code, out, _ = taskmoe("eval", "--run", f"{own}/t", *words)
    assert code == 0
    assert json.loads(out)["temperature"] == pytest.approx(0.01)
    cold, warm = gates(predictions(Path("cold"))), gates(predictions(measured))
    assert torch.equal(cold.argmax(1), warm.argmax(1))
    assert cold.max(1).values.mean() > warm.max(1).values.mean() + 0.1


def test_shared_classes_count_as_often_as_the_files_hold_them(
    taskmoe: Call, overlapping: Path
) -> None:
    words = ("eval", "--run", str(overlapping), "--count-shared-twice", "--json", "--out", "twice")
    code, out, _ = taskmoe(*words)
    assert code == 0
    twice, rows = json.loads(out), predictions(Path("twice"))
    shared = [row for row in rows if row["label"] in "036"]
    assert len(rows) == 647
    assert twice["n"] == 647 + len(shared)
    assert twice["overall_accuracy"] == pytest.approx(accuracy(rows + shared))
    once = read(overlapping / "evals" / "test@best")
    assert once["n"] == 647
    assert once["overall_accuracy"] == pytest.approx(accuracy(rows))
    assert abs(once["overall_accuracy"] - twice["overall_accuracy"]) > 0.5
    assert twice["class_accuracies"] == once["class_accuracies"]


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """The samples that would have been drawn, evaluation after evaluation."""
    drawn: list[list[Sample]] = []

    def keep(path: Path, chosen: list[Sample]) -> None:
        drawn.append([replace(one, image=one.image.tolist()) for one in chosen])

    monkeypatch.setattr(evaluation, "sample_predictions", keep)
    return drawn


def test_samples_depend_on_the_seed_alone(
    taskmoe: Call, own: Path, samples: list[list[Sample]]
) -> None:
    for number, seed in enumerate(("3", "3", "4")):
        words = ("--seed", seed, "--out", str(number), "--quiet")
        assert taskmoe("eval", "--run", f"{own}/t", *words)[0] == 0
    assert samples[0] == samples[1] != samples[2]


def test_samples_are_images_of_different_classes_with_their_predictions(
    taskmoe: Call, own: Path, samples: list[list[Sample]]
) -> None:
    words = ("eval", "--run", f"{own}/t", "--num-samples", "5", "--out", "here")
    assert taskmoe(*words)[0] == 0
    (chosen,) = samples
    assert len({one.true for one in chosen}) == 5
    rows = predictions(Path("here"))
    for one in chosen:
        like = [row for row in rows if row["confidence"] == f"{round(one.confidence, 6)}"]
        assert (one.true, one.predicted) in {(row["label"], row["prediction"]) for row in like}


def test_there_are_no_more_samples_than_classes(
    taskmoe: Call, own: Path, samples: list[list[Sample]]
) -> None:
    _, _, err = taskmoe("eval", "--run", f"{own}/t", "--out", "here")
    assert sorted(one.true for one in samples[0]) == list("012345678")
    lines = [line for line in err.splitlines() if " -> " in line]
    assert len(lines) == 9
    for line, one in zip(lines, samples[0], strict=True):
        mark = "✓" if one.true == one.predicted else "✗"
        assert line.startswith(f"{one.true} -> {one.predicted} {mark}")


def test_no_samples_give_no_picture(taskmoe: Call, own: Path) -> None:
    words = ("--num-samples", "0", "--out", "here", "--quiet")
    assert taskmoe("eval", "--run", f"{own}/t", *words)[0] == 0
    assert {path.name for path in Path("here").iterdir()} == FILES - {"sample_predictions.png"}


# Files of the original


def test_the_file_with_the_highest_accuracy_in_its_name_is_measured(
    taskmoe: Call, own: Path, measured: Path
) -> None:
    folder = Path("models")
    folder.mkdir()
    for name in ("model_9.50_epoch99", "best_model_74.13_epoch9", "best_model_61.20_epoch30"):
        shutil.copy(own / "t" / "best_model.pth", folder / f"{name}.pth")
    words = ("eval", "--task", "digits", "--model-dir", "models", "--json", "--out", "here")
    code, out, _ = taskmoe(*words)
    assert code == 0
    document = json.loads(out)
    assert document["weights"]["file"] == "models/best_model_74.13_epoch9.pth"
    assert document["overall_accuracy"] == read(measured)["overall_accuracy"]


@pytest.fixture
def two_tasks(isolated: Path) -> Path:
    """Data of tasks A and B with a few images each, and weights of the original for both."""
    draws = torch.Generator().manual_seed(0)
    for task, seed in (("A", 1), ("B", 2)):
        folder = Path("data") / f"Task{task}"
        entries = []
        for one in DIGITS.specialists:
            names = [f"{part}_{one.name}.pth" for part in ("train", "test")]
            entries.append(replace(one, train=names[0], test=names[1]))
            for name in names:
                images = torch.randint(0, 256, (12, 3, 16, 16), generator=draws, dtype=torch.uint8)
                labels = [entry.id for entry in one.classes] * 4
                write_data_file(folder / name, images, torch.tensor(labels))
        manifest = replace(DIGITS, task=task, specialists=tuple(entries))
        write_manifest(folder / "manifest.toml", manifest)
        torch.manual_seed(seed)
        weights = Path("models") / f"Task{task}" / f"best_model_{40 + seed}.00_epoch1.pth"
        weights.parent.mkdir(parents=True)
        torch.save(MergedMoE(classes=9, width=4).state_dict(), weights)
    return isolated


def test_both_tasks_are_measured_at_once(taskmoe: Call, two_tasks: Path) -> None:
    words = ("eval", "--task", "both", "--model-dir", "models", "--json", "--out", "found")
    code, out, err = taskmoe(*words)
    assert code == 0, err
    document = json.loads(out)
    assert list(document) == ["A", "B"]
    for task in "AB":
        assert document[task]["weights"]["file"].startswith(f"models/Task{task}/best_model_4")
        assert document[task]["n"] == 36
        assert {path.name for path in Path("found", f"Task{task}").iterdir()} == FILES


def test_a_folder_without_weights_is_refused(taskmoe: Call) -> None:
    code, out, err = taskmoe("eval", "--task", "digits", "--model-dir", "nowhere")
    assert (code, out) == (2, "")
    assert "nowhere: no .pth file in it" in err


def test_results_elsewhere_leave_the_run_as_it_is(taskmoe: Call, own_runs: Path) -> None:
    (own_runs / "t" / "report.md").unlink()
    for command in ("eval", "analyze"):
        code, _, _ = taskmoe(command, "--run", "t", "--out", command, "--quiet")
        assert code == 0
    assert not (own_runs / "t" / "report.md").exists()
