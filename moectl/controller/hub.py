"""Questions from data sets of the hub: parquet files that hold texts and images.

Only files that are needed are fetched, one after another in the order of their names: the first
of them hold more questions than a run asks for, and a second seed fetches nothing new.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.controller.samples import CAPTION, Pool, Role, Sample, shuffled
from moectl.engine.errors import UserError
from moectl.engine.images import readable
from moectl.engine.launch import offline

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SOURCES = {
    "text_vqa": "lmms-lab/textvqa",
    "coco_2014_vqa": "lmms-lab/VQAv2",
    "okvqa": "lmms-lab/OK-VQA",
    "coco_caption": "lmms-lab/COCO-Caption",
}
"""Where the data sets are, unless the settings say otherwise."""

# Where a data set has nothing but a loading script, the hub keeps what that made, as parquet.
_REVISIONS = ("main", "refs/convert/parquet")
_TRAIN = re.compile(r"(?<![a-z])train")
_VAL = re.compile(r"(?<![a-z])val")
_TEST = re.compile(r"(?<![a-z])test")

_QUESTION_IDS = ("question_id", "id")
_IMAGE_IDS = ("image_id", "file_name")
_ANSWERS = ("answers", "answer", "captions", "caption")
_WITHIN = ("raw_answer", "answer", "caption")  # an answer of OK-VQA comes raw and stemmed
# Sets of one collection of images, with questions per image that an id of a question makes room
# for.
_COCO = {"coco_2014_vqa": 1000, "okvqa": 10, "coco_caption": 1}

Fetch = Callable[[str], Path]


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table hold what."""

    question: str
    """Empty if there is none and a caption is asked for."""
    question_id: str
    image_id: str
    answers: str


def pool(name: str, source: str, seed: int) -> Pool:
    """Find the files of a data set.

    Training questions come from its training files, all others from its validation files. If it
    has one kind only, all come from there.

    Args:
        name: one of `SOURCES`.
        source: name on the hub, or a folder that holds the same files.
        seed: of the order within a file.

    Raises:
        UserError: if there are none; saying where they belong.
    """
    files, fetch = _found(name, source)
    train, held = _parts(files)
    if not held:
        raise UserError(f"{name}: {source} has no files to train or validate on", _hint(source))

    def questions(role: Role) -> Iterator[Sample]:
        for file in train if role == "train" else held:
            yield from _questions(name, fetch(file), seed)

    return questions


def _found(name: str, source: str) -> tuple[list[str], Fetch]:
    """Return the files of a data set, and what makes one of them a path."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _in(folder)
    from huggingface_hub import constants

    problems = []
    ways = [_kept] if offline() or constants.HF_HUB_OFFLINE else [_on_hub, _kept]
    for way in ways:
        try:
            found = way(source)
        except Exception as error:  # the library raises what its parts do
            problems.append(" ".join(str(error).split())[:200])
            continue
        if problems:
            log.warning("%s: reading what was fetched before (%s)", source, problems[0])
        return found
    forbidden = ", and MOECTL_OFFLINE forbids to fetch it" if offline() else ""
    raise UserError(
        f"{name}: {source} could not be found ({problems[0]}{forbidden})", _hint(source)
    )


def _hint(source: str) -> str:
    return (
        f"put its parquet files into the hub's cache, with `hf download {source} --repo-type"
        " dataset`, or into a folder that data.sources names"
    )


def _on_hub(source: str) -> tuple[list[str], Fetch]:
    from huggingface_hub import HfApi

    for revision in _REVISIONS:
        files = HfApi().list_repo_files(source, repo_type="dataset", revision=revision)
        if found := sorted(file for file in files if file.endswith(".parquet")):
            return found, partial(_fetch, source, revision)
    raise FileNotFoundError("it has no parquet files")


def _fetch(source: str, revision: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    if not isinstance(try_to_load_from_cache(source, file, **where), str):
        log.warning("fetching %s of %s from the hub", file, source)
    try:
        return Path(hf_hub_download(source, file, **where))
    except Exception as error:  # the library raises what its parts do
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: {file} was not fetched ({words})", _hint(source)) from None


def _kept(source: str) -> tuple[list[str], Fetch]:
    """Return the files that were fetched before."""
    from huggingface_hub import snapshot_download

    for revision in _REVISIONS:
        try:
            # With no patterns it does not ask for files that were never fetched.
            folder = snapshot_download(
                source,
                repo_type="dataset",
                revision=revision,
                local_files_only=True,
                allow_patterns=[],
            )
        except FileNotFoundError:
            continue
        if (found := _in(Path(folder)))[0]:
            return found
    raise FileNotFoundError("it was not fetched before")


def _in(folder: Path) -> tuple[list[str], Fetch]:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    return files, lambda file: folder / file


def _parts(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files to train on and those held out; the same if there is one kind only."""
    train, val = ([file for file in files if kind.search(file)] for kind in (_TRAIN, _VAL))
    # What is called a test has no answers.
    rest = [file for file in files if not _TEST.search(file)]
    return train or val or rest, val or train or rest


def _questions(name: str, path: Path, seed: int) -> Iterator[Sample]:
    """Return the questions of a file, shuffled."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    try:
        table = Dataset.from_parquet(str(path))
    except Exception as error:  # the library raises what its parts do
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no readable parquet file ({words})") from None
    columns = _columns(name, path, table.column_names)
    table = table.cast_column("image", ImageFeature())
    texts = table.remove_columns("image")
    for row in shuffled(range(len(table)), seed, "data", name, path.name):
        place = f"{path}: row {row}"
        yield _sample(name, place, columns, texts[row], partial(_open, table, row, place))


def _columns(name: str, path: Path, there: Sequence[str]) -> _Columns:
    def one_of(*names: str) -> str:
        found = next((name for name in names if name in there), None)
        if found is None:
            raise UserError(f"{path}: no column {' or '.join(names)}, it has {', '.join(there)}")
        return found

    one_of("image")
    images = (*_IMAGE_IDS, "question_id") if name in _COCO else _IMAGE_IDS
    return _Columns(
        question="" if name == "coco_caption" else one_of("question"),
        question_id=one_of(*_QUESTION_IDS),
        image_id=one_of(*images),
        answers=one_of(*_ANSWERS),
    )


def _sample(
    name: str,
    place: str,
    columns: _Columns,
    values: dict[str, Any],
    open_image: "Callable[[], Image]",
) -> Sample:
    def text(column: str) -> str:
        found = "" if values[column] is None else str(values[column])
        if not found.strip():
            raise UserError(f"{place}: no {column}")
        return found

    answers = tuple(_texts(values[columns.answers]))
    if not any(answer.strip() for answer in answers):
        raise UserError(f"{place}: no {columns.answers}")
    return Sample(
        id=f"{name}/{text(columns.question_id)}",
        image_id=_image_id(name, place, columns.image_id, text(columns.image_id)),
        question=text(columns.question) if columns.question else CAPTION,
        answers=answers,
        dataset=name,
        metric="caption" if name == "coco_caption" else "vqa",
        open=open_image,
    )


def _image_id(name: str, place: str, column: str, value: str) -> str:
    """Name an image; one of COCO by its number, which all sets know."""
    if name not in _COCO:
        return f"{name}/{value}"
    numbers = re.findall(r"\d+", value)  # 42, or COCO_val2014_000000000042.jpg
    if not numbers:
        raise UserError(f"{place}: {column} = {value}: expected the number of an image")
    return f"coco/{int(numbers[-1]) // (_COCO[name] if column == 'question_id' else 1)}"


def _texts(value: Any) -> Iterator[str]:
    """Find the answers in a text, a list of texts or of objects, or an object of lists."""
    if isinstance(value, dict):
        yield from _texts(next((value[key] for key in _WITHIN if key in value), None))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif value is not None:
        yield str(value)


def _open(table: Any, row: int, place: str) -> "Image":
    with readable(place):
        image = table[row]["image"]
        if image is None:
            raise ValueError("there is none")
        return image.convert("RGB")
