"""What several readers of the same image make of it together, and how far they agree.

Legend: N images, R readings.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moectl.csr.columns import Table


def of_reader(table: "Table", readers: list[str], aggregate: str) -> list[int]:
    """Return the lines that count: all, or those of one reader if the table tells them apart.

    Raises:
        UserError: if `aggregate` is not known, or the reader has no line.
    """
    kind, _, wanted = aggregate.partition(":")
    if kind not in {"any", "majority", "mean", "reader"} or (kind == "reader") != bool(wanted):
        raise UserError(
            f"data.aggregate is {aggregate!r}, expected any, majority, mean or reader:<id>"
        )
    if not wanted or set(readers) == {""}:
        return list(range(len(readers)))
    kept = [row for row, reader in enumerate(readers) if reader == wanted]
    if not kept:
        raise UserError(
            f"{table.path}: has no line by reader {wanted!r}",
            f"its readers are {', '.join(sorted(set(readers)))}",
        )
    return kept


def averaged(
    values: NDArray[np.float32], images: NDArray[np.int64], aggregate: str
) -> NDArray[np.float32]:
    """Turn 0/1 readings (R, n) into one row per image.

    Args:
        values: one row per reading.
        images: (R,) number of the image that was read, 0..N-1.
        aggregate: `mean`, `majority` for more than half, or else 1 if any reader saw it.
    """
    sums = np.zeros((images.max() + 1, values.shape[1]), np.float32)
    np.add.at(sums, images, values)
    shares = (sums / np.bincount(images)[:, None]).astype(np.float32)
    if aggregate == "mean":
        return shares
    return (shares > (0.5 if aggregate == "majority" else 0)).astype(np.float32)


def voted(classes: NDArray[np.int64], images: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return the class that most readers gave each image, the first of equals; count the ties."""
    votes = np.zeros((images.max() + 1, classes.max() + 1), np.int64)
    np.add.at(votes, (images, classes), 1)
    return votes.argmax(1), int(((votes == votes.max(1, keepdims=True)).sum(1) > 1).sum())


def fleiss_kappa(votes: NDArray[Any]) -> float:
    """Return how far readers agree beyond chance: 1 fully, 0 as chance does; NaN if all is one.

    Images with fewer than two readings do not count; the number of readings may differ.

    Args:
        votes: (N, categories) readings of every image.

    Source: Fleiss 1971.
    """
    counts = votes[votes.sum(1) > 1].astype(np.float64)
    readings = counts.sum(1)
    if not len(counts):
        return float("nan")
    agreement = ((counts**2).sum(1) - readings) / (readings * (readings - 1))
    chance = float(((counts.sum(0) / readings.sum()) ** 2).sum())
    return float("nan") if chance == 1 else float((agreement.mean() - chance) / (1 - chance))


def agreement(
    columns: "Mapping[str, NDArray[Any]]", images: NDArray[Any]
) -> dict[str, float | None]:
    """Return Fleiss kappa of every column (R,) of whole numbers, None where it is not defined."""
    found: dict[str, float | None] = {}
    for name, column in columns.items():
        votes = np.zeros((images.max() + 1, int(column.max()) + 1), np.int64)
        np.add.at(votes, (images, column.astype(np.int64)), 1)
        kappa = fleiss_kappa(votes)
        found[name] = None if np.isnan(kappa) else kappa
    return found
