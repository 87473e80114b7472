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
    "colour": "Which colour?",
    "shape": "Which shape?",
    "large": "Which large digit?",
    "small": "Which small digit?",
}
"""What is asked for each kind of detail."""
_CELL = 42
_SHAPE = 35
_LARGE, _SMALL = 6, 2
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


def draw(index: int, seed: int, kinds=("shape","large","small"), both=False):
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(key(seed, "synth", index))
    what=rng.choice(list(kinds),p=[.25,.3,.45][:len(kinds)] if len(kinds)==3 else None); colour=rng.choice(list(COLOURS)); col=COLOURS[str(colour)]
    cell=int(rng.integers(36)); cell=((cell%6)*42,(cell//6)*42)
    image = Image.new("RGB", (SIDE, SIDE), (122,116,104)); pen=ImageDraw.Draw(image)
    if what=="shape":
        ans=rng.choice(SHAPES); _shape(pen,str(ans),_near(cell, rng.integers(2, 5, size=2)),col)
    elif what=="large":
        ans=rng.choice([1,2,4,7]); _digit(pen, int(ans), _near(cell, rng.integers([9, 3], [15, 9])), _LARGE, col)
    else:
        ans=rng.choice([1,2,4,7]); _digit(pen, int(ans), _near(cell, rng.choice([0, 28], size=2) + rng.integers([3, 1], [6, 4])), _SMALL, col)
    out=[Drawn(image,QUESTIONS["colour"],str(colour),"colour"), Drawn(image,QUESTIONS[what],str(ans),str(what))]
    if both: return out if rng.random()<.5 else out[::-1]
    return out[int(rng.random()<.75)]


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
