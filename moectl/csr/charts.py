"""What the reports of a run show: curves of its training, and its scores in rows.

Every table is made of a plain JSON document. A score that is not there is None.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moectl.engine.figure import INK, PALETTE, new_axes, new_figure, write_names, write_png
from moectl.engine.plot import known_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, str]]
Document = Mapping[str, Any]

_COUNT = "prototypes in use"
_LOSS = ("loss", {"training": "train/loss", "validation": "val/loss"})
_PANELS: Mapping[str, tuple[str, Sequence[tuple[str, Mapping[str, str]]]]] = {
    "concept": (
        "stage 1, concepts",
        (_LOSS, ("score", {"AUROC": "val/concept_auroc", "mean AP": "val/concept_map"})),
    ),
    "prototype": (
        "stage 2, prototypes",
        (
            _LOSS,
            ("share of right concepts", {"": "val/assignment_accuracy"}),
            (_COUNT, {"": "val/alive"}),
            (
                "mean cosine of prototypes",
                {"within a concept": "val/within_mean", "across concepts": "val/across_mean"},
            ),
        ),
    ),
    "task": (
        "stage 3, verdict",
        (
            _LOSS,
            (
                "score",
                {
                    "AUROC": "val/task_auroc",
                    "mean AP": "val/task_map",
                    "macro-F1": "val/macro_f1",
                    "accuracy": "val/accuracy",
                },
            ),
        ),
    ),
}
_CHOOSES = {
    "concept": ("val/concept_auroc",),
    "prototype": ("val/assignment_accuracy",),
    "task": ("val/task_auroc", "val/macro_f1"),
}


class Table(NamedTuple):
    """Names of columns, and rows of that many cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


# Curves


def best_epoch(stage: str, rows: Rows) -> int | None:
    """Return the first epoch with the largest of the scores that choose the weights of a stage."""
    for column in _CHOOSES[stage]:
        epochs, values = known_points(rows, column)
        if values:
            return int(epochs[values.index(max(values))])
    return None


def learning_curves(
    path: Path, stages: Mapping[str, Rows], marked: Mapping[str, int | None]
) -> None:
    """Draw losses and validation scores over the epochs, the stages below each other.

    Args:
        path: the PNG file.
        stages: `concept`, `prototype` or `task` to the rows of its metrics.
        marked: the epoch whose weights each stage hands on, if it is known.
    """
    panels = [
        (stage, title if number == 0 else "", label, curves)
        for stage in stages
        for title, each in [_PANELS[stage]]
        for number, (label, curves) in enumerate(each)
    ]
    height = math.ceil(len(panels) / 2)
    figure = new_figure(9.6, 2.8 * height + 0.2)
    figure.set_layout_engine("constrained", wspace=0.05, hspace=0.05)  # labels keep their distance
    for place, (stage, title, label, curves) in enumerate(panels, 1):
        axes = new_axes(figure, (height, 2, place), title=title, x_label="epoch", y_label=label)
        _draw_panel(axes, stages[stage], curves, marked.get(stage))
        if label == _COUNT:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    write_png(figure, path)


def _draw_panel(axes: "Axes", rows: Rows, curves: Mapping[str, str], epoch: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    handles: dict[str, Any] = {}
    for (name, column), color in zip(curves.items(), PALETTE, strict=False):
        epochs, values = known_points(rows, column)
        if values:
            few = "o" if len(values) <= 20 else ""  # a single point has no line to be seen
            (line,) = axes.plot(
                epochs, values, color=color, linewidth=1.8, marker=few, markersize=3.5
            )
            handles |= {name: line} if name else {}
    if epoch is not None:
        style: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1, "zorder": 1}
        handles[f"weights of epoch {epoch}"] = axes.axvline(epoch, **style)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if handles:
        words = [""] * len(handles)
        legend = axes.legend(list(handles.values()), words, fontsize=8, frameon=False)
        write_names(legend, list(handles))


# Tables


def summary(document: Document) -> Table:
    """Say how good a network is, in few rows."""
    measured = [
        ("AUROC of the concepts", "concepts", "auroc_macro"),
        ("AUROC of the similarities", "similarities", "auroc_macro"),
        ("AUROC of the verdict", "task", "auroc_macro"),
        ("macro-F1 of the verdict", "task", "f1_macro"),
        ("macro-F1 of the verdict, tuned thresholds", "task", "f1_macro_tuned"),
        ("accuracy", "task", "accuracy"),
        ("balanced accuracy", "task", "balanced_accuracy"),
    ]
    rows: list[Sequence[object]] = [
        (words, *_bounded(document[kind], score))
        for words, kind, score in measured
        if score in document.get(kind, {})
    ]
    rows += [
        ("images", document["images"], None),
        ("explanations, one for each concept", document["explanations"], None),
    ]
    if kept := document.get("prototypes"):
        rows += [
            ("prototypes", kept["count"], None),
            ("prototypes with a say", kept["kept"], None),
            ("prototypes that are the nearest in some image", kept["used"], None),
        ]
    return Table(("", "value", "95 % interval"), rows)


def concept_table(document: Document) -> Table:
    """List how well each concept is found, by its map and by its prototypes."""
    found = document["concepts"]
    similar = document.get("similarities", {}).get("columns", {})
    columns = (
        *("concept", "images", "AUROC", "95 % interval", "AUROC of similarity", "AP"),
        *("F1 at 0.5", "F1 tuned", "threshold", "sensitivity at 90 % spec.", "ECE"),
    )
    rows = [
        [
            name,
            one["positives"],
            *_bounded(one, "auroc", _column_intervals(found, name)),
            number(similar.get(name, {}).get("auroc")),
            *(number(one.get(score)) for score in ("ap", "f1", "f1_tuned", "threshold")),
            *(number(one[score]) for score in ("sensitivity", "ece")),
        ]
        for name, one in found["columns"].items()
    ]
    return Table(columns, rows)


def task_table(document: Document) -> Table:
    """List how well each target is told; one class per image has a recall, others a threshold."""
    found = document["task"]
    scores = {
        "ap": "AP",
        "f1": "F1" if "confusion" in found else "F1 at 0.5",
        "f1_tuned": "F1 tuned",
        "threshold": "threshold",
        "recall": "recall",
        "sensitivity": "sensitivity at 90 % spec.",
        "ece": "ECE",
    }
    own = list(found["columns"].values())
    there = {score: words for score, words in scores.items() if own and score in own[0]}
    bounded = "columns" in found.get("intervals", {})
    rows = []
    for name, one in found["columns"].items():
        auroc = _bounded(one, "auroc", _column_intervals(found, name))
        cells = [number(one[score]) for score in there]
        rows.append([name, one["positives"], *auroc[: 1 + bounded], *cells])
    interval = ["95 % interval"] * bounded
    return Table(("target", "images", "AUROC", *interval, *there.values()), rows)


def skipped(found: Document) -> list[str]:
    """Say which columns lack which scores, one sentence for each score."""
    return [
        f"{words}: {', '.join(names)}."
        for score, words in _SKIPPED.items()
        if (names := found["skipped"].get(score))
    ]


_SKIPPED = {
    "auroc": "No AUROC, as no image has it or all have",
    "ap": "No AP and F1, as no image has it",
}


def pointing_table(document: Document) -> Table:
    """List how often maps point into the boxes of their concept."""
    cams, similar = (document["pointing"].get(kind, {}) for kind in ("cams", "similarities"))
    columns = ("concept", "boxed images", "map", "similarity", "chance", "IoU of map")
    rows: list[list[object]] = [
        [
            name,
            one["pairs"],
            number(one["rate"]),
            number(similar.get("columns", {}).get(name, {}).get("rate")),
            number(one["chance"]),
            number(one["iou"]),
        ]
        for name, one in cams["columns"].items()
    ]
    for words, end in (("all boxes alike", "micro"), ("mean of the concepts", "macro")):
        rows.append(
            [
                words,
                cams["pairs"],
                number(cams[f"rate_{end}"]),
                number(similar.get(f"rate_{end}")),
                number(cams[f"chance_{end}"]),
                number(cams[f"iou_{end}"]),
            ]
        )
    return Table(columns, rows)


def baseline_table(document: Document) -> Table:
    """Set the verdict beside simpler ones on the same backbone."""
    several = any("accuracy" not in row["task"] for row in document["rows"])
    last = "F1 tuned" if several else "accuracy"
    columns = (
        *("verdict", "inputs", "parameters", "AUROC", "95 % interval", "macro-F1", last),
        "p against csr",
    )
    rows = [
        [
            row["name"],
            row["inputs"],
            row["parameters"],
            *_bounded(row["task"], "auroc_macro"),
            number(row["task"]["f1_macro"]),
            number(row["task"]["f1_macro_tuned" if several else "accuracy"]),
            small(row["p_value"]),
        ]
        for row in document["rows"]
    ]
    return Table(columns, rows)


def study_table(document: Document) -> Table:
    """List what corrections with the true labels bring."""
    columns = (
        *("correction", "asked", "fixed", "broke", "net", "p"),
        *("macro-F1 before", "macro-F1 after", "P(true) before", "P(true) after"),
    )
    rows: list[list[object]] = [
        [f"{one['name']}: {one['mode']}, margin {one['margin']:g}", one["asked"], *_change(one)]
        for one in document["results"]
    ]
    if boxes := document["boxes"]:
        rows.append(["true boxes", boxes["images"], *_change(boxes)])
    return Table(columns, rows)


def _change(found: Document) -> list[object]:
    pairs = (found[name] for name in ("f1_macro", "true_probability"))
    return [
        *(found[name] for name in ("fixed", "broke", "net")),
        small(found["p_value"]),
        *(number(pair[when]) for pair in pairs for when in ("before", "after")),
    ]


def _column_intervals(found: Document, name: str) -> Document:
    known: Document = found.get("intervals", {}).get("columns", {}).get(name, {})
    return known


def _bounded(
    found: Document, score: str, intervals: Document | None = None
) -> tuple[str | None, str | None]:
    """Return a score and its interval in words."""
    known = found.get("intervals", {}) if intervals is None else intervals
    bounds = known.get(score)
    words = f"{bounds[0]:.3f} – {bounds[1]:.3f}" if bounds else None
    return number(found.get(score)), words


def number(value: float | None) -> str | None:
    """Write a score with three digits."""
    return None if value is None else f"{value:.3f}"


def small(value: float | None) -> str | None:
    """Write a p-value with two leading digits."""
    return None if value is None else f"{value:.2g}"
