"""The commands of controller."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moectl.controller.settings import ControllerSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run, show_run
from moectl.engine.files import require_folder
from moectl.engine.options import Json, Quiet


def _size(settings: Any) -> dict[str, Any]:
    from moectl.controller.size import size

    return size(settings)


_ASKED = ("data", "backbone", "latency")
_GUARD_TARGET = 0.05
_DROPPED = {
    "--results-dir": "use --out DIR, or --name; nothing was read from that folder",
    "--output-dir": "use --out DIR for the run folder, or MOECTL_RUNS for the folder of all runs",
    "--use-multi-gpu": "start it as: accelerate launch -m moectl controller grpo …",
}


@command(
    ControllerSettings,
    ("data", "toy", "train.seed"),
    train=True,
    without=("data.train_samples", "data.val_samples", "data.test_samples"),
)
def toy(request: Request) -> None:
    """Teach a small network to answer, so that plans have something to trade."""
    from moectl.controller.toy import train_toy

    with open_run(request) as run:
        train_toy(run.settings, run)
    show_run(run)


@command(
    ControllerSettings,
    (*_ASKED, "profile", "train.seed"),
    train=True,
    without=("data.train_samples", "data.test_samples", "latency.tables"),
)
def profile(request: Request) -> None:
    """Measure blocks, plans and latency of a network."""
    from moectl.controller.profile import run_profile

    with open_run(request) as run:
        document = run_profile(run)
    console.result(document, str(run.folder))


@command(
    ControllerSettings,
    (*_ASKED, "policy", "budget", "reward", "grpo", "optim", "train"),
    train=True,
    size=_size,
    dropped=_DROPPED,
)
def grpo(request: Request) -> None:
    """Train the controller on answers of a frozen network."""
    from moectl.controller.train import train

    with open_run(request) as run:
        train(run.settings, run)
    show_run(run)


@command(
    ControllerSettings,
    (*_ASKED, "eval"),
    train=False,
    reads=("grpo",),
    alias="--checkpoint",
    without=("data.train_samples", "data.val_samples"),  # they decide which images are left to test
)
def eval_(request: Request) -> None:
    """Measure a controller beside fixed plans, chance and the lookup table."""
    from moectl.controller.eval import run_eval

    document, text = run_eval(request)
    console.result(document, console.Markdown(text))


@command(
    ControllerSettings,
    ("backbone", "latency"),
    train=False,
    reads=("grpo",),
    standalone=("plan", "policy=lut"),
    alias="--checkpoint",
)
def infer(  # noqa: PLR0913 - the options of a command
    request: Request,
    image: Annotated[Path | None, typer.Option("--image", help="The image.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")] = "",
    budget: Annotated[
        str, typer.Option("--budget", help="Latency allowed, in ms; several with commas.")
    ] = "",
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help="JSON lines with image, question, budget instead."),
    ] = None,
    policy: Annotated[
        Literal["controller", "lut"],
        typer.Option("--policy", help="Who chooses the plan; lut: the lookup table."),
    ] = "controller",
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A JSON file with the plan to run instead.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer by the full plan as well.")
    ] = False,
    guard: Annotated[
        bool, typer.Option("--guard", help="Make plans cheaper that may miss the budget.")
    ] = False,
    target_violation: Annotated[
        float | None,
        typer.Option(
            "--target-violation",
            min=0.001,
            max=0.5,
            help="Budgets that the guard may miss; --guard alone: 0.05.",
        ),
    ] = None,
) -> None:
    """Answer a question within a budget."""
    from moectl.controller.answers import shown, shown_all, summary
    from moectl.controller.questions import Choice, questions_of

    asked = questions_of(image, prompt, budget, questions)
    by = "plan" if plan and policy != "lut" else policy
    choice = Choice(by, plan, target_violation or (_GUARD_TARGET if guard else 0.0))
    from moectl.controller.infer import run_infer  # heavy: only once all this is right

    found = run_infer(request, asked, choice, compare=compare)
    if questions is None and len(found) == 1:
        console.result(found[0], shown(found[0]))
    else:
        console.result(summary(found), shown_all(found))


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint, with safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new, or empty.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Bring a checkpoint of MolmoE into a folder of safetensors."""
    require_folder(source)
    from moectl.controller.molmoe_convert import convert as run_convert

    console.setup(quiet=quiet, as_json=as_json)
    document = run_convert(source, out)
    console.result(document, str(out))
