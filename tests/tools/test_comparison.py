"""The picture of several runs: what is drawn of each, and what is not shared."""

from pathlib import Path
from typing import Any

import pytest

from moectl.engine.errors import UserError
from moectl.engine.tracking import MetricsFile
from moectl.tools import comparison
from moectl.tools.comparison import curves, draw, shared_curves, shared_scores


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep figures instead of writing them."""
    kept: list[Any] = []
    monkeypatch.setattr(comparison, "write_png", lambda figure, _: kept.append(figure))
    return kept


def write(path: Path, *rows: dict[str, Any]) -> None:
    file = MetricsFile(path)
    for number, row in enumerate(rows, 1):
        file.write({"update": number, "elapsed_seconds": 1.0, **row})


def test_the_last_value_of_an_epoch_counts(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "train/loss": 3}, {"epoch": 1, "train/loss": 2, "val/a": 0.5}]
    write(tmp_path / "metrics.csv", *rows, {"epoch": 2, "train/loss": 1})
    assert curves(tmp_path) == {"train/loss": {1: 2.0, 2: 1.0}, "val/a": {1: 0.5}}


def test_stages_have_curves_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "metrics_concept.csv", {"epoch": 1, "val/a": 0.5})
    write(tmp_path / "metrics_task.csv", {"epoch": 1, "val/a": 0.7})
    assert curves(tmp_path) == {"concept val/a": {1: 0.5}, "task val/a": {1: 0.7}}


def test_scores_come_before_losses_and_the_rest_is_not_drawn() -> None:
    names = ("lr", "train/accuracy", "train/loss", "val/b", "task val/a", "load/dead")
    run = {name: {1: 1.0} for name in names}
    wanted = ["val/b", "task val/a", "train/loss", "train/accuracy"]
    assert shared_curves([run, {**run, "val/own": {}}], None) == wanted
    assert shared_curves([run, {}], None) == []
    assert shared_curves([run, run], "lr") == ["lr"]
    many = {f"val/{number}": {1: 1.0} for number in range(9)}
    assert len(shared_curves([many, many], None)) == 6


def test_a_metric_that_a_run_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="val/accurac: not in the metrics of every run") as caught:
        shared_curves([{"val/accuracy": {}}, {"val/accuracy": {}}], "val/accurac")
    assert "did you mean val/accuracy" in caught.value.message
    assert caught.value.hint == "they share: val/accuracy"


def test_only_numbers_that_all_runs_have_are_scores() -> None:
    one = {"best": {"epoch": 3, "images": 9, "accuracy": 0.5, "ece": None, "tuned": True}}
    other = {"best": {"epoch": 4, "images": 8, "accuracy": 0.25, "ece": 0.1, "tuned": True}}
    found = shared_scores([{"scores": one}, {"scores": other}])
    assert found == {"best.accuracy": [0.5, 0.25]}
    assert shared_scores([{"scores": one}, {}]) == {}


def test_a_run_has_one_colour_in_all_panels(tmp_path: Path, figures: list[Any]) -> None:
    metrics = {"val/a": [{2: 0.7, 1: 0.5}, {1: 0.1, 2: 0.2, 3: 0.3}]}
    draw(tmp_path / "x.png", ["$a$", "b"], metrics, {"best.a": [0.7, 0.3]})
    lines, bars = figures[0].axes
    assert lines.get_title(loc="left") == "val/a"
    assert bars.get_title(loc="left") == "best.a"
    assert [list(line.get_xdata()) for line in lines.get_lines()] == [[1, 2], [1, 2, 3]]
    assert [list(line.get_ydata()) for line in lines.get_lines()] == [[0.5, 0.7], [0.1, 0.2, 0.3]]
    assert [bar.get_width() for bar in bars.patches] == [0.7, 0.3]
    from matplotlib.colors import to_hex

    shown = [to_hex(line.get_color()) for line in lines.get_lines()]
    assert shown == [to_hex(bar.get_facecolor()) for bar in bars.patches]
    assert len(set(shown)) == 2
    assert [text.get_text() for text in bars.texts] == ["0.7", "0.3"]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["$a$", "b"]


def test_scores_alone_have_a_legend_too(tmp_path: Path, figures: list[Any]) -> None:
    draw(tmp_path / "x.png", ["a", "b", "c"], {}, {"s": [1.0, 2.0, 3.0]})
    assert len(figures[0].legends[0].get_texts()) == 3


def test_many_runs_differ_in_style(tmp_path: Path, figures: list[Any]) -> None:
    names = [f"r{number}" for number in range(9)]
    draw(tmp_path / "x.png", names, {"val/a": [{1: 0.5}] * 9}, {})
    looks = {(line.get_color(), line.get_linestyle()) for line in figures[0].axes[0].get_lines()}
    assert len(looks) == 9
