"""The commands of taskmoe."""

from typing import Annotated

import typer

from moectl.engine import console
from moectl.engine.command import Request, command, open_run
from moectl.taskmoe.settings import TaskmoeSettings

_SECTIONS = ("data", "model", "optim", "schedule", "train")


@command(TaskmoeSettings, (*_SECTIONS, "specialist"), train=True)
def specialist(request: Request) -> None:
    """Train one of the specialists."""
    from moectl.taskmoe.specialist import train_specialist

    with open_run(request) as run:
        train_specialist(run.settings, run)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))


@command(TaskmoeSettings, ("data", "model", "merge"), train=True)
def merge(
    request: Request,
    specialists: Annotated[
        str, typer.Option("--specialists", help="Runs or files, one for each, with commas.")
    ] = "",
) -> None:
    """Merge the specialists into one gated mixture."""
    from moectl.taskmoe.stages import merge as run_merge

    with open_run(request) as run:
        run_merge(run.settings, run, [part for part in specialists.split(",") if part])
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))


@command(TaskmoeSettings, (*_SECTIONS, "gate", "loss"), train=True)
def train(
    request: Request,
    merged: Annotated[
        str, typer.Option("--merged", help="Run of the merge; the newest of the task if not given.")
    ] = "",
) -> None:
    """Train the mixture."""
    from moectl.taskmoe.stages import find_merged
    from moectl.taskmoe.train import train as run_training

    start = None if request.folder else find_merged(request.settings, merged)
    with open_run(request) as run:
        run_training(run.settings, run, start)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))
