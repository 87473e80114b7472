"""The commands of csr."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moectl.csr.settings import CsrSettings
from moectl.engine import console
from moectl.engine.command import Request, command, open_run, show_run
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.options import Json, Quiet


def _size(settings: Any) -> dict[str, Any]:
    from moectl.csr.size import size

    return size(settings)


_NUMBERS = {"1": "concept", "2": "prototype", "3": "task"}


@command(
    CsrSettings,
    ("data", "model", "concept", "prototype", "task", "optim", "schedule", "train"),
    train=True,
    size=_size,
    alias="--exp-name",
    without=("train.epochs",),
)
def train(
    request: Request,
    stage: Annotated[
        Literal["concept", "prototype", "task", "all", "1", "2", "3"] | None,
        typer.Option("--stage", help="What is trained; default all, or what a resumed run began."),
    ] = None,
    start: Annotated[
        str, typer.Option("--from", help="Run or weights file that stage 2 or 3 begins with.")
    ] = "",
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Folder of the run's folder.")
    ] = None,
) -> None:
    """Train concepts, prototypes and the verdict."""
    from moectl.csr.stages import STAGES, given
    from moectl.csr.train import train as run_training

    wanted = _NUMBERS.get(stage or "all", stage or "all")
    stages = [one for one in STAGES if wanted in ("all", one)]
    if start and stages[0] == "concept":
        raise UserError("--from goes with --stage prototype or task", "--model-name starts stage 1")
    if stages[0] != "concept" and not request.folder:  # before any data is loaded
        given(start, stages[0], request.settings.task.start)  # type: ignore[attr-defined]
    if output_dir:
        if request.out or request.resume:
            raise UserError("--output-dir goes neither with --out nor with --resume")
        request = replace(request, out=output_dir / request.name)
    with open_run(request) as run:
        if run.resuming and stage is None:
            stages = run.record.get("stages", stages)
        run_training(run.settings, run, stages, start)
    show_run(run)


@command(CsrSettings, ("eval",), train=False, reads=("train", "convert"), alias="--checkpoint")
def eval_(
    request: Request,
    split: Annotated[
        Literal["test", "val"], typer.Option("--split", help="Which images are measured.")
    ] = "test",
    curation: Annotated[
        Path | None, typer.Option("--curation", help="Which prototypes have a say.")
    ] = None,
) -> None:
    """Measure concepts, verdict and where the network looks."""
    from moectl.csr.eval import run_eval

    console.result(*run_eval(request, split, curation))


@command(CsrSettings, ("eval",), train=False, reads=("train", "convert"), alias="--checkpoint")
def baselines(
    request: Request,
    split: Annotated[
        Literal["test", "val"], typer.Option("--split", help="Which images are measured.")
    ] = "test",
) -> None:
    """Train a linear head and a concept bottleneck on the same backbone."""
    from moectl.csr.baselines import run_baselines

    console.result(*run_baselines(request, split))


@command(CsrSettings, (), train=False, reads=("train", "convert"), alias="--checkpoint")
def explain(  # noqa: PLR0913 - the options of a command
    request: Request,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, and folders of images.")
    ] = None,
    split: Annotated[
        Literal["test", "val", "train"], typer.Option("--split", help="Where --id looks.")
    ] = "test",
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="An image of the run's own data; repeatable.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Concepts described.")] = 5,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="Of the targets; else the weights' own."),
    ] = None,
    panel: Annotated[
        Path | None, typer.Option("--panel", help="Folder for a picture of each image.")
    ] = None,
) -> None:
    """Say why: concepts, exemplars and what each adds to the verdict."""
    from moectl.csr.explain import Choice, lines, run_explain

    wanted = Choice(tuple(images or ()), tuple(ids or ()), split, top_k, threshold, panel)
    document, unreadable = run_explain(request, wanted)
    if rows := document["images"]:
        console.result(document, lines(rows))
    if unreadable:
        raise RunFailed(f"{unreadable} of {unreadable + len(rows)} images could not be read")


infer = explain


@command(CsrSettings, (), train=False, reads=("train", "convert"), alias="--checkpoint")
def atlas(
    request: Request,
    top: Annotated[
        int, typer.Option("--top", min=1, max=50, help="Training images shown of each prototype.")
    ] = 5,
) -> None:
    """Show what each prototype looks like, for curation."""
    from moectl.csr.atlas import run_atlas

    console.result(*run_atlas(request, top))


@command(CsrSettings, ("eval",), train=False, reads=("train", "convert"), alias="--checkpoint")
def intervene(  # noqa: PLR0913 - the options of a command
    request: Request,
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    split: Annotated[
        Literal["test", "val"] | None,
        typer.Option("--split", help="Take images of the data instead; all, or those of --id."),
    ] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--id", help="An image of the split; may be repeated.")
    ] = None,
    reject: Annotated[
        list[str] | None, typer.Option("--reject", help="A concept that is not there.")
    ] = None,
    mode: Annotated[
        Literal["zero", "absent-median", "absent-mean", "clip", "drop"] | None,
        typer.Option("--mode", help="How to reject; absent-median where that is known."),
    ] = None,
    confirm: Annotated[
        list[str] | None, typer.Option("--confirm", help="A concept that is there.")
    ] = None,
    set_concept: Annotated[
        list[str] | None,
        typer.Option("--set-concept", help="NAME=VALUE, the similarity of a concept, -1 to 1."),
    ] = None,
    positive: Annotated[
        list[str] | None,
        typer.Option("--positive", help="x0,y0,x1,y1, where to look; pixels, or shares to 1."),
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option("--negative", help="x0,y0,x1,y1, where not to look.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Weight outside of positive boxes; 0.2.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="The concept that boxes count for; else all.")
    ] = None,
    edits: Annotated[
        Path | None, typer.Option("--edits", help="A .toml or .json file with a list of edits.")
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Study what true labels in a person's place bring.")
    ] = False,
    order: Annotated[
        Literal["similarity", "contribution", "uncertainty", "random"] | None,
        typer.Option("--order", help="Of --oracle: the concept asked about first; similarity."),
    ] = None,
) -> None:
    """Correct concepts or places, and see what becomes of the verdict."""
    from moectl.csr.intervene import Choice, edit_table, lines, run_intervene
    from moectl.csr.study import run_study

    flags = edit_table(
        reject=reject, mode=mode, confirm=confirm, set=set_concept,
        positive=positive, negative=negative, alpha=alpha, only=only,
    )  # fmt: skip
    if oracle:
        if images or ids or edits or set(flags) - {"mode"}:
            raise UserError("--oracle takes no images and no edits", "--split says which images")
        console.result(*run_study(request, split or "test", mode, order or "similarity"))
        return
    if order:
        raise UserError("--order goes with --oracle")
    rows = run_intervene(request, Choice(images or [], split or "", ids or [], flags, edits))
    console.result(rows, lines(rows))


def preprocess(  # noqa: PLR0913 - the options of a command
    source: Annotated[Path, typer.Argument(help="Folder of images, and of folders of images.")],
    out: Annotated[Path, typer.Argument(help="Folder of the PNG files, new or begun by this.")],
    size: Annotated[int, typer.Option("--size", min=16, help="Side in pixels.")] = 224,
    bits: Annotated[
        Literal["8", "16"], typer.Option("--bits", help="Bits per pixel of grey images.")
    ] = "8",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read.")] = 4,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a folder of images into small PNG files."""
    from moectl.csr.images import preprocess as run_preprocess

    console.setup(quiet=quiet, as_json=as_json)
    found = run_preprocess(source, out, size, 16 if bits == "16" else 8, workers)
    words = f"{found.written} images written, {found.skipped} were there, {found.table}"
    lines = [*found.unreadable, words]
    console.result({**found._asdict(), "table": str(found.table)}, "\n".join(lines))
    if bad := len(found.unreadable):
        raise RunFailed(f"{bad} of {bad + found.written + found.skipped} images could not be read")


@command(
    CsrSettings,
    ("data",),
    train=None,
    without=(
        "data.image_size",
        "data.normalize",
        "data.hflip",
        "data.augment_heads",
        "data.workers",
    ),
)
def check_data(
    request: Request,
    images: Annotated[
        bool, typer.Option("--images", help="Decode every image; the unreadable are listed.")
    ] = False,
) -> None:
    """Check tables, images and boxes before training."""
    from moectl.csr.check import check

    settings: Any = request.settings
    document, tables = check(settings, images)
    console.result(document, tables)
    if problems := document["problems"]:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n".join([f"{count} to solve before training", *problems]))


@command(
    CsrSettings,
    ("data",),
    train=True,
    resumes=False,
    without=("data.augment_heads", "data.hflip"),
)
def convert(
    request: Request,
    weights: Annotated[Path, typer.Argument(help="A .pth file of the original program.")],
) -> None:
    """Bring a .pth of the original code into a run folder."""
    from moectl.csr.import_original import read_original, write_original

    settings: Any = request.settings
    original = read_original(weights, settings)
    with open_run(replace(request, settings=original.settings)) as run:
        document = write_original(original, run)
    show_run(run, **document)
