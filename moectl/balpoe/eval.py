"""Accuracy, calibration, shifted test sets and expert diversity of a classifier."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moectl.balpoe.eval_rejection import evaluate_rejection
from moectl.balpoe.inference import open_classifier
from moectl.balpoe.logits import Outputs
from moectl.balpoe.longtail import shifted_indices
from moectl.balpoe.losses import log_posterior, log_prior, target_log_priors, to_uniform
from moectl.balpoe.priors import PSEUDO_ITEMS, calibrate, estimate_prior
from moectl.balpoe.report import report
from moectl.balpoe.settings import BalpoeSettings
from moectl.common import calibration as calibrated
from moectl.common import scores
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, write_json, write_text

if TYPE_CHECKING:
    from rich.table import Table


_LARGEST_CONFUSION = 1000


def epoch_scores(
    logits: Tensor, labels: Tensor, class_counts: list[int]
) -> dict[str, float | None]:
    """Return the validation scores of one epoch: ensemble, shots, experts, calibration."""
    classes = len(class_counts)
    ensemble = logits.mean(1)
    found = _accuracies(ensemble, labels, class_counts)
    probabilities = ensemble.softmax(1)
    bins = calibrated.reliability(probabilities, labels)
    experts = {
        f"val/balanced_accuracy_expert_{number}": scores.balanced_accuracy(
            logits[:, number].argmax(1), labels, classes
        )
        for number in range(logits.shape[1])
    }
    return {
        "val/loss": calibrated.negative_log_likelihood(probabilities, labels),
        **{f"val/{name}": value for name, value in found.items()},
        "val/ece": calibrated.expected_calibration_error(bins),
        **experts,
    }


def _accuracies(
    class_scores: Tensor, labels: Tensor, class_counts: list[int]
) -> dict[str, float | None]:
    classes = len(class_counts)
    predictions = class_scores.argmax(1)
    per_class = scores.per_class_accuracy(predictions, labels, classes)
    shots = scores.grouped_accuracy(per_class, scores.shot_groups(class_counts))
    return {
        "accuracy": scores.accuracy(predictions, labels),
        "balanced_accuracy": scores.balanced_accuracy(predictions, labels, classes),
        **{f"accuracy_{name}": value for name, value in shots.items()},
    }


def measure(outputs: Outputs, settings: BalpoeSettings) -> dict[str, Any]:
    """Evaluate a classifier on the test set; the temperature is fitted on the validation set.

    Returns:
        A JSON document: `scores` (the headline numbers), `accuracy`, `per_class`, `confusion`,
        `shifted`, `calibration`, `reliability`, `diversity`.
    """
    logits, labels, counts = outputs.test_logits, outputs.test_labels, outputs.class_counts
    prior = log_prior(counts)
    taus = torch.tensor(outputs.taus)
    accuracy = accuracy_table(logits, labels, counts, taus)
    calibration = calibration_table(logits, labels, prior, taus, settings.eval.bins)
    ensemble = logits.mean(1)
    calibration["ensemble"]["temperature"] = calibrated.fit_temperature(
        outputs.val_logits.mean(1), outputs.val_labels
    )
    classes = len(counts)
    fair = to_uniform(logits, prior, taus)
    head = {
        **accuracy["ensemble"],
        **{name: calibration["ensemble"][name] for name in ("ece", "mce", "nll")},
    }
    return {
        "scores": head,
        "accuracy": accuracy,
        "per_class": scores.per_class_accuracy(ensemble.argmax(1), labels, classes),
        "confusion": _confusion(ensemble, labels, classes),
        "shifted": shifted_table(outputs, settings.eval.shifts),
        "calibration": calibration,
        "reliability": reliability_table(logits, labels, prior, taus, settings.eval.bins),
        "diversity": asdict(scores.expert_diversity(fair, labels, scores.shot_groups(counts))),
        "class_names": outputs.class_names,
        "class_counts": counts,
        "images": len(labels),
    }


def accuracy_table(
    logits: Tensor, labels: Tensor, class_counts: list[int], taus: Tensor
) -> dict[str, dict[str, float | None]]:
    """Accuracies of the ensemble and of each expert, as trained and moved to the uniform prior.

    Args:
        logits: (N, E, K).
        labels: (N,).
        class_counts: training images per class, K of them.
        taus: (E,) prior strengths.
    """
    prior = log_prior(class_counts)
    uniform = torch.full_like(prior, -math.log(len(class_counts)))
    rows = {
        "ensemble": logits.mean(1),
        "ensemble_adjusted": log_posterior(logits, prior, taus, uniform),
    }
    adjusted = to_uniform(logits, prior, taus)
    for number in range(logits.shape[1]):
        rows[f"expert_{number}"] = logits[:, number]
        rows[f"expert_{number}_adjusted"] = adjusted[:, number]
    return {
        name: {
            **_accuracies(row, labels, class_counts),
            "top5": scores.topk_accuracy(row, labels, min(5, row.shape[1])),
        }
        for name, row in rows.items()
    }


def calibration_table(
    logits: Tensor, labels: Tensor, prior: Tensor, taus: Tensor, bins: int
) -> dict[str, dict[str, float]]:
    """Calibration of the ensemble, and of each expert at its own target prior and the uniform one.

    An expert trained with tau aims at the prior p(y)^(1 - tau); natively it is measured on test
    items re-weighted to that prior. `kl` is the divergence of its mean prediction from the prior it
    aims at.

    Source: Sanchez Aimar et al. 2023.
    """
    classes = logits.shape[2]
    uniform = torch.full((classes,), 1 / classes)
    targets = target_log_priors(prior, taus).exp()
    adjusted = to_uniform(logits, prior, taus).softmax(2)
    table = {"ensemble": _calibration(logits.mean(1).softmax(1), labels, uniform, bins)}
    for number in range(logits.shape[1]):
        native = logits[:, number].softmax(1)
        table[f"expert_{number}"] = _calibration(native, labels, targets[number], bins)
        table[f"expert_{number}_adjusted"] = _calibration(
            adjusted[:, number], labels, uniform, bins
        )
    return table


def reliability_table(
    logits: Tensor, labels: Tensor, prior: Tensor, taus: Tensor, bins: int
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy over confidence of the ensemble, and of each expert at its own target prior."""

    def rows(z: Tensor, weights: Tensor | None) -> list[dict[str, Any]]:
        return [asdict(row) for row in calibrated.reliability(z.softmax(1), labels, bins, weights)]

    targets = target_log_priors(prior, taus).exp()
    table = {"ensemble": rows(logits.mean(1), None)}
    for number in range(logits.shape[1]):
        weights = scores.prior_weights(labels, targets[number])
        table[f"expert_{number}"] = rows(logits[:, number], weights)
    return table


def _confusion(ensemble: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Counts, rows are true classes; empty where nobody could look at them all."""
    if classes > _LARGEST_CONFUSION:
        return []
    return list(scores.confusion(ensemble.argmax(1), labels, classes).tolist())


def _calibration(
    probabilities: Tensor, labels: Tensor, target: Tensor, bins: int
) -> dict[str, float]:
    weights = scores.prior_weights(labels, target)
    found = calibrated.calibration(probabilities, labels, bins, weights)
    return {**found, "kl": calibrated.marginal_kl(probabilities, target, weights)}


def shifted_table(outputs: Outputs, ratios: tuple[float, ...]) -> list[dict[str, Any]]:
    """Accuracy under shifted test distributions: prior unknown, estimated from the images, known.

    With a prior q, log q is added to the ensemble logits, which aim at the uniform prior. The
    estimate sees no test label, only posteriors made to fit the validation labels.
    """
    labels, classes = outputs.test_labels, len(outputs.class_counts)
    per_class = torch.bincount(labels, minlength=classes)
    if not ratios or not per_class.min():
        return []  # without items of every class there is no such distribution
    ensemble, uniform = outputs.test_logits.mean(1), torch.zeros(classes)
    correction = calibrate(outputs.val_logits.mean(1).log_softmax(1), outputs.val_labels)
    shapes: list[tuple[Literal["forward", "uniform", "backward"], float]] = [
        *(("forward", ratio) for ratio in ratios),
        ("uniform", 1.0),
        *(("backward", ratio) for ratio in reversed(ratios)),
    ]
    rows = []
    for profile, ratio in shapes:
        numbers = shifted_indices(labels.numpy(), profile, ratio, int(per_class.max()))
        chosen = torch.as_tensor(numbers)
        kept, truth = ensemble[chosen], labels[chosen]
        counts = torch.bincount(truth, minlength=classes).double()
        known = kept + (counts / counts.sum() + 1e-12).log()
        corrected = correction.apply(kept.log_softmax(1))
        estimate = estimate_prior(corrected, uniform, pseudo_items=PSEUDO_ITEMS)
        estimated = kept + (estimate + 1e-12).log()
        rows.append(
            {
                "profile": profile,
                "ratio": ratio,
                "images": len(truth),
                "accuracy": scores.accuracy(kept.argmax(1), truth),
                "accuracy_estimated_prior": scores.accuracy(estimated.argmax(1), truth),
                "accuracy_known_prior": scores.accuracy(known.argmax(1), truth),
            }
        )
    return rows


def write_evaluation(
    folder: Path, name: str, document: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    """Write `evals/NAME.json` and its tables as CSV."""
    evals = folder / "evals"
    evals.mkdir(exist_ok=True)
    write_json(evals / f"{name}.json", {"weights": dict(weights), **document})
    rows = [{"model": model, **row} for model, row in document["accuracy"].items()]
    write_text(evals / f"{name}-accuracy.csv", csv_text(rows))
    rows = [{"model": model, **row} for model, row in document["calibration"].items()]
    write_text(evals / f"{name}-calibration.csv", csv_text(rows))
    classes = zip(
        document["class_names"], document["class_counts"], document["per_class"], strict=True
    )
    rows = [
        {"class": label, "training_images": count, "accuracy": value}
        for label, count, value in classes
    ]
    write_text(evals / f"{name}-classes.csv", csv_text(rows))
    if document["shifted"]:
        write_text(evals / f"{name}-shifted.csv", csv_text(document["shifted"]))


def run_eval(
    request: Request, plugins: Sequence[str], rejection: bool
) -> tuple[dict[str, Any], "Table"]:
    """Measure the weights that a reference names, write `evals/` and the report of its run.

    Args:
        request: the run, its weights and settings.
        plugins: saved rules to be measured too, names or files.
        rejection: whether to measure rejection.

    Returns:
        The JSON document, and a table of the accuracies and calibration errors.

    Raises:
        UserError: if the weights do not fit, or the data is not split as in the training.
    """
    if plugins and not rejection:
        raise UserError("--plugin and --no-rejection exclude each other")
    settings: Any = request.settings
    assert request.folder is not None
    found = open_classifier(settings, request.run, request.folder, request.cpu)
    document = measure(found.outputs, settings)
    if found.is_main:
        write_evaluation(found.folder, f"test@{found.tag}", document, found.weights)
        if rejection:
            document["rejection"] = evaluate_rejection(found, settings, plugins)
        report(found.folder)
    return {"run": str(found.folder), "weights": found.weights, **document}, _table(document)


def _table(document: Mapping[str, Any]) -> "Table":
    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    rows: list[list[object]] = []
    for name, row in document["accuracy"].items():
        errors = document["calibration"].get(name, {})
        wanted = ("accuracy", "accuracy_many", "accuracy_medium", "accuracy_few", "top5")
        shares = [percent(row[column]) for column in wanted]
        rows.append([name, *shares, percent(errors.get("ece")), errors.get("nll")])
    columns = ("model", "accuracy", "many", "medium", "few", "top 5", "ECE", "NLL")
    return console.table(columns, rows, f"{document['images']} test images; accuracy and ECE in %")
