"""Arrays in files that somebody else wrote, .npz or .safetensors, read without running code."""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moectl.engine.errors import UserError

Array = NDArray[Any]

LARGEST = 2**62
"""Bound of whole numbers without one: exact as a float, so that comparing with it is too."""


class ArrayFile(NamedTuple):
    """Some arrays of a file."""

    path: Path
    arrays: dict[str, Array]
    """Those that were asked for and are there."""
    metadata: dict[str, str]
    keys: Iterable[str]

    def wrong(self, text: str, hint: str = "") -> UserError:
        """Return the error that something is wrong with the file."""
        return UserError(f"{self.path}: {text}", hint)

    def missing(self, what: str) -> UserError:
        """Return the error that an array is not there."""
        return self.wrong(f"{what} is missing, the file holds {', '.join(self.keys) or 'nothing'}")


def open_arrays(path: Path, wanted: Iterable[str]) -> ArrayFile:
    """Read arrays by name; those that are not there are left out.

    Raises:
        UserError: if the file cannot be read, is damaged or holds Python objects under a name.
    """
    readers = {".npz": _open_npz, ".safetensors": _open_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected a .npz or .safetensors file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return reader(path, wanted)


def _open_npz(path: Path, wanted: Iterable[str]) -> ArrayFile:
    place = f"{path}"
    damage = (ValueError, OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        zipfile.ZipFile(path).close()  # numpy reads other formats too, whatever the suffix
        with np.load(path, allow_pickle=False) as archive:
            arrays = {}
            for key in wanted:
                if key in archive.files:
                    place = f"{path}: {key}"
                    arrays[key] = np.asarray(archive[key])
            return ArrayFile(path, arrays, {}, archive.files)
    except damage as error:
        raise UserError(
            f"{place}: not readable ({_reason(error)})",
            "numpy.savez writes such files; arrays of Python objects are not read",
        ) from None


def _open_safetensors(path: Path, wanted: Iterable[str]) -> ArrayFile:
    from safetensors import SafetensorError, safe_open

    damage = (ValueError, OSError, KeyError, TypeError, RuntimeError, SafetensorError)
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            arrays = {key: _to_numpy(file.get_tensor(key)) for key in wanted if key in keys}
            return ArrayFile(path, arrays, file.metadata() or {}, keys)
    except damage as error:
        raise UserError(f"{path}: not readable ({_reason(error)})") from None


def _to_numpy(tensor: Tensor) -> Array:
    narrow = tensor.is_floating_point() and tensor.itemsize < 4
    return (tensor.float() if narrow else tensor).numpy()  # numpy knows no bfloat16


def _reason(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:160]


def numbers(file: ArrayFile, key: str) -> Array:
    """Return an array of numbers.

    Raises:
        UserError: if it is missing or of another type.
    """
    if key not in file.arrays:
        raise file.missing(key)
    array = file.arrays[key]
    if array.dtype.kind not in "iuf":
        raise file.wrong(f"{key} is of type {array.dtype}, expected numbers")
    return array


def whole(
    file: ArrayFile, key: str, low: int, high: int, length: int | None = None
) -> NDArray[np.int64]:
    """Return a list of whole numbers, of whatever type, within bounds.

    Raises:
        UserError: naming the first row that is none.
    """
    array = numbers(file, key)
    if array.ndim != 1:
        raise file.wrong(f"{key} has shape {array.shape}, expected one list")
    if length not in (None, len(array)):
        raise file.wrong(f"{key} has {len(array)} entries for {length} items")
    if array.dtype.kind == "f":
        array = array.astype(np.float64)  # narrower ones could not hold the bounds
    fine = (array >= low) & (array <= high) & (array == np.trunc(array))
    if not fine.all():
        row = int(np.argmin(fine))
        expected = f"a whole number from {low} {f'to {high}' if high < LARGEST else 'up'}"
        raise file.wrong(
            f"{key} out of range: row {row} is {array[row].item()}, expected {expected}"
        )
    return array.astype(np.int64)
