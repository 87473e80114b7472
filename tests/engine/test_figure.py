from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moectl.engine.figure import GRID, INK, PALETTE, name_axis, new_axes, new_figure, write_png


def axes_of(title: str = "a", **scale: Any) -> Any:
    figure = new_figure(4.0, 3.0)
    return new_axes(figure, (1, 1, 1), title=title, x_label="b", y_label="c", **scale)


def tick_texts(axes: Any, axis: str) -> list[str]:
    axes.figure.draw_without_rendering()
    return [label.get_text() for label in getattr(axes, f"get_{axis}ticklabels")()]


def test_a_figure_has_so_many_inches_of_144_dots(tmp_path: Path) -> None:
    write_png(new_figure(4.0, 3.0), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (576, 432)
        assert image.convert("RGB").getcolors() == [(576 * 432, (255, 255, 255))]


def test_equal_pictures_make_equal_files_that_name_no_software(tmp_path: Path) -> None:
    for name, title in (("one", "a"), ("two", "a"), ("other", "b")):
        write_png(axes_of(title).figure, tmp_path / f"{name}.png")
    one, two, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
    assert b"matplotlib" not in one.lower()
    assert len(list(tmp_path.glob("*.*"))) == 3  # nothing unfinished stays


def test_no_figure_is_kept_by_the_library() -> None:
    from matplotlib import _pylab_helpers

    new_figure(1, 1)
    assert not _pylab_helpers.Gcf.figs


def test_axes_take_their_cell_of_the_grid() -> None:
    figure = new_figure(4.0, 3.0)
    labels: Any = {"title": "", "x_label": "", "y_label": ""}
    first, last = (new_axes(figure, (2, 2, number), **labels) for number in (1, 4))
    figure.draw_without_rendering()
    one, other = first.get_position(), last.get_position()
    assert one.x1 < other.x0
    assert one.y0 > other.y1


def test_the_theme_is_in_the_picture(tmp_path: Path) -> None:
    axes = axes_of()
    axes.plot([0, 1], [0, 1], color=PALETTE[0], linewidth=4)
    write_png(axes.figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        found = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
    for wanted in (INK, GRID, PALETTE[0]):
        assert tuple(bytes.fromhex(wanted[1:])) in found, wanted


@pytest.mark.parametrize("text", ["$\\bad$", "$x_$", "_", "鹿", "a\\b{"])
def test_names_are_text_whatever_they_hold(text: str, tmp_path: Path) -> None:
    figure = new_figure(4, 3)
    axes = new_axes(figure, (1, 1, 1), title=text, x_label=text, y_label=text)
    for axis in "xy":
        name_axis(axes, axis, [text, "b"])
    write_png(figure, tmp_path / "a.png")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [text, "b"]
    assert axes.get_title(loc="left") == text


def test_names_stand_at_whole_numbers_and_only_long_ones_on_x_are_slanted() -> None:
    short, long = ["a", "b", "c"], ["African_hunting_dog", "golden_retriever", "c"]
    for axis, names, angle in (("x", short, 0), ("x", long, 40), ("y", long, 0), ("x", [], 0)):
        axes = axes_of()
        name_axis(axes, axis, names)
        assert list(getattr(axes, f"get_{axis}ticks")()) == list(range(len(names)))
        labels = getattr(axes, f"get_{axis}ticklabels")()
        assert {label.get_rotation() for label in labels} == ({angle} if names else set())


def test_scales_write_fractions_as_percent_and_powers_as_numbers() -> None:
    plain, percent, log = axes_of(), axes_of(scale="percent"), axes_of(scale="log")
    for axes in (plain, percent):
        axes.set_ylim(0, 1)
    log.set_ylim(0.4, 30)
    assert tick_texts(plain, "y")[-1] == "1.0"
    assert tick_texts(percent, "y")[-1] == "100%"
    assert log.get_yscale() == "log"
    assert {"0.5", "1", "2", "5", "10", "20"} <= set(tick_texts(log, "y"))
    assert plain.get_xscale() == log.get_xscale() == "linear"
