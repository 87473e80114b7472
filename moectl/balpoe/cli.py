"""The commands of balpoe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run
from moectl.engine.errors import UserError

_DROPPED = {
    "--config": "use --preset NAME or --preset FILE.toml",
    "-c": "use --preset NAME or --preset FILE.toml",
    "--device": "use CUDA_VISIBLE_DEVICES, or --cpu",
    "-d": "use CUDA_VISIBLE_DEVICES, or --cpu",
    "--log-config": "logs go to log.txt in the run folder",
    "-l": "logs go to log.txt in the run folder",
    "--val": "every epoch is validated",
    "--validate": "every epoch is validated",
    "--n-gpu": "start several processes with accelerate launch or torchrun",
    "--save-dir": "use --out DIR for the run folder, or MOECTL_RUNS for the folder of all runs",
    "--randaugm": "use --augment autoaugment",
    "--trivialaugm": "use --augment trivial",
    "--target-mix-strategy": "inputs are mixed (mix_input); mix_logits needs a teacher",
    "--track-expert-losses": "the loss of every expert is always logged",
}


def _size(settings: Any) -> dict[str, Any]:
    from moectl.balpoe.train import size

    return size(settings)


@command(
    BalpoeSettings,
    ("data", "model", "loss", "optim", "schedule", "train", "eval"),
    train=True,
    size=_size,
    dropped=_DROPPED,
)
def train(request: Request) -> None:
    """Train the experts."""
    from moectl.balpoe.train import train as run_training

    with open_run(request) as run:
        run_training(run.settings, run)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))


@command(
    BalpoeSettings,
    ("eval",),
    train=False,
    dropped={
        "--experts-dir": "use --run REF",
        "--checkpoint": "use --run REF@last, @best or @EPOCH",
    },
)
def eval_(request: Request) -> None:
    """Measure accuracy and calibration of a trained run."""
    from moectl.balpoe.eval import run_eval

    settings: Any = request.settings
    console.result(*run_eval(settings, request.run, request.cpu))


@command(BalpoeSettings, ("data", "model", "loss"), train=True)
def import_(
    request: Request,
    weights: Annotated[Path, typer.Argument(help="A .pth file with `state_dict`.")],
) -> None:
    """Bring a public .pth of the original code into a run folder."""
    from moectl.balpoe.train import import_weights

    if request.folder:
        raise UserError("import makes a new run, it does not go on with one", "leave --resume out")
    with open_run(request) as run:
        import_weights(weights, run.settings, run)
    console.result({**run.record, "folder": str(run.folder)}, str(run.folder))
