"""Rows of images from several files: which are equal, which are kept, which validate.

Legend: N images, H W pixels.
"""

import hashlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from moectl.engine.seeding import key

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """The images of one part of the files, specialist after specialist."""

    images: "Tensor"
    """(N, 3, H, W) uint8."""
    ids: list[int]
    specialists: list[int]
    digests: list[str]
    """Equal for equal images."""

    def take(self, rows: list[int]) -> "Rows":
        """Return some rows, in the order given."""
        ids, specialists = [self.ids[row] for row in rows], [self.specialists[row] for row in rows]
        return Rows(self.images[rows], ids, specialists, [self.digests[row] for row in rows])

    @property
    def keys(self) -> list[tuple[int, str]]:
        """The same image of the same class has the same key."""
        return list(zip(self.ids, self.digests, strict=True))


class Kept(NamedTuple):
    """What is left of the images of shared classes."""

    rows: Rows
    counts: list[int]
    """1, and 1 more for every image left out that equals it."""
    dropped: int
    unmatched: int
    """Images left out that equal none of those kept."""


def joined(parts: list[tuple["Tensor", "Tensor"]]) -> Rows:
    """Join the (images, ids) of every specialist."""
    import torch

    images = torch.cat([part for part, _ in parts])
    ids = [id for _, part in parts for id in part.tolist()]
    owners = [number for number, (part, _) in enumerate(parts) for _ in range(len(part))]
    digests = [
        hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images.numpy()
    ]
    return Rows(images, ids, owners, digests)


def dedup(rows: Rows, how: Literal["owner", "content", "none"]) -> Kept:
    """Leave out what several specialists' files hold alike, except once.

    Args:
        rows: of all files.
        how: "owner" takes a class from the first specialist that knows it, "content" takes every
            image of a class once, "none" leaves out nothing.
    """
    first_owner: dict[int, int] = {}
    first_row: dict[tuple[int, str], int] = {}
    for row, (id, owner, one) in enumerate(zip(rows.ids, rows.specialists, rows.keys, strict=True)):
        first_owner.setdefault(id, owner)
        first_row.setdefault(one, row)
    match how:
        case "owner":
            pairs = zip(rows.ids, rows.specialists, strict=True)
            keep = [first_owner[id] == owner for id, owner in pairs]
        case "content":
            keep = [first_row[one] == row for row, one in enumerate(rows.keys)]
        case "none":
            keep = [True] * len(rows.ids)
    kept = rows.take([row for row, stays in enumerate(keep) if stays])
    places: dict[tuple[int, str], int] = {}
    for place, one in enumerate(kept.keys):
        places.setdefault(one, place)
    counts, unmatched = [1] * len(kept.ids), 0
    for one, stays in zip(rows.keys, keep, strict=True):
        if not stays and one in places:
            counts[places[one]] += 1
        unmatched += not stays and one not in places
    return Kept(kept, counts, len(keep) - sum(keep), unmatched)


def held_out(rows: Rows, fraction: float, seed: int) -> list[bool]:
    """Say which training images validate: a share of every class, but never all of it.

    Depends on the seed and the images of a class alone, not on their order or the other classes:
    specialists and union hold out the same ones, and equal images stay together.
    """
    classes: dict[int, set[str]] = {}
    for id, digest in rows.keys:
        classes.setdefault(id, set()).add(digest)
    chosen: set[tuple[int, str]] = set()
    for id, digests in classes.items():
        wanted = max(int(fraction * len(digests) + 0.5), 1) if fraction > 0 else 0
        drawn = sorted(digests, key=lambda digest: (key(seed, "validation", digest), digest))
        chosen.update((id, digest) for digest in drawn[: min(wanted, len(digests) - 1)])
    return [one in chosen for one in rows.keys]


def findings(train: Rows, test: Rows) -> dict[str, Any]:
    """Count equal images in the files, before any is left out."""
    trained = set(train.digests)
    found = {"train": train, "test": test}
    return {
        "duplicates": {part: len(rows.ids) - len(set(rows.keys)) for part, rows in found.items()},
        "conflicts": {
            part: len(set(rows.keys)) - len(set(rows.digests)) for part, rows in found.items()
        },
        "leakage": sum(digest in trained for digest in set(test.digests)),
    }
