"""One table of the mixture and everything it must be weighed against, on the same test images.

Letters: N images, E specialists, C classes.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moectl.common.intervals import paired, wilson
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, is_file, write_json, write_text
from moectl.engine.inference import predict
from moectl.engine.references import finished_runs
from moectl.engine.settings import dump, flatten, free, from_toml
from moectl.engine.sources import Source
from moectl.taskmoe.baselines import own_accuracy, routing, union_logits
from moectl.taskmoe.inference import Opened, examine, for_task, open_mixture
from moectl.taskmoe.model import MergedMoE
from moectl.taskmoe.pictures import comparison
from moectl.taskmoe.report import report_again
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.stages import (
    MERGED,
    find_specialists,
    merged,
    merged_from,
)
from moectl.taskmoe.weights import Member, read_mixture, read_specialist, rebuild

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

NAMES = {
    "oracle": "specialists, the owner of each image known",
    "concatenated_logits": "specialists, highest logit",
    "concatenated_softmax": "specialists, highest probability",
    "calibrated_softmax": "specialists, highest calibrated probability",
    "max_probability": "the specialist with the highest probability",
    "entropy": "the specialist with the lowest entropy",
    "average": "averaged and recalibrated, no training",
    "align": "aligned, averaged and recalibrated, no training",
    "start": "mixture before its training",
    "mixture": "mixture",
    "scratch": "mixture trained from random weights",
    "dense": "one dense network of as many weights",
}
_HINTS = {
    "start": "a training from --merged none has no start to compare with",
    "scratch": "moectl taskmoe train --merged none with the same settings trains it",
    "dense": "moectl taskmoe specialist --specialist 0 with the same settings trains it",
}


@dataclass(frozen=True)
class Row:
    """A classifier of the table."""

    name: str
    right: Tensor | None
    """(N,) where it is right; None if there is no such run."""
    note: str = ""


def run_compare(
    request: Request, task: str, references: Sequence[str], against: str
) -> "tuple[dict[str, Any], Table]":
    """Compare a trained mixture with its baselines, and write `evals/comparison@TAG/`.

    Args:
        request: the run, its weights and settings.
        task: whose newest training is compared instead.
        references: its specialists, if not those that it was merged from.
        against: the row that the others are compared with.

    Returns:
        The JSON document, and a table.

    Raises:
        UserError: if the specialists are gone, or there is no such row.
    """
    if against not in NAMES:
        raise UserError(f"--against {against}: no such row", f"one of {', '.join(NAMES)}")
    opened = open_mixture(for_task(request, task))
    members = _members(opened, references)
    logits = _union(opened, members, opened.data.test)
    rows = {**_routed(opened, members, logits), **_merged(opened, members), **_trained(opened)}
    if rows[against].right is None:
        raise UserError(f"--against {against}: {_HINTS[against]}")
    document: dict[str, Any] = {
        "weights": opened.weights,
        "task": opened.settings.data.task,
        "against": against,
        "images": len(opened.data.test),
        "own_classes": _own(opened, logits),
        "rows": _measured(rows, against, opened.settings),
        "seeds": _seeds(opened),
    }
    folder = opened.folder / "evals" / f"comparison@{opened.tag}"
    if opened.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", document)
        write_text(folder / "comparison.csv", csv_text(document["rows"]))
        comparison(folder / "comparison.png", document["rows"])
        report_again(opened.folder)
        log.info("tables and pictures: %s", folder)
    for row in document["rows"]:
        if row["accuracy"] is None:
            log.info("%s: not measured; %s", row["name"], row["note"])
    return {"folder": str(folder), **document}, _table(document)


def _members(opened: Opened, references: Sequence[str]) -> list[Member]:
    settings, start = opened.settings, opened.folder / MERGED
    if references:
        return find_specialists(settings, references)
    mixture = read_mixture(start, settings) if is_file(start) else None
    return merged_from(settings, mixture, "name them with --specialists")


def _union(opened: Opened, members: Sequence[Member], source: Source) -> Tensor:
    """Return what all specialists make of all images, (N, E, C)."""
    data, given = opened.data, (opened.data.mean, opened.data.std)
    size, found, rows = opened.settings.eval.batch_size, [], []
    for member in members:
        ask = member.asking(given, opened.accelerator.device)
        logits, _ = predict(ask, source, opened.accelerator, size)
        found.append(logits)
        rows.append([data.class_ids.index(id) for id in member.class_ids])
    return union_logits(found, rows, len(data.class_names))


def _routed(opened: Opened, members: Sequence[Member], logits: Tensor) -> dict[str, Row]:
    data = opened.data
    val = _union(opened, members, data.val)
    labels = data.test.labels.cpu()
    found = routing(logits, labels, data.owners, val_logits=val, val_labels=data.val.labels.cpu())
    return {name: Row(NAMES[name], found[name] == labels) for name in NAMES if name in found}


def _own(opened: Opened, logits: Tensor) -> list[dict[str, Any]]:
    """Return how each specialist does on the images of its own classes alone."""
    data: Any = opened.data
    labels = data.test.labels.cpu()
    names, counts = data.facts["specialists"], data.owners[labels].sum(0).int().tolist()
    accuracies = own_accuracy(logits, labels, data.owners)
    return [
        {"specialist": name, "n": count, **_share(round((accuracy or 0) * count), count)}
        for name, accuracy, count in zip(names, accuracies, counts, strict=True)
    ]


def _merged(opened: Opened, members: Sequence[Member]) -> dict[str, Row]:
    """Return the mixtures that no training has touched."""
    rows = {}
    for method in ("average", "align"):
        plain = {"bn": "recalibrate", "classifier_init": "assembled", "gate_init": "uniform"}
        section = opened.settings.merge.model_copy(update={"method": method, **plain})
        settings = opened.settings.model_copy(update={"merge": section})
        model, _ = merged(settings, opened.data, members, opened.accelerator.device)
        rows[method] = Row(NAMES[method], _right(opened, model.eval()))
    start = opened.folder / MERGED
    rows["start"] = Row(NAMES["start"], None, _HINTS["start"])
    if is_file(start):
        rows["start"] = Row(NAMES["start"], _of_file(opened, start))
    return rows


def _right(opened: Opened, model: MergedMoE) -> Tensor:
    data, size = opened.data, opened.settings.eval.batch_size
    found = examine(model, data.test, opened.accelerator, size)
    return found.logits().argmax(1) == found.labels


def _of_file(opened: Opened, path: Path) -> Tensor:
    model = rebuild(read_mixture(path, opened.settings))
    return _right(opened, model.to(opened.accelerator.device))


def _trained(opened: Opened) -> dict[str, Row]:
    """Return the mixture, and what else was trained on all classes in the same way."""
    return {
        "mixture": Row(NAMES["mixture"], _right(opened, opened.model)),
        "scratch": _scratch(opened),
        "dense": _dense(opened),
    }


def _scratch(opened: Opened) -> Row:
    wanted = _recipe(opened.settings, "merge.", "eval.", "specialist.")
    for folder, record in finished_runs("taskmoe", "train"):
        settings = from_toml(TaskmoeSettings, folder / "settings.toml")
        alike = _recipe(settings, "merge.", "eval.", "specialist.") == wanted
        if alike and not record.get("parents"):
            right = _of_file(opened, folder / "best_model.pth")
            return Row(NAMES["scratch"], right, str(folder))
    return Row(NAMES["scratch"], None, _HINTS["scratch"])


def _dense(opened: Opened) -> Row:
    """Return the dense network that was trained like the mixture, and is as large."""
    own = ("merge.", "eval.", "specialist.", "gate.", "loss.", "train.")

    def recipe(settings: TaskmoeSettings) -> tuple[Any, ...]:
        return _recipe(settings, *own), settings.train.epochs, settings.train.batch_size

    for folder, _ in finished_runs("taskmoe", "specialist"):
        settings = from_toml(TaskmoeSettings, folder / "settings.toml")
        alike = recipe(settings) == recipe(opened.settings)
        if alike and settings.specialist.number == 0:
            member = read_specialist(folder / "best_model.pth", opened.settings, 0)
            logits = _union(opened, [member], opened.data.test)[:, 0]
            right = logits.argmax(1) == opened.data.test.labels.cpu()
            return Row(NAMES["dense"], right, str(folder))
    return Row(NAMES["dense"], None, _HINTS["dense"])


def _share(hits: int, count: int) -> dict[str, float]:
    low, high = wilson(hits, count)
    return {"accuracy": 100 * hits / count, "low": 100 * low, "high": 100 * high}


def _measured(
    rows: Mapping[str, Row], against: str, settings: TaskmoeSettings
) -> list[dict[str, Any]]:
    reference = rows[against].right
    assert reference is not None
    described = []
    for key in NAMES:
        row = rows[key]
        entry: dict[str, Any] = {"key": key, "name": row.name, "n": len(reference)}
        if row.right is None:
            entry |= dict.fromkeys(("accuracy", "low", "high", "difference"))
            entry |= dict.fromkeys(("difference_low", "difference_high", "p_value"))
        else:
            draws = settings.eval.bootstrap
            gain = paired(row.right, reference, max(draws, 1), settings.eval.seed)
            bounds = (100 * gain.low, 100 * gain.high) if draws else (None, None)
            entry |= _share(int(row.right.sum()), len(row.right))
            entry |= {"difference": 100 * gain.difference, "p_value": gain.p_value}
            entry |= {"difference_low": bounds[0], "difference_high": bounds[1]}
        described.append({**entry, "note": row.note})
    return described


def _seeds(opened: Opened) -> dict[str, Any]:
    """Return mean and deviation over all trainings that differ from this one in the seed alone."""
    wanted, origin = _recipe(opened.settings, "eval.", "specialist."), opened.folder / MERGED
    found: dict[int, float] = {}
    for folder, record in finished_runs("taskmoe", "train"):
        settings = from_toml(TaskmoeSettings, folder / "settings.toml")
        accuracy = record.get("scores", {}).get("best", {}).get("overall_accuracy")
        merged_alike = is_file(folder / MERGED) == is_file(origin)
        alike = merged_alike and _recipe(settings, "eval.", "specialist.") == wanted
        if accuracy is not None and alike:
            own = folder.resolve() == opened.folder.resolve()
            others = {} if own else found
            found = {**found, settings.train.seed: float(accuracy), **others}
    values = list(found.values())
    return {
        "accuracies": {str(seed): value for seed, value in sorted(found.items())},
        "mean": statistics.mean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _recipe(settings: TaskmoeSettings, *without: str) -> dict[str, Any]:
    """Return the settings that shape a result, but for the seed and some tables."""
    marks = free(TaskmoeSettings)
    irrelevant = {"train.seed", *(key for key, mark in marks.items() if not mark.grows)}
    return {
        name: value
        for name, value in flatten(dump(settings)).items()
        if name not in irrelevant and not name.startswith(without)
    }


def _table(document: Mapping[str, Any]) -> "Table":
    rows: list[list[object]] = [
        [f"{one['specialist']}: its own classes", one["accuracy"], one["low"], one["high"]]
        + [None] * 4
        for one in document["own_classes"]
    ]
    keys = ("accuracy", "low", "high")
    more = ("difference", "difference_low", "difference_high", "p_value")
    rows += [[row["name"], *(row[key] for key in (*keys, *more))] for row in document["rows"]]
    seeds = document["seeds"]
    if seeds["std"] is not None:
        count = len(seeds["accuracies"])
        low, high = (seeds["mean"] + sign * seeds["std"] for sign in (-1, 1))
        rows.append([f"mixture, {count} seeds ± deviation", seeds["mean"], low, high, *[None] * 4])
    columns = ("", *keys, f"less {document['against']}", "low", "high", "McNemar p")
    return console.table(columns, rows, f"Percent of {document['images']} test images")
