"""What the three stages share: data, network, hand-over, and features that are computed once.

Letters: B batch, N images, K concepts, M prototypes per concept.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl import __version__
from moectl.csr.backbones import build_backbone
from moectl.csr.cache import FeatureSource, features_of
from moectl.csr.curation import fingerprint
from moectl.csr.curation import read as read_curation
from moectl.csr.data import ANY, Data, Part, load
from moectl.csr.inference import last_prototypes, outputs
from moectl.csr.model import CSRNet, Given, Need, Output, Stage
from moectl.csr.settings import CsrSettings
from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_json, read_text, write_json, write_text
from moectl.engine.launch import agree
from moectl.engine.loop import Loop, Step
from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.references import find_run
from moectl.engine.run import Run
from moectl.engine.seeding import seed_all
from moectl.engine.sources import Source

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("concept", "prototype", "task")
CURATED = "applied_curation.toml"
_TRAINED_BEFORE: Mapping[Stage, tuple[str, ...]] = {
    "prototype": ("backbone", "concept_head"),
    "task": ("backbone", "concept_head", "projector", "prototypes"),
}
_LEARNED: Mapping[Stage, tuple[str, ...]] = {
    "prototype": ("concept_pool",),
    "task": ("concept_pool", "num_prototypes", "projection", "projector", "local_order"),
}


class Training:
    """The data, the network, and the run that the stages write to.

    Raises:
        UserError: if something is wrong with the data, or it is not what the run began with.
    """

    def __init__(self, settings: CsrSettings, run: Run[CsrSettings]) -> None:
        self.settings, self.run = settings, run
        seed_all(settings.train.seed, "init")
        section = settings.model
        if section.pretrained:  # faults of the tables, before anything is fetched
            load(settings.data, settings.train.seed, (1, 1), ANY)
        backbone = build_backbone(
            section.backbone_type,
            section.model_name,
            pretrained=section.pretrained,
            image_size=settings.data.image_size,
            allow_pickle=section.allow_pickle,
        )
        grid = backbone.grid(settings.data.image_size)
        self.data = load(settings.data, settings.train.seed, grid)
        self._features: dict[int, FeatureSource] = {}
        cells = sum(self.data.notes.get("empty_cells", {}).values())
        if cells:
            log.warning("%s: %d empty cells count as 0", self.data.notes["table"], cells)
        self._write_split()
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

    def _write_split(self) -> None:
        """Record which images train; a run goes on with the same ones only."""
        data, path = self.data, self.run.folder / "splits.json"
        split = {name: getattr(data, name).image_ids for name in ("train", "val")}
        if is_file(path):
            if read_json(path) != split:
                raise UserError(f"{path}: the label table has other images now, or divides them so")
        elif self.run.is_main:
            write_json(path, split)
        names = {"concepts": data.concepts, "targets": data.targets}
        sizes = {name: len(getattr(data, name).image_ids) for name in ("train", "val", "test")}
        self.run.note(data={"images": sizes, **names, "boxes": data.has_boxes})
        log.info(
            "%d images train, %d validate, %d test; %d concepts, %d targets",
            *(*sizes.values(), len(data.concepts), len(data.targets)),
        )

    # What the network is shown

    def _is_cached(self, part: Part) -> bool:
        section = self.settings.data
        moves = section.augment_heads and any((section.hflip, section.degrees, section.jitter))
        return self.settings.train.feature_cache != "off" and (
            part is not self.data.train or not moves
        )

    def still(self, part: Part) -> tuple[Source, Given]:
        """Return the images of a part as they are, or their features, for a frozen backbone."""
        if not self._is_cached(part):
            return part.still, "images"
        if id(part) not in self._features:
            section, where = self.settings.data, self.settings.train.feature_cache
            root = self.run.folder / "cache" if where == "auto" else Path(where)
            transform = [section.image_size, *self.data.statistics]
            self._features[id(part)] = features_of(
                root,
                part,
                self.model.backbone,
                transform,
                self.run.accelerator,
                self.settings.eval.batch_size,
                self.run.stop,
            )
        return self._features[id(part)], "features"

    def shown(self) -> tuple[Source, Given]:
        """Return what trains prototypes or verdict: features, still images, or moving ones."""
        train, moving = self.data.train, self.settings.data.augment_heads
        if moving and not self._is_cached(train):
            return train.source, "images"
        return self.still(train)

    def outputs(self, part: Part, *needs: Need) -> Output:
        """Return what a frozen backbone's heads say about all images of a part, on the CPU."""
        source, given = self.still(part)
        size = self.settings.eval.batch_size
        return outputs(self.model, source, needs, self.run.accelerator, size, given=given)

    def forget_features(self) -> None:
        """Remove features that are kept in the run's own folder."""
        self._features.clear()
        if self.run.is_main:
            shutil.rmtree(self.run.folder / "cache", ignore_errors=True)

    # What trains

    def loop(
        self,
        stage: Stage,
        source: Source,
        factors: Mapping[str, float],
        epochs: int,
        monitor: str,
    ) -> Loop:
        """Prepare the loop of a stage: what it trains moves, everything else stands still.

        A frozen backbone needs little memory, so only the first stage cuts batches into parts.
        """
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
        whole = settings.train.batch_size * self.run.accelerator.num_processes
        changes: dict[str, Any] = {"epochs": epochs, "batch_size": whole}
        if stage != "concept":
            changes["accumulate"] = 1
        return self.run.loop(
            self.model,
            source,
            build_optimizer(settings.optim, groups),
            build_schedule(settings.schedule, rate, epochs),
            monitor,
            smallest=2,
            stage=stage,
            train=settings.train.model_copy(update=changes),
        )

    def over_processes(self, count: Tensor | int, step: Step) -> float:
        """Return what a sum over some things is divided by, to be a mean over all processes.

        The loop weighs a process's loss by its share of the images; here the things count.

        Args:
            count: of the things in this process's part of the batch.
            step: whose batch it is.
        """
        here = torch.tensor([float(count), step.share], dtype=torch.float64, device=self.run.device)
        if self.run.accelerator.num_processes > 1:
            torch.distributed.all_reduce(here)
        total, shares = here.tolist()
        return max(total * step.share / shares, 1e-12)

    # What is written

    def save(
        self,
        name: str,
        stage: Stage,
        epoch: int,
        scores: Mapping[str, Any],
        *,
        best: bool = False,
        **more: Any,
    ) -> None:
        """Write weights under the name that the original gives them."""
        facts = {**facts_of(self.settings, self.data, self.model, stage), "scores": dict(scores)}
        facts |= more
        ordered = sorted(scores, key=lambda name: name == "val/loss")  # the loss comes last
        found = {name.removeprefix("val/"): scores[name] for name in ordered}
        if best and scores:
            known = [f"{key} {value:.4f}" for key, value in found.items() if value is not None]
            log.info("best so far: %s", ", ".join(known))
        if scores:  # the newest stage first: its score is that of the run
            before = self.run.record.get("scores", {})
            others = {key: value for key, value in before.items() if key != stage}
            self.run.note(scores={stage: {"epoch": epoch, **found}, **others})
        self.run.save_weights(name, self.model.state_dict(), facts, epoch=epoch, best=best)

    def hand_over(self, stage: Stage, start: str = "") -> None:
        """Begin a stage with the best weights of the one before it.

        Args:
            stage: the one that begins.
            start: a run, or a weights file, that has them if this run has not.

        Raises:
            UserError: if there are none, or they are of another network.
        """
        if stage == "concept":
            return
        pick = self.settings.task.start
        # One answer for all: what rank 0 copies a moment later must not be found by the others.
        path = agree(self.run.accelerator, lambda: predecessor(self.run.folder, stage, pick))
        if path is None and start:
            path = self._adopt(stage, given(start, stage, pick))
        if path is None:
            raise UserError(
                f"{self.run.folder}: no weights of the stage before {stage}",
                "--from RUN names a run that has them, --resume RUN goes on with it",
            )
        payload = self._fitting(stage, path).payload
        known = _TRAINED_BEFORE[stage]
        self.model.load_state_dict({**self.model.state_dict(), **_parts(payload, known)})

    def _adopt(self, stage: Stage, path: Path) -> Path:
        """Keep weights of another run in this one, so that it can be resumed without that."""
        self._refuse_leak(path)
        weights = self._fitting(stage, path)
        name = "best_model_stage1.pth" if stage == "prototype" else path.name
        if stage == "task" and not name.startswith(("best_model_stage2", "model_stage2_epoch")):
            name = "best_model_stage2.pth" if self.settings.task.start == "best" else ""
            name = name or f"model_stage2_epoch{weights.facts['epoch']}.pth"
        self.run.note(parents=[{"path": str(path.resolve()), "sha256": weights.sha256}])
        own = ("file", "bytes", "sha256", "run", "epoch")
        facts = {key: value for key, value in weights.facts.items() if key not in own}
        self.run.save_weights(name, weights.payload, facts, epoch=weights.facts["epoch"])
        return self.run.folder / name

    def _fitting(self, stage: Stage, path: Path) -> artefact.Artefact:
        """Read weights of an earlier stage, if what they have learned fits this run's settings."""
        weights = artefact.load(path)
        facts, own = weights.facts, self.settings.model.model_dump()
        if facts.get("model") != "CSRNet":
            raise UserError(f"{path}: has no {path.name}.json of csr beside it")
        if STAGES.index(facts["stage"]) + 1 < STAGES.index(stage):
            raise UserError(f"{path}: of stage {facts['stage']}, too early for stage {stage}")
        here = {
            "concepts": self.data.concepts,
            "targets": self.data.targets,
            "backbone": self.model.backbone.arguments,
            "statistics": [list(values) for values in self.data.statistics],
            **{name: own[name] for name in _LEARNED[stage]},
        }
        there = {**facts["arguments"], **facts}
        for name, value in here.items():
            if there[name] != value:
                raise UserError(f"{path}: {name} is {there[name]}, this run has {value}")
        return weights

    def _refuse_leak(self, path: Path) -> None:
        """Refuse weights that were trained on images which validate here."""
        split = path.parent / "splits.json"
        if not is_file(split):
            return
        trained = set(read_json(split)["train"])
        seen = [name for name in self.data.val.image_ids if name in trained]
        if seen:
            raise UserError(
                f"{path}: was trained on {len(seen)} of the {len(self.data.val.image_ids)} images"
                f" that validate here, {seen[0]} among them",
                "give the same --seed and --val-fraction as its run has",
            )

    def check_labels(self, stage: Stage) -> None:
        """Refuse validation images by which no best epoch of a stage can be chosen."""
        data = self.data
        kind = {"concept": "concepts", "task": "targets"}.get(stage)
        if kind is None or (kind == "targets" and data.val.targets.ndim == 1):
            return
        positive = getattr(data.val, kind) >= 0.5
        if not bool((positive.any(0) & ~positive.all(0)).any()):
            raise UserError(
                f"of none of the {kind} ({', '.join(getattr(data, kind)[:5])} …) there are images"
                f" with and without it among the {len(positive)} validation images",
                "--val-fraction takes more images, --set data.stratify=true spreads targets evenly",
            )

    def curate(self) -> None:
        """Leave the prototypes their say that the curation file leaves it."""
        path, own = self.settings.task.curation, self.run.folder / CURATED
        if path is None:
            return
        if self.run.is_main and not is_file(own):
            write_text(own, read_text(path))
        self.run.accelerator.wait_for_everyone()
        sizes = (self.data.concepts, self.model.num_prototypes)
        kept = read_curation(own, *sizes, fingerprint(self.model))
        self.model.kept.copy_(kept)
        log.info("%d of %d prototypes have a say", int(kept.sum()), kept.numel())


def _parts(state: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.split(".")[0] in names}


def facts_of(settings: CsrSettings, data: Data, model: CSRNet, stage: Stage) -> dict[str, Any]:
    """Return what rebuilds a network, for the sidecar of its weights."""
    return {
        "model": "CSRNet",
        "stage": stage,
        "backbone": model.backbone.arguments,
        "arguments": settings.model.model_dump(),
        "concepts": data.concepts,
        "targets": data.targets,
        "statistics": data.statistics,
        "moectl": __version__,
    }


def predecessor(folder: Path, stage: Stage, pick: str = "last") -> Path | None:
    """Return the weights in a run's folder from which a stage begins, if they are there."""
    name = "best_model_stage1.pth" if stage == "prototype" else "best_model_stage2.pth"
    if stage == "task" and pick == "last":
        return last_prototypes(folder)
    return folder / name if is_file(folder / name) else None


def given(start: str, stage: Stage, pick: str) -> Path:
    """Return the weights that a run or a file has of the stage before one.

    Raises:
        UserError: if there are none.
    """
    if not start:
        raise UserError(
            f"--stage {stage} begins with weights of the stage before it",
            "--from RUN names a run that has them, --resume RUN goes on with it",
        )
    if is_file(Path(start)):
        return Path(start)
    folder = find_run(start, "csr", commands=("train",))
    path = predecessor(folder, stage, pick)
    if path is None:
        raise UserError(f"{folder}: no weights of the stage before {stage}")
    return path
