"""Plots as PNG files: thin helpers over matplotlib with one theme and no global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.figure import (
    GRID,
    INK,
    PALETTE,
    Scale,
    name_axis,
    new_axes,
    new_figure,
    write_names,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Sequence[float | None]
"""Numbers to draw; None leaves a gap."""

Curves = Mapping[str, tuple[Sequence[float], Values]]
"""Name of the curve to (x, y)."""

_STYLES = ("-", "--", ":", "-.")
_PLAIN: dict[str, Any] = {"fontsize": 9, "frameon": False}  # legends
_NAMED = 30  # more names than this on an axis could not be read
_WRITTEN = 12  # a heat map with more classes than this has no room for numbers


def lines(
    path: Path,
    series: Curves,
    *,
    title: str,
    x_label: str,
    y_label: str,
    scale: Scale = "plain",
) -> None:
    """Draw curves.

    Args:
        path: the PNG file.
        series: the curves.
        title: above the axes.
        x_label: below the axes.
        y_label: beside the axes.
        scale: of the y axis.
    """
    figure = new_figure(6.4, 4.0)
    axes = new_axes(figure, (1, 1, 1), title=title, x_label=x_label, y_label=y_label, scale=scale)
    drawn = _draw_lines(axes, series, {name: number for number, name in enumerate(series)})
    _legend(axes, list(drawn.values()), list(drawn))
    write_png(figure, path)


def line_panels(
    path: Path,
    panels: Mapping[str, Curves],
    *,
    title: str,
    x_label: str,
    scale: Scale = "plain",
    looks: Mapping[str, int] | None = None,
) -> None:
    """Draw curves in several panels, two beside each other, with one legend below all of them.

    Args:
        path: the PNG file.
        panels: label of the y axis to curves; a name looks the same in every panel.
        title: above all panels.
        x_label: below the lowest panels.
        scale: of the y axes.
        looks: name to the number of its look: numbers that differ by the length of the palette
            share their colour and differ in line style. Left out, names are numbered in order.
    """
    columns = min(2, max(len(panels), 1))
    rows = max(1, math.ceil(len(panels) / columns))
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    looks = looks or {name: number for number, name in enumerate(names)}
    legend_rows = max(1, math.ceil(len(names) / 4))
    figure = new_figure(5.2 * columns, 3.4 * rows + 0.2 * legend_rows + 0.4)
    figure.set_layout_engine("constrained", wspace=0.05)  # labels keep off the panel before
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    drawn: dict[str, Any] = {}
    for number, (label, curves) in enumerate(panels.items(), 1):
        axes = new_axes(
            figure,
            (rows, columns, number),
            title="",
            x_label=x_label if number > len(panels) - columns else "",
            y_label=label,
            scale=scale,
        )
        drawn |= _draw_lines(axes, curves, looks)
    legend = figure.legend(
        [drawn[name] for name in names],
        [""] * len(names),
        loc="outside lower center",
        ncols=max(1, math.ceil(len(names) / legend_rows)),
        handlelength=3.0,  # as long as a line style needs to be told from another
        **_PLAIN,
    )
    write_names(legend, names)
    write_png(figure, path)


def _draw_lines(axes: "Axes", curves: Curves, looks: Mapping[str, int]) -> dict[str, Any]:
    """Draw curves and return name to line."""
    from matplotlib.ticker import MaxNLocator

    for name, (xs, ys) in curves.items():
        axes.plot(
            xs,
            _known(ys),
            color=PALETTE[looks[name] % len(PALETTE)],
            linestyle=_STYLES[looks[name] // len(PALETTE) % len(_STYLES)],
            linewidth=1.8,
            marker="o" if len(ys) <= 20 else "",  # a single point has no line to be seen
            markersize=3.5,
        )
    if all(float(x).is_integer() for xs, _ in curves.values() for x in xs):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return dict(zip(curves, axes.get_lines(), strict=True))


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, float | None]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    scale: Scale = "plain",
) -> None:
    """Draw groups of bars: name of the group to name of the bar to its height."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(len(names), 1)
    figure = new_figure(max(6.4, 0.3 * len(groups) * len(names)), 4.0)
    axes = new_axes(figure, (1, 1, 1), title=title, x_label=x_label, y_label=y_label, scale=scale)
    drawn = [
        axes.bar(
            [place + (number - (len(names) - 1) / 2) * width for place in range(len(groups))],
            _known([group.get(name) for group in groups.values()]),
            width,
            color=PALETTE[number % len(PALETTE)],
            edgecolor="white",
            linewidth=0.6,
        )
        for number, name in enumerate(names)
    ]
    axes.grid(visible=False, axis="x")
    name_axis(axes, "x", list(groups))
    _legend(axes, drawn, names)
    write_png(figure, path)


def bar_panels(
    path: Path,
    names: Sequence[str],
    panels: Mapping[str, Values],
    *,
    title: str,
    x_label: str,
    scales: Mapping[str, Scale],
) -> None:
    """Draw several quantities of the same items below each other.

    Args:
        path: the PNG file.
        names: the items, one bar each.
        panels: label of the y axis to values, from the top down.
        title: above the first panel.
        x_label: below the last panel.
        scales: label of the y axis to its scale; plain if not named.
    """
    figure = new_figure(min(12.8, max(6.4, 0.08 * len(names))), 2.2 * len(panels))
    for number, (label, values) in enumerate(panels.items()):
        last = number == len(panels) - 1
        axes = new_axes(
            figure,
            (len(panels), 1, number + 1),
            title=title if number == 0 else "",
            x_label=x_label if last else "",
            y_label=label,
            scale=scales.get(label, "plain"),
        )
        axes.bar(range(len(values)), _known(values), 0.85, color=PALETTE[number % len(PALETTE)])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="x")
        if len(names) <= _NAMED:
            name_axis(axes, "x", names if last else [""] * len(names))
    write_png(figure, path)


def spreads(
    path: Path,
    places: Sequence[float] | Sequence[str],
    panels: Mapping[str, Sequence[tuple[float, float] | None]],
    *,
    title: str,
    x_label: str,
) -> None:
    """Draw means with deviations below each other: lines over numbers, bars over names.

    Args:
        path: the PNG file.
        places: where the means stand on the x axis.
        panels: label of the y axis to (mean, deviation) at every place; None is left out.
        title: above the first panel.
        x_label: below the last panel.
    """
    named = [place for place in places if isinstance(place, str)]
    figure = new_figure(min(12.8, max(6.4, 0.5 * len(named))), 0.6 + 2.4 * len(panels))
    for number, (label, values) in enumerate(panels.items(), 1):
        axes = new_axes(
            figure,
            (len(panels), 1, number),
            title=title if number == 1 else "",
            x_label=x_label if number == len(panels) else "",
            y_label=label,
        )
        xs: Sequence[Any] = range(len(named)) if named else places
        known = sorted((x, *value) for x, value in zip(xs, values, strict=True) if value)
        columns = [[row[column] for row in known] for column in range(3)]
        color = PALETTE[(number - 1) % len(PALETTE)]
        if named:
            axes.bar(columns[0], columns[1], 0.7, color=color)
            name_axis(axes, "x", named if number == len(panels) else [""] * len(named))
            axes.set_xlim(-0.6, len(named) - 0.4)
        elif _spans_decades(places):
            axes.set_xscale("log")
        look = {"fmt": "none", "ecolor": INK} if named else {"marker": "o", "color": color}
        axes.errorbar(*columns, capsize=3, **look)  # type: ignore[arg-type]
    write_png(figure, path)


def _spans_decades(places: Sequence[Any]) -> bool:
    return min(places) > 0 and max(places) >= 30 * min(places)


def heat_map(
    path: Path,
    values: Sequence[Values],
    *,
    title: str,
    x_label: str,
    y_label: str,
    names: Sequence[str] = (),
) -> None:
    """Draw a matrix of fractions, for instance a confusion matrix with rows that sum to 1.

    Args:
        path: the PNG file.
        values: rows from the top down; None is left white.
        title: above the axes.
        x_label: below the axes.
        y_label: beside the axes.
        names: of rows and columns; left out where they could not be read.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(6.4, 5.4)
    axes = new_axes(figure, (1, 1, 1), title=title, x_label=x_label, y_label=y_label)
    axes.grid(visible=False)
    # The square root keeps small confusions visible beside a strong diagonal.
    image = axes.imshow(
        [_known(row) for row in values],
        cmap="Blues",
        norm=PowerNorm(0.5, 0, 1),
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), shrink=0.85)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=GRID)
    if names and len(names) <= _NAMED:
        name_axis(axes, "x", names)
        name_axis(axes, "y", names)
    if len(values) <= _WRITTEN:
        _write_cells(axes, values)
    write_png(figure, path)


def confusion(
    path: Path, counts: Sequence[Sequence[int]], *, title: str, names: Sequence[str]
) -> None:
    """Draw counts of predictions, rows are true classes, as shares of each row.

    Args:
        path: the PNG file.
        counts: of predictions; a row without any is left white.
        title: above the axes.
        names: of the classes.
    """
    shares: list[Values] = [
        [count / sum(row) for count in row] if sum(row) else [None] * len(row) for row in counts
    ]
    labels = {"x_label": "predicted class", "y_label": "true class"}
    heat_map(path, shares, title=f"{title}, percent of each row", names=names, **labels)


def _write_cells(axes: "Axes", values: Sequence[Values]) -> None:
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if value is not None:
                ink = "white" if value > 0.4 else INK
                text = f"{100 * value:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)


def reliability(
    path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str
) -> None:
    """Draw accuracy over confidence, one panel per model, and the gap between both.

    Args:
        path: the PNG file.
        panels: name to bins with `lower upper weight accuracy confidence`; empty bins have None.
        title: above all panels.

    Source: Guo et al. 2017.
    """
    columns = min(4, max(len(panels), 1))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = new_figure(max(4.0, 2.9 * columns), 3.1 * rows + 0.4)
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    for number, (name, bins) in enumerate(panels.items(), 1):
        axes = new_axes(
            figure,
            (rows, columns, number),
            title=f"{name}: ECE {100 * _gap(bins):.1f} %",
            x_label="confidence",
            y_label="accuracy" if number % columns == 1 or columns == 1 else "",
        )
        _draw_bins(axes, [entry for entry in bins if entry["accuracy"] is not None])
    drawn = figure.axes[0].get_legend_handles_labels() if panels else ([], [])
    figure.legend(*drawn, loc="outside lower center", ncols=3, **_PLAIN)
    write_png(figure, path)


def _draw_bins(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    left = [entry["lower"] for entry in bins]
    width = [entry["upper"] - entry["lower"] for entry in bins]
    hits = [entry["accuracy"] for entry in bins]
    gaps = [entry["confidence"] - entry["accuracy"] for entry in bins]
    axes.bar(left, hits, width, align="edge", color=PALETTE[5], edgecolor="white", label="accuracy")
    axes.bar(
        left,
        gaps,
        width,
        bottom=hits,
        align="edge",
        color=PALETTE[1],
        alpha=0.5,
        edgecolor=PALETTE[1],
        label="gap to confidence",
    )
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")


def _gap(bins: Sequence[Mapping[str, Any]]) -> float:
    filled = [entry for entry in bins if entry["accuracy"] is not None]
    return sum(entry["weight"] * abs(entry["accuracy"] - entry["confidence"]) for entry in filled)


def _legend(axes: "Axes", handles: Sequence[Any], names: Sequence[str]) -> None:
    """Name the series, right of the title, where nothing is hidden."""
    if len(names) < 2:
        return
    legend = axes.legend(
        handles,
        [""] * len(names),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        ncols=min(len(names), 3),
        **_PLAIN,
    )
    write_names(legend, names)


def _known(values: Values) -> list[float]:
    return [math.nan if value is None else value for value in values]


def known_points(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of a column of a table of epochs where both are finite numbers."""
    cells = [(row.get("epoch") or "nan", row.get(column) or "nan") for row in rows]
    numbers = [(float(epoch), float(value)) for epoch, value in cells]
    known = [pair for pair in numbers if all(map(math.isfinite, pair))]
    return [epoch for epoch, _ in known], [value for _, value in known]
