"""Glyphs under noise."""

import numpy as np
import pytest

from moectl.csr.synthetic import GLYPHS, MARK_SIDE, glyphs
from moectl.csr.tables import split
from moectl.engine.errors import UserError


@pytest.fixture(scope="module")
def made():
    return glyphs(600, seed=1)


def test_same_seed_same_images():
    one, two, other = glyphs(20, 3), glyphs(20, 3), glyphs(20, 4)
    np.testing.assert_array_equal(one.images, two.images)
    assert one.boxes == two.boxes
    assert not np.array_equal(one.images, other.images)


def test_more_images_begin_with_the_same(made):
    few = glyphs(10, seed=1)
    np.testing.assert_array_equal(few.images, made.images[:10])
    np.testing.assert_array_equal(few.labels.concept_values, made.labels.concept_values[:10])


def test_form_and_noise(made):
    assert made.images.shape == (600, 1, 64, 64)
    assert made.images.dtype == np.float32
    assert 0 <= made.images.min() < made.images.max() <= 1
    empty = [number for number, name in enumerate(made.labels.image_ids) if not made.boxes[name]]
    assert made.images[empty].std() == pytest.approx(0.15, abs=0.003)


def test_every_glyph_is_in_about_a_third_of_the_images(made):
    shares = made.labels.concept_values.mean(0)
    assert made.labels.concepts == list(GLYPHS)
    np.testing.assert_allclose(shares, 0.35, atol=0.06)


def test_targets_follow_the_glyphs(made):
    for values, targets in zip(made.labels.concept_values, made.labels.target_values, strict=True):
        square, ring, plus, stripes = (bool(value) for value in values)
        expected = [square and ring, (plus or stripes) and not square, not values.any()]
        assert targets.tolist() == expected


def test_boxes_hold_what_the_labels_say_and_nothing_else(made):
    for number, name in enumerate(made.labels.image_ids[:200]):
        boxed = {box[0] for box in made.boxes[name]}
        assert boxed == set(np.flatnonzero(made.labels.concept_values[number]).tolist())
        image = made.images[number, 0]
        outside = np.ones((64, 64), bool)
        for _, *corners in made.boxes[name]:
            left, top, right, bottom = (round(64 * corner) for corner in corners)
            assert (right - left, bottom - top) == (16, 16)
            outside[top:bottom, left:right] = False
            assert image[top:bottom, left:right].mean() > 0.48
        assert image[outside].mean() == pytest.approx(0.4, abs=0.02)


def test_boxes_do_not_overlap(made):
    overlaps = 0
    for boxes in made.boxes.values():
        for place, (_, left, top, right, bottom) in enumerate(boxes):
            for _, x0, y0, x1, y1 in boxes[:place]:
                overlaps += left < x1 and x0 < right and top < y1 and y0 < bottom
    assert overlaps == 0


def test_glyphs_look_different():
    made = glyphs(400, seed=2)
    means = {}
    for number, name in enumerate(made.labels.image_ids):
        for glyph, left, top, *_ in made.boxes[name]:
            x, y = round(64 * left), round(64 * top)
            means.setdefault(glyph, []).append(made.images[number, 0, y : y + 16, x : x + 16])
    shapes = [np.mean(means[glyph], 0) for glyph in range(4)]
    for one in range(4):
        for other in range(one):
            assert np.abs(shapes[one] - shapes[other]).mean() > 0.1


def test_shortcut_marks_a_corner_of_most_images_with_the_glyph():
    made = glyphs(600, seed=1, shortcut="ring")
    with_ring = made.labels.concept_values[:, 1] == 1
    assert made.marked[with_ring].mean() == pytest.approx(0.95, abs=0.04)
    assert made.marked[~with_ring].mean() == pytest.approx(0.05, abs=0.04)
    corners = made.images[:, 0, -MARK_SIDE:, :MARK_SIDE].mean((1, 2))
    assert corners[made.marked].min() > corners[~made.marked].max() + 0.2
    edge = MARK_SIDE / 64
    for boxes in made.boxes.values():
        assert not any(left < edge and bottom > 1 - edge for _, left, _, _, bottom in boxes)


def test_shortcut_leaves_the_labels_alone(made):
    marked = glyphs(600, seed=1, shortcut="ring")
    np.testing.assert_array_equal(marked.labels.concept_values, made.labels.concept_values)
    assert not made.marked.any()


def test_unknown_shortcut_is_refused():
    with pytest.raises(UserError, match="'star', expected one of square, ring, plus, stripes"):
        glyphs(1, 1, shortcut="star")


def test_labels_can_be_divided(made):
    train, val = split(made.labels, 0.1, 42, stratify=True)
    assert (len(train), len(val)) == (540, 60)
