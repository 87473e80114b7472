"""Pictures of a run: its curves, samples, gates and comparisons, drawn from plain numbers.

Letters: N images, E experts, H W pixels.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.figure import (
    GRID,
    INK,
    PALETTE,
    name_axis,
    new_axes,
    new_figure,
    write_names,
    write_png,
)
from moectl.engine.plot import known_points
from moectl.taskmoe.heat_maps import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = PALETTE[2], "#C62828"
"""Frames of samples; a cross in the text says it without colour."""

_MUTED = "#6B6B6B"
_PLAIN: dict[str, Any] = {"fontsize": 9, "frameon": False}  # legends
_WINDOW = 5  # points that a smoothed one is made of
_LENGTH = 26  # characters of a class name that fit above a sample
_NUMBERED = 12  # the bars of more experts have no room for their numbers


@dataclass(frozen=True)
class Sample:
    """An image and what the model made of it."""

    image: Any
    """(3, H, W) uint8, a tensor or an array."""
    true: str
    predicted: str
    confidence: float
    gates: Sequence[float]
    """(E,) with sum 1."""


def learning_curve(
    path: Path, rows: Sequence[Mapping[str, str]], best_epoch: int | None = None
) -> None:
    """Draw loss and accuracy over the epochs, and the temperature of the gates.

    Points are what was measured; lines are smoothed by local parabolas if 5 points are there.

    Args:
        path: the PNG file.
        rows: of metrics.csv, with `epoch` and any of `train/loss`, `val/loss`, `train/accuracy`,
            `val/accuracy` and `temperature`; cells may be empty.
        best_epoch: marked, if given.

    Source: Savitzky & Golay 1964.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(10.4, 4.2)
    figure.set_layout_engine("constrained", wspace=0.05)  # labels keep off the panel before
    drawn: dict[str, Any] = {}
    for number, quantity in enumerate(("loss", "accuracy"), 1):
        axes = new_axes(
            figure,
            (1, 2, number),
            title="",
            x_label="epoch",
            y_label=quantity,
            scale="percent" if quantity == "accuracy" else "plain",
        )
        locator = MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(locator)
        for color, part in enumerate(("train", "val")):
            name = {"train": "training", "val": "validation"}[part]
            curve = known_points(rows, f"{part}/{quantity}")
            drawn |= _draw_smoothed(axes, name, curve, PALETTE[color])
        if quantity == "accuracy":
            drawn |= _draw_temperature(axes, known_points(rows, "temperature"))
    if best_epoch is not None:
        style: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1, "zorder": 1}
        lines = [axes.axvline(best_epoch, **style) for axes in figure.axes[:2]]
        drawn[f"best epoch {best_epoch}"] = lines[0]
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=4, **_PLAIN)
    write_png(figure, path)


def _draw_smoothed(
    axes: "Axes", name: str, curve: tuple[list[float], list[float]], color: str
) -> dict[str, Any]:
    """Draw faint points and a line, and return name to line; nothing without points."""
    from scipy.signal import savgol_filter  # type: ignore[import-untyped]

    epochs, values = curve
    if not values:
        return {}
    smooth = len(values) >= _WINDOW
    size, alpha = (3.5, 0.35) if smooth else (5, 1)
    axes.plot(epochs, values, "o", color=color, alpha=alpha, markersize=size, markeredgewidth=0)
    line = savgol_filter(values, _WINDOW, polyorder=2) if smooth else values
    return {name: axes.plot(epochs, line, color=color, linewidth=1.8)[0]}


def _draw_temperature(axes: "Axes", curve: tuple[list[float], list[float]]) -> dict[str, Any]:
    if not curve[1]:
        return {}
    second = axes.twinx()
    mark = "." if len(curve[1]) == 1 else ""  # a single point has no line to be seen
    line = second.plot(*curve, marker=mark, color=PALETTE[3], linewidth=1.0)[0]
    second.set_ylim(0, 1.1 * max(curve[1]))
    second.set_ylabel("temperature", fontsize=10, color=INK)
    second.tick_params(labelsize=9, color=GRID, labelcolor=INK)
    second.spines[:].set_visible(False)
    return {"temperature": line}


def sample_predictions(path: Path, samples: Sequence[Sample]) -> None:
    """Draw images with true and predicted class, five in a row, and the gates below each.

    Args:
        path: the PNG file.
        samples: at least one; the frame is green if the prediction is right and red if not.
    """
    columns = min(5, len(samples))
    rows = math.ceil(len(samples) / columns)
    figure = new_figure(max(2.25 * columns, 2.8), 3.4 * rows)
    figure.set_layout_engine("constrained", h_pad=0.08)  # texts keep off the gates above
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        _draw_image(figure.add_subplot(grid[2 * row, column]), sample)
        gates = figure.add_subplot(grid[2 * row + 1, column])
        _draw_gates(gates, sample.gates, "gate" if column == 0 else "")
    write_png(figure, path)


def _draw_image(axes: "Axes", sample: Sample) -> None:
    import numpy as np

    axes.imshow(np.asarray(sample.image).transpose(1, 2, 0), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    right = sample.true == sample.predicted
    color = RIGHT if right else WRONG
    axes.spines[:].set(color=color, linewidth=3)
    texts = {
        f"true: {shortened(sample.true, _LENGTH)}": INK,
        f"{'✓' if right else '✗'} {shortened(sample.predicted, _LENGTH)}": color,
        f"confidence {100 * sample.confidence:.0f} %": _MUTED,
    }
    for line, (text, ink) in enumerate(reversed(texts.items())):
        axes.annotate(
            text,
            (0.5, 1),
            (0, 6 + 11 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=ink,
            parse_math=False,
        )


def _draw_gates(axes: "Axes", gates: Sequence[float], label: str) -> None:
    axes.bar(range(len(gates)), gates, 0.7, color=PALETTE[0])
    axes.set(xlim=(-0.6, len(gates) - 0.4), ylim=(0, 1), yticks=[0, 1])
    axes.set_xticks(range(len(gates)) if len(gates) <= _NUMBERED else [])
    axes.set_xlabel("expert", fontsize=8, color=INK)
    axes.set_ylabel(label, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, length=0, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)


def gate_simplex(
    path: Path,
    gates: Sequence[Sequence[float]],
    groups: Sequence[int],
    group_names: Sequence[str],
) -> None:
    """Draw the gates of every image as a point in a triangle whose corners are the experts.

    Args:
        path: the PNG file.
        gates: (N, 3) rows with sum 1.
        groups: (N,) number of the group, for instance the first owner of the true class.
        group_names: in the legend.

    Raises:
        ValueError: if there are not three experts.
    """
    if any(len(row) != 3 for row in gates):
        raise ValueError(f"a triangle shows the gates of 3 experts, not of {len(gates[0])}")
    figure = new_figure(6.0, 5.8)
    axes = new_axes(figure, (1, 1, 1), title="Gates of every image", x_label="", y_label="")
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-0.16, 1.16), ylim=(-0.08, 0.95))
    axes.spines[:].set_visible(False)
    height = math.sqrt(0.75)
    axes.plot([0, 1, 0.5, 0], [0, 0, height, 0], color=GRID, linewidth=1.2, zorder=1)
    _name_corners(axes, height)
    colors = [PALETTE[number % len(PALETTE)] for number in range(len(group_names))]
    axes.scatter(
        [second + third / 2 for _, second, third in gates],
        [third * height for _, _, third in gates],
        s=14,
        c=[colors[group] for group in groups],
        alpha=0.35,
        linewidths=0,
        zorder=2,
    )
    handles = [axes.plot([], [], "o", color=color, markersize=5)[0] for color in colors]
    legend = figure.legend(
        handles,
        [""] * len(handles),
        loc="outside lower center",
        ncols=3 if sum(map(len, group_names)) < 60 else 1,
        **_PLAIN,
    )
    write_names(legend, group_names)
    write_png(figure, path)


def _name_corners(axes: "Axes", height: float) -> None:
    for expert, (x, y, side) in enumerate(
        [(0, -0.03, "top"), (1, -0.03, "top"), (0.5, height + 0.02, "bottom")]
    ):
        axes.text(x, y, f"expert {expert}", ha="center", va=side, fontsize=10, color=INK)


def temperature_sweep(
    path: Path, temperatures: Sequence[float], accuracies: Sequence[float], current: float
) -> None:
    """Draw accuracy over the temperature of the gates.

    Args:
        path: the PNG file.
        temperatures: in rising order.
        accuracies: fractions, one for each temperature.
        current: the model's own temperature, marked.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    figure = new_figure(6.4, 4.0)
    axes = new_axes(
        figure,
        (1, 1, 1),
        title="",
        x_label="temperature of the gates",
        y_label="accuracy",
        scale="percent",
    )
    axes.plot(temperatures, accuracies, "o-", color=PALETTE[0], markersize=4, clip_on=False)
    label = f"the model's own, {current:.3g}"
    axes.axvline(current, color=PALETTE[1], linestyle="--", linewidth=1.4, label=label, zorder=1)
    few = len(temperatures) <= 12
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(temperatures) if few else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    # Differences of less than a percent should look small.
    low, high = min(accuracies), max(accuracies)
    room = max(0.02, 0.1 * (high - low))
    axes.set_ylim(max(low - room, 0), min(high + room, 1))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, **_PLAIN)
    write_png(figure, path)


def comparison(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw accuracies with their 95 % intervals below each other.

    Args:
        path: the PNG file.
        rows: from the top down, with `name`, `accuracy`, `low` and `high` in percent; without an
            accuracy a row is said to be not measured, without low and high it has no interval.
    """
    known = [place for place, row in enumerate(rows) if row["accuracy"] is not None]
    figure = new_figure(8.4, 0.4 * len(rows) + 1.2)
    axes = new_axes(figure, (1, 1, 1), title="", x_label="accuracy (%), 95 % interval", y_label="")
    axes.grid(visible=False, axis="y")
    name_axis(axes, "y", [textwrap.fill(row["name"], 40) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for place in known:
        _draw_interval(axes, place, rows[place])
    for place, row in enumerate(rows):
        text, ink = (_interval(row), INK) if place in known else ("not measured", _MUTED)
        at = axes.get_yaxis_transform()
        axes.text(1.03, place, text, transform=at, va="center_baseline", fontsize=9, color=ink)
    ends = [row[key] for row in rows for key in ("accuracy", "low", "high") if row[key] is not None]
    low, high = min(ends, default=0.0), max(ends, default=100.0)
    room = max(1.0, 0.05 * (high - low))
    axes.set_xlim(max(low - room, 0), min(high + room, 100))
    write_png(figure, path)


def _draw_interval(axes: "Axes", place: int, row: Mapping[str, Any]) -> None:
    if row["low"] is not None and row["high"] is not None:
        ends = (row["low"], row["high"])
        axes.plot(ends, [place] * 2, "|-", color=PALETTE[0], linewidth=1.4, clip_on=False)
    axes.plot(row["accuracy"], place, "o", color=PALETTE[0], markersize=6, clip_on=False)


def _interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None or row["high"] is None:
        return f"{row['accuracy']:.1f}"
    return f"{row['accuracy']:.1f}  ({row['low']:.1f} to {row['high']:.1f})"
