"""Correcting what a network sees in images, and what becomes of the verdict.

Letters: K concepts, M prototypes per concept, C classes, H W feature grid.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moectl.csr.edit_list import Edit, apply_edit, parse_edit, parse_edits
from moectl.csr.edits import Contributions, Head, Statistics, contributions, margins
from moectl.csr.inference import Opened, open_network
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import read_json
from moectl.engine.settings import nearest
from moectl.engine.toml import read_toml

CHANGES = ("reject", "confirm", "set", "positive", "negative")
"""Fields of an edit without which it changes nothing."""
_SMALL = 1e-6  # a contribution that differs by less has not changed
_HELP = "--reject, --confirm, --set-concept, --positive, --negative, or a list with --edits FILE"


class Choice(NamedTuple):
    """Which images, and what is changed."""

    images: Sequence[Path] = ()
    split: str = ""
    ids: Sequence[str] = ()
    flags: Mapping[str, Any] | None = None
    """One edit for all images, see `edit_table`."""
    edits: Path | None = None
    """A file with a list of edits."""


class Judge(NamedTuple):
    """What turns scores into a verdict."""

    head: Head
    known: Statistics | None
    concepts: Sequence[str]
    targets: Sequence[str]
    thresholds: Tensor | None
    """(C,) probabilities above which the answer is yes; None with one class per image."""


class _Photo(NamedTuple):
    name: str
    key: str
    """What an edit has to name."""
    read: Callable[[], Tensor]


class _Given(NamedTuple):
    table: Mapping[str, Any]
    edit: Edit
    place: str
    """What messages call it."""


def edit_table(**flags: Any) -> dict[str, Any]:
    """Turn options into an edit as people write it; what was not given is left out.

    Args:
        flags: fields of an edit; of `set` a list of NAME=VALUE, of boxes lists of x0,y0,x1,y1.

    Raises:
        UserError: if a concept is set twice or without a value.
    """
    table = {name: value for name, value in flags.items() if value not in (None, [], ())}
    for name in ("positive", "negative"):
        if name in table:
            table[name] = [[_number(part) for part in box.split(",")] for box in table[name]]
    if "set" in table:
        values: dict[str, Any] = {}
        for text in table["set"]:
            name, equals, value = text.rpartition("=")
            if not equals or name in values:
                raise UserError(f"--set-concept {text!r}: expected NAME=VALUE, each name once")
            values[name] = _number(value)
        table["set"] = values
    return table


def _number(text: str) -> float | str:
    """Read a number, or leave the text for the check that names the field."""
    try:
        return float(text)
    except ValueError:
        return text


def judge_of(opened: Opened) -> Judge:
    """Take the head of a network with its statistics and names."""
    thresholds = None
    if opened.multilabel:
        thresholds = opened.thresholds("targets")
        if thresholds is None:
            thresholds = torch.full((len(opened.targets),), 0.5)
    return Judge(opened.head, opened.known, opened.concepts, opened.targets, thresholds)


def run_intervene(request: Request, choice: Choice) -> list[dict[str, Any]]:
    """Edit images, and judge them before and after.

    Returns:
        A row for each edit of each image, in the order of the images: `image`, the `edit` as it was
        given, `before` and `after` with `probabilities prediction margin`, the contributions that
        `changed`, target by target and concept by concept, and whether the prediction `flipped`.

    Raises:
        UserError: naming what cannot be edited or read.
    """
    if choice.flags and choice.edits:
        raise UserError(
            f"--{next(iter(choice.flags))} and --edits exclude each other",
            f"write the edit into {choice.edits}",
        )
    if not choice.edits and not set(CHANGES) & set(choice.flags or {}):
        raise UserError("nothing to change", _HELP)
    opened = open_network(request, verdict=True)
    judge = judge_of(opened)
    given = _given(choice, opened.concepts)
    for one in given:
        _refuse_unknown(one, judge, opened)
    plan = _planned(_photos(opened, choice), given, choice)
    rows: list[dict[str, Any]] = []
    size = opened.settings.eval.batch_size
    for start in range(0, len(plan), size):
        rows += _edited(opened, judge, plan[start : start + size])
    return rows


def _given(choice: Choice, concepts: Sequence[str]) -> list[_Given]:
    try:
        if choice.edits is None:
            table = dict(choice.flags or {})
            return [_Given(table, parse_edit(table, concepts), "edit")]
        document = _document(choice.edits)
        edits = parse_edits(document, concepts)
    except ValueError as error:
        raise UserError(f"{choice.edits}: {error}" if choice.edits else str(error)) from None
    places = (f"{choice.edits}: edits[{number}]" for number in range(len(edits)))
    return [_Given(*one) for one in zip(document["edits"], edits, places, strict=True)]


def _document(path: Path) -> Any:
    match path.suffix.lower():
        case ".toml":
            return read_toml(path)
        case ".json":
            return read_json(path)
    raise UserError(f"{path}: expected a list of edits in a .toml or .json file")


def _refuse_unknown(given: _Given, judge: Judge, opened: Opened) -> None:
    """Refuse what needs scores of training images that were not measured, or do not exist."""
    edit, known, place = given.edit, judge.known, given.place
    mode = edit.mode or ("zero" if known is None else "absent-median")
    fitted = mode not in ("zero", "drop")
    if known is None:
        if edit.confirm or (edit.reject and fitted):
            what = "confirm" if edit.confirm else f"mode {mode}"
            raise UserError(
                f"{place}: {what} needs the scores of training images, which"
                f" {opened.folder / opened.weights['file']} does not know",
                "stage 3 measures them; reject by zero or drop does without",
            )
        return
    for verb, named, table in (
        ("reject", edit.reject if fitted else (), known.absent_mean),
        ("confirm", edit.confirm, known.present_median),
    ):
        for concept in named:
            if table[concept].isnan().any():
                which = "without" if verb == "reject" else "with"
                raise UserError(
                    f"{place}.{verb}: no training image was {which} {judge.concepts[concept]!r},"
                    " so nobody knows how it scores then",
                    "reject by zero or drop, or set its score",
                )


def _photos(opened: Opened, choice: Choice) -> list[_Photo]:
    if choice.images and (choice.split or choice.ids):
        raise UserError("images and --split or --id exclude each other")
    if choice.images:
        paths = dict.fromkeys(choice.images)
        return [_Photo(str(path), _key(path), partial(opened.read, path)) for path in paths]
    if not choice.split and not choice.ids:
        raise UserError("no image given", "name files, or take images by --split test --id ID")
    split = choice.split or "test"
    part = opened.part(split)
    places = {name: place for place, name in enumerate(part.image_ids)}
    wanted = dict.fromkeys(choice.ids or part.image_ids)
    for name in wanted:
        if name not in places:
            raise UserError(
                f"--id {name}: not one of the {len(places)} images of {split}"
                f"{nearest(name, part.image_ids)}"
            )
    return [_Photo(name, name, partial(part.pixels, places[name])) for name in wanted]


def _key(path: Path | str) -> str:
    return str(Path(path).resolve())


def _planned(
    photos: Sequence[_Photo], given: Sequence[_Given], choice: Choice
) -> list[tuple[_Photo, list[_Given]]]:
    """Deal out the edits; images without any are left out."""
    edits: dict[str, list[_Given]] = {photo.key: [] for photo in photos}
    for one in given:
        image = one.edit.image
        key = _key(image) if image and choice.images else image
        if key and key not in edits:
            raise UserError(
                f"{one.place}.image: {image!r}, expected one of the {len(photos)} images given"
                f"{nearest(image, [photo.name for photo in photos])}"
            )
        for name in [key] if key else edits:
            edits[name].append(one)
    return [(photo, edits[photo.key]) for photo in photos if edits[photo.key]]


def _edited(
    opened: Opened, judge: Judge, batch: Sequence[tuple[_Photo, list[_Given]]]
) -> list[dict[str, Any]]:
    images, sizes = [], []
    for photo, _ in batch:
        pixels = photo.read()
        sizes.append((pixels.shape[1], pixels.shape[2]))
        images.append(opened.transform(pixels)[0])
    maps = opened.ask(torch.stack(images), ("similarity_maps",)).similarity_maps
    rows = []
    for (photo, given), own, size in zip(batch, maps, sizes, strict=True):
        for one in given:
            try:
                found = compared(judge, own, one.edit, size)
            except ValueError as error:
                raise UserError(f"{one.place}: {photo.name}: {error}") from None
            rows.append({"image": photo.name, "edit": one.table, **found})
    return rows


def compared(
    judge: Judge, maps: Tensor, edit: Edit, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Judge an image before and after an edit, as plain JSON values.

    Args:
        judge: of the verdict.
        maps: (K, M, H, W) similarities of the image.
        edit: whichever image it names.
        size: height and width of the original image; only boxes in pixels need it.

    Returns:
        `before after changed flipped`, see `run_intervene`.

    Raises:
        ValueError: if the edit does not fit the image, or needs unknown statistics.
    """
    edited = apply_edit(edit, maps[None], judge.known, judge.head.neutral, size)
    before = contributions(maps[None].amax((3, 4)), *judge.head)
    after = contributions(edited, *judge.head)
    first, second = verdict(judge, before.logits), verdict(judge, after.logits)
    return {
        "before": first,
        "after": second,
        "changed": _changed(judge, before, after),
        "flipped": first["prediction"] != second["prediction"],
    }


def verdict(judge: Judge, logits: Tensor) -> dict[str, Any]:
    """Say what the logits (1, C) of one image mean: `probabilities prediction margin`.

    The prediction is a target or, where an image may have several, the list of those above their
    thresholds.
    """
    logits = logits.double()
    if judge.thresholds is None:
        chances = logits[0].softmax(0)
        prediction: Any = judge.targets[int(chances.argmax())]
    else:
        chances = logits[0].sigmoid()
        answers = (chances > judge.thresholds).tolist()
        prediction = [name for name, yes in zip(judge.targets, answers, strict=True) if yes]
    return {
        "probabilities": dict(zip(judge.targets, chances.tolist(), strict=True)),
        "prediction": prediction,
        "margin": margins(logits, multilabel=judge.thresholds is not None).item(),
    }


def _changed(
    judge: Judge, before: Contributions, after: Contributions
) -> dict[str, dict[str, list[float]]]:
    pairs = torch.stack([before.values[0], after.values[0]], 2)  # (C, K, 2)
    differ = (pairs[..., 1] - pairs[..., 0]).abs() > _SMALL
    found: dict[str, dict[str, list[float]]] = {}
    for target, concept in differ.nonzero().tolist():
        table = found.setdefault(judge.targets[target], {})
        table[judge.concepts[concept]] = pairs[target, concept].tolist()
    return found


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """Write a line of JSON for every row."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
