"""Training of the gated mixture, and what comes out of it."""

import logging
from collections.abc import Callable, Sequence
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
from moectl.engine.loop import Loop, Step
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.run import Run
from moectl.engine.seeding import seed_all
from moectl.engine.settings import dump
from moectl.taskmoe import analysis
from moectl.taskmoe.analysis import Examined
from moectl.taskmoe.data import Data, load, split_of
from moectl.taskmoe.eval import evaluate, write_evaluation
from moectl.taskmoe.inference import Opened, examine
from moectl.taskmoe.losses import (
    effective_experts,
    gate_entropy,
    moe_loss,
    owner_targets,
    temperature_at,
)
from moectl.taskmoe.model import MergedMoE
from moectl.taskmoe.report import draw_analysis, draw_curve, report
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.weights import MONITOR, Member, load_state, save_epoch

log = logging.getLogger(__name__)

Answer = tuple[Callable[[Tensor], Tensor], list[int]]
"""From images to logits, and the classes of the union that these are of."""

_CURVE_EVERY = 10  # epochs


def train(
    settings: TaskmoeSettings,
    run: Run[TaskmoeSettings],
    start: Artefact | None,
    teachers: Sequence[Member] = (),
) -> None:
    """Train the mixture, test its best epoch, and write the report.

    Args:
        settings: of the run.
        run: the run.
        start: the merged weights to begin with; random ones if None.
        teachers: the specialists, if their soft targets are to be distilled.
    """
    _check(settings, run)
    data = load(settings.data)
    run.keep_to(data.facts)
    model = build(settings, data).to(memory_format=torch.channels_last)
    if start is not None:
        load_state(model, start.payload["model_state_dict"], start.path)
    shared = list(model.feature_extractor.parameters())
    own = [weights for name, weights in model.named_parameters() if "feature_extractor" not in name]
    groups = [{"params": own}, {"params": shared}]
    optimizer = build_optimizer(settings.optim, groups)
    schedule = build_schedule(settings.schedule, settings.optim.lr, settings.train.epochs)
    loop = run.loop(model, data.train, optimizer, schedule, MONITOR, smallest=2)
    owners = data.owners.to(run.device)
    log.info("%s: %d images, %d classes", run.folder, len(data.train), len(data.class_names))
    answers = _answers(teachers, data, run.device)
    terms = settings.loss.model_dump()
    loop.rehearse(lambda: _examined(loop, data, 1))

    for step in loop:
        images, labels = step.batch
        _prepare(loop, model, step)
        output = loop.model(images)
        usage = over_processes(output.gates, run)
        shares = None
        if settings.loss.balance == "switch":
            shares = over_processes(one_hot(output.gates.argmax(1), owners.shape[1]).float(), run)
        targets = None
        if answers:
            logits = _union(answers, images, len(owners))
            targets = owner_targets(logits, labels, owners, settings.loss.distill_temperature)
        loss, parts = moe_loss(
            output, labels, owners, usage=usage, shares=shares, targets=targets, **terms
        )
        accuracy = (output.logits.argmax(1) == labels).float().mean()
        step.update(loss, **parts, accuracy=accuracy)
        if step.ends_epoch:
            examined = _examined(loop, data)
            best = step.score(epoch_scores(examined, data.owners, float(model.temperature)))
            facts = {**facts_of(settings, data), "temperature": float(model.temperature)}
            kept = {"optimizer_state_dict": loop.optimizer.state_dict()}
            save_epoch(loop, facts, step.epoch + 1, best=best, more=kept)
            _analyse(loop, data, examined, step.epoch + 1)

    _finish(loop, model, data)


def build(settings: TaskmoeSettings, data: Data) -> MergedMoE:
    """Return the network with initial weights that depend on the seed alone.

    Raises:
        UserError: if the number of experts is not that of the specialists.
    """
    experts = data.owners.shape[1]
    if settings.model.num_experts != experts:
        raise UserError(
            f"model.num_experts is {settings.model.num_experts}, but the task has {experts}"
            " specialists",
            f"--num-experts {experts}",
        )
    seed_all(settings.train.seed, "init")
    model = settings.model.model_dump()
    return MergedMoE(
        classes=len(data.class_names), temperature=settings.gate.initial_temperature, **model
    )


def _check(settings: TaskmoeSettings, run: Run[TaskmoeSettings]) -> None:
    """Refuse what cannot be computed, and warn of what is probably not wanted."""
    gate, loss = settings.gate, settings.loss
    if loss.reduction == "sum" and run.accelerator.num_processes > 1:
        raise UserError("loss.reduction = sum needs all of a batch in one process")
    for name, value, low, high in (
        ("initial", gate.initial_temperature, 1.5, 4.0),
        ("final", gate.final_temperature, 0.3, 1.0),
    ):
        if not low <= value <= high:
            log.warning("gate.%s_temperature is %g; usual are %g to %g", name, value, low, high)
    images = settings.train.batch_size if loss.reduction == "sum" else 1
    if loss.balance_weight < images * loss.diversity_weight:
        log.warning(
            "loss.balance_weight %g is below %g: all images may collapse onto one expert",
            loss.balance_weight,
            images * loss.diversity_weight,
        )
    if settings.model.top_k == 1:
        log.warning("model.top_k = 1 gives the gates no gradient: they stay as they began")
    if settings.train.select_on == "test":
        log.warning("the best epoch is chosen on the test images: val/… are their scores")


def _prepare(loop: Loop, model: MergedMoE, step: Step) -> None:
    """Set what depends on the epoch: the temperature, and whether the shared layers stand still."""
    settings = loop.run.settings
    gate, ends = settings.gate, (settings.gate.initial_temperature, settings.gate.final_temperature)
    epochs = gate.anneal_epochs or settings.train.epochs
    model.temperature.fill_(temperature_at(step.epoch, epochs, *ends, gate.schedule))
    if step.epoch < settings.train.freeze_extractor_epochs:
        model.feature_extractor.eval()
        loop.optimizer.param_groups[1]["lr"] = 0.0
    elif not model.feature_extractor.training:
        model.feature_extractor.train()
    if loop.run.is_main and loop.batch == 0 and step.epoch and step.epoch % _CURVE_EVERY == 0:
        draw_curve(loop.run.folder)


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


def _answers(teachers: Sequence[Member], data: Data, device: torch.device) -> list[Answer]:
    """Return what maps the training images to each teacher's logits, and its classes."""
    given = (data.mean, data.std)
    return [
        (member.asking(given, device), [data.class_ids.index(id) for id in member.class_ids])
        for member in teachers
    ]


@torch.no_grad()
def _union(answers: Sequence[Answer], images: Tensor, classes: int) -> Tensor:
    """Place the teachers' logits at their classes of the union, (B, E, C)."""
    logits = images.new_zeros(len(images), len(answers), classes)
    for number, (ask, rows) in enumerate(answers):
        logits[:, number, rows] = ask(images).to(logits)
    return logits


def _examined(loop: Loop, data: Data, batches: int = 0) -> Examined:
    """Examine the images that choose the best epoch."""
    settings = loop.run.settings
    source = data.test if settings.train.select_on == "test" else data.val
    model: Any = loop.evaluating()
    return examine(model, source, loop.run.accelerator, settings.eval.batch_size, batches)


def epoch_scores(examined: Examined, owners: Tensor, temperature: float) -> dict[str, float | None]:
    """Return the validation scores of one epoch."""
    logits, gates, labels = examined.logits(), examined.gates, examined.labels
    return {
        "val/loss": negative_log_likelihood(logits.softmax(1), labels),
        "val/accuracy": scores.accuracy(logits.argmax(1), labels),
        "val/owner_alignment": analysis.owner_alignment(examined, owners),
        "val/effective_gates": float(effective_experts(gates)),
        "val/gate_entropy": float(gate_entropy(gates)),
        "temperature": temperature,
        **{f"val/usage_expert_{number}": float(x) for number, x in enumerate(gates.mean(0))},
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
        "split": split_of(settings.data),
        "moectl": __version__,
    }


def _analyse(loop: Loop, data: Data, examined: Examined, epoch: int) -> None:
    """Draw what the experts do: after the first epoch, and after every interval."""
    every = loop.run.settings.train.expert_analysis_interval
    if loop.run.is_main and every and (epoch == 1 or epoch % every == 0):
        _write_analysis(loop, data, examined, epoch, f"expert_analysis_epoch{epoch}.png")


def _write_analysis(loop: Loop, data: Data, examined: Examined, epoch: int, picture: str) -> None:
    owners = data.owners.int().tolist()
    found = {"epoch": epoch, "class_names": data.class_names, "owners": owners}
    found |= analysis.summary(examined, data.owners)
    write_json(loop.run.folder / "expert_analysis.json", found)
    draw_analysis(loop.run.folder, found, picture)


def _finish(loop: Loop, model: MergedMoE, data: Data) -> None:
    """Test the best weights, and write what the original's document lists."""
    run = loop.run
    weights = artefact.load(run.folder / "best_model.pth")
    load_state(model, weights.payload["model_state_dict"], weights.path)
    loop.evaluating()
    opened = Opened(
        model=model,
        settings=run.settings,
        accelerator=run.accelerator,
        facts=weights.facts,
        weights={
            "file": "best_model.pth",
            "sha256": weights.sha256,
            "epoch": weights.facts["epoch"],
        },
        folder=run.folder,
        tag="best",
        loaded=data,
    )
    examined = opened.examine()
    document = evaluate(opened, examined)
    run.note(scores={"best": _headline(document)})
    if run.is_main:
        write_evaluation(run.folder / "evals" / "test@best", opened, examined, document)
        _write_results(loop, data, weights.facts, document)
        if run.settings.train.expert_analysis_interval:
            epoch = weights.facts["epoch"]
            _write_analysis(loop, data, examined, epoch, "expert_analysis.png")
        run.note(wall_seconds=round(run.elapsed_seconds, 3))
        report(run.folder)
    log.info(
        "best epoch %d (temperature %.2f): %.2f %% of %d test images",
        weights.facts["epoch"],
        weights.facts["temperature"],
        document["overall_accuracy"],
        document["n"],
    )


def _headline(document: dict[str, Any]) -> dict[str, Any]:
    names = ("overall_accuracy", "macro_accuracy", "group_accuracy", "nll", "ece15")
    return {"epoch": document["weights"]["epoch"], **{name: document[name] for name in names}}


def _write_results(loop: Loop, data: Data, facts: dict[str, Any], document: dict[str, Any]) -> None:
    """Write results.json and config.json with the keys of the original."""
    run, settings = loop.run, loop.run.settings
    rows = [row for row in loop.metrics.rows() if row.get("train/loss")]
    results = {
        "best_accuracy": 100 * loop.best["value"],
        "total_epochs": loop.epoch,
        "early_stopped": loop.patience_ends,
        "final_train_loss": float(rows[-1]["train/loss"]),
        "final_train_accuracy": 100 * float(rows[-1]["train/accuracy"]),
        "final_test_accuracy": document["overall_accuracy"],
        "best_epoch": facts["epoch"],
        "best_temperature": facts["temperature"],
        "selected_on": settings.train.select_on,
        "test": document,
    }
    config = {
        "model_name": run.record["name"],
        "task": settings.data.task,
        "num_epochs": settings.train.epochs,
        "learning_rate": settings.optim.lr,
        "weight_decay": settings.optim.weight_decay,
        "patience": settings.train.patience,
        "num_experts": settings.model.num_experts,
        "num_classes": len(data.class_names),
        "timestamp": run.record["started"],
        "expert_analysis_interval": settings.train.expert_analysis_interval,
        "diversity_weight": settings.loss.diversity_weight,
        "balance_weight": settings.loss.balance_weight,
        "initial_temperature": settings.gate.initial_temperature,
        "final_temperature": settings.gate.final_temperature,
        "settings": dump(settings),
    }
    write_json(run.folder / "results.json", results)
    write_json(run.folder / "config.json", config)
