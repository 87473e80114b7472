"""Heat maps of experts and classes, drawn from plain lists.

Letters: E experts, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.figure import GRID, INK, PALETTE, name_axis, new_axes, new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Values = Sequence[Sequence[float | None]]
"""(E, C) of fractions; None is what could not be measured."""

FRAME, SEPARATOR = PALETTE[1], PALETTE[6]
"""Colours around the cells of owners, and between classes of different owners."""

_WRITTEN = 32  # the cells of more classes have no room for numbers
_SLANTED = 50  # the names of more classes have to stand upright
_NAMED = 120  # the names of more classes could not be read
_LENGTH = 32  # a longer name would leave no room for the map


def expert_map(
    path: Path,
    values: Values,
    *,
    title: str,
    class_names: Sequence[str],
    owners: Sequence[Sequence[int]],
    signed: bool = False,
) -> None:
    """Draw one fraction for every expert and class.

    Args:
        path: the PNG file.
        values: (E, C) from 0 to 1, or from -1 to 1; None is left white.
        title: above the map.
        class_names: of the columns; left out where they could not be read.
        owners: (C, E) of 0 and 1; cells of owners are framed, and a line separates neighbours
            that have not the same owners.
        signed: fractions may be negative; then the colours are centred at 0 and reach as far as
            the largest fraction.
    """
    _draw(path, {title: values}, class_names, owners, signed)


def expert_analysis(
    path: Path,
    document: Mapping[str, Any],
    class_names: Sequence[str],
    owners: Sequence[Sequence[int]],
) -> None:
    """Draw how well each expert does alone above how much of it the gates use.

    Args:
        path: the PNG file.
        document: `forced_accuracy` and `contribution`, (E, C) both.
        class_names: of the columns.
        owners: (C, E) of 0 and 1.
    """
    panels = {
        "Accuracy with every image sent to one expert": document["forced_accuracy"],
        "Mean gate": document["contribution"],
    }
    _draw(path, panels, class_names, owners, signed=False)


def _draw(
    path: Path,
    panels: Mapping[str, Values],
    class_names: Sequence[str],
    owners: Sequence[Sequence[int]],
    signed: bool,
) -> None:
    """Draw maps of one scale below each other: title to values."""
    experts, classes = len(next(iter(panels.values()))), len(class_names)
    # Inches: a cell must hold its number, many classes must still make a picture.
    width = min(max(0.46 * classes, 5.0), 16.0)
    height = min(0.42 * experts, 9.0)
    figure = new_figure(width + 1.6, len(panels) * (height + 0.5) + 1.6)
    limit = _limit(panels.values()) if signed else 1.0
    drawn = []
    for number, (title, values) in enumerate(panels.items(), 1):
        last = number == len(panels)
        axes = new_axes(
            figure,
            (len(panels), 1, number),
            title=title,
            x_label="class (framed: a class that the expert owns)" if last else "",
            y_label="expert",
        )
        drawn.append(_draw_map(axes, values, limit, signed))
        _mark_owners(axes, owners)
        _name(axes, class_names if last else [""] * classes, experts)
    _add_bar(figure, drawn, height * len(panels))
    write_png(figure, path)


def _limit(panels: Any) -> float:
    """Return the largest size of a value; 1 if all are 0."""
    sizes = (abs(value) for panel in panels for row in panel for value in row if value is not None)
    return max(sizes, default=0.0) or 1.0


def _draw_map(axes: "Axes", values: Values, limit: float, signed: bool) -> "AxesImage":
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    image = axes.imshow(
        [[math.nan if value is None else value for value in row] for row in values],
        cmap="PRGn" if signed else "Blues",
        vmin=-limit if signed else 0.0,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    written = len(values[0]) <= _WRITTEN
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if written or value is None:
                _write_cell(axes, (column, row), value, limit)
    return image


def _write_cell(axes: "Axes", place: tuple[int, int], value: float | None, limit: float) -> None:
    """Write percent, with a decimal if all are small; the z makes -0 to 0."""
    if value is None:
        text, ink = "–", INK
    else:
        text = f"{100 * value:z.1f}" if limit < 0.1 else f"{100 * value:z.0f}"
        ink = "white" if abs(value) > 0.6 * limit else INK
    axes.text(*place, text, ha="center", va="center_baseline", fontsize=8, color=ink)


def _mark_owners(axes: "Axes", owners: Sequence[Sequence[int]]) -> None:
    """Frame the cells of owners and separate classes of different owners."""
    from matplotlib.patches import Rectangle

    for column, (one, next_one) in enumerate(pairwise(owners)):
        if list(one) != list(next_one):
            axes.axvline(column + 0.5, color=SEPARATOR, linewidth=1)
    # Inside the cells: frames of neighbours do not touch, nor do they hide a separator.
    inset = 0.06 if len(owners) <= _WRITTEN else 0.12
    for column, row in enumerate(owners):
        for expert, owns in enumerate(row):
            if owns:
                corner = (column - 0.5 + inset, expert - 0.5 + 0.06)
                size = (1 - 2 * inset, 1 - 2 * 0.06)
                frame = Rectangle(corner, *size, fill=False, edgecolor=FRAME, linewidth=1.3)
                axes.add_artist(frame)  # add_patch would fit the axes to every frame: slow


def _name(axes: "Axes", class_names: Sequence[str], experts: int) -> None:
    names = [shortened(name, _LENGTH) for name in class_names]
    if len(names) <= _SLANTED:
        name_axis(axes, "x", names)
    elif len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    name_axis(axes, "y", [str(expert) for expert in range(experts)])
    axes.tick_params(length=0)


def shortened(name: str, length: int) -> str:
    """Cut a name so that it has no more characters than this."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _add_bar(figure: "Figure", drawn: "Sequence[AxesImage]", height: float) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes = [image.axes for image in drawn]
    bar = figure.colorbar(
        drawn[0],
        ax=axes,
        format=PercentFormatter(1),
        ticks=MaxNLocator(4 if height > 1.2 else 2),
        pad=0.01,
        aspect=max(4.0, height / 0.14),
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=GRID, labelcolor=INK)
