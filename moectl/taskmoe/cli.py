"""The commands of taskmoe."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moectl.engine import console
from moectl.engine.command import Request, command, open_run, show_run
from moectl.engine.errors import RunFailed
from moectl.taskmoe.settings import TaskmoeSettings

_TRAINED = ("data", "model", "optim", "schedule", "train")
_MIXTURES = ("train", "merge")
_DROPPED = {
    "--save-dir": "use --out DIR for the run folder, or MOECTL_RUNS for the folder of all runs",
    "--results-dir": "results go into the run folder; --out DIR puts them elsewhere",
}
_Submodels = Annotated[
    Path | None,
    typer.Option("--submodels-dir", help="Folder with a folder of specialists' .pth per task."),
]
_Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights of a mixture instead of a run's.")
]
_Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Of the gates, instead of the weights'.")
]
_Task = Annotated[
    str, typer.Option("--task", help="Take the newest finished training of this task.")
]


@command(
    TaskmoeSettings,
    ("data",),
    train=None,
    without=("data.augment", "data.val_fraction", "data.split_seed"),
)
def data(
    request: Request,
    action: Annotated[Literal["build", "check"], typer.Argument(help="Write the files, or count.")],
    cifar: Annotated[
        Path | None,
        typer.Option("--cifar", help="build A: folder with cifar-100-python; --data-dir if unset."),
    ] = None,
    imagenet: Annotated[
        Path | None, typer.Option("--imagenet", help="build B: folder with train and val.")
    ] = None,
) -> None:
    """Write the data files of task A or B, or check those of any task."""
    from moectl.taskmoe.prepare import build, check

    settings: Any = request.settings
    if action == "build":
        console.result(*build(settings.data, cifar, imagenet))
    else:
        console.result(*check(settings.data))


def _mixture(settings: Any) -> dict[str, Any]:
    from moectl.taskmoe import size

    return size.mixture(settings)


def _member(settings: Any) -> dict[str, Any]:
    from moectl.taskmoe import size

    return size.member(settings)


@command(
    TaskmoeSettings,
    (*_TRAINED, "specialist"),
    train=True,
    size=_member,
    dropped=_DROPPED,
    without=(
        "train.select_on",
        "train.freeze_extractor_epochs",
        "train.expert_analysis_interval",
    ),
)
def specialist(request: Request) -> None:
    """Train one of the specialists."""
    from moectl.taskmoe.specialist import train_specialist

    with open_run(request) as run:
        train_specialist(run.settings, run)
    show_run(run)


@command(
    TaskmoeSettings,
    ("data", "model", "merge", "train.seed"),
    train=True,
    resumes=False,
    dropped=_DROPPED,
    without=("data.augment",),
)
def merge(
    request: Request,
    specialists: Annotated[
        str, typer.Option("--specialists", help="Runs or files, one for each, with commas.")
    ] = "",
    submodels_dir: _Submodels = None,
) -> None:
    """Merge the specialists into one gated mixture."""
    from moectl.taskmoe.report import report
    from moectl.taskmoe.stages import merge as run_merge

    references = [part for part in specialists.split(",") if part]
    with open_run(request) as run:
        document = run_merge(run.settings, run, references, submodels_dir)
        if run.is_main:
            report(run.folder)
    console.result({**document, "folder": str(run.folder)}, str(run.folder))


@command(
    TaskmoeSettings,
    (*_TRAINED, "merge", "gate", "loss"),
    train=True,
    size=_mixture,
    dropped=_DROPPED,
    alias="--model-name",
)
def train(
    request: Request,
    merged: Annotated[
        str,
        typer.Option(
            "--merged", help="Run of a merge (the task's newest if not given), none for random."
        ),
    ] = "",
    submodels_dir: _Submodels = None,
    load_model_path: Annotated[
        Path | None, typer.Option("--load-model-path", help="Weights of a mixture to go on from.")
    ] = None,
) -> None:
    """Train the mixture."""
    from moectl.taskmoe.stages import teachers
    from moectl.taskmoe.start import begin
    from moectl.taskmoe.train import train as run_training

    with open_run(request) as run:
        start = begin(run, merged, submodels_dir, load_model_path)
        run_training(run.settings, run, start, teachers(run.settings, start))
    show_run(run)


@command(
    TaskmoeSettings,
    ("eval",),
    train=False,
    dropped=_DROPPED,
    reads=_MIXTURES,
    standalone=("checkpoint", "model_dir"),
)
def eval_(  # noqa: PLR0913 - the options of a command
    request: Request,
    task: Annotated[
        str, typer.Option("--task", help="Newest finished training of a task; both for A and B.")
    ] = "",
    checkpoint: _Checkpoint = None,
    model_dir: Annotated[
        Path | None,
        typer.Option("--model-dir", help="Folder of .pth files; the highest accuracy wins."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results, instead of the run's.")
    ] = None,
    temperature: _Temperature = None,
    count_shared_twice: Annotated[
        bool,
        typer.Option("--count-shared-twice", help="As the published figure of task B does."),
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Show the pictures on the desktop.")] = False,
) -> None:
    """Measure a trained mixture on the test images."""
    from moectl.taskmoe.eval import run_eval

    document, shown = run_eval(
        request,
        task=task,
        checkpoint=checkpoint,
        model_dir=model_dir,
        out=out,
        temperature=temperature,
        count_shared_twice=count_shared_twice,
        show=show,
    )
    console.result(document, shown)


@command(
    TaskmoeSettings,
    ("eval",),
    train=False,
    dropped=_DROPPED,
    reads=_MIXTURES,
    standalone=("checkpoint",),
    without=("eval.num_samples", "eval.seed"),
)
def analyze(
    request: Request,
    task: _Task = "",
    checkpoint: _Checkpoint = None,
    temperature: _Temperature = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results, instead of the run's.")
    ] = None,
) -> None:
    """Show what every expert and the gates do."""
    from moectl.taskmoe.analyze import run_analyze

    console.result(*run_analyze(request, task, checkpoint, temperature, out))


plot = analyze


@command(
    TaskmoeSettings,
    ("eval",),
    train=False,
    dropped=_DROPPED,
    reads=("train",),
    without=("eval.num_samples",),
)
def compare(
    request: Request,
    task: _Task = "",
    specialists: Annotated[
        str, typer.Option("--specialists", help="Runs or files, if not those of the merge.")
    ] = "",
    against: Annotated[
        str, typer.Option("--against", help="Row that the others are compared with.")
    ] = "mixture",
) -> None:
    """Compare the mixture with routing, merging and training baselines."""
    from moectl.taskmoe.compare import run_compare

    references = [part for part in specialists.split(",") if part]
    console.result(*run_compare(request, task, references, against))


@command(
    TaskmoeSettings,
    ("eval",),
    train=False,
    dropped=_DROPPED,
    reads=_MIXTURES,
    standalone=("checkpoint",),
    without=("eval.num_samples", "eval.seed"),
)
def predict(
    request: Request,
    images: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    task: _Task = "",
    checkpoint: _Checkpoint = None,
    temperature: _Temperature = None,
) -> None:
    """Classify images: class, probability and gates of each."""
    from moectl.taskmoe.predict import lines, run_predict

    rows, unreadable = run_predict(request, images, task, checkpoint, temperature)
    console.result(rows, lines(rows))
    if unreadable:
        raise RunFailed(f"{unreadable} of {unreadable + len(rows)} images could not be read")
