"""What a sweep file asks for: the cells of a grid, checked before any of them is trained."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from typer import TyperException

from moectl.cli import CONTENTS, leaf
from moectl.engine import presets
from moectl.engine.errors import UserError
from moectl.engine.files import sha256
from moectl.engine.options import python_name
from moectl.engine.run import runs_root
from moectl.engine.settings import Section, Settings, dump, fields, flatten, nearest, resolve
from moectl.engine.toml import read_toml
from moectl.tools.rooms import rooms, settings_class

MAX_CELLS = 1000
SEED = "train.seed"

_EXAMPLES = {"command": '"balpoe train"', "seeds": "[1, 2, 3]"}
_NOT_HERE = {
    "preset": 'presets = ["NAME"] says that',
    "set": "a table [settings] says that",
    "name": "cells are named after their values",
    "out": "cells have their folders inside that of the sweep",
    "output_dir": "cells have their folders inside that of the sweep",
    "resume": "the same sweep once more goes on with its cells",
    "run": 'each cell is measured by itself; weights = "best" names its weights',
    "dry_run": "moectl sweep --dry-run lists the cells",
    "quiet": "moectl sweep --quiet says that",
    "json": "moectl sweep --json says that",
}
"""Options that are not for the commands of a sweep, and what is there instead."""


class SweepFile(Section):
    """The keys of a sweep file."""

    command: str
    """A training command with its options that are no settings, as `balpoe train --cpu`."""
    seeds: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
    """Values of train.seed; every point of the grid is trained with each."""
    presets: tuple[str, ...] = ()
    """Presets or TOML files of all cells; later ones win."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of all cells, by dotted key."""
    grid: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ: dotted key to the list of its values."""
    eval: str = ""
    """A command that measures each trained cell; empty takes the scores of the training."""
    weights: Annotated[str, Field(pattern=r"^(best|last|\d+)?$")] = ""
    """Which weights `eval` reads: best, last or an epoch; empty leaves it to that command."""
    metrics: tuple[str, ...] = ()
    """Scores in the table; empty for all."""
    name: str = ""
    """Name of the sweep; empty for that of the file."""


@dataclass(frozen=True)
class Cell:
    """One training of a sweep."""

    name: str
    point: dict[str, Any]
    """Dotted key of the grid to the value here."""
    seed: int
    words: list[str]
    """The command without `moectl` and without the folder."""
    settings: dict[str, Any]
    """Every dotted key to what it is trained with."""


@dataclass(frozen=True)
class Plan:
    """A sweep whose cells are known to be valid."""

    name: str
    file: str
    folder: Path
    command: str
    eval: list[str]
    """The measuring command without `moectl` and without the run; nothing if there is none."""
    weights: str
    metrics: list[str]
    axes: dict[str, list[Any]]
    seeds: list[int]
    settings: dict[str, Any]
    """What all cells have in common: every dotted key but those of the axes and the seed."""
    cells: list[Cell]


@dataclass(frozen=True)
class _Command:
    """A command line of a room, parsed but not run."""

    room: str
    words: list[str]
    given: dict[str, Any]
    """Settings that its options set, by dotted key."""


def read_plan(path: Path, out: Path | None = None) -> Plan:
    """Read a sweep file and check everything that can be checked without training.

    Args:
        path: the TOML file.
        out: folder of the sweep; under the folder of all runs if not given.

    Raises:
        UserError: naming file and key of whatever is wrong.
    """
    file = _read(path)
    with _inside(f"{path}"):
        name = presets.check_name(file.name or path.stem, "sweep name")
    with _inside(f"{path}: command"):
        command = _parse(file.command, reads=False)
    measuring = _measuring(file, path, command)
    cls = settings_class(command.room)
    with _inside(f"{path}: presets"):
        files = [presets.find(command.room, reference).path for reference in file.presets]
    fixed, axes = flatten(file.settings), flatten(file.grid)
    for table, keys in (("settings", fixed), ("grid", axes)):
        with _inside(f"{path}: {table}"):
            _check_keys(cls, keys, command.given)
    with _inside(f"{path}: grid"):
        _check_axes(axes, fixed, len(file.seeds))
    cells = []
    for *values, seed in product(*axes.values(), file.seeds):
        point = dict(zip(axes, values, strict=True))
        texts = {key: _text(value) for key, value in {**fixed, **point, SEED: seed}.items()}
        assignments = [f"{key}={text}" for key, text in texts.items()]
        with _inside(f"{path}"):
            settings, _ = resolve(cls, command.given, assignments, files)
        layers = [f"--preset={reference}" for reference in file.presets]
        words = [*command.words, *layers, *(f"--set={text}" for text in assignments)]
        cells.append(Cell(_cell_name(point, seed), point, seed, words, flatten(dump(settings))))
    with _inside(f"{path}"):
        _check_distinct(cells)
    own = {*axes, SEED}
    return Plan(
        name=name,
        file=str(path),
        folder=out or runs_root() / "sweep" / name,
        command=shlex.join(command.words),
        eval=measuring.words if measuring else [],
        weights=file.weights,
        metrics=list(file.metrics),
        axes=axes,
        seeds=file.seeds,
        settings={key: value for key, value in cells[0].settings.items() if key not in own},
        cells=cells,
    )


def short(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted key where no other key has the same, nor the seeds."""
    tails = [key.rpartition(".")[2] for key in keys]
    unique = {tail for tail in tails if tails.count(tail) == 1} - {"seed"}
    return [tail if tail in unique else key for key, tail in zip(keys, tails, strict=True)]


def words_of(point: Mapping[str, Any]) -> str:
    """Write a point of the grid as `lr=0.1,momentum=0.9`."""
    values = zip(short(list(point)), point.values(), strict=True)
    return ",".join(f"{key}={_text(value)}" for key, value in values)


def _read(path: Path) -> SweepFile:
    try:
        return SweepFile(**read_toml(path))
    except ValidationError as error:
        lines = [f"{path}: {_explain(entry)}" for entry in error.errors()]
        raise UserError("\n".join(lines), f"keys: {', '.join(SweepFile.model_fields)}") from None


def _explain(entry: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{key}: no such key of a sweep{nearest(key, list(SweepFile.model_fields))}"
    if entry["type"] == "missing":
        return f"{key}: missing, for instance {key} = {_EXAMPLES[key]}"
    return f"{key} = {entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"


@contextmanager
def _inside(place: str) -> Iterator[None]:
    """Put the place in front of every line of a complaint."""
    try:
        yield
    except UserError as error:
        lines = [f"{place}: {line.removeprefix('--set: ')}" for line in error.message.splitlines()]
        raise UserError("\n".join(lines), error.hint) from None


def _parse(text: str, *, reads: bool) -> _Command:
    """Parse a command line that makes runs, or one that reads them."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r}: {error}") from None
    words = words[1:] if words[:1] == ["moectl"] else words
    room, verb = (*words, "", "")[:2]
    known = [f"{one} {other}" for one in rooms() for other in CONTENTS[one][1]]
    if f"{room} {verb}" not in known:
        raise UserError(
            f"{text!r}: no such command{nearest(f'{room} {verb}', known)}",
            'a system and a command of it, for instance "balpoe train"',
        )
    context = _context(room, verb, words[2:])
    wanted = "run" if reads else "resume"
    if wanted not in context.params:
        what = "reads no runs" if reads else "trains nothing"
        raise UserError(f"{text!r}: {room} {verb} {what}")
    for name, instead in _NOT_HERE.items():
        if name in context.params and context.get_parameter_source(name).name == "COMMANDLINE":
            raise UserError(f"--{name.replace('_', '-')} is not for here: {instead}")
    named = {key: context.params.get(python_name(key)) for key in fields(settings_class(room))}
    given = {key: value for key, value in named.items() if value is not None}
    return _Command(room, words, given)


def _context(room: str, verb: str, words: Sequence[str]) -> Any:
    if asked := {"--help", "-h"} & set(words):
        raise UserError(f"{asked.pop()} is not for here")
    spelled = {"token_normalize_func": lambda token: token.replace("_", "-")}
    try:
        return leaf(room, verb).make_context(f"moectl {room} {verb}", list(words), **spelled)
    except TyperException as error:
        raise UserError(error.format_message(), f"moectl {room} {verb} --help") from None


def _measuring(file: SweepFile, path: Path, command: _Command) -> _Command | None:
    """Return the command that measures, if there is one."""
    if not file.eval:
        if file.weights:
            raise UserError(f"{path}: weights = {file.weights!r}: goes with eval")
        return None
    with _inside(f"{path}: eval"):
        found = _parse(file.eval, reads=True)
        if found.room != command.room:
            raise UserError(f"{file.eval!r}: of {found.room}, but {command.room} is trained")
        resolve(settings_class(found.room), found.given, [], [])
    return found


def _check_keys(cls: type[Settings], keys: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    known = fields(cls)
    for key, value in keys.items():
        if key == SEED:
            raise UserError(f"{key}: seeds = […] says that")
        if key in SweepFile.model_fields:
            raise UserError(f"{key}: belongs to the top of the file, above all [tables]")
        if key not in known:
            raise UserError(
                f"{key}: no such setting{nearest(key, known)}",
                "moectl presets show ROOM lists every key",
            )
        if key in given:
            raise UserError(f"{key}: an option of the command sets it already")
        if not _plain(value):
            raise UserError(f"{key}: expected text, numbers, true or false, or lists of these")


def _check_axes(axes: Mapping[str, Any], fixed: Mapping[str, Any], seeds: int) -> None:
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{key} = {_text(values)}: expected a list of one value or more")
        if key in fixed:
            raise UserError(f"{key}: in [settings] as well, but a cell has one value")
    count = math.prod(map(len, axes.values())) * seeds
    if count > MAX_CELLS:
        raise UserError(f"{count:,} cells, more than {MAX_CELLS:,}")


def _check_distinct(cells: Sequence[Cell]) -> None:
    seen: dict[str, str] = {}
    for cell in cells:
        key = json.dumps(cell.settings, sort_keys=True)
        if key in seen:
            raise UserError(f"{seen[key]} and {cell.name}: the same training twice")
        seen[key] = cell.name


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    return isinstance(value, str | bool | int | float)


def _text(value: Any) -> str:
    """Write a value as `--set` reads it; JSON of plain values is TOML as well."""
    bare = isinstance(value, str) and value == value.strip() and value[:1] not in tuple("[{\"'")
    return value if bare else json.dumps(value, ensure_ascii=False, default=str)


def _cell_name(point: Mapping[str, Any], seed: int) -> str:
    """Return a name that a folder can have; a digest tells apart what had to change."""
    text = words_of(point)
    name = re.sub(r"[^A-Za-z0-9=,._+-]+", "-", text)
    if name != text or len(name) > 80:
        name = f"{name[:60]}-{sha256(text.encode())[:8]}"
    return ",".join([name] * bool(name) + [f"seed={seed}"])
