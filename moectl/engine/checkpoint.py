"""Training state on disk: a folder that is complete, or not there.

Written under a temporary name, every file synced, a manifest with sizes and checksums last, then
renamed. What the manifest does not vouch for is never read.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moectl.engine.errors import UserError
from moectl.engine.files import sha256, sync_folder

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"update-(\d{8})")


class Corrupt(Exception):  # noqa: N818 - a finding about a folder
    """A checkpoint that cannot be trusted: the message names the file and why."""


class Streamed(NamedTuple):
    """A file too large to be held in memory once more before it is written."""

    size: int
    """Bytes, about."""
    write: Callable[[BinaryIO], object]


Content = bytes | Streamed


def save(root: Path, update: int, files: Mapping[str, Content], facts: Mapping[str, Any]) -> Path:
    """Write a checkpoint and return its folder; rewriting the same update replaces it.

    Raises:
        OSError: if the disk is full or not writable; nothing is left behind then.
    """
    root.mkdir(parents=True, exist_ok=True)
    need = sum(one.size if isinstance(one, Streamed) else len(one) for one in files.values())
    if shutil.disk_usage(root).free < need * 1.2 + 2**20:
        raise OSError(f"disk full: {root} has no room for a checkpoint of {need / 2**20:.0f} MiB")
    final, staging = root / f"update-{update:08d}", root / f".part-{update:08d}-{os.getpid()}"
    try:
        staging.mkdir()
        with ThreadPoolExecutor(1) as beside:  # a checksum takes about as long as the writing
            sums = {}
            for name, content in files.items():
                _write_synced(staging / name, content)
                sums[name] = beside.submit(_checksum, staging / name)
        entries = {
            name: {"bytes": (staging / name).stat().st_size, "sha256": found.result()}
            for name, found in sums.items()
        }
        manifest = {"format": FORMAT, "update": update, **facts, "files": entries}
        signed = json.dumps({**manifest, "sha256": _signature(manifest)}, indent=2).encode()
        _write_synced(staging / MANIFEST, signed)
        sync_folder(staging)
        if final.exists():
            _remove(final)
        staging.rename(final)
        sync_folder(root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _signature(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest without its own: a flipped digit is no other digit."""
    return sha256(json.dumps({**manifest, "sha256": ""}).encode())


def _write_synced(path: Path, content: Content) -> None:
    with path.open("wb") as file:
        if isinstance(content, Streamed):
            try:
                content.write(file)
            except RuntimeError as error:  # so torch says that the file took no more
                raise OSError(f"{path.name} could not be written ({error})") from None
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files and the manifest of a checkpoint, each file checked against its checksum.

    Raises:
        Corrupt: if anything is missing, extra, or not as the manifest says.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        entries = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{folder / MANIFEST}: missing or not readable ({error})") from None
    if manifest.get("format") != FORMAT:
        raise Corrupt(f"{folder / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT}")
    if manifest.get("sha256") != _signature(manifest):
        raise Corrupt(f"{folder / MANIFEST}: does not match its own checksum")
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(entries):
        raise Corrupt(f"{folder}: holds {sorted(present)}, the manifest lists {sorted(entries)}")
    files = {}
    for name, expected in entries.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise Corrupt(f"{folder / name}: cannot be read ({error.strerror})") from None
        if (len(files[name]), sha256(files[name])) != expected:
            raise Corrupt(f"{folder / name}: does not match its checksum")
    return files, manifest


def existing(root: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def choose(root: Path, *, fall_back: bool) -> Path:
    """Return the newest checkpoint that reads back whole; an empty path if there is none at all.

    Args:
        root: the `checkpoints` folder of a run.
        fall_back: set corrupt ones aside with a warning instead of refusing.

    Raises:
        UserError: if the newest is corrupt and `fall_back` is off, or every one is corrupt.
    """
    clean(root)
    folders = existing(root)
    for folder in folders:
        try:
            read(folder)
        except Corrupt as reason:
            if not fall_back:
                raise UserError(
                    f"corrupt checkpoint: {reason}",
                    "--resume auto falls back to the checkpoint before it",
                ) from None
            log.warning("corrupt checkpoint set aside: %s", reason)
            folder.rename(folder.with_name(f"corrupt-{folder.name}-{os.getpid()}"))
        else:
            return folder
    if folders:
        raise UserError(f"{root}: none of the {len(folders)} checkpoints is readable")
    return Path()


def update_of(folder: Path) -> int:
    """Return the update of a checkpoint folder; -1 for the empty path."""
    return int(folder.name.rpartition("-")[2]) if folder.name else -1


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best; a failure is only a warning."""
    for folder in existing(root)[keep:]:
        if best is None or folder.name != f"update-{best:08d}":
            try:
                _remove(folder)
            except OSError as error:
                log.warning("old checkpoint %s could not be deleted: %s", folder, error)


def clean(root: Path) -> None:
    """Remove what a killed process left half-written."""
    if root.is_dir():
        for path in [*root.glob(".part-*"), *root.glob(".del-*")]:
            shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Delete in two steps, so that a half-deleted folder never has a checkpoint's name."""
    doomed = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
