"""What correcting concepts would bring, with the true labels in the place of a person.

Letters: N images, K concepts, M prototypes per concept, C classes. A decision is the class of an
image or, where an image may have several, one of its C answers yes or no.

Whatever is chosen with the help of these figures, such as the margin, is chosen on validation
images.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moectl.common.intervals import paired
from moectl.csr.bootstrap import f1, mean_known
from moectl.csr.edits import Head, Mode, Statistics, confirm, contributions, margins, reject
from moectl.csr.metrics import plain

Order = Literal["similarity", "contribution", "uncertainty", "random"]


class Cases(NamedTuple):
    """Images, with what the model believes and what is true."""

    scores: Tensor
    """(N, K, M)."""
    concepts: Tensor
    """(N, K) in 0 to 1; present from 0.5 on."""
    labels: Tensor
    """(N,) class indices, or (N, C) in 0 to 1."""
    concept_logits: Tensor
    """(N, K)."""
    thresholds: Tensor | float = 0.5
    """(C,) probabilities above which the answer is yes; of no use with one class per image."""

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several classes."""
        return self.labels.ndim == 2


def concept_order(cases: Cases, head: Head, order: Order, seed: int = 0) -> Tensor:
    """Which concept of each image to look at first, second …, (N, K).

    Args:
        cases: the images.
        head: of the task.
        order: by highest "similarity" to a prototype that has a say; by size of the "contribution"
            to the most probable class; by "uncertainty", the probability of the concept nearest to
            a half; or at "random".
        seed: of the random order.

    Source: Shin et al. 2023.
    """
    match order:
        case "similarity":
            kept = head.kept
            seen = cases.scores if kept is None else cases.scores.masked_fill(~kept, -math.inf)
            urgency = seen.amax(2)
        case "contribution":
            found = contributions(cases.scores, *head)
            top = found.logits.argmax(1)
            urgency = found.values[torch.arange(len(top)), top].abs()
        case "uncertainty":
            urgency = -(cases.concept_logits.double().sigmoid() - 0.5).abs()
        case "random":
            draws = torch.Generator().manual_seed(seed)
            urgency = torch.rand(cases.scores.shape[:2], generator=draws)
        case _:
            raise ValueError(f"order {order!r}: similarity, contribution, uncertainty or random")
    return urgency.argsort(dim=1, descending=True, stable=True)


def oracle(  # noqa: PLR0913 - options after the model and the images
    cases: Cases,
    head: Head,
    known: Statistics | None = None,
    *,
    mode: Mode = "absent-median",
    margin: float = 0.3,
    order: Order = "similarity",
    seed: int = 0,
) -> dict[str, Any]:
    """Reject the first truly absent concept of each image whose margin is below a threshold.

    Args:
        cases: the images.
        head: of the task.
        known: statistics of training images, for the modes that need them.
        mode: how to reject.
        margin: of `edits.margins`; above 1 asks about every image.
        order: which concept comes first.
        seed: of the random order.

    Returns:
        As `compare`, and `mode margin order asked`, the images with a rejection.
    """
    absent = cases.concepts < 0.5
    if known is not None and mode not in ("zero", "drop"):
        absent = absent & ~known.absent_mean.isnan().any(1)
    before = contributions(cases.scores, *head).logits
    asked = margins(before, multilabel=cases.multilabel) < margin
    places = concept_order(cases, head, order, seed)
    first = absent.gather(1, places).long().argmax(1, keepdim=True)
    chosen = torch.zeros_like(absent).scatter(1, places.gather(1, first), value=True)
    chosen &= absent & asked[:, None]
    after = contributions(reject(cases.scores, chosen, mode, known, head.neutral), *head).logits
    return {
        "mode": mode,
        "margin": margin,
        "order": order,
        "asked": int(chosen.any(1).sum()),
        **compare(before, after, cases.labels, cases.thresholds),
    }


def curve(
    cases: Cases,
    head: Head,
    known: Statistics,
    *,
    order: Order,
    mode: Mode = "absent-median",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Correct more and more concepts of every image: reject absent ones, confirm present ones.

    A concept whose statistics are unknown stays as it is. With all corrected, the order makes no
    difference.

    Returns:
        K + 1 points: `corrected`, the number of concepts; `net`, right decisions more than without
        corrections; `accuracy`, `f1_macro` and `true_probability`.
    """
    absent = cases.concepts < 0.5
    rejectable = torch.ones(absent.shape[1], dtype=torch.bool)
    if mode not in ("zero", "drop"):
        rejectable = ~known.absent_mean.isnan().any(1)
    confirmable = ~known.present_median.isnan().any(1)
    rank = concept_order(cases, head, order, seed).argsort(1)
    before = contributions(cases.scores, *head).logits
    points = []
    for count in range(absent.shape[1] + 1):
        seen = rank < count
        scores = reject(cases.scores, seen & absent & rejectable, mode, known, head.neutral)
        scores = confirm(scores, seen & ~absent & confirmable, known)
        after = contributions(scores, *head).logits
        found = compare(before, after, cases.labels, cases.thresholds)
        points.append(
            {
                "corrected": count,
                "net": found["net"],
                **{name: found[name]["after"] for name in _MEANS},
            }
        )
    return points


_MEANS = ("accuracy", "f1_macro", "true_probability")


def compare(
    before: Tensor, after: Tensor, labels: Tensor, thresholds: Tensor | float = 0.5
) -> dict[str, Any]:
    """Compare the decisions of two logits (N, C), as plain JSON values.

    Args:
        before: without a change.
        after: with it, whatever it was.
        labels: (N,) class indices, or (N, C) in 0 to 1.
        thresholds: of the answers where labels are (N, C).

    Returns:
        `decisions`; `fixed`, wrong before and right after; `broke`, the reverse; `net`, fixed less
        broke; `p_value` of the exact sign test that as many images gain as lose right decisions,
        which is McNemar's where an image is one decision; and `accuracy`, `f1_macro` and
        `true_probability`, the mean probability of what is true, each with `before after change`.
    """
    right, means = {}, {}
    for name, logits in (("before", before), ("after", after)):
        right[name], means[name] = _judged(logits.double(), labels, thresholds)
    fixed = int((right["after"] & ~right["before"]).sum())
    broke = int((right["before"] & ~right["after"]).sum())
    gains = (right["after"].long() - right["before"].long()).view(len(labels), -1).sum(1)
    pairs = {name: (means["before"][name], means["after"][name]) for name in _MEANS}
    return {
        "decisions": right["after"].numel(),
        "fixed": fixed,
        "broke": broke,
        "net": fixed - broke,
        "p_value": paired(gains > 0, gains < 0, draws=1).p_value,
        **{
            name: plain({"before": first, "after": second, "change": second - first})
            for name, (first, second) in pairs.items()
        },
    }


def _judged(
    logits: Tensor, labels: Tensor, thresholds: Tensor | float
) -> tuple[Tensor, dict[str, float]]:
    """Which decisions are right, and the means of the scores."""
    classes = torch.arange(logits.shape[1])
    if labels.ndim == 2:
        probabilities, actual = logits.sigmoid(), labels >= 0.5
        predicted = probabilities > torch.as_tensor(thresholds)
        right = predicted == actual
        true = torch.where(actual, probabilities, 1 - probabilities)
    else:
        probabilities, actual = logits.softmax(1), labels[:, None] == classes
        predicted = logits.argmax(1)[:, None] == classes
        right = (predicted & actual).any(1)
        true = probabilities[actual]
    once = np.ones((1, len(logits)), dtype=np.int64)
    columns = f1(predicted.numpy(), actual.numpy(), once)
    return right, {
        "accuracy": right.double().mean().item(),
        "f1_macro": float(mean_known(columns)[0]),
        "true_probability": true.mean().item(),
    }
