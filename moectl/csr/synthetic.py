"""Images of four glyphs under noise, with labels and boxes: a small set that can be learned.

Legend: N images, K concepts (the glyphs), C targets.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moectl.csr.tables import Labels
from moectl.engine.errors import UserError
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from moectl.csr.boxes import Box

GLYPHS = ("square", "ring", "plus", "stripes")
TARGETS = ("square and ring", "plus or stripes, no square", "none")
SIDE = 64
GLYPH_SIDE = 16
MARK_SIDE = 8
"""The mark of a shortcut fills the corner at the bottom left."""

_PRESENT = 0.35
_NOISE, _GROUND, _INK = 0.15, 0.4, 0.45
_TRIES = 50
_MARKED_WITH, _MARKED_WITHOUT = 0.95, 0.05


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Images in memory and everything that is known about them."""

    images: NDArray[np.float32]
    """(N, 1, 64, 64) in 0..1."""
    labels: Labels
    boxes: "dict[str, list[Box]]"
    """By the id of the image."""
    marked: NDArray[np.bool_]
    """(N,) whether the image has the mark of the shortcut."""


def glyphs(count: int, seed: int, shortcut: str = "") -> Glyphs:
    """Draw images; the first ones are the same for every `count`.

    Every glyph is present with probability 0.35, each at a place of its own where one is found.

    Args:
        count: N.
        seed: of everything random.
        shortcut: a glyph whose images have a bright mark in a corner, 95 % of them against 5 % of
            the others; empty for none. The mark is in no box.

    Raises:
        UserError: if the shortcut is no glyph.
    """
    if shortcut and shortcut not in GLYPHS:
        raise UserError(f"data.shortcut is {shortcut!r}, expected one of {', '.join(GLYPHS)}")
    images = np.empty((count, 1, SIDE, SIDE), np.float32)
    present = np.zeros((count, len(GLYPHS)), bool)
    marked = np.zeros(count, bool)
    ids = [f"glyph_{number:06d}" for number in range(count)]
    boxes: dict[str, list[Box]] = {}
    for number, name in enumerate(ids):
        draws = np.random.default_rng(key(seed, "glyphs", number))
        present[number] = draws.random(len(GLYPHS)) < _PRESENT
        image = draws.normal(_GROUND, _NOISE, (SIDE, SIDE))
        taken = []
        if shortcut:
            taken.append((0, SIDE - MARK_SIDE, MARK_SIDE))  # kept free in images without it, too
            related = present[number, GLYPHS.index(shortcut)]
            marked[number] = draws.random() < (_MARKED_WITH if related else _MARKED_WITHOUT)
        if marked[number]:
            image[-MARK_SIDE:, :MARK_SIDE] += _INK
        boxes[name] = []
        for glyph in np.flatnonzero(present[number]).tolist():
            left, top = _place(draws, taken)
            taken.append((left, top, GLYPH_SIDE))
            image[top : top + GLYPH_SIDE, left : left + GLYPH_SIDE] += _INK * _shape(GLYPHS[glyph])
            corners = (left, top, left + GLYPH_SIDE, top + GLYPH_SIDE)
            x0, y0, x1, y1 = (corner / SIDE for corner in corners)
            boxes[name].append((glyph, x0, y0, x1, y1))
        images[number, 0] = image.clip(0, 1)
    labels = Labels(
        image_ids=ids,
        concepts=list(GLYPHS),
        targets=list(TARGETS),
        concept_values=present.astype(np.float32),
        target_values=_targets(present),
        patients=list(ids),
        notes={"table": "synthetic", "class_column": None, "columns_from": {}},
    )
    return Glyphs(images, labels, boxes, marked)


def _targets(present: NDArray[np.bool_]) -> NDArray[np.float32]:
    square, ring, plus, stripes = present.T
    rules = (square & ring, (plus | stripes) & ~square, ~present.any(1))
    return np.stack(rules, axis=1).astype(np.float32)


def _place(draws: np.random.Generator, taken: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Draw a corner until the glyph covers nothing that is there; give up after some tries."""
    left = top = 0
    for left, top in draws.integers(0, SIDE - GLYPH_SIDE + 1, (_TRIES, 2)).tolist():
        if not any(
            x - GLYPH_SIDE < left < x + side and y - GLYPH_SIDE < top < y + side
            for x, y, side in taken
        ):
            break
    return left, top


def _shape(name: str) -> NDArray[np.float64]:
    """Return where the ink of a glyph is, 1 on (16, 16) zeros."""
    ink = np.zeros((GLYPH_SIDE, GLYPH_SIDE))
    middle = np.arange(GLYPH_SIDE) - (GLYPH_SIDE - 1) / 2
    radius = np.hypot(middle[:, None], middle)
    match name:
        case "square":
            ink[:] = 1
            ink[3:-3, 3:-3] = 0
        case "ring":
            ink[(radius < 8) & (radius > 5)] = 1
        case "plus":
            ink[6:10] = 1
            ink[:, 6:10] = 1
        case "stripes":
            ink[0::4] = 1
            ink[1::4] = 1
    return ink
