"""DICOM files as brightness in 0..1; reading them needs pydicom.

Legend: H W pixels.
"""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moectl.engine.errors import UserError
from moectl.engine.images import MOST_PIXELS, TOO_LARGE

DICOM_SUFFIXES = (".dicom", ".dcm")
_PERCENTILES = (0.5, 99.5)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its suffix, or by its head if the suffix says nothing."""
    if path.suffix.lower() in {*DICOM_SUFFIXES, ".png", ".jpg", ".jpeg"}:
        return path.suffix.lower() in DICOM_SUFFIXES
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def need_pydicom(path: Path) -> Any:
    """Return pydicom.

    Raises:
        UserError: if pydicom is not installed.
    """
    try:
        return import_module("pydicom")
    except ImportError:
        raise UserError(
            f"{path}: DICOM files need pydicom, which is not installed",
            'pip install "moectl[medical]"',
        ) from None


def dicom_size(path: Path) -> tuple[int, int]:
    """Return height and width.

    Raises:
        UserError: naming the file.
    """
    dataset = _dataset(path, pixels=False)
    try:
        return int(dataset.Rows), int(dataset.Columns)
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path}: not a readable DICOM image (no Rows and Columns)") from None


def read_dicom(path: Path) -> NDArray[np.float32]:
    """Read an image as float32 in 0..1, (H, W) if it is grey or (H, W, 3).

    The modality LUT comes first, then the VOI LUT or window of the file; without one, the 0.5 and
    99.5 percentiles become 0 and 1. MONOCHROME1, where high values are dark, is inverted.

    Raises:
        UserError: naming the file, if it is damaged or needs what is not installed.
    """
    dataset = _dataset(path, pixels=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd but harmless elements
            return _brightness(dataset)
    # A decoder for compressed pixels that is missing is a RuntimeError, as is its failure.
    except (
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: not a readable DICOM image ({reason})") from None


def _dataset(path: Path, *, pixels: bool) -> Any:
    pydicom = need_pydicom(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except pydicom.errors.InvalidDicomError:
        raise UserError(f"{path}: not a readable DICOM image (no DICOM header)") from None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: not a readable DICOM image ({error})") from None


def _brightness(dataset: Any) -> NDArray[np.float32]:
    pixels: Any = import_module("pydicom.pixels")
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise ValueError(f"{dataset.NumberOfFrames} frames, expected one")
    if int(dataset.Rows) * int(dataset.Columns) > MOST_PIXELS:
        raise ValueError(TOO_LARGE)
    raw = pixels.pixel_array(dataset)
    if raw.ndim == 3:
        return raw.astype(np.float32) / np.float32(2 ** int(dataset.BitsStored) - 1)
    if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"pixels are {dataset.PhotometricInterpretation}, expected grey or RGB")
    values = pixels.apply_modality_lut(raw, dataset)
    if any("LUTData" in table for table in dataset.get("VOILUTSequence") or ()):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        shown = pixels.apply_voi_lut(values, dataset) / (2**bits - 1)
    elif all(dataset.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth")):
        function = dataset.get("VOILUTFunction") or "LINEAR"
        shown = windowed(
            values, _first(dataset.WindowCenter), _first(dataset.WindowWidth), function
        )
    else:
        shown = stretched(values)
    if not np.isfinite(shown).all():
        raise ValueError("pixels, or their window, are no finite numbers")
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    return np.clip(1 - shown if inverted else shown, 0, 1).astype(np.float32)


def _first(value: Any) -> float:
    """Return the first of several windows; they are alternatives."""
    return float(value) if isinstance(value, int | float | str) else float(value[0])


def windowed(
    values: NDArray[Any], centre: float, width: float, function: str = "LINEAR"
) -> NDArray[np.float64]:
    """Map a window of values to 0..1 and cut off what lies outside.

    Raises:
        ValueError: if the width or the function is not one of the standard.

    Source: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    """
    values = values.astype(np.float64)
    if function == "SIGMOID" and width > 0:
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT" and width > 0:
        return ((values - centre) / width + 0.5).clip(0, 1)
    if function != "LINEAR" or width < 1:
        raise ValueError(f"window of width {width:g} with function {function}")
    # A window of width 1 is a threshold just above centre - 1/2.
    slope = (values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5
    return slope.clip(0, 1)


def stretched(values: NDArray[Any]) -> NDArray[np.float64]:
    """Map the 0.5 and 99.5 percentiles to 0 and 1, or the extremes where these are equal.

    Raises:
        ValueError: if all values are equal: that is no picture of anything.
    """
    values = values.astype(np.float64)
    low, high = np.percentile(values, _PERCENTILES)
    if low == high:
        low, high = values.min(), values.max()
    if low == high:
        raise ValueError(f"all pixels are {low:g}")
    return ((values - low) / (high - low)).clip(0, 1)
