"""Contact sheets: the exemplars of each prototype of a concept, with the place that it looks at.

Letters: S side of a transformed image, T side of a small one.
"""

import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.figure import INK, PALETTE, new_figure, write_png

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

_SIDE = 128  # T at most
_PER_SHEET = 25  # prototypes; more would make a picture that viewers refuse
_TILE = 1.35  # inches
_WORDS, _BELOW = 1.15, 0.24  # tiles: the words at the left, the number below
_MUTED, _FADED = "#6B6B6B", "#B0B0B0"
_LOOKS, _WARNS = PALETTE[1], "#C62828"


def file_names(concepts: Sequence[str]) -> list[str]:
    """Return a name of ASCII letters, digits and underscores for each, all different.

    They differ by more than case, for there are file systems that do not tell it apart.
    """
    found: list[str] = []
    for concept in concepts:
        plain = unicodedata.normalize("NFKD", concept).encode("ascii", "ignore").decode()
        stem = re.sub(r"[^a-z0-9]+", "_", plain.lower()).strip("_")[:60] or "concept"
        name, number = stem, 1
        while name in found:
            number += 1
            name = f"{stem}_{number}"
        found.append(name)
    return found


def thumbnail(image: "Tensor") -> "NDArray[np.uint8]":
    """Shrink an image (3, S, S) in 0..1 to bytes (T, T, 3)."""
    import torch.nn.functional as F

    side = min(image.shape[-1], _SIDE)
    small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
    found: NDArray[np.uint8] = (small.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return found


def draw(
    stem: Path,
    prototypes: Sequence[Mapping[str, Any]],
    kept: Sequence[bool],
    images: "Mapping[int, NDArray[np.uint8]]",
) -> list[Path]:
    """Draw the prototypes of one concept below each other, with their exemplars side by side.

    Args:
        stem: the PNG file without its ending; sheets after the first end in "-2", "-3", ….
        prototypes: of one concept, as in the atlas.
        kept: of each; others are grey.
        images: small ones, by the row of an exemplar.

    Returns:
        The files.
    """
    paths = []
    for number, first in enumerate(range(0, len(prototypes), _PER_SHEET), 1):
        some = slice(first, first + _PER_SHEET)
        suffix = "" if number == 1 else f"-{number}"
        paths.append(stem.with_name(f"{stem.name}{suffix}.png"))
        _draw_sheet(paths[-1], prototypes[some], kept[some], images)
    return paths


def _draw_sheet(
    path: Path,
    prototypes: Sequence[Mapping[str, Any]],
    kept: Sequence[bool],
    images: "Mapping[int, NDArray[np.uint8]]",
) -> None:
    # Two columns at least, so that the title has room.
    columns = max(2, *(len(one["exemplars"]) for one in prototypes))
    height = (1 + _BELOW) * len(prototypes)
    figure = new_figure(_TILE * (columns + _WORDS), _TILE * height + 0.5)
    axes = figure.add_subplot()
    axes.set_axis_off()
    title = textwrap.shorten(prototypes[0]["concept"], 12 * columns, placeholder=" …")
    axes.set_title(title, fontsize=12, color=INK, loc="left", parse_math=False)
    for place, (prototype, keep) in enumerate(zip(prototypes, kept, strict=True)):
        top = place * (1 + _BELOW)
        _write_words(axes, top, prototype, keep)
        for column, exemplar in enumerate(prototype["exemplars"]):
            _draw_exemplar(axes, (column, top), exemplar, images[exemplar["row"]], keep)
    axes.set(xlim=(-_WORDS, columns), ylim=(height, 0), aspect="equal")
    write_png(figure, path)


def _write_words(axes: "Axes", top: float, prototype: Mapping[str, Any], keep: bool) -> None:
    def write(line: int, text: str, ink: str, **more: Any) -> None:
        ink = ink if keep else _FADED
        axes.text(-_WORDS, top + 0.14 + 0.165 * line, text, color=ink, va="center", **more)

    outside, reliance = prototype["out_of_box"], prototype["reliance"]
    write(0, f"prototype {prototype['index']}", INK, fontsize=9.5, weight="bold")
    small = {"fontsize": 8.5}
    write(1, f"hits {prototype['hits']}", _MUTED, **small)
    if outside is not None:
        write(2, f"{100 * outside:.0f} % out of box", _MUTED, **small)
    if reliance is not None:
        write(3, f"reliance {reliance:.3f}", _MUTED, **small)
    if not keep:
        write(4, "not kept", INK, **small)
    elif prototype["suspect"]:
        write(4, "a shortcut?", _WARNS, **small)
    if not prototype["exemplars"]:
        axes.text(0, top + 0.5, "no training image has it", color=_MUTED, va="center", fontsize=9)


def _draw_exemplar(
    axes: "Axes",
    corner: tuple[float, float],
    exemplar: Mapping[str, Any],
    image: "NDArray[np.uint8]",
    keep: bool,
) -> None:
    from matplotlib.patches import Rectangle

    left, top = corner
    inner = 0.96  # of a tile, the rest is a gap
    faint = 1.0 if keep else 0.35
    extent = (left, left + inner, top + inner, top)
    axes.imshow(image, extent=extent, alpha=faint, interpolation="nearest")
    x0, y0, x1, y1 = (inner * side for side in exemplar["box"])
    ink = _LOOKS if keep else _FADED
    place, width, height = (left + x0, top + y0), x1 - x0, y1 - y0
    for color, line in (("white", 2.6), (ink, 1.4)):  # seen on any ground
        axes.add_patch(Rectangle(place, width, height, fill=False, edgecolor=color, linewidth=line))
    axes.text(
        left + inner / 2,
        top + inner + 0.1,
        f"{exemplar['similarity']:.3f}",
        color=_MUTED if keep else _FADED,
        ha="center",
        va="center",
        fontsize=8.5,
    )
