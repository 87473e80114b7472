"""The data files of a task: written, and counted."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine import console
from moectl.engine.errors import UserError
from moectl.taskmoe.build import build_task_a, build_task_b
from moectl.taskmoe.settings import DataSection

if TYPE_CHECKING:
    from rich.table import Table


def build(
    section: DataSection, cifar: Path | None, imagenet: Path | None
) -> tuple[dict[str, Any], str]:
    """Write the files of task A or B into `data.root`.

    Args:
        section: which task, and where to.
        cifar: folder with the `cifar-100-python` of CIFAR-100; `data.root` if None.
        imagenet: folder with ImageNet's `train` and `val`.

    Returns:
        The manifest's path, as a document and as text.

    Raises:
        UserError: if the task is another one, its source is not there, or its files are.
    """
    folder = section.root / f"Task{section.task}"
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty", "move it away to build the files anew")
    match section.task:
        case "A":
            path = build_task_a(cifar or section.root, section.root)
        case "B" if imagenet:
            path = build_task_b(imagenet, section.root)
        case "B":
            raise UserError("task B is made from ImageNet", "name its folder with --imagenet DIR")
        case task:
            raise UserError(
                f"data.task is {task!r}: files are built for A and B",
                "a task of your own is a manifest.toml beside its files; digits need none",
            )
    return {"manifest": str(path)}, str(path)


def check(section: DataSection) -> "tuple[dict[str, Any], list[Table]]":
    """Count the images, classes, owners and repeats of a task.

    Returns:
        The JSON document, and tables of the classes and of the whole.
    """
    from moectl.taskmoe import data

    document = data.check(section)
    rows = [_row(document, name) for name in document["classes"]]
    columns = ("class", "id", "label", *document["specialists"])
    title = f"Task {document['task']}: training / test images"
    return document, [console.table(columns, rows, title), _whole(document)]


def _row(document: Mapping[str, Any], name: str) -> list[object]:
    known = document["classes"][name]
    counts = []
    for parts in document["specialists"].values():
        found = [parts[part].get(name) for part in ("train", "test")]
        counts.append(None if found[0] is None else f"{found[0]} / {found[1]}")
    return [name, known["id"], known["label"], *counts]


def _whole(document: Mapping[str, Any]) -> "Table":
    kept = f"kept with dedup = {document['dedup']}"
    counts = {
        kept: "images",
        "left out": "dropped",
        "left out, equal to none that is kept": "unmatched",
        "repeated in the files": "duplicates",
        "equal images under two labels": "conflicts",
    }
    rows: list[list[object]] = [
        [words, document[key]["train"], document[key]["test"]] for words, key in counts.items()
    ]
    rows.append(["also among the training images", None, document["leakage"]])
    mean, std = (", ".join(f"{x:.4f}" for x in document[key]) for key in ("mean", "std"))
    rows += [["mean of each colour", mean, None], ["standard deviation", std, None]]
    return console.table(("images", "training", "test"), rows)
