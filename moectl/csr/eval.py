"""Measuring a trained network: verdict, concepts, and where it looks.

Letters: N images, K concepts, C classes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from moectl.csr.curation import fingerprint
from moectl.csr.curation import read as read_curation
from moectl.csr.data import Part
from moectl.csr.inference import Answers, Opened, open_network
from moectl.csr.localisation import localise
from moectl.csr.metrics import multiclass, multilabel, ranking, tune_thresholds
from moectl.csr.report import report_again
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.files import csv_text, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table


def run_eval(
    request: Request, split: Literal["test", "val"], curation: Path | None = None
) -> tuple[dict[str, Any], "Table"]:
    """Measure a network on the test or validation images, and write `evals/`.

    Args:
        request: the run, its weights and settings.
        split: which images.
        curation: file that says which prototypes have a say, instead of what the weights say.

    Returns:
        The JSON document, and a table of concepts and targets.
    """
    opened = open_network(request)
    tag = opened.tag
    if curation:
        sizes = (opened.concepts, opened.model.num_prototypes)
        opened.model.kept.copy_(read_curation(curation, *sizes, fingerprint(opened.model)))
        tag = f"{tag}-curated-{curation.stem}"
    part = opened.part(split)
    held = opened.answers(opened.data.val)
    answers = held if split == "val" else opened.answers(part)
    document = measure(opened, part, answers, held)
    folder = opened.folder / "evals" / f"{split}@{tag}"
    if opened.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", document)
        write_text(folder / "predictions.csv", csv_text(_predictions(opened, part, answers)))
        report_again(opened.folder)
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
    stage = opened.facts["stage"]
    document: dict[str, Any] = {
        "images": len(truth),
        "weights": opened.weights,
        "concepts": multilabel(
            answers.concept_logits.numpy(), truth, names, thresholds=thresholds, **draws
        ),
        "explanations": len(names),
    }
    # What no stage has trained yet has nothing to say.
    if stage != "concept":
        document["similarities"] = ranking(answers.scores.amax(2).numpy(), truth, names)
        document["prototypes"] = _prototypes(opened, answers.scores, part.concepts)
    if stage == "task":
        document["task"] = measure_task(opened, part, answers.logits, held.logits)
    if any(part.boxes):
        document["pointing"] = {
            "cams": localise(answers.cams, part.boxes, names, logits=True),
        }
        if stage != "concept":
            similar = localise(answers.maps, part.boxes, names)
            document["pointing"]["similarities"] = similar
    return document


def measure_task(opened: Opened, part: Part, logits: Tensor, held: Tensor) -> dict[str, Any]:
    """Return the scores of logits (N, C), with intervals.

    Args:
        opened: the network.
        part: the images.
        logits: of these images, from this network or any other.
        held: logits of the validation images, on which thresholds are tuned.
    """
    names, section = opened.targets, opened.settings.eval
    draws: dict[str, Any] = {"draws": section.bootstrap, "seed": opened.settings.train.seed}
    if part.targets.ndim == 1:
        return multiclass(logits.numpy(), np.asarray(part.targets), names, **draws)
    thresholds = tune_thresholds(held.numpy(), opened.data.val.targets.numpy())
    return multilabel(logits.numpy(), part.targets.numpy(), names, thresholds=thresholds, **draws)


def _prototypes(opened: Opened, scores: Tensor, concepts: Tensor) -> dict[str, Any]:
    """Say how many prototypes there are, have a say, and are ever the nearest."""
    nearest = scores.argmax(2)  # (N, K)
    present = concepts >= 0.5
    used = [len(set(nearest[present[:, k], k].tolist())) for k in range(scores.shape[1])]
    return {
        "count": scores.shape[1] * scores.shape[2],
        "kept": int(opened.model.kept.sum()),
        "used": sum(used),
    }


def _predictions(opened: Opened, part: Part, answers: Answers) -> list[dict[str, Any]]:
    several = part.targets.ndim == 2
    chances = answers.logits.sigmoid() if several else answers.logits.softmax(1)
    columns = torch.cat([chances, answers.concept_logits.sigmoid()], 1).tolist()
    targets = opened.data.targets
    # A concept may be called as a target is.
    concepts = [f"concept {name}" if name in targets else name for name in opened.data.concepts]
    names = [*targets, *concepts]
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
        if kind not in document:
            continue
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
