"""Opening a trained mixture, and what it says about images, in one pass."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import is_file
from moectl.engine.inference import predict
from moectl.engine.launch import build_accelerator
from moectl.engine.opened import Trained, accelerator_for, summary
from moectl.engine.references import exact, find_weights, finished_runs, split_reference
from moectl.engine.settings import dump, flatten, resolve
from moectl.engine.sources import Source
from moectl.taskmoe.analysis import Examined
from moectl.taskmoe.data import Data, load
from moectl.taskmoe.model import MergedMoE
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.weights import read_mixture, rebuild

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Opened(Trained):
    """A trained mixture, and how to reach the data that it is measured on.

    Its tag is `best`, `last`, `epoch10` … or the name of the file.
    """

    settings: TaskmoeSettings
    model: MergedMoE
    """In evaluation mode, on the accelerator's device."""
    loaded: Data | None = None

    @cached_property
    def data(self) -> Data:
        """The task's data, normalised as in the training; loaded when it is first asked for.

        Raises:
            UserError: if it is not there, or has other classes than the weights.
        """
        if self.loaded is not None:
            return self.loaded
        return _data_of(self.settings, self.facts, self.weights["file"])

    def examine(self) -> Examined:
        """Return what the logits of the test images are made of."""
        size = self.settings.eval.batch_size
        return examine(self.model, self.data.test, self.accelerator, size)


def open_mixture(
    request: Request,
    checkpoint: Path | None = None,
    temperature: float | None = None,
    accelerator: "Accelerator | None" = None,
) -> Opened:
    """Open the mixture that a command asks for.

    Args:
        request: the run, if one is read, and the settings.
        checkpoint: a file to open instead.
        temperature: of the gates; that of the weights if None.
        accelerator: that of a mixture opened before, as there is one per process.

    Raises:
        UserError: if the weights are not those of a mixture, or not as the request describes them.
    """
    settings: Any = request.settings
    reference = exact(request.run, request.folder)
    path = checkpoint or find_weights(reference, "taskmoe")
    weights = read_mixture(path, settings)
    facts = weights.facts
    settings = _as_trained(request, facts, path)
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected a number above 0")
    if accelerator is None and is_file(path.parent / "run.json"):
        accelerator = accelerator_for(settings.train, request.cpu, path.parent)
    accelerator = accelerator or build_accelerator(settings.train, request.cpu)
    model = rebuild(weights).to(accelerator.device).to(memory_format=torch.channels_last)
    if temperature is not None:
        model.temperature.fill_(temperature)
    tag = split_reference(reference)[1] if checkpoint is None else path.stem
    return Opened(
        model=model,
        settings=settings,
        accelerator=accelerator,
        facts=facts,
        weights={**summary(weights), "file": str(path)},
        folder=path.parent,
        tag=_tag(tag or path.stem, settings, facts, temperature),
    )


def _tag(
    tag: str, settings: TaskmoeSettings, facts: dict[str, Any], temperature: float | None
) -> str:
    """Name the conditions of a measurement, so that one does not take the place of another."""
    parts = [f"epoch{tag}" if tag.isdigit() else tag]
    parts += [] if temperature is None else [f"T{temperature:g}"]
    dedup = settings.data.dedup
    parts += [] if facts.get("split", {}).get("dedup", dedup) == dedup else [f"dedup_{dedup}"]
    return "-".join(parts)


def _as_trained(request: Request, facts: dict[str, Any], path: Path) -> TaskmoeSettings:
    """Return the settings with what the weights themselves know.

    Raises:
        UserError: if something else was asked for.
    """
    settings: Any = request.settings
    known = {"data.task": facts["task"], "data.label_map": facts["label_map"]}
    known |= {f"model.{name}": value for name, value in facts["arguments"].items()}
    values = flatten(dump(settings))
    for key in _asked(request):
        if key in known and values[key] != known[key]:
            raise UserError(f"{path}: has {key} = {known[key]}, asked for is {values[key]}")
    split = facts.get("split", {})
    own = {"task": facts["task"], "label_map": facts["label_map"]}
    own |= {"split_seed": split["seed"], "val_fraction": split["fraction"]} if split else {}
    return settings.model_copy(update={"data": settings.data.model_copy(update=own)})


def _asked(request: Request) -> list[str]:
    """Return the keys that were set for this command, not by the run."""
    return [key for key in request.origin if request.names(key)]


def _data_of(settings: TaskmoeSettings, facts: dict[str, Any], file: str) -> Data:
    stored = (tuple(facts["mean"]), tuple(facts["std"])) if facts["mean"] else None
    data = load(settings.data, stored)
    if data.class_names != facts["class_names"]:
        raise UserError(
            f"{file}: has the classes {', '.join(facts['class_names'][:5])} …, the data of task"
            f" {settings.data.task} {', '.join(data.class_names[:5])} …",
            f"--set data.task={facts['task']} --set data.label_map={facts['label_map']}",
        )
    return data


def for_task(request: Request, task: str) -> Request:
    """Turn a request for the newest run, or for a file, into one for a task.

    Args:
        request: as it came; left alone if no task is named.
        task: whose newest finished training is wanted.

    Raises:
        UserError: if there is none, or the run that the request names is of another task.
    """
    settings: Any = request.settings
    if not task:
        return request
    if request.folder is None:
        data = settings.data.model_copy(update={"task": task})
        settings = settings.model_copy(update={"data": data})
        return replace(request, settings=settings, origin={**request.origin, "data.task": "--task"})
    if request.run != "latest":
        if settings.data.task != task:
            raise UserError(f"{request.folder}: is of task {settings.data.task}, not {task}")
        return request
    for folder, _ in finished_runs("taskmoe", "train"):
        own = _resolved(request, folder)
        if own.data.task == task:
            return replace(request, folder=folder, run=f"{folder}@best", settings=own)
    raise UserError(
        f"task {task}: no finished run of the training", f"moectl taskmoe train --task {task}"
    )


def _resolved(request: Request, folder: Path) -> TaskmoeSettings:
    """Return the settings of a run, with what the request itself asks for on top."""
    values = flatten(dump(request.settings))
    asked = {key: values[key] for key in _asked(request)}
    return resolve(TaskmoeSettings, asked, [], [], folder / "settings.toml")[0]


def examine(
    model: MergedMoE,
    source: Source,
    accelerator: "Accelerator",
    batch_size: int,
    batches: int = 0,
) -> Examined:
    """Compute what the logits of all images are made of; they follow for any gates.

    Args:
        model: in evaluation mode.
        source: the images.
        accelerator: devices and processes, over which the images are dealt.
        batch_size: images per forward pass.
        batches: stop after so many; 0 takes all.
    """
    bias: list[Tensor] = []

    def forward(images: Tensor) -> Tensor:
        parts = model.parts(images)
        experts, by_pass, constant = model.split_logits(parts)
        bias.append(constant)
        gates = model.route(parts.gate_logits)
        return torch.cat([experts.flatten(1), by_pass, parts.gate_logits.float(), gates.float()], 1)

    found, labels = predict(forward, source, accelerator, batch_size, batches)
    experts, classes = len(model.experts), len(bias[0])
    sizes = [experts * classes, classes, experts, experts]
    logits, by_pass, gate_logits, gates = torch.split(found, sizes, dim=1)
    return Examined(
        expert_logits=logits.view(-1, experts, classes),
        by_pass=by_pass,
        bias=bias[0].detach().float().cpu(),
        gate_logits=gate_logits,
        gates=gates,
        labels=labels,
        top_k=model.top_k,
    )
