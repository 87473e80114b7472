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

Found = tuple[Path, dict[str, Any]]
"""The folder of a run, and its record."""


def all_runs(room: str | None = None) -> list[Found]:
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
        room: the system that the run must be of; any if None.
        status: for `latest`, only runs in this status.
        commands: for `latest`, only runs that one of these made; all if there are none.

    Raises:
        UserError: if there is no such run, or several, or it is of another system.
    """
    folder = _folder(reference, room, status, commands)
    theirs = read_record(folder).get("room", room)
    if room is not None and theirs != room:
        raise UserError(f"{folder}: a run of {theirs}, expected one of {room}")
    return folder


def _folder(reference: str, room: str | None, status: str, commands: Sequence[str]) -> Path:
    path = Path(reference)
    if is_file(path / "run.json") or is_folder(path):
        return path
    owner, slash, name = reference.rpartition("/")
    if slash and (owner in ("", ".", "..") or "/" in owner):
        raise _nothing(reference, "no such run folder", all_runs(room))
    runs = all_runs(owner or room)
    if name == "latest":
        return _latest(runs, owner or room, status, commands)
    matching = [folder for folder, _ in runs if folder.name == name]
    matching = matching or [folder for folder, record in runs if _begins(folder, record, name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in matching[:8])
        raise UserError(f"{reference}: {len(matching)} runs begin like this", f"one of {names}")
    raise _nothing(reference, f"no such run under {runs_root()}", runs)


def _nothing(reference: str, what: str, runs: Sequence[Found]) -> UserError:
    near = nearest(Path(reference).name, [folder.name for folder, _ in runs])
    return UserError(f"{reference}: {what}{near}", "moectl runs list shows them all")


def _latest(runs: Sequence[Found], room: str | None, status: str, commands: Sequence[str]) -> Path:
    for folder, record in runs:
        if status in ("", record.get("status")) and (
            not commands or record.get("command") in commands
        ):
            return folder
    kind = " ".join(word for word in (status, " or ".join(commands), "run") if word)
    makes = f"moectl {room} {[*commands, 'train'][0]} makes one; " if room else ""
    raise UserError(
        f"no {kind} of {room or 'any system'} under {runs_root()}",
        f"{makes}moectl runs list shows what there is",
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


def finished_runs(room: str, command: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return (folder, record) of the finished runs that a command made, newest first."""
    return [
        (folder, record)
        for folder, record in all_runs(room)
        if record.get("command") == command and record.get("status") == "finished"
    ]


def exact(reference: str, folder: Path | None = None, default: str = "best") -> str:
    """Let a reference to a run say which of its weights are meant; one to a file does.

    Args:
        reference: to weights, see `find_weights`.
        folder: of the run, where it is known already: `latest` alone does not say of which command.
        default: `best`, `last` or an epoch, taken where the reference does not say.
    """
    if is_file(Path(reference)):
        return reference
    name, wanted = split_reference(reference)
    return f"{folder or name}@{wanted or default}"
