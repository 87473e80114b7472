"""Drawn pictures: what they show is what is asked, and a third of the size loses small digits."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from moectl.controller.llava import TIERS
from moectl.controller.synth import COLOURS, DIGITS, EACH, QUESTIONS, SHAPES, SIDE, Drawn, draw
from moectl.controller.tiling import choose

PICTURES = 300
CELL = 42


class Thing(NamedTuple):
    """What stands in a picture."""

    mask: np.ndarray
    top: int
    left: int


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return [draw(index, 3) for index in range(EACH * PICTURES)]


def thing(one: Drawn) -> Thing:
    mask = (np.asarray(one.image) != (122, 116, 104)).any(2)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Thing(inner, int(rows[0]), int(columns[0]))


def test_the_same_numbers_draw_the_same_picture(drawn: list[Drawn]) -> None:
    again = draw(17, 3)
    assert again[1:] == drawn[17][1:]
    assert again.image.tobytes() == drawn[17].image.tobytes()
    other = [draw(index, 4).image.tobytes() for index in range(0, 20, EACH)]
    same = [one.image.tobytes() for one in drawn[:20:EACH]]
    assert all(one != another for one, another in zip(other, same, strict=True))


def test_a_picture_is_asked_about_for_colour_and_kind(drawn: list[Drawn]) -> None:
    for start in range(0, len(drawn), EACH):
        first, second = drawn[start : start + EACH]
        assert first.image.tobytes() == second.image.tobytes()
        assert first.kind == "colour" != second.kind
    assert len({one.image.tobytes() for one in drawn}) > 0.9 * PICTURES


def test_questions_say_what_is_asked(drawn: list[Drawn]) -> None:
    known = {"colour": COLOURS, "shape": SHAPES, "large": DIGITS, "small": DIGITS}
    counts = Counter((one.kind, one.answer) for one in drawn)

    assert set(counts) == {(kind, answer) for kind in known for answer in known[kind]}
    assert sum(one.kind == "small" for one in drawn) / PICTURES == pytest.approx(0.5, abs=0.08)
    assert all(one.question == QUESTIONS[one.kind] for one in drawn)
    assert all(one.image.size == (SIDE, SIDE) and one.image.mode == "RGB" for one in drawn)


def test_the_colour_is_that_of_the_thing(drawn: list[Drawn]) -> None:
    for one in drawn[::EACH]:
        colours = np.unique(np.asarray(one.image).reshape(-1, 3), axis=0).tolist()
        assert list(COLOURS[one.answer]) in colours
        assert len(colours) == 2


@pytest.mark.parametrize("kind", ["large", "small"])
def test_a_digit_has_the_dots_of_its_glyph(drawn: list[Drawn], kind: str) -> None:
    for one in [one for one in drawn if one.kind == kind]:
        mask = thing(one).mask
        dot = len(mask) // 5
        rows = ["".join(".#"[int(mark)] for mark in row) for row in mask[::dot, ::dot]]

        assert "|".join(rows) == DIGITS[one.answer]
        assert dot in {"large": (4, 6), "small": (2,)}[kind]


def test_shapes_differ_in_what_they_cover(drawn: list[Drawn]) -> None:
    shapes = [one for one in drawn if one.kind == "shape"]
    cover = {one.answer: thing(one).mask.mean() for one in shapes}
    assert cover["square"] == 1
    assert cover["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert cover["triangle"] == pytest.approx(1 / 2, abs=0.03)
    assert cover["plus"] == pytest.approx(5 / 9, abs=0.03)


def test_nothing_crosses_a_patch_where_it_can_be_told(drawn: list[Drawn]) -> None:
    """A small digit lies in one patch of 14 pixels at 252 and 168 pixels, others at 84."""
    for one in drawn[1::EACH]:
        mask, top, left = thing(one)
        for patch in (14, 21) if one.kind == "small" else (CELL,):
            assert top // patch == (top + len(mask) - 1) // patch
            assert left // patch == (left + mask.shape[1] - 1) // patch


def test_a_third_of_the_size_has_too_few_pixels_for_a_small_digit_alone(
    drawn: list[Drawn],
) -> None:
    for one in drawn[1::EACH]:
        dot = len(thing(one).mask) / 5
        if one.kind == "small":
            assert dot * 84 / SIDE < 1 < dot * 168 / SIDE
        else:
            assert dot * 84 / SIDE > 1


def test_finer_tiers_show_every_pixel() -> None:
    assert [choose(SIDE, SIDE, tier) for tier in TIERS] == [(1, 1), (2, 2), (3, 3)]
    assert SIDE == 3 * 84
