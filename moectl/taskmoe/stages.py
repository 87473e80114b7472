"""What one stage hands to the next: specialists to the merge, merged weights to the training."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.engine import artefact
from moectl.engine.artefact import Artefact
from moectl.engine.errors import UserError
from moectl.engine.files import write_json
from moectl.engine.references import all_runs, find_weights
from moectl.engine.run import Run
from moectl.engine.seeding import key
from moectl.engine.sources import Source
from moectl.taskmoe.data import load
from moectl.taskmoe.merge import assemble, step_zero
from moectl.taskmoe.model import Specialist
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.train import build, facts_of

_MERGING_IMAGES = 4096


def find_specialists(settings: TaskmoeSettings, references: Sequence[str]) -> list[Artefact]:
    """Return the best weights of the task's specialists, in their order.

    Args:
        settings: which task, and how many.
        references: runs or files, one for each; without any, the newest finished run of each.

    Raises:
        UserError: if one is missing or of another task.
    """
    count = settings.model.num_experts
    if references and len(references) != count:
        raise UserError(f"{len(references)} specialists are given for {count} experts")
    paths = [find_weights(_best(reference), "taskmoe") for reference in references]
    found = [artefact.load(path) for path in paths or _newest(settings.data.task, count)]
    for number, weights in enumerate(found, 1):
        facts = (weights.facts.get("task"), weights.facts.get("number"))
        if facts != (settings.data.task, number):
            raise UserError(
                f"{weights.path}: is specialist {facts[1]} of task {facts[0]},"
                f" expected {number} of {settings.data.task}"
            )
    return found


def _best(reference: str) -> str:
    return reference if "@" in reference or Path(reference).is_file() else f"{reference}@best"


def _newest(task: str, count: int) -> list[Path]:
    """Return the best weights of the newest finished run of each specialist."""
    found: dict[int, Path] = {}
    for folder, record in all_runs("taskmoe"):
        if record.get("command") != "specialist" or record.get("status") != "finished":
            continue
        path = find_weights(f"{folder}@best", "taskmoe")
        facts = artefact.load(path).facts
        if facts["task"] == task:
            found.setdefault(int(facts["number"]), path)
    missing = [str(number) for number in range(1, count + 1) if number not in found]
    if missing:
        raise UserError(
            f"task {task}: no finished run of specialist {', '.join(missing)}",
            "moectl taskmoe specialist --specialist N trains one",
        )
    return [found[number] for number in range(1, count + 1)]


def find_merged(settings: Any, reference: str) -> Artefact:
    """Return the merged weights to start from: of a run, or of the task's newest merge.

    Raises:
        UserError: if there are none, or they are of another task.
    """
    if reference:
        path = find_weights(_best(reference), "taskmoe")
    else:
        path = _newest_merge(settings.data.task)
    weights = artefact.load(path)
    if weights.facts.get("task") != settings.data.task:
        raise UserError(
            f"{path}: is of task {weights.facts.get('task')}, expected {settings.data.task}"
        )
    return weights


def _newest_merge(task: str) -> Path:
    for folder, record in all_runs("taskmoe"):
        if record.get("command") == "merge" and record.get("status") == "finished":
            path = find_weights(f"{folder}@best", "taskmoe")
            if artefact.load(path).facts["task"] == task:
                return path
    raise UserError(f"task {task}: no finished merge", "moectl taskmoe merge makes one")


def merge(settings: TaskmoeSettings, run: Run[TaskmoeSettings], references: Sequence[str]) -> None:
    """Merge the specialists, measure the mixture before any training, and write its weights."""
    data = load(settings.data, settings.train.seed)
    found = find_specialists(settings, references)
    run.note(parents=[{"path": str(part.path), "sha256": part.sha256} for part in found])
    model = build(settings, data)
    images, labels = _some(data.train, settings.train.seed)
    options = settings.merge
    try:
        report = assemble(
            model,
            [_rebuilt(part) for part in found],
            data.owners,
            [[data.class_ids.index(label) for label in part.facts["class_ids"]] for part in found],
            method=options.method,
            bn=options.bn,
            classifier_init=options.classifier_init,
            gate_init=options.gate_init,
            images=images,
            labels=labels,
        )
    except ValueError as error:
        raise UserError(f"the specialists cannot be merged: {error}") from None
    held = _all(data.val)
    document = {
        "specialists": [str(part.path) for part in found],
        "owners": data.owners.int().tolist(),
        "step_zero": step_zero(model, *held, data.owners),
        "random_control": step_zero(build(settings, data), *held, data.owners),
        **asdict(report),
    }
    facts = {**facts_of(settings, data), "temperature": float(model.temperature)}
    payload = {"model_state_dict": model.state_dict(), "epoch": 0, "format_version": 1}
    run.save_weights("merged_model.pth", payload, facts, epoch=0, best=True)
    run.note(scores={"step_zero": document["step_zero"], "random": document["random_control"]})
    if run.is_main:
        write_json(run.folder / "merge_report.json", _plain(document))


def _rebuilt(part: Artefact) -> Specialist:
    model = Specialist(**part.facts["arguments"])
    model.load_state_dict(part.payload["model_state_dict"])
    return model.eval()


def _all(source: Source) -> tuple[Tensor, Tensor]:
    """Return all images of a source, normalised, and their labels."""
    batches = list(source.ordered(256, torch.device("cpu")))
    return torch.cat([images for images, _ in batches]), torch.cat([truth for _, truth in batches])


def _some(source: Source, seed: int) -> tuple[Tensor, Tensor]:
    """Return enough images of a source to match channels and to measure batch norms by."""
    images, labels = _all(source)
    draws = torch.Generator().manual_seed(key(seed, "match"))
    chosen = torch.randperm(len(images), generator=draws)[:_MERGING_IMAGES]
    return images[chosen], labels[chosen]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value
