"""The data sets of balpoe: a long-tailed training set, and validation and test images.

Legend: N images, C channels, H W pixels, K classes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moectl.balpoe.lists import IMAGENET, INATURALIST, evaluation_reader, load_lists
from moectl.balpoe.longtail import class_sizes, select, split_indices
from moectl.common.autoaugment import AutoAugment, TrivialAugment
from moectl.common.images import Plain, Standard
from moectl.engine.cifar import read_cifar
from moectl.engine.errors import UserError
from moectl.engine.images import read_image
from moectl.engine.sources import Augment, FolderSource, Source, TensorSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from moectl.balpoe.settings import DataSection

log = logging.getLogger(__name__)

_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_STATISTICS = {
    "digits": ((0.3, 0.3, 0.3), (0.35, 0.35, 0.35)),
    "synthetic": ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
    # Those of CIFAR-10 serve both sets, as in the literature.
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}
"""Mean and standard deviation per channel, of values in 0..1."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_SIDES = {"digits": 8, "synthetic": 16, "cifar10": 32, "cifar100": 32}


@dataclass(frozen=True)
class Data:
    """Three sets of images and what is known about them."""

    train: Source
    val: Source
    test: Source
    class_counts: list[int]
    """(K,) training images of each class."""
    class_names: list[str]
    val_indices: list[int]
    """Positions of `val` among the held-out images, in the order of `val`."""
    test_indices: list[int]
    """Positions of `test` among them; none is in both."""
    facts: dict[str, object]
    """Plain values for the records of a run; always `dataset`, `image_size`, `mean`, `std`."""


class _Pool(NamedTuple):
    """A balanced data set in memory, before its training part is made long-tailed."""

    images: Tensor
    """(N, 3, H, W) uint8, to train on."""
    labels: NDArray[np.int64]
    held_images: Tensor
    """(N, 3, H, W) uint8, to be divided into validation and test."""
    held_labels: NDArray[np.int64]
    names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    degrees: float
    flip: bool


def load(data: "DataSection", seed: int) -> Data:
    """Load the data set of the settings.

    The training images are the same for every seed; the seed decides which held-out images of each
    class validate.

    Args:
        data: section of the settings.
        seed: of the division into validation and test.

    Raises:
        UserError: if files are missing or damaged, or settings do not fit the data set.
    """
    match data.dataset:
        case "digits":
            return _long_tailed(_digits(data), data, seed)
        case "synthetic":
            return _long_tailed(_synthetic(data), data, seed)
        case "cifar10" | "cifar100":
            return _long_tailed(_cifar(data), data, seed)
        case "imagenet_lt" | "inat18" | "list":
            return _from_files(data, seed)


class Sizes(NamedTuple):
    """How large a data set is."""

    train: int
    val: int
    test: int
    classes: int
    side: int
    """Pixels along an image's edge."""


def sizes(data: "DataSection", seed: int) -> Sizes:
    """Return the sizes of the three sets; those of CIFAR are known without its files.

    Raises:
        UserError: if the files of another data set are missing.
    """
    public = {"cifar10": (5000, 10), "cifar100": (500, 100)}
    if data.dataset in public:
        n_max, classes = public[data.dataset]
        counts = class_sizes(n_max, classes, 1 / data.imbalance_ratio, data.profile)
        held = np.repeat(np.arange(classes), 10_000 // classes)
        val, test = split_indices(held, data.val_fraction, seed)
        return Sizes(sum(counts), len(val), len(test), classes, 32)
    found = load(data.model_copy(update={"download": False}), seed)
    side = cast("int", found.facts["image_size"])
    parts = (len(found.train), len(found.val), len(found.test))
    return Sizes(*parts, len(found.class_counts), side)


def _long_tailed(pool: _Pool, data: "DataSection", seed: int) -> Data:
    n_max, classes = int(np.bincount(pool.labels).min()), len(pool.names)
    sizes = class_sizes(n_max, classes, 1 / data.imbalance_ratio, data.profile)
    if min(sizes) == 0:
        raise UserError(
            f"data.imbalance_ratio is {data.imbalance_ratio:g}, which leaves a class of"
            f" {data.dataset} without images",
            f"the largest class has {n_max}, so choose a ratio of at most {n_max}",
        )
    rows = select(pool.labels, sizes)
    val, test = split_indices(pool.held_labels, data.val_fraction, seed)
    augment, plain = _augment(pool, data), Plain(pool.mean, pool.std)

    def held(part: NDArray[np.int64]) -> Source:
        labels = torch.from_numpy(pool.held_labels[part])
        return TensorSource(pool.held_images[torch.from_numpy(part)], labels, None, plain)

    kept = pool.images[torch.from_numpy(rows)]
    return Data(
        train=TensorSource(kept, torch.from_numpy(pool.labels[rows]), augment, plain),
        val=held(val),
        test=held(test),
        class_counts=sizes,
        class_names=pool.names,
        val_indices=val.tolist(),
        test_indices=test.tolist(),
        facts={
            "dataset": data.dataset,
            "image_size": pool.images.shape[-1],
            "mean": pool.mean,
            "std": pool.std,
            "n_max": n_max,
            "counts": sizes,
            "imbalance_ratio": max(sizes) / min(sizes),
        },
    )


def _augment(pool: _Pool, data: "DataSection") -> Augment:
    cutout = min(16, pool.images.shape[-1] // 2) if data.cutout else 0
    mean, std, padding, flip = pool.mean, pool.std, pool.padding, pool.flip
    match data.augment:
        case "standard":
            return Standard(
                mean, std, padding=padding, flip=flip, degrees=pool.degrees, cutout=cutout
            )
        case "autoaugment":
            return AutoAugment(mean, std, padding=padding, flip=flip, cutout=cutout)
        case "trivial":
            return TrivialAugment(mean, std, padding=padding, flip=flip, cutout=cutout)
        case "randaugment":
            raise UserError(
                f"data.augment is randaugment, which is not for the images of {data.dataset}",
                "choose standard, autoaugment or trivial",
            )


def _stretched(images: Tensor, side: int) -> Tensor:
    """Enlarge float images (N, C, H, W) bilinearly and round them to uint8."""
    large = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8)


def _digits(data: "DataSection") -> _Pool:
    """Take scikit-learn's 1,797 scanned digits; two fifths of every class are held out."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    labels = scans.target.astype(np.int64)
    side = data.image_size or _SIDES["digits"]
    images = _stretched(torch.from_numpy(scans.images).float()[:, None] * (255 / 16), side)
    images = images.expand(-1, 3, -1, -1)
    held, train = split_indices(labels, 0.4, seed=0)
    return _Pool(
        images[torch.from_numpy(train)],
        labels[train],
        images[torch.from_numpy(held)],
        labels[held],
        [str(digit) for digit in range(10)],
        *_STATISTICS["digits"],
        padding=max(side // 8, 1),
        degrees=10.0,
        flip=False,
    )


def _synthetic(data: "DataSection") -> _Pool:
    """Make ten classes of coloured clouds, each a pattern of its own under noise."""
    classes, per_class, held_per_class = 10, 100, 40
    side = data.image_size or _SIDES["synthetic"]
    draws = torch.Generator().manual_seed(0)
    patterns = torch.randn(classes, 3, 4, 4, generator=draws)
    labels = torch.arange(classes).repeat(per_class + held_per_class)
    clouds = patterns[labels] + 0.7 * torch.randn(len(labels), 3, 4, 4, generator=draws)
    images = _stretched(128 + 40 * clouds, side)
    part = per_class * classes
    return _Pool(
        images[:part],
        labels[:part].numpy(),
        images[part:],
        labels[part:].numpy(),
        [f"cloud {number}" for number in range(classes)],
        *_STATISTICS["synthetic"],
        padding=max(side // 8, 1),
        degrees=10.0,
        flip=False,
    )


def _cifar(data: "DataSection") -> _Pool:
    """Take the official CIFAR files."""
    assert data.dataset in ("cifar10", "cifar100")
    if data.image_size not in {0, 32}:
        raise UserError(
            f"data.image_size is {data.image_size}, but the images of {data.dataset} are 32 x 32",
            "leave it at 0",
        )
    train, test = read_cifar(data.dataset, data.root, download=data.download)
    return _Pool(
        torch.from_numpy(train.data.transpose(0, 3, 1, 2)),
        np.array(train.targets),
        torch.from_numpy(test.data.transpose(0, 3, 1, 2)),
        np.array(test.targets),
        list(train.classes),
        *_STATISTICS[data.dataset],
        padding=4,
        degrees=15.0,
        flip=True,
    )


def _from_files(data: "DataSection", seed: int) -> Data:
    """Take images named in list files; the training list is used as it stands."""
    lists = load_lists(data)
    val, test = lists.val, lists.test
    if val is None:
        labels = [label for _, label in test]
        parts = split_indices(labels, data.val_fraction, seed)
        val, test = ([test[row] for row in part] for part in parts)
        val_indices, test_indices = (part.tolist() for part in parts)
    else:
        positions = list(range(len(val) + len(test)))  # of both lists, one after the other
        val_indices, test_indices = positions[: len(val)], positions[len(val) :]

    finish = Plain(lists.mean, lists.std)

    def source(items: list[tuple[str, int]]) -> Source:
        return FolderSource(items, lists.augment, lists.plain, data.workers, finish)

    counts = lists.class_counts
    for name in ("imbalance_ratio", "profile"):
        if getattr(data, name) != type(data).model_fields[name].default:
            log.warning(
                "data.%s does nothing with list files: their counts are %d to %d",
                name,
                max(counts),
                min(counts),
            )
    return Data(
        train=source(lists.train),
        val=source(val),
        test=source(test),
        class_counts=counts,
        class_names=[str(number) for number in range(len(counts))],
        val_indices=val_indices,
        test_indices=test_indices,
        facts={
            "dataset": data.dataset,
            "image_size": lists.side,
            "mean": lists.mean,
            "std": lists.std,
            "n_max": max(counts),
            "counts": counts,
            "imbalance_ratio": max(counts) / min(counts),
        },
    )


def folder_source(folder: Path, data: "DataSection") -> FolderSource:
    """Return the images of a folder, in the order of their paths, as evaluation reads them.

    Raises:
        UserError: if the folder holds no image.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    paths = sorted(path for path in files if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: no image in it ({', '.join(_SUFFIXES)})")
    if data.dataset in _SIDES:
        read = _square_reader(data.image_size or _SIDES[data.dataset])
        mean, std = _STATISTICS[data.dataset]
    else:
        read = evaluation_reader(data.image_size or 224)
        mean, std = INATURALIST if data.dataset == "inat18" else IMAGENET
    items = [(str(path), 0) for path in paths]
    return FolderSource(items, read, read, data.workers, Plain(mean, std))


def _square_reader(side: int) -> "Callable[[str], Tensor]":
    """Return what reads an image as uint8 and squeezes it into a square where it is none."""
    from torchvision.transforms.functional import pil_to_tensor

    def read(path: str) -> Tensor:
        image = read_image(path)
        return pil_to_tensor(image if image.size == (side, side) else image.resize((side, side)))

    return read
