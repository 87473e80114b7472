"""Boxes that experts drew around findings, and the sizes of images before and after resizing."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moectl.csr.columns import Table, normalised, read_table
from moectl.csr.images import find_image, image_size
from moectl.csr.tables import Labels
from moectl.engine.errors import UserError

Box = tuple[int, float, float, float, float]
"""Number of the concept, then left, top, right, bottom in 0..1."""
Units = Literal["original", "resized", "normalized"]

COORDINATES = ("x_min", "y_min", "x_max", "y_max")
_MARGIN = 1e-4
"""How far outside is still a rounding error, as a share of the image."""


class Resize(NamedTuple):
    """Heights and widths in pixels."""

    original: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class BoxCounts:
    """What became of the rows of a box table, and where it disagrees with the labels."""

    rows: int = 0
    nothing: int = 0
    """Rows without coordinates, as for "No finding"."""
    of_targets: int = 0
    other_images: int = 0
    """Rows of images that the label table does not have."""
    empty: int = 0
    """Boxes without an area inside the image."""
    out_of_range: int = 0
    """Boxes that stood out of their image and were cut off."""
    unknown_names: dict[str, int] = field(default_factory=dict)
    """Rows of each name that is neither concept nor target."""
    box_without_label: dict[str, int] = field(default_factory=dict)
    """Of each concept: images with a box but not the label."""
    label_without_box: dict[str, int] = field(default_factory=dict)
    """Of each concept: images with the label but no box."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of concepts."""

    of_image: dict[str, list[Box]]
    """By the id of the image; images without boxes have an empty list."""
    counts: BoxCounts


def read_resize_table(path: Path) -> dict[str, Resize]:
    """Read which size every image had and has.

    Raises:
        UserError: naming the file, and the line and column if one is wrong.
    """
    table = read_table(path)
    image = table.needed("image_id")
    names = ("original_height", "original_width", "target_height", "target_width")
    places = [table.needed(name) for name in names]
    found = {}
    for row, line in zip(table.rows, table.lines, strict=True):
        sizes = [_number(table, row, line, place) for place in places]
        for size, name in zip(sizes, names, strict=True):
            if size < 1 or size != int(size):
                raise UserError(f"{path}, line {line}, column {name!r}: {size:g}, expected pixels")
        found[row[image]] = Resize((int(sizes[0]), int(sizes[1])), (int(sizes[2]), int(sizes[3])))
    return found


def read_boxes(
    path: Path,
    labels: Labels,
    units: Units = "original",
    resizes: dict[str, Resize] | None = None,
    folder: Path | None = None,
) -> Boxes:
    """Read the boxes of the concepts of a label table; those of targets do not count.

    Args:
        path: CSV file with `image_id, class_name, x_min, y_min, x_max, y_max`.
        labels: its images and concepts.
        units: coordinates are pixels of the `original` image, pixels of the stored, `resized` one,
            or `normalized` to 0..1.
        resizes: the sizes in pixels. For images that it does not have, the file is asked.
        folder: of the images.

    Raises:
        UserError: naming the file, and the line and column if one is wrong.
    """
    table = read_table(path)
    drawn, found, unknown = _drawn(table, labels)
    reach = max((max(corners) for _, _, corners in drawn), default=2)
    if units != "normalized" and reach <= 1:
        raise UserError(
            f"{path}: no coordinate is above {reach:g}, but data.box_units is {units}",
            "choose data.box_units = normalized",
        )
    boxes: dict[str, list[Box]] = {image: [] for image in labels.image_ids}
    for image, concept, corners in drawn:
        size = (1, 1) if units == "normalized" else _size(image, units, resizes, folder)
        whole, inside = _inside(corners, size)
        found["out_of_range"] += not whole
        if inside:
            boxes[image].append((concept, *inside))
        else:
            found["empty"] += 1
    if found["out_of_range"] * 2 > len(drawn):
        raise UserError(
            f"{path}: {found['out_of_range']} of {len(drawn)} boxes lie out of their image",
            f"data.box_units is {units}; the others are original, resized and normalized",
        )
    without_label, without_box = _disagreements(boxes, labels)
    counts = BoxCounts(
        rows=len(table.rows),
        nothing=found["nothing"],
        of_targets=found["of_targets"],
        other_images=found["other_images"],
        empty=found["empty"],
        out_of_range=found["out_of_range"],
        unknown_names=dict(unknown),
        box_without_label=without_label,
        label_without_box=without_box,
    )
    return Boxes(boxes, counts)


_Corners = tuple[float, float, float, float]
_Drawn = tuple[str, int, _Corners]


def _drawn(table: Table, labels: Labels) -> tuple[list[_Drawn], Counter[str], Counter[str]]:
    """Return image, concept and corners of each row that counts, and counts of all others."""
    concepts = {normalised(name): place for place, name in enumerate(labels.concepts)}
    targets = {normalised(name) for name in labels.targets}
    images = set(labels.image_ids)
    image, name = table.needed("image_id"), table.needed("class_name")
    places = [table.needed(one) for one in COORDINATES]
    drawn: list[_Drawn] = []
    found: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for row, line in zip(table.rows, table.lines, strict=True):
        what, corners = normalised(row[name]), _corners(table, row, line, places)
        if corners is None:
            found["nothing"] += 1
        elif row[image] not in images:
            found["other_images"] += 1
        elif what in concepts:
            drawn.append((row[image], concepts[what], corners))
        elif what in targets:
            found["of_targets"] += 1
        else:
            unknown[row[name]] += 1
    return drawn, found, unknown


def _corners(table: Table, row: list[str], line: int, places: list[int]) -> _Corners | None:
    """Return the coordinates of a row, None if it has none at all."""
    if all(row[place].casefold() in {"", "nan"} for place in places):
        return None
    left, top, right, bottom = (_number(table, row, line, place) for place in places)
    return left, top, right, bottom


def _number(table: Table, row: list[str], line: int, place: int) -> float:
    try:
        value = float(row[place])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        column = f"{table.path}, line {line}, column {table.header[place]!r}"
        raise UserError(f"{column}: {row[place]!r}, expected a number")
    return value


def _size(
    image: str, units: Units, resizes: dict[str, Resize] | None, folder: Path | None
) -> tuple[int, int]:
    if resizes and image in resizes:
        return resizes[image].original if units == "original" else resizes[image].target
    if folder is None:
        raise UserError(
            f"the size of image {image} is not known, which boxes in pixels need",
            "give a resize table, or choose data.box_units = normalized",
        )
    return image_size(find_image(folder, image))


def _inside(corners: _Corners, size: tuple[int, int]) -> tuple[bool, _Corners | None]:
    """Return whether a box lies in its image, and its part that does, in 0..1."""
    height, width = size
    left, top, right, bottom = corners
    shares = (left / width, top / height, right / width, bottom / height)
    whole = all(-_MARGIN <= share <= 1 + _MARGIN for share in shares)
    left, top, right, bottom = (min(max(share, 0.0), 1.0) for share in shares)
    return whole, (left, top, right, bottom) if left < right and top < bottom else None


def _disagreements(
    boxes: dict[str, list[Box]], labels: Labels
) -> tuple[dict[str, int], dict[str, int]]:
    """Count the images of each concept with a box alone, and with the label alone."""
    labelled = labels.concept_values >= 0.5
    boxed = np.zeros(labelled.shape, bool)
    for row, image in enumerate(labels.image_ids):
        boxed[row, [box[0] for box in boxes[image]]] = True

    def counted(where: NDArray[np.bool_]) -> dict[str, int]:
        found = zip(labels.concepts, where.sum(0).tolist(), strict=True)
        return {name: count for name, count in found if count}

    return counted(boxed & ~labelled), counted(labelled & ~boxed)
