"""One picture that says why: an image, what it resembles, and what adds up to the verdict.

Letters: H W feature grid; h w pixels of a picture.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moectl.engine.figure import GRID, INK, PALETTE, new_figure, write_png
from moectl.engine.files import sha256

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
"""(h, w, 3)."""

_SIDE = 448  # longest side of a picture in a panel, in pixels
_CONCEPTS, _BARS = 5, 14  # concepts with a picture, and with a bar of their own
_MUTED, _ALARM = "#6B6B6B", "#C62828"
_COLOURS = "inferno"
_NOTICE = "Research use, not a medical device."

# Inches.
_EDGE, _HEAD, _FOOT = 0.35, 1.15, 0.45
_LEFT, _GAP = 5.0, 0.45  # the image and its bars, and the way to the concepts
_SMALL, _WORDS, _BETWEEN = 1.9, 0.5, 0.12  # a concept's pictures, words above, what separates them
_BAR = 0.235
_LETTERS = {1: 25, 2: 46}  # of a concept's name above so many pictures


def panel_path(folder: Path, name: str) -> Path:
    """Return the file of an image's panel: its name where that is safe, else with a hash."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII) and not Path(name).suffix:
        return folder / f"{name}.png"
    plain = re.sub(r"[^\w-]+", "_", Path(name).stem, flags=re.ASCII)[:60]
    return folder / f"{plain}-{sha256(name.encode(errors='surrogateescape'))[:8]}.png"


def thumbnail(pixels: Any) -> Pixels:
    """Shrink an image (1 or 3, h, w) in 0..1 to what a panel can show; small ones stay as is."""
    image = torch.as_tensor(pixels).float()
    height, width = image.shape[1:]
    if max(height, width) > _SIDE:
        scale = _SIDE / max(height, width)
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    image = image.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def enlarged(cells: Tensor, height: int, width: int) -> NDArray[np.float32]:
    """Enlarge a similarity map (H, W) smoothly to (h, w), cut off at 0 and 1, not stretched."""
    size = (height, width)
    grown = F.interpolate(cells[None, None].float(), size, mode="bilinear", align_corners=False)
    return np.asarray(grown[0, 0].clamp(0, 1).numpy())


def target_shown(row: Mapping[str, Any]) -> str:
    """Return the target whose logit is taken apart: the most probable of the predicted, or of all.

    Args:
        row: of `explain.explain`.
    """
    chances: dict[str, float] = row["probabilities"]
    predicted = row["prediction"]
    if isinstance(predicted, str):
        return predicted
    return max(predicted or chances, key=chances.__getitem__)


def bars_of(row: Mapping[str, Any], target: str) -> list[tuple[str, float]]:
    """Return names and values of what adds up to a target's logit, the logit itself last.

    The largest contributions come first. Many small ones are one bar.
    """
    parts = sorted(row["contributions"][target].items(), key=lambda part: -abs(part[1]))
    count = _BARS if len(parts) > _BARS + 1 else len(parts)
    bars, rest = parts[:count], parts[count:]
    if rest:
        bars.append((f"{len(rest)} other concepts", sum(value for _, value in rest)))
    return [*bars, ("bias", row["bias"][target]), ("logit", row["logits"][target])]


def draw_panel(
    path: Path,
    row: Mapping[str, Any],
    image: Pixels,
    maps: Sequence[Tensor],
    training_image: Callable[[str], Pixels | None] | None = None,
) -> None:
    """Draw the panel of an image.

    Args:
        path: the PNG file.
        row: of `explain.explain`.
        image: as `thumbnail` gives it.
        maps: (H, W) of the deciding prototype of each of the row's concepts that has one.
        training_image: finds exemplars by their ids, None if one cannot be shown; without it there
            is no column for them.
    """
    concepts = [one for one in row["concepts"] if one["prototype"] is not None][:_CONCEPTS]
    target = target_shown(row)
    bars = bars_of(row, target)
    step = _WORDS + _SMALL + _BETWEEN
    tall = max(_LEFT + 0.75 + _BAR * len(bars) + 0.3, len(concepts) * step)
    columns = 2 if training_image else 1
    wide = _LEFT + _GAP + columns * _SMALL + (columns - 1) * _BETWEEN
    sheet = _Sheet(wide + 2 * _EDGE, tall + _HEAD + _FOOT)
    _write_head(sheet, row, target)
    picture = sheet.axes(_EDGE, _HEAD, _LEFT, _LEFT)
    _show(picture, image)
    _draw_bars(sheet, bars, target)
    x = _EDGE + _LEFT + _GAP
    _write_columns(sheet, x, columns)
    for number, (one, cells) in enumerate(zip(concepts, maps, strict=False)):
        y = _HEAD + number * step
        _write_concept(sheet, (x, y), one, target, _LETTERS[columns])
        y += _WORDS
        axes = sheet.axes(x, y, _SMALL, _SMALL)
        _show(axes, image)
        _cover(axes, cells, image.shape)
        _mark(axes, one["peak"], image.shape)
        if training_image:
            _show_exemplar(sheet, (x + _SMALL + _BETWEEN, y), one["exemplar"], training_image)
    sheet.write(_EDGE, sheet.height - 0.25, _NOTICE, size=8, color=_MUTED)
    write_png(sheet.figure, path)


class _Sheet:
    """A figure on which things have places in inches, from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure: Figure = new_figure(width, height)
        self.figure.set_layout_engine("none")

    def axes(self, x: float, y: float, width: float, height: float) -> "Axes":
        lower = self.height - y - height
        place = (x / self.width, lower / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def write(
        self, x: float, y: float, text: str, *, size: float, color: str = INK, bold: bool = False
    ) -> None:
        """Write one line of which (x, y) is the left end of the base line."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size,
            color=color,
            weight="bold" if bold else "normal",
            va="baseline",
            parse_math=False,
        )


def shortened(text: str, length: int, *, head: bool = True) -> str:
    """Cut a text to a number of characters, at its end or (without `head`) at its beginning."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    return f"{text[: length - 1]}…" if head else f"…{text[1 - length :]}"


def _write_head(sheet: _Sheet, row: Mapping[str, Any], target: str) -> None:
    chances, predicted = row["probabilities"], row["prediction"]
    named = [predicted] if isinstance(predicted, str) else predicted
    words = ", ".join(f"{name} ({chances[name]:.2f})" for name in named)
    if not named:
        words = f"none, highest is {target} ({chances[target]:.2f})"
    fits = int(sheet.width * 8.5)  # characters
    sheet.write(_EDGE, 0.42, shortened(f"Prediction: {words}", fits), size=13, bold=True)
    review = row["needs_review"]
    words = f"margin {row['margin']:.2f}{', needs review' if review else ''}"
    sheet.write(_EDGE, 0.68, words, size=10.5, color=_ALARM if review else INK, bold=review)
    name = shortened(row["image"], 58, head=False)
    sheet.write(_EDGE, 0.93, name, size=9, color=_MUTED)


def _write_columns(sheet: _Sheet, x: float, columns: int) -> None:
    """Write what the columns of pictures show, with the scale of the similarities."""
    sheet.write(x, 0.93, "similarity map, 0", size=8, color=_MUTED)
    scale = sheet.axes(x + 0.98, 0.84, 0.6, 0.1)
    scale.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap=_COLOURS, vmin=0, vmax=1)
    scale.set_axis_off()
    sheet.write(x + 1.62, 0.93, "1", size=8, color=_MUTED)
    if columns == 2:
        x += _SMALL + _BETWEEN
        sheet.write(x, 0.93, "most similar training image", size=8, color=_MUTED)


def _write_concept(
    sheet: _Sheet, at: tuple[float, float], one: Mapping[str, Any], target: str, fits: int
) -> None:
    sheet.write(at[0], at[1] + 0.22, shortened(one["name"], fits), size=9.5, bold=True)
    words = (
        f"similarity {one['similarity']:.2f}, CAM {one['probability']:.2f},"
        f" adds {one['contributions'][target]:+.2f}"
    )
    sheet.write(at[0], at[1] + 0.41, words, size=7.5, color=INK)


def _show(axes: "Axes", image: Pixels) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(GRID)


def _cover(axes: "Axes", cells: Tensor, shape: tuple[int, ...]) -> None:
    """Lay a similarity map over an image; the higher, the less of the image shows through."""
    values = enlarged(cells, *shape[:2])
    axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=1, alpha=0.75 * values)


def _mark(axes: "Axes", box: Sequence[float], shape: tuple[int, ...]) -> None:
    """Frame a box, given in shares of the image."""
    from matplotlib.patches import Rectangle

    height, width = shape[:2]
    x0, y0, x1, y1 = box
    corner = (x0 * width - 0.5, y0 * height - 0.5)
    size = ((x1 - x0) * width, (y1 - y0) * height)
    for color, thickness in (("black", 2.6), ("white", 1.2)):  # visible on any ground
        line: dict[str, Any] = {"edgecolor": color, "linewidth": thickness, "clip_on": False}
        axes.add_patch(Rectangle(corner, *size, fill=False, **line))


def _show_exemplar(
    sheet: _Sheet,
    at: tuple[float, float],
    exemplar: Mapping[str, Any] | None,
    training_image: Callable[[str], Pixels | None],
) -> None:
    image = training_image(exemplar["image_id"]) if exemplar else None
    if exemplar is None or image is None:
        sheet.write(at[0], at[1] + 0.2, "none to show", size=8, color=_MUTED)
        return
    axes = sheet.axes(*at, _SMALL, _SMALL)
    _show(axes, image)
    _mark(axes, exemplar["box"], image.shape)


def _draw_bars(sheet: _Sheet, bars: Sequence[tuple[str, float]], target: str) -> None:
    top = _HEAD + _LEFT
    words = shortened(f"What adds up to {target}", 44)
    sheet.write(_EDGE, top + 0.4, words, size=10.5, bold=True)
    names, numbers = 2.05, 0.5
    axes = sheet.axes(_EDGE + names, top + 0.5, _LEFT - names - numbers, _BAR * len(bars))
    values = [value for _, value in bars]
    colors = [PALETTE[0] if value >= 0 else PALETTE[1] for value in values]
    colors[-2:] = [_MUTED, INK]
    axes.barh(range(len(bars)), values, 0.72, color=colors)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for place, (name, value) in enumerate(bars):
        y = top + 0.5 + _BAR * (place + 0.68)
        last = place == len(bars) - 1
        sheet.write(_EDGE, y, shortened(name, 30), size=8, bold=last)
        sheet.write(_EDGE + _LEFT - numbers + 0.08, y, f"{value:+.2f}", size=8, bold=last)
