"""The commands of csr."""

from typing import Annotated, Literal

import typer

from moectl.csr.settings import CsrSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run

_NUMBERS = {"1": "concept", "2": "prototype", "3": "task"}


@command(
    CsrSettings,
    ("data", "model", "concept", "prototype", "task", "optim", "schedule", "train"),
    train=True,
    alias="--exp-name",
    without=("train.epochs",),
)
def train(
    request: Request,
    stage: Annotated[
        Literal["concept", "prototype", "task", "all", "1", "2", "3"],
        typer.Option("--stage", help="What is trained."),
    ] = "all",
) -> None:
    """Train concepts, prototypes and the verdict."""
    from moectl.csr.train import STAGES
    from moectl.csr.train import train as run_training

    stages = [one for one in STAGES if stage in ("all", one) or _NUMBERS.get(stage) == one]
    with open_run(request) as run:
        run_training(run.settings, run, stages)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))


@command(CsrSettings, ("eval",), train=False, reads=("train",))
def eval_(
    request: Request,
    split: Annotated[
        Literal["test", "val"], typer.Option("--split", help="Which images are measured.")
    ] = "test",
) -> None:
    """Measure concepts, verdict and where the network looks."""
    from moectl.csr.eval import run_eval

    console.result(*run_eval(request, split))
