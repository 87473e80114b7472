"""Pictures of a training and of an evaluation, drawn from their files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moectl.controller.settings import Policy
from moectl.engine import figure as drawing
from moectl.engine import plot
from moectl.engine.figure import GRID, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
Results = Sequence[Mapping[str, Any]]
"""Of one data set in an evaluation: figures of each policy under each budget."""

_NAMES: tuple[str, ...] = get_args(Policy)
_COLOURS = len(PALETTE)
# Nobody shares the colour of the controller, the first.
_LOOKS = {name: number + (number - 1) // (_COLOURS - 1) for number, name in enumerate(_NAMES)}
_LOOKS[_NAMES[0]] = 0
_MARKERS = ("o", "s", "^", "D")  # names of one colour differ in them
_TABLE = "grid"  # rows of the lookup table among the points
_STAGES = ("controller", "vision", "prefill", "decode")
_CURVES = ("reward_mean", "accuracy_mean", "latency_mean", "budget_violation_rate")
_WRITTEN = 26  # more blocks than this have no room for numbers
_SHOWN = 3  # budgets with a stack of latencies each
_LEGEND: dict[str, Any] = {"fontsize": 9, "frameon": False}


def training_curves(
    path: Path, training: Sequence[Mapping[str, str]], validation: Sequence[Mapping[str, str]]
) -> None:
    """Draw reward, accuracy, latency, missed budgets, entropies and plans over the epochs.

    Args:
        path: the PNG file.
        training: rows of training_history.csv.
        validation: rows of validation_history.csv.
    """
    labels = ("reward", "accuracy", "latency", "share of answers beyond the budget")
    panels: dict[str, plot.Curves] = {
        label: {"training": _column(training, name), "validation": _column(validation, name)}
        for label, name in zip(labels, _CURVES, strict=True)
    }
    entropies = [name for name in training[0] if name.startswith("entropy_")]
    panels["entropy, 1 is the largest"] = {
        name.removeprefix("entropy_"): _column(training, name) for name in entropies
    }
    panels["different plans in validation"] = {"validation": _column(validation, "distinct_plans")}
    plot.line_panels(path, panels, title="Training of the controller", x_label="epoch")


def _column(
    rows: Sequence[Mapping[str, str]], name: str
) -> tuple[Sequence[float], Sequence[float | None]]:
    values = [float(row[name]) if row.get(name) else None for row in rows]
    return [float(row["epoch"]) for row in rows], values


def evaluation_pictures(folder: Path, document: Document) -> None:
    """Draw all pictures of an evaluation into its folder, a set for each data set.

    Args:
        folder: of the evaluation.
        document: its eval.json.
    """
    for name, part in document["datasets"].items():
        results, unit = part["results"], document["unit"]
        title = f"{name}, {part['num_samples']} {document['split']} questions"
        accuracy_latency(folder / f"{name}_accuracy_latency.png", part["pareto"], unit, title)
        over_budgets(folder / f"{name}_over_budgets.png", results, unit, title)
        own = [one for one in results if one["policy"] == _NAMES[0]]
        knobs(folder / f"{name}_knobs.png", own, document, title)
        block_usage(folder / f"{name}_block_usage.png", own, unit, title)
        total = document["latency"]["objective"] == "total" and unit == "ms"
        stages(folder / f"{name}_stages.png", results, unit, title, line=total)


def accuracy_latency(path: Path, pareto: Document, unit: str, title: str) -> None:
    """Draw what each policy reaches and takes, a point for each budget, lines along the fronts."""
    figure = drawing.new_figure(8.4, 4.8)
    axes = drawing.new_axes(
        figure, (1, 1, 1), title=title, x_label=f"mean latency ({unit})", y_label="accuracy",
        scale="percent",
    )  # fmt: skip
    points: dict[str, list[tuple[float, float]]] = {}
    for point in pareto["all_points"]:
        points.setdefault(point["policy"], []).append((point["latency"], point["accuracy"]))
    order = sorted(points, key=lambda name: _LOOKS.get(name, len(_LOOKS)))
    # Backwards: the controller lies on top of all others, the table below them.
    drawn = {name: _front(axes, name, points[name], pareto) for name in reversed(order)}
    legend = figure.legend(
        [drawn[name] for name in order], [""] * len(order), loc="outside right center", **_LEGEND
    )
    words = {_TABLE: "rows of the table,\nvalidation questions"}
    drawing.write_names(legend, [words.get(name, name) for name in order])
    drawing.write_png(figure, path)


def _front(axes: "Axes", name: str, points: Sequence[tuple[float, float]], pareto: Document) -> Any:
    """Draw the points of a policy and its front, and return what the legend shows."""
    front = [(one["latency"], one["accuracy"]) for one in pareto["pareto_frontiers"][name]]
    number = _LOOKS.get(name, 0)
    table, fixed = name == _TABLE, len(set(points)) == 1
    color = "#9A9A9A" if table else PALETTE[number % _COLOURS]
    marker = "." if table else _MARKERS[number // _COLOURS]
    size = 8 if fixed else 5
    xs, ys = zip(*sorted(set(points)), strict=True)
    axes.plot(
        xs, ys, linestyle="", marker=marker, markersize=size, color=color,
        alpha=0.5 if table else 1, markeredgecolor="white", markeredgewidth=0 if table else 0.6,
    )  # fmt: skip
    xs, ys = zip(*front, strict=True)
    style = "--" if table else ("" if fixed else "-")
    line, *_ = axes.plot(
        xs, ys, color=color, marker=marker, markersize=size, linestyle=style, linewidth=1.5
    )
    return line


def over_budgets(path: Path, results: Results, unit: str, title: str) -> None:
    """Draw accuracy and missed budgets of each policy over the budgets."""
    kinds = {"accuracy": "accuracy", "share of answers beyond it": "budget_violation_rate"}
    by_policy = dict(reversed(_by_policy(results).items()))  # the controller last, on top
    panels: dict[str, plot.Curves] = {
        label: {
            name: (
                [one["latency_budget"] for one in part],
                [one["metrics"][kind] for one in part],
            )
            for name, part in by_policy.items()
        }
        for label, kind in kinds.items()
    }
    plot.line_panels(
        path, panels, title=title, x_label=f"budget ({unit})", scale="percent", looks=_LOOKS
    )


def _by_policy(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in results:
        found.setdefault(one["policy"], []).append(one)
    return found


def knobs(path: Path, results: Results, document: Document, title: str) -> None:
    """Draw what the controller sets under each budget: tiers, experts, blocks.

    Args:
        path: the PNG file.
        results: of the controller.
        document: the evaluation, with the settings that each knob has.
        title: above the panels.
    """
    from matplotlib.ticker import MaxNLocator

    taken = [one["knob_distribution"] for one in results]
    budgets = [f"{one['latency_budget']:g}" for one in results]
    means = {
        "experts of a token, mean": ("mean_top_k", document["top_k_choices"]),
        "blocks that run, mean": ("mean_active_blocks", document["counts"]),
    }
    means = {label: mean for label, mean in means.items() if len(mean[1]) > 1}
    columns = 1 + len(means)
    figure = drawing.new_figure(3.9 * columns, 3.9)
    figure.set_layout_engine("constrained", wspace=0.05)  # labels keep off the panel before
    figure.suptitle(f"The controller's plans: {title}", fontsize=12, color=INK, parse_math=False)
    x_label = f"budget ({document['unit']})"
    _tiers(figure, columns, taken, x_label)
    for number, (label, (name, choices)) in enumerate(means.items(), 2):
        axes = drawing.new_axes(
            figure, (1, columns, number), title="", x_label=x_label, y_label=label
        )
        values = [float("nan") if one[name] is None else one[name] for one in taken]
        axes.plot(range(len(taken)), values, color=PALETTE[0], marker="o", linewidth=1.8)
        spare = 0.05 * (choices[-1] - choices[0])
        axes.set_ylim(choices[0] - spare, choices[-1] + spare)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in figure.axes:
        axes.set_xlim(-0.6, len(budgets) - 0.4)
        _name_budgets(axes, budgets)
    drawing.write_png(figure, path)


def _tiers(figure: "Figure", columns: int, taken: Sequence[Document], x_label: str) -> None:
    axes = drawing.new_axes(
        figure, (1, columns, 1), title="", x_label=x_label, y_label="share of each image tier",
        scale="percent",
    )  # fmt: skip
    axes.grid(visible=False, axis="x")
    below, names, bars = [0.0] * len(taken), list(taken[0]["tier"]), []
    for number, name in enumerate(names):
        shares = [one["tier"][name] for one in taken]
        color = PALETTE[(5, 0, 6)[number % 3]]  # from light to dark
        bars.append(
            axes.bar(range(len(taken)), shares, 0.8, bottom=below, color=color, edgecolor="white")
        )
        below = [low + share for low, share in zip(below, shares, strict=True)]
    legend = axes.legend(
        bars, [""] * len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3,
        handlelength=1.2, columnspacing=1.2, **_LEGEND,
    )  # fmt: skip
    drawing.write_names(legend, names)


def block_usage(path: Path, results: Results, unit: str, title: str) -> None:
    """Draw how often the controller lets each block run under each budget."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    shares = [one["knob_distribution"]["block_usage"] for one in results]
    blocks = len(shares[0])
    figure = drawing.new_figure(min(12.8, max(6.4, 2.0 + 0.42 * blocks)), 1.9 + 0.32 * len(shares))
    axes = drawing.new_axes(
        figure, (1, 1, 1), title=f"Questions for which a block runs: {title}", x_label="block",
        y_label=f"budget ({unit})",
    )  # fmt: skip
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, cells in enumerate(shares if blocks <= _WRITTEN else ()):
        for column, share in enumerate(cells):
            ink = "white" if share > 0.6 else INK
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink
            )
    drawing.name_axis(axes, "y", [f"{one['latency_budget']:g}" for one in results])
    axes.xaxis.set_major_locator(
        MaxNLocator(min(blocks, _WRITTEN), integer=True, steps=[1, 2, 5, 10])
    )
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=GRID)
    drawing.write_png(figure, path)


def stages(path: Path, results: Results, unit: str, title: str, *, line: bool) -> None:
    """Draw the milliseconds of each stage of an answer, a stack for each policy.

    Args:
        path: the PNG file.
        results: of one data set; the smallest, the middle and the largest budget are shown.
        unit: of the budgets.
        title: above the panels.
        line: whether a budget is held against the sum, and so is drawn too.
    """
    policies = _by_policy(results)
    count = len(next(iter(policies.values())))
    places = sorted({0, count // 2, count - 1})[:_SHOWN]
    figure = drawing.new_figure(2.2 + 3.2 * len(places), 1.6 + 0.34 * len(policies))
    figure.suptitle(f"Time of an answer: {title}", fontsize=12, color=INK, parse_math=False)
    longest = max(
        *(sum(one["metrics"]["stages_ms"].values()) for one in results),
        results[-1]["latency_budget"] if line else 0,
    )
    names, bars = [*_STAGES, *(["budget"] if line else [])], []
    for number, place in enumerate(places, 1):
        shown = {name: part[place] for name, part in policies.items()}
        budget = next(iter(shown.values()))["latency_budget"]
        axes = drawing.new_axes(
            figure, (1, len(places), number), title="", x_label="ms", y_label=""
        )
        axes.set_title(f"budget {budget:g} {unit}", fontsize=10, color=INK)
        bars = _stacks(axes, [one["metrics"]["stages_ms"] for one in shown.values()])
        axes.grid(visible=False, axis="y")
        drawing.name_axis(axes, "y", list(shown) if number == 1 else [""] * len(shown))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05 * longest)
        if line:
            bars.append(axes.axvline(budget, color=INK, linestyle="--", linewidth=1))
    legend = figure.legend(
        bars, [""] * len(names), loc="outside lower center", ncols=len(names), **_LEGEND
    )
    drawing.write_names(legend, names)
    drawing.write_png(figure, path)


def _stacks(axes: "Axes", rows: Sequence[Mapping[str, float]]) -> list[Any]:
    left, bars = [0.0] * len(rows), []
    for number, stage in enumerate(_STAGES):
        values = [row[stage] for row in rows]
        color = PALETTE[(1, 5, 0, 2)[number]]
        bars.append(axes.barh(range(len(rows)), values, 0.72, left=left, color=color))
        left = [start + value for start, value in zip(left, values, strict=True)]
    return bars


def _name_budgets(axes: "Axes", names: Sequence[str]) -> None:
    drawing.name_axis(axes, "x", names)
    if len(names) * max(map(len, names)) > 20:  # three panels share the width of the page
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
