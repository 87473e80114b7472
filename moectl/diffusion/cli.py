"""The commands of diffusion."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.diffusion.settings import DiffusionSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run, show_run
from moectl.engine.errors import RunFailed


def _size(settings: Any) -> dict[str, Any]:
    from moectl.diffusion.size import size

    return size(settings)


_TRAINED = ("data", "model", "process", "loss", "optim", "schedule", "train")
_VARIED = ("model.moe", "model.freq", "model.dsconv", "model.num_experts", "model.k_active")
_DROPPED = {
    "--config": "use --preset: its files are presets here",
    "--device": "use --cpu, or nothing for a GPU",
}


@command(DiffusionSettings, _TRAINED, train=True, size=_size, dropped=_DROPPED)
def train(request: Request) -> None:
    """Train the network that predicts noise."""
    from moectl.diffusion.train import train as run_training

    with open_run(request) as run:
        run_training(run.settings, run)
    show_run(run)


@command(DiffusionSettings, ("sample",), train=False, reads=("train",), alias="--checkpoint")
def sample(
    request: Request,
    num: Annotated[int, typer.Option("--num", min=1, help="Images to make.")] = 64,
    classes: Annotated[
        str,
        typer.Option("--classes", help="Names or numbers with commas, in turn; all, or none."),
    ] = "all",
    save_dir: Annotated[
        Path | None, typer.Option("--save-dir", help="Folder of the images; new, or empty.")
    ] = None,
    npz: Annotated[
        bool, typer.Option("--npz", help="Write them as one array too, for other evaluators.")
    ] = False,
) -> None:
    """Make images."""
    from moectl.diffusion.sample import run_sample

    console.result(*run_sample(request, num, classes, save_dir, npz))


@command(
    DiffusionSettings,
    (*_TRAINED, "sample", "eval"),
    train=True,
    dropped=_DROPPED,
    without=_VARIED,
)
def ablate(  # noqa: PLR0913 - the options of a command
    request: Request,
    no_moe: Annotated[bool, typer.Option("--no-moe", help="A variant without experts.")] = False,
    no_freq: Annotated[
        bool, typer.Option("--no-freq", help="A variant without the frequency module.")
    ] = False,
    no_dsconv: Annotated[
        bool, typer.Option("--no-dsconv", help="A variant with dense convolutions.")
    ] = False,
    num_experts: Annotated[
        str, typer.Option("--num-experts", help="Variants with so many experts, with commas.")
    ] = "",
    k_active: Annotated[
        str, typer.Option("--k-active", help="Variants with so many active experts, with commas.")
    ] = "",
    every: Annotated[
        bool, typer.Option("--all", help="The original's experiments, and a dense control.")
    ] = False,
) -> None:
    """Train variants of the network on equals, and compare them."""
    from moectl.diffusion.report import ablation_text
    from moectl.diffusion.variants import plan

    settings: Any = request.settings
    switches = {"moe": no_moe, "freq": no_freq, "dsconv": no_dsconv}
    off = [name for name, wanted in switches.items() if wanted]
    named = every or off or num_experts or k_active
    wanted = {}
    if named or not request.resume:
        wanted = plan(settings.model, off, num_experts, k_active, every=every)
    from moectl.diffusion.ablate import ablate as run_ablation  # heavy: only once this is right

    with open_run(request) as run:
        document = run_ablation(run, wanted)
    console.result(document, console.Markdown(ablation_text(document)))
    if failed := [row["name"] for row in document["variants"] if "failed" in row]:
        raise RunFailed(f"{', '.join(failed)}: failed, see the table")


@command(
    DiffusionSettings,
    ("data", "model"),
    train=None,
    without=("data.name", "data.root", "data.hflip", "data.val_fraction", "data.workers"),
)
def quick_check(
    request: Request,
    every: Annotated[bool, typer.Option("--all", help="Every preset instead of variants.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 4,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Take the time.")] = True,
) -> None:
    """Check that the network and its variants compute, and what they cost."""
    from moectl.diffusion.quick_check import run_quick_check

    settings: Any = request.settings
    document, tables = run_quick_check(
        settings, every=every, batch=batch, timed=timed, cpu=request.cpu
    )
    console.result(document, tables)
    if document["failed"]:
        raise RunFailed(f"{', '.join(document['failed'])}: not as they should be")


test_model = quick_check  # under that name a linter would take it for a test


@command(DiffusionSettings, ("sample", "eval"), train=False, reads=("train",), alias="--checkpoint")
def eval_(request: Request) -> None:
    """Measure samples, loss and the use of the experts."""
    from moectl.diffusion.eval import run_eval

    document, text = run_eval(request)
    console.result(document, console.Markdown(text))
