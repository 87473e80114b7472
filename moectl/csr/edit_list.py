"""Lists of edits as people write them in a TOML or JSON document.

    [[edits]]
    image = "a1b2"                 # left out: every image
    reject = ["Edema"]
    mode = "absent-median"         # left out: this where there are statistics, else "zero"
    confirm = ["Cardiomegaly"]
    set = { "Lung Opacity" = 0.3 }
    positive = [[0.2, 0.3, 0.6, 0.7]]
    negative = [[0, 0, 0.2, 0.1]]
    alpha = 0.2
    only = "Cardiomegaly"          # boxes count for this concept alone

Boxes are left, top, right, bottom: pixels of the original image if any coordinate of the edit is
above 1, else shares of its sides. Places are edited first, then concepts.

Letters: B batch, K concepts, M prototypes per concept, H W feature grid.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moectl.csr.columns import normalised
from moectl.csr.edits import (
    MODES,
    Corners,
    Mode,
    Statistics,
    confirm,
    edited_scores,
    importance,
    reject,
    set_value,
)

ALPHA = 0.2
_LARGEST = 1e9  # of a coordinate in pixels; JSON has integers that no float can hold
_FIELDS = ("image", "reject", "mode", "confirm", "set", "positive", "negative", "alpha", "only")


@dataclass(frozen=True)
class Edit:
    """One set of changes; concepts by their index."""

    image: str = ""
    """Empty for every image."""
    reject: tuple[int, ...] = ()
    mode: Mode | None = None
    """None takes "absent-median" where there are statistics, else "zero"."""
    confirm: tuple[int, ...] = ()
    values: dict[int, float] = field(default_factory=dict)
    positive: tuple[Corners, ...] = ()
    negative: tuple[Corners, ...] = ()
    alpha: float = ALPHA
    only: int | None = None

    @property
    def in_pixels(self) -> bool:
        """Whether boxes are in pixels of the original image."""
        return any(corner > 1 for box in self.positive + self.negative for corner in box)


def parse_edits(document: Any, concepts: Sequence[str]) -> list[Edit]:
    """Read a document with a list `edits`.

    Args:
        document: as TOML or JSON gives it.
        concepts: names of the K concepts; case, spaces and underscores do not matter.

    Raises:
        ValueError: naming the field, what is there and what was expected.
    """
    fields = sorted(document) if isinstance(document, Mapping) else type(document).__name__
    edits = document.get("edits") if isinstance(document, Mapping) else None
    if not isinstance(edits, list) or not edits or len(document) > 1:
        raise ValueError(f"a list 'edits' and nothing else expected, found {fields}")
    return [parse_edit(table, concepts, f"edits[{n}]") for n, table in enumerate(edits)]


def parse_edit(table: Any, concepts: Sequence[str], place: str = "edit") -> Edit:
    """Read one edit; `place` is what messages call it.

    Raises:
        ValueError: naming the field, what is there and what was expected.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{place}: {table!r}, expected a table")
    if unknown := sorted(set(table) - set(_FIELDS)):
        raise ValueError(f"{place}.{unknown[0]}: no such field; there are {', '.join(_FIELDS)}")
    read = _Reader(table, concepts, place)
    edit = Edit(
        image=read.text("image"),
        reject=read.concepts_in("reject"),
        mode=read.mode(),
        confirm=read.concepts_in("confirm"),
        values=read.values(),
        positive=read.boxes("positive"),
        negative=read.boxes("negative"),
        alpha=read.alpha(),
        only=read.concept(table["only"], "only") if "only" in table else None,
    )
    named = [*edit.reject, *edit.confirm, *edit.values]
    for concept in named:
        if named.count(concept) > 1:
            raise ValueError(
                f"{place}: {concepts[concept]!r} is named twice in reject, confirm, set"
            )
    if edit.only is not None and not (edit.positive or edit.negative):
        raise ValueError(f"{place}.only: needs positive or negative boxes")
    return edit


@dataclass(frozen=True)
class _Reader:
    """The fields of one edit."""

    table: Mapping[str, Any]
    names: Sequence[str]
    place: str

    def fail(self, key: str, value: object, expected: str) -> ValueError:
        return ValueError(f"{self.place}.{key}: {value!r}, expected {expected}")

    def text(self, key: str) -> str:
        value = self.table.get(key, "")
        if not isinstance(value, str):
            raise self.fail(key, value, "text")
        return value

    def list(self, key: str) -> list[Any]:
        value = self.table.get(key, [])
        if not isinstance(value, list | tuple):
            raise self.fail(key, value, "a list")
        return [*value]

    def number(self, value: object, key: str, low: float, high: float) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            limits = f"{low:g} or more" if high == _LARGEST else f"from {low:g} to {high:g}"
            raise self.fail(key, value, f"a number, {limits}")
        return float(value)

    def concept(self, name: object, key: str) -> int:
        known = [normalised(one) for one in self.names]
        if not isinstance(name, str) or normalised(name) not in known:
            raise self.fail(key, name, f"one of {', '.join(self.names)}{self.near(name, known)}")
        return known.index(normalised(name))

    def near(self, name: object, known: Sequence[str]) -> str:
        found = difflib.get_close_matches(normalised(str(name)), known, cutoff=0.5)
        names = [self.names[known.index(one)] for one in found]
        return f"; did you mean {' or '.join(names)}?" if names else ""

    def concepts_in(self, key: str) -> tuple[int, ...]:
        return tuple(self.concept(name, f"{key}[{n}]") for n, name in enumerate(self.list(key)))

    def mode(self) -> Mode | None:
        value = self.table.get("mode")
        if value is not None and value not in MODES:
            raise self.fail("mode", value, f"one of {', '.join(MODES)}")
        return value

    def values(self) -> dict[int, float]:
        value = self.table.get("set", {})
        if not isinstance(value, Mapping):
            raise self.fail("set", value, "a table of names and cosines")
        found = [
            (self.concept(name, "set"), self.number(cosine, f"set.{name}", -1, 1))
            for name, cosine in value.items()
        ]
        if len(dict(found)) < len(found):
            raise self.fail("set", [*value], "every concept once")
        return dict(found)

    def alpha(self) -> float:
        value = self.number(self.table.get("alpha", ALPHA), "alpha", 0, 1)
        if value == 1:
            raise self.fail("alpha", value, "below 1")
        return value

    def boxes(self, key: str) -> tuple[Corners, ...]:
        return tuple(self.box(box, f"{key}[{n}]") for n, box in enumerate(self.list(key)))

    def box(self, box: object, key: str) -> Corners:
        expected = "left, top, right, bottom, each smaller than its opposite"
        if not isinstance(box, list | tuple) or len(box) != 4:
            raise self.fail(key, box, expected)
        left, top, right, bottom = (self.number(corner, key, 0, _LARGEST) for corner in box)
        if not (left < right and top < bottom):
            raise self.fail(key, box, expected)
        return left, top, right, bottom


def box_weights(edit: Edit, grid: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
    """Weights of the cells after the boxes of an edit, (H, W).

    Args:
        edit: with or without boxes.
        grid: H and W.
        size: height and width of the original image; only boxes in pixels need it.

    Raises:
        ValueError: if the size is missing, or a box leaves the image.
    """
    height, width = 1, 1
    if edit.in_pixels:
        if size is None:
            raise ValueError("boxes in pixels need the size of the original image")
        height, width = size

    def shares(boxes: Sequence[Corners]) -> list[Corners]:
        for box in boxes:
            if box[2] > width or box[3] > height:
                raise ValueError(f"box {box} leaves the image of {width} x {height} pixels")
        return [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in boxes]

    return importance(shares(edit.positive), shares(edit.negative), edit.alpha, grid)


def apply_edit(
    edit: Edit,
    maps: Tensor,
    known: Statistics | None = None,
    neutral: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Scores (B, K, M) after an edit of similarity maps (B, K, M, H, W).

    Args:
        edit: applied to every image of the batch.
        maps: as the model gives them.
        known: statistics of training images; without them concepts are rejected by "zero".
        neutral: scores that contribute nothing, for mode "drop".
        size: height and width of the original image; only boxes in pixels need it.

    Raises:
        ValueError: if something is missing that the edit needs.
    """
    batch, num_concepts, _, *grid = maps.shape
    weights = box_weights(edit, (grid[0], grid[1]), size)
    if edit.only is not None:
        chosen = torch.arange(num_concepts) == edit.only
        weights = torch.where(chosen[:, None, None], weights, 1.0).expand(batch, -1, -1, -1)
    scores = edited_scores(maps, weights)
    for concept in edit.reject:
        mode = edit.mode or ("zero" if known is None else "absent-median")
        scores = reject(scores, concept, mode, known, neutral)
    for concept in edit.confirm:
        if known is None:
            raise ValueError("confirming a concept needs statistics of training images")
        scores = confirm(scores, concept, known)
    for concept, value in edit.values.items():
        scores = set_value(scores, concept, value)
    return scores
