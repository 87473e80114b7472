"""What came out of a sweep: a row for each cell, mean and deviation for each point of the grid."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from moectl.engine import console, plot
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, write_bytes, write_json, write_text
from moectl.engine.report import image, paragraphs, run_lines
from moectl.engine.report import table as markdown
from moectl.engine.run import read_record, status_of
from moectl.engine.settings import nearest
from moectl.engine.tracking import loads_or_none
from moectl.tools.sweep_cells import scores_of
from moectl.tools.sweep_plan import Plan, short, words_of

if TYPE_CHECKING:
    from rich.table import Table

_PANELS = 8  # scores in the picture


def collect(plan: Plan, failures: Mapping[str, str]) -> dict[str, Any]:
    """Return the result of a sweep as far as it has come, as a JSON document.

    Args:
        plan: the sweep.
        failures: name of a cell to the reason why it has no scores.
    """
    cells = [_cell(plan, number, failures) for number in range(len(plan.cells))]
    points = [
        _point([one for one in cells if one["point"] == point])
        for point in _distinct([one["point"] for one in cells])
    ]
    return {
        "name": plan.name,
        "folder": str(plan.folder),
        "file": plan.file,
        "command": plan.command,
        "eval": " ".join(plan.eval),
        "weights": plan.weights,
        "grid": plan.axes,
        "seeds": plan.seeds,
        "settings": plan.settings,
        "cells": cells,
        "points": points,
    }


def write(plan: Plan, document: Mapping[str, Any]) -> None:
    """Write `sweep.json` and `sweep.csv`."""
    rows = [
        {
            "cell": one["cell"],
            **one["point"],
            **{name: one[name] for name in ("seed", "status", "reason", "seconds")},
            **one["scores"],
        }
        for one in document["cells"]
    ]
    # It says whose folder this is: a full disk must not leave the other alone in it.
    write_json(plan.folder / "sweep.json", document)
    write_text(plan.folder / "sweep.csv", csv_text(rows))


def chosen(document: Mapping[str, Any], wanted: Sequence[str], place: str) -> list[str]:
    """Return the scores to show: those that are wanted, or all.

    Raises:
        UserError: if no cell has one of them.
    """
    known = list(dict.fromkeys(name for one in document["cells"] for name in one["scores"]))
    for name in wanted:
        if known and name not in known:
            message = f"{place} {name}: no such score{nearest(name, known)}"
            raise UserError(message, f"there are: {', '.join(known)}")
    return list(wanted) or known


def tables(document: Mapping[str, Any], metrics: Sequence[str]) -> "list[Table]":
    """Return the table of the points, and that of the failed cells if there are any."""
    found = [
        console.table(*_layout(document, metrics), title="mean ± standard deviation over seeds")
    ]
    if failed := _failed(document):
        found.append(console.table(("failed cell", "reason"), failed))
    return found


def report(plan: Plan, document: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Write `report.md` and `plots/scores.png` of a sweep."""
    drawn = [name for name in metrics if any(_has(one, name) for one in document["points"])]
    picture = plan.folder / "plots" / "scores.png"
    if drawn:
        picture.parent.mkdir(exist_ok=True)
        _draw(picture, document, drawn[:_PANELS])
    seconds = sum(one["seconds"] or 0 for one in document["cells"])
    argv = ["moectl", "sweep", plan.file]
    failed = _failed(document)
    cells = [
        (f"[{one['cell']}]({one['cell']}/)", one["status"], one["seconds"])
        for one in document["cells"]
    ]
    parts = [
        run_lines(plan.name, {"argv": shlex.join(argv), "wall_seconds": seconds}),
        f"Every cell: `moectl {plan.command}`"
        + (f", measured by `moectl {document['eval']}`." if plan.eval else "."),
        "## Scores\n\nMean ± standard deviation (n - 1) over n seeds.",
        markdown(*_layout(document, metrics)),
        image("plots/scores.png", "scores") if drawn else "",
        f"Drawn are the first {_PANELS} scores." if len(drawn) > _PANELS else "",
        "## Failed\n\n" + markdown(("cell", "reason"), failed) if failed else "",
        "## Cells\n\n" + markdown(("cell", "status", "seconds"), cells),
    ]
    # The name of a file may hold what is no UTF-8.
    write_bytes(plan.folder / "report.md", paragraphs(parts).encode("utf-8", "replace"))


def _cell(plan: Plan, number: int, failures: Mapping[str, str]) -> dict[str, Any]:
    cell = plan.cells[number]
    folder = plan.folder / cell.name
    there = isinstance(loads_or_none(folder / "run.json"), dict)
    record = read_record(folder) if there else {}
    status = status_of(record) if there else "new"
    if cell.name in failures:
        status = "failed"
    return {
        "cell": cell.name,
        "point": cell.point,
        "seed": cell.seed,
        "status": status,
        "reason": failures.get(cell.name) or record.get("reason", ""),
        "seconds": record.get("wall_seconds"),
        "scores": scores_of(plan, cell) if status == "finished" else {},
    }


def _point(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and deviation of every score over the cells of one point."""
    names = dict.fromkeys(name for one in cells for name in one["scores"])
    return {
        "point": cells[0]["point"],
        "n": sum(one["status"] == "finished" for one in cells),
        "failed": sum(one["status"] == "failed" for one in cells),
        "scores": {
            name: _summary([one["scores"][name] for one in cells if name in one["scores"]])
            for name in names
        },
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    spread = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "std": spread, "n": len(values)}


def _distinct(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point for place, point in enumerate(points) if point not in points[:place]]


def _layout(
    document: Mapping[str, Any], metrics: Sequence[str]
) -> tuple[list[str], list[list[object]]]:
    """Return columns and rows; the longer of points and scores goes down."""
    points, axes = document["points"], list(document["grid"])
    if axes and len(metrics) <= max(len(points), 4):
        rows = [
            [
                *map(_plain, one["point"].values()),
                _count(one),
                *(_mean(one, name) for name in metrics),
            ]
            for one in points
        ]
        return [*short(axes), "n", *metrics], rows
    names = [words_of(one["point"]) or "all" for one in points]
    rows = [[name, *(_mean(one, name) for one in points)] for name in metrics]
    return ["", *names], [["n", *map(_count, points)], *rows]


def _count(point: Mapping[str, Any]) -> object:
    failed = point["failed"]
    return f"{point['n']} ({failed} failed)" if failed else point["n"]


def _mean(point: Mapping[str, Any], name: str) -> str | None:
    """Write mean ± deviation; also of how many, if not all of the point have this score."""
    if not _has(point, name):
        return None
    score = point["scores"][name]
    spread = "" if score["std"] is None else f" ± {score['std']:.2g}"
    count = "" if score["n"] == point["n"] else f" (n = {score['n']})"
    return f"{score['mean']:.4g}{spread}{count}"


def _has(point: Mapping[str, Any], name: str) -> bool:
    return name in point["scores"]


def _plain(value: Any) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number else words_of({"": value}).removeprefix("=")


def _failed(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(one["cell"], one["reason"]) for one in document["cells"] if one["status"] == "failed"]


def _draw(path: Path, document: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Draw the scores over the only axis if it has numbers, else side by side."""
    points, axes = document["points"], list(document["grid"])
    numeric = len(axes) == 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in document["grid"][axes[0]]
    )
    places: Sequence[Any] = [words_of(one["point"]) or "all" for one in points]
    if numeric:
        places = [one["point"][axes[0]] for one in points]
    panels = {name: [_bar(one, name) for one in points] for name in metrics}
    plot.spreads(path, places, panels, title=document["name"], x_label=axes[0] if numeric else "")


def _bar(point: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    if not _has(point, name):
        return None
    score = point["scores"][name]
    return score["mean"], score["std"] or 0.0
