"""Images with concepts, targets and boxes, divided into training, validation and test.

Letters: N images, K concepts, C targets, H W feature grid, S side that the network sees.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moectl.csr.boxes import Box, read_boxes, read_resize_table
from moectl.csr.columns import USUAL, Columns
from moectl.csr.images import find_image, read_image
from moectl.csr.losses import box_masks
from moectl.csr.synthetic import Glyphs, glyphs
from moectl.csr.tables import Labels, balanced, frequent, read_labels, split
from moectl.csr.transforms import (
    STATISTICS,
    Statistics,
    Transform,
    evaluation,
    measured,
    training,
)
from moectl.engine.errors import UserError
from moectl.engine.sources import FolderSource

if TYPE_CHECKING:
    from moectl.csr.settings import DataSection

log = logging.getLogger(__name__)

Reader = Callable[[int], Any]

ANY: Statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
"""Statistics where no image is looked at, so that none are measured."""


@dataclass(frozen=True)
class Part:
    """Some of the images. Sources yield ((images, masks), rows): rows index what is here."""

    source: FolderSource
    """Moves training images at random in training batches."""
    still: FolderSource
    """Never does."""
    image_ids: list[str]
    concepts: Tensor
    """(N, K) float32."""
    targets: Tensor
    """(N, C) float32, or (N,) int64 classes."""
    boxes: list[list[Box]]
    """(N,) of each image."""
    pixels: Reader
    """An image by its place, (C, H, W) in 0..1 at its own size."""
    identities: list[str]
    """(N,) what changes when the pixels of an image do."""


@dataclass(frozen=True)
class Data:
    """Three parts and what is known about them."""

    train: Part
    val: Part
    test: Part
    concepts: list[str]
    targets: list[str]
    statistics: Statistics
    has_boxes: bool
    notes: dict[str, Any]
    """Plain values for the records of a run."""


@dataclass(frozen=True)
class _Images:
    labels: Labels
    read: Reader
    """The pixels of an image by its row, (C, H, W) in 0..1."""
    boxes: dict[str, list[Box]]
    identity: Callable[[int], str]
    """What changes when the pixels of an image do, by its row."""


def load(
    section: "DataSection",
    seed: int,
    grid: tuple[int, int],
    statistics: Statistics | None = None,
) -> Data:
    """Load the tables, and say how images are read.

    Args:
        section: of the settings.
        seed: of the division of the training images.
        grid: H and W, onto which boxes are drawn.
        statistics: to normalise with, if not those that the settings name.

    Raises:
        UserError: naming the file and place of what is wrong.
    """
    pool, test = _glyphs(section, seed) if section.dataset == "synthetic" else _tables(section)
    rows, held = split(pool.labels, section.val_fraction, seed, section.stratify)
    labels = frequent(pool.labels, rows, section.min_positives)
    if section.balance_no_finding:
        rows = balanced(labels, rows, section.balance_no_finding, seed)
    pool = replace(pool, labels=labels, boxes=_of_concepts(pool, labels))
    test = replace(test, labels=_like(test.labels, labels), boxes=_of_concepts(test, labels))
    statistics = statistics or _statistics(section.normalize, pool, rows)
    size, jitter = section.image_size, section.jitter
    plain = evaluation(size, statistics)
    moving = training(
        size,
        statistics,
        hflip=section.hflip,
        degrees=section.degrees,
        brightness=jitter,
        contrast=jitter,
    )

    def part(images: _Images, chosen: Any, transform: Transform) -> Part:
        chosen = [int(row) for row in chosen]
        return _part(images, chosen, (transform, plain), grid, section.workers)

    return Data(
        train=part(pool, rows, moving),
        val=part(pool, held, plain),
        test=part(test, range(len(test.labels)), plain),
        concepts=labels.concepts,
        targets=labels.targets,
        statistics=statistics,
        has_boxes=any(pool.boxes.values()),
        notes=labels.notes,
    )


def _statistics(name: str, images: _Images, rows: Any) -> Statistics:
    if name != "dataset":
        return STATISTICS["medmae" if name == "medmae" else "imagenet"]
    try:
        return measured(images.read(int(row)) for row in rows)
    except ValueError as error:
        raise UserError(f"data.normalize is dataset, but {error}") from None


def _part(
    images: _Images,
    rows: list[int],
    transforms: tuple[Transform, Transform],
    grid: tuple[int, int],
    workers: int,
) -> Part:
    labels = images.labels
    ids = [labels.image_ids[row] for row in rows]
    boxes = [images.boxes.get(name, []) for name in ids]
    count = len(labels.concepts)

    def reader(transform: Transform) -> Callable[[str], Any]:
        def read(place: Any) -> tuple[Tensor, Tensor]:
            pixels, moved = transform(images.read(rows[place]), boxes[place])
            masks, _ = box_masks([moved], count, grid)
            return pixels, masks[0]

        return read

    random, plain = transforms
    items: Any = [(place, place) for place in range(len(rows))]
    return Part(
        source=FolderSource(items, reader(random), reader(plain), workers),
        still=FolderSource(items, reader(plain), reader(plain), workers),
        image_ids=ids,
        concepts=torch.from_numpy(labels.concept_values[rows]).float(),
        targets=torch.from_numpy(np.asarray(labels.target_values[rows])),
        boxes=boxes,
        pixels=lambda place: images.read(rows[place]),
        identities=[images.identity(row) for row in rows],
    )


def _of_concepts(images: _Images, labels: Labels) -> dict[str, list[Box]]:
    """Number the boxes by the concepts that are kept."""
    places = {
        old: labels.concepts.index(name)
        for old, name in enumerate(images.labels.concepts)
        if name in labels.concepts
    }
    return {
        image: [(places[box[0]], *box[1:]) for box in boxes if box[0] in places]
        for image, boxes in images.boxes.items()
    }


def _like(labels: Labels, wanted: Labels) -> Labels:
    """Keep the columns that the training table keeps."""
    concepts = [labels.concepts.index(name) for name in wanted.concepts]
    values = labels.target_values
    if values.ndim == 2:
        values = values[:, [labels.targets.index(name) for name in wanted.targets]]
    return replace(
        labels,
        concepts=wanted.concepts,
        targets=wanted.targets,
        concept_values=labels.concept_values[:, concepts],
        target_values=values,
    )


def _glyphs(section: "DataSection", seed: int) -> tuple[_Images, _Images]:
    count = section.synthetic_images
    pool = glyphs(count, seed, section.shortcut)
    test = glyphs(count // 3, seed + 1)

    def of(drawn: Glyphs, drawn_with: int) -> _Images:
        identity = f"glyphs {drawn_with} {section.shortcut} "
        return _Images(
            drawn.labels,
            lambda row: drawn.images[row],
            drawn.boxes,
            lambda row: f"{identity}{row}",
        )

    return of(pool, seed), of(test, seed + 1)


def columns(section: "DataSection") -> Columns:
    """Return what the settings say about the columns of the label tables."""
    usual = USUAL.get(section.dataset, Columns())
    own = section.concept_set != "auto"
    return Columns(
        concepts=_names(section.concept_columns) or (() if own else usual.concepts),
        targets=_names(section.target_columns) or usual.targets,
        concept_set=section.concept_set,
        task_mode=section.task_mode,
        image=section.image_column or usual.image,
        patient_pattern=section.patient_pattern,
    )


def _tables(section: "DataSection") -> tuple[_Images, _Images]:
    wanted = columns(section)
    train = read_labels(section.train_csv, wanted, section.aggregate)
    test = read_labels(section.test_csv, wanted, section.aggregate, like=train)
    refuse_leak(section, train.image_ids, test.image_ids)
    return (
        _files(
            section,
            train,
            section.train_dir,
            section.train_bbox_csv,
            section.train_resize_factor_csv,
        ),
        _files(
            section, test, section.test_dir, section.test_bbox_csv, section.test_resize_factor_csv
        ),
    )


def refuse_leak(section: "DataSection", train: Sequence[str], test: Sequence[str]) -> None:
    """Make sure that no file is both a training and a test image; ids alone may be the same.

    Raises:
        UserError: naming the images that are, or one that is missing.
    """
    folders = section.train_dir, section.test_dir

    def is_one(name: str) -> bool:
        first, second = (find_image(folder, name).resolve() for folder in folders)
        return first == second

    known = set(train)
    if both := [name for name in test if name in known and is_one(name)]:
        shown = ", ".join(both[:5]) + (" …" if len(both) > 5 else "")
        raise UserError(
            f"{section.test_csv}: {len(both)} of {len(test)} images are training images, too:"
            f" {shown}",
            f"take them out of it, or out of {section.train_csv}",
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _files(
    section: "DataSection", labels: Labels, folder: Path, table: Path | None, sizes: Path | None
) -> _Images:
    paths = [find_image(folder, name) for name in labels.image_ids]
    boxes: dict[str, list[Box]] = {}
    if table is not None:
        resizes = read_resize_table(sizes) if sizes else None
        boxes = read_boxes(table, labels, section.box_units, resizes, folder).of_image

    def identity(row: int) -> str:
        found = paths[row].stat()
        return f"{paths[row].resolve()} {found.st_size} {found.st_mtime_ns} {section.channels}"

    return _Images(labels, lambda row: read_image(paths[row], section.channels), boxes, identity)
