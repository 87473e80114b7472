"""What the specialists do together without any merging, and the network to weigh them against.

Letters: N images, E specialists, C classes of the union, R classes of one specialist. A specialist
says -inf about what it does not know, which a softmax turns into 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moectl.common import scores
from moectl.common.calibration import fit_temperature


def union_logits(
    specialist_logits: Sequence[Tensor], rows: Sequence[Sequence[int]], classes: int
) -> Tensor:
    """Place each specialist's logits at its classes of the union.

    Args:
        specialist_logits: (N, R) of each specialist, for the same images.
        rows: per specialist, the class of each of its outputs.
        classes: C.

    Returns:
        (N, E, C), -inf where a specialist has no such class.

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    if not specialist_logits or len(specialist_logits) != len(rows):
        raise ValueError(
            f"logits of {len(specialist_logits)} specialists and {len(rows)} lists of rows: as many"
            " of one as of the other are needed, and at least one"
        )
    images = len(specialist_logits[0])
    placed = specialist_logits[0].new_full((images, len(rows), classes), -torch.inf)
    for number, (logits, own) in enumerate(zip(specialist_logits, rows, strict=True)):
        if logits.shape != (images, len(own)):
            raise ValueError(
                f"specialist {number + 1}: logits of shape {tuple(logits.shape)}, expected"
                f" {(images, len(own))}: the images of the first, and its own classes"
            )
        if len({*own}) < len(own) or not {*own} <= {*range(classes)}:
            raise ValueError(
                f"specialist {number + 1}: classes {list(own)}, expected different ones from 0 to"
                f" {classes - 1}"
            )
        placed[:, number, list(own)] = logits
    return placed


def routing(
    logits: Tensor,
    labels: Tensor,
    owners: Tensor,
    *,
    val_logits: Tensor | None = None,
    val_labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Predict the classes, (N,), in every way that needs the specialists only.

    `oracle` asks the owners of the true class, as if someone knew whose image it is, and takes the
    best of the mean of their probabilities; all others choose among all classes.
    `concatenated_logits` takes the largest logit of any specialist, so of a shared class the
    larger; `concatenated_softmax` the largest probability, of a shared class the mean over its
    owners. The specialist with the largest probability decides under `max_probability`, that with
    the lowest entropy, relative to the log of its number of classes, under `entropy`.
    `calibrated_softmax`, only with validation images, is `concatenated_softmax` after the logits of
    each specialist are divided by the temperature that suits the validation images it knows.

    Limit: a specialist of one class is always sure, so it decides wherever the surest one does.

    Args:
        logits: (N, E, C) as `union_logits` gives them.
        labels: (N,), looked at by `oracle` alone.
        owners: (C, E) of 0 and 1, which specialist knows which class.
        val_logits: like `logits`, of other images.
        val_labels: of these.

    Raises:
        ValueError: if the arguments do not fit each other, a class or a specialist is without the
            other, or a specialist has no validation images of its own classes.

    Source: Guo et al. 2017 (temperatures).
    """
    if (val_logits is None) != (val_labels is None):
        raise ValueError("val_logits and val_labels are needed both, or neither")
    _check(logits, labels, owners)
    known = owners.bool()
    logits = logits.double()
    probabilities = logits.softmax(2)
    asked = known[labels].double()  # (N, E)
    predictions = {
        "oracle": torch.einsum("ne,nec->nc", asked, probabilities),
        "concatenated_logits": logits.amax(1),
        "concatenated_softmax": _owners_mean(probabilities, known),
        "max_probability": probabilities.amax(1),
        "entropy": _of_surest(probabilities, known),
    }
    if val_logits is not None and val_labels is not None:
        _check(val_logits, val_labels, owners)
        temperatures = logits.new_tensor(_temperatures(val_logits, val_labels, known))
        calibrated = (logits / temperatures[:, None]).softmax(2)
        predictions["calibrated_softmax"] = _owners_mean(calibrated, known)
    return {name: votes.argmax(1) for name, votes in predictions.items()}


def own_accuracy(logits: Tensor, labels: Tensor, owners: Tensor) -> list[float | None]:
    """Share predicted right by each specialist alone among the images of its own classes.

    Args:
        logits: (N, E, C) as `union_logits` gives them.
        labels: (N,).
        owners: (C, E) of 0 and 1.

    Returns:
        E fractions; None for a specialist without such images.
    """
    _check(logits, labels, owners)
    found: list[float | None] = []
    for number, mine in enumerate(owners.bool()[labels].T):
        predictions = logits[mine, number].argmax(1)
        found.append(scores.accuracy(predictions, labels[mine]) if mine.any() else None)
    return found


def dense_width(parameters: int, classes: int) -> int:
    """Find the width at which one `Specialist` of all classes is nearest to a size.

    Args:
        parameters: number to come near to, say that of a mixture.
        classes: C.

    Raises:
        ValueError: if one of them is below 1.
    """
    if parameters < 1 or classes < 1:
        raise ValueError(f"parameters = {parameters}, classes = {classes}: each must be at least 1")
    # A network has 340 width² + linear width + classes parameters: the kernels between layers; the
    # first kernel, the depthwise one, batch norms and the classifier's weights; its biases.
    linear = 153 + 8 * classes
    root = math.sqrt(linear**2 + 4 * 340 * max(parameters - classes, 0))
    below = max(int((root - linear) / (2 * 340)), 1)
    return min(
        (below, below + 1),
        key=lambda width: abs(340 * width**2 + linear * width + classes - parameters),
    )


def _check(logits: Tensor, labels: Tensor, owners: Tensor) -> None:
    if logits.ndim != 3 or labels.shape != logits.shape[:1] or owners.T.shape != logits.shape[1:]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)}, labels {tuple(labels.shape)}, owners"
            f" {tuple(owners.shape)}: expected (N, E, C), (N,), (C, E)"
        )
    if not owners.any(0).all() or not owners.any(1).all():
        raise ValueError("owners leaves a class without specialist or a specialist without class")
    if not ((labels >= 0) & (labels < len(owners))).all():
        raise ValueError(f"labels must be class indices from 0 to {len(owners) - 1}")
    if not torch.where(owners.T.bool(), logits.isfinite(), logits.isneginf()).all():
        raise ValueError("logits must be finite where owners has a 1, and -inf where it has a 0")


def _owners_mean(probabilities: Tensor, known: Tensor) -> Tensor:
    """Mean over the owners of each class, (N, C)."""
    return probabilities.sum(1) / known.sum(1)


def _of_surest(probabilities: Tensor, known: Tensor) -> Tensor:
    """Return the probabilities, (N, C), of the specialist with the lowest relative entropy."""
    most = known.sum(0).clamp(min=2).double().log()  # one class: no entropy, whatever the divisor
    entropies = torch.special.entr(probabilities).sum(2) / most  # (N, E)
    surest = entropies.argmin(1)[:, None, None]
    return probabilities.take_along_dim(surest, 1)[:, 0]


def _temperatures(logits: Tensor, labels: Tensor, known: Tensor) -> list[float]:
    """Fit a temperature for each specialist on the images of its own classes."""
    found = []
    for number, own in enumerate(known.T):
        mine = own[labels]
        if not mine.any():
            raise ValueError(f"specialist {number + 1} has no validation images of its own classes")
        places = own.cumsum(0) - 1  # of the classes among the specialist's own
        found.append(fit_temperature(logits[mine, number][:, own], places[labels[mine]]))
    return found
