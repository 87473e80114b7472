"""The page of an evaluation: whole by itself, well-formed, and true to the files."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.csr import html_report
from moectl.csr.html_report import DISCLAIMER, write_html
from moectl.csr.metrics import multiclass

EVIL = "<script>alert(\"1\")</script> & '$x$'"
Written = Callable[[Path], tuple[str, Any]]
TAG = "test@best_model_stage3"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def change(path: Path, edit: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def run(measured_run: Path, isolated: Path) -> Path:
    left_out = shutil.ignore_patterns("*.pth", "checkpoints", "report.*")
    return Path(shutil.copytree(measured_run, isolated / "tiny", ignore=left_out))


@pytest.fixture
def whole(run: Path) -> Path:
    """A run with everything that a page may show, under names that mean harm."""
    folder = run / "evals" / TAG
    document = json.loads((folder / "metrics.json").read_text())
    weights, task = document["weights"], document["task"]
    row = {"name": "linear head", "inputs": 64, "parameters": 195, "p_value": 0.01, "task": task}
    baselines = {"weights": weights, "rows": [row]}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    pair = {"before": 0.5, "after": 0.75}
    result = {"name": "chosen", "mode": "drop", "margin": 0.3, "asked": 9, "p_value": 0.5}
    result |= {"fixed": 5, "broke": 2, "net": 3, "f1_macro": pair, "true_probability": pair}
    study = {"weights": weights, "validation": {"images": 12}, "results": [result], "boxes": None}
    oracle = folder.with_name(f"{TAG}-oracle")
    oracle.mkdir()
    (oracle / "study.json").write_text(json.dumps(study))
    (oracle / "study.png").write_bytes(PIXEL)
    prototypes = [
        {"concept": EVIL, "index": 3, "out_of_box": 0.75, "suspect": True},
        {"concept": "ring", "index": 4, "out_of_box": 0.2, "suspect": False},
    ]
    atlas = {"weights": weights, "concepts": ["square", "ring"], "prototypes": prototypes}
    (run / "atlas.json").write_text(json.dumps(atlas))
    (run / "figures").mkdir()
    for name in ("square", "square-2", "square-10", "ring", "ring_2"):
        (run / "figures" / f"atlas_{name}.png").write_bytes(PIXEL)
    change(folder / "metrics.json", rename)
    change(run / "run.json", lambda record: record.update(argv=f"moectl --name {EVIL}\udcff"))
    return run


def rename(document: Any) -> None:
    for kind in ("concepts", "similarities"):
        columns = document[kind]["columns"]
        columns[EVIL] = columns.pop("square")
    document["concepts"]["skipped"]["auroc"] = [EVIL]


@pytest.fixture
def written(parsed: Callable[[Path], Any]) -> Callable[[Path], tuple[str, Any]]:
    """Write the page of an evaluation; return its text, and what it holds."""

    def call(folder: Path) -> tuple[str, Any]:
        path = folder / "evals" / TAG / "report.html"
        write_html(folder, path.parent)
        return path.read_text(encoding="utf-8"), parsed(path)

    return call


def test_a_page_needs_nothing_beside_it(whole: Path, written: Written) -> None:
    _, page = written(whole)
    pictures = page.all("img")
    assert len(pictures) >= 6
    for one in pictures:
        assert base64.b64decode(str(one["src"]).partition(",")[2]).startswith(b"\x89PNG")
        assert one["alt"]


def test_names_are_text_and_never_markup(whole: Path, written: Written) -> None:
    text, page = written(whole)
    assert "<script" not in text
    assert page.words.count(EVIL) >= 4  # concepts, skipped, atlas, command
    assert "default-src 'none'" in str(page.all("meta"))


def test_every_section_is_there(whole: Path, written: Written) -> None:
    _, page = written(whole)
    for title in (
        *("Summary", "Concepts", "Verdict", "Where it looks", "Baselines", "Corrections"),
        *("Atlas of prototypes", "Learning curves", "How to reproduce"),
    ):
        assert title in page.words
    assert DISCLAIMER in page.words
    assert "40 test images of generated glyphs. Trained on 108 images, 12 chose" in page.words
    facts = json.loads((whole / "evals" / TAG / "metrics.json").read_text())
    assert facts["weights"]["sha256"] in page.words
    assert f"{facts['task']['auroc_macro']:.3f}" in page.words
    assert "data.synthetic_images" in page.words
    assert "0.75" in page.words
    assert f"{EVIL} 3 (75 %)" in page.words
    assert "ring 4" not in page.words
    assert "Made with other weights" not in page.words
    assert "Confusions" not in page.words


def test_sheets_come_in_the_order_of_the_concepts(whole: Path, written: Written) -> None:
    _, page = written(whole)
    found = [one["alt"] for one in page.all("img") if str(one["alt"]).startswith("atlas")]
    assert found == ["atlas square", "atlas square-2", "atlas square-10", "atlas ring"]


def test_sheets_that_would_be_too_much_are_counted(
    whole: Path, monkeypatch: pytest.MonkeyPatch, written: Written
) -> None:
    monkeypatch.setattr(html_report, "_SHEETS", 2 * len(PIXEL))
    _, page = written(whole)
    assert "2 more sheets are in figures/ of the run." in page.words


def test_a_page_of_scores_alone_is_whole(run: Path, written: Written) -> None:
    shutil.rmtree(run / "plots")
    for name in ("run.json", "settings.toml"):
        (run / name).unlink()
    (run / "atlas.json").write_text("{torn")
    _, page = written(run)
    assert "Verdict" in page.words
    for title in ("Baselines", "Corrections", "Atlas of prototypes", "Learning curves"):
        assert title not in page.words
    assert page.all("img") == []


@pytest.mark.parametrize("text", [None, "", "{torn"])
def test_without_scores_there_is_no_page(run: Path, text: str | None) -> None:
    folder = run / "evals" / TAG
    (folder / "metrics.json").unlink()
    if text is not None:
        (folder / "metrics.json").write_text(text)
    write_html(run, folder)
    assert not (folder / "report.html").exists()


def test_what_belongs_to_other_weights_says_so(whole: Path, written: Written) -> None:
    change(whole / "atlas.json", lambda atlas: atlas["weights"].update(sha256="f" * 64))
    _, page = written(whole)
    assert page.words.count("Made with other weights") == 1
    assert "f" * 64 in page.words


def test_classes_have_a_confusion_matrix(run: Path, written: Written) -> None:
    task = multiclass([[2.0, 1.0], [1.0, 2.0]], [0, 0], ["yes", EVIL], draws=5)
    change(run / "evals" / TAG / "metrics.json", lambda document: document.update(task=task))
    _, page = written(run)
    assert "Confusions" in page.words
    assert (run / "evals" / TAG / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "balanced accuracy" in page.words


def test_validation_images_and_curation_are_told_apart(
    run: Path, parsed: Callable[[Path], Any]
) -> None:
    folder = run / "evals" / TAG
    other = folder.rename(folder.with_name("val@best_model_stage3-mine"))
    write_html(run, other)
    page = parsed(other / "report.html")
    assert "were chosen on these very images" in page.words
    assert "Evaluation best_model_stage3-mine." in page.words
