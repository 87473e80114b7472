"""Applying a fitted plug-in to new items: a class, or the advice to abstain."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moectl.balpoe.data import folder_source
from moectl.balpoe.fitted import FILE, Fitted, find_plugin, read_plugin
from moectl.balpoe.inference import LOGITS, predict, rebuild
from moectl.balpoe.logits import Outputs, read_items, read_outputs
from moectl.balpoe.plugin import fit
from moectl.balpoe.priors import PSEUDO_ITEMS, calibrate, estimate_prior, label_prior
from moectl.balpoe.settings import BalpoeSettings, PluginSection
from moectl.common.scores import prior_weights
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, is_file
from moectl.engine.launch import build_accelerator
from moectl.engine.references import find_weights, split_reference
from moectl.engine.run import read_record
from moectl.engine.settings import from_toml

log = logging.getLogger(__name__)

_TINY = 1e-30  # a posterior of 0 has no log


class Choice(NamedTuple):
    """What to apply, and to what."""

    plugin: str
    """A file, a name in the run, or nothing for the newest of the run."""
    logits: Path | None
    images: Path | None
    rate: float | None
    cost: float | None
    test_prior: str
    """`train`, `uniform`, `em`, a file, or nothing for the prior of the fit."""


class _Items(NamedTuple):
    names: list[str]
    logits: Tensor
    """(N, E, C)"""


def run_reject(request: Request, choice: Choice) -> list[dict[str, Any]]:
    """Judge new items; without any, the test items of the plug-in's run.

    Returns:
        A row for each item with `item`, `label`, `class`, `reject` and `score`.

    Raises:
        UserError: if plug-in, items and operating point do not fit together.
    """
    if choice.rate is not None and choice.cost is not None:
        raise UserError("--target-rate and --cost exclude each other")
    wanted = find_weights(request.run, "balpoe").name if split_reference(request.run)[1] else ""
    path = find_plugin(request.folder, choice.plugin, wanted)
    fitted = read_plugin(path)
    items = _items(request, choice, path, fitted)
    if items.logits.shape[1:] != (len(fitted.taus), len(fitted.class_counts)):
        experts, classes = items.logits.shape[1:]
        raise UserError(
            f"{path}: fitted to {len(fitted.taus)} expert(s) of {len(fitted.class_counts)} classes,"
            f" the items have {experts} of {classes}"
        )
    if choice.test_prior:
        fitted = _refitted(path, fitted, choice.test_prior, items.logits)
    try:
        decided = fitted.plugin.predict(
            fitted.posteriors(items.logits), rate=choice.rate, cost=choice.cost
        )
    except ValueError as error:
        raise UserError(
            f"{path}: {error}", "choose with --target-rate or --cost, or fit another plug-in"
        ) from None
    expected = choice.test_prior or fitted.config["label_prior"]
    log.info(
        "%s: %d of %d rejected; classes are expected to be as frequent as in %s",
        path,
        int(decided.rejected.sum()),
        len(items.names),
        {"train": "training", "em": "the estimate"}.get(expected, expected),
    )
    columns = zip(items.names, *(part.tolist() for part in decided), strict=True)
    return [
        {
            "item": name,
            "label": label,
            "class": fitted.class_names[label],
            "reject": rejected,
            "score": score,
        }
        for name, label, rejected, score in columns
    ]


def _items(request: Request, choice: Choice, path: Path, fitted: Fitted) -> _Items:
    if choice.logits and choice.images:
        raise UserError("--logits and --images exclude each other")
    if choice.logits:
        found = read_items(choice.logits)
        _same_weights(choice.logits, found.weights, fitted)
        return _Items([str(row) for row in range(len(found.logits))], found.logits)
    folder = _run_of(path)
    if choice.images:
        return _of_images(choice.images, folder, fitted, request)
    outputs = read_outputs(_stored(path, fitted))
    return _Items([str(index) for index in outputs.test_indices], outputs.test_logits)


def _same_weights(path: Path, weights: str, fitted: Fitted) -> None:
    own = fitted.weights["sha256"]
    if weights and own and weights != own:
        raise UserError(
            f"{path}: the logits are of the weights {weights[:12]},"
            f" the plug-in was fitted to {own[:12]}"
        )


def _run_of(path: Path) -> Path:
    """Return the run that a plug-in's file lies in."""
    folder = path.resolve().parent.parent.parent
    if path.name != FILE or not is_file(folder / "run.json"):
        raise UserError(
            f"{path}: lies outside a run folder, so there are no weights or logits with it",
            "give the outputs of the classifier with --logits FILE",
        )
    return folder


def _stored(path: Path, fitted: Fitted) -> Path:
    """Return the outputs of the plug-in's classifier on the held-out images of its run."""
    folder, digest = _run_of(path), fitted.weights["sha256"]
    places = (folder / LOGITS, folder / "logits" / f"{digest[:16]}.safetensors")
    found = next((place for place in places if is_file(place)), None)
    if found is None:
        raise UserError(f"{places[-1]}: not there", "moectl balpoe plugin computes it")
    return found


def _of_images(images: Path, folder: Path, fitted: Fitted, request: Request) -> _Items:
    settings: Any = request.settings
    if request.folder is None or request.folder.resolve() != folder:
        settings = from_toml(BalpoeSettings, folder / "settings.toml")
    if fitted.weights["file"] == LOGITS:
        raise UserError(
            f"{folder}: holds logits only, no weights that could judge images",
            "give the outputs of the classifier with --logits FILE",
        )
    if not images.is_dir():
        raise UserError(f"{images}: no such folder of images")
    weights = artefact.load(folder / fitted.weights["file"])
    _same_weights(weights.path, weights.sha256, fitted)
    source = folder_source(images, settings.data)
    precision = str(read_record(folder)["precision"])
    accelerator = build_accelerator(settings.train, request.cpu, precision)
    model = rebuild(weights).to(accelerator.device)
    logits, _ = predict(model, source, accelerator, settings.eval.batch_size)
    return _Items([str(Path(item).relative_to(images)) for item, _ in source.items], logits)


def _refitted(path: Path, fitted: Fitted, kind: str, logits: Tensor) -> Fitted:
    """Fit again, to the validation items weighted to the label prior of the new items."""
    outputs = read_outputs(_stored(path, fitted))
    if kind == "em":
        prior = _estimate(fitted, outputs, logits)
        most = prior.argsort(descending=True)[:5].tolist()
        shares = ", ".join(f"{fitted.class_names[index]} {prior[index]:.3f}" for index in most)
        log.info("estimated label prior: %s …", shares)
    else:
        prior = label_prior(kind, fitted.class_counts)
    config = {**fitted.config, "expert_weights": fitted.expert_weights}
    seed = config.pop("seed")
    again = fit(outputs, PluginSection(**config), seed, prior, fitted.plugin.groups)
    return replace(again, weights=fitted.weights)


def _estimate(fitted: Fitted, outputs: Outputs, logits: Tensor) -> Tensor:
    """Estimate the label prior of new items, with posteriors that fit the validation labels."""
    labels = outputs.val_labels
    val, new = (
        fitted.posteriors(part).clamp_min(_TINY).log() for part in (outputs.val_logits, logits)
    )
    correction = calibrate(val, labels, prior_weights(labels, fitted.prior))
    start = fitted.prior.clamp_min(_TINY).log()
    return estimate_prior(correction.apply(new), start, pseudo_items=PSEUDO_ITEMS)


def lines(rows: list[dict[str, Any]], form: str) -> str:
    """Write a row per line, as `jsonl` or `csv`."""
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    return csv_text(rows)
