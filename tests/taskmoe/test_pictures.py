from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.engine.figure import INK, PALETTE
from moectl.taskmoe import pictures
from moectl.taskmoe.pictures import RIGHT, WRONG, Sample

Draw = Callable[..., Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draw without writing and return the figure."""
    kept: list[Any] = []

    def draw(name: str, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "write_png", lambda figure, _: kept.append(figure))
            getattr(pictures, name)(Path("unused.png"), *arguments)
        return kept.pop()

    return draw


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def where(picture: Any, color: str) -> Any:
    return (picture == tuple(bytes.fromhex(color[1:]))).all(2)


def texts(holder: Any) -> list[str]:
    return [text.get_text() for text in holder.texts]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def rows(epochs: int) -> list[dict[str, str]]:
    return [
        {
            "epoch": str(epoch),
            "train/loss": str(2 / epoch),
            "val/loss": str(2.5 / epoch),
            "train/accuracy": str(1 - 0.8 / epoch),
            "val/accuracy": str(0.9 - 0.7 / epoch),
            "temperature": str(2 - epoch / 20),
        }
        for epoch in range(1, epochs + 1)
    ]


def image(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)


def sample(true: str = "hyena", predicted: str = "hyena", **more: Any) -> Sample:
    plain: dict[str, Any] = {"image": image(), "confidence": 0.9, "gates": [0.2, 0.5, 0.3]}
    return Sample(true=true, predicted=predicted, **(plain | more))


def row(name: str, accuracy: Any = None, low: Any = None, high: Any = None) -> dict[str, Any]:
    return {"name": name, "accuracy": accuracy, "low": low, "high": high}


ONE_HOT = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "learning_curve": (rows(6), 3),
    "sample_predictions": ([sample(), sample(predicted="$\\bad$", true="鹿")],),
    "gate_simplex": (ONE_HOT, [0, 1, 2], ["_trees", "$\\bad$", "鹿"]),
    "temperature_sweep": ([0.5, 1.0, 2.0], [0.8, 0.9, 0.7], 0.8),
    "comparison": ([row("$\\bad$", 80.0, 75.0, 84.0), row("b")],),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_picture_is_whole_and_has_the_same_bytes_each_time(name: str, tmp_path: Path) -> None:
    for file in ("one", "two"):
        getattr(pictures, name)(tmp_path / f"{file}.png", *ARGUMENTS[name])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = pixels(tmp_path / "one.png")
    assert picture.shape[1] > 400
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()  # nothing is cut


def curves(axes: Any) -> list[list[list[float]]]:
    """Points and line of every curve: (x, y) lists."""
    return [[list(map(float, values)) for values in line.get_data()] for line in axes.get_lines()]


def test_points_are_what_was_measured_and_lines_are_local_parabolas(drawn: Draw) -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.0, 3.0, 2.0]
    noisy = [{"epoch": str(place), "val/loss": str(value)} for place, value in enumerate(values, 3)]
    loss, _ = drawn("learning_curve", noisy).axes
    points, line = loss.get_lines()
    assert list(points.get_ydata()) == values
    assert list(points.get_xdata()) == list(range(3, 12))
    assert points.get_alpha() < 0.5
    wanted = []
    for place in range(9):
        start = min(max(place - 2, 0), 4)
        window = range(start, start + 5)
        fitted = np.polyfit(list(window), [values[other] for other in window], 2)
        wanted.append(np.polyval(fitted, place))
    np.testing.assert_allclose(line.get_ydata(), wanted, atol=1e-9)
    assert points.get_color() == line.get_color() == PALETTE[1]


def test_few_epochs_are_drawn_as_they_are(drawn: Draw) -> None:
    loss = drawn("learning_curve", rows(4)).axes[0]
    points, line, *_ = loss.get_lines()
    assert list(points.get_ydata()) == list(line.get_ydata()) == [2 / n for n in range(1, 5)]
    assert points.get_alpha() == 1


def test_empty_cells_and_absent_columns_leave_nothing(drawn: Draw) -> None:
    gaps = rows(8)
    for place, gap in enumerate(gaps):
        del gap["temperature"], gap["val/loss"], gap["val/accuracy"]
        gap["train/loss"] = ("", "nan", "inf", "0.5")[place % 4]
    figure = drawn("learning_curve", gaps)
    loss, accuracy = figure.axes
    assert curves(loss) == [[[4, 8], [0.5, 0.5]]] * 2
    assert len(accuracy.get_lines()) == 2
    assert legend(figure) == ["training"]


def test_one_legend_names_every_curve(drawn: Draw) -> None:
    figure = drawn("learning_curve", rows(6), 3)
    assert legend(figure) == ["training", "validation", "temperature", "best epoch 3"]
    assert len(figure.legends) == 1
    loss, accuracy, temperature = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    assert temperature.get_position().bounds == accuracy.get_position().bounds
    assert curves(temperature)[0][1] == [2 - epoch / 20 for epoch in range(1, 7)]


def test_the_best_epoch_is_marked_in_both_panels(tmp_path: Path) -> None:
    found = {}
    for best in (None, 2, 5):
        pictures.learning_curve(tmp_path / "a.png", rows(6), best)
        ink = where(pixels(tmp_path / "a.png"), INK)
        found[best] = np.flatnonzero(ink.sum(0) > 0.3 * ink.shape[0]).tolist()
    half = ink.shape[1] // 2
    assert found[None] == []
    for left in (True, False):
        early, late = ([x for x in found[best] if (x < half) == left] for best in (2, 5))
        assert early
        assert late
        assert max(early) < min(late)


def test_a_single_epoch_can_be_seen(tmp_path: Path) -> None:
    pictures.learning_curve(tmp_path / "a.png", rows(1))
    picture = pixels(tmp_path / "a.png")[:-90]  # without the legend
    for color in (PALETTE[0], PALETTE[1], PALETTE[3]):
        assert where(picture, color).sum() > 5


def test_no_epoch_at_all_is_an_empty_picture(drawn: Draw) -> None:
    figure = drawn("learning_curve", [])
    assert [len(axes.get_lines()) for axes in figure.axes] == [0, 0]


def test_frames_are_green_if_right_and_red_if_wrong(tmp_path: Path) -> None:
    grey = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    both = [sample(image=grey), sample(predicted="zebra", image=grey)]
    pictures.sample_predictions(tmp_path / "a.png", both)
    picture = pixels(tmp_path / "a.png")
    half = picture.shape[1] // 2
    places = [where(picture, color) for color in (RIGHT, WRONG)]
    assert [place[:, :half].sum() > 2000 for place in places] == [True, False]
    assert [place[:, half:].sum() > 2000 for place in places] == [False, True]


def test_words_tell_right_from_wrong_without_colour(drawn: Draw) -> None:
    wrong = sample(true="African_hunting_dog", predicted="golden_retriever", confidence=0.514)
    right, _, other, _ = drawn("sample_predictions", [sample(), wrong]).axes
    assert set(texts(right)) == {"true: hyena", "✓ hyena", "confidence 90 %"}
    assert set(texts(other)) == {
        "true: African_hunting_dog",
        "✗ golden_retriever",
        "confidence 51 %",
    }
    heights = {text.get_text()[0]: text.xyann[1] for text in other.texts}
    assert heights["t"] > heights["✗"] > heights["c"] > 0


def test_images_are_enlarged_without_blur(tmp_path: Path) -> None:
    corners = torch.zeros(3, 2, 2, dtype=torch.uint8)
    corners[0, 0, 0] = corners[1, 0, 1] = corners[2, 1, 0] = 255  # red, green; blue, black
    pictures.sample_predictions(tmp_path / "a.png", [sample(image=corners)])
    picture = pixels(tmp_path / "a.png")
    centres = []
    for color in ("#FF0000", "#00FF00", "#0000FF", "#000000"):
        y, x = np.nonzero(where(picture, color))
        assert len(y) > 5000
        centres.append((y.mean(), x.mean()))
    red, green, blue, black = centres
    assert red[0] == pytest.approx(green[0], abs=2)
    assert red[0] < blue[0] - 50
    assert blue[1] < black[1] - 50
    assert not where(picture, "#800000").any()
    assert not where(picture, "#7F7F00").any()


def test_tensors_and_arrays_make_the_same_picture(tmp_path: Path) -> None:
    for name, pixel in (("a", image()), ("b", image().numpy()), ("c", image(1))):
        pictures.sample_predictions(tmp_path / f"{name}.png", [sample(image=pixel)])
    one, two, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == two != other


def test_every_expert_has_a_bar_of_its_gate(drawn: Draw) -> None:
    for gates in ([0.2, 0.5, 0.3], [0.25, 0.75], [1 / 16] * 16):
        _, axes = drawn("sample_predictions", [sample(gates=gates)]).axes
        assert [patch.get_height() for patch in axes.patches] == gates
        assert axes.get_ylim() == (0, 1)
        assert list(axes.get_xticks()) == (list(range(len(gates))) if len(gates) < 16 else [])


@pytest.mark.parametrize(("samples", "shape"), [(1, (1, 1)), (5, (1, 5)), (7, (2, 5))])
def test_five_samples_stand_in_a_row(samples: int, shape: tuple[int, int], drawn: Draw) -> None:
    figure = drawn("sample_predictions", [sample(image=image(n)) for n in range(samples)])
    assert len(figure.axes) == 2 * samples
    lines, columns = shape
    assert figure.axes[0].get_gridspec().get_geometry() == (2 * lines, columns)
    shown = [axes.get_images()[0].get_array() for axes in figure.axes[::2]]
    for number, pixel in enumerate(shown):
        assert (np.asarray(pixel) == image(number).permute(1, 2, 0).numpy()).all()


def test_a_gate_of_one_lies_in_the_corner_of_its_expert(drawn: Draw) -> None:
    third = [1 / 3] * 3
    figure = drawn("gate_simplex", [*ONE_HOT, third], [1, 0, 1, 0], ["trees", "fruit"])
    axes = figure.axes[0]
    points = axes.collections[0]
    places = np.asarray(points.get_offsets())
    names = {text.get_text(): np.asarray(text.get_position()) for text in axes.texts}
    assert sorted(names) == ["expert 0", "expert 1", "expert 2"]
    for expert in range(3):
        distances = {name: np.hypot(*(at - places[expert])) for name, at in names.items()}
        assert min(distances, key=distances.__getitem__) == f"expert {expert}"
    sides = [np.hypot(*(places[one] - places[(one + 1) % 3])) for one in range(3)]
    assert sides == pytest.approx([1.0] * 3)
    np.testing.assert_allclose(places[3], places[:3].mean(0))


def test_points_are_faint_and_coloured_by_group(drawn: Draw) -> None:
    figure = drawn("gate_simplex", ONE_HOT, [2, 0, 2], ["_trees", "$\\bad$", "fruit"])
    colors = figure.axes[0].collections[0].get_facecolors()
    wanted = [[*(byte / 255 for byte in bytes.fromhex(PALETTE[n][1:])), 0.35] for n in (2, 0, 2)]
    np.testing.assert_allclose(colors, wanted, atol=1e-3)
    assert legend(figure) == ["_trees", "$\\bad$", "fruit"]


@pytest.mark.parametrize("gates", [[[0.5, 0.5]], [[0.25] * 4]])
def test_a_triangle_needs_three_experts(gates: list[list[float]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 experts"):
        pictures.gate_simplex(tmp_path / "a.png", gates, [0], ["a"])
    assert not (tmp_path / "a.png").exists()


def test_the_sweep_has_a_log_axis_with_the_current_temperature(drawn: Draw) -> None:
    temperatures, accuracies = [0.25, 1.0, 4.0], [0.91, 0.95, 0.8]
    axes = drawn("temperature_sweep", temperatures, accuracies, 0.536708).axes[0]
    curve, current = axes.get_lines()
    assert axes.get_xscale() == "log"
    assert list(curve.get_xdata()) == temperatures
    assert list(curve.get_ydata()) == accuracies
    assert list(current.get_xdata()) == [0.536708] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["the model's own, 0.537"]


def test_the_sweep_does_not_magnify_what_is_almost_equal(drawn: Draw) -> None:
    axes = drawn("temperature_sweep", [0.5, 1.0], [0.95, 0.951], 1.0).axes[0]
    low, high = axes.get_ylim()
    assert high - low > 0.04
    full = drawn("temperature_sweep", [0.5, 1.0], [0.5, 1.0], 1.0).axes[0]
    assert full.get_ylim()[1] == 1


def test_many_temperatures_are_not_all_named(drawn: Draw) -> None:
    def ticks(count: int) -> list[float]:
        temperatures = [0.25 * 2 ** (4 * place / count) for place in range(count)]
        axes = drawn("temperature_sweep", temperatures, [0.5] * count, 1.0).axes[0]
        low, high = axes.get_xlim()
        return [tick for tick in axes.get_xticks() if low <= tick <= high]

    assert len(ticks(9)) == 9
    assert ticks(40) == pytest.approx([0.5, 1, 2])


def test_rows_stand_in_their_order_with_their_intervals(drawn: Draw) -> None:
    given = [row("a", 80.0, 75.5, 84.0), row("b"), row("c", 90.0), row("d", 60.0, 55.0, 65.0)]
    axes = drawn("comparison", given).axes[0]
    bottom, top = axes.get_ylim()
    assert bottom > 3 > 0 > top  # rows are numbered from the top down
    assert [label.get_text() for label in axes.get_yticklabels()] == list("abcd")
    assert curves(axes) == [
        [[75.5, 84.0], [0, 0]],
        [[80.0], [0.0]],
        [[90.0], [2.0]],
        [[55.0, 65.0], [3, 3]],
        [[60.0], [3.0]],
    ]
    assert texts(axes) == [
        "80.0  (75.5 to 84.0)",
        "not measured",
        "90.0",
        "60.0  (55.0 to 65.0)",
    ]
    assert [text.get_position()[1] for text in axes.texts] == [0, 1, 2, 3]
    low, high = axes.get_xlim()
    assert low < 55
    assert 90 < high <= 100


def test_accuracies_stay_within_their_range(drawn: Draw) -> None:
    full = drawn("comparison", [row("a", 100.0, 0.0, 100.0)]).axes[0]
    assert full.get_xlim() == (0, 100)
    nothing = drawn("comparison", [row("a"), row("b")]).axes[0]
    assert nothing.get_xlim() == (0, 100)
    assert texts(nothing) == ["not measured"] * 2


def test_points_of_a_comparison_run_down_the_picture(tmp_path: Path) -> None:
    pictures.comparison(tmp_path / "a.png", [row("a", 10.0), row("b", 50.0), row("c", 90.0)])
    blue = where(pixels(tmp_path / "a.png"), PALETTE[0])
    y, x = np.nonzero(blue)
    assert np.corrcoef(x, y)[0, 1] > 0.99


def test_long_names_of_rows_are_broken_into_lines(drawn: Draw) -> None:
    name = "single dense network of equal size trained from scratch"
    axes = drawn("comparison", [row(name, 50.0)]).axes[0]
    written = axes.get_yticklabels()[0].get_text()
    assert written.replace("\n", " ") == name
    assert max(map(len, written.split("\n"))) <= 40
