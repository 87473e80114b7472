"""How often each class occurs among the items to be judged: given, or estimated from posteriors.

Letters: N items, C classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_json, read_text
from moectl.engine.settings import nearest

PSEUDO_ITEMS = 10.0
"""Of each class, for real classifiers: few beside thousands of items, and enough for weak ones."""


def label_prior(kind: str, class_counts: Sequence[int]) -> Tensor:
    """Return the label distribution that a setting names, (C,) float64 with sum 1.

    Args:
        kind: `train`, `uniform`, or a file with a non-negative number per class: a .json list, or
            text with one number per line.
        class_counts: (C,) training images.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if kind == "uniform":
        values = [1.0] * len(class_counts)
    elif kind == "train":
        values = [float(count) for count in class_counts]
    else:
        values = _from_file(kind, len(class_counts))
    prior = torch.tensor(values, dtype=torch.float64)
    prior = prior / prior.max()  # so that the sum of huge numbers is finite
    return prior / prior.sum()


def _from_file(kind: str, classes: int) -> list[float]:
    path = Path(kind)
    if not is_file(path):
        raise UserError(
            f"label prior {kind}: expected train, uniform or a file with {classes} numbers,"
            f" and there is no such file{nearest(kind, ('train', 'uniform'))}"
        )
    entries = _json_entries(path) if path.suffix.lower() == ".json" else _lines(path)
    values = [_number(entry, f"{path}, {place}") for place, entry in entries]
    if len(values) != classes:
        raise UserError(f"{path}: holds {len(values)} numbers, expected {classes}, one per class")
    if not max(values) > 0:
        raise UserError(f"{path}: every number is 0, expected a positive sum")
    return values


def _json_entries(path: Path) -> list[tuple[str, Any]]:
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds no list, expected a list of numbers")
    # As text a number in quotes would pass, so it becomes what no number is.
    return [
        (f"entry {place}", entry if type(entry) in (int, float) else repr(entry))
        for place, entry in enumerate(entries)
    ]


def _lines(path: Path) -> list[tuple[str, Any]]:
    lines = read_text(path).split("\n")
    return [
        (f"line {place}", line.strip()) for place, line in enumerate(lines, start=1) if line.strip()
    ]


def _number(entry: Any, place: str) -> float:
    try:
        value = float(entry)
    except (ValueError, OverflowError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{place}: {str(entry)[:40]} is not a finite number from 0 up")
    return value


class Correction(NamedTuple):
    """What makes posteriors agree with labels."""

    scale: float
    bias: Tensor
    """(C,)"""

    def apply(self, log_posteriors: Tensor) -> Tensor:
        """Return corrected log-posteriors, (N, C) float64."""
        return torch.log_softmax(self.scale * log_posteriors.double() + self.bias, dim=1)


def calibrate(log_posteriors: Tensor, labels: Tensor, weights: Tensor | None = None) -> Correction:
    """Fit a temperature and a bias for each class to labelled items, by likelihood.

    Afterwards the mean posterior is close to the class shares of the items, without which the
    estimate of another label distribution drifts. Biases have a normal prior of variance 1.

    Args:
        log_posteriors: (N, C).
        labels: (N,).
        weights: (N,), not negative; equal when left out.

    Source: Alexandari, Kundaje and Shrikumar 2020.
    """
    logits = log_posteriors.double()
    weights = torch.ones(len(logits)) if weights is None else weights
    shares = weights.double() / weights.sum()
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        corrected = logits * log_scale.exp() + bias
        misses = F.cross_entropy(corrected, labels, reduction="none")
        total = misses @ shares + bias.square().sum() / (2 * len(logits))
        torch.autograd.backward(total)
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Correction(float(log_scale.detach().exp()), bias.detach())


def estimate_prior(
    log_posteriors: Tensor,
    log_prior: Tensor,
    iterations: int = 1000,
    tolerance: float = 1e-8,
    pseudo_items: float = 0.0,
) -> Tensor:
    """Estimate the label distribution of unlabelled items by expectation maximisation.

    The items may follow another label distribution than the one under which the posteriors hold, as
    long as the items within each class are alike. Every step raises the likelihood of the items.
    A class without prior probability keeps none.

    Limit: the estimate is as good as the posteriors are calibrated.

    Args:
        log_posteriors: (N, C); a constant added to a row has no effect.
        log_prior: (C,) under which they hold, likewise.
        iterations: steps at most.
        tolerance: the largest change of a class at which the steps end.
        pseudo_items: so many items of each class are added, which steadies the estimate where
            posteriors tell little.

    Returns:
        (C,) float64 with sum 1.

    Raises:
        ValueError: if there is no item, or an item that the prior says cannot be.

    Source: Saerens, Latinne and Decaestecker 2002.
    """
    if log_posteriors.ndim != 2 or log_posteriors.shape[1:] != log_prior.shape:
        shapes = f"{tuple(log_posteriors.shape)} and {tuple(log_prior.shape)}"
        raise ValueError(f"expected posteriors (N, C) and a prior (C,), got {shapes}")
    if not len(log_posteriors):
        raise ValueError("a label prior needs at least one item to be estimated from")
    estimate = log_prior.double().softmax(0)
    added = pseudo_items * (estimate > 0).double()
    ratios = (log_posteriors.double() - log_prior).masked_fill(estimate == 0, -math.inf)
    top = ratios.max(1, keepdim=True).values
    if not top.isfinite().all():
        raise ValueError("every item needs a finite posterior in a class of positive prior")
    likelihoods = (ratios - top).exp()  # (N, C) up to a factor per item, which cancels below
    for _ in range(iterations):
        evidence = likelihoods @ estimate  # (N,)
        # The mean over items of likelihoods * estimate / evidence, without another (N, C).
        counts = estimate * (evidence.reciprocal() @ likelihoods)
        updated = (counts + added) / (len(likelihoods) + added.sum())
        change = (updated - estimate).abs().max()
        estimate = updated
        if change < tolerance:
            break
    return estimate
