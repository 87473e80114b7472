"""Image files as they should not be, and some that are only unusual."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = {
    "cut.png": "not a readable image (image file is truncated)",
    "empty.png": "not a readable image",
    "text.png": "not a readable image",
    "huge.png": "not a readable image (more than 90 million pixels)",
    "huge.jpg": "not a readable image (more than 90 million pixels)",
    "large.png": "not a readable image (more than 90 million pixels)",
}
"""What is said of each behind its name. Pillow would read the last, with a warning."""
ABSENT = {"folder.png": "not a readable image (Is a directory)", "gone.png": "no such image"}
"""What is said of a name behind which there is no file."""
UNUSUAL = ("cmyk.jpg", "deep.png", "metadata.jpg", "palette.png")
"""They are read like any other; Pillow warns about the last two."""


def write(folder: Path, name: str) -> Path:
    """Write one of the files; return its path."""
    path = folder / name
    if name == "folder.png":
        path.mkdir()
    elif name == "gone.png":
        path.symlink_to(folder / "nowhere.png")
    else:
        path.write_bytes(_content(name))
    return path


def _content(name: str) -> bytes:
    match name:
        case "empty.png":
            return b""
        case "text.png":
            return b"no image"
        case "huge.png":
            return promising(50_000)
        case "large.png":
            return promising(12_000)
        case "huge.jpg":
            data = bytearray(_noise("jpeg"))
            height = data.find(b"\xff\xc0") + 5
            data[height : height + 4] = struct.pack(">HH", 50_000, 50_000)
            return bytes(data)
        case "cmyk.jpg":
            return _noise("jpeg", "CMYK")
        case "deep.png":
            deep = np.linspace(0, 65535, 24 * 20).reshape(20, 24).astype(np.uint16)
            return _encoded(Image.fromarray(deep), "png")
        case "metadata.jpg":
            return _noise("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\x00")
        case "palette.png":
            return _noise("png", "P", transparency=bytes(range(200)))
    whole = _noise("png")
    return whole[: len(whole) // 2]


def _noise(form: str, mode: str = "RGB", **options: bytes) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return _encoded(Image.fromarray(pixels).convert(mode), form, **options)


def _encoded(image: Image.Image, form: str, **options: bytes) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def promising(side: int) -> bytes:
    """A square PNG of a few bytes: its head is true, its pixels are missing."""

    def part(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = part(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + pixels + part(b"IEND", b"")
