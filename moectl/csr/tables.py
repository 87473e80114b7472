"""Label tables: which columns are concepts and which are targets, and what the readers saw.

Legend: N images, R readings (a table has one line for each), K concepts, C targets.
"""

import logging
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moectl.csr.columns import NO_FINDING, Columns, Roles, Table, normalised, read_table, roles
from moectl.csr.readers import agreement, averaged, of_reader, voted
from moectl.engine.errors import UserError
from moectl.engine.seeding import key

logger = logging.getLogger(__name__)

_MISSING = {"", "nan", "na", "n/a", "none", "null"}

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Labels:
    """A label table with one row per image."""

    image_ids: list[str]
    concepts: list[str]
    targets: list[str]
    concept_values: Floats
    """(N, K) in 0..1; 1 is present from 0.5 on."""
    target_values: NDArray[Any]
    """(N, C) float32 in 0..1, or (N,) int64 classes."""
    patients: list[str]
    """(N,) the image's own id where nothing is known."""
    notes: dict[str, Any]
    """Plain values that describe how the table was read."""

    def __len__(self) -> int:
        return len(self.image_ids)


def read_labels(
    path: Path,
    columns: Columns | None = None,
    aggregate: str = "any",
    like: Labels | None = None,
) -> Labels:
    """Read a label table.

    Args:
        path: CSV file with one line per image and reader.
        columns: what its columns mean.
        aggregate: what several readers make of an image: `any`, `majority` (more than half),
            `mean`, or `reader:<id>`. A class is what most of them say.
        like: the training table, which decides names and order.

    Raises:
        UserError: naming the file, and the line and column if one is wrong.
    """
    columns = columns or Columns()
    table = read_table(path)
    found = _roles_like(table, like) if like else roles(table, columns)
    image_column = table.needed(columns.image)
    ids = [row[image_column] for row in table.rows]
    readers = _readers(table, columns, ids)
    patients = _patients(table, columns, ids)
    readings = _readings(table, found, columns, like)
    kept = of_reader(table, readers, aggregate)
    image_ids = list(dict.fromkeys(ids[row] for row in kept))
    images = _numbers([ids[row] for row in kept])
    notes: dict[str, Any] = {
        "table": str(path),
        "columns_from": found.origin,
        "class_column": readings.class_column,
        "unused_columns": _unused(table, found, columns),
        "aggregate": aggregate,
        "readings": len(ids),
        "readers": sorted(set(readers) - {""}),
        "empty_cells": readings.empty_cells,
        "kappa": agreement(readings.columns(), _numbers(ids)) if len(set(ids)) < len(ids) else {},
    }
    values, target_values = averaged(readings.values[kept], images, aggregate), None
    concepts = len(found.concepts)
    if readings.classes is not None:
        target_values, notes["tied_images"] = voted(readings.classes[kept], images)
    labels = Labels(
        image_ids=image_ids,
        concepts=list(like.concepts) if like else readings.names[:concepts],
        targets=list(like.targets) if like else readings.targets,
        concept_values=values[:, :concepts],
        target_values=values[:, concepts:] if target_values is None else target_values,
        patients=[patients[image] for image in image_ids],
        notes=notes,
    )
    notes["leaks"] = _leaks(labels)
    if notes["leaks"] and like is None:
        logger.warning("%s: concepts equal to a target: %s", path, ", ".join(notes["leaks"]))
    return labels


class _Readings(NamedTuple):
    """What the lines of a table say."""

    names: list[str]
    """Of the columns of `values`."""
    values: Floats
    """(R, n) 0 or 1: concepts, then targets that have a column each."""
    empty_cells: dict[str, int]
    classes: Rows | None
    """(R,) with `multiclass`."""
    targets: list[str]
    class_column: str | None

    def columns(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = dict(zip(self.names, self.values.T, strict=True))
        if self.class_column is not None and self.classes is not None:
            found[self.class_column] = self.classes
        return found


def _readings(table: Table, found: Roles, columns: Columns, like: Labels | None) -> _Readings:
    by_class = columns.task_mode == "multiclass"
    single = by_class and len(found.targets) == 1
    places = found.concepts if single else found.concepts + found.targets
    names = [table.header[place] for place in places]
    values, empty = _binary(table, places)
    empty_cells = {name: count for name, count in zip(names, empty, strict=True) if count}
    targets, classes = names[len(found.concepts) :], None
    if single:
        classes, targets = _named_classes(table, found.targets[0], like)
    elif by_class:
        classes = _marked_classes(table, values[:, len(found.concepts) :])
    column = table.header[found.targets[0]] if single else None
    return _Readings(names, values, empty_cells, classes, targets, column)


def _roles_like(table: Table, like: Labels) -> Roles:
    targets = [like.notes["class_column"]] if like.notes["class_column"] else like.targets
    return Roles(
        [table.needed(name) for name in like.concepts],
        [table.needed(name) for name in targets],
        like.notes["columns_from"],
    )


def _unused(table: Table, found: Roles, columns: Columns) -> list[str]:
    special = {table.column(name) for name in (columns.image, columns.reader, columns.patient)}
    used = special.union(found.concepts, found.targets)
    return [name for place, name in enumerate(table.header) if place not in used]


def _numbers(ids: list[str]) -> Rows:
    """Number ids in the order in which they first occur."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in ids])


def _readers(table: Table, columns: Columns, ids: list[str]) -> list[str]:
    """Return the reader of each line, having made sure that none saw an image twice."""
    place = table.column(columns.reader)
    readers = ["" if place is None else row[place] for row in table.rows]
    seen: dict[tuple[str, str], int] = {}
    for image, reader, line in zip(ids, readers, table.lines, strict=True):
        if not image:
            raise UserError(f"{table.path}, line {line}: {columns.image} is empty")
        first = seen.setdefault((image, reader), line)
        if first != line:
            who = f"by reader {reader!r}" if place is not None else f"without a {columns.reader}"
            raise UserError(f"{table.path}, line {line}: image {image} again {who}, as in {first}")
    return readers


@lru_cache(maxsize=256)
def _value(cell: str) -> float:
    """Return 0 or 1, NaN for an empty cell, or -1 for what is none of these."""
    if cell.casefold() in _MISSING:
        return float("nan")
    try:
        number = float(cell)
    except ValueError:
        return -1
    return number if number in {0, 1} else -1


def _binary(table: Table, places: list[int]) -> tuple[Floats, list[int]]:
    """Return 0/1 values (R, n) and how many empty cells of each column were taken for 0."""
    cells = [[_value(row[place]) for place in places] for row in table.rows]
    values = np.array(cells, np.float32)
    wrong = np.argwhere(values < 0)
    if len(wrong):
        row, column = wrong[0].tolist()
        name, cell = table.header[places[column]], table.rows[row][places[column]]
        raise UserError(
            f"{table.path}, line {table.lines[row]}, column {name!r}: {cell!r}, expected 0 or 1",
            "if the column is neither concept nor target, list those that are with"
            " data.concept_columns and data.target_columns",
        )
    return np.nan_to_num(values, nan=0), np.isnan(values).sum(0).tolist()


def _named_classes(table: Table, column: int, like: Labels | None) -> tuple[Rows, list[str]]:
    """Return the class (R,) of every line and the names of the classes, sorted."""
    cells = [row[column] for row in table.rows]
    names = like.targets if like else sorted(set(cells) - {""})
    numbers = {name: number for number, name in enumerate(names)}
    for cell, line in zip(cells, table.lines, strict=True):
        if cell not in numbers:
            place = f"{table.path}, line {line}, column {table.header[column]!r}"
            known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise UserError(f"{place}: {cell!r}, expected a class: {known}")
    return np.array([numbers[cell] for cell in cells]), list(names)


def _marked_classes(table: Table, values: Floats) -> Rows:
    """Return the class (R,) of every line, whose column alone is 1."""
    marks = values.sum(1)
    for row in np.flatnonzero(marks != 1)[:1].tolist():
        raise UserError(
            f"{table.path}, line {table.lines[row]}: {marks[row]:g} of the {values.shape[1]} target"
            " columns are 1, expected exactly one",
            "choose data.task_mode = multilabel if an image may have none or several",
        )
    return values.argmax(1)


def _patients(table: Table, columns: Columns, ids: list[str]) -> dict[str, str]:
    place = table.column(columns.patient)
    if place is None:
        return {image: _patient_in(image, columns.patient_pattern) for image in ids}
    found: dict[str, str] = {}
    for image, row, line in zip(ids, table.rows, table.lines, strict=True):
        patient = row[place] or image
        if found.setdefault(image, patient) != patient:
            raise UserError(
                f"{table.path}, line {line}: image {image} is of patient {patient!r} here and of"
                f" {found[image]!r} above"
            )
    return found


def _patient_in(image: str, pattern: str) -> str:
    if not pattern:
        return image
    try:
        match = re.match(pattern, image)
    except re.error as error:
        raise UserError(f"data.patient_pattern is {pattern!r}: {error}") from None
    if not match or not match[0]:
        raise UserError(f"data.patient_pattern {pattern!r} does not match the image id {image!r}")
    return match[0]


def as_columns(labels: Labels) -> NDArray[np.bool_]:
    """Return (N, K + C) which concepts and targets each image has, classes as columns too."""
    targets = labels.target_values
    if targets.ndim == 1:
        targets = targets[:, None] == np.arange(len(labels.targets))
    return np.hstack([labels.concept_values >= 0.5, targets >= 0.5])


def _leaks(labels: Labels) -> list[str]:
    """Name the concepts that equal a target in every image."""
    present, split = as_columns(labels), len(labels.concepts)
    concepts, targets = present[:, :split], present[:, split:]
    varied = concepts.any(0) & ~concepts.all(0)
    return [
        labels.concepts[place]
        for place in np.flatnonzero(varied).tolist()
        if (concepts[:, [place]] == targets).all(0).any()
    ]


def frequent(labels: Labels, rows: Rows, min_positives: int) -> Labels:
    """Leave out concepts and targets with fewer positives than that; classes stay.

    Args:
        labels: of all images, which all stay.
        rows: the training images, which alone are counted.
        min_positives: 0 leaves nothing out.

    Raises:
        UserError: if fewer than two concepts or no target are left.
    """
    counts = as_columns(labels)[rows].sum(0)
    kept = counts >= min_positives
    split = len(labels.concepts)
    concepts, targets = np.flatnonzero(kept[:split]), np.flatnonzero(kept[split:])
    by_class = labels.target_values.ndim == 1
    if len(concepts) < 2 or not (by_class or len(targets)):
        raise UserError(
            f"data.min_positives is {min_positives}, which leaves {len(concepts)} concepts and"
            f" {len(targets)} targets of the training images",
            "at least two concepts and a target are needed",
        )
    names = labels.concepts + ([] if by_class else labels.targets)
    dropped = {name: int(counts[place]) for place, name in enumerate(names) if not kept[place]}
    return replace(
        labels,
        concepts=[labels.concepts[place] for place in concepts],
        targets=labels.targets if by_class else [labels.targets[place] for place in targets],
        concept_values=labels.concept_values[:, concepts],
        target_values=labels.target_values if by_class else labels.target_values[:, targets],
        notes={**labels.notes, "dropped": dropped},
    )


def balanced(labels: Labels, rows: Rows, share: float, seed: int) -> Rows:
    """Keep so many images with "No finding" that they make up at most that share.

    Of n others, floor(n * share / (1 - share)) stay; which ones, the seed decides.

    Args:
        labels: of all images.
        rows: the training images.
        share: in (0, 1).
        seed: of the choice.

    Raises:
        UserError: if there is no such target.
    """
    names = [normalised(name) for name in labels.targets]
    if NO_FINDING not in names:
        raise UserError(
            "data.balance_no_finding is on, but there is no target 'No finding'",
            f"the targets are {', '.join(labels.targets)}",
        )
    normal = as_columns(labels)[rows, len(labels.concepts) + names.index(NO_FINDING)]
    room = int((~normal).sum() * share / (1 - share) + 1e-9)
    drawn = np.random.default_rng(key(seed, "no finding")).permutation(rows[normal])
    return np.sort(np.concatenate([rows[~normal], drawn[:room]]))


def split(labels: Labels, fraction: float, seed: int, stratify: bool = False) -> tuple[Rows, Rows]:
    """Divide the images into training and validation; no patient is in both.

    With every image of a patient of its own, floor(N (1 - fraction)) images train, exactly;
    else at least as many.

    Args:
        labels: of all images.
        fraction: share of the images that validate, in (0, 1).
        seed: of the division.
        stratify: spread the images of each rarest concept or target evenly over both.

    Returns:
        Positions of the training and of the validation images, ascending.

    Raises:
        UserError: if no image would validate, or none train.
    """
    total = len(labels)
    wanted = total - int(total * (1 - fraction) + 1e-9)
    owner = _numbers(labels.patients)
    sizes = np.bincount(owner)
    order = np.random.default_rng(key(seed, "split")).permutation(len(sizes))
    if stratify:
        order = order[np.argsort(_strata(labels, owner)[order], kind="stable")]
    chosen = np.zeros(len(sizes), bool)
    seen = taken = 0
    for patient in order.tolist():  # along the line, a patient joins once there is room enough
        seen += sizes[patient]
        if (taken + sizes[patient]) * total <= seen * wanted:
            chosen[patient] = True
            taken += sizes[patient]
    if not chosen.any():
        raise UserError(
            f"{fraction:g} of {total} images of {len(sizes)} patients for validation is none",
            "raise data.val_fraction",
        )
    if chosen.all():
        raise UserError(f"{fraction:g} of {total} images for validation leaves none to train")
    return np.flatnonzero(~chosen[owner]), np.flatnonzero(chosen[owner])


def _strata(labels: Labels, owner: Rows) -> Rows:
    """Return for each patient how rare the rarest is that their images show; with none, last."""
    present = as_columns(labels)
    rank = np.argsort(np.argsort(present.sum(0), kind="stable"))
    rarest = np.where(present, rank, present.shape[1]).min(1)
    strata = np.full(owner.max() + 1, present.shape[1])
    np.minimum.at(strata, owner, rarest)
    return strata
