"""Measuring a trained mixture on the test images of its task."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moectl.common import scores
from moectl.engine import console, plot
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, write_json, write_text
from moectl.engine.seeding import key
from moectl.taskmoe import analysis
from moectl.taskmoe.analysis import Examined
from moectl.taskmoe.heat_maps import expert_analysis
from moectl.taskmoe.inference import Opened, for_task, open_mixture
from moectl.taskmoe.measures import counted_twice, measure
from moectl.taskmoe.pictures import Sample, sample_predictions
from moectl.taskmoe.report import evaluation_text, report_again

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)


def evaluate(
    opened: Opened, examined: Examined, count_shared_twice: bool = False
) -> dict[str, Any]:
    """Measure a mixture on its test images.

    Args:
        opened: the mixture and its data.
        examined: what it makes of the test images.
        count_shared_twice: count images of shared classes as often as the files hold them, as the
            published figures of task B do.

    Returns:
        A JSON document: the keys of `measures.measure`, and `usage`, `temperature`, `dedup`,
        `ablations`, `confusion`, `expert_analysis` and where all this comes from. Accuracies are
        percent.
    """
    data = opened.data
    logits = examined.logits()
    document = measure(logits, examined.labels, data.class_names, data.owners)
    if count_shared_twice:
        right = logits.argmax(1) == examined.labels
        document["overall_accuracy"] = counted_twice(right, data.test_counts)
        document["n"] = int(data.test_counts.sum())
        document["interval"] = None  # Wilson's is of images that are drawn independently
    found = analysis.summary(examined, data.owners)
    ablations = {name: 100 * share for name, share in found.pop("ablations").items()}
    cells = scores.confusion(logits.argmax(1), examined.labels, len(data.class_names))
    return {
        **document,
        "confusion": cells.tolist(),
        "count_shared_twice": count_shared_twice,
        "usage": found["usage"],
        "temperature": float(opened.model.temperature),
        "dedup": opened.settings.data.dedup,
        "ablations": ablations,
        "expert_analysis": found,
        "class_names": data.class_names,
        "specialists": data.facts["specialists"],
        "owners": data.owners.int().tolist(),
        "selected_on": opened.settings.train.select_on,
        "task": opened.settings.data.task,
        "leakage": data.facts["leakage"],
        "weights": opened.weights,
    }


def write_evaluation(
    folder: Path, opened: Opened, examined: Examined, document: Mapping[str, Any]
) -> list[Sample]:
    """Write tables, pictures and the text of an evaluation into a folder; return the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    names, owners = document["class_names"], document["owners"]
    write_json(folder / "results.json", document)
    write_text(folder / "predictions.csv", csv_text(_predictions(opened, examined)))
    cells = [
        {"true": name, **dict(zip(names, row, strict=True))}
        for name, row in zip(names, document["confusion"], strict=True)
    ]
    write_text(folder / "confusion_matrix.csv", csv_text(cells))
    picture = folder / "confusion_matrix.png"
    plot.confusion(picture, document["confusion"], title="Confusion", names=names)
    expert_analysis(folder / "expert_analysis.png", document["expert_analysis"], names, owners)
    samples = [_sample(opened, examined, row) for row in _chosen(opened, examined)]
    if samples:
        sample_predictions(folder / "sample_predictions.png", samples)
    else:
        (folder / "sample_predictions.png").unlink(missing_ok=True)
    pictures = [path.name for path in sorted(folder.glob("*.png"))]
    write_text(folder / "report.md", evaluation_text(document, pictures))
    return samples


def _predictions(opened: Opened, examined: Examined) -> list[dict[str, Any]]:
    names, data = opened.data.class_names, opened.data
    confidence, predicted = examined.logits().softmax(1).max(1)
    columns = (data.test_ids, examined.labels.tolist(), predicted.tolist(), confidence.tolist())
    rows = zip(*columns, examined.gates.tolist(), strict=True)
    return [
        {
            "row": row,
            "original_id": id,
            "label": names[label],
            "prediction": names[guess],
            "confidence": round(sure, 6),
            **{f"gate_{number}": round(gate, 6) for number, gate in enumerate(gates)},
        }
        for row, (id, label, guess, sure, gates) in enumerate(rows)
    ]


def _chosen(opened: Opened, examined: Examined) -> list[int]:
    """Choose an image of each of some classes, the same ones whenever the seed is the same."""
    draws = torch.Generator().manual_seed(key(opened.settings.eval.seed, "samples"))
    labels = examined.labels
    present = torch.tensor(sorted(set(labels.tolist())))
    order = torch.randperm(len(present), generator=draws)[: opened.settings.eval.num_samples]
    rows = [(labels == label).nonzero().flatten() for label in present[order]]
    return [int(row[torch.randint(len(row), (), generator=draws)]) for row in rows]


def _sample(opened: Opened, examined: Examined, row: int) -> Sample:
    names = opened.data.class_names
    confidence, predicted = examined.logits()[row].softmax(0).max(0)
    return Sample(
        image=opened.data.test.images[row].cpu(),
        true=names[int(examined.labels[row])],
        predicted=names[int(predicted)],
        confidence=float(confidence),
        gates=examined.gates[row].tolist(),
    )


def run_eval(  # noqa: PLR0913 - the options of a command
    request: Request,
    *,
    task: str,
    checkpoint: Path | None,
    model_dir: Path | None,
    out: Path | None,
    temperature: float | None,
    count_shared_twice: bool,
    show: bool,
) -> tuple[dict[str, Any], "Table"]:
    """Measure one mixture, or those of several tasks.

    Args:
        request: the run, its weights and settings.
        task: the task whose newest run is measured instead; `both` for A and B.
        checkpoint: a file to measure instead.
        model_dir: a folder of files instead; the one with the highest accuracy counts.
        out: where to write; `evals/` in the run if None.
        temperature: of the gates; that of the weights if None.
        count_shared_twice: see `evaluate`.
        show: open the pictures on the desktop.

    Returns:
        The JSON document, and a table.
    """
    tasks = ["A", "B"] if task == "both" else [task]
    if checkpoint and (model_dir or len(tasks) > 1):
        raise UserError("--checkpoint goes neither with --model-dir nor with --task both")
    documents, accelerator = [], None
    for one in tasks:
        file = checkpoint
        if model_dir:
            file = _most_accurate(model_dir, one)
        opened = open_mixture(for_task(request, one), file, temperature, accelerator)
        accelerator = opened.accelerator
        examined = opened.examine()
        document = evaluate(opened, examined, count_shared_twice)
        changed = "-twice" if count_shared_twice else ""
        folder = opened.folder / "evals" / f"test@{opened.tag}{changed}"
        if out is not None:
            folder = out / f"Task{one}" if len(tasks) > 1 else out
        if opened.accelerator.is_main_process:
            _announce(write_evaluation(folder, opened, examined, document), folder)
            if out is None:
                report_again(opened.folder)
            if show:
                _open(sorted(folder.glob("*.png")))
        documents.append({"folder": str(folder), **document})
    shown = documents[0] if len(documents) == 1 else {doc["task"]: doc for doc in documents}
    return shown, _table(documents)


def _announce(samples: Sequence[Sample], folder: Path) -> None:
    for sample in samples:
        gates = ", ".join(f"{gate:.4f}" for gate in sample.gates)
        mark = "✓" if sample.true == sample.predicted else "✗"
        log.info("%s -> %s %s  gates %s", sample.true, sample.predicted, mark, gates)
    log.info("tables and pictures: %s", folder)


def _most_accurate(root: Path, task: str) -> Path:
    """Return the weights file with the highest accuracy in its name, as the original wrote it."""
    own = root / f"Task{task}"
    folder = own if task and own.is_dir() else root
    files = sorted(folder.glob("*.pth")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: no .pth file in it", "--run REF measures a run")

    def accuracy(path: Path) -> float:
        found = re.search(r"_(\d+\.\d+)", path.stem)
        return float(found[1]) if found else 0.0

    return max(files, key=accuracy)


def _open(pictures: Sequence[Path]) -> None:
    import webbrowser

    for path in pictures:
        if not webbrowser.open(path.resolve().as_uri()):
            log.warning("%s: no program here opens pictures", path)
            return


def _table(documents: Sequence[Mapping[str, Any]]) -> "Table":
    rows: list[list[object]] = []
    for document in documents:
        names, classes = document["class_accuracies"], document["classes"]
        for name, accuracy in names.items():
            found = classes[name]
            bounds = (found["wilson_low"], found["wilson_high"])
            rows.append([document["task"], name, found["n"], accuracy, *bounds])
        low, high = document["interval"] or (None, None)
        overall = document["overall_accuracy"]
        rows.append([document["task"], "all", document["n"], overall, low, high])
    columns = ("task", "class", "images", "accuracy", "low", "high")
    return console.table(columns, rows, "Percent of the test images, with 95 % Wilson intervals")
