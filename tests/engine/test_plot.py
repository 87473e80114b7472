import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moectl.engine import plot

LABELS = {"title": "a", "x_label": "b", "y_label": "c"}


def pixels(path: Path) -> Any:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def has_colour(path: Path, colour: str) -> bool:
    wanted = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return any(wanted == found for _, found in pixels(path).getcolors(2**24))


def bins(gap: float) -> list[dict[str, float | None]]:
    empty = {"lower": 0.0, "upper": 0.5, "weight": 0.0, "accuracy": None, "confidence": None}
    full = {"lower": 0.5, "upper": 1.0, "weight": 1.0, "accuracy": 0.8 - gap, "confidence": 0.8}
    return [empty, full]


def draw_lines(path: Path) -> None:
    plot.lines(path, {"a": ([1, 2], [0.5, None]), "b": ([1], [0.2])}, **LABELS)


def draw_bars(path: Path) -> None:
    plot.bars(path, {"a": {"x": 0.5, "y": None}, "b": {"y": 0.2}}, **LABELS, scale="percent")


def draw_panels(path: Path) -> None:
    panels = {"u": [500, 5], "v": [0.5, None]}
    plot.bar_panels(path, ["a", "b"], panels, title="t", x_label="x", scales={"u": "log"})


def draw_map(path: Path) -> None:
    plot.heat_map(path, [[1.0, 0.0], [None, None]], **LABELS, names=["a", "b"])


def draw_reliability(path: Path) -> None:
    plot.reliability(path, {str(number): bins(0.1 * number) for number in range(6)}, title="t")


def draw_line_panels(path: Path) -> None:
    panels = {"u": {"a": ([0, 1], [0.5, None])}, "v": {"b": ([0], [0.2])}, "w": {}}
    plot.line_panels(path, panels, title="t", x_label="x", scale="percent")


def draw_spreads(path: Path) -> None:
    panels = {"u": [(0.5, 0.1), None], "v": [None, None]}
    plot.spreads(path, [0.1, 0.01], panels, title="t", x_label="x")


DRAWN = (
    draw_lines, draw_line_panels, draw_bars, draw_panels, draw_map, draw_reliability, draw_spreads,
)  # fmt: skip


@pytest.mark.parametrize("draw", DRAWN)
def test_every_plot_is_a_png_with_the_same_bytes_each_time(draw: Any, tmp_path: Path) -> None:
    draw(tmp_path / "one.png")
    draw(tmp_path / "two.png")
    assert pixels(tmp_path / "one.png").width > 500
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == ["one.png", "two.png"]


def test_every_series_has_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    plot.lines(path, {str(y): ([0, 1], [y, y]) for y in range(3)}, **LABELS)
    assert [has_colour(path, colour) for colour in plot.PALETTE[:4]] == [True, True, True, False]


def test_a_name_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    path, flat = tmp_path / "a.png", ([0, 1], [0.5, 0.5])
    plot.line_panels(path, {"u": {"a": flat, "b": flat}, "v": {"b": flat}}, title="t", x_label="x")
    half = pixels(path).width // 2
    image = pixels(path)
    image.crop((half, 0, image.width, image.height - 80)).save(tmp_path / "right.png")
    found = [has_colour(tmp_path / "right.png", colour) for colour in plot.PALETTE[:2]]
    assert found == [False, True]


def test_looks_of_one_colour_differ_in_style(tmp_path: Path) -> None:
    def ink(look: int) -> int:
        path = tmp_path / "a.png"
        panels = {"u": {"a": (list(range(30)), [0.5] * 30)}}
        plot.line_panels(path, panels, title="t", x_label="x", looks={"a": look})
        blue = (0x00, 0x72, 0xB2)
        return sum(count for count, found in pixels(path).getcolors(2**24) if found == blue)

    solid, dashed, dotted = (ink(number * len(plot.PALETTE)) for number in range(3))
    assert solid > 1.2 * dashed > 1.2 * dotted > 0


def test_none_leaves_a_gap(tmp_path: Path) -> None:
    plot.bars(tmp_path / "gap.png", {"a": {"x": 1.0, "y": None}}, **LABELS)
    plot.bars(tmp_path / "full.png", {"a": {"x": 1.0, "y": 1.0}}, **LABELS)
    full = pixels(tmp_path / "full.png").resize((400, 250), Image.Resampling.NEAREST)
    gap = pixels(tmp_path / "gap.png").resize((400, 250), Image.Resampling.NEAREST)
    orange = (0xD5, 0x5E, 0x00)
    bars = [
        sum(count for count, found in image.getcolors(2**17) if found == orange)
        for image in (full, gap)
    ]
    assert bars[0] > 20 * bars[1]  # the legend alone keeps its colour


def test_a_single_point_can_be_seen(tmp_path: Path) -> None:
    plot.lines(tmp_path / "a.png", {"a": ([1], [0.5])}, **LABELS)
    assert has_colour(tmp_path / "a.png", plot.PALETTE[0])


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    names = ["$x_$", "_hidden", "鹿", "a\\b{"]
    series = {name: ([0, 1], [0, number]) for number, name in enumerate(names)}
    plot.lines(tmp_path / "a.png", series, title="$\\bad$", x_label="_", y_label="%")
    plot.line_panels(tmp_path / "d.png", {"$\\bad$": series}, title="$", x_label="_")
    square = [[0.25] * 4] * 4
    plot.heat_map(tmp_path / "b.png", square, **LABELS, names=names)
    plot.reliability(tmp_path / "c.png", {name: bins(0.1) for name in names}, title="$")


def test_the_gap_between_confidence_and_accuracy_is_drawn(tmp_path: Path) -> None:
    def share(gap: float) -> int:
        path = tmp_path / "a.png"
        plot.reliability(path, {"a": bins(gap)}, title="t")
        return sum(
            count
            for count, (red, _, blue) in pixels(path).getcolors(2**24)
            if red > 180 and blue < 150
        )

    assert share(0.5) > 2 * share(0.05)


def test_no_global_state_of_the_library_is_used(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    draw_lines(tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


def test_a_confusion_shows_shares_and_leaves_empty_rows_white(tmp_path: Path) -> None:
    path, names = tmp_path / "c.png", ["a", "b"]
    plot.confusion(path, [[3, 1], [0, 0]], title="x", names=names)
    plot.heat_map(
        tmp_path / "h.png",
        [[0.75, 0.25], [None, None]],
        title="x, percent of each row",
        x_label="predicted class",
        y_label="true class",
        names=names,
    )
    assert path.read_bytes() == (tmp_path / "h.png").read_bytes()


def spread_axes(monkeypatch: pytest.MonkeyPatch, places: Any, *values: Any) -> Any:
    kept: list[Any] = []
    monkeypatch.setattr(plot, "write_png", lambda figure, _: kept.append(figure))
    plot.spreads(Path("x.png"), places, {"u": values}, title="t", x_label="x")
    return kept[0].axes[0]


def test_means_over_numbers_are_a_line_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = spread_axes(monkeypatch, [3, 1, 2], (0.3, 0.03), (0.1, 0.01), None)
    line, (_, _), (bars,) = axes.containers[0]
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 3], [0.1, 0.3]]
    ends = [sorted(point[1] for point in segment) for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.09, 0.11]), pytest.approx([0.27, 0.33])]
    assert axes.get_xscale() == "linear"
    assert not axes.patches


def test_numbers_over_decades_stand_on_a_log_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    point = (0.1, 0.0)
    assert spread_axes(monkeypatch, [0.001, 0.1], point, point).get_xscale() == "log"
    assert spread_axes(monkeypatch, [0, 100], point, point).get_xscale() == "linear"


def test_means_over_names_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = spread_axes(monkeypatch, ["a", "b", "c"], (0.3, 0.03), None, (0.1, 0.01))
    assert [(bar.get_x() + 0.35, bar.get_height()) for bar in axes.patches] == [
        pytest.approx((0, 0.3)), pytest.approx((2, 0.1))
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_known_points_are_those_with_two_finite_numbers() -> None:
    rows = [
        {"epoch": "1", "loss": "0.5"},
        {"epoch": "2", "loss": ""},
        {"epoch": "", "loss": "1"},
        {"epoch": "3", "loss": "inf"},
        {"epoch": "4"},
        {"epoch": "5", "loss": "-2"},
    ]
    assert plot.known_points(rows, "loss") == ([1.0, 5.0], [0.5, -2.0])
    assert plot.known_points(rows, "other") == ([], [])
