"""Training in three stages: concepts, prototypes, verdict.

Letters: B batch, K concepts, M prototypes per concept, C classes, P present pairs, D projection.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moectl import __version__
from moectl.csr import losses
from moectl.csr.backbones import build_backbone
from moectl.csr.data import Data, Part, load
from moectl.csr.metrics import multiclass, ranking
from moectl.csr.model import CSRNet, Need, Stage
from moectl.csr.prototypes import diagnostics, initial, renormalise_, revive
from moectl.csr.settings import CsrSettings
from moectl.engine import artefact
from moectl.engine.inference import predict
from moectl.engine.loop import Loop
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.run import Run
from moectl.engine.seeding import key, seed_all

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("concept", "prototype", "task")


class Training:
    """What the stages share: the data, the network, and the run that they write to."""

    def __init__(self, settings: CsrSettings, run: Run[CsrSettings]) -> None:
        self.settings, self.run = settings, run
        seed_all(settings.train.seed, "init")
        section = settings.model
        backbone = build_backbone(
            section.backbone_type,
            section.model_name,
            pretrained=section.pretrained,
            image_size=settings.data.image_size,
            trust_pickle=section.trust_pickle,
        )
        grid = backbone.grid(settings.data.image_size)
        self.data: Data = load(settings.data, settings.train.seed, grid)
        self.model = CSRNet(
            backbone,
            concepts=len(self.data.concepts),
            prototypes=section.num_prototypes,
            classes=len(self.data.targets),
            projection=section.projection,
            concept_pool=section.concept_pool,
            projector=section.projector,
            local_order=section.local_order,
            task_input=section.task_input,
        ).to(run.device)

    def loop(self, stage: Stage, factors: dict[str, float], epochs: int, monitor: str) -> Loop:
        """Prepare the loop of a stage: what it trains moves, everything else stands still."""
        settings = self.settings
        self.model.freeze(stage)
        rate, decay = settings.optim.lr, settings.optim.weight_decay
        groups: list[dict[str, Any]] = []
        for name, parameters in self.model.stage_parameters(stage).items():
            for bare in (False, True):  # kernels and matrices decay, the rest does not
                chosen = [
                    one for one in parameters if (one.ndim < 2 or name == "prototypes") is bare
                ]
                weight_decay = 0.0 if bare else decay
                lr = rate * factors.get(name, 1.0)
                if chosen:
                    groups.append({"params": chosen, "lr": lr, "weight_decay": weight_decay})
        world = self.run.accelerator.num_processes
        train = settings.train.model_copy(
            update={"epochs": epochs, "batch_size": settings.train.batch_size * world}
        )
        optimizer = build_optimizer(settings.optim, groups)
        schedule = build_schedule(settings.schedule, rate, epochs)
        source = self.data.train.source
        return self.run.loop(
            self.model, source, optimizer, schedule, monitor, smallest=2, stage=stage, train=train
        )

    @torch.no_grad()
    def outputs(self, part: Part, need: Need) -> Tensor:
        """Return one output for all images of a part, on the CPU."""
        model, size = self.model.eval(), self.settings.eval.batch_size

        def forward(batch: Any) -> Tensor:
            found = getattr(model(batch[0], needs=(need,)), need)
            assert isinstance(found, Tensor)
            return found

        found, _ = predict(forward, part.source, self.run.accelerator, size)
        return found

    def save(
        self,
        name: str,
        stage: Stage,
        epoch: int,
        scores: dict[str, Any],
        best: bool,
        **more: Any,
    ) -> None:
        """Write weights under the name that the original gives them."""
        facts = {
            "model": "CSRNet",
            "stage": stage,
            "backbone": self.model.backbone.arguments,
            "arguments": self.settings.model.model_dump(),
            "concepts": self.data.concepts,
            "targets": self.data.targets,
            "statistics": self.data.statistics,
            "scores": scores,
            "moectl": __version__,
            **more,
        }
        self.run.save_weights(name, self.model.state_dict(), facts, epoch=epoch, best=best)

    def restore(self, name: str) -> None:
        """Go on from weights that an earlier stage wrote."""
        weights = artefact.load(self.run.folder / name)
        self.model.load_state_dict(weights.payload)


def train(settings: CsrSettings, run: Run[CsrSettings], stages: Sequence[Stage]) -> None:
    """Train some stages, each from the best weights of the one before."""
    training = Training(settings, run)
    for stage in stages:
        log.info("stage %d: %s", STAGES.index(stage) + 1, stage)
        match stage:
            case "concept":
                train_concepts(training)
            case "prototype":
                train_prototypes(training)
            case "task":
                train_task(training)


def train_concepts(training: Training) -> None:
    """Stage 1: the backbone and the maps that show where a concept is."""
    settings, data = training.settings, training.data
    section, epochs = settings.concept, settings.train.epochs_stage1
    loop = training.loop("concept", {"backbone": section.backbone_lr}, epochs, "val/concept_auroc")
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
            named["boxes"] = losses.localisation_loss(output.cams, masks, exists, section.loc_loss)
            loss = loss + section.beta * named["boxes"]
        step.update(loss, **{f"loss_{name}": part.detach() for name, part in named.items()})
        if step.ends_epoch:
            scores = _concept_scores(training)
            if step.score(scores):
                training.save("best_model_stage1.pth", "concept", step.epoch + 1, scores, True)
    training.restore("best_model_stage1.pth")


def _concept_loss(kind: str, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    match kind:
        case "bce":
            return losses.concept_bce(logits, targets, weight)
        case "focal":
            return losses.focal(logits, targets)
        case _:
            return losses.asymmetric(logits, targets)


def _concept_scores(training: Training) -> dict[str, float | None]:
    part = training.data.val
    logits = training.outputs(part, "concept_logits")
    found = ranking(logits.numpy(), part.concepts.numpy(), training.data.concepts)
    loss = losses.concept_bce(logits, part.concepts)
    return {
        "val/loss": float(loss),
        "val/concept_auroc": found["auroc_macro"],
        "val/concept_map": found["map"],
    }


def train_prototypes(training: Training) -> None:
    """Stage 2: the projector, and the forms that each concept takes."""
    settings, data, model = training.settings, training.data, training.model
    section, epochs = settings.prototype, settings.train.epochs_stage2
    factors = dict.fromkeys(("projector", "prototypes"), section.lr_factor)
    loop = training.loop("prototype", factors, epochs, "val/assignment_accuracy")
    if loop.update == 0 and section.init != "random":
        _place(training)
    truth = data.train.concepts.to(training.run.device)
    for step in loop:
        (images, _), rows = step.batch
        output = loop.model(images, None, ("local_vectors", "prototypes"), detach_cams=True)
        vectors, concepts = losses.present_pairs(output.local_vectors, truth[rows])
        count = _over_processes(len(vectors), training.run)
        loss = _prototype_loss(section, vectors, concepts, output.prototypes, count)
        if section.diversity_weight:
            loss = loss + section.diversity_weight * losses.diversity_loss(output.prototypes)
        step.update(loss)
        with torch.no_grad():
            renormalise_(model.prototype_vectors)
        if step.ends_epoch:
            epoch = step.epoch + 1
            if section.revive_every and epoch % section.revive_every == 0 and epoch < epochs:
                _revive(training, loop, epoch)
            scores = _prototype_scores(training)
            step.score(scores)
            if epoch % 5 == 0 or epoch == epochs or loop.patience_ends:
                name = f"model_stage2_epoch{epoch}.pth"
                training.save(name, "prototype", epoch, scores, False)
    training.restore(f"model_stage2_epoch{loop.epoch}.pth")


def _over_processes(pairs: int, run: Run[Any]) -> float:
    """Return the pairs of all processes, divided by these: losses are averaged over processes."""
    world = run.accelerator.num_processes
    total = torch.tensor(float(pairs), device=run.device)
    if world > 1:
        torch.distributed.all_reduce(total)
    return max(float(total) / world, 1e-12)


def _prototype_loss(
    section: Any, vectors: Tensor, concepts: Tensor, prototypes: Tensor, count: float
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
    return losses.present_pairs(training.outputs(part, "local_vectors"), part.concepts)


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


def _prototype_scores(training: Training) -> dict[str, float | None]:
    vectors, concepts = _pairs(training, training.data.val)
    found = diagnostics(training.model.prototype_vectors.cpu(), vectors, concepts)
    plain = {
        name: value for name, value in found._asdict().items() if isinstance(value, int | float)
    }
    if found.within_mean > 0.8:
        log.warning(
            "the prototypes of a concept are nearly one (mean cosine %.2f)", found.within_mean
        )
    known = {f"val/{name}": _known(value) for name, value in plain.items()}
    return {"val/assignment_accuracy": known.pop("val/accuracy"), **known}


def _known(value: float) -> float | None:
    return None if value != value else float(value)


def train_task(training: Training) -> None:
    """Stage 3: the linear verdict over similarities, which are the same in every epoch."""
    settings, data, model = training.settings, training.data, training.model
    section, epochs = settings.task, settings.train.epochs_stage3
    several = settings.data.task_mode == "multilabel"
    monitor = "val/task_auroc" if several else "val/macro_f1"
    if settings.model.task_norm == "standardize":
        _standardise(training)
    loop = training.loop("task", {"task_head": section.lr_factor}, epochs, monitor)
    truth = data.train.targets.to(training.run.device)
    weight = None
    if section.loss == "bce_pos_weight":
        weight = losses.pos_weights(truth.sum(0), len(truth))
    for step in loop:
        (images, _), rows = step.batch
        logits = loop.model(images).logits.float()
        step.update(_task_loss(section, logits, truth[rows], weight))
        if step.ends_epoch:
            scores = _task_scores(training)
            if step.score(scores):
                training.save("best_model_stage3.pth", "task", step.epoch + 1, scores, True)
    training.save("final_model.pth", "task", epochs, {}, False)
    training.restore("best_model_stage3.pth")
    model.eval()


@torch.no_grad()
def _standardise(training: Training) -> None:
    model = training.model
    scores = training.outputs(training.data.train, "similarity_scores")
    inputs = scores.amax(2) if model.task_input == "max" else scores.flatten(1)
    model.set_task_norm(inputs.mean(0).to(model.task_mean), inputs.std(0).to(model.task_std))


def _task_loss(section: Any, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    match section.loss:
        case "ce":
            smoothing = section.label_smoothing
            return nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        case "focal":
            return losses.focal(logits, targets)
        case "asymmetric":
            return losses.asymmetric(logits, targets, 4.0, 1.0, 0.05)
        case "class_balanced":
            weights = losses.class_balanced_weights(targets.sum(0).clamp(min=1))
            return losses.focal(logits, targets, None, 2.0, weights)
        case _:
            return losses.concept_bce(logits, targets, weight)


def _task_scores(training: Training) -> dict[str, float | None]:
    part, names = training.data.val, training.data.targets
    logits = training.outputs(part, "logits")
    if part.targets.ndim == 2:
        found = ranking(logits.numpy(), part.targets.numpy(), names)
        loss = losses.concept_bce(logits, part.targets)
        return {
            "val/loss": float(loss),
            "val/task_auroc": found["auroc_macro"],
            "val/task_map": found["map"],
        }
    found = multiclass(logits.numpy(), np.asarray(part.targets), names)
    loss = nn.functional.cross_entropy(logits, part.targets)
    return {
        "val/loss": float(loss),
        "val/accuracy": found["accuracy"],
        "val/macro_f1": found["f1_macro"],
    }
