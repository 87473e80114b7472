"""`moectl runs`: what was run, what came out, and how runs differ."""

import csv
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moectl.engine import console
from moectl.engine.errors import UserError
from moectl.engine.files import write_bytes
from moectl.engine.options import Json
from moectl.engine.references import all_runs, find_run, find_weights
from moectl.engine.report import duration
from moectl.engine.run import parents_of, read_record, status_of
from moectl.engine.settings import flatten
from moectl.engine.toml import read_toml
from moectl.tools.rooms import check_room

if TYPE_CHECKING:
    from torch import Tensor

Reference = Annotated[str, typer.Argument(metavar="REF", help="Path, name, ROOM/NAME, or latest.")]
Status = Literal["running", "finished", "interrupted", "failed", "killed"]


def list_(
    room: Annotated[str | None, typer.Argument(help="Only runs of this system.")] = None,
    status: Annotated[
        Status | None, typer.Option("--status", help="Only runs in this state.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs."""
    console.setup(as_json=as_json)
    found = [_entry(*run) for run in all_runs(check_room(room) if room else None)]
    found = [entry for entry in found if status in (None, entry["status"])]
    rows = [
        [
            entry["name"],
            entry["room"],
            entry["status"],
            entry["started"],
            _progress(entry["epoch"], entry["epochs"]),
            entry["update"] or 0,
            " ".join(console.cell(part) for part in entry["score"].values()) or None,
            duration(entry["wall_seconds"]),
        ]
        for entry in found
    ]
    columns = ("name", "room", "status", "started", "epoch", "update", "score", "time")
    console.result(found, console.table(columns, rows))


def show(reference: Reference, as_json: Json = False) -> None:
    """Print one run."""
    console.setup(as_json=as_json)
    folder = find_run(reference)
    record = read_record(folder)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    status = status_of(record)
    document = {**record, "folder": str(folder), "status": status, "files": files}
    words = ("command", "started", "wall_seconds", "device", "precision", "seed", "argv")
    facts = [
        ("folder", str(folder)),
        ("status", f"{status} {record.get('reason') or ''}".strip()),
        *((word.replace("_", " "), record[word]) for word in words if word in record),
        *(("parent", parent["path"]) for parent in parents_of(record)),
    ]
    scores = [(name, value) for name, value in flatten(record.get("scores", {})).items()]
    sizes = _by_folder(files)
    shown = console.table(("run", str(record.get("run", folder.name))), [*facts, *scores, *sizes])
    for end in (len(facts), len(facts) + len(scores)):
        shown.rows[end - 1].end_section = True
    console.result(document, shown)


def compare(
    references: Annotated[
        list[str], typer.Argument(metavar="REF REF…", help="The runs, two or more.")
    ],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw curves and scores of the runs into this PNG file."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="What to draw alone: a column of metrics.csv.",
            show_default="what the runs share",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the settings and scores of runs."""
    console.setup(as_json=as_json)
    if len(references) < 2:
        raise UserError("a comparison needs two runs or more", "moectl runs show REF prints one")
    if (metric or force) and not plot:
        option = f"--metric {metric} says what to draw" if metric else "--force is for a picture"
        raise UserError(f"{option}, and --plot FILE.png where")
    folders = [find_run(reference) for reference in references]
    if plot:
        _draw(folders, plot, metric, force=force)
    settings = _aligned([_settings(folder) for folder in folders])
    settings = {key: values for key, values in settings.items() if len(set(map(str, values))) > 1}
    scores = _aligned([flatten(read_record(folder).get("scores", {})) for folder in folders])
    document = {
        "runs": [str(folder) for folder in folders],
        "settings": settings,
        "scores": scores,
        "plot": str(plot) if plot else None,
    }
    rows = [[key, *map(_shown, values)] for key, values in {**settings, **scores}.items()]
    shown = console.table(("", *(folder.name for folder in folders)), rows)
    if settings:
        shown.rows[len(settings) - 1].end_section = True
    console.result(document, shown)


def report(reference: Reference, as_json: Json = False) -> None:
    """Draw the plots and the report of a run again.

    Beside report.md lies report.html: the same as one page with the pictures inside.
    """
    console.setup(as_json=as_json)
    folder = find_run(reference)
    room = check_room(str(read_record(folder).get("room", "")))
    importlib.import_module(f"moectl.{room}.report").report(folder)
    plots = [str(path) for path in sorted(folder.glob("plots/*.png"))]
    path, page = str(folder / "report.md"), str(folder / "report.html")
    console.log.info("with its pictures as one page: %s", page)
    console.result({"report": path, "page": page, "plots": plots}, path)


def export(
    reference: Annotated[
        str,
        typer.Argument(metavar="REF", help="A run with @best, @last or @EPOCH, or a weights file."),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="The new file.", show_default="beside the weights"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write the weights of a run as safetensors.

    Averaged weights where the training kept some.
    """
    console.setup(as_json=as_json)
    source = find_weights(reference)
    target = to or source.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise UserError(f"--to {target}: the file must end in .safetensors")
    if target.exists() and not force:
        raise UserError(f"{target}: exists already", "--force replaces it")
    import safetensors.torch

    from moectl.engine import artefact

    weights = artefact.load(source)
    tensors = _tensors(weights.payload, source)
    metadata = {"format": "pt", **{key: _text(fact) for key, fact in weights.facts.items()}}
    try:
        write_bytes(target, safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written ({error.strerror})") from None
    document = {"from": str(source), "to": str(target), "tensors": len(tensors)}
    console.result(document, str(target))


def _entry(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    staged = sorted(folder.glob("metrics_*.csv"))
    rows = [_last_row(path) for path in staged or [folder / "metrics.csv"]]
    row = max(rows, key=lambda row: float(row.get("elapsed_seconds") or 0))
    return {
        "name": folder.name,
        "folder": str(folder),
        "room": record.get("room", folder.parent.name),
        "status": status_of(record),
        "started": record.get("started"),
        "epoch": int(row["epoch"]) if row.get("epoch") else None,
        "epochs": None if staged else _epochs(folder),
        "update": int(row["update"]) if row.get("update") else None,
        "score": _main_score(record.get("scores", {})),
        "wall_seconds": record.get("wall_seconds", 0.0),
    }


def _progress(epoch: int | None, epochs: int | None) -> str:
    """Write how far a run is; one of several stages has epochs of each."""
    return f"{epoch or 0}/{epochs}" if epochs else str(epoch or 0)


def _main_score(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first score of the last weights, or of those there are."""
    for tag in ("last", "best", *scores):
        values = scores.get(tag)
        if isinstance(values, Mapping):
            for name, value in values.items():
                if name != "epoch":
                    return {"name": f"{tag}/{name}", "value": value}
    return {}


def _last_row(path: Path) -> dict[str, str]:
    """Return the last whole row of a CSV file without parsing the others."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if len(lines) < 2:
        return {}
    return next(csv.DictReader([lines[0], lines[-1]]))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.toml"
    return flatten(read_toml(path)) if path.exists() else {}


def _epochs(folder: Path) -> int | None:
    try:
        return _settings(folder).get("train.epochs")
    except UserError:  # one damaged run must not hide the others
        return None


def _aligned(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return every key with its value in each column, None where it has none."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [column.get(key) for column in columns] for key in keys}


def _draw(folders: Sequence[Path], path: Path, metric: str | None, *, force: bool) -> None:
    from moectl.tools import comparison

    if path.suffix != ".png":
        raise UserError(f"--plot {path}: the file must end in .png")
    found = [comparison.curves(folder) for folder in folders]
    wanted = comparison.shared_curves(found, metric)
    records = [read_record(folder) for folder in folders]
    scores = {} if metric else comparison.shared_scores(records)
    if not wanted and not scores:
        raise UserError("the runs have no metric and no score in common to draw")
    if path.exists() and not force:
        raise UserError(f"--plot {path}: exists already", "--force replaces it")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    metrics = {name: [curves[name] for curves in found] for name in wanted}
    try:
        comparison.draw(path, names, metrics, scores)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from None


def _tensors(payload: Mapping[str, Any], path: Path) -> "dict[str, Tensor]":
    """Return the weights in a payload, each in memory of its own as the format wants it.

    Averaged weights come first: they are what a network is used with.
    """
    import torch

    known = ("ema_state_dict", "state_dict", "model_state_dict", "model")
    names = [name for name in known if name in payload]
    weights = payload[names[0]] if names else payload
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{path}: holds no weights, only {', '.join(map(str, payload))}")
    return tensors


def _text(fact: Any) -> str:
    return fact if isinstance(fact, str) else json.dumps(fact)


def _by_folder(files: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return name and size of the files on the first level, and of each folder as a whole."""
    rows: dict[str, list[int]] = {}
    for name, size in files.items():
        folder, slash, _ = name.partition("/")
        rows.setdefault(folder + slash, []).append(size)
    return [
        (name, f"{len(sizes)} files, {_size(sum(sizes))}" if "/" in name else _size(sizes[0]))
        for name, sizes in rows.items()
    ]


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _shown(value: Any) -> Any:
    """Leave numbers to the table; write switches and lists as TOML does."""
    return json.dumps(value) if isinstance(value, bool | list) else value
