"""`moectl presets`: list, show, check and copy preset files."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from moectl.engine import console
from moectl.engine import presets as files
from moectl.engine.errors import UserError
from moectl.engine.files import write_text
from moectl.engine.options import Json
from moectl.engine.presets import HEADER, Preset
from moectl.engine.settings import (
    Settings,
    dump,
    flatten,
    from_toml,
    nest,
    to_annotated_toml,
)
from moectl.engine.toml import read_toml
from moectl.tools.rooms import check_room, rooms, settings_class

Name = Annotated[str, typer.Argument(help="Name, ROOM/NAME or path of a preset.")]


def list_(
    room: Annotated[str | None, typer.Argument(help="Only presets of this system.")] = None,
    as_json: Json = False,
) -> None:
    """List the presets."""
    console.setup(as_json=as_json)
    found = files.available(check_room(room) if room else None)
    entries = [
        {"room": preset.room, "name": preset.name, "path": str(preset.path), **_header(preset)}
        for preset in found
    ]
    columns = ("room", "name", "expected", "cost")
    rows = [[entry.get(column) for column in columns] for entry in entries]
    console.result(entries, console.table(columns, rows))


def show(
    name: Annotated[str, typer.Argument(help="Preset, or a system for its defaults.")],
    diff: Annotated[
        bool, typer.Option("--diff", help="Only what differs from the defaults.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print a preset with every setting explained."""
    console.setup(as_json=as_json)
    header, settings = "", None
    if name in rooms():
        settings = settings_class(name)()
    else:
        preset = files.find(None, name)
        settings = from_toml(settings_class(_room_of(preset)), preset.path)
        header = "".join(f"# {word}: {text}\n" for word, text in _header(preset).items())
    values = nest(_changes(settings)) if diff else dump(settings)
    text = tomli_w.dumps(values) if diff else to_annotated_toml(settings)
    console.result(values, "\n".join(part for part in (header, text) if part) or "\n")


def validate(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders; all known presets if none.")
    ] = None,
    room: Annotated[
        str, typer.Option("--room", help="The system of files that do not say it themselves.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Check preset files."""
    console.setup(as_json=as_json)
    found = _preset_files(paths or [root for root in files.roots() if root.is_dir()])
    if not found:
        raise UserError("no preset files found", "give a TOML file or a folder that holds some")
    room = check_room(room) if room else ""
    problems = {str(path): lines for path in found if (lines := check(path, room))}
    document = {"checked": [str(path) for path in found], "problems": problems}
    if as_json or not problems:
        plural = "s" if len(found) > 1 else ""
        console.result(document, f"{len(found)} preset{plural} checked, all good")
    if problems:
        lines = [f"{path}: {line}" for path, lines in problems.items() for line in lines]
        count = f"{len(problems)} of {len(found)} presets are wrong"
        unclear = any("which system" in line for line in lines)
        hint = "--room ROOM says for which system files are" if unclear else ""
        raise UserError("\n".join([count, *lines]), hint)


def copy(
    name: Name,
    dest: Annotated[
        Path | None, typer.Argument(help="New file or existing folder; ./NAME.toml if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a preset to a file of your own."""
    console.setup(as_json=as_json)
    preset = files.find(None, name)
    target = dest or Path()
    target = target / preset.path.name if target.is_dir() else target
    if target.suffix != ".toml":
        raise UserError(f"{target}: a preset file ends in .toml")
    files.check_name(target.stem, "preset")
    if target.exists() and not force:
        raise UserError(f"{target}: exists already", "--force replaces it")
    text = preset.path.read_text(encoding="utf-8")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, _renamed(text, preset, target))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    document = {"from": str(preset.path), "to": str(target), "room": _room_of(preset)}
    console.result(document, str(target))


def schema(
    room: Annotated[str, typer.Argument(help="The system.")],
    as_json: Json = False,  # noqa: ARG001 - a schema is JSON with and without it
) -> None:
    """Print the JSON schema of a system's settings."""
    console.setup(as_json=True)
    console.result(settings_class(room).model_json_schema(), "")


def check(path: Path, room: str = "") -> list[str]:
    """Return what is wrong with a preset file, one line each; nothing if it is fine.

    Files that are found by name, which are those in a folder of presets, need a header.

    Args:
        path: the file.
        room: its system, if neither its folder nor its header says it.
    """
    preset = Preset(path.resolve().parent.name, path.stem, path)
    problems: list[str] = []
    try:
        read_toml(path)  # what cannot be read has no other problem
        files.check_name(preset.name, "preset")
        if any(path.resolve().is_relative_to(root.resolve()) for root in files.roots()):
            problems += _header_problems(preset)
        from_toml(settings_class(_room_of(preset, room)), path)
    except UserError as error:
        problems += [
            line.removeprefix(f"{path}: ").removeprefix(f"{path.name}: ")
            for line in error.message.splitlines()
        ]
    return problems


def _header_problems(preset: Preset) -> list[str]:
    header = _header(preset)
    problems = [f"has no line `# {word}: …`" for word in HEADER if not header.get(word)]
    if header.get("command") and not _names(header["command"], preset):
        problems.append(f"`# command:` does not name {preset.name}: {header['command']}")
    return problems


def _preset_files(paths: list[Path]) -> list[Path]:
    """Return the files that paths name, folders searched through, each once."""
    found: dict[Path, Path] = {}
    for path in paths:
        for file in sorted(path.rglob("*.toml")) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _header(preset: Preset) -> dict[str, str]:
    """Return the header; nothing of a file that cannot be read, which `validate` explains."""
    try:
        return preset.header()
    except (OSError, UnicodeDecodeError):
        return {}


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quote
        return command.split()


def _names(command: str, preset: Preset) -> bool:
    names = (preset.name, f"{preset.room}/{preset.name}")
    return any(word in names or Path(word).name == preset.path.name for word in _words(command))


def _room_of(preset: Preset, otherwise: str = "") -> str:
    """Return the system of a preset: its folder says, or, elsewhere, its command."""
    if preset.room in rooms():
        return preset.room
    words = _words(_header(preset).get("command", ""))
    named = [word for word in words if word in rooms()]
    if not named and not otherwise:
        raise UserError(
            f"{preset.path}: cannot tell which system this is for",
            f"put it into a folder named {', '.join(rooms())}, or add `# command: moectl ROOM …`",
        )
    return (named or [otherwise])[0]


def _renamed(text: str, preset: Preset, target: Path) -> str:
    """Let the header's command name the copy; everything else stays as it is."""
    known = [root.resolve() / _room_of(preset) for root in files.roots()]
    name = target.stem if target.resolve().parent in known else str(target)
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            break
        if line.lstrip("# ").startswith("command:"):
            words = [
                shlex.quote(name) if _names(word, preset) else word for word in line.split(" ")
            ]
            lines[number] = " ".join(words).rstrip("\n") + "\n"
    return "".join(lines)


def _changes(settings: Settings) -> dict[str, Any]:
    default = flatten(dump(type(settings)()))
    values = flatten(dump(settings))
    return {key: value for key, value in values.items() if value != default.get(key)}
