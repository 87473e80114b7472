"""What each prototype looks like: its nearest training images, and how much it matters.

Letters: N training images, P of them with a concept, K concepts, M prototypes per concept,
C classes, D projection width, n exemplars, H W feature grid.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr import contact_sheets, curation
from moectl.csr.data import Part
from moectl.csr.edits import Head, contributions
from moectl.csr.inference import Opened, open_network
from moectl.csr.localisation import out_of_box_rates
from moectl.csr.losses import present_pairs
from moectl.csr.oracle import compare
from moectl.csr.prototypes import wins
from moectl.csr.report import report_again
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_json, write_json
from moectl.engine.sources import FolderSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

log = logging.getLogger(__name__)

_FILE, _CURATION = "atlas.json", "curation.toml"
_SUSPECT = 0.5  # share of exemplars on which the peak lies outside
_ENOUGH = 3  # exemplars with boxes
_NAMED = 8  # suspects that the log names


class Nearest(NamedTuple):
    """The training images most like each prototype of one concept, best first."""

    rows: Tensor
    """(M, n) places among the training images."""
    similarities: Tensor
    """(M, n) cosines."""


class Looks(NamedTuple):
    """Where prototypes of one concept look in their exemplars."""

    maps: Tensor
    """(M, n, H, W) similarities."""
    images: "dict[int, NDArray[np.uint8]]"
    """Small ones, by row."""


def run_atlas(request: Request, top: int) -> "tuple[dict[str, Any], Table]":
    """Find the exemplars of every prototype and write atlas, contact sheets and curation file.

    A curation file that leaves out prototypes is a person's work, and stays as it is.

    Args:
        request: names the run, into whose folder everything goes.
        top: n; fewer where fewer training images have a concept.

    Returns:
        The JSON document, and a table of the prototypes.

    Raises:
        UserError: if the network has no prototypes yet, or the curation file is one of others.
    """
    opened = open_network(request)
    if opened.facts.get("stage") == "concept":
        raise UserError(
            f"{opened.folder / opened.weights['file']}: has no trained prototypes",
            "moectl csr train --stage prototype trains them",
        )
    network, path = curation.fingerprint(opened.model), opened.folder / _CURATION
    kept, made = opened.model.kept.cpu(), is_file(path)
    if made:
        kept = curation.read(path, opened.concepts, opened.model.num_prototypes, network)
    rows, sheets = _prototypes(opened, kept, top)
    document = {
        "weights": {name: opened.weights[name] for name in ("file", "sha256")},
        "concepts": opened.concepts,
        "prototypes": rows,
    }
    if opened.accelerator.is_main_process:
        write_json(opened.folder / _FILE, document)
        if made and not kept.all():
            log.info("%s stays as it is: it leaves out %d prototypes", path, int((~kept).sum()))
        else:
            flags = kept.flatten().tolist()
            chosen = [{**row, "keep": keep} for row, keep in zip(rows, flags, strict=True)]
            curation.write(path, chosen, network)
        report_again(opened.folder)
    _tell(opened, rows)
    places = {"folder": str(opened.folder), "sheets": sheets, "curation": str(path)}
    return {**places, **document}, _table(rows)


def read_atlas(folder: Path) -> dict[str, Any] | None:
    """Return the atlas of a run as `run_atlas` wrote it; None where there is none.

    Its `weights` tell which network it describes.

    Raises:
        UserError: if the file is no atlas.
    """
    path = folder / _FILE
    if not is_file(path):
        return None
    document = read_json(path)
    if not isinstance(document, dict) or not {"weights", "concepts", "prototypes"} <= set(document):
        raise UserError(f"{path}: no atlas, expected weights, concepts and prototypes")
    return document


def _prototypes(opened: Opened, kept: Tensor, top: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Describe every prototype, and draw the sheets of each concept; return their paths as well."""
    part, model = opened.data.train, opened.model
    vectors, own = present_pairs(
        opened.outputs(part, ("local_vectors",)).local_vectors, part.concepts
    )
    prototypes = model.prototype_vectors.detach().cpu()
    hits = wins(prototypes, vectors, own)
    reliance = _reliance(opened)
    rows: list[dict[str, Any]] = []
    sheets: list[str] = []
    names = contact_sheets.file_names(opened.concepts)
    for place, concept in enumerate(opened.concepts):
        # Pairs are in the order of the images.
        with_it = (part.concepts[:, place] >= 0.5).nonzero()[:, 0]
        found = nearest(vectors[own == place], prototypes[place], with_it, top)
        seen = looks(opened, part, place, found.rows)
        outside = _outside(part, place, found.rows, seen.maps)
        described = [
            {
                "concept": concept,
                "index": index,
                "hits": int(hits[place, index]),
                "alive": bool(hits[place, index]),
                "reliance": reliance[place][index],
                "out_of_box": outside[index][0],
                "suspect": outside[index][1],
                "exemplars": _exemplars(part, found, seen.maps, index),
            }
            for index in range(len(prototypes[place]))
        ]
        rows += described
        if opened.accelerator.is_main_process:
            folder = opened.folder / "figures"
            folder.mkdir(exist_ok=True)
            stem = folder / f"atlas_{names[place]}"
            flags = kept[place].tolist()
            sheets += map(str, contact_sheets.draw(stem, described, flags, seen.images))
    return rows, sheets


def nearest(vectors: Tensor, prototypes: Tensor, images: Tensor, top: int) -> Nearest:
    """Find the vectors of one concept that are most like its prototypes.

    Args:
        vectors: (P, D), of any length.
        prototypes: (M, D), of any length.
        images: (P,) where the vectors come from.
        top: n.

    Source: Huy et al. 2025, eq. 11, where it must read the most similar one.
    """
    cosines = F.normalize(prototypes, dim=1) @ F.normalize(vectors, dim=1).T
    found = cosines.clamp(-1, 1).topk(min(top, len(vectors)), dim=1)
    return Nearest(images[found.indices], found.values)


def looks(opened: Opened, part: Part, concept: int, rows: Tensor) -> Looks:
    """Ask where the prototypes of a concept look, each in its own images (M, n)."""
    height, width = opened.model.backbone.grid(opened.settings.data.image_size)
    maps = torch.zeros(*rows.shape, height, width)
    images: dict[int, NDArray[np.uint8]] = {}
    mean, deviation = (torch.tensor(one)[:, None, None] for one in opened.facts["statistics"])
    for pixels, places in _batches(opened, part, sorted(set(rows.flatten().tolist()))):
        found = opened.ask(pixels, ("similarity_maps",)).similarity_maps[:, concept]
        for place, image, own in zip(places, pixels.cpu(), found, strict=True):
            images[place] = contact_sheets.thumbnail(image * deviation + mean)
            for index, column in (rows == place).nonzero().tolist():
                maps[index, column] = own[index]
    return Looks(maps, images)


def _batches(opened: Opened, part: Part, rows: list[int]) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield some images of a part, transformed as for a measurement, and their places."""
    source = part.source
    items = [source.items[row] for row in rows]
    some = FolderSource(items, source.augment, source.plain, source.workers)
    device = opened.accelerator.device
    for (pixels, _), places in some.ordered(opened.settings.eval.batch_size, device):
        yield pixels, places.tolist()


def _outside(
    part: Part, concept: int, rows: Tensor, maps: Tensor
) -> list[tuple[float | None, bool]]:
    """Of each prototype, how often it looks outside of the boxes, and whether it is suspected."""
    boxes = [[part.boxes[row] for row in own] for own in rows.tolist()]
    if not rows.numel():
        return [(None, False)] * len(rows)
    rates = out_of_box_rates(maps, torch.full((len(rows),), concept), boxes)
    boxed = [sum(any(box[0] == concept for box in image) for image in own) for own in boxes]
    return [
        (None, False)
        if rate is None
        else (round(rate, 9), rate > _SUSPECT and count >= _ENOUGH)  # 1 - 0.8 is not quite 0.2
        for rate, count in zip(rates, boxed, strict=True)
    ]


def _exemplars(part: Part, found: Nearest, maps: Tensor, index: int) -> list[dict[str, Any]]:
    return [
        {
            "image_id": part.image_ids[row],
            "row": row,
            "similarity": similarity,
            "box": peak_box(one),
        }
        for row, similarity, one in zip(
            found.rows[index].tolist(), found.similarities[index].tolist(), maps[index], strict=True
        )
    ]


def peak_box(own: Tensor) -> list[float]:
    """Left, top, right and bottom of the highest cell of a map (H, W), as shares of the image."""
    height, width = own.shape
    row, column = divmod(int(own.argmax()), width)
    return [column / width, row / height, (column + 1) / width, (row + 1) / height]


def _reliance(opened: Opened) -> list[list[float | None]]:
    """Ask for the scores of the validation images once; None before there is a verdict."""
    sizes = (opened.model.num_concepts, opened.model.num_prototypes)
    if opened.facts.get("stage") == "prototype":
        return [[None] * sizes[1]] * sizes[0]
    part = opened.data.val
    scores = opened.outputs(part, ("similarity_scores",)).similarity_scores
    limits = opened.thresholds("targets") if opened.multilabel else None
    return reliance(scores, part.targets, opened.head, 0.5 if limits is None else limits)


def reliance(
    scores: Tensor, labels: Tensor, head: Head, thresholds: Tensor | float = 0.5
) -> list[list[float | None]]:
    """How much macro-F1 is lost without what each prototype contributes, (K, M).

    Args:
        scores: (N, K, M).
        labels: (N, C) in 0 to 1, or (N,) classes.
        head: of the task; what it does not keep has nothing to lose.
        thresholds: (C,) probabilities above which the answer is yes.
    """
    _, concepts, prototypes = scores.shape
    kept = torch.ones(concepts, prototypes, dtype=torch.bool) if head.kept is None else head.kept
    before = contributions(scores, *head).logits

    def lost(concept: int, index: int) -> float | None:
        fewer = kept.clone()
        fewer[concept, index] = False
        after = contributions(scores, *head._replace(kept=fewer)).logits
        change = compare(before, after, labels, thresholds)["f1_macro"]["change"]
        return None if change is None else 0.0 - change

    return [[lost(concept, index) for index in range(prototypes)] for concept in range(concepts)]


def _tell(opened: Opened, rows: Sequence[dict[str, Any]]) -> None:
    log.info("contact sheets: %s", opened.folder / "figures" / "atlas_*.png")
    log.info("which prototypes may stay: %s", opened.folder / _CURATION)
    suspects = [f"{row['concept']} {row['index']}" for row in rows if row["suspect"]]
    if suspects:
        more = " …" if len(suspects) > _NAMED else ""
        log.warning(
            "%d prototypes look outside of the boxes of their concept, shortcuts perhaps: %s%s",
            len(suspects),
            ", ".join(suspects[:_NAMED]),
            more,
        )


def _table(rows: Sequence[dict[str, Any]]) -> "Table":
    shown: list[list[object]] = [
        [
            row["concept"],
            row["index"],
            row["hits"],
            row["reliance"],
            row["out_of_box"],
            "shortcut?" if row["suspect"] else "",
        ]
        for row in rows
    ]
    columns = ("concept", "prototype", "hits", "reliance", "out of box", "")
    return console.table(columns, shown, f"{len(rows)} prototypes")
