"""What is wrong with label tables, images and boxes, all of it at once, before a training begins.

Letters: N images, K concepts, C targets.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moectl.csr.boxes import BoxCounts, read_boxes, read_resize_table
from moectl.csr.data import columns, refuse_leak
from moectl.csr.images import decode, find_image
from moectl.csr.losses import pos_weights
from moectl.csr.synthetic import glyphs
from moectl.csr.tables import Labels, Rows, as_columns, balanced, frequent, read_labels, split
from moectl.engine import console
from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from moectl.csr.settings import CsrSettings, DataSection

log = logging.getLogger(__name__)

T = TypeVar("T")
PARTS = ("train", "val", "test")
_SHOWN = 10  # of many images or names in a sentence


@dataclass
class _Table:
    """What was found out about one of the two label tables."""

    labels: Labels | None = None
    boxes: BoxCounts | None = None
    missing: list[str] = field(default_factory=list)
    """Ids of images without a file."""
    unreadable: list[str] = field(default_factory=list)
    """A sentence about each image that cannot be decoded."""


@dataclass
class _Findings:
    train: _Table
    test: _Table
    problems: list[str]
    """What makes a training impossible."""

    def attempt(self, step: Callable[[], T]) -> T | None:
        """Take a step; if it fails, note why and go on."""
        try:
            return step()
        except UserError as error:
            words = f"{error.message} ({error.hint})" if error.hint else error.message
            if words not in self.problems:
                self.problems.append(words)
            return None


def check(settings: "CsrSettings", images: bool = False) -> "tuple[dict[str, Any], list[Table]]":
    """Look for everything that is wrong or odd.

    Args:
        settings: its data section, the seed of the division and the cap of positives' weights.
        images: decode every image.

    Returns:
        The JSON document, whose "problems" make a training impossible, and tables.
    """
    section, seed = settings.data, settings.train.seed
    found = _Findings(_Table(), _Table(), [])
    if section.dataset == "synthetic":
        count = section.synthetic_images
        drawn = found.attempt(lambda: glyphs(count, seed, section.shortcut))
        found.train.labels = drawn.labels if drawn else None
        found.test.labels = glyphs(count // 3, seed + 1).labels
    else:
        _read(found, section)
        for name in ("train", "test"):
            _look_at_images(found, section, name, images)
        train, test = found.train, found.test
        if train.labels and test.labels and not (train.missing or test.missing):
            ids = train.labels.image_ids, test.labels.image_ids
            found.attempt(lambda: refuse_leak(section, *ids))
    document: dict[str, Any] = {"dataset": section.dataset, "images": {}, "columns": []}
    if found.train.labels:
        document.update(_described(found, settings, found.train.labels))
    document |= _files(found)
    document["problems"] = found.problems
    return document, _tables(document)


def _read(found: _Findings, section: "DataSection") -> None:
    wanted = columns(section)

    def read(path: Path, like: Labels | None = None) -> Labels | None:
        return found.attempt(lambda: read_labels(path, wanted, section.aggregate, like))

    found.train.labels = read(section.train_csv)
    found.test.labels = read(section.test_csv, found.train.labels)


def _look_at_images(found: _Findings, section: "DataSection", name: str, decoded: bool) -> None:
    """Find the images of a table, decode them if asked to, and read their boxes."""
    table: _Table = getattr(found, name)
    folder, boxes, sizes = (
        getattr(section, f"{name}_{what}") for what in ("dir", "bbox_csv", "resize_factor_csv")
    )
    labels = table.labels
    if labels is None:
        return
    paths: list[Path] = []
    for image in labels.image_ids:
        try:
            paths.append(find_image(folder, image))
        except UserError:
            table.missing.append(image)
    if table.missing:
        found.problems.append(
            f"{folder}: lacks {len(table.missing)} of {len(labels)} images: {_some(table.missing)}"
        )
    if decoded:
        table.unreadable = list(_undecodable(paths))
    if table.unreadable:
        found.problems.append(
            f"{folder}: {len(table.unreadable)} of {len(paths)} images cannot be read:"
            f" {table.unreadable[0]}"
        )
    if boxes is None or (table.missing and section.box_units != "normalized" and not sizes):
        return  # boxes in pixels need the sizes of all images
    resizes = found.attempt(lambda: read_resize_table(sizes)) if sizes else None
    units = section.box_units
    read = found.attempt(lambda: read_boxes(boxes, labels, units, resizes, folder))
    table.boxes = read.counts if read else None


def _undecodable(paths: list[Path]) -> Iterator[str]:
    with console.progress(len(paths)) as line:
        for done, path in enumerate(paths, 1):
            try:
                decode(path)
            except UserError as error:
                yield error.message
            line.update(done, path.name)


def _described(found: _Findings, settings: "CsrSettings", train: Labels) -> dict[str, Any]:
    """Divide the images as a training would, and count."""
    section, seed = settings.data, settings.train.seed
    parts = found.attempt(lambda: split(train, section.val_fraction, seed, section.stratify))
    if parts is None:
        return {"images": {"train": len(train)}}
    rows, held = parts
    kept = found.attempt(lambda: frequent(train, rows, section.min_positives)) or train
    if section.balance_no_finding:
        share = section.balance_no_finding
        thinned = found.attempt(lambda: balanced(kept, rows, share, seed))
        rows = rows if thinned is None else thinned
    places: dict[str, tuple[Labels, Rows | slice]] = {"train": (train, rows), "val": (train, held)}
    if found.test.labels:
        places["test"] = (found.test.labels, slice(None))
    counts = {part: as_columns(labels)[chosen].sum(0) for part, (labels, chosen) in places.items()}
    sums = torch.from_numpy(train.concept_values[rows]).sum(0)
    weights = pos_weights(sums, len(rows), settings.concept.pos_weight_cap).tolist()
    sizes = {"train": len(rows), "val": len(held)}
    if found.test.labels:
        sizes["test"] = len(found.test.labels)
    described = []
    for place, name in enumerate(train.concepts + train.targets):
        concept = place < len(train.concepts)
        positives = {part: int(counts[part][place]) for part in counts}
        constant = {0: "all 0", len(rows): "all 1"}
        described.append(
            {
                "name": name,
                "role": "concept" if concept else "target",
                "positives": positives,
                "pos_weight": round(weights[place], 4) if concept else None,
                "kappa": train.notes.get("kappa", {}).get(name),
                "kept": name in (kept.concepts if concept else kept.targets),
                "constant": constant.get(positives["train"]),
                "leak": concept and name in train.notes.get("leaks", []),
            }
        )
    return {"images": sizes, "columns": described, "notes": _notes(found, kept)}


def _notes(found: _Findings, train: Labels) -> dict[str, Any]:
    """Return what the tables' own notes say that a person may want to look at."""
    notes, tested = train.notes, found.test.labels.notes if found.test.labels else {}
    column = notes.get("class_column")
    return {
        "readers": notes.get("readers", []),
        "class_column": column,
        "class_kappa": notes.get("kappa", {}).get(column),
        "unused_columns": notes.get("unused_columns", []),
        "dropped": notes.get("dropped", {}),
        "leaks": notes.get("leaks", []),
        "empty_cells": {
            "train": notes.get("empty_cells", {}),
            "test": tested.get("empty_cells", {}),
        },
    }


def _files(found: _Findings) -> dict[str, Any]:
    tables = {"train": found.train, "test": found.test}
    return {
        "boxes": {name: asdict(one.boxes) for name, one in tables.items() if one.boxes},
        "missing_images": {name: one.missing for name, one in tables.items()},
        "unreadable_images": {name: one.unreadable for name, one in tables.items()},
    }


def _tables(document: Mapping[str, Any]) -> "list[Table]":
    found = []
    if document["images"]:
        sizes = document["images"]
        row = [sizes.get(part) for part in PARTS]
        found.append(console.table(PARTS, [row], "Images"))
    if document["columns"]:
        header = ("column", "role", *PARTS, "pos_weight", "kappa", "")
        rows = [_row(column) for column in document["columns"]]
        found.append(console.table(header, rows, "Positives"))
    if document["boxes"]:
        header = ("boxes", *document["boxes"])
        rows = [
            [
                name.replace("_", " "),
                *(_words(counts[name]) for counts in document["boxes"].values()),
            ]
            for name in asdict(BoxCounts())
        ]
        found.append(console.table(header, rows, "Boxes"))
    if rows := list(_remarks(document)):
        found.append(console.table(("to look at", ""), rows))
    return found


def _row(column: Mapping[str, Any]) -> list[object]:
    said = [column["constant"]] if column["constant"] else []
    said += [] if column["kept"] else ["left out"]
    said += ["equals a target"] if column["leak"] else []
    positives = [column["positives"].get(part) for part in PARTS]
    numbers = [*positives, column["pos_weight"], column["kappa"]]
    return [column["name"], column["role"], *numbers, ", ".join(said)]


def _remarks(document: Mapping[str, Any]) -> Iterator[list[object]]:
    notes = document.get("notes", {})
    if notes.get("class_kappa") is not None:
        yield [f"kappa of {notes['class_column']}", f"{notes['class_kappa']:.3f}"]
    if notes.get("unused_columns"):
        yield ["columns that are not used", ", ".join(notes["unused_columns"])]
    if notes.get("dropped"):
        yield ["left out by data.min_positives", _words(notes["dropped"])]
    if notes.get("leaks"):
        yield ["concepts equal to a target", ", ".join(notes["leaks"])]
    for name, cells in notes.get("empty_cells", {}).items():
        if cells:
            yield [f"empty cells taken for 0 ({name})", _words(cells)]


def _words(value: Any) -> str:
    """Write a number, or counts by name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return str(value)


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
