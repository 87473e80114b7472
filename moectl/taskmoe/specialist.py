"""Training of one specialist: a classifier of its own classes alone."""

import logging
from typing import Any

import torch

from moectl import __version__
from moectl.common import scores
from moectl.common.calibration import negative_log_likelihood
from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.files import write_json
from moectl.engine.inference import predict
from moectl.engine.loop import Loop
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.run import Run
from moectl.engine.seeding import seed_all
from moectl.engine.settings import dump
from moectl.taskmoe.baselines import dense_width
from moectl.taskmoe.data import Data, load, load_specialist, split_of
from moectl.taskmoe.manifest import find_manifest
from moectl.taskmoe.model import MergedMoE, Specialist
from moectl.taskmoe.report import report
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.weights import MONITOR, save_epoch

log = logging.getLogger(__name__)


def train_specialist(settings: TaskmoeSettings, run: Run[TaskmoeSettings]) -> None:
    """Train the specialist that the settings name; test its best epoch on its own classes."""
    data = load_classes(settings)
    run.keep_to(data.facts)
    model = build(settings, data).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.schedule, settings.optim.lr, settings.train.epochs)
    loop = run.loop(model, data.train, optimizer, schedule, MONITOR, smallest=2)
    log.info("%s: %s", run.folder, ", ".join(data.class_names))
    size = settings.eval.batch_size
    loop.rehearse(lambda: predict(loop.evaluating(), data.val, run.accelerator, size, 1))

    for step in loop:
        images, labels = step.batch
        logits = loop.model(images)
        loss = torch.nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=settings.loss.label_smoothing
        )
        step.update(loss, accuracy=(logits.argmax(1) == labels).float().mean())
        if step.ends_epoch:
            judged, truth = predict(loop.evaluating(), data.val, run.accelerator, size)
            best = step.score(
                {
                    "val/loss": negative_log_likelihood(judged.softmax(1), truth),
                    "val/accuracy": scores.accuracy(judged.argmax(1), truth),
                }
            )
            save_epoch(loop, facts_of(settings, data, model), step.epoch + 1, best=best)

    _finish(loop, data)


def load_classes(settings: TaskmoeSettings) -> Data:
    """Load what the specialist is to know; number 0 knows all classes.

    Raises:
        UserError: if there is no such specialist, or its data cannot be read.
    """
    number = settings.specialist.number
    if number == 0:
        return load(settings.data)
    count = len(find_manifest(settings.data.task, settings.data.root)[0].specialists)
    if number > count:
        raise UserError(
            f"specialist.number is {number}, task {settings.data.task} has {count} specialists"
        )
    return load_specialist(settings.data, number - 1)


def build(settings: TaskmoeSettings, data: Data) -> Specialist:
    """Return the network with initial weights that depend on the seed alone."""
    seed_all(settings.train.seed, "init")
    classes, section = len(data.class_names), settings.model
    width = section.width
    if settings.specialist.number == 0:  # as wide as has the weights of the mixture
        mixture = MergedMoE(classes=classes, **section.model_dump())
        width = dense_width(sum(part.numel() for part in mixture.parameters()), classes)
    return Specialist(classes, width, section.dropout_expert)


def facts_of(settings: TaskmoeSettings, data: Data, model: Specialist) -> dict[str, Any]:
    """Return what rebuilds a specialist and reads its outputs, as plain types."""
    return {
        "model": "Specialist",
        "arguments": {
            "classes": len(data.class_names),
            "width": model.conv1.conv.out_channels,
            "dropout": settings.model.dropout_expert,
        },
        "task": settings.data.task,
        "number": settings.specialist.number,
        "class_names": list(data.class_names),
        "class_ids": list(data.class_ids),
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "split": split_of(settings.data),
        "moectl": __version__,
    }


def _finish(loop: Loop, data: Data) -> None:
    """Test the best weights on the specialist's own classes."""
    run = loop.run
    if not len(data.test):
        raise UserError(f"{run.folder}: the specialist's classes have no test images")
    weights = artefact.load(run.folder / "best_model.pth")
    loop.module.load_state_dict(weights.payload["model_state_dict"])
    size = run.settings.eval.batch_size
    judged, truth = predict(loop.evaluating(), data.test, run.accelerator, size)
    hits = scores.per_class_accuracy(judged.argmax(1), truth, len(data.class_names))
    summary = {
        "best": {
            "epoch": weights.facts["epoch"],
            "accuracy": scores.accuracy(judged.argmax(1), truth),
            "images": len(truth),
            "classes": dict(zip(data.class_names, hits, strict=True)),
        }
    }
    run.note(scores=summary)
    if run.is_main:
        write_json(run.folder / "summary.json", summary)
        write_json(run.folder / "config.json", dump(run.settings))
        report(run.folder)
    log.info(
        "best epoch %d: %.1f %% of the test images of its classes",
        weights.facts["epoch"],
        100 * summary["best"]["accuracy"],
    )
