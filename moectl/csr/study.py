"""What corrections would bring, with the true labels in the place of a person.

How to reject, and below which margin to ask, is chosen on validation images alone.

Letters: N images, B batch, K concepts, M prototypes per concept, C classes, H W feature grid.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moectl.csr.data import Part
from moectl.csr.edit_list import ALPHA
from moectl.csr.edits import MODES, Head, Mode, Statistics, contributions, edited_scores, importance
from moectl.csr.inference import Opened, open_network
from moectl.csr.losses import Box
from moectl.csr.oracle import Cases, Order, compare, curve, oracle
from moectl.csr.report import report_again
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import write_json

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

MARGINS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)
"""Thresholds to choose from; no margin reaches the last, which asks about every image."""
ORDERS: tuple[Order, ...] = get_args(Order)
SEEDS = 5
"""Random orders that are averaged."""
_PUBLISHED: tuple[Mode, float] = ("zero", 0.3)  # Source: Huy et al. 2025
_DEFAULT: tuple[Mode, float] = ("absent-median", 0.3)


class Asked(NamedTuple):
    """What is studied."""

    head: Head
    known: Statistics
    order: Order = "similarity"
    modes: Sequence[Mode] = MODES


def run_study(
    request: Request, split: Literal["test", "val"], mode: Mode | None, order: Order
) -> tuple[dict[str, Any], "Table"]:
    """Study corrections of the test or validation images, and write `evals/SPLIT@TAG-oracle/`.

    Args:
        request: the run.
        split: what is measured; what is chosen is chosen on validation images.
        mode: how to reject, if that is not to be chosen.
        order: which concept a person is asked about first.

    Returns:
        The JSON document, and a table of the results.

    Raises:
        UserError: if the weights come without the scores of training images.
    """
    opened = open_network(request, verdict=True)
    known = opened.known
    if known is None:
        raise UserError(
            f"{opened.folder / opened.weights['file']}: comes without the scores of training"
            " images, which a study needs",
            "stage 3 measures them",
        )
    if split == "val":
        log.warning("the margin is chosen on the very images that are measured")
    asked = Asked(opened.head, known, order, [mode] if mode else MODES)
    held = cases_of(opened, opened.part("val"))
    part = opened.part(split)
    cases = held if split == "val" else cases_of(opened, part)
    document = {
        "split": split,
        "images": len(cases.scores),
        "weights": opened.weights,
        **study(asked, held, cases),
        "boxes": box_study(opened, part, cases, asked.head) if any(part.boxes) else None,
    }
    folder = opened.folder / "evals" / f"{split}@{opened.tag}-oracle"
    if opened.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", document)
        draw(folder / "study.png", document["curves"])
        report_again(opened.folder)
    return {"folder": str(folder), **document}, _table(document)


def cases_of(opened: Opened, part: Part) -> Cases:
    """Ask a network about the images of a part."""
    found = opened.outputs(part, ("concept_logits", "similarity_scores"))
    thresholds = opened.thresholds("targets") if opened.multilabel else None
    return Cases(
        found.similarity_scores,
        part.concepts,
        part.targets,
        found.concept_logits,
        0.5 if thresholds is None else thresholds,
    )


def study(asked: Asked, held: Cases, cases: Cases) -> dict[str, Any]:
    """Choose on validation images, then measure on others, as plain JSON values.

    Args:
        asked: the model and the order.
        held: the validation images.
        cases: the images to measure.

    Returns:
        `validation`: the `candidates` and the `chosen` one; `results` of the chosen one, the
        published one and the default, each with its `name`; and the `curves` of every order.
    """
    candidates = [
        oracle(held, asked.head, asked.known, mode=mode, margin=margin, order=asked.order)
        for mode in asked.modes
        for margin in MARGINS
    ]
    chosen = best(candidates)
    measured = {
        "chosen": (chosen["mode"], chosen["margin"]),
        "published": _PUBLISHED,
        "default": _DEFAULT,
    }
    return {
        "validation": {"images": len(held.scores), "candidates": candidates, "chosen": chosen},
        "results": [
            {
                "name": name,
                **oracle(
                    cases, asked.head, asked.known, mode=mode, margin=margin, order=asked.order
                ),
            }
            for name, (mode, margin) in measured.items()
        ],
        "curves": {order: _curve(asked, cases, order, chosen["mode"]) for order in ORDERS},
    }


def best(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the candidate with the largest net.

    Of equal ones it is the one that raises the probability of what is true most, then the one that
    asks least.
    """
    return max(
        candidates,
        key=lambda one: (one["net"], one["true_probability"]["change"], -one["asked"]),
    )


def _curve(asked: Asked, cases: Cases, order: Order, mode: Mode) -> list[dict[str, Any]]:
    seeds = range(SEEDS if order == "random" else 1)
    drawn = [
        curve(cases, asked.head, asked.known, order=order, mode=mode, seed=seed) for seed in seeds
    ]
    return [
        {name: _mean([point[name] for point in points]) for name in points[0]}
        for points in zip(*drawn, strict=True)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or the value itself where all are the same."""
    if len(set(values)) == 1:
        return values[0]
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def box_study(opened: Opened, part: Part, cases: Cases, head: Head) -> dict[str, Any] | None:
    """Let the network look into the true boxes of each present concept, and no further.

    Returns:
        As `compare`, with `images`, those that have such boxes, and `alpha`, the weight of a
        concept's cells outside of its boxes; None without any box.
    """
    drawn = true_boxes(part.boxes, cases.concepts)
    places = [place for place, boxes in enumerate(drawn) if boxes]
    if not places:
        return None
    before: list[Tensor] = []
    after: list[Tensor] = []
    for rows in _batches(places, opened.settings.eval.batch_size):
        images = torch.stack([opened.transform(part.pixels(place))[0] for place in rows])
        maps = opened.ask(images, ("similarity_maps",)).similarity_maps
        weights = box_maps([drawn[place] for place in rows], maps.shape[1], maps.shape[3:])
        for scores, kept in ((maps.amax((3, 4)), before), (edited_scores(maps, weights), after)):
            kept.append(contributions(scores, *head).logits)
    found = compare(torch.cat(before), torch.cat(after), cases.labels[places], cases.thresholds)
    return {"images": len(places), "alpha": ALPHA, **found}


def _batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def true_boxes(boxes: Sequence[Sequence[Box]], concepts: Tensor) -> list[list[Box]]:
    """Return the boxes of each image whose concept is present by its label, (N, K)."""
    present = (concepts >= 0.5).tolist()
    return [
        [box for box in drawn if there[box[0]]] for drawn, there in zip(boxes, present, strict=True)
    ]


def box_maps(
    boxes: Sequence[Sequence[Box]], num_concepts: int, grid: Sequence[int], alpha: float = ALPHA
) -> Tensor:
    """Weights of the cells for each concept of each image, (B, K, H, W).

    A concept is weighed by its own boxes as positive ones; without any it keeps its weight of 1.
    """
    height, width = grid
    weights = torch.ones(len(boxes), num_concepts, height, width)
    for image, drawn in enumerate(boxes):
        for concept in {box[0] for box in drawn}:
            own = [box[1:] for box in drawn if box[0] == concept]
            weights[image, concept] = importance(own, [], alpha, (height, width))
    return weights


def draw(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Draw macro-F1 over the number of corrected concepts, a line for each order, as PNG."""
    from matplotlib.ticker import MaxNLocator

    from moectl.engine.figure import PALETTE, new_axes, new_figure, write_png

    figure = new_figure(6.4, 4.2)
    axes = new_axes(
        figure,
        (1, 1, 1),
        title="",
        x_label="corrected concepts of each image",
        y_label="macro-F1",
        scale="percent",
    )
    for (order, points), color in zip(curves.items(), PALETTE, strict=False):
        name = f"{order}, mean of {SEEDS}" if order == "random" else order
        values = [float("nan") if one["f1_macro"] is None else one["f1_macro"] for one in points]
        line = "--" if order == "random" else "-"
        places = [one["corrected"] for one in points]
        axes.plot(places, values, line, marker=".", color=color, linewidth=1.6, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="order", title_fontsize=9, fontsize=9, frameon=False)
    write_png(figure, path)


def _table(document: dict[str, Any]) -> "Table":
    rows: list[list[object]] = []
    for found in document["results"]:
        name = f"{found['name']}: {found['mode']}, margin {found['margin']:g}"
        rows.append([name, found["asked"], *_cells(found)])
    if boxes := document["boxes"]:
        rows.append(["true boxes", boxes["images"], *_cells(boxes)])
    columns = (
        *("", "asked", "fixed", "broke", "net", "p", "F1 before", "after"),
        *("P(true) before", "after"),
    )
    held = document["validation"]["images"]
    title = f"{document['images']} images of {document['split']}, chosen on {held} of val"
    return console.table(columns, rows, title)


def _cells(found: dict[str, Any]) -> list[object]:
    pairs = (found[name] for name in ("f1_macro", "true_probability"))
    return [
        *(found[name] for name in ("fixed", "broke", "net", "p_value")),
        *(pair[when] for pair in pairs for when in ("before", "after")),
    ]
