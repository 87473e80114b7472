"""Weights of specialists and mixtures: ours with their sidecars, and those of the original code.

Letters: B batch, R rows of a specialist's classifier, H W pixels.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moectl.engine import artefact
from moectl.engine.artefact import Artefact
from moectl.engine.errors import UserError
from moectl.engine.loop import Loop
from moectl.engine.settings import dump
from moectl.taskmoe.data import Statistics, load_specialist
from moectl.taskmoe.manifest import class_names, find_manifest, label_map, owners
from moectl.taskmoe.model import MergedMoE, Specialist, load_original
from moectl.taskmoe.settings import TaskmoeSettings

log = logging.getLogger(__name__)

MONITOR = "val/accuracy"
"""The score that chooses the best epoch."""

_FIRST = "conv1.conv.weight"
_STATES = ("model_state_dict", "optimizer_state_dict", "config")


@dataclass(frozen=True)
class Member:
    """A trained specialist."""

    path: Path
    sha256: str
    model: Specialist
    """In evaluation mode, for images normalised by `statistics`."""
    class_ids: list[int]
    """(R,) label in the data files of each row of its classifier."""
    statistics: Statistics
    """Of the images that it was trained on."""
    split: dict[str, Any] | None = None
    """See `data.split_of`; None if it is not known."""

    def asking(self, statistics: Statistics, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Move it to a device; return what maps images (B, 3, H, W) to its logits (B, R).

        Args:
            statistics: that the images are normalised by.
            device: of the images.
        """
        model = self.model.to(device)
        scale, shift = (
            part.view(1, 3, 1, 1).to(device) for part in change_of(statistics, self.statistics)
        )
        return lambda images: model(images * scale + shift)


def change_of(given: Statistics, wanted: Statistics) -> tuple[Tensor, Tensor]:
    """Return factor and addend per channel that bring one normalisation into another."""
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in given)
    own_mean, own_std = (torch.tensor(part, dtype=torch.float64) for part in wanted)
    return (std / own_std).float(), ((mean - own_mean) / own_std).float()


def save_epoch(
    loop: Loop,
    facts: Mapping[str, Any],
    epoch: int,
    *,
    best: bool,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights files that are due after an epoch: `last.pth`, `best_model.pth`.

    Args:
        loop: of the training.
        facts: see `artefact.save`.
        epoch: epochs done.
        best: whether it is the best so far.
        more: what the files hold besides.
    """
    run, settings = loop.run, loop.run.settings
    last = epoch == settings.train.epochs or loop.patience_ends
    if not (best or last):
        return
    payload = {
        "epoch": epoch,
        "model_state_dict": loop.module.state_dict(),
        **(more or {}),
        "accuracy": 100 * float(loop.extra[MONITOR] or 0),
        "config": dump(settings),
        "format_version": 1,
        **facts,
    }
    if last:
        run.save_weights("last.pth", payload, facts, epoch=epoch)
    if best:
        run.save_weights("best_model.pth", payload, facts, epoch=epoch, best=True)


def read_specialist(path: Path, settings: TaskmoeSettings, number: int) -> Member:
    """Read the weights of a specialist of a task, also a public file that holds them alone.

    Args:
        path: the file.
        settings: which task.
        number: the specialist's place in it, from 1 on.

    Raises:
        UserError: if the file holds something else, or another specialist.
    """
    weights = artefact.load(path)
    facts, task = weights.facts or _told(weights, "Specialist"), settings.data.task
    if facts and (facts.get("model"), facts.get("task"), facts.get("number")) != (
        "Specialist",
        task,
        number,
    ):
        raise UserError(f"{path}: {_identity(facts)}, expected specialist {number} of task {task}")
    state = _state(weights)
    rows = _shape(state, "classifier.3.weight", 2, path)[0]
    width = _shape(state, _FIRST, 4, path)[0]
    model = Specialist(rows, width, settings.model.dropout_expert)
    load_state(model, state, path)
    if facts:
        ids, statistics = facts["class_ids"], (tuple(facts["mean"]), tuple(facts["std"]))
    else:
        manifest, _ = find_manifest(task, settings.data.root)
        ids = [one.id for one in manifest.specialists[number - 1].classes]
        data = load_specialist(settings.data, number - 1)
        statistics = (data.mean, data.std)
    if len(ids) != rows:
        raise UserError(f"{path}: tells {rows} classes apart, specialist {number} knows {len(ids)}")
    split = facts.get("split")
    return Member(path, weights.sha256, model.eval(), list(ids), statistics, split)


def _identity(facts: Mapping[str, Any]) -> str:
    kind = "specialist" if facts.get("model") == "Specialist" else str(facts.get("model"))
    number = f" {facts['number']}" if facts.get("number") is not None else ""
    return f"is {kind}{number} of task {facts.get('task')}"


def read_mixture(path: Path, settings: TaskmoeSettings) -> Artefact:
    """Read the weights of a mixture; a file without a sidecar tells of itself what it can.

    Args:
        path: the file.
        settings: task and label map of a public file.

    Returns:
        The weights under `model_state_dict`, and facts with `arguments`, `class_names`, `owners`
        and `temperature`; `mean` is None where the file has none.

    Raises:
        UserError: if the file holds something else, or does not fit the task.
    """
    weights = artefact.load(path)
    if weights.facts:
        if weights.facts.get("model") != "MergedMoE":
            raise UserError(f"{path}: {_identity(weights.facts)}, expected a mixture")
        return weights
    if facts := _told(weights, "MergedMoE"):
        return replace(weights, facts=facts)
    state = _state(weights)
    if "temperature" not in state:
        log.warning("%s: holds no temperature; 2 is taken, --temperature sets another", path)
    state = load_original(state)
    arguments = _arguments(state, path)
    manifest, _ = find_manifest(settings.data.task, settings.data.root)
    labels = label_map(manifest, settings.data.label_map)
    sizes = (arguments["classes"], arguments["num_experts"])
    if sizes != (len(labels), len(manifest.specialists)):
        raise UserError(
            f"{path}: has {sizes[0]} classes and {sizes[1]} experts, task {manifest.task} has"
            f" {len(labels)} classes and {len(manifest.specialists)} specialists"
        )
    facts = {
        "model": "MergedMoE",
        "arguments": arguments,
        "task": settings.data.task,
        "label_map": settings.data.label_map,
        "class_names": class_names(manifest, labels),
        "class_ids": list(labels),
        "owners": owners(manifest, labels),
        "mean": weights.payload.get("mean"),
        "std": weights.payload.get("std"),
        "image_size": manifest.image_size,
        "epoch": weights.payload.get("epoch", 0),
    }
    found = replace(weights, payload={"model_state_dict": state}, facts=facts)
    facts["temperature"] = float(rebuild(found).temperature)
    return found


def rebuild(weights: Artefact) -> MergedMoE:
    """Return the mixture that weights from `read_mixture` belong to, in evaluation mode.

    Raises:
        UserError: if they do not fit the network that they say they are of.
    """
    try:
        model = MergedMoE(**weights.facts["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{weights.path}: describes no mixture ({error})") from None
    load_state(model, weights.payload["model_state_dict"], weights.path)
    if not model.temperature > 0:
        raise UserError(f"{weights.path}: temperature is {float(model.temperature)}, not above 0")
    return model.eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights strictly.

    Raises:
        UserError: naming the first entry that is missing, not known, of another shape or not
            finite.
    """
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            what = "lacks" if name in own else "has an unknown"
            raise UserError(f"{path}: {what} {name} of a {type(model).__name__}")
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(state[name].shape)},"
                f" expected {tuple(own[name].shape)}"
            )
        if not state[name].isfinite().all():
            raise UserError(f"{path}: {name} is not finite")
    model.load_state_dict(dict(state))


def _told(weights: Artefact, model: str) -> dict[str, Any]:
    """Return what one of our files says of itself, for one that was copied without its sidecar."""
    if weights.payload.get("model") != model:
        return {}
    return {name: value for name, value in weights.payload.items() if name not in _STATES}


def _state(weights: Artefact) -> dict[str, Tensor]:
    """Return the weights of a file, which may hold them alone or beside other things."""
    state = weights.payload.get("model_state_dict", weights.payload)
    found = {
        name.removeprefix("module."): value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not found:
        raise UserError(f"{weights.path}: holds no weights, neither alone nor as model_state_dict")
    return found


def _shape(state: Mapping[str, Tensor], name: str, axes: int, path: Path) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"{path}: lacks {name}")
    shape = tuple(state[name].shape)
    if len(shape) != axes or not shape[0]:
        raise UserError(
            f"{path}: {name} has shape {shape}, expected {axes} axes, none of them empty"
        )
    return shape


def _arguments(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read the form of a public mixture off its weights."""
    numbers = {name.split(".")[1] for name in state if name.startswith("experts.")}
    width = _shape(state, "feature_extractor.0.conv.weight", 4, path)[0]
    mixes_logits = any(name.startswith("heads.") for name in state)
    last = _shape(state, "heads.0.weight" if mixes_logits else "classifier.weight", 2, path)
    by_pass = {} if mixes_logits else {"gating_feature_dim": max(last[1] - 8 * width, 0)}
    return {
        "classes": last[0],
        "num_experts": max(len(numbers), 1),
        "width": width,
        "combine": "logits" if mixes_logits else "features",
        **by_pass,
    }
