"""Which items of a balanced data set make up its long-tailed version, and how one is divided.

Everything here is numpy and depends on its arguments alone. Draws come from numpy's frozen
generator, whose sequence never changes, because published long-tailed sets are defined by it.

Legend: N items, K classes.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Profile = Literal["exp", "step", "reverse"]


def _draws(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed % 2**32)


def class_sizes(n_max: int, classes: int, imb_factor: float, profile: Profile) -> list[int]:
    """Return how many items each class keeps.

    Args:
        n_max: items of the largest class.
        classes: K, at least 2.
        imb_factor: size of the smallest class over that of the largest, in (0, 1].
        profile: "exp" falls geometrically from class 0 on, "reverse" rises likewise,
            "step" gives the first half of the classes `n_max` and the others the smallest size.

    Raises:
        ValueError: for fewer than two classes or a factor outside (0, 1].

    Source: Cao et al. 2019; sizes are truncated, not rounded.
    """
    if classes < 2:
        raise ValueError(f"a long tail needs at least 2 classes, got {classes}")
    if not 0 < imb_factor <= 1:
        raise ValueError(f"imb_factor is {imb_factor}, expected a number in (0, 1]")
    last = classes - 1
    match profile:
        case "exp":
            shares = [i / last for i in range(classes)]
        case "reverse":
            shares = [(last - i) / last for i in range(classes)]
        case "step":
            shares = [0.0 if i < classes // 2 else 1.0 for i in range(classes)]
    return [int(n_max * imb_factor**share) for share in shares]


def select(labels: ArrayLike, sizes: list[int], seed: int = 0) -> Indices:
    """Return the positions of the items that a long-tailed set keeps.

    For each class in ascending order its positions are shuffled and the first ones kept; the
    result holds them in that order. A class with fewer items than its size keeps them all.

    Args:
        labels: (N,) classes.
        sizes: (K,) items to keep.
        seed: 0 gives the long-tailed CIFAR sets of the literature.
    """
    labels, draws = np.asarray(labels), _draws(seed)
    kept = []
    for number, size in enumerate(sizes):
        positions = np.flatnonzero(labels == number)
        draws.shuffle(positions)
        kept.append(positions[:size])
    return np.concatenate(kept).astype(np.int64)


def split_indices(labels: ArrayLike, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Divide a set in two, class by class.

    The first part gets `fraction` of every class, rounded, but at least one item and never all of
    them; the only item of a class goes to the second part.

    Args:
        labels: (N,) classes.
        fraction: share of the first part, in [0, 1); 0 leaves it empty.
        seed: which items.

    Returns:
        Two sorted arrays of positions that together hold each position once.
    """
    labels, draws = np.asarray(labels), _draws(seed)
    in_first = np.zeros(len(labels), dtype=bool)
    for number in np.unique(labels):
        positions = np.flatnonzero(labels == number)
        draws.shuffle(positions)
        wanted = max(int(fraction * len(positions) + 0.5), 1) if fraction > 0 else 0
        in_first[positions[: min(wanted, len(positions) - 1)]] = True
    return np.flatnonzero(in_first), np.flatnonzero(~in_first)


def halve(labels: ArrayLike, seed: int) -> tuple[Indices, Indices]:
    """Divide a set into halves that share every class evenly, and single items between them.

    Args:
        labels: (N,) classes.
        seed: which items.

    Returns:
        Two sorted arrays of positions that together hold each position once; their sizes, and
        those of their shares of any class, differ by one at most.
    """
    labels = np.asarray(labels)
    order = _draws(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def shifted_indices(
    labels: ArrayLike,
    profile: Literal["forward", "backward", "uniform"],
    ratio: float,
    n_max: int = 100,
) -> Indices:
    """Return the positions of a test set whose classes are unequally frequent on purpose.

    These are the items that `select` keeps with seed 0, sorted. If a class has fewer than `n_max`
    items, all sizes follow from the smallest class, so that the distribution keeps its form.

    Args:
        labels: (N,) classes of a balanced set.
        profile: "forward" falls from class 0 on, "backward" rises, "uniform" keeps all equal.
        ratio: largest over smallest class size; unused for "uniform".
        n_max: items of the largest class.

    Source: Hong et al. 2021 (LADE).
    """
    present = np.bincount(np.asarray(labels))
    n_max, classes = min(n_max, int(present.min())), len(present)
    match profile:
        case "forward":
            sizes = class_sizes(n_max, classes, 1 / ratio, "exp")
        case "backward":
            sizes = class_sizes(n_max, classes, 1 / ratio, "reverse")
        case "uniform":
            sizes = [n_max] * classes
    return np.sort(select(labels, sizes))
