"""Training in three stages: concepts, prototypes, verdict.

Letters: B batch, K concepts, M prototypes per concept, C classes, P present pairs, D projection.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.csr import losses
from moectl.csr.data import Part
from moectl.csr.edits import statistics, statistics_to_plain
from moectl.csr.inference import outputs
from moectl.csr.metrics import ranking, tune_thresholds
from moectl.csr.model import Given, Stage
from moectl.csr.prototypes import diagnostics, initial, renormalise_, revive
from moectl.csr.report import report
from moectl.csr.settings import CsrSettings
from moectl.csr.stages import STAGES, Training
from moectl.csr.verdict import Scores, monitor_of, task_loss, task_scores
from moectl.engine.errors import UserError
from moectl.engine.loop import Loop
from moectl.engine.run import Run
from moectl.engine.seeding import key
from moectl.engine.sources import Source, TensorSource

log = logging.getLogger(__name__)


def train(
    settings: CsrSettings, run: Run[CsrSettings], stages: Sequence[Stage], start: str = ""
) -> None:
    """Train some stages, each from the best weights of the one before.

    Args:
        settings: of the run.
        run: where everything goes.
        stages: in their order.
        start: a run or file with the weights before the first of them, if the run has none.
    """
    training = Training(settings, run)
    if settings.task.curation and list(stages) != ["task"]:
        raise UserError(
            "task.curation is of prototypes that are there: it goes with --stage task",
            "--from RUN names the run that the file was written for",
        )
    for stage in stages:
        training.check_labels(stage)
    begun = run.record.get("stages", [])
    run.note(stages=[stage for stage in STAGES if stage in stages or stage in begun])
    for stage in stages:
        log.info("stage %d: %s", STAGES.index(stage) + 1, stage)
        training.hand_over(stage, start)
        match stage:
            case "concept":
                train_concepts(training)
            case "prototype":
                train_prototypes(training)
            case "task":
                train_task(training)
    training.forget_features()
    if run.is_main:
        report(run.folder)


def train_concepts(training: Training) -> None:
    """Stage 1: the backbone and the maps that show where a concept is."""
    settings, data = training.settings, training.data
    section, epochs = settings.concept, settings.train.epochs_stage1
    factors = {"backbone": section.backbone_lr}
    loop = training.loop("concept", data.train.source, factors, epochs, "val/concept_auroc")
    truth = data.train.concepts.to(training.run.device)
    weight = losses.pos_weights(truth.sum(0), len(truth), section.pos_weight_cap)
    log.info("positives weigh %.2f to %.2f", float(weight.min()), float(weight.max()))
    for step in loop:
        (images, masks), rows = step.batch
        targets = truth[rows]
        output = loop.model(images, None, ("cams", "concept_logits"))
        named = {"classes": _concept_loss(section.loss, output.concept_logits, targets, weight)}
        loss = section.alpha * named["classes"]
        if data.has_boxes:
            exists = masks.flatten(2).any(2)
            count = training.over_processes(exists.sum(), step)
            named["boxes"] = losses.localisation_loss(
                output.cams, masks, exists, section.loc_loss, count
            )
            loss = loss + section.beta * named["boxes"]
        step.update(loss, **{f"loss_{name}": part.detach() for name, part in named.items()})
        if step.ends_epoch:
            scores = _concept_scores(training)
            if step.score(scores):
                name = "best_model_stage1.pth"
                training.save(name, "concept", step.epoch + 1, scores, best=True)
    if not epochs:  # the backbone as it was loaded
        training.save("best_model_stage1.pth", "concept", 0, {}, best=True)


def _concept_loss(kind: str, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    match kind:
        case "bce":
            return losses.concept_bce(logits, targets, weight)
        case "focal":
            return losses.focal(logits, targets)
        case _:
            return losses.asymmetric(logits, targets)


def _concept_scores(training: Training) -> Scores:
    part, run = training.data.val, training.run
    size = training.settings.eval.batch_size
    found = outputs(training.model, part.still, ("concept_logits",), run.accelerator, size)
    logits = found.concept_logits
    scores = ranking(logits.numpy(), part.concepts.numpy(), training.data.concepts)
    return {
        "val/loss": float(losses.concept_bce(logits, part.concepts)),
        "val/concept_auroc": scores["auroc_macro"],
        "val/concept_map": scores["map"],
    }


def train_prototypes(training: Training) -> None:
    """Stage 2: the projector, and the forms that each concept takes."""
    settings, data, model = training.settings, training.data, training.model
    section, epochs = settings.prototype, settings.train.epochs_stage2
    factors = dict.fromkeys(("projector", "prototypes"), section.lr_factor)
    source, given = training.shown()
    # Where the last epoch counts anyway, the best ones need no checkpoints.
    watched = settings.task.start == "best" or settings.train.patience
    monitor = "val/assignment_accuracy" if watched else ""
    loop = training.loop("prototype", source, factors, epochs, monitor)
    if loop.update == 0 and section.init != "random":
        _place(training)
    truth = data.train.concepts.to(training.run.device)
    for step in loop:
        (inputs, *_), rows = step.batch
        needs = ("local_vectors", "prototypes")
        output = loop.model(inputs, None, needs, given=given, detach_cams=True)
        vectors, concepts = losses.present_pairs(output.local_vectors, truth[rows])
        count = training.over_processes(len(vectors), step)
        loss = _prototype_loss(section, vectors, concepts, output.prototypes, count)
        if section.diversity_weight:
            loss = loss + section.diversity_weight * losses.diversity_loss(output.prototypes)
        step.update(loss)
        with torch.no_grad():
            renormalise_(model.prototype_vectors)
        if step.ends_epoch:
            epoch, every = step.epoch + 1, section.revive_every
            if every and epoch % every == 0 and epoch <= epochs - every:
                _revive(training, loop, epoch)
            scores = _prototype_scores(training)
            if step.score(scores) and settings.task.start == "best":
                training.save("best_model_stage2.pth", "prototype", epoch, scores)
            if epoch % 5 == 0 or epoch == epochs or loop.patience_ends:
                training.save(f"model_stage2_epoch{epoch}.pth", "prototype", epoch, scores)
            if epoch == epochs or loop.patience_ends:
                _warn_of_collapse(scores)
    if not epochs:
        training.save("model_stage2_epoch0.pth", "prototype", 0, {})


def _warn_of_collapse(scores: Scores) -> None:
    within = scores["val/within_mean"]
    if within is not None and within > 0.8:
        log.warning("the prototypes of a concept are nearly one (mean cosine %.2f)", within)


def _prototype_loss(
    section: Any, vectors: Tensor, concepts: Tensor, prototypes: Tensor, count: float | None
) -> Tensor:
    if section.loss == "infonce":
        options = {"temperature": section.temperature, "count": count}
        return losses.info_nce(vectors, concepts, prototypes, **options)
    return losses.soft_triple(
        vectors,
        concepts,
        prototypes,
        scale=section.scale,
        gamma=section.gamma,
        margin=section.margin,
        mode=section.margin_mode,
        count=count,
    )


def _pairs(training: Training, part: Part) -> tuple[Tensor, Tensor]:
    vectors = training.outputs(part, "local_vectors").local_vectors
    return losses.present_pairs(vectors, part.concepts)


@torch.no_grad()
def _place(training: Training) -> None:
    """Let prototypes begin among the training images' vectors."""
    section, seed = training.settings.prototype, key(training.settings.train.seed, "prototypes")
    vectors, concepts = _pairs(training, training.data.train)
    sizes = (training.model.num_concepts, training.model.num_prototypes)
    found = initial(vectors, concepts, sizes[0], sizes[1], section.init, seed % 2**31)
    training.model.prototype_vectors.copy_(found)


@torch.no_grad()
def _revive(training: Training, loop: Loop, epoch: int) -> None:
    """Give prototypes that nothing is nearest to a new place, and forget their momentum."""
    vectors, concepts = _pairs(training, training.data.train)
    seed = key(training.settings.train.seed, "revive", epoch) % 2**31
    own = training.model.prototype_vectors
    found = revive(own.cpu(), vectors, concepts, seed)
    own.copy_(found.prototypes)
    rows = found.moved.flatten()
    for moments in (loop.optimizer.state.get(training.model.prototypes, {}),):
        for value in moments.values():
            if isinstance(value, Tensor) and value.shape == training.model.prototypes.shape:
                value[rows] = 0
    log.info("%d prototypes have a new place", int(rows.sum()))


def _prototype_scores(training: Training) -> Scores:
    vectors, concepts = _pairs(training, training.data.val)
    prototypes = training.model.prototype_vectors.detach().cpu()
    found = diagnostics(prototypes, vectors, concepts)
    loss = _prototype_loss(training.settings.prototype, vectors, concepts, prototypes, None)
    shares = [share for share in found.top_shares if share == share]
    values = {
        "loss": float(loss),
        "assignment_accuracy": found.accuracy,
        "coverage": found.coverage,
        "alive": float(found.alive),
        "top_share": float(np.mean(shares)) if shares else float("nan"),
        "within_mean": found.within_mean,
        "within_max": found.within_max,
        "across_mean": found.across_mean,
        "across_max": found.across_max,
    }
    return {f"val/{name}": None if value != value else value for name, value in values.items()}


def train_task(training: Training) -> None:
    """Stage 3: the linear verdict over similarities, which are the same in every epoch."""
    settings, data, model = training.settings, training.data, training.model
    section, epochs = settings.task, settings.train.epochs_stage3
    several = settings.data.task_mode == "multilabel"
    training.curate()
    seen = training.outputs(data.train, "similarity_scores").similarity_scores
    held = training.outputs(data.val, "similarity_scores", "concept_logits")
    if settings.model.task_norm == "standardize":
        kept = model.kept.cpu()
        said = seen.masked_fill(~kept, -1).amax(2) if model.task_input == "max" else seen
        inputs = said.flatten(1)
        model.set_task_norm(inputs.mean(0).to(model.task_mean), inputs.std(0).to(model.task_std))
    source, given = _verdict_source(training, seen)
    loop = training.loop(
        "task", source, {"task_head": section.lr_factor}, epochs, monitor_of(several)
    )
    truth = data.train.targets.to(training.run.device)
    counts = truth.sum(0) if several else truth.bincount(minlength=len(data.targets))
    known = statistics_to_plain(statistics(seen, data.train.concepts))

    def save(name: str, epoch: int, scores: Scores, best: bool) -> None:
        logits = _classified(training, held.similarity_scores)
        thresholds = _thresholds(training, held.concept_logits, logits)
        more = {"score_statistics": known, "thresholds": thresholds}
        training.save(name, "task", epoch, scores, best=best, **more)

    for step in loop:
        inputs, rows = step.batch
        inputs = inputs if isinstance(inputs, Tensor) else inputs[0]
        logits = loop.model(inputs, given=given).logits.float()
        step.update(task_loss(section, logits, truth[rows], counts, len(truth)))
        if step.ends_epoch:
            scores = task_scores(
                _classified(training, held.similarity_scores), data.val, data.targets
            )
            if step.score(scores):
                save("best_model_stage3.pth", step.epoch + 1, scores, True)
    if not epochs:
        save("best_model_stage3.pth", 0, {}, True)
    save("final_model.pth", loop.epoch, {}, False)


def _verdict_source(training: Training, seen: Tensor) -> tuple[Source, Given]:
    """Return similarities of images that do not move, computed once, or else the images."""
    source, given = training.shown()
    if given == "images":
        return source, given
    return TensorSource(seen, torch.arange(len(seen)), None, lambda scores: scores), "scores"


@torch.no_grad()
def _classified(training: Training, scores: Tensor) -> Tensor:
    """Return the logits that the task head gives for similarity scores, on the CPU."""
    training.model.eval()
    return training.model.classify(scores.to(training.run.device)).float().cpu()


def _thresholds(training: Training, concepts: Tensor, logits: Tensor) -> dict[str, list[float]]:
    """Tune thresholds on the validation images; one class per image needs none for its classes."""
    val = training.data.val
    found = {"concepts": tune_thresholds(concepts.numpy(), val.concepts.numpy()).tolist()}
    if val.targets.ndim == 2:
        found["targets"] = tune_thresholds(logits.numpy(), val.targets.numpy()).tolist()
    return found
