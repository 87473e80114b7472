"""The data files of the specialists: a dictionary of images and labels, saved by torch.

Legend: N images, H W pixels.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.artefact import safe_load, trusting_load
from moectl.engine.errors import UserError
from moectl.engine.files import read_bytes, write_bytes

if TYPE_CHECKING:
    from torch import Tensor


def read_data_file(path: Path, allow_pickle: bool = False) -> tuple["Tensor", "Tensor"]:
    """Read the images and labels of a data file.

    Images may be tensors or arrays, channels first or last, bytes or numbers in 0..1 or 0..255;
    labels may be a tensor, an array or a list.

    Args:
        path: the file: a dictionary with `data` and `labels`.
        allow_pickle: read any Python object, which may run code from the file.

    Returns:
        images: (N, 3, H, W) uint8, contiguous.
        labels: (N,) int64, as in the file.

    Raises:
        UserError: naming the file, if it is missing, damaged, unsafe or not understood.
    """
    data = read_bytes(path, "moectl taskmoe data build writes the files of tasks A and B")
    content = trusting_load(data, str(path)) if allow_pickle else _safely(data, path)
    missing = [
        key for key in ("data", "labels") if not isinstance(content, dict) or key not in content
    ]
    if missing:
        raise UserError(
            f"{path}: has no {' and no '.join(missing)}, expected a dictionary with both"
        )
    images, labels = _images(content["data"], path), _labels(content["labels"], path)
    if len(images) != len(labels):
        raise UserError(f"{path}: has {len(images)} images, but {len(labels)} labels")
    return images, labels


def write_data_file(
    path: Path,
    images: "Tensor",
    labels: "Sequence[int] | Tensor",
    indices: Sequence[int] | None = None,
) -> None:
    """Write a data file, whole or not at all, that needs no trust to be read.

    Args:
        path: the file; its folder is made.
        images: (N, 3, H, W) or (N, H, W, 3) uint8, written as they are.
        labels: (N,) original ids.
        indices: (N,) rows of the data set that the images come from; None leaves them out.
    """
    import torch

    def own(values: Any) -> Any:  # a view would drag its whole storage into the file
        if isinstance(values, torch.Tensor):
            return values.clone(memory_format=torch.contiguous_format)
        return [int(value) for value in values]

    content = {"data": own(images), "labels": own(labels)}
    if indices is not None:
        content["indices"] = own(indices)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def _safely(data: bytes, path: Path) -> Any:
    hint = "if you trust where it comes from, allow it with --allow-pickle"
    return safe_load(data, str(path), allowed=_array_types(), hint=hint)


def _array_types() -> list[Any]:
    """Return what NumPy needs to rebuild scalars and arrays; none of it runs code of the file."""
    from _codecs import encode

    import numpy as np

    rebuild = [np._core.multiarray.scalar, np._core.multiarray._reconstruct]  # type: ignore[attr-defined]
    # Files of NumPy 1 know the same functions by their former place.
    former = [(function, f"numpy.core.multiarray.{function.__name__}") for function in rebuild]
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdO"]
    return [*rebuild, *former, np.ndarray, np.dtype, encode, *kinds]


def _images(found: Any, path: Path) -> "Tensor":
    import numpy as np
    import torch

    if isinstance(found, np.ndarray) and found.dtype.kind in "buif":
        found = torch.from_numpy(found)
    if not isinstance(found, torch.Tensor) or found.ndim != 4 or 0 in found.shape:
        shape = tuple(getattr(found, "shape", ()))
        raise UserError(
            f"{path}: data is a {type(found).__name__} of shape {shape}, expected images"
            " (N, 3, H, W) or (N, H, W, 3)"
        )
    return _bytes(_channels_first(found, path), path).contiguous()


def _channels_first(images: "Tensor", path: Path) -> "Tensor":
    """Return (N, 3, H, W), having made sure that only one axis can hold the colours."""
    axes = [axis for axis in (1, 2, 3) if images.shape[axis] == 3]
    if axes not in ([1], [3]):
        fault = "several axes" if len(axes) > 1 else "neither the second nor the last axis"
        raise UserError(
            f"{path}: data has shape {tuple(images.shape)}, where {fault} could hold the 3 colours",
            "expected images (N, 3, H, W) or (N, H, W, 3) with more than 3 pixels a side",
        )
    return images if axes == [1] else images.movedim(3, 1)


def _bytes(images: "Tensor", path: Path) -> "Tensor":
    """Return uint8 images, having found out which range the numbers are in."""
    import torch

    if images.dtype == torch.uint8:
        return images
    wide = images.double() if images.dtype == torch.float64 else images.float()
    low, high = wide.min().item(), wide.max().item()
    # A brightest value just above 1 is an overshoot of 0..1, not the darkest of all data sets.
    if images.is_complex() or not (low >= 0 and (high <= 1 or 2 <= high <= 255)):
        raise UserError(
            f"{path}: data lies in {low:g}..{high:g}, expected 0..1 or 0..255",
            "save the images before they are normalised",
        )
    scale = 255 if images.is_floating_point() and high <= 1 else 1
    return wide.mul(scale).round().to(torch.uint8)


def _labels(found: Any, path: Path) -> "Tensor":
    import numpy as np
    import torch

    items = found.tolist() if isinstance(found, torch.Tensor | np.ndarray) else found
    if not isinstance(items, list | tuple):
        raise UserError(f"{path}: labels is a {type(items).__name__}, expected one label per image")
    items = [item.item() if hasattr(item, "item") else item for item in items]
    for item in items:
        if type(item) is not int or item < 0:  # `True` is an int as well
            raise UserError(f"{path}: labels: {str(item)[:80]} is not a whole number from 0 on")
    return torch.tensor(items, dtype=torch.int64)
