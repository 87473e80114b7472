"""The commands of balpoe."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run, show_run
from moectl.engine.files import require_file

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
    show_run(run)


_STAGES = {
    "--config": "use --preset NAME or --preset FILE.toml",
    "-c": "use --preset NAME or --preset FILE.toml",
    "--save-dir": "results go into the run folder",
    "--checkpoint": "use --run REF@last, @best or @EPOCH",
    "--experts-checkpoint": "use --run REF@last, @best or @EPOCH",
}
_Plugin = typer.Option(
    "--plugin", "--plugin-checkpoint", help="A saved plug-in: its name in the run, or its file."
)


@command(
    BalpoeSettings,
    ("plugin",),
    train=False,
    dropped=_STAGES,
    alias="--experts-dir",
    standalone=("logits",),
)
def plugin(
    request: Request,
    logits: Annotated[
        Path | None,
        typer.Option("--logits", help="Outputs of any classifier, .npz or .safetensors."),
    ] = None,
    name: Annotated[  # noqa: ARG001 - the request has it
        str | None, typer.Option("--name", help="Name of the plug-in; else the presets.")
    ] = None,
    out: Annotated[  # noqa: ARG001 - the request has it
        Path | None, typer.Option("--out", help="With --logits: the new run folder; must be empty.")
    ] = None,
) -> None:
    """Fit the rule that says when to reject."""
    from moectl.balpoe.plugin import run_plugin

    console.result(*run_plugin(request, logits))


@command(
    BalpoeSettings,
    (),
    train=False,
    dropped=_STAGES,
    alias="--experts-dir",
    standalone=("plugin_file",),
)
def reject(  # noqa: PLR0913 - the options of a command
    request: Request,
    plugin_file: Annotated[str, _Plugin] = "",
    logits: Annotated[
        Path | None, typer.Option("--logits", help="Outputs to judge, .npz or .safetensors.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of images to judge.")
    ] = None,
    target_rate: Annotated[
        float | None, typer.Option("--target-rate", help="Apply the rule fitted for this rate.")
    ] = None,
    cost: Annotated[
        float | None, typer.Option("--cost", help="Apply the rule fitted for this cost.")
    ] = None,
    test_prior: Annotated[
        str,
        typer.Option("--test-prior", help="Class shares of the items: train, uniform, em, a file."),
    ] = "",
    form: Annotated[
        Literal["jsonl", "csv"], typer.Option("--format", help="How the lines are written.")
    ] = "jsonl",
) -> None:
    """Classify new items or abstain, by a fitted rule."""
    from moectl.balpoe.reject import Choice, lines, run_reject

    choice = Choice(plugin_file, logits, images, target_rate, cost, test_prior)
    rows = run_reject(request, choice)
    console.result(rows, lines(rows, form))


@command(BalpoeSettings, ("eval",), train=False, dropped=_STAGES, alias="--experts-dir")
def eval_(
    request: Request,
    plugins: Annotated[list[str] | None, _Plugin] = None,
    rejection: Annotated[
        bool,
        typer.Option("--rejection/--no-rejection", help="Also measure how errors fall by it."),
    ] = True,
) -> None:
    """Measure accuracy, calibration and rejection of a trained run."""
    from moectl.balpoe.eval import run_eval

    console.result(*run_eval(request, plugins or [], rejection))


@command(
    BalpoeSettings,
    ("data", "model", "loss"),
    train=True,
    resumes=False,
    without=(
        "data.augment",
        "data.cutout",
        "loss.mix",
        "loss.mixup_alpha",
        "loss.cutmix_alpha",
        "loss.finetuning_start",
    ),
)
def import_(
    request: Request,
    weights: Annotated[Path, typer.Argument(help="A .pth file with `state_dict`.")],
) -> None:
    """Bring a public .pth of the original code into a run folder."""
    require_file(weights)
    from moectl.balpoe.train import import_weights

    with open_run(request) as run:
        import_weights(weights, run.settings, run)
    show_run(run)
