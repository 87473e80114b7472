"""Reading images from files."""

from pathlib import Path
from typing import Any

from moectl.engine.errors import UserError


def check_image(path: str | Path) -> None:
    """Make sure that a file begins as an image does; its pixels are not decoded.

    Raises:
        UserError: naming the file, if it is missing or no image.
    """
    from PIL import Image

    try:
        Image.open(path).close()
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path}: not a readable image") from None


def read_image(path: str | Path) -> Any:
    """Open an image as RGB.

    Raises:
        UserError: naming the file, if it is missing or no image.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits: converting would cut them off, not scale
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path}: not a readable image") from None
