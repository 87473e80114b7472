"""The size of a training, for `--dry-run`."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from moectl.controller import tiny
from moectl.controller.environment import Environment
from moectl.controller.open import FACTS, open_backbone
from moectl.controller.profile import random_plans
from moectl.controller.settings import ControllerSettings
from moectl.controller.world import SIMULATED, find_model, open_environments
from moectl.engine.files import is_file

_HUB = {"text_vqa", "coco_2014_vqa", "okvqa", "coco_caption"}
_TIMED = 3


def size(settings: ControllerSettings) -> dict[str, Any]:
    """Return updates, executions, plans, and how long the executions take.

    Nothing is fetched: plans are counted if the network is on this disk, and executions timed if
    the questions are as well.

    Raises:
        UserError: if their files are not as they should be.
    """
    data, train = settings.data, settings.train
    updates = -(-data.train_samples // train.batch_size)
    per_epoch = data.train_samples * settings.grpo.group_size + data.val_samples
    found = {
        "updates per epoch": updates,
        "updates": updates * train.epochs,
        "executions per epoch": per_epoch,
        "executions at most": per_epoch * train.epochs,
    }
    model, device = find_model(settings.backbone.model), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    if model != SIMULATED and not _on_disk(model):
        return found
    if model != SIMULATED and _HUB & set(data.dataset):
        return {**found, "plans": open_backbone(model, device=device).space.size}
    environment = _questions(settings, device)
    seconds = _seconds(environment, train.seed)
    return {
        **found,
        "plans": environment.space.size,
        "seconds per execution": float(f"{seconds:.3g}"),
        "hours of executions at most": float(f"{seconds * per_epoch * train.epochs / 3600:.3g}"),
    }


def _on_disk(model: str) -> bool:
    folder = Path(model).expanduser()
    return model in tiny.SIZES or any(is_file(folder / name) for name in (FACTS, "config.json"))


def _questions(settings: ControllerSettings, device: torch.device) -> Environment:
    few = max(_TIMED, len(settings.data.dataset))
    data = settings.data.model_copy(update={"val_samples": few})
    latency = settings.latency.model_copy(update={"warmup": min(1, settings.latency.warmup)})
    small = settings.model_copy(update={"data": data, "latency": latency})
    return open_environments(small, device, ("val",))[0]["val"]


def _seconds(environment: Environment, seed: int) -> float:
    """Return the median time of a few executions, each of another question by another plan."""
    times = []
    for row, plan in enumerate(random_plans(environment.space, _TIMED, seed)):
        start = time.perf_counter()
        environment.execute(row % len(environment.ids), plan)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
