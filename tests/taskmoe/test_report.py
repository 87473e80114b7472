"""Reports: what stands in them, and that nothing missing or torn stops them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.engine import plot
from moectl.taskmoe import heat_maps, pictures
from moectl.taskmoe.report import draw_curve, evaluation_text, report

Copy = Callable[[str], Path]


@pytest.fixture
def drawing() -> None:
    """Asked for by the tests that look at pictures."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures empty where only the text matters."""
    if "drawing" not in request.fixturenames:
        for module in (heat_maps, pictures, plot):
            monkeypatch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Copy:
    """Return a run without its weights, to write into; the reports and plots are gone."""
    left_out = shutil.ignore_patterns("*.pth*", "checkpoints", "tensorboard", "plots", "report.md")
    return lambda name: shutil.copytree(runs / name, tmp_path / name, ignore=left_out)


def written(folder: Path) -> str:
    report(folder)
    return (folder / "report.md").read_text()


def row(text: str, start: str) -> list[str]:
    """Return the cells of the first table row that begins with a text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def change(path: Path, **values: Any) -> dict[str, Any]:
    document = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(document))
    return document


# Every kind of run


@pytest.mark.parametrize("name", ["s1", "m", "t"])
def test_every_kind_of_run_has_a_page(copy: Copy, name: str, parsed: Callable[[Path], Any]) -> None:
    folder = copy(name)
    report(folder)
    page = parsed(folder / "report.html")
    assert "How to reproduce" in page.words
    record = json.loads((folder / "run.json").read_text())
    assert all(one["sha256"] in page.words for one in [*record["parents"], *record["weights"]])


def test_what_was_run_is_said(copy: Copy) -> None:
    text = written(copy("t"))
    assert text.startswith("# t\n")
    assert row(text, "seed")[1] == "100"
    assert row(text, "processes × threads")[1] == "1 × 1"
    assert row(text, "`model.width`")[1:3] == ["4", "64"]
    assert row(text, "`data.task`")[1:] == ["digits", "A", "flag"]
    assert "`model.top_k`" not in text


def test_a_specialist_has_the_accuracies_of_its_classes(copy: Copy) -> None:
    folder = copy("s2")
    text = written(folder)
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert f"{best['images']} test images of its classes" in text
    for name, share in best["classes"].items():
        assert row(text, name)[1] == f"{100 * share:.1f}"
    assert row(text, "all")[1] == f"{100 * best['accuracy']:.1f}"


def test_a_merge_stands_beside_random_weights_and_chance(copy: Copy) -> None:
    folder = copy("m")
    text = written(folder)
    found = json.loads((folder / "merge_report.json").read_text())
    for name, words in (("step_zero", "merged"), ("random_control", "random weights")):
        shares = [found[name]["union_accuracy"], *found[name]["own_accuracy"]]
        assert row(text, words)[1:] == [f"{100 * share:.1f}" for share in shares]
    assert row(text, "chance")[1:] == ["11.1", "33.3", "33.3", "33.3"]
    assert "Mean correlation of the channels" not in text


def test_an_aligned_merge_has_correlations(copy: Copy) -> None:
    folder = copy("m")
    gain = {"P1": {"before": 0.25, "after": 0.5}}
    change(folder / "merge_report.json", correlations=[gain, gain])
    text = written(folder)
    assert row(text, "P1")[1:] == ["0.25 → 0.50"] * 2
    assert row(text, "channels")[1:] == ["specialist 2", "specialist 3"]


def test_a_training_has_its_tables(copy: Copy) -> None:
    folder = copy("t")
    text = written(folder)
    found = json.loads((folder / "evals" / "test@best" / "results.json").read_text())
    low, high = found["interval"]
    assert "## Results, weights `best`" in text
    assert row(text, "accuracy")[1] == f"{found['overall_accuracy']:.2f} [{low:.1f}, {high:.1f}]"
    for name, accuracy in found["class_accuracies"].items():
        assert row(text, name)[1:3] == [str(found["classes"][name]["n"]), f"{accuracy:.1f}"]
    assert row(text, "mean gate")[1:] == [f"{share:.3f}" for share in found["usage"]]
    whole = found["ablations"]["gating_only"]
    assert row(text, "gating features alone")[1] == f"{whole:.2f}"
    assert "Best matching: expert 0 – " in text


def test_every_evaluation_is_told_of(copy: Copy) -> None:
    folder = copy("t")
    shutil.copytree(folder / "evals" / "test@best", folder / "evals" / "test@epoch7")
    text = written(folder)
    assert text.index("weights `best`") < text.index("weights `epoch7`")


def test_the_table_of_a_comparison_is_shown(copy: Copy) -> None:
    folder = copy("t")
    place = folder / "evals" / "comparison@best"
    place.mkdir()
    known = {"accuracy": 62.5, "low": 55.04, "high": 69.06, "difference": 1.255, "p_value": 0.0123}
    unknown = dict.fromkeys(known)
    document = {
        "against": "mixture",
        "images": 647,
        "own_classes": [{"specialist": "012", "n": 9, "accuracy": 80, "low": 70, "high": 90}],
        "rows": [{"name": "owner known", **known}, {"name": "one network", **unknown}],
        "seeds": {"accuracies": {"1": 60, "2": 62}, "mean": 61, "std": 1.4142},
    }
    (place / "comparison.json").write_text(json.dumps(document))
    text = written(folder)
    assert row(text, "owner known")[1:] == ["62.50", "55.0 – 69.1", "+1.25", "0.012"]
    assert row(text, "one network")[1:] == ["–"] * 4
    assert row(text, "012: its own classes")[1] == "80.00"
    assert "Over 2 seeds the mixture reaches 61.00 ± 1.41." in text


# Notes


def test_published_figures_stand_beside_those_of_their_task(copy: Copy) -> None:
    folder = copy("t")
    path = folder / "evals" / "test@best" / "results.json"
    assert "ublished" not in written(folder)
    found = change(path, task="A")
    found["class_accuracies"]["maple_tree"] = found["class_accuracies"].pop("0")
    found["classes"]["maple_tree"] = found["classes"].pop("0")
    path.write_text(json.dumps(found))
    text = written(folder)
    assert row(text, "published: 1,500 test images, mixing logits")[1] == "78.87"
    assert row(text, "maple_tree")[-1] == "62"
    assert row(text, "1")[-1] == "–"
    change(path, task="B")
    assert "| 74.13 |" in written(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selected_on": "test"}, "The best epoch was chosen on these very images."),
        ({"count_shared_twice": True}, "count as often as the files hold them"),
        ({"leakage": 7}, "7 of them are among the training images too."),
    ],
)
def test_what_makes_figures_doubtful_is_said(
    copy: Copy, changes: dict[str, Any], words: str
) -> None:
    folder = copy("t")
    assert words not in written(folder)
    change(folder / "evals" / "test@best" / "results.json", **changes)
    assert words in written(folder)


def test_a_class_without_images_has_a_dash(copy: Copy) -> None:
    folder = copy("t")
    path = folder / "evals" / "test@best" / "results.json"
    found = json.loads(path.read_text())
    found["class_accuracies"]["4"] = None
    found["classes"]["4"] = {"n": 0, "correct": 0, "wilson_low": None, "wilson_high": None}
    found["within_group_accuracy"] = None
    found["per_task_accuracy"][1] = None
    path.write_text(json.dumps(found))
    text = written(folder)
    assert row(text, "4")[1:] == ["0", "–", "–"]
    assert row(text, "right class within it")[1] == "–"


def test_names_of_classes_stay_in_their_cells(copy: Copy, drawing: None) -> None:
    folder = copy("t")
    path = folder / "evals" / "test@best" / "results.json"
    names = ["dog|wolf", "$x$", "a\nb", *"345678"]
    found = json.loads(path.read_text())
    for key in ("class_accuracies", "classes"):
        found[key] = dict(zip(names, found[key].values(), strict=True))
    path.write_text(json.dumps({**found, "class_names": names}))
    text = written(folder)
    count = found["classes"]["dog|wolf"]["n"]
    assert f"| dog\\|wolf | {count} |" in text
    assert row(text, "$x$")[1] == str(found["classes"]["$x$"]["n"])
    assert row(text, "a b")[1] == str(found["classes"]["a\nb"]["n"])
    # A name between dollars is text, no formula, in pictures as well.
    plot.confusion(Path("c.png"), found["confusion"], title="Confusion", names=names)


def test_an_evaluation_has_a_text_of_its_own(copy: Copy) -> None:
    place = copy("t") / "evals" / "test@best"
    names = ["expert_analysis.png", "confusion_matrix.png"]
    text = evaluation_text(json.loads((place / "results.json").read_text()), names)
    assert text.startswith("# Task digits\n\n## Results, test images")
    assert [line for line in text.splitlines() if line.startswith("![")] == [
        "![expert analysis](expert_analysis.png)",
        "![confusion matrix](confusion_matrix.png)",
    ]


# Pictures


def test_pictures_are_drawn_and_shown(copy: Copy, drawing: None) -> None:
    folder = copy("t")
    text = written(folder)
    assert (folder / "plots" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "(plots/learning_curve.png)" in text
    for name in ("sample_predictions", "expert_analysis", "confusion_matrix"):
        assert f"(evals/test%40best/{name}.png)" in text


def test_the_curve_marks_the_first_of_the_best_epochs(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn = copy("t"), []
    lines = (folder / "metrics.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    place, epoch = cells[0].index("val/accuracy"), cells[0].index("epoch")
    values = {"1": "0.5", "2": "0.75", "3": "0.75"}
    rows = [[*cells[1]] for _ in values]
    for number, (name, value) in enumerate(values.items()):
        rows[number][epoch], rows[number][place] = name, value
    (folder / "metrics.csv").write_text(
        "".join(",".join(line) + "\n" for line in [cells[0], *rows])
    )
    monkeypatch.setattr(
        "moectl.taskmoe.report.learning_curve", lambda _, rows, best: drawn.append((rows, best))
    )
    draw_curve(folder)
    assert [(len(rows), best) for rows, best in drawn] == [(3, 2)]


def test_drawing_again_changes_nothing(copy: Copy) -> None:
    folder = copy("t")
    report(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Missing and torn files


def test_an_empty_folder_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert written(folder) == "# empty\n"


@pytest.mark.parametrize("gone", ["run.json", "settings.toml", "metrics.csv", "evals"])
def test_any_file_may_be_missing(copy: Copy, gone: str) -> None:
    folder = copy("t")
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = written(folder)
    assert text.startswith("# t\n")
    assert ("(plots/learning_curve.png)" in text) == (gone != "metrics.csv")
    assert ("## Results, weights `best`" in text) == (gone != "evals")
    assert ("| seed |" in text) == (gone != "run.json")
    assert ("`model.width`" in text) == (gone != "settings.toml")


@pytest.mark.parametrize(
    ("run", "torn", "lost"),
    [
        ("t", "evals/test@best/results.json", "## Results"),
        ("t", "run.json", "| seed |"),
        ("s1", "summary.json", "## Results"),
        ("m", "merge_report.json", "## Before any training"),
    ],
)
def test_torn_files_are_left_out(copy: Copy, run: str, torn: str, lost: str) -> None:
    folder = copy(run)
    assert lost in written(folder)
    (folder / torn).write_text('{"classes": {"0": ')
    assert lost not in written(folder)


def test_no_torch_is_needed(copy: Copy, root: Path) -> None:
    folder = copy("t")
    code = (
        "import sys; from pathlib import Path; from moectl.taskmoe.report import report\n"
        f"report(Path({str(folder)!r})); assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
