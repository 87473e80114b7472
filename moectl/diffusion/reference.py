"""What samples are compared by, and the images they are compared with.

Letters: N images, B of them at a time, D features, C classes, S pixels of a side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moectl.diffusion.data import Data
from moectl.diffusion.features import extract, inception, to_bytes, trained_classifier
from moectl.diffusion.settings import EvalSection
from moectl.engine.errors import UserError
from moectl.engine.run import runs_root
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.engine.sources import Source

NEIGHBOURS = 3
"""Of precision and recall."""


@dataclass(frozen=True)
class Reference:
    """Features of the real images, and how those of samples are had."""

    name: str
    """Of the Fréchet distance: FID, or FD with the mark of the classifier."""
    give: Callable[[Tensor], Tensor]
    """From images (B, 3, S, S) in -1 to 1 to (B, D)."""
    classify: Callable[[Tensor], Tensor] | None
    """To logits (B, C); None where there is no classifier."""
    train: Tensor
    """(N, D) of the training images, mixed: any first of them are of all classes."""
    test: Tensor
    """(N, D) of the held-out images, likewise."""
    labels: Tensor
    """(N,) classes of the training images."""
    held_out_accuracy: float | None
    """Of that classifier."""


def check_reference(wanted: EvalSection, data: Data) -> None:
    """Refuse what could not be compared, before anything is computed.

    Raises:
        UserError: if there are too few images, one class where a classifier is wanted, or Inception
            cannot be had.
    """
    if wanted.features == "none":
        return
    for words, source in (("held-out", data.test), ("training", data.train)):
        if len(source) <= NEIGHBOURS:
            raise UserError(
                f"{len(source)} {words} images are too few to compare samples with,"
                f" {NEIGHBOURS + 1} at least",
                "--features none measures loss and experts alone",
            )
    if wanted.features == "inception":
        inception(wanted.inception_weights)
    elif len(data.class_names) < 2:
        raise UserError(
            f"{data.facts['dataset']}: one class, of which a classifier learns nothing",
            "--features inception, or none",
        )


def reference_of(
    wanted: EvalSection, data: Data, accelerator: "Accelerator", batch_size: int
) -> Reference:
    """Compute the features of all real images.

    Raises:
        UserError: as `check_reference`.
    """
    check_reference(wanted, data)
    if wanted.features == "inception":
        network = inception(wanted.inception_weights).to(accelerator.device)
        name, classifier = "FID", None

        def give(images: Tensor) -> Tensor:
            return network(to_bytes(images))
    else:
        cache = runs_root() / "diffusion" / "classifiers"
        classifier, mark = trained_classifier(data, accelerator, cache)
        name, give = f"FD[classifier:{mark}]", classifier.features

    def features(source: "Source") -> tuple[Tensor, Tensor]:
        found, labels = extract(give, source, accelerator, batch_size=batch_size)
        return _mixed(found), labels

    (train, labels), (test, _) = features(data.train), features(data.test)
    accuracy = None
    if classifier is not None:
        logits, truth = extract(classifier, data.test, accelerator, batch_size=batch_size)
        accuracy = float((logits.argmax(1) == truth).double().mean())
    return Reference(name, give, classifier, train, test, labels, accuracy)


def _mixed(rows: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(key("shuffled", len(rows)))
    return rows[torch.randperm(len(rows), generator=generator)]


def labels_like(labels: Tensor, count: int, classes: int) -> Tensor:
    """Return classes in the shares of given ones, in turn, (count,).

    Samples of equal classes would be far from images of unequal ones, however good they are.

    Args:
        labels: (N,) from 0 to classes - 1.
        count: how many are wanted.
        classes: C.
    """
    shares = labels.bincount(minlength=classes).double() * count / len(labels)
    whole = shares.floor().long()
    rest = count - int(whole.sum())
    whole[(shares - whole).argsort(descending=True, stable=True)[:rest]] += 1
    found = torch.arange(classes).repeat_interleave(whole)
    # The r-th of n stands at (r + 1/2) / n of the way: a rare class comes now and then.
    ranks = torch.cat([torch.arange(int(one)) for one in whole])
    places = (ranks.double() + 0.5) / whole[found]
    return found[places.argsort(stable=True)]
