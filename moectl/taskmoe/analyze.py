"""What every expert and the gates of a mixture do, as numbers and pictures."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.files import csv_text, write_json, write_text
from moectl.taskmoe import analysis
from moectl.taskmoe.analysis import Examined
from moectl.taskmoe.heat_maps import expert_analysis, expert_map
from moectl.taskmoe.inference import Opened, for_task, open_mixture
from moectl.taskmoe.pictures import gate_simplex, temperature_sweep
from moectl.taskmoe.report import report_again

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
_MAPS = {
    "contribution": "Mean gate",
    "routing_share": "Share of images on which the gate is the largest",
    "forced_accuracy": "Accuracy with every image sent to one expert",
    "forced_accuracy_own": "The same, choosing among the expert's own classes",
    "knock_out": "Accuracy lost without the expert",
}


def run_analyze(
    request: Request,
    task: str,
    checkpoint: Path | None,
    temperature: float | None,
    out: Path | None,
) -> tuple[dict[str, Any], "Table"]:
    """Analyse the experts of a mixture on the test images.

    Args:
        request: the run, its weights and settings.
        task: whose newest training is analysed instead.
        checkpoint: a file to analyse instead.
        temperature: of the gates; that of the weights if None.
        out: where to write; `evals/` in the run if None.

    Returns:
        The JSON document, and a table with a row for every expert.
    """
    opened = open_mixture(for_task(request, task), checkpoint, temperature)
    examined = opened.examine()
    document = describe(opened, examined)
    folder = opened.folder / "evals" / f"analysis@{opened.tag}" if out is None else out
    if opened.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "expert_analysis.json", document)
        write_text(folder / "expert_analysis.csv", csv_text(_rows(document)))
        _draw(folder, opened, examined, document)
        if out is None:
            report_again(opened.folder)
        log.info("tables and pictures: %s", folder)
    return {"folder": str(folder), **document}, _table(document)


def describe(opened: Opened, examined: Examined) -> dict[str, Any]:
    """Return everything that `analysis` knows as plain values; accuracies are fractions."""
    data = opened.data
    sweep = analysis.temperature_sweep(examined, TEMPERATURES)
    return {
        "weights": opened.weights,
        "task": opened.settings.data.task,
        "images": len(examined.labels),
        "class_names": data.class_names,
        "specialists": data.facts["specialists"],
        "owners": data.owners.int().tolist(),
        "temperature": float(opened.model.temperature),
        **analysis.summary(examined, data.owners),
        "temperature_sweep": dict(zip(map(str, TEMPERATURES), sweep, strict=True)),
    }


def _rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for every expert and class."""
    attribution = document["attribution"]["experts"]
    return [
        {
            "expert": expert,
            "class": name,
            "owner": document["owners"][label][expert],
            **{kind: document[kind][expert][label] for kind in _MAPS},
            "logit": attribution[label][expert],
        }
        for expert in range(len(document["usage"]))
        for label, name in enumerate(document["class_names"])
    ]


def _draw(folder: Path, opened: Opened, examined: Examined, document: Mapping[str, Any]) -> None:
    names, owners = document["class_names"], document["owners"]
    expert_analysis(folder / "expert_analysis.png", document, names, owners)
    for kind, title in _MAPS.items():
        expert_map(
            folder / f"{kind}.png",
            document[kind],
            title=title,
            class_names=names,
            owners=owners,
            signed=kind == "knock_out",
        )
    sweep = document["temperature_sweep"]
    temperature_sweep(
        folder / "temperature_sweep.png",
        [float(one) for one in sweep],
        list(sweep.values()),
        document["temperature"],
    )
    if len(document["usage"]) == 3:
        groups = [owners[label].index(1) for label in examined.labels.tolist()]
        specialists: Any = opened.data.facts["specialists"]
        gate_simplex(folder / "gates.png", examined.gates.tolist(), groups, specialists)


def _table(document: Mapping[str, Any]) -> "Table":
    rows: list[list[object]] = []
    for expert, usage in enumerate(document["usage"]):
        owned = [label for label, row in enumerate(document["owners"]) if row[expert]]
        shares = [
            _mean([document[kind][expert][label] for label in owned])
            for kind in ("contribution", "forced_accuracy_own", "knock_out")
        ]
        specialist = document["specialists"][document["matching"][expert]]
        rows.append([expert, specialist, 100 * usage, *shares])
    columns = ("expert", "nearest specialist", "use", "gate", "accuracy alone", "lost without")
    title = (
        f"Percent of {document['images']} test images; gate, accuracy alone and lost without are"
        " on the classes of the specialist it comes from"
    )
    return console.table(columns, rows, title)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 100 * sum(known) / len(known) if known else None
