"""Saying why: what a network sees in an image, and what each concept adds to its verdict.

Letters: B batch, K concepts, M prototypes per concept, C classes, H W feature grid.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moectl.csr.atlas import peak_box, read_atlas
from moectl.csr.dicom import is_dicom, need_pydicom
from moectl.csr.edits import Contributions, Head, Norm, contributions, margins
from moectl.csr.images import SUFFIXES
from moectl.csr.inference import Opened, open_network
from moectl.csr.model import Need, Output
from moectl.csr.panel import draw_panel, panel_path, thumbnail
from moectl.engine.command import Request
from moectl.engine.console import progress
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.files import is_file, is_folder

log = logging.getLogger(__name__)

REVIEW = 0.3
"""Margin below which a person should look. Source: Huy et al. 2025."""
_NEEDS: tuple[Need, ...] = ("concept_logits", "similarity_maps", "similarity_scores", "logits")
_HELD = 256  # training images kept in memory for panels, small ones

Exemplars = dict[tuple[str, int], dict[str, Any]]
Draw = Callable[[dict[str, Any], Any, Tensor], None]
"""Draws a panel from a row, an image and its similarity maps (K, M, H, W)."""


@dataclass(frozen=True)
class Choice:
    """What is to be explained, and how."""

    images: tuple[Path, ...] = ()
    """Files, and folders with all below."""
    ids: tuple[str, ...] = ()
    """Images of the run's own data."""
    split: Literal["train", "val", "test"] = "test"
    """Where the ids are."""
    top_k: int = 5
    """Concepts that are described."""
    threshold: float | None = None
    """Of the targets; None takes those of the weights."""
    panel: Path | None = None
    """Folder for a picture of each image."""


@dataclass(frozen=True)
class Known:
    """What is known about a network, apart from its answers."""

    concepts: list[str]
    targets: list[str]
    multilabel: bool
    head: Head
    """In float64."""
    concept_thresholds: Tensor
    """(K,) probabilities above which a concept is present."""
    target_thresholds: Tensor
    """(C,) the same of targets, where an image may have several."""
    exemplars: Exemplars
    """The most similar training image of a concept's prototype."""
    top_k: int


class _Item(NamedTuple):
    name: str
    read: Callable[[], Any]


def run_explain(request: Request, choice: Choice) -> tuple[dict[str, Any], int]:
    """Explain images, a batch at a time, and draw a panel of each if there is a folder for them.

    Returns:
        The JSON document, with a row for every image as `explain` gives it; and the number of
        images that could not be read.

    Raises:
        UserError: if there is nothing to explain, or the network has no verdict.
    """
    if not (choice.images or choice.ids):
        raise UserError(
            "nothing to explain", "give image files or folders, or --id of images of the run's data"
        )
    files = _files(choice.images)
    opened = open_network(request, verdict=True)
    _check(opened, choice)
    items = [_Item(str(path), partial(opened.read, path)) for path in files]
    items += _of_data(opened, choice)
    known = what_is_known(opened, choice.top_k, choice.threshold)
    draw = _panels(opened, known, choice.panel) if choice.panel else None
    rows: list[dict[str, Any]] = []
    size = opened.settings.eval.batch_size
    with progress(len(items)) as line:
        for start in range(0, len(items), size):
            rows += _explained(opened, known, items[start : start + size], draw)
            line.update(min(start + size, len(items)), "images")
    document = {"folder": str(opened.folder), "weights": opened.weights, "images": rows}
    return document, len(items) - len(rows)


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """Write a line of JSON for every row."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _files(places: Sequence[Path]) -> list[Path]:
    """Return the image files at places, each once; those of a folder are sorted."""
    found: dict[Path, None] = {}
    for place in places:
        if not is_folder(place):
            if not is_file(place):
                raise UserError(f"{place}: no such image or folder")
            found[place] = None
            continue
        inside = [path for path in sorted(place.rglob("*")) if _is_image(path)]
        if not inside:
            raise UserError(f"{place}: no image in it ({', '.join(filter(None, SUFFIXES))})")
        found |= dict.fromkeys(inside)
    for path in filter(is_dicom, found):
        need_pydicom(path)  # one sentence now, not one for each image
        break
    return list(found)


def _is_image(path: Path) -> bool:
    known = path.suffix.lower() in SUFFIXES[:-1]
    return not path.name.startswith(".") and path.is_file() and (known or is_dicom(path))


def _check(opened: Opened, choice: Choice) -> None:
    if choice.threshold is not None and not opened.multilabel:
        raise UserError(
            f"--threshold {choice.threshold:g}: images of this run have one target each, the most"
            " probable"
        )


def _of_data(opened: Opened, choice: Choice) -> list[_Item]:
    """Return images of the run's own data; it is not touched without ids."""
    if not choice.ids:
        return []
    part = opened.part(choice.split)
    places = {name: place for place, name in enumerate(part.image_ids)}
    for name in choice.ids:
        if name not in places:
            raise UserError(
                f"--id {name!r}: not among the {len(places)} {choice.split} images",
                f"they are called {', '.join(part.image_ids[:3])} …",
            )
    ids = dict.fromkeys(choice.ids)
    return [_Item(name, partial(part.pixels, places[name])) for name in ids]


def what_is_known(opened: Opened, top_k: int, threshold: float | None = None) -> Known:
    """Collect what explanations need of a network.

    Args:
        opened: the network.
        top_k: concepts that are described.
        threshold: of the targets; None takes the tuned ones, or a half.
    """
    head = opened.head
    norm = None if head.norm is None else Norm(*(table.double() for table in head.norm))
    targets = None if threshold is not None else opened.thresholds("targets")
    if targets is None:
        half = 0.5 if threshold is None else threshold
        targets = torch.full((len(opened.targets),), half, dtype=torch.float64)
    concepts = opened.thresholds("concepts")
    if concepts is None:
        concepts = torch.full((len(opened.concepts),), 0.5, dtype=torch.float64)
    return Known(
        concepts=opened.concepts,
        targets=opened.targets,
        multilabel=opened.multilabel,
        head=Head(head.weight.double(), head.bias.double(), norm, head.kept),
        concept_thresholds=concepts,
        target_thresholds=targets,
        exemplars=_exemplars(opened),
        top_k=top_k,
    )


def _exemplars(opened: Opened) -> Exemplars:
    atlas = read_atlas(opened.folder)
    if atlas is None:
        log.info("%s: no atlas, so no exemplars; moectl csr atlas makes it", opened.folder)
        return {}
    if atlas["weights"]["sha256"] != opened.weights["sha256"]:
        log.warning(
            "%s: its atlas is of %s, not of %s, so no exemplars; moectl csr atlas makes another",
            opened.folder,
            atlas["weights"]["file"],
            opened.weights["file"],
        )
        return {}
    return {
        (one["concept"], one["index"]): {
            name: one["exemplars"][0][name] for name in ("image_id", "similarity", "box")
        }
        for one in atlas["prototypes"]
        if one["exemplars"]
    }


def _explained(
    opened: Opened, known: Known, items: Sequence[_Item], draw: Draw | None
) -> list[dict[str, Any]]:
    """Explain one batch; images that cannot be read are left out with a warning."""
    images: dict[_Item, Tensor] = {}
    for item in items:
        try:
            images[item] = opened.transform(item.read())[0]
        except UserError as error:
            log.warning("%s", error.message)
    if not images:
        return []
    found = opened.ask(torch.stack([*images.values()]), _NEEDS)
    rows = explain(found, [item.name for item in images], known)
    if draw is not None:
        for item, row, maps in zip(images, rows, found.similarity_maps, strict=True):
            draw(row, item.read(), maps)  # read again: large images of a batch need not fit
    return rows


def explain(found: Output, names: Sequence[str], known: Known) -> list[dict[str, Any]]:
    """Explain what a network says about images.

    Args:
        found: with concept_logits, similarity_maps, similarity_scores and logits.
        names: of the B images.
        known: about the network.

    Returns:
        For each image, as plain JSON values: `image`, `prediction` (a target, or a list of those
        above their thresholds), `probabilities`, `logits`, `bias` and `contributions`, which add
        up to the logits, by target; `margin` and `needs_review`; and `concepts`, the most similar
        first, each with `name probability present similarity prototype peak contributions
        exemplar`. Similarity, prototype and peak are None if no prototype has a say.

    Raises:
        RunFailed: if the contributions do not add up to the network's logits.
    """
    parts = contributions(found.similarity_scores.double(), *known.head)
    logits = found.logits.double()
    if not torch.allclose(parts.logits, logits, rtol=1e-5, atol=1e-4):
        raise RunFailed("what the concepts contribute does not add up to what the network says")
    margin = margins(logits, multilabel=known.multilabel).tolist()
    rows = []
    for place, name in enumerate(names):
        probabilities = logits[place].sigmoid() if known.multilabel else logits[place].softmax(0)
        rows.append(
            {
                "image": name,
                "prediction": _prediction(probabilities, known),
                "probabilities": _named(known.targets, probabilities),
                "margin": margin[place],
                "needs_review": margin[place] < REVIEW,
                "concepts": _concepts(found, parts, place, known),
                "logits": _named(known.targets, logits[place]),
                "bias": _named(known.targets, parts.bias),
                "contributions": {
                    target: _named(known.concepts, values)
                    for target, values in zip(known.targets, parts.values[place], strict=True)
                },
            }
        )
    return rows


def _named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _prediction(probabilities: Tensor, known: Known) -> str | list[str]:
    if not known.multilabel:
        return known.targets[int(probabilities.argmax())]
    above = (probabilities > known.target_thresholds).tolist()
    return [target for target, yes in zip(known.targets, above, strict=True) if yes]


def _concepts(
    found: Output, parts: Contributions, place: int, known: Known
) -> list[dict[str, Any]]:
    """Describe the most similar concepts of one image."""
    scores = found.similarity_scores[place]
    if known.head.kept is not None:
        scores = scores.masked_fill(~known.head.kept, -torch.inf)
    similarities, winners = scores.max(1)
    probabilities = found.concept_logits[place].double().sigmoid()
    described = []
    for concept in similarities.argsort(descending=True, stable=True)[: known.top_k].tolist():
        name, winner = known.concepts[concept], int(winners[concept])
        says = bool(similarities[concept].isfinite())
        described.append(
            {
                "name": name,
                "probability": probabilities[concept].item(),
                "present": bool(probabilities[concept] > known.concept_thresholds[concept]),
                "similarity": similarities[concept].item() if says else None,
                "prototype": winner if says else None,
                "peak": peak_box(found.similarity_maps[place, concept, winner]) if says else None,
                "contributions": _named(known.targets, parts.values[place, :, concept]),
                "exemplar": known.exemplars.get((name, winner)) if says else None,
            }
        )
    return described


def _panels(opened: Opened, known: Known, folder: Path) -> Draw | None:
    """Make the function that draws an image's panel, and its folder."""
    if not opened.accelerator.is_main_process:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--panel {folder}: no folder for pictures ({error.strerror})") from None
    training_image = _gallery(opened) if known.exemplars else None
    places = {name: place for place, name in enumerate(known.concepts)}

    def draw(row: dict[str, Any], pixels: Any, maps: Tensor) -> None:
        shown = [one for one in row["concepts"] if one["prototype"] is not None]
        row["panel"] = str(panel_path(folder, row["image"]))
        draw_panel(
            Path(row["panel"]),
            row,
            thumbnail(pixels),
            [maps[places[one["name"]], one["prototype"]] for one in shown],
            training_image,
        )

    return draw


def _gallery(opened: Opened) -> Callable[[str], Any] | None:
    """Return what finds a small training image by its id; None if there are none."""
    try:
        train = opened.part("train")
    except UserError as error:
        log.warning("panels are drawn without training images: %s", error.message)
        return None
    places = {name: place for place, name in enumerate(train.image_ids)}

    @lru_cache(maxsize=_HELD)
    def find(image_id: str) -> Any:
        try:
            return thumbnail(train.pixels(places[image_id]))
        except (KeyError, UserError) as error:
            log.warning("no training image %s to show: %s", image_id, error)
            return None

    return find
