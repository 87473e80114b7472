"""Generated pictures with questions: a coloured shape or a digit, large or small.

Colours, shapes and large digits can be told at every resolution. A small digit is lost where its
picture is shrunk to a third, so that it takes more crops to read; the question says that it is
small.

Letters: none.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moectl.engine.seeding import key

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

EACH = 2
"""Questions about a picture, under numbers that follow each other."""
SIDE = 252
"""Pixels of an edge of a picture."""
QUESTIONS = {
    "colour": "Which colour?",
    "shape": "Which shape?",
    "large": "Which large digit?",
    "small": "Which small digit?",
}
"""What is asked, by kind."""
COLOURS = {
    "red": (255, 110, 110),
    "green": (110, 255, 120),
    "blue": (130, 150, 255),
    "yellow": (255, 240, 100),
}
SHAPES = ("circle", "square", "triangle", "plus")
DIGITS = {
    "1": ".#.|##.|.#.|.#.|###",
    "2": "###|..#|###|#..|###",
    "4": "#.#|#.#|###|..#|..#",
    "7": "###|..#|..#|.#.|.#.",
}
"""Rows of dots; these four differ most."""
_GREY = (122, 116, 104)  # what image towers take for nothing
_CELL = 42  # a patch of 14 pixels, where the picture is shrunk to a third
_SHAPE = 35
_LARGE, _SMALL = (4, 6), 2  # edges of a dot
_THINGS = {"shape": 0.25, "large": 0.25, "small": 0.5}


class Drawn(NamedTuple):
    """A picture, a question about it and the answer."""

    image: "Image"
    question: str
    answer: str
    kind: str
    """Of the question: a key of `QUESTIONS`."""


def draw(index: int, seed: int) -> Drawn:
    """Draw a picture and ask about it; the same for the same numbers.

    Args:
        index: of the question, any; every `EACH` of them share a picture.
        seed: of all pictures.
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(key(seed, "synth", index // EACH))
    kind = str(rng.choice(list(_THINGS), p=list(_THINGS.values())))
    colour = str(rng.choice(list(COLOURS)))
    answer = str(rng.choice(SHAPES if kind == "shape" else list(DIGITS)))
    cell = rng.integers(SIDE // _CELL, size=2) * _CELL
    image = Image.new("RGB", (SIDE, SIDE), _GREY)
    pen = ImageDraw.Draw(image)
    # Nothing crosses the edge of a patch at the resolution that it takes to tell it.
    if kind == "shape":
        _shape(pen, answer, cell + rng.integers(2, 5, size=2), COLOURS[colour])
    elif kind == "large":
        corner = cell + rng.integers([9, 3], [15, 9])
        _digit(pen, answer, corner, int(rng.choice(_LARGE)), COLOURS[colour])
    else:
        corner = cell + rng.choice([0, 28], size=2) + rng.integers([3, 1], [6, 4])
        _digit(pen, answer, corner, _SMALL, COLOURS[colour])
    kind, answer = [("colour", colour), (kind, answer)][index % EACH]
    return Drawn(image, QUESTIONS[kind], answer, kind)


def _digit(
    pen: "ImageDraw", digit: str, corner: np.ndarray, dot: int, colour: tuple[int, int, int]
) -> None:
    """Draw 3 x 5 dots, each a square."""
    for row, line in enumerate(DIGITS[digit].split("|")):
        for column, mark in enumerate(line):
            if mark == "#":
                x, y = (corner + np.array([column, row]) * dot).tolist()
                pen.rectangle((x, y, x + dot - 1, y + dot - 1), fill=colour)


def _shape(pen: "ImageDraw", shape: str, corner: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw a shape as wide as high."""
    x, y = corner.tolist()
    right, bottom, third = x + _SHAPE, y + _SHAPE, _SHAPE // 3
    if shape == "circle":
        pen.ellipse((x, y, right, bottom), fill=colour)
    elif shape == "square":
        pen.rectangle((x, y, right, bottom), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, bottom), (right, bottom), (x + _SHAPE // 2, y)], fill=colour)
    else:
        pen.rectangle((x + third, y, x + 2 * third, bottom), fill=colour)
        pen.rectangle((x, y + third, right, y + 2 * third), fill=colour)
