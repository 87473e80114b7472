"""Finding runs by a short name: a path, `latest`, `NAME` or `ROOM/NAME`, with `@best|@last|@N`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moectl.engine.errors import UserError
from moectl.engine.files import is_file, is_folder
from moectl.engine.run import read_record, runs_root
from moectl.engine.settings import nearest
from moectl.engine.tracking import loads_or_none


def all_runs(room: str | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Return (folder, record) of every run, newest first; folders without a record are left out."""
    found = []
    for record_file in runs_root().glob("*/*/run.json"):
        if room is not None and record_file.parts[-3] != room:
            continue
        record = loads_or_none(record_file)
        if isinstance(record, dict):
            found.append((record_file.parent, record))
    return sorted(
        found, key=lambda run: (str(run[1].get("started", "")), run[0].name), reverse=True
    )


def split_reference(reference: str) -> tuple[str, str]:
    """Split off a final `@best`, `@last` or `@EPOCH`; an @ elsewhere belongs to the path."""
    match = re.fullmatch(r"(.*)@(best|last|\d+)", reference)
    return (match[1], match[2]) if match else (reference, "")


def find_run(
    reference: str, room: str | None = None, status: str = "", commands: Sequence[str] = ()
) -> Path:
    """Return the folder of the run that a reference names.

    Args:
        reference: a path, `latest`, the beginning of a run's name, or `ROOM/NAME`.
        room: the system to look in, if the reference does not say.
        status: for `latest`, only runs in this status.
        commands: for `latest`, only runs that one of these made; all if there are none.

    Raises:
        UserError: if there is no such run, or several.
    """
    path = Path(reference)
    if is_file(path / "run.json"):
        return path
    if is_folder(path):
        read_record(path)
    if "/" in reference:
        room, _, reference = reference.partition("/")
    runs = all_runs(room)
    if reference == "latest":
        matching = [
            folder
            for folder, record in runs
            if (not status or record.get("status") == status)
            and (not commands or record.get("command") in commands)
        ]
        if not matching:
            kind = " ".join(word for word in (status, " or ".join(commands), "run") if word)
            raise UserError(f"no {kind} of {room or 'any system'} under {runs_root()}")
        return matching[0]
    matching = [folder for folder, _ in runs if folder.name == reference]
    matching = matching or [folder for folder, record in runs if _begins(folder, record, reference)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in matching[:8])
        raise UserError(f"{reference}: {len(matching)} runs begin like this", f"one of {names}")
    known = [folder.name for folder, _ in runs]
    raise UserError(
        f"{reference}: no such run under {runs_root()}{nearest(reference, known)}",
        "moectl runs list shows them all",
    )


def _begins(folder: Path, record: dict[str, Any], reference: str) -> bool:
    """Whether a run's name begins so, at a word's end: cifar100_ir10 is not cifar100_ir100."""
    if not folder.name.startswith(reference):
        return False
    whole_word = not folder.name[len(reference) : len(reference) + 1].isalnum()
    return whole_word or reference.startswith(str(record.get("name", folder.name)))


def find_weights(reference: str, room: str | None = None) -> Path:
    """Return the weights file that a reference names: a path, or a run with `@…`.

    Raises:
        UserError: if the run has no such weights.
    """
    if is_file(Path(reference)):
        return Path(reference)
    name, wanted = split_reference(reference)
    folder = find_run(name, room, status="finished")
    wanted = wanted or "last"
    entries = read_record(folder).get("weights", [])
    plain = [entry for entry in entries if not entry["best"]]
    if wanted == "best":
        plain = [entry for entry in entries if entry["best"]]
    elif wanted != "last":
        plain = [entry for entry in plain if str(entry["epoch"]) == wanted]
    if plain:
        return folder / str(plain[-1]["file"])  # in the order in which they were written
    have = ", ".join("@best" if entry["best"] else f"@{entry['epoch']}" for entry in entries)
    raise UserError(f"{folder}: no weights @{wanted}", f"it has: {have or 'none yet'}")


def newest_unfinished(room: str, name: str, command: str) -> Path | None:
    """Return the newest run of this name and command that is not finished.

    It serves schedulers that restart jobs.
    """
    for folder, record in all_runs(room):
        unfinished = record.get("status") != "finished"
        # What failed before its first checkpoint has nothing to go on with.
        begun = record.get("checkpoint") or any(folder.rglob("checkpoints"))  # of its parts, too
        stillborn = record.get("status") == "failed" and not begun
        same = record.get("name") == name and record.get("command", command) == command
        if same and unfinished and not stillborn:
            return folder
    return None
