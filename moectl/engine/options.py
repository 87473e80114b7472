"""Typer options: one for every flagged field, and those that all commands share."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from moectl.engine import presets
from moectl.engine.settings import option_names

_AS_JSON = "The result as one JSON document on stdout."
_QUIET = "Only warnings and errors on stderr."
Json = Annotated[bool, typer.Option("--json", help=_AS_JSON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help=_QUIET)]


def python_name(key: str) -> str:
    """Return the parameter name of a dotted key."""
    return key.replace(".", "__")


def field_option(key: str, info: FieldInfo, *, of_run: bool = False) -> inspect.Parameter:
    """Return the option of a flagged field; None means that it was not given.

    Args:
        key: dotted.
        info: the field.
        of_run: whether the command reads a run, whose value then is the default.
    """
    names = option_names(key, info)
    assert names, f"{key} has no flag"
    kind = _option_type(info)
    if kind is bool:
        names[0] = f"{names[0]}/--no-{names[0].removeprefix('--')}"
    default = "the run's" if of_run else shown(info.default)
    option = typer.Option(
        *names,
        help=f"{info.description} Default: {default}." if default else info.description,
        show_default=False,
        rich_help_panel=key.partition(".")[0].capitalize(),
    )
    return inspect.Parameter(
        python_name(key),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _option_type(info: FieldInfo) -> Any:
    if info.annotation in (bool, int, float) or get_origin(info.annotation) is Literal:
        return info.annotation
    return Path if Path in (info.annotation, *get_args(info.annotation)) else str


def shown(value: Any) -> str:
    """Write a setting's value for people; nothing for empty ones."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)


def _complete_presets(room: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [
        preset.name for preset in presets.available(room) if preset.name.startswith(incomplete)
    ]


def _complete_runs(room: str, *words: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        from moectl.engine.references import all_runs

        names = ["latest", *words, *(folder.name for folder, _ in all_runs(room))]
        return [name for name in names if name.startswith(incomplete)]

    return complete


COMMON = frozenset(
    {
        "preset",
        "set",
        "name",
        "out",
        "resume",
        "run",
        "dry_run",
        "cpu",
        "quiet",
        "json",
        "debug",
    }
)


def common_options(
    room: str, train: bool | None, alias: str = "", resumes: bool = True
) -> list[inspect.Parameter]:
    """Return the options that every command of a system has, and those of its kind."""
    known = _complete_presets(room)
    kind = _training_options(room, alias)[: 3 if resumes else 2] if train else []
    if train is False:
        kind = [_run_option(_complete_runs(room), alias)]
    every = "Every setting with its origin and the size of the job; nothing is done."
    return [
        _option(list[str], [], "--preset", "-p", "Preset or TOML file; later ones win.", known),
        _option(list[str], [], "--set", help="Any setting, as optim.lr=0.05."),
        *kind,
        _option(bool, False, "--dry-run", "-n", every),
        _option(bool, False, "--cpu", help="Stay on the CPU."),
        _option(bool, False, "--quiet", "-q", _QUIET),
        _option(bool, False, "--json", help=_AS_JSON),
        _option(bool, False, "--debug", help="Full traceback on errors."),
    ]


def _training_options(room: str, alias: str) -> list[inspect.Parameter]:
    go_on = "Go on with a run; auto: the newest unfinished of this name, or a new one."
    known = _complete_runs(room, "auto")
    return [
        _option(str | None, None, "--name", alias, "Name of the run folder; else the presets."),
        _option(Path | None, None, "--out", help="The run folder itself; must be empty."),
        _option(str | None, None, "--resume", "-r", go_on, known, "REF|auto"),
    ]


def _run_option(runs_of: Callable[[str], list[str]], alias: str) -> inspect.Parameter:
    which = "The run to read: path, name or latest (finished, default), with @best, @last, @EPOCH."
    return _option(str | None, None, "--run", alias, which, runs_of, "REF")


def _option(  # noqa: PLR0913 - the columns of a table
    kind: Any,
    default: Any,
    flag: str,
    short: str = "",
    help: str = "",
    complete: Callable[[str], list[str]] | None = None,
    metavar: str | None = None,
) -> inspect.Parameter:
    option = typer.Option(
        *([flag, short] if short else [flag]),
        help=help,
        metavar=metavar,
        autocompletion=complete,
        rich_help_panel="Run",
    )
    return inspect.Parameter(
        flag.removeprefix("--").replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )
