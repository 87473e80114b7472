"""Generated pictures with questions: a shape, a large digit and a small one, all of one colour.

Colour, shape and large digit can be told at every resolution. The small digit is lost where its
picture is shrunk to a third, so that it takes more crops to read; the question says that it is the
small one.

Letters: none.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moectl.engine.seeding import key

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

EACH = 4
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
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    large, small = map(str, rng.choice(list(DIGITS), size=2))
    cells = SIDE // _CELL
    places = [np.array(divmod(cell, cells)) * _CELL for cell in rng.permutation(cells**2)[:3]]
    image = Image.new("RGB", (SIDE, SIDE), _GREY)
    pen, fill = ImageDraw.Draw(image), COLOURS[colour]
    # Nothing crosses the edge of a patch at the resolution that it takes to tell it.
    _shape(pen, shape, places[0] + rng.integers(2, 5, size=2), fill)
    corner = places[1] + rng.integers([9, 3], [15, 9])
    _digit(pen, large, corner, int(rng.choice(_LARGE)), fill)
    corner = places[2] + rng.choice([0, 28], size=2) + rng.integers([3, 1], [6, 4])
    _digit(pen, small, corner, _SMALL, fill)
    answers = {"colour": colour, "shape": shape, "large": large, "small": small}
    kind = list(QUESTIONS)[index % EACH]
    return Drawn(image, QUESTIONS[kind], answers[kind], kind)


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
