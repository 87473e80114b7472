"""The report of a run: tables and pictures from the files of its folder alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.engine.files import is_file
from moectl.engine.report import image, paragraphs, percent, table, write_report
from moectl.engine.tracking import MetricsFile, loads_or_none
from moectl.taskmoe.heat_maps import expert_analysis
from moectl.taskmoe.pictures import learning_curve
from moectl.taskmoe.published import PUBLISHED
from moectl.taskmoe.settings import TaskmoeSettings

_PARTS = {
    "full": "whole model",
    "gating_only": "gating features alone",
    "experts_only": "experts alone",
    "uniform_gate": "equal gates",
    "top1_gate": "largest gate alone",
    "oracle_gate": "gates on the owners of the true class",
}


def report(folder: Path) -> None:
    """Write `plots/*.png`, `report.md` and `report.html` from what the folder of a run holds."""
    (folder / "plots").mkdir(exist_ok=True)
    draw_curve(folder)
    parts = [
        _specialist(loads_or_none(folder / "summary.json") or {}),
        _merge(loads_or_none(folder / "merge_report.json") or {}),
    ]
    evaluations = sorted(folder.glob("evals/test@*/results.json"))
    for path in evaluations:
        if document := loads_or_none(path):
            parts += _evaluation(document, f"weights `{path.parent.name.partition('@')[2]}`")
    for path in sorted(folder.glob("evals/comparison@*/comparison.json")):
        parts.append(_comparison(loads_or_none(path) or {}))
    pictures = [*folder.glob("plots/*.png"), *folder.glob("evals/*/*.png")]
    if evaluations:  # theirs is the same picture
        pictures = [path for path in pictures if path != folder / "plots" / "expert_analysis.png"]
    parts += ["## Pictures"] if pictures else []
    parts += [image(str(path.relative_to(folder)), _caption(path)) for path in sorted(pictures)]
    write_report(folder, TaskmoeSettings(), parts)


def report_again(folder: Path) -> None:
    """Write the report once more after a measurement, if the folder is that of a run."""
    if is_file(folder / "run.json"):
        report(folder)


def draw_curve(folder: Path) -> None:
    """Draw `plots/learning_curve.png` from metrics.csv, if an epoch is done."""
    rows = [row for row in MetricsFile(folder / "metrics.csv").rows() if row.get("train/loss")]
    if not rows:
        return
    scored = [row for row in rows if row.get("val/accuracy")]
    best = max(scored, key=lambda row: float(row["val/accuracy"]), default=None)
    (folder / "plots").mkdir(exist_ok=True)
    epoch = int(best["epoch"]) if best else None
    learning_curve(folder / "plots" / "learning_curve.png", rows, epoch)


def draw_analysis(folder: Path, document: Mapping[str, Any], name: str) -> None:
    """Draw what the experts do as `plots/NAME`."""
    (folder / "plots").mkdir(exist_ok=True)
    path = folder / "plots" / name
    expert_analysis(path, document, document["class_names"], document["owners"])


def evaluation_text(document: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Write the report of one evaluation, to lie beside the pictures named."""
    title = f"# Task {document['task']}"
    shown = [image(name, _caption(Path(name))) for name in pictures]
    return paragraphs([title, *_evaluation(document, "test images"), *shown])


def _caption(path: Path) -> str:
    return path.stem.replace("_", " ")


def _specialist(summary: Mapping[str, Any]) -> str:
    found = summary.get("best")
    if not found:
        return ""
    rows = [[name, percent(share)] for name, share in found["classes"].items()]
    rows.append(["all", percent(found["accuracy"])])
    where = f"{found['images']} test images of its classes, weights of epoch {found['epoch']}."
    return f"## Results\n\nPercent of the {where}\n\n" + table(("class", "accuracy"), rows)


def _merge(document: Mapping[str, Any]) -> str:
    if not document:
        return ""
    experts = range(len(document["step_zero"]["own_accuracy"]))
    rows: list[list[object]] = []
    for name, words in (("step_zero", "merged"), ("random_control", "random weights")):
        found = document[name]
        own = [percent(share) for share in found["own_accuracy"]]
        rows.append([words, percent(found["union_accuracy"]), *own])
    chance = document["step_zero"]
    rows.append(["chance", percent(chance["union_chance"]), *map(percent, chance["own_chance"])])
    columns = ("", "all classes", *(f"expert {number} on its own" for number in experts))
    groups = list(document["correlations"][0]) if document["correlations"] else []
    gains = [
        [
            name,
            *(
                f"{part[name]['before']:.2f} → {part[name]['after']:.2f}"
                for part in document["correlations"]
            ),
        ]
        for name in groups
    ]
    matched = [f"specialist {number}" for number in range(2, len(document["correlations"]) + 2)]
    layers = [
        [layer, *(f"{value:.3f}" for value in each)]
        for layer, each in document["distances"].items()
    ]
    sizes = [[name, f"{count:,}"] for name, count in document["parameters"].items()]
    return paragraphs(
        [
            "## Before any training",
            f"Percent of {chance['images']} {document['measured_on']}; on its own: among the"
            " classes of a specialist, all images of which go to its expert.",
            table(columns, rows),
            *(
                (
                    "Mean correlation of the channels with the first specialist's, as trained and"
                    " as matched:",
                    table(("channels", *matched), gains),
                )
                if gains
                else ()
            ),
            "Distance of each specialist's weights to their mean, relative to that:",
            table(("layer", *(f"specialist {number + 1}" for number in experts)), layers),
            "Parameters:",
            table(("part", "parameters"), sizes),
        ]
    )


def _evaluation(document: Mapping[str, Any], what: str) -> list[str]:
    return [
        _headline(document, what),
        _classes(document),
        _groups(document),
        _experts(document),
    ]


def _comparison(document: Mapping[str, Any]) -> str:
    if not document:
        return ""
    alone = [
        [f"{one['specialist']}: its own classes", *_bounded(one), None, None]
        for one in document["own_classes"]
    ]
    rows = []
    for row in document["rows"]:
        gain = None if row["accuracy"] is None else f"{row['difference']:+.2f}"
        p_value = None if row["p_value"] is None else f"{row['p_value']:.2g}"
        rows.append([row["name"], *_bounded(row), gain, p_value])
    columns = ("", "accuracy", "95 % interval", f"less {document['against']}", "McNemar p")
    seeds = document["seeds"]
    count = len(seeds["accuracies"])
    spread = (
        f"Over {count} seeds the mixture reaches {seeds['mean']:.2f} ± {seeds['std']:.2f}."
        if count > 1
        else "One seed."
    )
    where = f"Percent of {document['images']} test images."
    return paragraphs(["## Comparison", where, table(columns, [*alone, *rows]), spread])


def _bounded(row: Mapping[str, Any]) -> list[str | None]:
    if row["accuracy"] is None:
        return [None, None]
    return [f"{row['accuracy']:.2f}", f"{row['low']:.1f} – {row['high']:.1f}"]


def _headline(document: Mapping[str, Any], what: str) -> str:
    interval = document["interval"]
    bounds = f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
    shares = [document["macro_accuracy"], document["group_accuracy"]]
    within = document["within_group_accuracy"]
    rows: list[list[object]] = [
        ["accuracy", f"{document['overall_accuracy']:.2f}{bounds}"],
        ["mean over classes", f"{shares[0]:.2f}"],
        ["right group of classes", f"{shares[1]:.2f}"],
        ["right class within it", None if within is None else f"{within:.2f}"],
        ["ECE", f"{document['ece15']:.2f}"],
        ["NLL", f"{document['nll']:.3f}"],
        ["temperature of the gates", f"{document['temperature']:.3f}"],
    ]
    published = PUBLISHED.get(document["task"])
    if published:
        rows.append([f"published: {published.note}", f"{published.overall:.2f}"])
    notes = [f"Percent of {document['n']} test images, 95 % interval after Wilson."]
    if document["count_shared_twice"]:
        notes.append(
            "In the accuracy images of shared classes count as often as the files hold them."
        )
    if document["leakage"]:
        notes.append(f"{document['leakage']} of them are among the training images too.")
    seen = document["selected_on"] == "test"
    warning = "> The best epoch was chosen on these very images." if seen else ""
    return paragraphs([f"## Results, {what}", " ".join(notes), warning, table(("", ""), rows)])


def _classes(document: Mapping[str, Any]) -> str:
    published = PUBLISHED.get(document["task"])
    rows = []
    for name, accuracy in document["class_accuracies"].items():
        found = document["classes"][name]
        bounds = (found["wilson_low"], found["wilson_high"])
        interval = None if bounds[0] is None else f"{bounds[0]:.1f} – {bounds[1]:.1f}"
        theirs = [published.classes.get(name)] if published else []
        shown = None if accuracy is None else f"{accuracy:.1f}"
        rows.append([name, found["n"], shown, interval, *theirs])
    columns = ["class", "images", "accuracy", "95 % interval"] + ["published"] * bool(published)
    confusions = ", ".join(
        f"{one['true']} as {one['predicted']} ({one['n']})" for one in document["top_confusions"]
    )
    most = f"Most frequent confusions: {confusions}." if confusions else ""
    return paragraphs(["### Classes", table(columns, rows), most])


def _groups(document: Mapping[str, Any]) -> str:
    def shown(values: Sequence[float | None]) -> list[str | None]:
        return [None if value is None else f"{value:.2f}" for value in values]

    rows: list[list[object]] = [
        ["accuracy if only its classes may be chosen", *shown(document["per_task_accuracy"])],
        ["mean gate", *(f"{share:.3f}" for share in document["usage"])],
    ]
    experts = [f"expert {number}" for number in range(len(document["usage"]))]
    ablations = [[words, f"{document['ablations'][name]:.2f}"] for name, words in _PARTS.items()]
    return paragraphs(
        [
            "### Experts and gates",
            table(("", *experts), rows),
            table(("what decides", "accuracy"), ablations),
        ]
    )


def _experts(document: Mapping[str, Any]) -> str:
    found = document["expert_analysis"]
    names = document["specialists"]
    matching = ", ".join(
        f"expert {number} – {names[owner]}" for number, owner in enumerate(found["matching"])
    )
    return (
        f"Experts an image uses on average: {found['effective_experts']:.2f}."
        f" Mean gate of the owners of a class: {found['owner_alignment']:.3f}."
        f" Information of expert and class: {found['specialisation']:.3f} nats."
        f" Best matching: {matching}."
    )
