"""What one stage hands to the next: specialists to the merge, merged weights to the training."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.engine.artefact import Artefact
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, is_folder, read_json, write_json
from moectl.engine.references import exact, find_weights, finished_runs
from moectl.engine.run import Run
from moectl.engine.seeding import key
from moectl.engine.sources import TensorSource
from moectl.taskmoe.align import renormalise
from moectl.taskmoe.data import Data, load, split_of
from moectl.taskmoe.manifest import find_manifest
from moectl.taskmoe.merge import Report, assemble, step_zero
from moectl.taskmoe.model import MergedMoE, Specialist
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.train import build, facts_of
from moectl.taskmoe.weights import Member, change_of, read_specialist

log = logging.getLogger(__name__)

MERGED = "merged_model.pth"
SUBMODELS = Path("submodels")
_MERGING_IMAGES = 4096


def find_specialists(
    settings: TaskmoeSettings, references: Sequence[str], submodels: Path | None = None
) -> list[Member]:
    """Return the specialists of a task, in the order of its manifest.

    Args:
        settings: which task, and how many.
        references: runs or files, one for each. Without any, the checkpoints that the manifest
            names, else the newest finished run of each.
        submodels: folder with a folder of weights files for each task, instead.

    Raises:
        UserError: if one is missing, of another task or of another width.
    """
    manifest, folder = find_manifest(settings.data.task, settings.data.root)
    count = len(manifest.specialists)
    if references and submodels:
        raise UserError("--specialists and --submodels-dir exclude each other")
    if references:
        if len(references) != count:
            raise UserError(f"{len(references)} specialists are given, the task has {count}")
        paths = [find_weights(exact(reference), "taskmoe") for reference in references]
    elif submodels:
        paths = _submodel_files(submodels / folder_name(settings), count)
    elif any(one.checkpoint for one in manifest.specialists):
        missing = [one.name for one in manifest.specialists if not one.checkpoint]
        if missing:
            raise UserError(
                f"task {manifest.task}: the manifest names no checkpoint of {missing[0]}"
            )
        paths = [folder / one.checkpoint for one in manifest.specialists]
    else:
        paths = _newest(settings.data.task, count)
    found = [read_specialist(path, settings, number) for number, path in enumerate(paths, 1)]
    for member in found:
        width = member.model.conv1.conv.out_channels
        if width != settings.model.width:
            raise UserError(
                f"{member.path}: is {width} channels wide, model.width is {settings.model.width}",
                f"--width {width}",
            )
        if member.split not in (None, split_of(settings.data)):
            log.warning(
                "%s: was trained with another choice of validation images; some of those that"
                " choose the mixture's epoch are known to it",
                member.path,
            )
    return found


def folder_name(settings: TaskmoeSettings) -> str:
    """Return the name of a task's folder of specialists."""
    task = settings.data.task
    return Path(task).resolve().parent.name if is_file(Path(task)) else task


def _submodel_files(folder: Path, count: int) -> list[Path]:
    """Return the weights files of a folder in the order of the first number in their names."""
    files = sorted(folder.glob("*.pth")) if is_folder(folder) else []
    numbers = {path: re.search(r"\d+", path.stem) for path in files}
    order = {int(found[0]): path for path, found in numbers.items() if found}
    if len(files) != count or sorted(order) != list(range(1, count + 1)):
        names = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"{folder}: expected {count} files of specialists 1 to {count}, found {names}",
            "the first number in a name says whose it is, as in data1_86.40_epoch199.pth",
        )
    return [order[number] for number in sorted(order)]


def _newest(task: str, count: int) -> list[Path]:
    found = {number: newest_specialist(task, number) for number in range(1, count + 1)}
    missing = [str(number) for number, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"task {task}: no finished run of specialist {', '.join(missing)}",
            f"moectl taskmoe specialist --task {task} --specialist {missing[0]} trains one",
        )
    return [path for path in found.values() if path is not None]


def newest_specialist(task: str, number: int) -> Path | None:
    """Return the best weights of the newest finished run of a specialist; 0 for all classes."""
    for folder, _ in finished_runs("taskmoe", "specialist"):
        path = find_weights(f"{folder}@best", "taskmoe")
        facts = read_json(path.with_name(f"{path.name}.json"))
        if (facts["task"], facts["number"]) == (task, number):
            return path
    return None


def merge(
    settings: TaskmoeSettings,
    run: Run[TaskmoeSettings],
    references: Sequence[str],
    submodels: Path | None = None,
    *,
    best: bool = True,
) -> dict[str, Any]:
    """Merge the specialists, measure the mixture before any training, and write its weights.

    Args:
        settings: of the run.
        run: the run that gets `merged_model.pth` and `merge_report.json`.
        references: specialists, see `find_specialists`.
        submodels: their folder, likewise.
        best: whether the weights are what the run is made for.

    Returns:
        What merge_report.json holds.

    Raises:
        UserError: as `find_specialists`, and if the specialists do not fit each other.
    """
    data = load(settings.data)
    found = find_specialists(settings, references, submodels)
    for number, part in enumerate(found, 1):
        log.info("specialist %d: %s", number, part.path)
    parents = [{"path": str(part.path.resolve()), "sha256": part.sha256} for part in found]
    run.note(parents=parents)
    model, report = merged(settings, data, found, run.device)
    document = {
        "specialists": [str(part.path) for part in found],
        **settings.merge.model_dump(),
        **_measured(settings, data, model, run.device),
        **asdict(report),
    }
    facts = {
        **facts_of(settings, data),
        "temperature": float(model.temperature),
        "specialists": parents,
        "merge": settings.merge.model_dump(),
    }
    payload = {"model_state_dict": model.state_dict(), "epoch": 0, "format_version": 1, **facts}
    run.save_weights(MERGED, payload, facts, epoch=0, best=best)
    if best:
        run.note(scores={name: document[name] for name in ("step_zero", "random_control")})
    if run.is_main:
        write_json(run.folder / "merge_report.json", document)
    announce(document)
    return document


def merged(
    settings: TaskmoeSettings, data: Data, members: Sequence[Member], device: torch.device
) -> tuple[MergedMoE, Report]:
    """Return the mixture of specialists, and what its merging did.

    Raises:
        UserError: if the specialists do not fit each other.
    """
    model = build(settings, data).to(device)
    images, labels = (part.to(device) for part in _some(data.train, settings.train.seed))
    try:
        report = assemble(
            model,
            [_seeing(member, data).to(device) for member in members],
            data.owners,
            [[data.class_ids.index(id) for id in member.class_ids] for member in members],
            images=images,
            labels=labels,
            **settings.merge.model_dump(),
        )
    except ValueError as error:
        raise UserError(f"the specialists cannot be merged: {error}") from None
    return model, report


def _measured(
    settings: TaskmoeSettings, data: Data, model: MergedMoE, device: torch.device
) -> dict[str, Any]:
    """Measure a mixture before any training, beside one with random weights."""
    batches = [images for images, _ in data.val.ordered(256, device)]
    control = build(settings, data).to(device)
    return {
        "class_names": data.class_names,
        "owners": data.owners.int().tolist(),
        "measured_on": "validation images",
        "step_zero": step_zero(model, batches, data.val.labels, data.owners),
        "random_control": step_zero(control, batches, data.val.labels, data.owners),
    }


def _seeing(member: Member, data: Data) -> Specialist:
    """Return a specialist that expects the normalisation of the union."""
    change = change_of((data.mean, data.std), member.statistics)
    model = Specialist(len(member.class_ids), member.model.conv1.conv.out_channels)
    model.load_state_dict(renormalise(member.model.state_dict(), *change))
    return model.eval()


def _some(source: TensorSource, seed: int) -> tuple[Tensor, Tensor]:
    """Return enough images of a source to match channels and to measure batch norms by."""
    draws = torch.Generator().manual_seed(key(seed, "match"))
    chosen = torch.randperm(len(source), generator=draws)[:_MERGING_IMAGES].to(source.labels.device)
    return source.plain(source.images[chosen]), source.labels[chosen]


def announce(document: Mapping[str, Any]) -> None:
    """Log what a merge is worth before any training."""
    for name, words in (("step_zero", "merged"), ("random_control", "random weights")):
        found = document[name]
        own = ", ".join("–" if one is None else f"{100 * one:.1f}" for one in found["own_accuracy"])
        log.info(
            "%s, before training: %.1f %% of %d validation images (chance %.1f);"
            " each specialist's own classes by its expert: %s",
            words,
            100 * found["union_accuracy"],
            found["images"],
            100 * found["union_chance"],
            own,
        )


def teachers(settings: TaskmoeSettings, start: Artefact | None) -> list[Member]:
    """Return the specialists that the weights were merged from, if the loss distils them.

    Raises:
        UserError: if they are not known, or no longer there.
    """
    return merged_from(settings, start) if settings.loss.distill_weight else []


def merged_from(
    settings: TaskmoeSettings, start: Artefact | None, hint: str = "start from a merge"
) -> list[Member]:
    """Return the specialists that weights were merged from.

    Args:
        settings: which task.
        start: the merged weights.
        hint: what to do if they are gone.

    Raises:
        UserError: if they are not known, no longer there, or not the same files any more.
    """
    listed = start.facts.get("specialists", []) if start else []
    if not listed:
        raise UserError("the specialists of this mixture are not known", hint)
    found = []
    for number, entry in enumerate(listed, 1):
        try:
            member = read_specialist(Path(entry["path"]), settings, number)
        except UserError as error:
            raise UserError(error.message, hint) from None
        if member.sha256 != entry["sha256"]:
            raise UserError(f"{member.path}: is not the file that was merged any more", hint)
        found.append(member)
    return found
