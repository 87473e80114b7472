"""Making a run of weights of the original program.

Letters: K concepts, M prototypes per concept, C targets.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moectl.csr.backbones import rebuild_backbone
from moectl.csr.convert import load_original, network_weights, original_arguments
from moectl.csr.data import load
from moectl.csr.model import CSRNet
from moectl.csr.report import report
from moectl.csr.settings import CsrSettings
from moectl.csr.stages import facts_of
from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.run import Run

log = logging.getLogger(__name__)

FILE = "best_model_stage3.pth"
_HEAD = {
    "projector": "mlp",
    "concept_pool": "max",
    "local_order": "project_first",
    "task_input": "all",
    "task_norm": "none",
}
"""The original's head, which has no options."""


@dataclass(frozen=True)
class Original:
    """A network of the original program."""

    path: Path
    sha256: str
    settings: CsrSettings
    """As given, but with the form of the network that the weights have."""
    model: CSRNet
    tensors: int
    """In the file."""
    left_out: tuple[str, ...]
    """Names of those that our network has no place for."""


def read_original(path: Path, settings: CsrSettings) -> Original:
    """Read weights of the original program.

    Raises:
        UserError: if the file holds none.
    """
    file = artefact.load(path)
    try:
        given = network_weights(file.payload)
        state = load_original(given)
        backbone, form = original_arguments(state)
        model = CSRNet(rebuild_backbone(backbone), **form, **_form())
        _load(model, state)
        model.backbone.grid(settings.data.image_size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    section = settings.model.model_copy(
        update={
            **_HEAD,
            "backbone_type": backbone["kind"],
            "model_name": "",
            "pretrained": False,
            "num_prototypes": form["prototypes"],
            "projection": form["projection"],
        }
    )
    settings = settings.model_copy(update={"model": section})
    left_out = tuple(name for name in given if name.startswith("backbone.vit.pooler."))
    return Original(path, file.sha256, settings, model, len(given), left_out)


def _form() -> dict[str, Any]:
    return {name: value for name, value in _HEAD.items() if name != "task_norm"}


def _load(model: CSRNet, state: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(f"does not fit the original's network: {lines}") from None


def write_original(original: Original, run: Run[CsrSettings]) -> dict[str, Any]:
    """Write the weights into a run, with the names that the training table gives.

    Returns:
        How many tensors of the file were used.

    Raises:
        UserError: if the tables have other numbers of concepts or targets.
    """
    model, settings = original.model, run.settings
    grid = model.backbone.grid(settings.data.image_size)
    data = load(settings.data, settings.train.seed, grid)
    for what, names, count in (
        ("concepts", data.concepts, model.num_concepts),
        ("targets", data.targets, model.num_classes),
    ):
        if len(names) != count:
            raise UserError(
                f"{original.path}: knows {count} {what}, but {settings.data.train_csv} has"
                f" {len(names)}: {', '.join(names)}",
                f"name those that it was trained with, in their order: data.{what[:-1]}_columns",
            )
    facts = {**facts_of(settings, data, model, "task"), "scores": {}}
    run.note(parents=[{"path": str(original.path), "sha256": original.sha256}])
    run.save_weights(FILE, model.state_dict(), facts, epoch=0, best=True)
    if run.is_main:
        report(run.folder)
    used = original.tensors - len(original.left_out)
    rest = f", left out: {', '.join(original.left_out)}" if original.left_out else ""
    log.info("%d of %d tensors used%s", used, original.tensors, rest)
    return {"tensors": original.tensors, "used": used, "left_out": list(original.left_out)}
