"""What trained weights say about held-out images, computed once and kept in the run folder."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moectl.balpoe.data import Data, load
from moectl.balpoe.lists import USUAL_NAMES, list_paths
from moectl.balpoe.logits import Outputs, read_facts, read_outputs, write_outputs
from moectl.balpoe.model import BalpoeNet
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import artefact, inference
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, sha256
from moectl.engine.launch import agree, build_accelerator
from moectl.engine.references import find_weights, split_reference
from moectl.engine.run import read_record
from moectl.engine.sources import Source
from moectl.engine.tracking import loads_or_none

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

LOGITS = "logits.safetensors"
"""In the run of somebody else's classifier, what stands for its weights."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, as far as its outputs tell."""

    outputs: Outputs
    folder: Path
    """The run."""
    weights: dict[str, Any]
    """`file`, `sha256` and `epoch`."""
    tag: str
    """`last`, `best`, `epoch50` … or `logits`."""
    is_main: bool
    """Whether this process writes."""


def open_classifier(
    settings: BalpoeSettings, reference: str, folder: Path, cpu: bool, given: Path | None = None
) -> Classifier:
    """Return the outputs of the weights that a reference names; compute them if they are new.

    Args:
        settings: those of the run.
        reference: to the run and its weights.
        folder: the run it names.
        cpu: stay on the CPU.
        given: a file to take the outputs from instead, if they are of the same weights and images.

    Raises:
        UserError: if weights, data or outputs are not those of the training.
    """
    if is_file(folder / LOGITS):
        return _of_others(settings, folder, cpu, given)
    path = find_weights(reference, "balpoe")
    weights = artefact.load(path)
    if not weights.facts:
        raise UserError(
            f"{path}: has no {path.name}.json beside it", "moectl balpoe import makes a run of it"
        )
    _same("taus", settings.taus, weights.facts, path.parent)
    accelerator = build_accelerator(settings.train, cpu, str(read_record(path.parent)["precision"]))
    entry = {"file": path.name, "sha256": weights.sha256, "epoch": weights.facts["epoch"]}
    tag = _tag(reference, entry["epoch"])
    if given:
        outputs = read_outputs(given, settings.data.val_fraction, settings.train.seed)
        _same_outputs(given, outputs, path, weights.sha256, weights.facts)
    else:
        outputs = _kept_or_computed(weights, settings, accelerator)
    return Classifier(outputs, path.parent, entry, tag, accelerator.is_main_process)


def _of_others(settings: BalpoeSettings, folder: Path, cpu: bool, given: Path | None) -> Classifier:
    path = folder / LOGITS
    accelerator = build_accelerator(settings.train, cpu)
    outputs = read_outputs(path)
    entry = {"file": LOGITS, "sha256": outputs.weights, "epoch": 0}
    if given:
        other = read_outputs(given, settings.data.val_fraction, settings.train.seed)
        _same_outputs(given, other, path, outputs.weights, vars(outputs))
        if (other.val_indices, other.test_indices) != (outputs.val_indices, outputs.test_indices):
            raise UserError(f"{given}: its items are divided otherwise than those of {path}")
        outputs = other
    return Classifier(outputs, folder, entry, "logits", accelerator.is_main_process)


def _same_outputs(
    given: Path, outputs: Outputs, path: Path, digest: str, facts: Mapping[str, Any]
) -> None:
    """Refuse outputs of other weights or another training, and a division that would leak."""
    own = outputs.weights or sha256(given.read_bytes())
    if own != digest:
        raise UserError(
            f"{given}: the logits are of the weights {outputs.weights[:12] or 'of unknown hash'},"
            f" {path} is {digest[:12]}",
            "leave --run out to fit a classifier of its own",
        )
    for name in ("class_counts", "taus"):
        if getattr(outputs, name) != facts[name]:
            raise UserError(f"{given}: its {name} are not those of {path}")
    _same_split(given, path.parent, outputs.val_indices, outputs.test_indices)


def _kept_or_computed(
    weights: artefact.Artefact, settings: BalpoeSettings, accelerator: "Accelerator"
) -> Outputs:
    folder, key = weights.path.parent, _key(settings, weights.sha256)
    cache = folder / "logits" / f"{weights.sha256[:16]}.safetensors"
    if agree(accelerator, lambda: _is_of(cache, key)):
        outputs = read_outputs(cache)
        _same("class_counts", outputs.class_counts, weights.facts, folder)
        _same_split(cache, folder, outputs.val_indices, outputs.test_indices)
        return outputs
    with accelerator.main_process_first():
        data = load(settings.data, settings.train.seed)
    _same("class_counts", data.class_counts, weights.facts, folder)
    _same_split(folder / "split.json", folder, data.val_indices, data.test_indices)
    model = rebuild(weights).to(accelerator.device)
    outputs = outputs_of(model, data, settings, accelerator, weights.sha256)
    if accelerator.is_main_process:
        _keep(cache, outputs, key)
    return outputs


def rebuild(weights: artefact.Artefact) -> nn.Module:
    """Return the trained network in eval mode."""
    model = BalpoeNet(**weights.facts["arguments"])
    model.load_state_dict(weights.payload["state_dict"])
    return model.to(memory_format=torch.channels_last).eval()


def outputs_of(
    model: nn.Module,
    data: Data,
    settings: BalpoeSettings,
    accelerator: "Accelerator",
    digest: str,
) -> Outputs:
    """Compute the outputs of a model, in eval mode, on the validation and test images."""
    size = settings.eval.batch_size
    test_logits, test_labels = predict(model, data.test, accelerator, size)
    val_logits, val_labels = predict(model, data.val, accelerator, size)
    return Outputs(
        val_logits=val_logits,
        val_labels=val_labels,
        test_logits=test_logits,
        test_labels=test_labels,
        class_counts=list(data.class_counts),
        taus=list(settings.taus),
        class_names=list(data.class_names),
        val_indices=data.val_indices,
        test_indices=data.test_indices,
        weights=digest,
    )


def predict(
    model: nn.Module, source: Source, accelerator: "Accelerator", batch_size: int, batches: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the expert logits (N, E, K) in fp32 and the labels (N,), in order, on the CPU.

    Args:
        model: in eval mode, the same on every process.
        source: the data; dealt out over all processes.
        accelerator: devices and processes.
        batch_size: images per forward pass.
        batches: stop after so many; 0 takes all.
    """

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = model(images.to(memory_format=torch.channels_last))
        return logits

    return inference.predict(forward, source, accelerator, batch_size, batches)


def _key(settings: BalpoeSettings, digest: str) -> str:
    """Name what the outputs depend on: weights, images and their division.

    Public data sets are the same wherever they lie; images named in lists are not.
    """
    data = settings.data
    listed = data.dataset in USUAL_NAMES
    left_out = {"workers", "download", *(() if listed else ("root", "images"))}
    key: dict[str, Any] = data.model_dump(mode="json", exclude=left_out)
    if listed:
        key["lists"] = [
            sha256(path.read_bytes()) if path and is_file(path) else None
            for path in list_paths(data)
        ]
    return json.dumps({"weights": digest, "seed": settings.train.seed, **key}, sort_keys=True)


def _is_of(cache: Path, key: str) -> bool:
    """Whether there are outputs of an earlier time, of the same weights and images."""
    try:
        return read_facts(cache).get("key") == key
    except UserError as error:
        log.warning("%s; computed again", error.message)
        return False


def _keep(cache: Path, outputs: Outputs, key: str) -> None:
    try:
        cache.parent.mkdir(exist_ok=True)
        write_outputs(cache, outputs, {"key": key})
    except OSError as error:
        log.warning("%s: not kept for the next time (%s)", cache, error.strerror)


def _tag(reference: str, epoch: int) -> str:
    if Path(reference).is_file():
        return f"epoch{epoch}"
    wanted = split_reference(reference)[1] or "last"
    return wanted if wanted in ("best", "last") else f"epoch{epoch}"


def _same(name: str, value: Sequence[float], facts: Mapping[str, Any], folder: Path) -> None:
    """Refuse to read the outputs of weights by another prior than they were trained for."""
    if list(value) != facts[name]:
        raise UserError(
            f"{folder}: the weights were trained with {name} {_brief(facts[name])},"
            f" the settings now give {_brief(value)}",
            "leave data, loss and the environment as they were in the training",
        )


def _same_split(place: Path, folder: Path, val: list[int], test: list[int]) -> None:
    """Refuse another division than the training's: it would test on validation images."""
    stored = loads_or_none(folder / "split.json")
    if stored is not None and stored != {"val": val, "test": test}:
        raise UserError(f"{place}: the data is split otherwise now than in {folder}")


def _brief(values: Sequence[float]) -> str:
    return ", ".join(map(str, values[:5])) + (" …" if len(values) > 5 else "")
