from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from moectl.taskmoe.heat_maps import FRAME, SEPARATOR, expert_analysis, expert_map, shortened

DARKEST = (8, 48, 107)  # a fraction of 1
OVERLAP = [[1, 0], [1, 0], [0, 1], [1, 1]]
DISJOINT = [[1, 0], [1, 0], [0, 1], [0, 1]]
ALL = [[1, 1]] * 4
VALUES = [[1.0, 0.5, 0.0, 0.25], [0.0, 0.5, 1.0, 0.75]]


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def where(picture: Any, color: str) -> Any:
    return (picture == tuple(bytes.fromhex(color[1:]))).all(2)


def frames(picture: Any) -> list[tuple[int, int, int, int]]:
    """Top, bottom, left and right of every frame, from left to right in each row."""
    labels, _ = ndimage.label(where(picture, FRAME), np.ones((3, 3)))
    found = [(y.start, y.stop, x.start, x.stop) for y, x in ndimage.find_objects(labels)]
    return sorted(box for box in found if box[1] - box[0] > 15)


def shades(picture: Any) -> list[tuple[int, ...]]:
    """Colours of the framed cells, taken beside their numbers."""
    return [tuple(picture[top + 7, left + 7].tolist()) for top, _, left, _ in frames(picture)]


def draw(path: Path, values: Any = VALUES, owners: Any = ALL, **more: Any) -> Any:
    names = [f"class_{number}" for number in range(len(owners))]
    arguments = {"title": "t", "class_names": names, "owners": owners, **more}
    expert_map(path, values, **arguments)
    return pixels(path)


def separators(picture: Any) -> int:
    tall = where(picture, SEPARATOR).sum(0) > 40  # more than any letter
    return int(ndimage.label(tall)[1])


def test_equal_values_make_equal_files_and_others_do_not(tmp_path: Path) -> None:
    other = [[1.0, 0.5, 0.0, 0.25], [0.0, 0.5, 1.0, 0.74]]
    for name, values in (("one", VALUES), ("two", VALUES), ("other", other)):
        draw(tmp_path / f"{name}.png", values)
    one, two, last = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "other"))
    assert one == two != last


def test_frames_surround_the_classes_that_an_expert_owns(tmp_path: Path) -> None:
    boxes = frames(draw(tmp_path / "a.png", owners=ALL))
    assert len(boxes) == 8
    owned = frames(draw(tmp_path / "b.png", owners=OVERLAP))
    assert owned == [boxes[place] for place in (0, 1, 3, 6, 7)]


@pytest.mark.parametrize(
    ("owners", "lines"), [(ALL, 0), (DISJOINT, 1), (OVERLAP, 2), (OVERLAP[::2] * 2, 3)]
)
def test_lines_separate_neighbours_with_other_owners(
    owners: Any, lines: int, tmp_path: Path
) -> None:
    assert separators(draw(tmp_path / "a.png", owners=owners)) == lines


def test_colours_are_the_same_in_all_pictures_of_fractions(tmp_path: Path) -> None:
    first = shades(draw(tmp_path / "a.png"))
    halves = shades(draw(tmp_path / "b.png", (np.array(VALUES) / 2).tolist()))
    assert first[0] == first[6] == DARKEST
    assert halves[0] == first[1] == first[5]
    brightness = [sum(shade) for shade in first]
    assert brightness[0] < brightness[1] < brightness[3] < brightness[2]


def test_signed_colours_are_centred_at_zero_and_reach_the_largest_size(tmp_path: Path) -> None:
    values = [[0.2, -0.2, 0.0, 0.1], [-0.1, 0.05, 0.0, 0.0]]
    found = shades(draw(tmp_path / "a.png", values, signed=True))
    green, purple, grey, half = found[:4]
    assert green[1] > green[0]
    assert purple[2] > purple[1]
    assert max(grey) - min(grey) < 4
    assert grey[0] > 240
    assert sum(green) < sum(half) < sum(grey)
    scaled = (np.array(values) * 2).tolist()
    assert shades(draw(tmp_path / "b.png", scaled, signed=True)) == found


def test_nothing_measured_is_white_with_a_dash_and_zero_is_not(tmp_path: Path) -> None:
    values = [[None, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, None]]
    picture = draw(tmp_path / "a.png", values)
    boxes = frames(picture)
    inside = [picture[t + 4 : b - 4, left + 4 : right - 4] for t, b, left, right in boxes]
    white = [(cell == 255).all(2).mean() for cell in inside]
    assert [share > 0.95 for share in white] == [True, *[False] * 6, True]
    dashes = [ndimage.find_objects((cell.sum(2) < 500).astype(int))[0] for cell in inside]
    for place in (0, 7):  # flat, where a number is high
        y, x = dashes[place]
        assert y.stop - y.start < 4 < x.stop - x.start
    assert dashes[1][0].stop - dashes[1][0].start > 8


def test_a_map_without_any_measurement_can_be_drawn(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", [[None] * 4] * 2, signed=True)
    assert shades(picture) == [(255, 255, 255)] * 8


def number_width(picture: Any, box: tuple[int, int, int, int]) -> int:
    top, bottom, left, right = box
    ink = picture[top + 4 : bottom - 4, left + 4 : right - 4].sum(2) < 450
    return int(np.ptp(np.flatnonzero(ink.any(0)))) if ink.any() else 0


def test_small_signed_numbers_have_a_decimal_and_zero_has_no_sign(tmp_path: Path) -> None:
    """The scale follows the values, so that only what is written can differ."""
    whole, small = ([[size, 0.05 * size, 0.0, -1e-6]] * 2 for size in (1.0, 0.01))
    widths = []
    for values in (whole, small):
        picture = draw(tmp_path / "a.png", values, signed=True)
        widths.append([number_width(picture, box) for box in frames(picture)[1:4]])
    assert min(widths[1]) > 2 * max(widths[0]) > 0
    assert max(widths[0]) - min(widths[0]) <= 2


@pytest.mark.parametrize(("classes", "written"), [(32, True), (33, False)])
def test_numbers_are_left_out_where_they_have_no_room(
    classes: int, written: bool, tmp_path: Path
) -> None:
    picture = draw(tmp_path / "a.png", [[1.0] * classes], [[0]] * classes)
    height = np.flatnonzero((picture[:, 600] == DARKEST).all(1))
    assert ((picture[height, 100:-250] != DARKEST).any(2).mean() > 0.01) == written


@pytest.mark.parametrize("classes", [12, 100])
def test_long_names_are_whole_and_every_class_has_its_cell(classes: int, tmp_path: Path) -> None:
    names = [f"African_hunting_dog_{number}" for number in range(classes)]
    picture = draw(tmp_path / "a.png", [[0.5] * classes], [[1]] * classes, class_names=names)
    boxes = frames(picture)
    assert len(boxes) == classes
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()  # nothing is cut
    below = picture[boxes[0][1] + 8 : boxes[0][1] + 60, : picture.shape[1] // 4]
    assert (below.sum(2) < 300).sum() > 100 * classes // 12


def test_very_many_classes_have_no_names(tmp_path: Path) -> None:
    for name in "ab":
        names = [f"{name}_{number}" for number in range(130)]
        draw(tmp_path / f"{name}.png", [[0.5] * 130], [[1]] * 130, class_names=names)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    for repeats in (1, 13):
        names = ["$\\bad$", "$x_$", "鹿", "_a"] * repeats
        owners = [[1]] * len(names)
        values = [[0.5] * len(names)]
        draw(tmp_path / "a.png", values, owners, class_names=names, title="$\\bad$")


def test_a_name_is_cut_only_if_it_is_too_long() -> None:
    assert shortened("African_hunting_dog", 19) == "African_hunting_dog"
    assert shortened("African_hunting_dog", 8) == "African…"


def test_the_analysis_shows_accuracies_above_gates_on_one_scale(tmp_path: Path) -> None:
    document = {"forced_accuracy": [[1.0] * 4] * 2, "contribution": [[0.5] * 4] * 2, "usage": None}
    for name in ("one", "two"):
        expert_analysis(tmp_path / f"{name}.png", document, list("abcd"), ALL)
    found = shades(pixels(tmp_path / "one.png"))
    assert found[:8] == [DARKEST] * 8
    assert found[8:] == [shades(draw(tmp_path / "map.png"))[1]] * 8
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_analysis_frames_owners_in_both_maps(tmp_path: Path) -> None:
    document = {"forced_accuracy": VALUES, "contribution": VALUES}
    expert_analysis(tmp_path / "a.png", document, list("abcd"), OVERLAP)
    picture = pixels(tmp_path / "a.png")
    assert len(frames(picture)) == 10
    assert separators(picture) == 2
