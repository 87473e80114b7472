"""Writing the data files of tasks A and B from CIFAR-100 and ImageNet.

Legend: N images.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moectl.engine.errors import UserError
from moectl.engine.files import is_file, is_folder
from moectl.engine.images import read_image
from moectl.taskmoe.files import write_data_file
from moectl.taskmoe.manifest import NAME, TASK_A, TASK_B, WORDNET, write_manifest

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_SOLUTION = "LOC_val_solution.csv"


def build_task_a(root: Path, out: Path) -> Path:
    """Write the files of task A.

    Args:
        root: folder that holds the `cifar-100-python` of CIFAR-100.
        out: folder to write TaskA into.

    Returns:
        The manifest beside them.

    Raises:
        UserError: if CIFAR-100 is not there.
    """
    import torch
    from torchvision import datasets

    folder = out / "TaskA"
    for part in ("train", "test"):
        try:
            found = datasets.CIFAR100(root, train=part == "train", download=False)
        except (OSError, RuntimeError):
            raise UserError(
                f"{root / datasets.CIFAR100.base_folder}: the files of CIFAR-100 are not there,"
                " or not the official ones",
                f"put the files of {datasets.CIFAR100.url} there",
            ) from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        for entry in TASK_A.specialists:
            known = {one.id for one in entry.classes}
            rows = [row for row, label in enumerate(found.targets) if label in known]
            labels = [found.targets[row] for row in rows]
            name = entry.train if part == "train" else entry.test
            write_data_file(folder / name, images[rows], labels, rows)
    write_manifest(folder / NAME, TASK_A)
    return folder / NAME


def build_task_b(imagenet: Path, out: Path) -> Path:
    """Write the files of task B from images of any size.

    Args:
        imagenet: folder with `train` and `val`, each with a folder of images per class that is
            named by its WordNet id; `val` may also be flat, with LOC_val_solution.csv beside it.
        out: folder to write TaskB into.

    Returns:
        The manifest beside them.

    Raises:
        UserError: naming the folders that are missing, or the image that cannot be read.
    """
    import torch

    folder = out / "TaskB"
    classes = {part: _class_files(imagenet, part) for part in ("train", "val")}
    for part, files in classes.items():
        images = {id: _squares(paths, TASK_B.image_size) for id, paths in files.items()}
        for entry in TASK_B.specialists:
            ids = [one.id for one in entry.classes]
            labels = [torch.full((len(images[id]),), id) for id in ids]
            name = entry.train if part == "train" else entry.test
            write_data_file(folder / name, torch.cat([images[id] for id in ids]), torch.cat(labels))
    write_manifest(folder / NAME, TASK_B)
    return folder / NAME


def _class_files(imagenet: Path, part: str) -> dict[int, list[Path]]:
    """Return the sorted images of every class; none of them is empty."""
    root = imagenet / part
    solution = imagenet / _SOLUTION
    sorted_already = any(is_folder(root / word) for word in WORDNET.values())
    if part == "val" and is_file(solution) and not sorted_already:
        files = _flat(root, solution)
    else:
        files = {id: image_files(root / word) for id, word in WORDNET.items()}
    if missing := [str(root / WORDNET[id]) for id, paths in files.items() if not paths]:
        raise UserError(
            f"no images in {', '.join(missing)}",
            f"one folder per class in {imagenet}/train and {imagenet}/val, or {_SOLUTION}"
            f" in {imagenet} for a flat val",
        )
    return files


def image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return the sorted images of a folder, and with `deep` of all folders in it."""
    if not is_folder(folder):
        return []
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in files if path.suffix.lower() in _SUFFIXES and path.is_file())


def _flat(root: Path, solution: Path) -> dict[int, list[Path]]:
    """Sort the images of a flat folder into classes by a table of `name,wordnet box…`."""
    classes = {word: id for id, word in WORDNET.items()}
    images = {path.stem: path for path in image_files(root)}
    files: dict[int, list[Path]] = {id: [] for id in WORDNET}
    with solution.open(encoding="utf-8-sig", newline="") as lines:
        for name, boxes, *_ in (row for row in csv.reader(lines) if len(row) > 1):
            word = boxes.partition(" ")[0]
            if word in classes and name in images:
                files[classes[word]].append(images[name])
    return {id: sorted(paths) for id, paths in files.items()}


def _squares(paths: Sequence[Path], side: int) -> "Tensor":
    import torch

    return torch.stack([square(path, side) for path in paths])


def square(path: Path, side: int) -> "Tensor":
    """Read an image as (side, side, 3) uint8.

    The shorter side is scaled smoothly, and the middle cut out.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    import numpy as np
    import torch
    from PIL import Image

    image = read_image(path)
    if image.size == (side, side):
        return torch.from_numpy(np.asarray(image).copy())
    scale = side / min(image.size)
    width, height = (max(round(length * scale), side) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    large = image.resize((width, height), Image.Resampling.BICUBIC)
    middle = large.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(middle).copy())
