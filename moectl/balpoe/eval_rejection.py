"""The rejection part of `moectl balpoe eval`: both label priors, and the files."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.balpoe.fitted import Fitted, find_plugin, read_plugin
from moectl.balpoe.groups import Groups, class_groups
from moectl.balpoe.inference import Classifier
from moectl.balpoe.priors import label_prior
from moectl.balpoe.selective import Task, compare
from moectl.balpoe.settings import BalpoeSettings, PluginSection
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, write_json, write_text

log = logging.getLogger(__name__)

PRIORS = {"train": "as in training", "uniform": "all equal"}
TITLES = {
    "balpoe": "BalPoE",
    "plugin_single": "Plugin_Single",
    "plugin_balpoe_avg": "Plugin_BalPoE_avg",
    "moe_plugin": "MoE_Plugin",
}
"""Names in the files that the original document describes; other methods keep theirs."""


def evaluate_rejection(
    found: Classifier, settings: BalpoeSettings, plugins: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Measure all methods under both label priors and write `evals/rejection@TAG/`.

    Args:
        found: the classifier.
        settings: of its run; `plugin` says how plug-ins are fitted, `eval` how much is measured.
        plugins: saved plug-ins to be measured too, names or files.

    Returns:
        The JSON document; None, with a warning, where there is nothing to measure.

    Raises:
        UserError: if a saved plug-in does not fit.
    """
    section, outputs = settings.plugin, found.outputs
    saved = {name: read_plugin(find_plugin(found.folder, name)) for name in plugins}
    try:
        if not section.rates:
            raise UserError("plugin.rates is empty")
        groups = class_groups(
            section.groups, outputs.class_counts, outputs.class_names, section.tail_threshold
        )
        for name, fitted in saved.items():
            _check_saved(name, fitted, found, groups, section)
        by_prior = {}
        for name, words in PRIORS.items():
            log.info("rejection: class shares %s", words)
            prior = label_prior(name, outputs.class_counts)
            task = Task(outputs, settings, groups, prior, settings.train.seed)
            by_prior[name] = compare(task, saved)
    except (UserError, ValueError) as error:
        if plugins:
            raise UserError(str(error), getattr(error, "hint", "")) from None
        log.warning("rejection is not measured: %s", error)
        return None
    document = {
        "weights": found.weights,
        "groups": {"names": list(groups.names), "of_class": list(groups.of_class)},
        "rates": list(section.rates),
        "val_images": len(outputs.val_labels),
        "test_images": len(outputs.test_labels),
        "trials": settings.eval.trials,
        "bootstrap": settings.eval.bootstrap,
        "config": section.model_dump(mode="json"),
        "priors": by_prior,
    }
    _write(found.folder / "evals" / f"rejection@{found.tag}", document)
    return document


def _check_saved(
    name: str, fitted: Fitted, found: Classifier, groups: Groups, section: PluginSection
) -> None:
    if fitted.weights["sha256"] != found.weights["sha256"]:
        raise UserError(
            f"plug-in {name}: fitted to the weights {fitted.weights['sha256'][:12]}, these are"
            f" {found.weights['sha256'][:12]}",
            "moectl balpoe plugin fits one to these",
        )
    points = [*({"rate": rate} for rate in section.rates), *({"cost": c} for c in section.costs)]
    for point in points:
        try:
            fitted.plugin.point(**point)
        except ValueError as error:
            raise UserError(
                f"plug-in {name}: {error}",
                "measure at its points with --set plugin.rates=… and plugin.costs=…",
            ) from None
    if fitted.plugin.groups != groups:
        raise UserError(
            f"plug-in {name}: fitted for the groups {', '.join(fitted.plugin.groups.names[:5])},"
            f" measured are {', '.join(groups.names[:5])}",
            "give the same with --set plugin.groups=…",
        )


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    """Write everything as `metrics.json`, and in parts under the original's names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", document)
    write_json(folder / "config.json", document["config"])
    rows = [
        (prior, name, method)
        for prior, part in document["priors"].items()
        for name, method in part["methods"].items()
    ]
    write_json(folder / "aurc_comparison.json", [_area_row(*row) for row in rows])
    write_json(folder / "accuracy_comparison.json", [_accuracy_row(*row) for row in rows])
    write_json(
        folder / "risk_coverage_results.json",
        [
            {"Method": TITLES.get(name, name), "Label prior": prior, **method["curve"]}
            for prior, name, method in rows
        ],
    )
    write_json(folder / "detailed_results.json", _trial_rows(rows))
    write_text(folder / "risk_coverage.csv", csv_text(_curve_rows(document)))


def _area_row(prior: str, name: str, method: Mapping[str, Any]) -> dict[str, Any]:
    balanced, worst = method["aurc"]["balanced"], method["aurc"]["worst"]
    return {
        "Method": TITLES.get(name, name),
        "Label prior": prior,
        "Balanced AURC": balanced["normalised"],
        "Worst-Group AURC": worst["normalised"],
        "Balanced AURC raw": balanced["raw"],
        "Worst-Group AURC raw": worst["raw"],
        "Span": balanced["span"],
    }


def _accuracy_row(prior: str, name: str, method: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a method at its lowest rejection rate."""
    curve = method["curve"]["matched"]
    first = min(range(len(curve["rejection"])), key=lambda point: curve["rejection"][point])
    return {
        "Method": TITLES.get(name, name),
        "Label prior": prior,
        "Rejection": curve["rejection"][first],
        "Accuracy": 1 - curve["standard_error"][first],
        "Balanced accuracy": 1 - curve["balanced_error"][first],
        "Worst-group accuracy": 1 - curve["worst_error"][first],
    }


def _trial_rows(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "Method": TITLES.get(name, name),
            "Label prior": prior,
            "Balanced AURC": method["aurc"]["balanced"]["trials"],
            "Worst-Group AURC": method["aurc"]["worst"]["trials"],
        }
        for prior, name, method in rows
    ]


def _curve_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each label prior, method, kind of threshold and rejection rate."""
    names = document["groups"]["names"]
    return [
        {"label_prior": prior, "method": name, "threshold": kind, "rate": rate}
        | _at_point(curve, point, names)
        for prior, part in document["priors"].items()
        for name, method in part["methods"].items()
        for kind, curve in method["curve"].items()
        for point, rate in enumerate(document["rates"])
    ]


def _at_point(curve: Mapping[str, Any], point: int, groups: Sequence[str]) -> dict[str, Any]:
    plain = ("rejection", "balanced_error", "worst_error", "standard_error", "gap")
    row = {name: curve[name][point] for name in plain}
    for what, column in (("error", "group_errors"), ("coverage", "group_coverage")):
        values = zip(groups, curve[column][point], strict=True)
        row |= {f"{what}_{group}": value for group, value in values}
    return row
