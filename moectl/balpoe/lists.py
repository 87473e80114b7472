"""Data sets given as text files of `relative/path label` lines over a folder of images."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from moectl.engine.errors import UserError
from moectl.engine.files import read_text
from moectl.engine.images import check_image, read_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moectl.balpoe.settings import DataSection

Items = list[tuple[str, int]]
"""Path and class of every image."""

USUAL_NAMES = {
    "imagenet_lt": ("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"),
    "inat18": ("iNaturalist18_train.txt", "iNaturalist18_val.txt", None),
    "list": (None, None, None),
}
_READERS, _PART = 8, 1000
"""Threads that look into files, and how many files each takes at a time."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INATURALIST = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))


@dataclass(frozen=True)
class Lists:
    """The items of a data set and how its images are read."""

    train: Items
    val: Items | None
    """None if validation images have to come out of `test`."""
    test: Items
    class_counts: list[int]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: "Callable[[str], Tensor]"
    plain: "Callable[[str], Tensor]"


def load_lists(data: "DataSection") -> Lists:
    """Read and check the list files of a data set.

    With one of the two held-out lists, both validation and test images come out of it.

    Raises:
        UserError: naming the file and line, or the setting, that is wrong.
    """
    if data.augment not in {"standard", "randaugment"} or data.cutout:
        wrong = "data.cutout is on" if data.cutout else f"data.augment is {data.augment}"
        raise UserError(
            f"{wrong}, which is for images in memory, not for {data.dataset}",
            "choose data.augment = standard or randaugment, without cutout",
        )
    images = data.images or data.root
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of images", "set data.images or data.root")
    train_list, *held_lists = list_paths(data)
    assert train_list is not None
    train = read_list(train_list, images)
    held = [read_list(path, images) for path in held_lists if path is not None]
    val, test = (held[0], held[1]) if len(held) == 2 else (None, held[0])
    counts = _count(train, [label for items in held for _, label in items], train_list)
    side = data.image_size or 224
    mean, std = INATURALIST if data.dataset == "inat18" else IMAGENET
    policy = data.augment == "randaugment"
    jitter = policy or data.dataset != "inat18"
    augment = training_reader(side, mean, jitter=jitter, policy=policy)
    return Lists(train, val, test, counts, side, mean, std, augment, evaluation_reader(side))


def list_paths(data: "DataSection") -> list[Path | None]:
    """Return the training, validation and test list; at most one of the last two is None.

    Raises:
        UserError: if a list that is needed is not named.
    """
    given = (data.train_list, data.val_list, data.test_list)
    usual = USUAL_NAMES[data.dataset]
    paths = [
        path or (data.root / name if name else None)
        for path, name in zip(given, usual, strict=True)
    ]
    if paths[0] is None or paths[1:] == [None, None]:
        name = "data.train_list" if paths[0] is None else "data.test_list"
        raise UserError(f"{name} is not set, but {data.dataset} reads its images from list files")
    return paths


def read_list(path: Path, images: Path) -> Items:
    """Read the `relative/path label` lines of a file; empty lines do not count.

    Raises:
        UserError: naming the file, the line and what is wrong with it.
    """
    lines = read_text(path, "see data.train_list").split("\n")
    items: Items = []
    numbers = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            relative, label = _parse(line, f"{path}, line {number}")
            items.append((str(images / relative), label))
            numbers.append(number)
    if not items:
        raise UserError(f"{path}: names no image, expected lines of `relative/path label`")
    _check_images(path, [image for image, _ in items], numbers, images)
    return items


def _check_images(path: Path, files: list[str], numbers: list[int], images: Path) -> None:
    """Look into every file now, rather than in the last epoch."""

    def problem(start: int) -> str:
        part = slice(start, start + _PART)
        for number, file in zip(numbers[part], files[part], strict=True):
            try:
                check_image(file)
            except UserError as error:
                return f"{path}, line {number}: {error.message}"
        return ""

    with ThreadPoolExecutor(_READERS) as pool:  # disks far away answer late, but many at a time
        found = next(filter(None, pool.map(problem, range(0, len(files), _PART))), "")
    if found:
        raise UserError(found, f"is {images} the folder of images?")


def _parse(line: str, place: str) -> tuple[str, int]:
    relative, *rest = line.strip().rsplit(maxsplit=1)
    if not rest:
        raise UserError(f"{place}: {relative!r} has no label, expected `relative/path label`")
    label = rest[0]
    if not (label.isascii() and label.isdecimal()):
        raise UserError(f"{place}: label {label!r} is not a whole number from 0 on")
    if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
        raise UserError(f"{place}: {relative!r} leads out of the folder of images")
    return relative, int(label)


def _count(train: Items, held_labels: list[int], path: Path) -> list[int]:
    """Return the images per class, having made sure that there is no gap."""
    counts = Counter(label for _, label in train)
    last = max(*counts, *held_labels)
    for number in range(last + 1):
        if counts[number] == 0:
            raise UserError(
                f"{path}: class {number} has no image, although classes go up to {last}",
                "number the classes from 0 on without gaps, each with a training image",
            )
    return [counts[number] for number in range(last + 1)]


def training_reader(
    side: int, mean: tuple[float, ...], *, jitter: bool, policy: bool
) -> "Callable[[str], Tensor]":
    """Return what reads an image as uint8 and transforms it at random, drawing from torch alone.

    Args:
        side: pixels of the square that the network sees.
        mean: per channel, of values in 0..1; what `RandAugment` fills with.
        jitter: vary brightness, contrast and saturation by up to 40 %.
        policy: then apply `RandAugment`.
    """
    import torch
    from torchvision import transforms

    from moectl.common.autoaugment import RandAugment

    shape = transforms.Compose(
        [
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            *([transforms.ColorJitter(0.4, 0.4, 0.4, 0)] if jitter else []),
            transforms.PILToTensor(),
        ]
    )
    augment = RandAugment(mean)

    def read(path: str) -> "Tensor":
        image: Tensor = shape(read_image(path))
        return augment(image[None], torch.rand(1, augment.draws))[0] if policy else image

    return read


def evaluation_reader(side: int) -> "Callable[[str], Tensor]":
    """Return what reads an image as uint8: short side to 8/7 of `side`, then the middle."""
    from torchvision import transforms

    shape = transforms.Compose(
        [
            transforms.Resize(side * 8 // 7),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
        ]
    )
    return lambda path: shape(read_image(path))
