"""Generated pictures with questions: a coloured shape, a large digit and a small one.

The shape and the large digit can be told at every resolution. The small digit is lost where the
picture is shrunk to a third, so that it takes more tiles to read it; the question says which of
them is asked for.

Letters: none.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moectl.engine.seeding import key

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIDE = 252
"""Pixels of an edge of a picture."""
COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 190, 70),
    "blue": (50, 90, 235),
    "yellow": (240, 215, 40),
}
SHAPES = ("circle", "square", "triangle", "plus")
QUESTIONS = {
    "colour": "Shape colour?",
    "shape": "Shape?",
    "lcolour": "Large digit colour?",
    "large": "Large digit?",
    "scolour": "Small digit colour?",
    "small": "Small digit?",
}
"""What is asked for each kind of detail."""
_CELL = 42
_SHAPE = 35
_LARGE, _SMALL = 7, 2
_GLYPHS = (
    "###|#.#|#.#|#.#|###", ".#.|##.|.#.|.#.|###", "###|..#|###|#..|###", "###|..#|.##|..#|###",
    "#.#|#.#|###|..#|..#", "###|#..|###|..#|###", "###|#..|###|#.#|###", "###|..#|..#|.#.|.#.",
    "###|#.#|###|#.#|###", "###|#.#|###|..#|###",
)  # fmt: skip


class Drawn(NamedTuple):
    """A picture, a question about it and the answer."""

    image: "Image"
    question: str
    answer: str
    kind: str
    """Which detail is asked for: a key of `QUESTIONS`."""


def draw(index: int, seed: int, kind=None) -> Drawn:
    """Draw a picture; the same for the same numbers.

    Args:
        index: of the picture, any.
        seed: of all pictures.
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(key(seed, "synth", index))
    k = list(QUESTIONS)[rng.integers(len(QUESTIONS))]; kind = kind or k
    colour, c2, c3 = rng.choice(list(COLOURS), size=3); shape=rng.choice(SHAPES)
    large, small = rng.integers(10, size=2)
    cells = [(int(cell % 6) * _CELL, int(cell // 6) * _CELL) for cell in rng.permutation(36)[:3]]
    image = Image.new("RGB", (SIDE, SIDE), (24, 24, 28))
    pen = ImageDraw.Draw(image)
    _shape(pen, str(shape), _near(cells[0], rng.integers(2, 5, size=2)), COLOURS[str(colour)])
    _digit(pen, int(large), _near(cells[1], rng.integers([9, 2], [12, 5])), _LARGE, COLOURS[str(c2)])
    place = rng.choice([0, 28], size=2) + rng.integers([3, 1], [6, 4])
    _digit(pen, int(small), _near(cells[2], place), _SMALL, COLOURS[str(c3)])
    answers = {"colour": colour, "shape": shape, "large": large, "small": small, "lcolour": c2, "scolour": c3}
    return Drawn(image, QUESTIONS[kind], str(answers[kind]), kind)


def _digit(pen: "ImageDraw", digit: int, corner: tuple[int, int], dot: int, col) -> None:
    """Draw a digit of 3 × 5 dots, each a square of `dot` pixels."""
    for row, line in enumerate(_GLYPHS[digit].split("|")):
        for column, mark in enumerate(line):
            if mark == "#":
                x, y = corner[0] + column * dot, corner[1] + row * dot
                pen.rectangle((x, y, x + dot - 1, y + dot - 1), fill=col)


def _near(corner: tuple[int, int], offset: "NDArray[np.int64]") -> tuple[int, int]:
    return corner[0] + int(offset[0]), corner[1] + int(offset[1])


def _shape(
    pen: "ImageDraw", shape: str, corner: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """Draw a shape that fills a square."""
    (x, y), side = corner, _SHAPE
    box = (x, y, x + side, y + side)
    third = side // 3
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=colour)
    else:
        pen.rectangle((x + third, y, x + 2 * third, y + side), fill=colour)
        pen.rectangle((x, y + third, x + side, y + 2 * third), fill=colour)
