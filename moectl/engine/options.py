"""Typer options: one for every flagged field, and those that all commands share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from moectl.engine import presets
from moectl.engine.settings import Flag


def flag_of(info: FieldInfo) -> Flag | None:
    """Return the mark of a field that has an option of its own."""
    return next((item for item in info.metadata if isinstance(item, Flag)), None)


def python_name(key: str) -> str:
    """Return the parameter name of a dotted key."""
    return key.replace(".", "__")


def field_option(key: str, info: FieldInfo) -> inspect.Parameter:
    """Return the option of a flagged field; None means that it was not given."""
    flag = flag_of(info)
    assert flag is not None, f"{key} has no flag"
    section, field = key.split(".")
    names = list(flag.names or (f"--{field.replace('_', '-')}",))
    kind = _option_type(info)
    if kind is bool:
        names[0] = f"{names[0]}/--no-{names[0].removeprefix('--')}"
    default = shown(info.default)
    option = typer.Option(
        *names,
        help=f"{info.description} Default: {default}." if default else info.description,
        show_default=False,
        rich_help_panel=section.capitalize(),
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


def _complete_runs(room: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        from moectl.engine.references import all_runs

        names = ["latest", "auto", *(folder.name for folder, _ in all_runs(room))]
        return [name for name in names if name.startswith(incomplete)]

    return complete


COMMON = (
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
)


def common_options(room: str, train: bool) -> list[inspect.Parameter]:
    """Return the options that every command of a system has."""
    option = functools.partial(typer.Option, rich_help_panel="Run")
    rows: list[tuple[str, Any, Any, Any]] = [
        (
            "preset",
            list[str],
            [],
            option(
                "--preset",
                "-p",
                help="Preset name or TOML file; later ones win.",
                autocompletion=_complete_presets(room),
            ),
        ),
        (
            "set",
            list[str],
            [],
            option("--set", metavar="KEY=VALUE", help="Any setting, for instance optim.lr=0.05."),
        ),
    ]
    if train:
        rows += [
            (
                "name",
                str | None,
                None,
                option("--name", help="Name of the run folder.", show_default="the presets"),
            ),
            (
                "out",
                Path | None,
                None,
                option(
                    "--out", help="The run folder itself; must be empty.", show_default="runs/…"
                ),
            ),
            (
                "resume",
                str | None,
                None,
                option(
                    "--resume",
                    "-r",
                    metavar="REF|auto",
                    help="Go on with a run; auto: the newest unfinished of this name, or a new.",
                    autocompletion=_complete_runs(room),
                ),
            ),
        ]
    else:
        rows.append(
            (
                "run",
                str,
                "latest",
                option(
                    "--run",
                    metavar="REF",
                    help="The run to read: path, name, latest, each with @best, @last or @EPOCH.",
                    autocompletion=_complete_runs(room),
                ),
            )
        )
    rows += [
        (
            "dry_run",
            bool,
            False,
            option(
                "--dry-run",
                "-n",
                help="Show every setting with its origin and the size of the job; do nothing.",
            ),
        ),
        ("cpu", bool, False, option("--cpu", help="Stay on the CPU.")),
        ("quiet", bool, False, option("--quiet", "-q", help="Only warnings and errors on stderr.")),
        ("json", bool, False, option("--json", help="The result as one JSON document on stdout.")),
        ("debug", bool, False, option("--debug", help="Full traceback on errors.")),
    ]
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )
        for name, kind, default, info in rows
    ]
