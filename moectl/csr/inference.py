"""Opening a trained network, and what it says about images.

Letters: N images, K concepts, M prototypes per concept, C classes, H W feature grid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moectl.csr.backbones import rebuild_backbone
from moectl.csr.data import Data, Part, load
from moectl.csr.model import CSRNet
from moectl.csr.settings import CsrSettings
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import is_file
from moectl.engine.inference import predict
from moectl.engine.launch import build_accelerator
from moectl.engine.references import find_weights, split_reference
from moectl.engine.run import read_record

if TYPE_CHECKING:
    from accelerate import Accelerator

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
class Opened:
    """A trained network with the data that it is measured on."""

    model: CSRNet
    """In evaluation mode, on the accelerator's device."""
    data: Data
    settings: CsrSettings
    accelerator: "Accelerator"
    facts: dict[str, Any]
    weights: dict[str, Any]
    """`file`, `sha256` and `epoch`."""
    folder: Path
    tag: str

    @torch.no_grad()
    def answers(self, part: Part) -> Answers:
        """Ask about all images of a part, in one pass."""
        model, sizes = self.model, list[torch.Size]()

        def forward(batch: Any) -> Tensor:
            needs = ("cams", "concept_logits", "similarity_maps", "similarity_scores", "logits")
            found = model(batch[0], needs=needs)
            shown = [
                found.concept_logits,
                found.cams,
                found.similarity_scores,
                found.similarity_maps.amax(2),
                found.logits,
            ]
            sizes[:] = [one.shape[1:] for one in shown]
            return torch.cat([one.flatten(1).float() for one in shown], 1)

        size = self.settings.eval.batch_size
        found, _ = predict(forward, part.source, self.accelerator, size)
        parts = torch.split(found, [one.numel() for one in sizes], dim=1)
        shaped = [one.view(-1, *form) for one, form in zip(parts, sizes, strict=True)]
        return Answers(*shaped)


def _last_stage(folder: Path) -> Path:
    """Return the best weights of the last stage that a run has been through."""
    for stage in (3, 1):
        path = folder / f"best_model_stage{stage}.pth"
        later = sorted(folder.glob("model_stage2_epoch*.pth"), key=lambda one: one.stat().st_mtime)
        if stage == 1 and later:
            return later[-1]
        if is_file(path):
            return path
    raise UserError(f"{folder}: no weights of any stage")


def open_network(request: Request) -> Opened:
    """Open the network of a run, its last stage's best weights unless the reference says which.

    Raises:
        UserError: if the weights do not fit, or the data has other concepts or targets.
    """
    settings: Any = request.settings
    reference = request.run
    plain = split_reference(reference)[1] in ("", "best") and not Path(reference).is_file()
    assert request.folder is not None
    path = _last_stage(request.folder) if plain else find_weights(reference, "csr")
    weights = artefact.load(path)
    facts = weights.facts
    if facts.get("model") != "CSRNet":
        raise UserError(f"{path}: has no {path.name}.json of csr beside it")
    precision = str(read_record(path.parent)["precision"])
    accelerator = build_accelerator(settings.train, request.cpu, precision)
    backbone = rebuild_backbone(facts["backbone"])
    arguments = facts["arguments"]
    model = CSRNet(
        backbone,
        concepts=len(facts["concepts"]),
        prototypes=arguments["num_prototypes"],
        classes=len(facts["targets"]),
        **{name: arguments[name] for name in _FORM},
    )
    model.load_state_dict(weights.payload)
    grid = backbone.grid(settings.data.image_size)
    data = load(settings.data, settings.train.seed, grid)
    for name in ("concepts", "targets"):
        if getattr(data, name) != facts[name]:
            raise UserError(
                f"{path}: knows the {name} {', '.join(facts[name][:5])} …, the tables have"
                f" {', '.join(getattr(data, name)[:5])} …"
            )
    return Opened(
        model=model.to(accelerator.device).eval(),
        data=data,
        settings=settings,
        accelerator=accelerator,
        facts=facts,
        weights={"file": path.name, "sha256": weights.sha256, "epoch": facts["epoch"]},
        folder=path.parent,
        tag=path.stem,
    )
