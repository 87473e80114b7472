"""Measuring a trained network: verdict, concepts, and where it looks.

Letters: N images, K concepts, C classes.
"""

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from moectl.csr.data import Part
from moectl.csr.inference import Answers, Opened, open_network
from moectl.csr.localisation import localise
from moectl.csr.metrics import multiclass, multilabel, ranking, tune_thresholds
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.files import csv_text, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table


def run_eval(request: Request, split: Literal["test", "val"]) -> tuple[dict[str, Any], "Table"]:
    """Measure a network on the test or validation images, and write `evals/`.

    Returns:
        The JSON document, and a table of concepts and targets.
    """
    opened = open_network(request)
    part = opened.data.test if split == "test" else opened.data.val
    held = opened.answers(opened.data.val)
    answers = held if split == "val" else opened.answers(part)
    document = measure(opened, part, answers, held)
    folder = opened.folder / "evals" / f"{split}@{opened.tag}"
    if opened.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", document)
        write_text(folder / "predictions.csv", csv_text(_predictions(opened, part, answers)))
    return {"folder": str(folder), **document}, _table(document)


def measure(opened: Opened, part: Part, answers: Answers, held: Answers) -> dict[str, Any]:
    """Return every score as plain values; thresholds are tuned on the validation images.

    Args:
        opened: the network.
        part: the images.
        answers: what it says about them.
        held: what it says about the validation images.
    """
    data, section = opened.data, opened.settings.eval
    truth, names = part.concepts.numpy(), data.concepts
    thresholds = tune_thresholds(held.concept_logits.numpy(), data.val.concepts.numpy())
    draws: dict[str, Any] = {"draws": section.bootstrap, "seed": opened.settings.train.seed}
    document = {
        "images": len(truth),
        "weights": opened.weights,
        "concepts": multilabel(
            answers.concept_logits.numpy(), truth, names, thresholds=thresholds, **draws
        ),
        "similarities": ranking(answers.scores.amax(2).numpy(), truth, names),
        "task": _task(opened, part, answers, held, draws),
        "prototypes": answers.scores.shape[1] * answers.scores.shape[2],
        "explanations": len(names),
    }
    if any(part.boxes):
        document["pointing"] = {
            "cams": localise(answers.cams, part.boxes, names, logits=True),
            "similarities": localise(answers.maps, part.boxes, names),
        }
    return document


def _task(
    opened: Opened, part: Part, answers: Answers, held: Answers, draws: dict[str, Any]
) -> dict[str, Any]:
    names, logits = opened.data.targets, answers.logits.numpy()
    if part.targets.ndim == 1:
        return multiclass(logits, np.asarray(part.targets), names, **draws)
    truth = opened.data.val.targets.numpy()
    thresholds = tune_thresholds(held.logits.numpy(), truth)
    return multilabel(logits, part.targets.numpy(), names, thresholds=thresholds, **draws)


def _predictions(opened: Opened, part: Part, answers: Answers) -> list[dict[str, Any]]:
    several = part.targets.ndim == 2
    chances = answers.logits.sigmoid() if several else answers.logits.softmax(1)
    columns = torch.cat([chances, answers.concept_logits.sigmoid()], 1).tolist()
    names = [*opened.data.targets, *opened.data.concepts]
    return [
        {
            "image_id": image,
            **{name: round(value, 6) for name, value in zip(names, row, strict=True)},
        }
        for image, row in zip(part.image_ids, columns, strict=True)
    ]


def _table(document: dict[str, Any]) -> "Table":
    rows: list[list[object]] = []
    for kind in ("concepts", "similarities", "task"):
        found = document[kind]
        rows.append(
            [
                kind,
                "all",
                found["auroc_macro"],
                found["map"],
                found.get("f1_macro_tuned", found.get("f1_macro")),
                found.get("accuracy"),
            ]
        )
        for name, column in found["columns"].items():
            score = column.get("f1_tuned", column.get("f1"))
            rows.append([kind, name, column["auroc"], column["ap"], score, None])
    for kind, found in document.get("pointing", {}).items():
        words = f"hits {found['rate_micro']:.3f}, chance {found['chance_micro']:.3f}"
        rows.append([f"pointing, {kind}", words, None, None, None, None])
    columns = ("", "name", "AUROC", "AP", "F1", "accuracy")
    return console.table(columns, rows, f"{document['images']} images")
