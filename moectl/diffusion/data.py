"""The images that are learned, and some that are held out to measure.

Letters: N images, S pixels of a side.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.common.images import Plain, Standard
from moectl.engine.cifar import read_cifar
from moectl.engine.errors import UserError
from moectl.engine.images import read_image, readable
from moectl.engine.launch import offline
from moectl.engine.sources import FolderSource, Source, TensorSource

if TYPE_CHECKING:
    from moectl.diffusion.settings import DataSection

log = logging.getLogger(__name__)

_HALF = (0.5, 0.5, 0.5)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_AT_ONCE = 1000  # images resized at a time

Item = tuple[str, int]
"""A file, or the number of an image; and its class."""


@dataclass(frozen=True)
class Data:
    """Two sets of images in -1 to 1, and what is known about them."""

    train: Source
    test: Source
    """Held out."""
    class_names: list[str]
    facts: dict[str, Any]
    """Plain values: dataset, image_size, images of each set, digest of the contents (of folders:
    names and lengths of the files)."""


def load(section: "DataSection") -> Data:
    """Load the data set of the settings.

    Raises:
        UserError: if files are missing or damaged, or hold no images.
    """
    match section.dataset:
        case "digits":
            return _digits(section)
        case "cifar10":
            return _cifar10(section)
        case "folder":
            return _folder(section)
        case "hub":
            return _hub(section)


def resized(images: Tensor, side: int) -> Tensor:
    """Bring uint8 images (N, C, H, W) to a side, smoothed where they shrink."""
    if images.shape[-2:] == (side, side):
        return images
    parts = [
        F.interpolate(part.float(), size=(side, side), mode="bicubic", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for part in torch.split(images, _AT_ONCE)
    ]
    return torch.cat(parts)


def _in_memory(
    section: "DataSection", train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], names: str
) -> Data:
    """Hold uint8 images (N, 3, H, W) with their labels, resized once."""
    plain = Plain(_HALF, _HALF)
    flip = section.hflip and section.dataset != "digits"
    augment = Standard(_HALF, _HALF, padding=0, flip=True, degrees=0) if flip else None
    sources = [
        TensorSource(resized(images, section.image_size), labels, own, plain)
        for (images, labels), own in ((train, augment), (test, None))
    ]
    # Of the images as they came: what resizing makes of them differs between processors.
    digest = hashlib.sha256(str(section.image_size).encode())
    for tensor in (*train, *test):
        digest.update(tensor.numpy().tobytes())
    return _data(section, sources, names.split(), digest.hexdigest())


def _data(section: "DataSection", sources: Sequence[Source], names: list[str], digest: str) -> Data:
    train, test = sources
    facts = {
        "dataset": section.dataset,
        "image_size": section.image_size,
        "images": {"train": len(train), "test": len(test)},
        "digest": digest[:16],
    }
    return Data(train, test, names, facts)


def _held_out(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Return the rows to train on and those held out; the same share of every class if it can."""
    from sklearn.model_selection import train_test_split

    count = round(len(labels) * fraction)
    if not 1 <= count < len(labels):
        raise UserError(
            f"data.val_fraction = {fraction:g} of {len(labels)} images holds out {count}:"
            " expected one at least, and one to train on"
        )
    sizes = Counter(labels).values()
    even = min(sizes) > 1 and count >= len(sizes) <= len(labels) - count
    train, test = train_test_split(
        range(len(labels)), test_size=count, random_state=0, stratify=labels if even else None
    )
    return sorted(train), sorted(test)


def _digits(section: "DataSection") -> Data:
    """Take scikit-learn's 1,797 scanned digits."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (torch.from_numpy(scans.images).float() * (255 / 16)).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(scans.target).long()
    rows = [torch.tensor(part) for part in _held_out(labels.tolist(), section.val_fraction)]
    train, test = ((images[part], labels[part]) for part in rows)
    return _in_memory(section, train, test, " ".join("0123456789"))


def _cifar10(section: "DataSection") -> Data:
    """Take the official files."""
    found = read_cifar("cifar10", section.root, download=section.download)
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
        for part in found
    )
    return _in_memory(section, train, test, _CIFAR10)


def _images_below(folder: Path) -> Iterator[Path]:
    """Find the images in a folder and those in it; hidden ones are other programs' notes."""
    return (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )


def _classes_of(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(_images_below(path))
    )


def _folder(section: "DataSection") -> Data:
    """Read a folder of images, or one folder per class.

    Above them `train` and `test` (or `val`, `validation`) may divide; without these a share of the
    images is held out.
    """
    root = section.root
    if not root.is_dir():
        raise UserError(f"{root}: no such folder", "--data-dir names the folder of the images")
    others = (root / name for name in ("test", "val", "validation"))
    parts = [root / "train", next((part for part in others if part.is_dir()), root / "test")]
    divided = all(part.is_dir() for part in parts)
    names = _classes_of(parts[0] if divided else root)

    def items(folder: Path) -> list[Item]:
        if not names:
            return [(str(path), 0) for path in sorted(_images_below(folder))]
        if strange := sorted(set(_classes_of(folder)) - set(names)):
            raise UserError(f"{folder / strange[0]}: not a class of {parts[0]}")
        return [
            (str(path), label)
            for label, name in enumerate(names)
            for path in sorted(_images_below(folder / name))
        ]

    if divided:
        train, test = (items(part) for part in parts)
    else:
        train = items(root)
    for part, found in zip(parts, (train, test), strict=True) if divided else [(root, train)]:
        if not found:
            below = f" in {', '.join(names[:5])}" if names else ""
            raise UserError(f"{part}: no images ({', '.join(_SUFFIXES)}){below}")
    if not divided:
        rows = _held_out([label for _, label in train], section.val_fraction)
        train, test = ([train[row] for row in part] for part in rows)
    listing = [section.image_size, [_listed(root, path) for path, _ in train + test], len(train)]
    digest = hashlib.sha256(repr(listing).encode()).hexdigest()
    return _from_items(section, read_image, train, test, names or ["image"], digest)


def _listed(root: Path, path: str) -> tuple[str, int]:
    """Return what is kept in mind of a file, wherever the folder lies: its place and length."""
    try:
        return Path(path).relative_to(root).as_posix(), Path(path).stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _from_items(
    section: "DataSection",
    open_image: Callable[[str], Any],
    train: list[Item],
    test: list[Item],
    names: list[str],
    digest: str,
) -> Data:
    """Read images one at a time, as they are wanted."""
    plain = partial(_read, open_image, section.image_size, False)
    augment = partial(_read, open_image, section.image_size, section.hflip)
    finish = Plain(_HALF, _HALF)
    generator = torch.Generator().manual_seed(0)
    # Mixed, so that any first ones of them are of all classes.
    held = [test[row] for row in torch.randperm(len(test), generator=generator).tolist()]
    sources = [
        FolderSource(part, augment, plain, section.workers, finish) for part in (train, held)
    ]
    return _data(section, sources, names, digest)


def _read(open_image: Callable[[str], Any], side: int, flip: bool, name: str) -> Tensor:
    """Open an image, cut out its middle square and bring it to a side: (3, S, S) uint8."""
    import numpy as np
    from PIL import Image

    image = open_image(name)
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(2) if flip and torch.rand(()) < 0.5 else pixels


def _hub(section: "DataSection") -> Data:
    """Read a data set of the hub: its first column of images, its first column of classes."""
    name = section.name
    if not name:
        raise UserError("data.dataset = hub needs data.name", "--hub-name uoft-cs/cifar10")
    found = _fetched(name, network=section.download and not offline())
    train_set = found.get("train") or next(iter(found.values()))
    column, label = (_column(train_set, kind) for kind in ("Image", "ClassLabel"))
    if not column:
        raise UserError(
            f"data.name = {name}: no column of images, it has {', '.join(train_set.column_names)}"
        )

    def labels(part: Any) -> list[int]:
        """Return the classes; below 0 where they are a secret or unknown."""
        found = part[label][:] if label else [0] * len(part)
        return [-1 if one is None else one for one in found]

    def known(part: Any) -> bool:
        return min(labels(part), default=-1) >= 0

    if not known(train_set):
        raise UserError(f"data.name = {name}: there are training images without a class")
    others = [found[part] for part in ("test", "validation") if part in found]
    test_set = next((part for part in others if part is not train_set and known(part)), None)
    train = [(f"train:{row}", one) for row, one in enumerate(labels(train_set))]
    if test_set is None:
        rows = _held_out([one for _, one in train], section.val_fraction)
        train, test = ([train[row] for row in part] for part in rows)
    else:
        test = [(f"test:{row}", one) for row, one in enumerate(labels(test_set))]
    sets = {"train": train_set, "test": test_set}

    def open_image(place: str) -> Any:
        part, _, row = place.partition(":")
        with readable(f"data.name = {name}: {place}"):
            image = sets[part][int(row)][column]
            if image is None:
                raise ValueError("there is none")
            return image.convert("RGB")

    names = train_set.features[label].names if label else ["image"]
    marks = [part._fingerprint for part in (train_set, test_set) if part is not None]
    digest = hashlib.sha256(repr((section.image_size, name, marks)).encode()).hexdigest()
    return _from_items(section, open_image, train, test, list(names), digest)


def _fetched(name: str, *, network: bool) -> Any:
    import datasets

    if network:
        log.warning("fetching %s from the hub, if it is not kept already", name)
    try:
        with _hub_network(network):
            return datasets.load_dataset(name)
    except Exception as error:  # the library raises what its parts do
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.name = {name}: could not be loaded ({words})",
            "check the name; without a network the set must have been fetched before",
        ) from None


@contextmanager
def _hub_network(allowed: bool) -> Iterator[None]:
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _column(table: Any, kind: str) -> str:
    """Return the first column of a kind of feature; empty if there is none."""
    found = (name for name, one in table.features.items() if type(one).__name__ == kind)
    return next(found, "")
