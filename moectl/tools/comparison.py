"""One picture of several runs: their curves over the epochs, and their scores at the end."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.errors import UserError
from moectl.engine.figure import (
    INK,
    PALETTE,
    name_axis,
    new_axes,
    new_figure,
    write_names,
    write_png,
)
from moectl.engine.settings import flatten, nearest
from moectl.engine.tracking import FIRST, MetricsFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Mapping[int, float]
"""Epoch to value."""
Column = Sequence[float]
"""A value for each run."""

_SHOWN = 6  # curves, and as many scores; more could not be read
_FIRST = ("val/", "train/loss", "train/")
_COUNTS = ("epoch", "images")  # stand among the scores, and are none
_STYLES = ("-", "--", ":", "-.")


def curves(folder: Path) -> Mapping[str, Curve]:
    """Return the metrics of a run by column, the last value of each epoch.

    Where a run has a file of metrics for each stage, the stage comes before the column.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("metrics*.csv")):
        stage = path.stem.removeprefix("metrics").strip("_")
        for row in MetricsFile(path).rows():
            for column, text in row.items():
                if column not in FIRST and text:
                    name = f"{stage} {column}".strip()
                    found.setdefault(name, {})[int(row["epoch"])] = float(text)
    return found


def shared_curves(runs: Sequence[Mapping[str, Curve]], wanted: str | None) -> list[str]:
    """Return the columns to draw: the one that is wanted, or what all runs have, scores first.

    Raises:
        UserError: if what is wanted is not in every run.
    """
    common = [name for name in runs[0] if all(name in run for run in runs)]
    if wanted is None:
        return sorted((name for name in common if _place(name) < len(_FIRST)), key=_place)[:_SHOWN]
    if wanted not in common:
        raise UserError(
            f"--metric {wanted}: not in the metrics of every run{nearest(wanted, common)}",
            f"they share: {', '.join(common) or 'nothing'}",
        )
    return [wanted]


def _place(name: str) -> int:
    column = name.rpartition(" ")[2]
    return next(
        (place for place, word in enumerate(_FIRST) if column.startswith(word)), len(_FIRST)
    )


def shared_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the scores that every run has, a value for each."""
    runs = [flatten(record.get("scores") or {}) for record in records]
    values: dict[str, list[Any]] = {name: [run.get(name) for run in runs] for name in runs[0]}
    names = [
        name
        for name, found in values.items()
        if not name.endswith(_COUNTS) and all(type(one) in (int, float) for one in found)
    ]
    return {name: values[name] for name in names[:_SHOWN]}


def draw(
    path: Path,
    names: Sequence[str],
    metrics: Mapping[str, Sequence[Curve]],
    scores: Mapping[str, Column],
) -> None:
    """Draw a panel for each metric, a line for each run in it, and bars for each score.

    Args:
        path: the PNG file.
        names: of the runs; each has its colour everywhere.
        metrics: column to the curves of the runs.
        scores: name to the values of the runs.
    """
    panels = len(metrics) + len(scores)
    columns = min(2, panels)
    rows = math.ceil(panels / columns)
    figure = new_figure(5.6 * columns, 2.9 * rows + 0.25 * len(names) + 0.3)
    figure.set_layout_engine("constrained", wspace=0.05, hspace=0.05)
    for number, (title, found) in enumerate(metrics.items(), 1):
        axes = new_axes(figure, (rows, columns, number), title=title, x_label="epoch", y_label="")
        _lines(axes, found)
    for number, (title, values) in enumerate(scores.items(), len(metrics) + 1):
        axes = new_axes(figure, (rows, columns, number), title=title, x_label="", y_label="")
        _bars(axes, values)
    handles = figure.axes[0].get_lines() if metrics else list(figure.axes[0].patches)
    legend = figure.legend(
        handles, [""] * len(names), loc="outside lower center", fontsize=9, frameon=False,
        handlelength=3.0,
    )  # fmt: skip
    write_names(legend, names)
    write_png(figure, path)


def _lines(axes: "Axes", found: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, curve in enumerate(found):
        epochs = sorted(curve)
        axes.plot(
            epochs,
            [curve[epoch] for epoch in epochs],
            color=PALETTE[number % len(PALETTE)],
            linestyle=_STYLES[number // len(PALETTE) % len(_STYLES)],
            linewidth=1.8,
            marker="o" if len(epochs) <= 20 else "",  # a single point has no line to be seen
            markersize=3.5,
        )
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _bars(axes: "Axes", values: Column) -> None:
    places = range(len(values))
    colours = [PALETTE[place % len(PALETTE)] for place in places]
    bars = axes.barh(places, values, 0.7, color=colours)
    axes.bar_label(bars, [f"{value:.4g}" for value in values], padding=3, fontsize=9, color=INK)
    axes.margins(x=0.18)  # room for the numbers
    axes.grid(visible=False, axis="y")
    name_axis(axes, "y", [""] * len(values))
    axes.invert_yaxis()
