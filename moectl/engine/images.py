"""Reading images from files."""

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 90_000_000
"""Of an image: a small file may promise so many that they fill the memory."""
TOO_LARGE = f"more than {MOST_PIXELS // 10**6} million pixels"

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error)
_PILLOW = re.compile(r"PIL\.")


def check_image(path: str | Path) -> None:
    """Make sure that a file begins as an image does; its pixels are not decoded.

    Raises:
        UserError: as `opened`.
    """
    with opened(path):
        pass


def read_image(path: str | Path) -> Any:
    """Open an image as RGB.

    Raises:
        UserError: as `opened`.
    """
    import numpy as np
    from PIL import Image

    with opened(path) as image:
        if image.mode.startswith("I"):  # 16 bits: converting would cut them off, not scale
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


@contextmanager
def opened(path: str | Path) -> Iterator["Image"]:
    """Open an image file; what is wrong with its pixels comes out inside of the block.

    Raises:
        UserError: naming the file, if it is missing, damaged or no image, or of more
            than `MOST_PIXELS`.
    """
    from PIL import Image

    with readable(path), Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError  # Pillow itself goes up to twice as many
        yield image


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """Say in one sentence why an image cannot be read inside of the block.

    Raises:
        UserError: beginning with the name.
    """
    from PIL import Image, UnidentifiedImageError

    _silence_pillow()
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name}: no such image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: not a readable image ({TOO_LARGE})", "make it smaller") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a readable image") from None
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: not a readable image ({reason})") from None


def _silence_pillow() -> None:
    """Keep what Pillow says about odd metadata off the screen.

    Once and for good: `warnings.catch_warnings` is not for threads, and files are read in some.
    """
    if not any(rule[3] == _PILLOW for rule in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
