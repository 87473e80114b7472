"""Training of the experts, and what comes out of it."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moectl import __version__
from moectl.balpoe.data import Data, load, sizes
from moectl.balpoe.eval import epoch_scores, measure, write_evaluation
from moectl.balpoe.inference import outputs_of, predict
from moectl.balpoe.losses import balpoe_loss, log_prior, mix, mixed_accuracy
from moectl.balpoe.model import BalpoeNet, load_public, multiply_adds
from moectl.balpoe.report import report
from moectl.balpoe.settings import BalpoeSettings
from moectl.common.arithmetic import traced_outputs
from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.files import sha256, write_json
from moectl.engine.loop import Loop
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.run import Run
from moectl.engine.seeding import seed_all
from moectl.engine.settings import dump

log = logging.getLogger(__name__)

MONITOR = "val/balanced_accuracy"


def train(settings: BalpoeSettings, run: Run[BalpoeSettings]) -> None:
    """Train the experts, test the last and the best epoch, and write the report."""
    _warn(settings)
    with run.accelerator.main_process_first():  # one download for all
        data = load(settings.data, settings.train.seed)
    run.keep_to(_facts(settings, data))
    model = build(settings, len(data.class_counts)).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.schedule, settings.optim.lr, settings.train.epochs)
    loop = run.loop(model, data.train, optimizer, schedule, MONITOR)
    prior = log_prior(data.class_counts).to(run.device)
    taus = torch.tensor(settings.taus, device=run.device)
    if run.is_main:
        _write_facts(settings, data, run.folder)
        _announce(run, data, model)
    size = settings.eval.batch_size
    loop.rehearse(lambda: predict(loop.evaluating(), data.val, run.accelerator, size, 1))

    for step in loop:
        images, labels = step.batch
        loss_settings = settings.loss
        plain = 0 < loss_settings.finetuning_start <= step.epoch
        mode = "default" if plain else loss_settings.mix
        mixed = mix(images, labels, mode, loss_settings.mixup_alpha, loss_settings.cutmix_alpha)
        logits = loop.model(mixed.images)
        loss, parts = balpoe_loss(logits, mixed, prior, taus)
        accuracy = mixed_accuracy(logits.mean(1).argmax(1), mixed)
        step.update(loss, **parts, accuracy=accuracy, mixing_weight=mixed.lam)
        if step.ends_epoch:
            validated = predict(loop.evaluating(), data.val, run.accelerator, size)
            best = step.score(epoch_scores(*validated, data.class_counts))
            _save(loop, data, step.epoch + 1, best=best)

    _finish(settings, data, loop)


def _announce(run: Run[BalpoeSettings], data: Data, model: nn.Module) -> None:
    record, batch = run.record, run.settings.train.batch_size
    weights = sum(parameter.numel() for parameter in model.parameters())
    log.info("%s: %d images, %d classes", run.folder, len(data.train), len(data.class_counts))
    log.info(
        "%s weights on %s, precision %s; %d process(es) of %d thread(s), batch %d in all",
        f"{weights:,}",
        run.device.type,
        run.accelerator.mixed_precision,
        record["processes"],
        record["threads"],
        batch,
    )


def build(settings: BalpoeSettings, classes: int) -> nn.Module:
    """Return the network with initial weights that depend on the seed alone.

    Raises:
        UserError: if the options of the model contradict each other.
    """
    seed_all(settings.train.seed, "init")
    try:
        return BalpoeNet(classes=classes, **settings.model.model_dump())
    except ValueError as error:
        raise UserError(f"[model] {error}") from None


def facts_of(settings: BalpoeSettings, data: Data) -> dict[str, Any]:
    """Return what rebuilds the model and reads its outputs, as plain types."""
    return {
        "model": "BalpoeNet",
        "arguments": {**settings.model.model_dump(), "classes": len(data.class_counts)},
        "taus": list(settings.taus),
        "class_counts": list(data.class_counts),
        "class_names": list(data.class_names),
        "moectl": __version__,
    }


def _save(loop: Loop, data: Data, epoch: int, *, best: bool) -> None:
    """Write the weights files that are due after an epoch."""
    run, settings = loop.run, loop.run.settings
    due = (
        epoch % settings.train.save_period == 0
        or epoch == settings.train.epochs
        or loop.patience_ends
    )
    if not (best or due):
        return
    payload = {
        "arch": settings.model.arch,
        "epoch": epoch,
        "state_dict": loop.module.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "monitor_best": loop.best["value"],
        "config": dump(settings),
        "criterion": {"name": "balpoe", "taus": list(settings.taus)},
        "class_counts": list(data.class_counts),
        "format_version": 1,
    }
    facts = facts_of(settings, data)
    if due:
        run.save_weights(f"checkpoint-epoch{epoch}.pth", payload, facts, epoch=epoch)
    if best:
        run.save_weights("model_best.pth", payload, facts, epoch=epoch, best=True)


def _finish(settings: BalpoeSettings, data: Data, loop: Loop) -> None:
    """Measure the last and the best weights on the test set, and draw what there is to see."""
    run = loop.run
    summary = {}
    for name, file in (("last", f"checkpoint-epoch{loop.epoch}.pth"), ("best", "model_best.pth")):
        weights = artefact.load(run.folder / file)
        loop.module.load_state_dict(weights.payload["state_dict"])
        model, digest = loop.evaluating(), weights.sha256
        outputs = outputs_of(model, data, settings, run.accelerator, digest)
        document = measure(outputs, settings)
        entry = {"file": file, "sha256": digest, "epoch": weights.facts["epoch"]}
        summary[name] = {"epoch": entry["epoch"], **document["scores"]}
        if run.is_main:
            write_evaluation(run.folder, f"test@{name}", document, entry)
    run.note(scores=summary)
    if run.is_main:
        write_json(run.folder / "summary.json", summary)
        report(run.folder)


def _write_facts(settings: BalpoeSettings, data: Data, folder: Path) -> None:
    write_json(folder / "config.json", dump(settings))
    counts = dict(zip(data.class_names, data.class_counts, strict=True))
    write_json(folder / "class_counts.json", counts)
    write_json(folder / "split.json", {"val": data.val_indices, "test": data.test_indices})


def _facts(settings: BalpoeSettings, data: Data) -> dict[str, Any]:
    """Return what a resumed run must find again: the classes, and which images serve for what.

    Limit: images of other contents, as many in each class, are not noticed.
    """
    division = [data.class_names, data.class_counts, data.val_indices, data.test_indices]
    return {
        "dataset": settings.data.dataset,
        "images": {name: len(getattr(data, name)) for name in ("train", "val", "test")},
        "digest": sha256(json.dumps(division).encode())[:16],
    }


def _warn(settings: BalpoeSettings) -> None:
    mean = sum(settings.taus) / len(settings.taus)
    if abs(mean - 1) > 1e-6:
        log.warning(
            "the mean tau is %.3g, not 1: the ensemble does not aim at balanced classes", mean
        )
    alphas = {"mixup": settings.loss.mixup_alpha, "cutmix": settings.loss.cutmix_alpha}
    if not any(alpha for name, alpha in alphas.items() if name in settings.loss.mix):
        log.warning("images are not mixed: the product of experts assumes calibrated experts")


def import_weights(path: Path, settings: BalpoeSettings, run: Run[BalpoeSettings]) -> None:
    """Make a run of a public `.pth` of the original code, so that `eval` can use it.

    Args:
        path: of the weights.
        settings: of the model they fit and of the data they were trained on.
        run: that gets them.

    Raises:
        UserError: if the file holds no weights, or those of another model.
    """
    found = artefact.load(path)
    with run.accelerator.main_process_first():
        data = load(settings.data, settings.train.seed)
    state = load_public(found.payload.get("state_dict", found.payload))
    model = build(settings, len(data.class_counts))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"{path}: does not fit this model: {' '.join(lines[1:3]).strip()}",
            "set --arch, --experts, --use-norm and the dimensions it was trained with",
        ) from None
    epoch = int(found.payload.get("epoch", 0))
    payload = {
        "arch": settings.model.arch,
        "epoch": epoch,
        "state_dict": state,
        "format_version": 1,
    }
    name = f"checkpoint-epoch{epoch}.pth"
    run.note(parents=[{"path": str(path), "sha256": found.sha256}])
    _write_facts(settings, data, run.folder)
    run.save_weights(name, payload, facts_of(settings, data), epoch=epoch)
    if run.is_main:
        report(run.folder)


def size(settings: BalpoeSettings) -> dict[str, Any]:
    """Return the size of the job without doing it: parameters, multiply-adds, updates, memory."""
    sets = sizes(settings.data, settings.train.seed)
    with torch.device("meta"):
        model = build(settings, sets.classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    convolutions, head = multiply_adds(model, sets.side)
    updates = -(-sets.train // settings.train.batch_size)
    # Weights, gradient, momentum and a copy while saving; then what one chunk leaves behind.
    chunk = settings.train.batch_size / settings.train.accumulate
    memory = 16 * parameters + chunk * _activations(model, sets.side)
    return {
        "training images": sets.train,
        "validation images": sets.val,
        "test images": sets.test,
        "classes": sets.classes,
        "parameters": parameters,
        "multiply-adds per image": convolutions + head,
        "updates per epoch": updates,
        "updates": updates * settings.train.epochs,
        "memory estimate (MiB)": round(memory / 2**20),
    }


def _activations(model: nn.Module, side: int) -> float:
    """Bytes that one image leaves for the backward pass: every module's output, in fp32."""
    total = 0

    def count(_name: str, module: nn.Module, output: Tensor) -> None:
        nonlocal total
        if not list(module.children()):
            total += output.numel()

    traced_outputs(model, side, count)
    return 4.0 * total
