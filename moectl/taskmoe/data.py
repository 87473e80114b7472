"""The images of all specialists as one data set, or those of one of them.

Legend: N images, H W pixels, C classes, E specialists.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.common.images import Plain, Standard
from moectl.engine.errors import UserError
from moectl.engine.files import sha256
from moectl.engine.sources import Augment, TensorSource
from moectl.taskmoe.files import read_data_file
from moectl.taskmoe.manifest import (
    Manifest,
    SpecialistEntry,
    class_names,
    find_manifest,
    label_map,
    owners,
)
from moectl.taskmoe.rows import Rows, dedup, findings, held_out, joined

if TYPE_CHECKING:
    from moectl.taskmoe.settings import DataSection

Part = Literal["train", "test"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of every channel, of images in 0..1."""
_PARTS: tuple[Part, Part] = ("train", "test")


@dataclass(frozen=True)
class Data:
    """Three sets of images and what is known about them."""

    train: TensorSource
    val: TensorSource
    test: TensorSource
    class_names: list[str]
    """In the order of the labels 0..C-1."""
    class_ids: list[int]
    """(C,) the label of each class in the data files."""
    owners: Tensor
    """(C, E) float32, 1 where a specialist knows a class and 0 elsewhere."""
    mean: tuple[float, ...]
    """Per channel, of the training images in 0..1; `std` likewise."""
    std: tuple[float, ...]
    image_size: int
    test_ids: list[int]
    """Label of each test image in its file."""
    test_counts: Tensor
    """(N,) int64, how often each test image occurs in the files."""
    facts: dict[str, Any]
    """Plain values for the records of a run."""


def load(section: "DataSection", statistics: Statistics | None = None) -> Data:
    """Load the union of what the specialists know.

    Args:
        section: of the settings.
        statistics: to normalise by; those of the training images if not given.

    Raises:
        UserError: if files are missing or damaged, or do not fit the manifest.
    """
    manifest, folder = find_manifest(section.task, section.root)
    labels = label_map(manifest, section.label_map)
    return _load(manifest, folder, section, labels, statistics)


def load_specialist(section: "DataSection", index: int) -> Data:
    """Load what one specialist knows: its files, its classes in the order of its rows.

    With the same `split_seed` its validation images are those that validate the union.

    Args:
        section: of the settings.
        index: number of the specialist in the manifest.

    Raises:
        UserError: as `load`, and if there is no such specialist.
    """
    manifest, folder = find_manifest(section.task, section.root)
    if not 0 <= index < len(manifest.specialists):
        raise UserError(
            f"there is no specialist {index} in task {manifest.task}",
            f"specialists are numbered from 0 to {len(manifest.specialists) - 1}",
        )
    alone = replace(manifest, specialists=(manifest.specialists[index],))
    return _load(alone, folder, section, label_map(alone, "offset"), None)


def split_of(section: "DataSection") -> dict[str, Any]:
    """Return what decides which training images validate, as plain values."""
    return {"seed": section.split_seed, "fraction": section.val_fraction, "dedup": section.dedup}


def check(section: "DataSection") -> dict[str, Any]:
    """Count what the files of a task hold.

    Returns:
        Plain values: classes with their ids and owners, images per specialist and class, equal
        images, test images that are also trained on, and mean and standard deviation of all
        training images that `data.dedup` keeps.

    Raises:
        UserError: as `load`.
    """
    manifest, folder = find_manifest(section.task, section.root)
    labels = label_map(manifest, section.label_map)
    found = {part: _read(manifest, folder, part, section.allow_pickle) for part in _PARTS}
    kept = {part: dedup(rows, section.dedup) for part, rows in found.items()}
    mean, std = _statistics(kept["train"].rows.images)
    names = class_names(manifest, labels)
    counts = {
        part: Counter(zip(rows.specialists, rows.ids, strict=True)) for part, rows in found.items()
    }
    specialists = {}
    for number, entry in enumerate(manifest.specialists):
        specialists[entry.name] = {
            part: {one.name: count[number, one.id] for one in entry.classes}
            for part, count in counts.items()
        }
    return {
        "task": manifest.task,
        "image_size": manifest.image_size,
        "classes": {
            name: {"label": label, "id": id, "owners": row}
            for (id, label), name, row in zip(
                labels.items(), names, owners(manifest, labels), strict=True
            )
        },
        "specialists": specialists,
        **findings(found["train"], found["test"]),
        "dedup": section.dedup,
        "images": {part: len(one.counts) for part, one in kept.items()},
        "dropped": {part: one.dropped for part, one in kept.items()},
        "unmatched": {part: one.unmatched for part, one in kept.items()},
        "mean": mean,
        "std": std,
    }


def _load(
    manifest: Manifest,
    folder: Path,
    section: "DataSection",
    labels: dict[int, int],
    statistics: Statistics | None,
) -> Data:
    found = {part: _read(manifest, folder, part, section.allow_pickle) for part in _PARTS}
    kept = {part: dedup(rows, section.dedup) for part, rows in found.items()}
    pool, test = kept["train"].rows, kept["test"]
    held = held_out(pool, section.val_fraction, section.split_seed)
    train, val = (
        pool.take([row for row, out in enumerate(held) if out is part]) for part in (False, True)
    )
    mean, std = statistics or _statistics(train.images)
    augment, plain = _augment(section.augment, manifest.image_size, mean, std), Plain(mean, std)

    def source(rows: Rows, augment: Augment | None = None) -> TensorSource:
        targets = torch.tensor([labels[id] for id in rows.ids], dtype=torch.int64)
        return TensorSource(rows.images, targets, augment, plain)

    return Data(
        train=source(train, augment),
        val=source(val),
        test=source(test.rows),
        class_names=class_names(manifest, labels),
        class_ids=list(labels),
        owners=torch.tensor(owners(manifest, labels), dtype=torch.float32),
        mean=mean,
        std=std,
        image_size=manifest.image_size,
        test_ids=test.rows.ids,
        test_counts=torch.tensor(test.counts, dtype=torch.int64),
        facts={
            "dataset": f"task {manifest.task}",
            "digest": sha256(json.dumps([train.keys, val.keys]).encode())[:16],
            "specialists": [one.name for one in manifest.specialists],
            "image_size": manifest.image_size,
            "mean": mean,
            "std": std,
            "dedup": section.dedup,
            "images": {"train": len(train.ids), "val": len(val.ids), "test": len(test.counts)},
            "dropped": {part: one.dropped for part, one in kept.items()},
            "unmatched": {part: one.unmatched for part, one in kept.items()},
            **findings(found["train"], found["test"]),
        },
    )


def _read(manifest: Manifest, folder: Path, part: Part, allow_pickle: bool) -> Rows:
    """Read one part of every specialist's files and check it against the manifest."""
    parts = []
    for entry in manifest.specialists:
        name = entry.train if part == "train" else entry.test
        found = read_data_file(folder / name, allow_pickle) if name else _digits(entry, part)
        _check_file(found, entry, folder / name, manifest.image_size)
        parts.append(found)
    return joined(parts)


def _check_file(
    found: tuple[Tensor, Tensor], entry: SpecialistEntry, path: Path, side: int
) -> None:
    images, ids = found
    if images.shape[2:] != (side, side):
        height, width = images.shape[2:]
        raise UserError(
            f"{path}: images are {height} x {width}, but the manifest says image_size = {side}"
        )
    names = {one.id: one.name for one in entry.classes}
    present = set(ids.tolist())
    if strange := sorted(present - set(names)):
        raise UserError(
            f"{path}: label {strange[0]} is no class of specialist {entry.name}",
            f"its ids are {', '.join(map(str, names))}",
        )
    if missing := [f"{names[id]} ({id})" for id in names if id not in present]:
        raise UserError(f"{path}: has no image of {', '.join(missing)}")


def _digits(entry: SpecialistEntry, part: Part) -> tuple[Tensor, Tensor]:
    """Take the scans of a specialist's digits, twice as large; two fifths of all are for tests."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    split = train_test_split(
        range(len(scans.target)), test_size=0.4, stratify=scans.target, random_state=0
    )
    known = {one.id for one in entry.classes}
    rows = sorted(row for row in split[part == "test"] if scans.target[row] in known)
    grey = torch.from_numpy(scans.images[rows]).float()[:, None] * (255 / 16)
    large = F.interpolate(grey, scale_factor=2, mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(scans.target[rows]).long()


def _statistics(images: Tensor) -> Statistics:
    """Return mean and biased standard deviation per channel, of bytes as numbers in 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        # Counting bytes is exact, whatever the number of pixels.
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        first, second = shares @ values, shares @ values.square()
        mean.append(first.item())
        std.append((second - first.square()).clamp(min=0).sqrt().item())
    if min(std) < 1e-6:
        raise UserError("all training images are of one colour, nothing can be learnt from them")
    return tuple(mean), tuple(std)


def _augment(
    kind: Literal["none", "flip", "crop_flip"],
    side: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Augment | None:
    match kind:
        case "none":
            return None
        case "flip":
            return Standard(mean, std, padding=0, degrees=0)
        case "crop_flip":
            return Standard(mean, std, padding=max(side // 8, 1), degrees=15)
