"""Opening a trained network, and what it says about images.

Letters: N images, B batch, K concepts, M prototypes per concept, C classes, H W feature grid,
S side that the network sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moectl.csr.backbones import rebuild_backbone
from moectl.csr.data import Data, Part, load
from moectl.csr.edits import Head, Statistics, head_of, statistics_from_plain
from moectl.csr.images import read_image
from moectl.csr.model import CSRNet, Given, Need, Output
from moectl.csr.settings import CsrSettings
from moectl.csr.transforms import Transform, evaluation
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import is_file
from moectl.engine.inference import predict
from moectl.engine.opened import Trained, accelerator_for, summary
from moectl.engine.references import exact, find_weights, split_reference

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.engine.sources import Source

_FORM = ("projection", "concept_pool", "projector", "local_order", "task_input")


@dataclass(frozen=True)
class Answers:
    """What a network says about the images of a part, on the CPU."""

    concept_logits: Tensor
    """(N, K)"""
    cams: Tensor
    """(N, K, H, W)"""
    scores: Tensor
    """(N, K, M)"""
    maps: Tensor
    """(N, K, H, W) the largest similarity of each concept's prototypes."""
    logits: Tensor
    """(N, C)"""


@dataclass(frozen=True)
class Opened(Trained):
    """A trained network with what it needs to know about images."""

    settings: CsrSettings
    model: CSRNet
    """In evaluation mode, on the accelerator's device."""

    @property
    def concepts(self) -> list[str]:
        """Names of the K concepts."""
        return list(self.facts["concepts"])

    @property
    def targets(self) -> list[str]:
        """Names of the C targets."""
        return list(self.facts["targets"])

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several targets."""
        return self.settings.data.task_mode == "multilabel"

    @property
    def head(self) -> Head:
        """The task head, on the CPU."""
        head = head_of(self.model)
        assert head.norm is not None
        norm = head.norm._replace(mean=head.norm.mean.cpu(), deviation=head.norm.deviation.cpu())
        kept = self.model.kept.cpu()
        return Head(head.weight.cpu(), head.bias.cpu(), norm, kept)

    @property
    def known(self) -> Statistics | None:
        """Scores of training images with and without each concept; None before the last stage."""
        found = self.facts.get("score_statistics")
        return statistics_from_plain(found) if found else None

    def thresholds(self, kind: Literal["concepts", "targets"]) -> Tensor | None:
        """Probabilities above which the answer is yes, tuned on validation images.

        Returns:
            (K,) or (C,); None where nothing was tuned.
        """
        found = self.facts.get("thresholds", {}).get(kind)
        return torch.tensor(found, dtype=torch.float64) if found else None

    @cached_property
    def transform(self) -> Transform:
        """What an image (C, H, W) in 0..1 goes through before the network sees it."""
        return evaluation(self.settings.data.image_size, self._statistics)

    @property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, deviation = self.facts["statistics"]
        return tuple(mean), tuple(deviation)

    @cached_property
    def data(self) -> Data:
        """The images that it was trained and is measured on.

        Raises:
            UserError: if files are missing or the tables have other concepts or targets.
        """
        section, seed = self.settings.data, self.settings.train.seed
        grid = self.model.backbone.grid(section.image_size)
        data = load(section, seed, grid, self._statistics)
        for name in ("concepts", "targets"):
            if getattr(data, name) != self.facts[name]:
                raise UserError(
                    f"{self.folder}: knows the {name} {', '.join(self.facts[name][:5])} …, the"
                    f" tables have {', '.join(getattr(data, name)[:5])} …"
                )
        return data

    def part(self, split: str) -> Part:
        """Return the images of `train`, `val` or `test`."""
        found = getattr(self.data, split)
        assert isinstance(found, Part)
        return found

    def read(self, path: Path) -> Tensor:
        """Read any image as the network's training images were read, (C, H, W) in 0..1."""
        return torch.as_tensor(read_image(path, self.settings.data.channels))

    @torch.no_grad()
    def ask(
        self, images: Tensor, needs: tuple[Need, ...], importance: Tensor | None = None
    ) -> Output:
        """Ask about transformed images (B, 3, S, S); what comes back is float32 on the CPU."""
        device = self.accelerator.device
        if importance is not None:
            importance = importance.to(device)
        with self.accelerator.autocast():
            found = self.model(images.to(device), importance, needs)
        kept = {name: one.float().cpu() for name, one in found._asdict().items() if one is not None}
        return Output(**kept)

    def outputs(self, part: Part, needs: tuple[Need, ...]) -> Output:
        """Ask about all images of a part in their order, as they are, in one pass."""
        size = self.settings.eval.batch_size
        return outputs(self.model, part.still, needs, self.accelerator, size)

    def answers(self, part: Part) -> Answers:
        """Ask about all images of a part, in one pass."""
        needs: tuple[Need, ...] = ("cams", "concept_logits", "logits", "similarity_scores")

        def forward(images: Tensor) -> tuple[Tensor, ...]:
            found = self.model(images, needs=(*needs, "similarity_maps"))
            highest = found.similarity_maps.amax(2)
            return (
                found.concept_logits,
                found.cams,
                found.similarity_scores,
                highest,
                found.logits,
            )

        return Answers(*self.gather(part, forward))

    def gather(self, part: Part, forward: "Forward") -> list[Tensor]:
        """Return what `forward` makes of the images of a part, see `gather`."""
        self.model.eval()
        return gather(forward, part.still, self.accelerator, self.settings.eval.batch_size)


Forward = Callable[[Tensor], Sequence[Tensor]]


def gather(
    forward: Forward, source: "Source", accelerator: "Accelerator", batch_size: int
) -> list[Tensor]:
    """Return several things for all samples of a source, each (N, …) float32 on the CPU.

    Args:
        forward: from a batch of samples to the same number of tensors (B, …, n) every time.
        source: whose samples are tensors, or tuples that begin with them.
        accelerator: devices and processes.
        batch_size: samples per forward pass.
    """
    sizes: list[torch.Size] = []

    def flat(batch: Any) -> Tensor:
        found = forward(batch if isinstance(batch, Tensor) else batch[0])
        sizes[:] = [one.shape[1:] for one in found]
        return torch.cat([one.flatten(1).float() for one in found], 1)

    rows, _ = predict(flat, source, accelerator, batch_size)
    parts = torch.split(rows, [one.numel() for one in sizes], dim=1)
    return [one.reshape(-1, *form) for one, form in zip(parts, sizes, strict=True)]


def outputs(
    model: CSRNet,
    source: "Source",
    needs: tuple[Need, ...],
    accelerator: "Accelerator",
    batch_size: int,
    given: Given = "images",
) -> Output:
    """Return several outputs for all samples of a source, (N, …) float32 on the CPU.

    Args:
        model: put into evaluation mode.
        source: see `gather`.
        needs: fields of the output, but not `prototypes`.
        accelerator: devices and processes.
        batch_size: samples per forward pass.
        given: what the samples are.
    """
    model.eval()

    def forward(samples: Tensor) -> list[Tensor]:
        found = model(samples, needs=needs, given=given)
        return [getattr(found, name) for name in needs]

    found = gather(forward, source, accelerator, batch_size)
    return Output(**dict(zip(needs, found, strict=True)))


def last_stage(folder: Path) -> Path:
    """Return the best weights of the last stage that a run has been through.

    Raises:
        UserError: if it has been through none.
    """
    verdict, concepts = (folder / f"best_model_stage{stage}.pth" for stage in (3, 1))
    if is_file(verdict):
        return verdict
    if prototypes := last_prototypes(folder):
        return prototypes
    if is_file(concepts):
        return concepts
    raise UserError(f"{folder}: no weights of any stage", "moectl csr train --resume goes on")


def last_prototypes(folder: Path) -> Path | None:
    """Return the weights of the last epoch of stage 2 in a folder."""
    name = "model_stage2_epoch"
    found = [path for path in folder.glob(f"{name}*.pth") if path.stem[len(name) :].isdigit()]
    return max(found, key=lambda path: int(path.stem[len(name) :]), default=None)


def rebuild(weights: artefact.Artefact) -> CSRNet:
    """Build a network in the form that a sidecar describes, with its weights.

    Raises:
        UserError: if there is no such sidecar.
    """
    facts, path = weights.facts, weights.path
    if facts.get("model") != "CSRNet":
        raise UserError(
            f"{path}: has no {path.name}.json of csr beside it",
            "moectl csr convert makes a run of weights of the original code",
        )
    arguments = facts["arguments"]
    model = CSRNet(
        rebuild_backbone(facts["backbone"]),
        concepts=len(facts["concepts"]),
        prototypes=arguments["num_prototypes"],
        classes=len(facts["targets"]),
        **{name: arguments[name] for name in _FORM},
    )
    model.load_state_dict(weights.payload)
    return model


def open_network(request: Request, *, verdict: bool = False) -> Opened:
    """Open the network of a run, its last stage's best weights unless the reference says which.

    Args:
        request: the run, its weights and settings.
        verdict: whether only weights of the last stage will do.

    Raises:
        UserError: if the weights are no network's, or of an earlier stage.
    """
    settings: Any = request.settings
    assert request.folder is not None
    reference = exact(request.run, request.folder)
    of_run = split_reference(reference)[1] == "best" and not is_file(Path(reference))
    path = last_stage(request.folder) if of_run else find_weights(reference, "csr")
    weights = artefact.load(path)
    model = rebuild(weights)
    if verdict and (stage := weights.facts.get("stage")) != "task":
        raise UserError(
            f"{path}: of stage {stage}, so there is no verdict yet", "moectl csr train --stage task"
        )
    accelerator = accelerator_for(settings.train, request.cpu, path.parent)
    return Opened(
        model=model.to(accelerator.device).eval(),
        settings=settings,
        accelerator=accelerator,
        facts=weights.facts,
        weights=summary(weights),
        folder=path.parent,
        tag=path.stem,
    )
