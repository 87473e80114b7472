"""Heat maps of who uses which expert.

Letters: L blocks, E experts, J spans of steps, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.engine.figure import GRID, new_axes, new_figure, write_png

_NAMED = 12  # more classes than this are numbered by the axis alone


def expert_usage(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the share of each expert, a row of panels per block: by step on the left, by class.

    Args:
        path: the PNG file.
        document: `blocks` (L names), `usage_by_step` (L, E, J), `usage_by_class` (L, E, C),
            `steps` and `class_names`.
    """
    from matplotlib.ticker import PercentFormatter

    by_step, by_class = document["usage_by_step"], document["usage_by_class"]
    blocks, experts = len(by_step), len(by_step[0])
    names = document["class_names"]
    # An even share is far below 1: on a scale that ends there all would look alike.
    largest = max(max(map(max, block)) for block in (*by_step, *by_class))
    figure = new_figure(9.6, 0.6 + blocks * (1.0 + 0.12 * experts))
    kinds: list[tuple[str, Sequence[Any], tuple[float, float]]] = [
        ("step of the process", by_step, (0, document["steps"])),
        ("class", by_class, (-0.5, len(names) - 0.5)),
    ]
    image = None
    axes = []
    for block in range(blocks):
        for column, (words, shares, (low, high)) in enumerate(kinds):
            last = block == blocks - 1
            one = new_axes(
                figure,
                (blocks, 2, 2 * block + column + 1),
                title=document["blocks"][block] if not column else "",
                x_label=words if last else "",
                y_label="expert" if not column else "",
            )
            one.grid(visible=False)
            image = one.imshow(
                shares[block],
                cmap="Blues",
                vmin=0,
                vmax=largest,
                aspect="auto",
                interpolation="nearest",
                extent=(low, high, experts - 0.5, -0.5),
            )
            one.set_yticks(range(0, experts, max(1, experts // 4)))
            if column and len(names) <= _NAMED:
                slanted = max(map(len, names)) > 3
                shown = names if last else [""] * len(names)
                one.set_xticks(
                    range(len(names)),
                    shown,
                    rotation=40 if slanted else 0,
                    ha="right" if slanted else "center",
                    parse_math=False,
                )
            axes.append(one)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), shrink=0.6)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=GRID)
    write_png(figure, path)
