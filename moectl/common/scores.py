"""How often classifiers are right: in all, per class, per group of classes, per expert.

Letters: N items, E experts, K classes. Results are plain numbers; what has no samples is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Share of items predicted right, each counted by its weight.

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if there is no item or no weight.
    """
    return _mean(predictions == labels, weights)


def topk_accuracy(
    scores: Tensor, labels: Tensor, k: int = 5, weights: Tensor | None = None
) -> float:
    """Share of items whose label is among the k highest scores, each counted by its weight.

    Args:
        scores: (N, K), higher is more likely.
        labels: (N,) class indices.
        k: at most; all classes where there are fewer.
        weights: (N,), not negative; equal when left out.

    Raises:
        ValueError: if there is no item or no weight.
    """
    highest = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return _mean((highest == labels[:, None]).any(1), weights)


def _mean(hits: Tensor, weights: Tensor | None) -> float:
    weights = torch.ones(len(hits)) if weights is None else weights
    weights = weights.double().cpu()
    if not weights.sum() > 0:
        raise ValueError("accuracy needs at least one item with a positive weight")
    return float((hits.cpu() * weights).sum() / weights.sum())


def prior_weights(labels: Tensor, prior: Tensor) -> Tensor:
    """Weigh items, (N,), so that their labels follow a prior, (K,), that they were not drawn from.

    An item of class y weighs prior[y] over the share of y among the labels; the mean weight is 1
    when every class has an item.

    Source: Narasimhan et al. 2024.
    """
    shares = torch.bincount(labels, minlength=len(prior)).double() / len(labels)
    return prior.double()[labels] / shares[labels]


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count items by true and predicted class.

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices.
        classes: K.

    Returns:
        (K, K) counts on the CPU: rows are true classes, columns predicted ones.

    Raises:
        ValueError: if an index is not from 0 to K - 1.
    """
    for name, indices in (("predictions", predictions), ("labels", labels)):
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < classes:
            raise ValueError(f"{name} must be class indices from 0 to {classes - 1}")
    cells = (labels * classes + predictions).cpu()
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def per_class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Share of each class's items predicted right; None for a class without items.

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices.
        classes: K, the length of the result.
    """
    counts = torch.bincount(labels, minlength=classes).tolist()
    hits = torch.bincount(labels[predictions == labels], minlength=classes).tolist()
    return [hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def balanced_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> float:
    """Mean of the accuracies of those classes that have items.

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices.
        classes: K.

    Raises:
        ValueError: if there is no item.

    Source: Brodersen et al. 2010.
    """
    mean = _mean_known(per_class_accuracy(predictions, labels, classes))
    if mean is None:
        raise ValueError("balanced accuracy needs at least one item")
    return mean


def shot_groups(
    class_counts: Sequence[int], many: int = 100, few: int = 20
) -> dict[str, list[int]]:
    """Split classes by training images: many above 100, few below 20, medium from 20 to 100."""
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for index, count in enumerate(class_counts):
        groups["many" if count > many else "few" if count < few else "medium"].append(index)
    return groups


def grouped_accuracy(
    per_class: Sequence[float | None], groups: Mapping[str, Sequence[int]]
) -> dict[str, float | None]:
    """Mean accuracy of the classes of each group; None for a group in which no class has items.

    Every class counts the same, so the mix of classes among the items has no influence.
    """
    return {
        name: _mean_known([per_class[index] for index in members])
        for name, members in groups.items()
    }


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Diversity:
    """How experts differ and what their ensemble, the mean of logits, makes of it."""

    disagreement: list[list[float]]
    """(E, E) shares of items on which two experts predict different classes."""
    accuracy: list[float]
    """Of each expert alone."""
    ensemble_accuracy: float
    ensemble_gain: float
    """Ensemble accuracy less that of the best expert."""
    oracle_accuracy: float
    """Share of items on which at least one expert is right."""
    leave_one_out: list[float]
    """Ensemble accuracy without each expert in turn; empty for a single expert."""
    winners: dict[str, int | None]
    """The expert with the best accuracy in each group; the first of equals."""


def expert_diversity(
    logits: Tensor, labels: Tensor, groups: Mapping[str, Sequence[int]]
) -> Diversity:
    """Measure experts against each other and against their ensemble.

    Limit: a comparison is fair only if the experts speak for one prior, so logits that were trained
    for different priors should be moved to a common one first.

    Args:
        logits: (N, E, K).
        labels: (N,).
        groups: name to class indices, as `shot_groups` gives them.
    """
    experts, classes = logits.shape[1:]
    predictions = logits.argmax(-1)  # (N, E)
    alone = [accuracy(predictions[:, index], labels) for index in range(experts)]
    ensemble = accuracy(logits.mean(1).argmax(-1), labels)
    differ = predictions[:, :, None] != predictions[:, None, :]
    per_group = [
        grouped_accuracy(per_class_accuracy(predictions[:, index], labels, classes), groups)
        for index in range(experts)
    ]
    return Diversity(
        disagreement=differ.double().mean(0).tolist(),
        accuracy=alone,
        ensemble_accuracy=ensemble,
        ensemble_gain=ensemble - max(alone),
        oracle_accuracy=_mean((predictions == labels[:, None]).any(1), None),
        leave_one_out=_leave_one_out(logits, labels),
        winners={name: _winner([scores[name] for scores in per_group]) for name in groups},
    )


def _leave_one_out(logits: Tensor, labels: Tensor) -> list[float]:
    experts = range(logits.shape[1]) if logits.shape[1] > 1 else ()
    rests = ([index for index in experts if index != left_out] for left_out in experts)
    return [accuracy(logits[:, rest].mean(1).argmax(-1), labels) for rest in rests]


def _winner(scores: Sequence[float | None]) -> int | None:
    known = {index: score for index, score in enumerate(scores) if score is not None}
    return max(known, key=lambda index: known[index], default=None)
