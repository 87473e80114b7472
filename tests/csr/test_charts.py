"""Curves and tables of a report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.csr import charts
from moectl.csr.charts import (
    Table,
    baseline_table,
    best_epoch,
    concept_table,
    learning_curves,
    pointing_table,
    skipped,
    study_table,
    summary,
    task_table,
)
from moectl.csr.metrics import multiclass, multilabel, ranking

NAMES = ["a", "b", "none"]
SCORES = ("rate", "chance", "iou")


def row(epoch: int, **values: float) -> dict[str, str]:
    cells = {name.replace("__", "/"): str(value) for name, value in values.items()}
    return {"epoch": str(epoch), **cells}


CONCEPT = [
    row(1, train__loss=2, val__loss=1.5, val__concept_auroc=0.6, val__concept_map=0.5),
    row(2, running__loss=3),
    row(2, train__loss=1, val__loss=1.2, val__concept_auroc=0.8, val__concept_map=0.4),
    row(3, train__loss=1, val__loss=1.3, val__concept_auroc=0.8, val__concept_map=0.9),
]
PROTOTYPE = [
    row(1, train__loss=1, val__assignment_accuracy=1, val__alive=4, val__within_mean=0.1),
    row(2, train__loss=1, val__assignment_accuracy=0.5, val__alive=5, val__across_mean=0.2),
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that would be written."""
    found: list[Any] = []
    monkeypatch.setattr(charts, "write_png", lambda figure, _: found.append(figure))
    return found


def document() -> dict[str, Any]:
    """Scores of twelve images, with a concept that none of them has."""
    draws = np.random.default_rng(0)
    logits = draws.normal(size=(12, 3))
    truth = (logits + draws.normal(size=(12, 3)) > 0).astype(float)
    truth[:, 2] = 0
    options: Any = {"thresholds": [0.4, 0.5, 0.6], "draws": 20}
    return {
        "images": 12,
        "concepts": multilabel(logits, truth, NAMES, **options),
        "similarities": ranking(logits, truth, NAMES),
        "task": multilabel(-logits, truth, NAMES, **options),
        "prototypes": {"count": 15, "kept": 14, "used": 3},
        "explanations": 3,
    }


def classes() -> dict[str, Any]:
    draws = np.random.default_rng(1)
    return multiclass(draws.normal(size=(12, 3)), np.arange(12) % 3, NAMES, draws=20)


def cells(table: Table, name: str) -> dict[str, object]:
    """Return the row of a name by column; of columns of equal names the last."""
    assert all(len(row) == len(table.columns) for row in table.rows)
    (found,) = (row for row in table.rows if row[0] == name)
    return dict(zip(table.columns, found, strict=True))


# Curves


def test_the_best_epoch_is_the_first_with_the_largest_score() -> None:
    assert best_epoch("concept", CONCEPT) == 2
    assert best_epoch("prototype", PROTOTYPE) == 1
    assert best_epoch("task", [row(1, val__task_auroc=0.5), row(2, val__task_auroc=0.6)]) == 2
    one_class = [row(1, val__macro_f1=0.9, val__accuracy=0.1), row(2, val__macro_f1=0.2)]
    assert best_epoch("task", one_class) == 1
    assert best_epoch("task", CONCEPT) is None
    assert best_epoch("concept", []) is None


def test_every_stage_has_its_curves(figures: list[Any]) -> None:
    stages = {"concept": CONCEPT, "prototype": PROTOTYPE}
    learning_curves(Path("x.png"), stages, {"concept": 2, "prototype": None})
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["stage 1, concepts", "", "stage 2, prototypes", "", "", ""]
    loss, score, _, right, alive, cosines = figure.axes
    training, validation, mark = loss.get_lines()
    assert list(training.get_ydata()) == [2, 1, 1], "epochs alone"
    assert list(validation.get_ydata()) == [1.5, 1.2, 1.3]
    assert list(score.get_lines()[0].get_ydata()) == [0.6, 0.8, 0.8]
    assert (mark.get_linestyle(), list(mark.get_xdata())) == ("--", [2, 2])
    assert list(right.get_lines()[0].get_ydata()) == [1, 0.5]
    assert alive.get_ylim()[0] == 0
    names = [text.get_text() for text in cosines.get_legend().get_texts()]
    assert names == ["within a concept", "across concepts"]
    assert all(line.get_linestyle() == "-" for line in right.get_lines()), "nothing is marked"


def test_curves_of_one_epoch_are_drawn(isolated: Path) -> None:
    learning_curves(isolated / "x.png", {"task": [row(1, train__loss=1)]}, {"task": None})
    assert (isolated / "x.png").read_bytes().startswith(b"\x89PNG")


# Tables


def test_a_summary_has_intervals_where_they_are_known() -> None:
    found = document()
    table = summary(found)
    low, high = found["concepts"]["intervals"]["auroc_macro"]
    line = cells(table, "AUROC of the concepts")
    assert line["value"] == f"{found['concepts']['auroc_macro']:.3f}"
    assert line["95 % interval"] == f"{low:.3f} – {high:.3f}"
    assert cells(table, "AUROC of the similarities")["95 % interval"] is None
    assert cells(table, "prototypes with a say")["value"] == 14
    words = [row[0] for row in table.rows]
    assert "macro-F1 of the verdict, tuned thresholds" in words
    assert "accuracy" not in words


def test_a_summary_of_classes_has_accuracies() -> None:
    found = {**document(), "task": classes()}
    line = cells(summary(found), "balanced accuracy")
    assert line["value"] == f"{found['task']['balanced_accuracy']:.3f}"
    assert line["95 % interval"] is not None
    assert "macro-F1 of the verdict, tuned thresholds" not in [
        row[0] for row in summary(found).rows
    ]


def test_concepts_are_listed_with_both_ways_of_finding_them() -> None:
    found = document()
    line = cells(concept_table(found), "a")
    one = found["concepts"]["columns"]["a"]
    assert line["images"] == one["positives"]
    assert line["AUROC"] == f"{one['auroc']:.3f}"
    assert line["AUROC of similarity"] == f"{found['similarities']['columns']['a']['auroc']:.3f}"
    assert line["F1 tuned"] == f"{one['f1_tuned']:.3f}"
    assert line["threshold"] == "0.400"
    low, high = found["concepts"]["intervals"]["columns"]["a"]["auroc"]
    assert line["95 % interval"] == f"{low:.3f} – {high:.3f}"
    nobody = cells(concept_table(found), "none")
    assert (nobody["images"], nobody["AUROC"], nobody["95 % interval"]) == (0, None, None)


def test_targets_have_thresholds_or_classes_a_recall() -> None:
    several = task_table(document())
    assert {"F1 at 0.5", "F1 tuned", "threshold", "ECE", "95 % interval"} <= set(several.columns)
    found = {**document(), "task": classes()}
    line = cells(task_table(found), "b")
    assert line["recall"] == f"{found['task']['columns']['b']['recall']:.3f}"
    assert not {"threshold", "95 % interval"} & set(line)


def test_what_could_not_be_scored_is_named() -> None:
    lines = skipped(document()["concepts"])
    assert lines == [
        "No AUROC, as no image has it or all have: none.",
        "No AP and F1, as no image has it: none.",
    ]
    assert skipped(classes()) == []


def test_pointing_is_set_beside_chance() -> None:
    def localised(rate: float) -> dict[str, Any]:
        one: dict[str, Any] = {"pairs": 4, "hits": 2, "rate": rate, "chance": 0.25, "iou": 0.5}
        means = {f"{name}_{end}": one[name] for name in SCORES for end in ("micro", "macro")}
        return {"pairs": 4, "columns": {"a": one, "b": {**one, "rate": None}}, **means}

    found = {"pointing": {"cams": localised(0.75), "similarities": localised(0.125)}}
    line = cells(pointing_table(found), "a")
    assert list(line.values()) == ["a", 4, "0.750", "0.125", "0.250", "0.500"]
    assert cells(pointing_table(found), "b")["map"] is None
    assert cells(pointing_table(found), "all boxes alike")["similarity"] == "0.125"


def test_baselines_stand_beside_csr() -> None:
    task = document()["task"]
    rows = [
        {"name": "csr", "inputs": 15, "parameters": 48, "p_value": None, "task": task},
        {"name": "linear head", "inputs": 8, "parameters": 27, "p_value": 3e-7, "task": task},
    ]
    line = cells(baseline_table({"rows": rows}), "linear head")
    assert (line["inputs"], line["p against csr"]) == (8, "3e-07")
    assert line["F1 tuned"] == f"{task['f1_macro_tuned']:.3f}"
    rows = [{**row, "task": classes()} for row in rows]
    line = cells(baseline_table({"rows": rows}), "csr")
    assert line["accuracy"] == f"{classes()['accuracy']:.3f}"
    assert line["p against csr"] is None


def test_corrections_are_counted() -> None:
    pair = {"before": 0.5, "after": 0.75, "change": 0.25}
    change = {"fixed": 5, "broke": 2, "net": 3, "p_value": 0.25, "f1_macro": pair}
    change["true_probability"] = {**pair, "after": None}
    one = {"name": "chosen", "mode": "drop", "margin": 0.3, "asked": 9, **change}
    found = study_table({"results": [one], "boxes": None})
    assert len(found.rows) == 1
    line = cells(found, "chosen: drop, margin 0.3")
    assert [line[name] for name in ("asked", "fixed", "broke", "net", "p")] == [9, 5, 2, 3, "0.25"]
    assert (line["macro-F1 after"], line["P(true) after"]) == ("0.750", None)
    boxes = study_table({"results": [one], "boxes": {"images": 7, **change}})
    assert cells(boxes, "true boxes")["asked"] == 7
