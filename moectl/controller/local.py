"""Questions from files of this disk: one JSON object a line, and images beside them."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from moectl.controller.samples import CAPTION, Pool, Sample, shuffled
from moectl.controller.scores import Metric
from moectl.engine.errors import UserError
from moectl.engine.files import read_text
from moectl.engine.images import read_image

_METRICS = get_args(Metric)
_ANSWERS = ("answers", "answer", "captions", "caption")
_PEOPLE = 10
_FORM = 'a line is {"id": 1, "image": "a.png", "question": "What?", "answers": ["this"]}'


def jsonl(file: Path | None, root: Path, seed: int) -> Pool:
    """Read a file of questions.

    Args:
        file: one object a line, with id, image, question, answers (or captions) and, if it is not
            `vqa`, the metric.
        root: folder of the images.
        seed: of the order.

    Raises:
        UserError: naming file, line and what is wrong there.
    """
    if file is None:
        raise UserError("data.dataset = jsonl needs data.file", "--data questions.jsonl")
    samples = shuffled(_samples(file, root, "jsonl"), seed, "data", "jsonl")
    return lambda _: iter(samples)


def easy_vqa(root: Path, seed: int) -> Pool:
    """Read a folder with train.jsonl, test.jsonl and their images.

    Raises:
        UserError: naming file, line and what is wrong there; or an image that is in both files.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder", "--data-dir names the folder of easy_vqa")
    parts = {
        part: _samples(root / f"{part}.jsonl", root, f"easy_vqa/{part}")
        for part in ("train", "test")
    }
    images = [{sample.image_id for sample in part} for part in parts.values()]
    if shared := sorted(images[0] & images[1]):
        raise UserError(
            f"{root}: {shared[0].removeprefix('file/')} is in train.jsonl and in test.jsonl:"
            " expected images that are held out"
        )
    order = {
        part: shuffled(samples, seed, "data", "easy_vqa", part) for part, samples in parts.items()
    }
    return lambda role: iter(order["train" if role == "train" else "test"])


def _samples(file: Path, root: Path, name: str) -> list[Sample]:
    """Read all lines; `name` goes before their ids."""
    found: dict[str, tuple[int, Sample]] = {}
    there: set[str] = set()  # images that were looked for already: there are fewer than lines
    for number, line in _lines(file):
        try:
            sample = _sample(line, root, name)
            if sample.id in found:
                raise ValueError(f"the id of line {found[sample.id][0]} again")
            if sample.image_id not in there:
                _look_for(root / sample.image_id.removeprefix("file/"))
                there.add(sample.image_id)
        except ValueError as error:
            raise UserError(f"{file}: line {number}: {error}", _FORM) from None
        found[sample.id] = (number, sample)
    return [sample for _, sample in found.values()]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers from 1."""
    text = read_text(file, _FORM)
    # Not `splitlines`: JSON allows other line separators within a text.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _sample(line: str, root: Path, name: str) -> Sample:
    """Make a question of a line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{_quoted(row)}: expected an object")
    key, answers = _answers(row)
    metric = row.get("metric", _metric(key, answers))
    if metric not in _METRICS:
        raise ValueError(f"metric = {_quoted(metric)}: expected {', '.join(_METRICS)}")
    if metric == "caption" and "question" not in row:
        row["question"] = CAPTION
    image = Path(_text(row, "image"))
    if image.is_absolute() or ".." in image.parts:
        raise ValueError(f"image = {_quoted(row['image'])}: expected a path within {root}")
    return Sample(
        id=f"{name}/{_identity(row)}",
        image_id=f"file/{image.as_posix()}",
        question=_text(row, "question"),
        answers=answers,
        dataset="coco_caption" if metric == "caption" else "vqa",
        metric=metric,
        open=partial(read_image, root / image),
    )


def _answers(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the key of the answers, and them."""
    key = next((key for key in _ANSWERS if key in row), None)
    if key is None:
        raise ValueError("no answers (or captions)")
    given = row[key] if isinstance(row[key], list) else [row[key]]
    if not all(isinstance(one, str) for one in given):
        raise ValueError(f"{key} = {_quoted(row[key])}: expected a text, or a list of texts")
    if not any(one.strip() for one in given):
        raise ValueError(f"{key} is empty")
    return key, tuple(given)


def _metric(key: str, answers: tuple[str, ...]) -> Metric:
    """Choose the metric of a line that names none.

    That of VQA counts how many of ten people agree, or takes one answer for all of theirs; of
    any other number each is taken as right.
    """
    if key.startswith("caption"):
        return "caption"
    return "vqa" if len(answers) in (1, _PEOPLE) else "exact"


def _identity(row: dict[str, Any]) -> str:
    key = "question_id" if "id" not in row and "question_id" in row else "id"
    if isinstance(row.get(key), int) and not isinstance(row[key], bool):
        return str(row[key])
    return _text(row, key)


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key} = {_quoted(row[key])}: expected a text")
    return row[key]


def _look_for(path: Path) -> None:
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such image")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _quoted(value: Any) -> str:
    """Return a value as JSON, short enough for a sentence."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
