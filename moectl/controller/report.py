"""The report of a run: tables and pictures from the files of its folder alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.controller import report_profile
from moectl.controller.plots import evaluation_pictures, training_curves
from moectl.controller.settings import ControllerSettings
from moectl.engine.files import is_file, write_text
from moectl.engine.report import image, paragraphs, percent, table, write_report
from moectl.engine.tracking import MetricsFile, loads_or_none

_TRAINING, _VALIDATION = "training_history.csv", "validation_history.csv"
_COLUMNS = {
    "reward_mean": "reward",
    "accuracy_mean": "accuracy",
    "latency_mean": "latency",
    "budget_violation_rate": "beyond the budget",
}
_FIRST, _TABLE = "controller", "lut"


def report(folder: Path) -> None:
    """Write `plots/*.png`, `report.md` and `report.html` from what the folder of a run holds."""
    (folder / "plots").mkdir(exist_ok=True)
    record = loads_or_none(folder / "run.json") or {}
    parts = [
        *report_profile.toy(folder),
        *report_profile.profile(folder),
        _training(folder, record),
    ]
    pictures = sorted(folder.glob("plots/*.png"))
    parts += [image(str(one.relative_to(folder)), _caption(one)) for one in pictures]
    for path in sorted(folder.glob("evals/*/eval.json")):
        if document := loads_or_none(path):
            parts += [f"## `{path.parent.name}`", *_evaluation(document)]
            pictures = sorted(path.parent.glob("*.png"))
            parts += [image(str(one.relative_to(folder)), _caption(one)) for one in pictures]
    write_report(folder, ControllerSettings(), parts)


def report_again(folder: Path) -> None:
    """Write the report once more after a measurement, if the folder is that of a run."""
    if is_file(folder / "run.json"):
        report(folder)


def draw_evaluation(folder: Path, document: Mapping[str, Any]) -> None:
    """Draw the pictures of an evaluation, and write its text, into its folder."""
    evaluation_pictures(folder, document)
    write_text(folder / "eval.md", evaluation_text(document))


def evaluation_text(document: Mapping[str, Any]) -> str:
    """Write what one evaluation found, as Markdown."""
    return paragraphs(_evaluation(document))


def _training(folder: Path, record: Mapping[str, Any]) -> str:
    training, validation = (MetricsFile(folder / name).rows() for name in (_TRAINING, _VALIDATION))
    if not training or not validation:
        return ""
    training_curves(folder / "plots" / "training_curves.png", training, validation)
    best = max(validation, key=lambda row: float(row["reward_mean"]))
    shown = {
        f"training, epoch {training[-1]['epoch']}": training[-1],
        f"validation, epoch {validation[0]['epoch']}": validation[0],
        f"validation, epoch {best['epoch']}, the best": best,
        f"validation, epoch {validation[-1]['epoch']}": validation[-1],
    }
    world = record.get("world") or {}
    low, high = world.get("budgets") or (None, None)
    unit = world.get("unit", "ms")
    words = f"Budgets from {low:.4g} to {high:.4g} {unit}. " if low is not None else ""
    rows = [(name, *(_shown(row, column) for column in _COLUMNS)) for name, row in shown.items()]
    return paragraphs(
        [
            "## Training",
            f"{words}In training plans are drawn, in validation each question has the most probable"
            " one.",
            table(("", *_COLUMNS.values()), rows),
        ]
    )


def _shown(row: Mapping[str, str], column: str) -> str:
    value = float(row[column])
    if column == "latency_mean":
        return f"{value:.4g}"
    return f"{value:.4f}" if column == "reward_mean" else f"{percent(value)} %"


def _evaluation(document: Mapping[str, Any]) -> list[str]:
    weights, latency, unit = document["weights"], document["latency"], document["unit"]
    source = {
        "measured": f"measured on {document['device']}, {latency['clock']} clock, repeats"
        f" {latency['repeats']}",
        "table": "predicted from tables",
        "flops": "work in place of time",
    }[latency["source"]]
    parts = [
        f"`{weights['file']}`, epoch {weights['epoch']}; answers of {document['model']}. Latency:"
        f" {latency['objective']} in {unit}, {source}. The full plan takes"
        f" {document['full_latency']:.4g} {unit}. To choose a plan takes"
        f" {document['decide_ms']:.3g} ms; {document['controller_ms']:.3g} ms are counted for it."
    ]
    for name, part in document["datasets"].items():
        parts.append(f"### {name}: {part['num_samples']} {document['split']} questions")
        parts += _tables(document, part)
        parts += _compared(part)
    return parts


def _tables(document: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    """Write a table for each figure, policies below each other, budgets side by side."""
    found = {(one["policy"], one["latency_budget"]): one["metrics"] for one in part["results"]}
    unit, budgets = document["unit"], document["budgets"]
    kinds = {
        "Accuracy in percent": ("accuracy", percent),
        "Accuracy in percent, late answers count as wrong": ("accuracy_in_time", percent),
        f"Mean latency in {unit}": ("avg_latency_ms", "{:.4g}".format),
        "Percent of answers beyond the budget": ("budget_violation_rate", percent),
    }
    columns = (f"budget ({unit})", *(f"{budget:g}" for budget in budgets))
    parts = []
    for words, (name, shown) in kinds.items():
        rows = [
            (policy, *(shown(found[policy, budget][name]) for budget in budgets))
            for policy in document["policies"]
        ]
        parts += [f"{words}:", table(columns, rows)]
    return [*parts, *_areas(document, part), *_published(document, part)]


def _areas(document: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    summary = part["pareto"]["summary"]
    rows = [
        (
            policy,
            percent(summary[policy]["budget_area"]),
            f"{summary[policy]['hypervolume']:.4g}",
        )
        for policy in document["policies"]
    ]
    columns = ("", "mean accuracy over the budgets, percent", "hypervolume")
    corner = f"{document['full_latency']:.4g} {document['unit']}"
    return [
        f"Hypervolume: area between the front and the corner of accuracy 0 at {corner}, which the"
        " full plan takes.",
        table(columns, rows),
    ]


def _published(document: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    """Write the scores that others publish, of the largest budget."""
    names = ("vqa_official", "cider_d", "bleu4", "rouge_l")
    budget = document["budgets"][-1]
    last = [one for one in part["results"] if one["latency_budget"] == budget]
    known = [name for name in names if name in last[0]["metrics"]]
    if not known:
        return []
    rows = [(one["policy"], *(f"{one['metrics'][name]:.4f}" for name in known)) for one in last]
    return [f"Under a budget of {budget:g} {document['unit']}:", table(("", *known), rows)]


def _compared(part: Mapping[str, Any]) -> list[str]:
    """Write what the controller has more than each other policy, over all budgets."""
    overall = [one for one in part["comparisons"] if one["latency_budget"] is None]
    if not overall:
        return []
    rows = [
        (one["against"], *(_gain(one[kind]) for kind in ("accuracy", "accuracy_in_time")))
        for one in overall
    ]
    columns = ("controller less", "accuracy", "accuracy, late is wrong")
    return [
        "Points of accuracy that the controller has more on the same questions, mean over all"
        " budgets, with a 95 % bootstrap interval over questions:",
        table(columns, rows),
        *(verdict(one, part) for one in overall if one["against"] == _TABLE),
    ]


def _gain(found: Mapping[str, float]) -> str:
    return (
        f"{100 * found['difference']:+.2f} [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]"
    )


def verdict(one: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """Say in words how the controller compares with the lookup table.

    Args:
        one: their comparison over all budgets.
        part: of the evaluation, on one data set.
    """
    late = {name: _missed(part["results"], name) for name in (_FIRST, _TABLE)}
    timely = one["accuracy_in_time"]
    words = _sided(timely)
    note = ""
    if _sided(one["accuracy"]) != words:
        note = f" When late answers count too, it is {_sided(one['accuracy'])}."
    sure = "One set of questions, one training: another seed may differ."
    return (
        f"Against the lookup table the controller is {words} when late answers count as wrong"
        f" ({_gain(timely)} points).{note} Of its answers"
        f" {percent(late[_FIRST])} % come late, of the table's {percent(late[_TABLE])} %. {sure}"
    )


def _sided(found: Mapping[str, float]) -> str:
    if found["low"] > 0:
        return "more accurate"
    return "less accurate" if found["high"] < 0 else "neither better nor worse beyond chance"


def _missed(results: Sequence[Mapping[str, Any]], policy: str) -> float:
    rates = [
        float(one["metrics"]["budget_violation_rate"]) for one in results if one["policy"] == policy
    ]
    return sum(rates) / len(rates)


def _caption(path: Path) -> str:
    return path.stem.replace("_", " ")
