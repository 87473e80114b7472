"""Image files of every kind as brightness in 0..1, in training, evaluation and inference alike.

Legend: H W pixels.
"""

import io
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moectl.csr.dicom import DICOM_SUFFIXES, dicom_size, is_dicom, need_pydicom, read_dicom
from moectl.engine.console import progress
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.files import (
    csv_text,
    is_file,
    read_json,
    write_bytes,
    write_json,
    write_text,
)
from moectl.engine.images import opened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

RESIZE_TABLE = "resize_factors.csv"
ORIGIN = "preprocess.json"
"""Says what a folder of results was made from, so that a second run can go on with it."""
SUFFIXES = (".png", ".jpg", ".jpeg", *DICOM_SUFFIXES, "")
"""In the order in which they are looked for; an id may also be a whole file name."""
Channels = Literal["grey", "rgb"]
Floats = NDArray[np.float32]

_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def find_image(folder: Path, image_id: str) -> Path:
    """Return the file of an image.

    Raises:
        UserError: if there is none.
    """
    parts = PurePosixPath(image_id).parts
    if not parts or ".." in parts or PurePosixPath(image_id).is_absolute():
        raise UserError(f"image id {image_id!r} is no name inside of {folder}")
    for suffix in SUFFIXES:
        for spelling in dict.fromkeys((suffix, suffix.upper())):
            path = folder / f"{image_id}{spelling}"
            if path.is_file():
                return path
    raise UserError(
        f"{folder}: no image {image_id!r}",
        f"looked for it with {', '.join(suffix or 'nothing' for suffix in SUFFIXES)} behind its id",
    )


def read_image(path: Path, channels: Channels = "grey") -> Floats:
    """Read an image as float32 (3, H, W) in 0..1; grey is the same in all three.

    8 bits are divided by 255, 16 bits by 65535. Transparency is ignored.

    Raises:
        UserError: naming the file, if it is missing, damaged or of a kind that is not known.
    """
    values = decode(path)
    if channels == "grey" or values.ndim == 2:
        return np.repeat(_grey(values)[None], 3, axis=0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width, of which only the head of the file is read.

    Raises:
        UserError: naming the file.
    """
    if is_dicom(path):
        return dicom_size(path)
    with opened(path) as image:
        return image.height, image.width


def decode(path: Path) -> Floats:
    """Read an image as float32 in 0..1, (H, W) if it is grey or (H, W, 3).

    Raises:
        UserError: as `read_image`.
    """
    if is_dicom(path):
        return read_dicom(path)
    with opened(path) as image:
        image.load()
        return _values(image)


def _values(image: "Image") -> Floats:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut, not scale
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("more than 16 bits per pixel")
        return values / np.float32(65535)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers without a known range")
    if image.mode in {"1", "L", "LA", "La"}:
        return np.asarray(image.convert("L")).astype(np.float32) / np.float32(255)
    if image.mode in {"P", "PA"} and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow complains about the palette
    return np.asarray(image.convert("RGB")).astype(np.float32) / np.float32(255)


def _grey(values: Floats) -> Floats:
    """Return brightness (H, W); grey that is stored as colour stays exactly what it is."""
    if values.ndim == 2:
        return values
    if _is_grey(values):
        return np.ascontiguousarray(values[..., 0])
    return values @ _LUMINANCE


def _is_grey(values: Floats) -> bool:
    return values.ndim == 2 or bool((values == values[..., :1]).all())


class Preprocessed(NamedTuple):
    """What became of the images of a folder."""

    written: int
    skipped: int
    """Images that an earlier run has written."""
    unreadable: list[str]
    """What is wrong, one sentence for each image without a result."""
    table: Path
    """The sizes before and after, as `boxes.read_resize_table` reads them."""


def preprocess(
    folder: Path, out: Path, size: int = 224, bits: Literal[8, 16] = 8, workers: int = 1
) -> Preprocessed:
    """Write the images of a folder, also those in folders below, as square PNG files.

    Grey images get 8 or 16 bits; colour keeps its three channels of 8 bits. Files are written
    whole or not at all, and not again if they are there already. Nothing but results of the same
    call is ever replaced.

    Args:
        folder: of the images.
        out: folder of the PNG files, under the same names, and of `resize_factors.csv`; empty, or
            begun by an earlier call with the same folder, size and bits.
        size: side in pixels.
        bits: per pixel of grey images.
        workers: processes; up to 1 reads here.

    Raises:
        UserError: if the folder holds no image, none can be read, pydicom is missing, or `out` has
            other content.
    """
    files = _files(folder, out)
    jobs = [_Job(name, path, out / f"{name}.png", size, bits) for name, path in files.items()]
    if not jobs:
        raise UserError(f"{folder}: no image in it ({', '.join(filter(None, SUFFIXES))})")
    for path in filter(is_dicom, files.values()):
        need_pydicom(path)  # one sentence now, not one for each image
        break
    _claim(out, {"source": str(folder.resolve()), "size": size, "bits": bits})
    for parent in {job.target.parent for job in jobs}:
        parent.mkdir(parents=True, exist_ok=True)
    done = []
    with progress(len(jobs)) as line:
        for one in _all_done(jobs, workers):
            done.append(one)
            line.update(len(done), one.name)
    good = [one for one in done if not one.error]
    unreadable = [one.error for one in done if one.error]
    if not good:
        raise UserError(f"{folder}: none of {len(jobs)} images can be read: {unreadable[0]}")
    table = out / RESIZE_TABLE
    write_text(table, csv_text([_resize_row(one, size) for one in good]))
    skipped = sum(one.skipped for one in good)
    return Preprocessed(len(good) - skipped, skipped, unreadable, table)


def _claim(out: Path, origin: dict[str, object]) -> None:
    """Write down what a folder is made from, unless it says so already."""
    note = out / ORIGIN
    if is_file(note):
        if read_json(note) != origin:
            raise UserError(
                f"{out}: was made from another folder, or with another size or depth, see {ORIGIN}",
                "choose a new folder",
            )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"{out}: is not empty", "choose a new folder")
        write_json(note, origin)
    except OSError as error:
        raise UserError(f"{out}: cannot be written to ({error.strerror})") from None


class _Job(NamedTuple):
    name: str
    source: Path
    target: Path
    size: int
    bits: int


class _Done(NamedTuple):
    name: str
    height: int = 0
    width: int = 0
    skipped: bool = False
    error: str = ""


def _files(folder: Path, out: Path) -> dict[str, Path]:
    """Return image files by their ids, in order; of several the one that `find_image` takes."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    results = out.resolve()
    if folder.resolve().is_relative_to(results):
        raise UserError(f"{out}: holds the images themselves", "choose a new folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        known = path.suffix.lower() in SUFFIXES[:-1]
        name = path.relative_to(folder).as_posix().removesuffix(path.suffix if known else "")
        hidden = path.name.startswith(".") or path.resolve().is_relative_to(results)
        if not hidden and path.is_file() and (known or is_dicom(path)):
            found.setdefault(name, path)
    return {name: find_image(folder, name) for name in found}


def _all_done(jobs: "Sequence[_Job]", workers: int) -> "Iterator[_Done]":
    """Yield the results in order."""
    if workers <= 1:
        yield from map(_work, jobs)
        return
    # Spawned, not forked: the threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _end_with_parent)
    try:
        yield from pool.map(_work, jobs, chunksize=8)
    except BrokenProcessPool:
        raise RunFailed("a process that read images was killed, perhaps for its memory") from None
    finally:
        pool.shutdown(cancel_futures=True)  # else Ctrl-C would wait for all that is queued


def _end_with_parent() -> None:
    """Let a worker not wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: _Job) -> _Done:
    try:
        if _is_whole(job):
            return _Done(job.name, *image_size(job.source), skipped=True)
        values = decode(job.source)
        write_bytes(job.target, _png(values, job.size, job.bits))
        return _Done(job.name, *values.shape[:2])
    except UserError as error:
        return _Done(job.name, error=error.message)


def _is_whole(job: _Job) -> bool:
    """Whether the result is there: a PNG of the right size and depth whose checksums fit."""
    if not job.target.is_file():
        return False
    grey = "I;16" if job.bits == 16 else "L"
    try:
        with opened(job.target) as image:
            image.verify()
            return image.size == (job.size, job.size) and image.mode in {grey, "RGB"}
    except UserError:
        return False


def _png(values: Floats, side: int, bits: int) -> bytes:
    """Shrink or stretch an image into a square, without aliasing, and encode it."""
    from PIL import Image

    values = _grey(values) if _is_grey(values) else values
    colour = values.ndim == 3
    scale = 65535 if bits == 16 and not colour else 255
    planes = values.transpose(2, 0, 1) if colour else values[None]
    resized = [
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR))
        for plane in np.ascontiguousarray(planes)
    ]
    whole = np.rint(np.stack(resized, -1).clip(0, 1) * scale)
    pixels = whole.astype(np.uint16 if scale == 65535 else np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels if colour else pixels[..., 0]).save(file, "PNG")
    return file.getvalue()


def _resize_row(one: _Done, size: int) -> dict[str, object]:
    return {
        "image_id": one.name,
        "original_height": one.height,
        "original_width": one.width,
        "target_height": size,
        "target_width": size,
        "resize_factor_h": size / one.height,
        "resize_factor_w": size / one.width,
    }
