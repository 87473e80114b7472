"""Figures and axes in one theme, without global state, written as PNG files."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moectl.engine.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

Scale = Literal["plain", "percent", "log"]
"""How an axis is written; `percent` is for fractions."""

# Source: Okabe & Ito 2008, a palette that colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
INK, GRID = "#262626", "#E3E3E3"


def new_figure(width: float, height: float) -> "Figure":
    """Return a figure of so many inches.

    It stands alone: pyplot would keep a global list and choose a window system.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(
    figure: "Figure",
    place: tuple[int, int, int],
    *,
    title: str,
    x_label: str,
    y_label: str,
    scale: Scale = "plain",
) -> "Axes":
    """Add axes to a figure.

    Args:
        figure: where to.
        place: rows and columns of a grid, and the number of the cell, from 1 on.
        title: above the axes.
        x_label: below them.
        y_label: beside them.
        scale: of the y axis.
    """
    axes = figure.add_subplot(*place)
    # Names come from users and data sets: a dollar sign in them is not a formula.
    axes.set_title(title, fontsize=12, color=INK, loc="left", parse_math=False)
    axes.set_xlabel(x_label, fontsize=10, color=INK, parse_math=False)
    axes.set_ylabel(y_label, fontsize=10, color=INK, parse_math=False)
    axes.tick_params(labelsize=9, color=GRID, labelcolor=INK)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    _scale(axes, scale)
    return axes


def _scale(axes: "Axes", scale: Scale) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def name_axis(axes: "Axes", axis: str, names: Sequence[str]) -> None:
    """Write names at 0, 1, … of the "x" or "y" axis; long ones on x are slanted."""
    slanted = axis == "x" and len(names) * max(map(len, names), default=0) > 50
    axes.tick_params(axis=axis, length=0)  # type: ignore[arg-type]
    side = axes.xaxis if axis == "x" else axes.yaxis
    side.set_ticks(
        range(len(names)),
        list(names),
        parse_math=False,
        rotation=40 if slanted else 0,
        ha="right" if slanted or axis == "y" else "center",
        rotation_mode="anchor" if slanted else "default",
    )


def write_names(legend: "Legend", names: Sequence[str]) -> None:
    """Write the names of a legend as they are: a dollar sign in them is not a formula."""
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def write_png(figure: "Figure", path: Path) -> None:
    """Write a figure whole or not at all; equal pictures make equal files."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be in scripts that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        # Without the version of the library in it, a file changes only when the picture does.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
