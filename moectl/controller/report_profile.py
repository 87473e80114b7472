"""The part of a report about a network before its controller: what a profile and a toy found."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.engine import plot
from moectl.engine.files import is_file
from moectl.engine.report import paragraphs, percent, table
from moectl.engine.tracking import MetricsFile, loads_or_none

Document = Mapping[str, Any]

_SCORES = {
    "drop": "accuracy lost without the block",
    "bi": "how far the block turns its input",
    "kl": "divergence of the answer without the block",
}
_OVERHEAD = {
    "controller_ms": "controller, ms",
    "apply_ms": "setting a plan and taking it back, ms",
    "full_ms": "answer by the full plan, ms",
    "share": "share of controller and setting in that, percent",
    "break_even": "share of the full answer that a plan must save to pay, percent",
}
_BEST = 5  # sets of blocks that are shown


def profile(folder: Path) -> list[str]:
    """Write what a profile measured, and draw it into `plots/`, from the files of its folder."""
    overhead, importance, latency, lut = (
        loads_or_none(folder / f"{name}.json") or {}
        for name in ("overhead", "importance", "latency", "lut")
    )
    return [
        _overhead(overhead),
        _importance(folder, importance),
        _latency(latency),
        _lut(folder, lut),
    ]


def toy(folder: Path) -> list[str]:
    """Write what plans of a taught network are worth, and draw its training into `plots/`."""
    rows = [row for row in MetricsFile(folder / "metrics.csv").rows() if row.get("train/loss")]
    tiers = [name for name in (rows[0] if rows else {}) if name.startswith("val/")]
    if is_file(folder / "vlm.json") and tiers:
        epochs = [float(row["epoch"]) for row in rows]
        panels: dict[str, plot.Curves] = {
            "loss": {"training": (epochs, [float(row["train/loss"]) for row in rows])},
            "accuracy": {
                name.removeprefix("val/"): (epochs, [_number(row.get(name)) for row in rows])
                for name in tiers
            },
        }
        path, title = folder / "plots" / "toy_curves.png", "Teaching the network"
        plot.line_panels(path, panels, title=title, x_label="epoch")
    path = folder / "toy.csv"
    if not is_file(path):
        return []
    with path.open(newline="", encoding="utf-8") as file:
        plans = list(csv.DictReader(file))
    shown = [
        [row["plan"], *(percent(float(row[name])) for name in row if name != "plan")]
        for row in plans
    ]
    words = (
        "Percent of validation questions that each plan answers right, by kind of question. A plan"
        " differs from the full one, the finest tier, in what its name says."
    )
    return ["## What plans are worth", words, table(list(plans[0]), shown)] if plans else []


def _overhead(found: Document) -> str:
    if not found:
        return ""
    rows = [
        (words, f"{100 * found[name]:.3g}" if "percent" in words else f"{found[name]:.3g}")
        for name, words in _OVERHEAD.items()
        if name in found
    ]
    return "## What the controller costs itself\n\n" + table(("", ""), rows)


def _importance(folder: Path, found: Document) -> str:
    scores = found.get("importance_scores")
    if not scores:
        return ""
    meta, beam = found.get("meta", {}), found.get("beam", [])
    word = _SCORES.get(meta.get("method"), "score")
    always = [str(block) for block in meta.get("not_measured", [])]
    order = sorted(scores, key=lambda block: (-scores[block], int(block)))
    rows = [
        (int(block), order.index(block) + 1, scores[block])
        for block in scores
        if block not in always
    ]
    measured = [None if block in always else value for block, value in scores.items()]
    path, title = folder / "plots" / "importance.png", f"Blocks: {word}"
    plot.bar_panels(
        path, list(scores), {"score": measured}, title=title, x_label="block", scales={}
    )
    halves = meta.get("spearman_of_halves")
    lines = [
        f"Score: {word}, mean over {meta.get('samples')} {meta.get('split')} questions.",
        f"Always run, and not measured: block {', '.join(always)}." if always else "",
        f"Rank correlation of two halves of the questions: {halves:.2f}."
        if halves is not None
        else "",
    ]
    best = sorted(beam, key=lambda one: (one["drop"], -len(one["removed"])))[:_BEST]
    sets = [
        (", ".join(map(str, one["removed"])), percent(one["metric"]), f"{100 * one['drop']:.1f}")
        for one in best
    ]
    return paragraphs(
        [
            "## Which blocks matter",
            " ".join(filter(None, lines)),
            table(("block", "rank", "score"), rows),
            "Sets of blocks whose removal costs least:" if sets else "",
            table(("without blocks", "accuracy, percent", "points lost"), sets) if sets else "",
        ]
    )


def _latency(found: Document) -> str:
    stages = found.get("stages")
    if not stages:
        return ""
    fits = [
        (name, f"{one['r2']:.3f}", percent(one["mape"]), one["samples"], one["method"])
        for name, one in stages.items()
    ]
    terms = [
        (name, term, float(weight))
        for name, one in stages.items()
        for term, weight in one["weights"].items()
    ]
    return paragraphs(
        [
            "## Latency by formula",
            "Fitted to random plans, judged on plans that were left out of the fit.",
            table(("stage", "R²", "mean error, percent", "plans", "least squares"), fits),
            "Milliseconds of each term:",
            table(("stage", "term", "ms"), terms),
        ]
    )


def _lut(folder: Path, found: Document) -> str:
    plans = found.get("config_table")
    if not plans:
        return ""
    unit = found["metadata"]["unit"]
    _draw_grid(folder / "plots" / "grid.png", plans, unit)
    rows, last = [], ""
    for budget, name in found["lookup_table"].items():
        if name != last:  # the same plan serves all budgets up to the next row
            tier, experts, blocks = name.rsplit("_", 2)
            one = plans[name]
            latency = (f"{one['latency']:.1f}", f"{one['latency_std']:.1f}")
            rows.append((int(budget), tier, experts, blocks, percent(one["accuracy"]), *latency))
        last = name
    objective, questions = (
        found["metadata"]["objective"],
        max(one["num_samples"] for one in plans.values()),
    )
    columns = (
        f"budget from ({unit})",
        "tier",
        "experts",
        "blocks",
        "accuracy, percent",
        f"latency ({unit})",
        "deviation",
    )
    words = (
        f"{len(plans)} plans on {questions} questions each; latency: {objective}. The most accurate"
        " plan within each budget:"
    )
    return paragraphs(["## Grid of plans", words, table(columns, rows)])


def _draw_grid(path: Path, plans: Mapping[str, Document], unit: str) -> None:
    """Draw accuracy over latency: a panel for each tier, a curve for each number of experts."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, one in plans.items():
        tier, experts, _ = name.rsplit("_", 2)
        curves = points.setdefault(f"accuracy, {tier}", {})
        curves.setdefault(f"{experts} experts", []).append((one["latency"], one["accuracy"]))
    panels = {
        label: {name: tuple(zip(*sorted(found), strict=True)) for name, found in curves.items()}
        for label, curves in points.items()
    }
    title = "Plans, by tier, experts and blocks"
    plot.line_panels(path, panels, title=title, x_label=f"latency ({unit})", scale="percent")  # type: ignore[arg-type]


def _number(text: str | None) -> float | None:
    return float(text) if text else None
