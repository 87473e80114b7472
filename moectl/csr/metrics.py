"""How good predictions of findings and diagnoses are, as plain JSON values.

Letters: N images, C columns, or classes where each image has exactly one. A score that cannot be
said is None, and so is the mean of none; `skipped` names the columns without each score. AUROC and
sensitivity need positives and negatives, AP and F1 need positives.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moectl.csr import bootstrap
from moectl.csr.bootstrap import Flags, Floats, mean_known

_SPECIFICITY = 0.9
_BINS = 10
_MACRO_NAMES = {"ap": "map", "ece": "ece", "f1_tuned": "f1_macro_tuned"}


def sigmoid(logits: ArrayLike) -> Floats:
    """Probabilities of logits, in float64, where they round to 1 only above 36."""
    from scipy.special import expit  # type: ignore[import-untyped]

    return expit(np.asarray(logits, dtype=float))


def ranking(scores: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> dict[str, Any]:
    """Measure how far positives stand above negatives; only the order of the scores counts.

    Args:
        scores: (N, C) of any range.
        labels: (N, C) in 0 to 1; positive from 0.5 on.
        names: of the columns.

    Returns:
        `n`, `auroc_macro`, `map`, `sensitivity_macro` at a specificity of 90 %, `skipped`, and
        `columns`: `positives negatives auroc ap sensitivity` of each.
    """
    scores, actual = _checked(scores, labels, names)
    return {"n": len(scores), **_table(_rank_scores(scores, actual), actual, names)}


def multilabel(
    logits: ArrayLike,
    labels: ArrayLike,
    names: Sequence[str],
    *,
    thresholds: ArrayLike | None = None,
    draws: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model that may find several things, or none, in an image.

    Args:
        logits: (N, C).
        labels: (N, C) in 0 to 1; positive from 0.5 on.
        names: of the columns.
        thresholds: (C,) probabilities, see `tune_thresholds`; never tune on these images.
        draws: of the bootstrap; 0 for no `intervals`.
        seed: of the draws.

    Returns:
        As `ranking`, and `f1_macro f1_micro ece` with `f1 ece` of each column, a finding being
        predicted by a probability above 0.5. With thresholds also `f1_macro_tuned f1_micro_tuned`
        with `threshold f1_tuned`; with draws, `intervals`.
    """
    scores, actual = _checked(logits, labels, names)
    probabilities = sigmoid(scores)
    predicted = probabilities > 0.5
    values = _rank_scores(scores, actual)
    values["f1"], micro = f1_scores(predicted, actual)
    values["ece"] = np.array(
        [calibration_error(*column) for column in zip(probabilities.T, actual.T, strict=True)]
    )
    overall = {"f1_micro": micro}
    if thresholds is not None:
        values["threshold"] = np.asarray(thresholds, dtype=float)
        tuned = f1_scores(probabilities > values["threshold"], actual)
        values["f1_tuned"], overall["f1_micro_tuned"] = tuned
    found = {"n": len(scores), **_table(values, actual, names), **plain(overall)}
    if draws:
        counts = bootstrap.draw(len(scores), draws, seed)
        found["intervals"] = bootstrap.multilabel_intervals(
            scores, predicted, actual, names, counts
        )
    return found


def multiclass(
    logits: ArrayLike, labels: ArrayLike, names: Sequence[str], draws: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Measure a model that gives each image one class.

    Args:
        logits: (N, C).
        labels: (N,) class indices.
        names: of the classes.
        draws: of the bootstrap; 0 for no `intervals`.
        seed: of the draws.

    Returns:
        `n accuracy balanced_accuracy f1_macro auroc_macro map sensitivity_macro ece confusion
        skipped` and `columns`, each class against the rest: as in `ranking` and `f1 recall`. Rows
        of `confusion` are true classes. Classes without images do not count in `f1_macro`.
    """
    from scipy.special import softmax
    from sklearn.metrics import accuracy_score, confusion_matrix

    labels = np.asarray(labels)
    if labels.ndim != 1 or not ((labels >= 0) & (labels < len(names))).all():
        raise ValueError(f"labels (N,) from 0 to {len(names) - 1} expected")
    classes = np.arange(len(names))
    scores, actual = _checked(logits, labels[:, None] == classes, names)
    probabilities = softmax(scores, axis=1)
    guesses = probabilities.argmax(1)
    cells = confusion_matrix(labels, guesses, labels=classes)
    values = _rank_scores(probabilities, actual)
    values["f1"], _ = f1_scores(guesses[:, None] == classes, actual)
    positives = actual.sum(0)
    values["recall"] = np.where(positives, cells.diagonal() / np.maximum(positives, 1), np.nan)
    found = {"n": len(scores), **_table(values, actual, names)}
    found["balanced_accuracy"] = found.pop("recall_macro")
    found["accuracy"] = float(accuracy_score(labels, guesses))
    found["ece"] = calibration_error(probabilities.max(1), guesses == labels)
    found["confusion"] = cells.tolist()
    if draws:
        counts = bootstrap.draw(len(scores), draws, seed)
        found["intervals"] = bootstrap.multiclass_intervals(probabilities, labels, counts)
    return found


def _checked(scores: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> tuple[Floats, Flags]:
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    if scores.ndim != 2 or scores.shape != labels.shape or scores.shape[1] != len(names):
        shapes = f"{scores.shape} and {labels.shape} for {len(names)} names"
        raise ValueError(f"scores and labels (N, C) and C names expected, got {shapes}")
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError("scores of at least one image expected, all of them finite")
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels from 0 to 1 expected")
    return scores, labels >= 0.5


def _rank_scores(scores: Floats, actual: Flags) -> dict[str, Floats]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    values = {name: np.full(scores.shape[1], math.nan) for name in ("auroc", "ap", "sensitivity")}
    for column, (score, truth) in enumerate(zip(scores.T, actual.T, strict=True)):
        if truth.any():
            values["ap"][column] = average_precision_score(truth, score)
        if truth.any() and not truth.all():
            values["auroc"][column] = roc_auc_score(truth, score)
            values["sensitivity"][column] = sensitivity_at(score, truth)
    return values


def sensitivity_at(scores: Floats, actual: Flags, specificity: float = _SPECIFICITY) -> float:
    """Highest sensitivity of any threshold with at least that specificity; of one column, (N,)."""
    from sklearn.metrics import roc_curve

    # By default scikit-learn leaves out points on a line between others, which count here.
    false, true, _ = roc_curve(actual, scores, drop_intermediate=False)
    return float(true[false <= 1 - specificity + 1e-9].max())


def f1_scores(predicted: Flags, actual: Flags) -> tuple[Floats, float]:
    """F1 of each column, (C,), `nan` without positives, and of all cells together."""
    from sklearn.metrics import f1_score

    found = [
        f1_score(truth, guess, zero_division=0.0) if truth.any() else math.nan
        for guess, truth in zip(predicted.T, actual.T, strict=True)
    ]
    micro = f1_score(actual.ravel(), predicted.ravel(), zero_division=0.0)
    return np.array(found), float(micro) if actual.any() else math.nan


def calibration_error(confidences: Floats, correct: Flags, bins: int = _BINS) -> float:
    """Mean gap between confidence and truth over bins of equal width, weighted by their images.

    Args:
        confidences: (N,), the probability of the predicted class, or that of a finding.
        correct: (N,), whether the prediction is right, or whether the finding is there.
        bins: each holds its upper edge.

    Source: Guo et al. 2017.
    """
    place = np.digitize(confidences, np.arange(1, bins) / bins, right=True)
    gaps = np.bincount(place, confidences - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def tune_thresholds(logits: ArrayLike, labels: ArrayLike) -> Floats:
    """Probabilities above which predicting each column gives the best F1, (C,).

    A threshold lies midway between two probabilities; of equally good ones it is the nearest to
    0.5. A column without positives or negatives keeps 0.5.

    Args:
        logits: (N, C) of validation images.
        labels: (N, C) in 0 to 1; positive from 0.5 on.
    """
    names = [""] * np.asarray(logits).shape[-1]
    scores, actual = _checked(logits, labels, names)
    columns = zip(sigmoid(scores).T, actual.T, strict=True)
    return np.array([_best_threshold(score, truth) for score, truth in columns])


def _best_threshold(probabilities: Floats, actual: Flags) -> float:
    if actual.all() or not actual.any():
        return 0.5
    order = np.argsort(-probabilities)
    found = probabilities[order]
    below = np.append(found[1:], 0.0)
    hits = np.cumsum(actual[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + actual.sum())
    middle = (found + below) / 2
    # Between neighbours in floating point the middle is one of them.
    thresholds = np.where(middle < found, middle, below)
    possible = found > below
    best = thresholds[possible & (f1 >= f1[possible].max() - 1e-12)]
    return float(best[np.abs(best - 0.5).argmin()])


def _table(values: dict[str, Floats], actual: Flags, names: Sequence[str]) -> dict[str, Any]:
    """Scores (C,) by name as means, names of the columns without them, and columns."""
    scored = {score: found for score, found in values.items() if score != "threshold"}
    positives = actual.sum(0)
    counts = {"positives": positives, "negatives": len(actual) - positives}
    return {
        **{
            _MACRO_NAMES.get(score, f"{score}_macro"): plain(mean_known(found))
            for score, found in scored.items()
        },
        "skipped": {
            score: [name for name, value in zip(names, found, strict=True) if math.isnan(value)]
            for score, found in scored.items()
        },
        "columns": {
            name: {score: plain(found[place]) for score, found in {**counts, **values}.items()}
            for place, name in enumerate(names)
        },
    }


def plain(value: Any) -> Any:
    """Values that JSON has: lists for arrays, None for `nan`."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and math.isnan(value) else value
