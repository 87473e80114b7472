"""Pictures of trainings and evaluations: what is drawn where, and that PNG files come out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from moectl.controller import plots
from moectl.controller.plots import (
    accuracy_latency,
    block_usage,
    evaluation_pictures,
    knobs,
    over_budgets,
    stages,
    training_curves,
)
from moectl.engine import figure, plot
from moectl.engine.figure import PALETTE

Draw = Callable[..., Any]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Call a function of this room and return the figure that it would write."""

    def call(function: Callable[..., None], *given: Any, **named: Any) -> Any:
        kept: list[Any] = []
        monkeypatch.setattr(figure, "write_png", lambda one, _: kept.append(one))
        monkeypatch.setattr(plot, "write_png", lambda one, _: kept.append(one))
        function(Path("unused.png"), *given, **named)
        (found,) = kept
        found.canvas.draw()
        return found

    return call


def result(policy: str, budget: float, accuracy: float, latency: float) -> dict[str, Any]:
    share = accuracy / 2
    return {
        "policy": policy,
        "latency_budget": budget,
        "metrics": {
            "accuracy": accuracy,
            "budget_violation_rate": 0.25,
            "stages_ms": {"controller": 1.0, "vision": 5.0, "prefill": latency, "decode": 3.0},
        },
        "knob_distribution": {
            "tier": {"low": share, "medium": 0.5, "high": 0.5 - share},
            "mean_top_k": 4 + 4 * accuracy,
            "mean_active_blocks": 3.5,
            "block_usage": [1.0, share, 0.0, 0.7],
        },
    }


def results() -> list[dict[str, Any]]:
    return [
        *(result("controller", budget, budget / 400, budget * 0.9) for budget in (100, 200, 300)),
        *(result("static_full", budget, 0.9, 320) for budget in (100, 200, 300)),
        *(result("token_only", budget, budget / 500, budget) for budget in (100, 200, 300)),
    ]


def pareto() -> dict[str, Any]:
    points = [
        {
            "policy": one["policy"],
            "accuracy": one["metrics"]["accuracy"],
            "latency": one["metrics"]["stages_ms"]["prefill"],
        }
        for one in results()
    ]
    points += [
        {"policy": "grid", "accuracy": 0.3 + number / 10, "latency": 100 + 50 * number}
        for number in range(3)
    ]
    names = {point["policy"] for point in points}
    fronts = {name: [one for one in points if one["policy"] == name] for name in names}
    fronts["static_full"] = fronts["static_full"][:1]
    fronts["grid"] = fronts["grid"][:2]
    return {"all_points": points, "pareto_frontiers": fronts}


def document(**values: Any) -> dict[str, Any]:
    part = {"num_samples": 9, "results": results(), "pareto": pareto()}
    return {
        "unit": "ms",
        "split": "test",
        "latency": {"objective": "total"},
        "top_k_choices": [4, 5, 6, 7, 8],
        "counts": [3, 4],
        "datasets": {"easy": part, "hard": part},
        **values,
    }


def legend(picture: Any) -> list[str]:
    (found,) = picture.legends
    return [text.get_text() for text in found.get_texts()]


# Training


def test_training_and_validation_share_their_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(plot, "line_panels", lambda _, panels, **__: kept.update(panels))
    names = ("reward_mean", "accuracy_mean", "latency_mean", "budget_violation_rate")
    rows = [{"epoch": str(epoch), **{name: str(epoch) for name in names}} for epoch in (1, 2)]
    training = [{**row, "entropy_tier": "0.5", "entropy_count": "0.25"} for row in rows]
    training_curves(Path("unused.png"), training, [{**row, "distinct_plans": "3"} for row in rows])
    assert kept["reward"] == {"training": ([1, 2], [1, 2]), "validation": ([1, 2], [1, 2])}
    assert kept["entropy, 1 is the largest"] == {
        "tier": ([1, 2], [0.5, 0.5]), "count": ([1, 2], [0.25, 0.25]),
    }  # fmt: skip
    assert kept["different plans in validation"] == {"validation": ([1, 2], [3, 3])}
    assert len(kept) == 6


# Accuracy and latency


def test_every_policy_has_its_points_and_its_front(drawn: Draw) -> None:
    picture = drawn(accuracy_latency, pareto(), "ms", "title")
    (axes,) = picture.axes
    assert legend(picture) == [
        "controller", "static_full", "token_only", "rows of the table,\nvalidation questions",
    ]  # fmt: skip
    handles = dict(zip(legend(picture), picture.legends[0].legend_handles, strict=True))
    assert handles["static_full"].get_linestyle() == "None", "one point has no line"
    lines = axes.get_lines()
    ours = [line for line in lines if to_hex(line.get_color()) == PALETTE[0].lower()]
    assert len(ours) == 2, "nobody shares the controller's colour"
    assert ours[-1].get_xdata().tolist() == [90, 180, 270]
    assert lines[-1] is ours[-1], "it lies on top"
    grid = [line for line in lines if len(line.get_xdata()) == 3 and line.get_alpha() == 0.5]
    assert len(grid) == 1
    assert lines[1].get_xdata().tolist() == [100, 150]


def test_without_a_table_there_is_no_grid(drawn: Draw) -> None:
    given = pareto()
    given["all_points"] = [one for one in given["all_points"] if one["policy"] != "grid"]
    assert "rows" not in " ".join(legend(drawn(accuracy_latency, given, "ms", "title")))


def test_curves_over_budgets_have_the_controller_on_top(drawn: Draw) -> None:
    picture = drawn(over_budgets, results(), "GFLOP", "title")
    left, right = picture.axes
    assert left.get_lines()[-1].get_ydata().tolist() == [0.25, 0.5, 0.75]
    assert right.get_lines()[0].get_ydata().tolist() == [0.25] * 3
    assert legend(picture)[-1] == "controller"
    assert left.get_xlabel() == "budget (GFLOP)"


# Plans


def test_knobs_are_drawn_within_their_limits(drawn: Draw) -> None:
    own = results()[:3]
    picture = drawn(knobs, own, document(), "title")
    tiers, experts, blocks = picture.axes
    heights = [[bar.get_height() for bar in part] for part in tiers.containers]
    assert np.allclose(np.sum(heights, 0), 1)
    assert np.allclose(heights[0], [0.125, 0.25, 0.375])
    assert np.allclose([bar.get_y() for bar in tiers.containers[2]], [0.625, 0.75, 0.875])
    assert experts.get_lines()[0].get_ydata().tolist() == [5, 6, 7]
    low, high = experts.get_ylim()
    assert 3.5 < low < 4 < 8 < high < 8.5
    assert [tick.get_text() for tick in blocks.get_xticklabels()] == ["100", "200", "300"]


def test_knobs_without_a_choice_are_left_out(drawn: Draw) -> None:
    picture = drawn(knobs, results()[:3], document(top_k_choices=[], counts=[4]), "title")
    assert len(picture.axes) == 1


def test_blocks_are_written_as_percent(drawn: Draw) -> None:
    picture = drawn(block_usage, results()[:3], "ms", "title")
    axes = picture.axes[0]
    (image,) = axes.images
    assert image.get_array().shape == (3, 4)
    assert [text.get_text() for text in axes.texts[:4]] == ["100", "12", "0", "70"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["100", "200", "300"]


def test_many_blocks_have_no_numbers(drawn: Draw) -> None:
    one = result("controller", 100, 0.5, 90)
    one["knob_distribution"]["block_usage"] = [0.5] * 48
    picture = drawn(block_usage, [one], "ms", "title")
    assert not picture.axes[0].texts
    assert picture.get_size_inches()[0] < 13


# Stages


def test_stages_stand_on_each_other_under_three_budgets(drawn: Draw) -> None:
    picture = drawn(stages, results(), "ms", "title", line=True)
    assert [axes.get_title() for axes in picture.axes] == [
        f"budget {budget} ms" for budget in (100, 200, 300)
    ]
    first = picture.axes[0]
    ends = [max(bar.get_x() + bar.get_width() for bar in part) for part in first.containers]
    assert ends == [1, 6, 326, 329]
    assert legend(picture) == ["controller", "vision", "prefill", "decode", "budget"]
    assert first.get_lines()[0].get_xdata() == [100, 100]
    assert len({axes.get_xlim() for axes in picture.axes}) == 1
    names = [tick.get_text() for tick in first.get_yticklabels()]
    assert names == ["controller", "static_full", "token_only"]


def test_budgets_that_are_no_sum_of_stages_are_not_drawn(drawn: Draw) -> None:
    picture = drawn(stages, results()[:1], "ms", "title", line=False)
    assert legend(picture) == ["controller", "vision", "prefill", "decode"]
    (axes,) = picture.axes
    assert not axes.get_lines()


# Files


def test_every_data_set_has_its_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    evaluation_pictures(folder, document())
    kinds = ("accuracy_latency", "block_usage", "knobs", "over_budgets", "stages")
    names = [f"{name}_{kind}.png" for name in ("easy", "hard") for kind in kinds]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("unit", "objective", "line"),
    [("ms", "total", True), ("ms", "ttft", False), ("GFLOP", "total", False)],
)
def test_a_budget_is_drawn_where_it_limits_the_sum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unit: str, objective: str, line: bool
) -> None:
    kept: list[bool] = []
    for name in ("accuracy_latency", "block_usage", "knobs", "over_budgets"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(plots, "stages", lambda *_, line: kept.append(line))
    evaluation_pictures(tmp_path, document(unit=unit, latency={"objective": objective}))
    assert kept == [line] * 2
