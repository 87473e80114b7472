"""Loss and scores of the task head, and of whatever stands in its place.

Letters: B batch, C classes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from moectl.csr import losses
from moectl.csr.metrics import multiclass, ranking

if TYPE_CHECKING:
    from moectl.csr.data import Part
    from moectl.csr.settings import TaskSection

Scores = dict[str, float | None]


def monitor_of(several: bool) -> str:
    """Name the score that chooses the best epoch, by whether images may have several classes."""
    return "val/task_auroc" if several else "val/macro_f1"


def task_loss(
    section: "TaskSection", logits: Tensor, targets: Tensor, counts: Tensor, images: int
) -> Tensor:
    """Return the loss that the settings name.

    Args:
        section: of the settings.
        logits: (B, C).
        targets: (B, C), or (B,) classes.
        counts: (C,) positives among the training images.
        images: number of training images.
    """
    match section.loss:
        case "ce":
            smoothing = section.label_smoothing
            return nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        case "focal":
            return losses.focal(logits, targets)
        case "asymmetric":
            return losses.asymmetric(logits, targets, 4.0, 1.0, 0.05)
        case "class_balanced":
            weights = losses.class_balanced_weights(counts)
            return losses.focal(logits, targets, None, 2.0, weights)
        case "bce_pos_weight":
            return losses.concept_bce(logits, targets, losses.pos_weights(counts, images))
        case _:
            return losses.concept_bce(logits, targets)


def task_scores(logits: Tensor, part: "Part", names: Sequence[str]) -> Scores:
    """Return the scores of validation images that choose the best epoch."""
    if part.targets.ndim == 2:
        found = ranking(logits.numpy(), part.targets.numpy(), names)
        return {
            "val/loss": float(losses.concept_bce(logits, part.targets)),
            "val/task_auroc": found["auroc_macro"],
            "val/task_map": found["map"],
        }
    found = multiclass(logits.numpy(), np.asarray(part.targets), names)
    return {
        "val/loss": float(nn.functional.cross_entropy(logits, part.targets)),
        "val/accuracy": found["accuracy"],
        "val/macro_f1": found["f1_macro"],
    }
