"""Files that are written whole or not at all, and how tables and JSON are read and written."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.engine.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, flush it to disk, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document, whole or not at all; NaN is refused, for JSON has none."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV; the columns are all names in the order in which they first occur."""
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_bytes(path: Path, hint: str = "") -> bytes:
    """Read a file that somebody else wrote.

    Raises:
        UserError: with the hint, if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", hint) from None


def read_text(path: Path, hint: str = "") -> str:
    """Read a text file that somebody else wrote, with or without a byte order mark.

    Raises:
        UserError: if it cannot be read, with the hint, or is not UTF-8.
    """
    try:
        return read_bytes(path, hint).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file that somebody else wrote.

    Raises:
        UserError: if it is missing, not UTF-8 or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def is_file(path: Path) -> bool:
    """Whether a file is there; no for names that the system cannot have."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; no for names that the system cannot have."""
    try:
        return path.is_dir()
    except OSError:
        return False


def require_file(path: Path) -> None:
    """Refuse a file that is not there, before anything heavy is loaded to read it.

    Raises:
        UserError: if there is no such file.
    """
    if not is_file(path):
        raise UserError(f"{path}: no such file")


def require_folder(path: Path) -> None:
    """Refuse a folder that is not there, likewise.

    Raises:
        UserError: if there is no such folder.
    """
    if not is_folder(path):
        raise UserError(f"{path}: no such folder")
