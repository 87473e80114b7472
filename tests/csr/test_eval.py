"""What an evaluation writes, against the same scores computed directly."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moectl.csr import curation
from moectl.csr.edits import contributions
from moectl.csr.eval import measure, measure_task
from moectl.csr.inference import Opened, open_network
from moectl.csr.localisation import localise
from moectl.csr.metrics import multiclass, multilabel, ranking, tune_thresholds
from moectl.csr.settings import CsrSettings
from moectl.engine.command import Request
from moectl.engine.settings import from_toml

Call = Callable[..., tuple[int, str, str]]
TEST = "evals/test@best_model_stage3"
WORDS = ("--bootstrap", "50", "--cpu", "--quiet", "--json")


def open_it(folder: Path) -> Opened:
    settings = from_toml(CsrSettings, folder / "settings.toml")
    section = settings.eval.model_copy(update={"bootstrap": 50})
    settings = settings.model_copy(update={"eval": section})
    return open_network(
        Request("csr", "eval", settings, {}, "", True, None, "", folder, str(folder))
    )


@pytest.fixture
def opened(measured_run: Path) -> Opened:
    return open_it(measured_run)


@pytest.fixture(scope="module")
def written(measured_run: Path) -> Any:
    return json.loads((measured_run / TEST / "metrics.json").read_text())


@pytest.fixture
def run(finished_run: Path, isolated: Path) -> Path:
    return Path(shutil.copytree(finished_run, isolated / "run"))


def document_of(call: Call, *words: str) -> Any:
    code, out, err = call("eval", *WORDS, *words)
    assert code == 0, err
    return json.loads(out)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The scores


def test_scores_are_those_of_the_answers(opened: Opened, written: Any) -> None:
    part = opened.part("test")
    found, held = opened.answers(part), opened.answers(opened.data.val)
    truth, names = part.concepts.numpy(), opened.concepts
    draws: Any = {"draws": 50, "seed": opened.settings.train.seed}
    val = opened.data.val
    concepts = multilabel(
        found.concept_logits.numpy(),
        truth,
        names,
        thresholds=tune_thresholds(held.concept_logits.numpy(), val.concepts.numpy()),
        **draws,
    )
    task = multilabel(
        found.logits.numpy(),
        part.targets.numpy(),
        opened.targets,
        thresholds=tune_thresholds(held.logits.numpy(), val.targets.numpy()),
        **draws,
    )
    assert written["images"] == len(part.image_ids) == 40
    assert written["weights"] == opened.weights
    assert written["concepts"] == concepts
    assert written["task"] == task
    similar = found.maps.amax((2, 3))
    assert written["similarities"] == ranking(similar.numpy(), truth, names)
    assert written["pointing"] == {
        "cams": localise(found.cams, part.boxes, names, logits=True),
        "similarities": localise(found.maps, part.boxes, names),
    }


def test_prototypes_are_counted_where_their_concept_is(opened: Opened, written: Any) -> None:
    part = opened.part("test")
    scores = opened.answers(part).scores
    winners = {
        (concept, int(scores[image, concept].argmax()))
        for image, concept in part.concepts.nonzero().tolist()
    }
    assert written["prototypes"] == {"count": 20, "kept": 20, "used": len(winners)}
    assert written["explanations"] == 4


def test_thresholds_come_from_validation_images_alone(opened: Opened) -> None:
    part, val = opened.part("test"), opened.data.val
    answers, held = opened.answers(part), opened.answers(val)
    before = measure(opened, part, answers, held)
    turned = replace(part, concepts=1 - part.concepts, targets=1 - part.targets)
    same = measure(opened, turned, answers, held)
    other = replace(held, concept_logits=held.concept_logits + 1, logits=held.logits + 1)
    moved = measure(opened, part, answers, other)
    tuned = {
        "concepts": tune_thresholds(other.concept_logits.numpy(), val.concepts.numpy()),
        "task": tune_thresholds(other.logits.numpy(), val.targets.numpy()),
    }
    for kind in ("concepts", "task"):

        def thresholds(document: Any, kind: str = kind) -> list[float]:
            return [one["threshold"] for one in document[kind]["columns"].values()]

        assert thresholds(same) == thresholds(before)
        assert thresholds(moved) == tuned[kind].tolist() != thresholds(before)
        assert moved[kind]["auroc_macro"] == before[kind]["auroc_macro"]


def test_nothing_points_without_boxes(opened: Opened) -> None:
    part = opened.part("val")
    answers = opened.answers(part)
    bare = replace(part, boxes=[[] for _ in part.boxes])
    assert "pointing" in measure(opened, part, answers, answers)
    assert "pointing" not in measure(opened, bare, answers, answers)


def test_one_class_per_image_has_a_confusion_matrix(opened: Opened) -> None:
    part = opened.part("test")
    logits = opened.answers(part).logits
    classes = replace(part, targets=part.targets.argmax(1))
    found = measure_task(opened, classes, logits, logits)
    expected = multiclass(
        logits.numpy(), np.asarray(classes.targets), opened.targets, 50, opened.settings.train.seed
    )
    assert found == expected
    assert np.sum(found["confusion"]) == 40


# The files


def test_predictions_are_probabilities(opened: Opened, measured_run: Path) -> None:
    part = opened.part("test")
    answers = opened.answers(part)
    rows = table(measured_run / TEST / "predictions.csv")
    assert [row.pop("image_id") for row in rows] == part.image_ids
    assert list(rows[0]) == [*opened.targets, *opened.concepts]
    values = np.array([[float(value) for value in row.values()] for row in rows])
    logits = torch.cat([answers.logits, answers.concept_logits], 1).double()
    np.testing.assert_allclose(values, logits.sigmoid().numpy(), atol=2e-6)


def test_the_document_printed_is_the_one_written(csr: Call, run: Path, written: Any) -> None:
    document = document_of(csr, "--run", str(run))
    folder = run / TEST
    assert document.pop("folder") == str(folder)
    assert document == json.loads((folder / "metrics.json").read_text()) == written
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "predictions.csv",
        "report.html",
    }
    assert "report.html" in (run / "report.md").read_text()


def test_validation_images_may_be_measured(csr: Call, run: Path) -> None:
    document = document_of(csr, "--run", str(run), "--split", "val", "--bootstrap", "0")
    assert document["folder"] == str(run / "evals" / "val@best_model_stage3")
    rows = table(Path(document["folder"]) / "predictions.csv")
    split = json.loads((run / "splits.json").read_text())
    assert [row["image_id"] for row in rows] == split["val"]
    assert document["images"] == len(split["val"])
    assert "intervals" not in document["task"]


@pytest.mark.parametrize("flag", ["--run", "--checkpoint"])
def test_a_weights_file_may_be_measured(csr: Call, run: Path, flag: str) -> None:
    document = document_of(csr, flag, str(run / "best_model_stage1.pth"))
    assert document["folder"] == str(run / "evals" / "test@best_model_stage1")
    assert document["weights"]["file"] == "best_model_stage1.pth"


def test_curation_takes_prototypes_their_say(csr: Call, run: Path, written: Any) -> None:
    opened = open_it(run)
    kept = torch.ones(4, 5, dtype=torch.bool)
    kept[0], kept[1, 2] = False, False
    rows = [
        {"concept": name, "index": index, "keep": bool(kept[place, index])}
        for place, name in enumerate(opened.concepts)
        for index in range(5)
    ]
    curation.write(run / "mine.toml", rows, curation.fingerprint(opened.model))
    document = document_of(csr, "--run", str(run), "--curation", str(run / "mine.toml"))
    assert document["folder"] == str(run / f"{TEST}-curated-mine")
    assert document["prototypes"]["kept"] == 14
    assert document["concepts"] == written["concepts"]
    part = opened.part("test")
    scores = opened.answers(part).scores
    logits = contributions(scores, *opened.head._replace(kept=kept)).logits
    found = table(Path(document["folder"]) / "predictions.csv")
    values = [[float(row[name]) for name in opened.targets] for row in found]
    np.testing.assert_allclose(values, logits.sigmoid().numpy(), atol=1e-5)
    assert document["task"]["auroc_macro"] != written["task"]["auroc_macro"]
    assert not (run / TEST).exists()


def test_what_is_not_trained_yet_is_not_measured(csr: Call, run: Path) -> None:
    for name, there in (("best_model_stage1", False), ("model_stage2_epoch2", True)):
        document = document_of(csr, "--run", str(run / f"{name}.pth"))
        assert "task" not in document
        assert ("similarities" in document) is there
        assert (run / "evals" / f"test@{name}" / "report.html").exists()


@pytest.mark.parametrize("words", [("baselines",), ("intervene", "--oracle"), ("explain",)])
def test_there_is_no_verdict_before_the_last_stage(
    csr: Call, run: Path, words: tuple[str, ...]
) -> None:
    image = () if words[0] != "explain" else ("--id", "glyph_000000")
    code, out, err = csr(*words, *image, "--run", str(run / "best_model_stage1.pth"), "--cpu")
    assert (code, out) == (2, "")
    assert "of stage concept, so there is no verdict" in err
