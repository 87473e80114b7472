"""Training of the gated mixture, and what comes out of it."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moectl import __version__
from moectl.common import scores
from moectl.common.calibration import negative_log_likelihood
from moectl.engine import artefact
from moectl.engine.artefact import Artefact
from moectl.engine.errors import UserError
from moectl.engine.files import write_json
from moectl.engine.inference import predict
from moectl.engine.loop import Loop, Step
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.run import Run
from moectl.engine.seeding import seed_all
from moectl.engine.settings import dump
from moectl.taskmoe.data import Data, load
from moectl.taskmoe.losses import moe_loss, temperature_at
from moectl.taskmoe.measures import measure
from moectl.taskmoe.model import MergedMoE
from moectl.taskmoe.settings import TaskmoeSettings

log = logging.getLogger(__name__)

MONITOR = "val/accuracy"


def train(settings: TaskmoeSettings, run: Run[TaskmoeSettings], start: Artefact | None) -> None:
    """Train the mixture, and test its best epoch.

    Args:
        settings: of the run.
        run: the run.
        start: the merged weights to begin with; random ones if None.
    """
    data = load(settings.data, settings.train.seed)
    model = build(settings, data).to(memory_format=torch.channels_last)
    if start is not None:
        model.load_state_dict(start.payload["model_state_dict"])
        run.note(parents=[{"path": str(start.path), "sha256": start.sha256}])
    shared = list(model.feature_extractor.parameters())
    own = [weights for name, weights in model.named_parameters() if "feature_extractor" not in name]
    groups = [{"params": shared}, {"params": own}]
    optimizer = build_optimizer(settings.optim, groups)
    schedule = build_schedule(settings.schedule, settings.optim.lr, settings.train.epochs)
    loop = run.loop(model, data.train, optimizer, schedule, MONITOR)
    owners = data.owners.to(run.device)
    log.info("%s: %d images, %d classes", run.folder, len(data.train), len(data.class_names))
    loop.rehearse(lambda: _judge(loop, data, 1))

    for step in loop:
        images, labels = step.batch
        _prepare(loop, settings, step)
        output = loop.model(images)
        usage = over_processes(output.gates, run)
        shares = over_processes(one_hot(output.gates.argmax(1), owners.shape[1]).float(), run)
        terms = settings.loss.model_dump()
        loss, parts = moe_loss(output, labels, owners, usage=usage, shares=shares, **terms)
        accuracy = (output.logits.argmax(1) == labels).float().mean()
        step.update(loss, **parts, accuracy=accuracy)
        if step.ends_epoch:
            best = step.score(_judge(loop, data))
            _save(loop, data, step.epoch + 1, best=best)

    _finish(loop, data)


def build(settings: TaskmoeSettings, data: Data) -> MergedMoE:
    """Return the network with initial weights that depend on the seed alone.

    Raises:
        UserError: if the number of experts is not that of the specialists.
    """
    experts = data.owners.shape[1]
    if settings.model.num_experts != experts:
        raise UserError(
            f"model.num_experts is {settings.model.num_experts}, but the task has {experts}"
            " specialists"
        )
    seed_all(settings.train.seed, "init")
    model = settings.model.model_dump()
    return MergedMoE(
        classes=len(data.class_names), temperature=settings.gate.initial_temperature, **model
    )


def _prepare(loop: Loop, settings: TaskmoeSettings, step: Step) -> None:
    """Set what depends on the epoch: the temperature, and whether the shared layers stand still."""
    gate, model = settings.gate, loop.module
    epochs = gate.anneal_epochs or settings.train.epochs
    ends = (gate.initial_temperature, gate.final_temperature)
    model.temperature.fill_(temperature_at(step.epoch, epochs, *ends, gate.schedule))
    frozen = step.epoch < settings.train.freeze_extractor_epochs
    model.feature_extractor.train(not frozen)
    if frozen:
        loop.optimizer.param_groups[0]["lr"] = 0.0


def over_processes(gates: Tensor, run: Run[Any]) -> Tensor:
    """Return the mean gates of the batch over all processes, (E,), with the gradient of this one's.

    The gradients of the processes are averaged afterwards, so that together they are those of the
    whole batch: a balance of every process by itself would punish what is balanced in the whole.
    """
    own = gates.mean(0)
    if run.accelerator.num_processes == 1:
        return own
    total = gates.detach().sum(0)
    count = torch.tensor(float(len(gates)), device=gates.device)
    for value in (total, count):
        torch.distributed.all_reduce(value)
    return own + (total / count - own).detach()


def _judge(loop: Loop, data: Data, batches: int = 0) -> dict[str, float | None]:
    """Measure the mixture on the images that choose the best epoch."""
    settings = loop.run.settings
    model = loop.evaluating()
    source = data.test if settings.train.select_on == "test" else data.val
    experts = data.owners.shape[1]

    def forward(images: Tensor) -> Tensor:
        output = model(images)
        return torch.cat([output.logits, output.gates], 1)

    found, labels = predict(
        forward, source, loop.run.accelerator, settings.eval.batch_size, batches
    )
    logits, gates = found[:, :-experts], found[:, -experts:]
    usage = gates.mean(0)
    owned = (gates * data.owners[labels]).sum(1)
    return {
        "val/loss": negative_log_likelihood(logits.softmax(1), labels),
        "val/accuracy": scores.accuracy(logits.argmax(1), labels),
        "val/owner_alignment": float(owned.mean()),
        "val/effective_experts": float((1 / gates.square().sum(1)).mean()),
        "val/gate_entropy": float(torch.special.entr(gates).sum(1).mean()),
        "temperature": float(model.temperature),
        **{f"val/usage_expert_{number}": float(share) for number, share in enumerate(usage)},
    }


def facts_of(settings: TaskmoeSettings, data: Data) -> dict[str, Any]:
    """Return what rebuilds the mixture and reads its outputs, as plain types."""
    return {
        "model": "MergedMoE",
        "arguments": {**settings.model.model_dump(), "classes": len(data.class_names)},
        "task": settings.data.task,
        "label_map": settings.data.label_map,
        "class_names": list(data.class_names),
        "class_ids": list(data.class_ids),
        "owners": data.owners.int().tolist(),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "moectl": __version__,
    }


def _save(loop: Loop, data: Data, epoch: int, *, best: bool) -> None:
    run, settings = loop.run, loop.run.settings
    last = epoch == settings.train.epochs or loop.patience_ends
    if not (best or last):
        return
    facts = facts_of(settings, data)
    temperature = float(loop.module.temperature)
    payload = {
        "epoch": epoch,
        "model_state_dict": loop.module.state_dict(),
        "optimizer_state_dict": loop.optimizer.state_dict(),
        "accuracy": 100 * loop.best["value"],
        "config": dump(settings),
        "format_version": 1,
        "temperature": temperature,
        **{name: facts[name] for name in ("label_map", "class_names", "owners", "mean", "std")},
        "image_size": data.image_size,
    }
    facts["temperature"] = temperature
    if last:
        run.save_weights("last.pth", payload, facts, epoch=epoch)
    if best:
        run.save_weights("best_model.pth", payload, facts, epoch=epoch, best=True)


def _finish(loop: Loop, data: Data) -> None:
    """Test the best weights, and write what the original's document lists."""
    run = loop.run
    settings = run.settings
    weights = artefact.load(run.folder / "best_model.pth")
    loop.module.load_state_dict(weights.payload["model_state_dict"])
    model, experts = loop.evaluating(), data.owners.shape[1]
    logits, labels = predict(
        lambda images: model(images).logits, data.test, run.accelerator, settings.eval.batch_size
    )
    document = measure(logits, labels, data.class_names, data.owners)
    overall = document["overall_accuracy"]
    results = {
        "best_accuracy": 100 * loop.best["value"],
        "best_epoch": weights.facts["epoch"],
        "best_temperature": weights.facts["temperature"],
        "total_epochs": loop.epoch,
        "early_stopped": loop.patience_ends,
        "selected_on": settings.train.select_on,
        "experts": experts,
        "test": document,
    }
    run.note(scores={"best": {"epoch": results["best_epoch"], "test": overall}})
    if run.is_main:
        write_json(run.folder / "results.json", results)
        write_json(run.folder / "config.json", dump(settings))
    log.info(
        "best epoch %d: %.2f %% of the test images",
        results["best_epoch"],
        overall,
    )
