"""Trained weights, opened: what they have in common whatever they compute."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.engine.artefact import Artefact
from moectl.engine.launch import build_accelerator
from moectl.engine.run import read_record

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.engine.sections import TrainSection


@dataclass(frozen=True)
class Trained:
    """What is known of trained weights; each system adds its model."""

    settings: Any
    accelerator: "Accelerator"
    facts: dict[str, Any]
    """The sidecar of the weights."""
    weights: dict[str, Any]
    """`file`, `sha256` and `epoch`, for results."""
    folder: Path
    """Of the run, or of the file."""
    tag: str
    """Of the weights, for names of files."""


def accelerator_for(section: "TrainSection", cpu: bool, folder: Path) -> "Accelerator":
    """Build the accelerator for trained weights, of the precision of their training.

    Args:
        section: the table `train`.
        cpu: whether a GPU is left alone.
        folder: of the run.

    Raises:
        UserError: if it is none.
    """
    return build_accelerator(section, cpu, str(read_record(folder)["precision"]))


def summary(weights: Artefact) -> dict[str, Any]:
    """Return what results say of the weights that they come from."""
    epoch = weights.facts.get("epoch", 0)
    return {"file": weights.path.name, "sha256": weights.sha256, "epoch": epoch}
