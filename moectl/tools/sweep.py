"""`moectl sweep`: a grid of settings times seeds over a training command."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.engine import console
from moectl.engine.errors import Interrupted, RunFailed, UserError
from moectl.engine.files import is_file, is_folder
from moectl.engine.options import Json, Quiet
from moectl.engine.settings import Settings, dump, flatten, free, from_toml
from moectl.engine.signals import StopRequest
from moectl.engine.tracking import loads_or_none
from moectl.tools.rooms import settings_class
from moectl.tools.sweep_cells import Attendant, alone, is_trained
from moectl.tools.sweep_plan import Plan, read_plan
from moectl.tools.sweep_table import chosen, collect, report, tables, write

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
_ANEW = "another name, or --out DIR, makes a new sweep"


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="What is trained, and how.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the sweep.", show_default="runs/sweep/NAME"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A score to show; the file says which, else all."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="List the cells; nothing is done.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train every cell of a grid with every seed, and compare them.

    The same command once more goes on where it was stopped or killed, and tries what failed again.
    """
    console.setup(quiet=quiet, as_json=as_json)
    if launched := [name for name in _LAUNCHERS if name in os.environ]:
        raise UserError(
            f"a sweep starts its cells itself, but a launcher has set {', '.join(launched)}",
            "start it as: moectl sweep FILE.toml, without accelerate or torchrun",
        )
    plan = read_plan(file, out)
    _check_kept(plan)
    if dry_run:
        _show(plan)
        return
    place = "--metric" if metric else f"{file}: metrics:"
    chosen(collect(plan, {}), metric or plan.metrics, place)  # of cells that are done
    document = run_sweep(plan, quiet=quiet)
    metrics = chosen(document, metric or plan.metrics, place)
    report(plan, document, metrics)
    console.result(document, tables(document, metrics))
    if failed := [one["cell"] for one in document["cells"] if one["status"] == "failed"]:
        raise RunFailed(f"{len(failed)} of {len(plan.cells)} cells failed")


def run_sweep(plan: Plan, *, quiet: bool) -> dict[str, Any]:
    """Train and measure what is not done yet, and return the result as a JSON document.

    Raises:
        Interrupted: if a signal stopped it; the same sweep goes on from there.
        UserError: if somebody else works in its folder.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{plan.folder}: cannot be created ({error.strerror})") from None
    stop = StopRequest()
    failures: dict[str, str] = {}
    stop.install()
    try:
        with alone(plan.folder, stop) as lock:
            attendant = Attendant(plan, stop, lock, quiet=quiet)
            for number, cell in enumerate(plan.cells, 1):
                if not attendant.is_done(cell):  # a thousand of them would be written for long
                    write(plan, collect(plan, failures))
                console.log.info("[%d/%d] %s", number, len(plan.cells), cell.name)
                try:
                    if stop:
                        raise Interrupted(stop.reason)
                    attendant.attend(cell)
                except RunFailed as error:
                    failures[cell.name] = str(error)
                    console.log.warning("%s failed: %s", cell.name, error)
                except Interrupted as error:
                    hint = "the same command goes on from here"
                    raise Interrupted(f"{cell.name}: {error}", hint) from None
            document = collect(plan, failures)
            write(plan, document)
    finally:
        stop.restore()
    return document


def _check_kept(plan: Plan) -> None:
    """Refuse a folder whose cells were trained otherwise: they would be compared as if equal."""
    there = [path.suffix for path in plan.folder.iterdir()] if is_folder(plan.folder) else []
    if not set(there) - {".lock", ".part"}:  # killed before its first word
        return
    kept = loads_or_none(plan.folder / "sweep.json")
    if not isinstance(kept, dict) or "settings" not in kept:
        raise UserError(f"{plan.folder}: not empty, and no sweep", "--out names another folder")
    if kept["command"] != plan.command:
        message = f"{plan.folder}: begun with {kept['command']!r}, not {plan.command!r}"
        raise UserError(message, _ANEW)
    cls = settings_class(plan.command.split()[0])
    new = {key: value for key, value in plan.settings.items() if key in kept["settings"]}
    if changed := _changed(cls, new, {key: kept["settings"][key] for key in new}):
        raise UserError(f"{plan.folder}: begun with other settings: {changed}", _ANEW)
    for cell in plan.cells:
        # Folders are named after the last parts of keys, and may stem from an earlier grid.
        folder = plan.folder / cell.name
        if is_trained(folder) and is_file(folder / "settings.toml"):
            old = flatten(dump(from_toml(cls, folder / "settings.toml")))
            if changed := _changed(cls, cell.settings, old):
                raise UserError(f"{folder}: trained with other settings: {changed}", _ANEW)


def _changed(cls: type[Settings], new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    """Write down what differs and may change a score; nothing if all is equal."""
    # Scores may depend on how they are measured, and on longer trainings.
    harmless = {
        key for key, mark in free(cls).items() if not mark.grows and not key.startswith("eval.")
    }
    keys = [key for key in dict.fromkeys((*new, *old)) if key not in harmless]
    return ", ".join(
        f"{key} = {new.get(key)!r} (the sweep has {old.get(key)!r})"
        for key in keys
        if new.get(key) != old.get(key)
    )


def _show(plan: Plan) -> None:
    """Print the cells and their commands."""
    found = collect(plan, {})
    rows = [
        {
            "cell": cell.name,
            "status": one["status"],
            "command": shlex.join(["moectl", *cell.words, f"--out={plan.folder / cell.name}"]),
        }
        for cell, one in zip(plan.cells, found["cells"], strict=True)
    ]
    document = {"folder": str(plan.folder), "cells": rows}
    console.result(document, console.table(list(rows[0]), [list(row.values()) for row in rows]))
