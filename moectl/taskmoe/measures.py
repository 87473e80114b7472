"""Scores of a classifier over the union of the specialists' classes.

Letters: N images, C classes, E specialists. Shares are percent, from 0 to 100.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moectl.common import scores
from moectl.common.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from moectl.common.intervals import wilson

_CONFUSIONS = 10


def measure(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], owners: Tensor
) -> dict[str, Any]:
    """Measure logits (N, C) against labels (N,).

    Args:
        logits: of the images.
        labels: of the images.
        class_names: C of them.
        owners: (C, E) of 0 and 1, which specialist knows which class.

    Returns:
        `overall_accuracy`, `macro_accuracy`, `class_accuracies` by name, `classes` with counts and
        95 % intervals, `per_task_accuracy` (the choice limited to one specialist's classes),
        `group_accuracy` (the prediction is a class of an owner of the image),
        `within_group_accuracy`, `nll`, `ece15`, `top_confusions`.
    """
    predictions = logits.argmax(1)
    right = predictions == labels
    classes = len(class_names)
    counts = torch.bincount(labels, minlength=classes).tolist()
    hits = torch.bincount(labels[right], minlength=classes).tolist()
    in_group = (owners[predictions] * owners[labels]).sum(1) > 0
    probabilities = logits.double().softmax(1)
    return {
        "overall_accuracy": 100 * scores.accuracy(predictions, labels),
        "macro_accuracy": 100 * scores.balanced_accuracy(predictions, labels, classes),
        "n": len(labels),
        "class_accuracies": {
            name: 100 * hit / count if count else None
            for name, hit, count in zip(class_names, hits, counts, strict=True)
        },
        "classes": {
            name: _class(hit, count)
            for name, hit, count in zip(class_names, hits, counts, strict=True)
        },
        "interval": [100 * bound for bound in wilson(int(right.sum()), len(labels))],
        "per_task_accuracy": _per_task(logits, labels, owners),
        "group_accuracy": 100 * float(in_group.double().mean()),
        "within_group_accuracy": _within(right, in_group),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece15": 100 * expected_calibration_error(reliability(probabilities, labels, 15)),
        "top_confusions": _confusions(predictions, labels, class_names),
    }


def counted_twice(right: Tensor, counts: Tensor) -> float:
    """Accuracy in percent with every image counted as often as it occurs in the files, (N,)."""
    return 100 * float((right * counts).sum() / counts.sum())


def _class(hits: int, count: int) -> dict[str, Any]:
    bounds = [100 * bound for bound in wilson(hits, count)] if count else [None, None]
    return {"n": count, "correct": hits, "wilson_low": bounds[0], "wilson_high": bounds[1]}


def _per_task(logits: Tensor, labels: Tensor, owners: Tensor) -> list[float | None]:
    """Accuracy on each specialist's classes when only these may be chosen."""
    found = []
    for own in owners.T.bool():
        mine = own[labels]
        choice = logits[mine].masked_fill(~own, -torch.inf).argmax(1)
        found.append(100 * scores.accuracy(choice, labels[mine]) if mine.any() else None)
    return found


def _within(right: Tensor, in_group: Tensor) -> float | None:
    """Share of right ones among the predictions that stay with an owner of the image."""
    return 100 * float(right[in_group].double().mean()) if in_group.any() else None


def _confusions(
    predictions: Tensor, labels: Tensor, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    cells = scores.confusion(predictions, labels, len(class_names)).fill_diagonal_(0)
    order = cells.flatten().argsort(descending=True, stable=True)[:_CONFUSIONS].tolist()
    pairs = [divmod(place, len(class_names)) for place in order]
    return [
        {"true": class_names[true], "predicted": class_names[seen], "n": int(cells[true, seen])}
        for true, seen in pairs
        if cells[true, seen]
    ]
