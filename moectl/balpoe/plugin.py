"""Fitting a plug-in to the validation outputs of a classifier."""

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import ValidationError
from torch import Tensor

from moectl.balpoe.curves import curve
from moectl.balpoe.fitted import FILE, Fitted, posteriors, to_document
from moectl.balpoe.groups import Groups, class_groups
from moectl.balpoe.inference import LOGITS, Classifier, open_classifier
from moectl.balpoe.logits import Outputs, read_outputs, write_outputs
from moectl.balpoe.longtail import halve
from moectl.balpoe.priors import label_prior
from moectl.balpoe.rejection import Method, fit_plugin
from moectl.balpoe.report import report
from moectl.balpoe.settings import BalpoeSettings, PluginSection
from moectl.common.calibration import expected_calibration_error, reliability
from moectl.common.scores import prior_weights
from moectl.engine.command import Request, open_run
from moectl.engine.errors import UserError
from moectl.engine.files import read_json, sha256, write_json
from moectl.engine.run import Run
from moectl.engine.settings import dump

log = logging.getLogger(__name__)

_STEPS = 5  # the simplex of expert weights is searched in steps of a fifth
_MOST_WEIGHTS = 1000
_MISCALIBRATED = 0.1


def method_of(section: PluginSection, seed: int) -> Method:
    """Return how the settings want a plug-in to be fitted."""
    return Method(
        objective="worst" if section.objective == "worst" else section.group_shares or "balanced",
        multipliers=section.mu_method,
        lambdas=section.lambdas,
        iterations=section.iterations,
        rounds=section.rounds,
        step_size=section.step_size,
        keep=section.keep,
        seed=seed,
    )


def fit(
    outputs: Outputs,
    section: PluginSection,
    seed: int,
    prior: Tensor | None = None,
    groups: Groups | None = None,
) -> Fitted:
    """Fit the plug-in that the settings describe to the validation outputs.

    Args:
        outputs: of the classifier.
        section: the settings.
        seed: of the halves of the validation items.
        prior: (C,) label prior of the items to be judged, if not that of the settings.
        groups: of the classes, if not those of the settings.

    Raises:
        UserError: if settings and outputs do not fit, or a group has no item or accepted item.
    """
    counts = outputs.class_counts
    names, threshold = outputs.class_names, section.tail_threshold
    groups = groups or class_groups(section.groups, counts, names, threshold)
    prior = label_prior(section.label_prior, counts) if prior is None else prior
    try:
        shares = _expert_weights(outputs, section, groups, prior, seed)
        fitted = posteriors(
            outputs.val_logits, counts, outputs.taus, prior, section.posterior, shares
        )
        weights = prior_weights(outputs.val_labels, prior)
        plugin = fit_plugin(
            fitted,
            outputs.val_labels,
            groups,
            rates=section.rates,
            costs=section.costs,
            weights=weights,
            method=method_of(section, seed),
        )
    except ValueError as error:
        _explain(error, section)
    _warn(fitted, outputs.val_labels, weights)
    config = {**section.model_dump(mode="json"), "seed": seed}
    return Fitted(
        plugin, section.posterior, shares.tolist(), prior, counts, outputs.class_names,
        outputs.taus, {}, config,
    )  # fmt: skip


def _warn(fitted: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Say so if the posteriors are not what the theory takes them for."""
    error = expected_calibration_error(reliability(fitted, labels, weights=weights))
    if error > _MISCALIBRATED:
        log.warning("the posteriors are off by %.0f %% (ECE); the rule trusts them", 100 * error)


def _explain(error: ValueError, section: PluginSection) -> NoReturn:
    hints = {
        "accepted item": "lower plugin.rates, or raise plugin.costs",
        "no item": "enlarge the validation set (data.val_fraction) or choose other plugin.groups",
        "posterior kind": "see plugin.posterior",
        "group weights": "give plugin.objective a positive number for each group",
    }
    hint = next((hint for words, hint in hints.items() if words in str(error)), "")
    raise UserError(f"plugin for groups {section.groups}: {error}", hint) from None


def _expert_weights(
    outputs: Outputs, section: PluginSection, groups: Groups, prior: Tensor, seed: int
) -> Tensor:
    experts = len(outputs.taus)
    given = section.expert_shares
    if given is not None:
        if len(given) != experts:
            raise UserError(f"plugin.expert_weights has {len(given)} numbers for {experts} experts")
        return torch.tensor(given, dtype=torch.float64)
    if section.expert_weights == "equal" or section.posterior.startswith("single"):
        return torch.full((experts,), 1 / experts, dtype=torch.float64)
    return search_weights(outputs, section, groups, prior, seed)


def search_weights(
    outputs: Outputs, section: PluginSection, groups: Groups, prior: Tensor, seed: int
) -> Tensor:
    """Choose the weights of the experts, (E,), on a simplex in steps of a fifth.

    Each candidate is fitted on one half of the validation items and measured on the other, both
    ways round, so that the choice is not the one that fits its own data best. For the worst-group
    objective the fits are for the balanced error, and the measure is the worst group's.
    """
    candidates = _simplex(len(outputs.taus))
    halves = [torch.from_numpy(half) for half in halve(outputs.val_labels, seed)]
    weights = prior_weights(outputs.val_labels, prior)
    of_class = torch.tensor(groups.of_class)
    method = replace(method_of(section, seed), objective=section.group_shares or "balanced")
    losses = []
    for shares in candidates:
        judged = posteriors(
            outputs.val_logits, outputs.class_counts, outputs.taus, prior, section.posterior, shares
        )
        loss = 0.0
        for own, other in (halves, halves[::-1]):
            plugin = fit_plugin(
                judged[own], outputs.val_labels[own], groups, rates=section.rates,
                costs=section.costs, weights=weights[own], method=method, must_accept=False,
            )  # fmt: skip
            labels = outputs.val_labels[other]
            scores, classes = plugin.judge(judged[other])
            rejected = scores < plugin.thresholds[:, None]
            found = curve(
                rejected, classes != labels, of_class[labels], weights[other], len(groups.names)
            )
            errors = found.group_errors.nan_to_num(1.0)
            worst = section.objective == "worst"
            risk = errors.amax(1) if worst else (plugin.beta * errors).sum(1)
            costs = torch.tensor([cost or 0.0 for cost in plugin.costs], dtype=torch.float64)
            loss += float((risk + costs * found.rejection).mean())
        losses.append(loss)
    return candidates[losses.index(min(losses))]


def _simplex(experts: int) -> list[Tensor]:
    """List all shares of the experts in steps of a fifth, the most even ones first."""
    if math.comb(experts + _STEPS - 1, _STEPS) > _MOST_WEIGHTS:
        raise UserError(
            f"plugin.expert_weights is grid, which is too large for {experts} experts",
            "choose equal, or give the weights as a list",
        )
    chosen = itertools.combinations_with_replacement(range(experts), _STEPS)
    counts = [torch.bincount(torch.tensor(each), minlength=experts) for each in chosen]
    counts.sort(key=lambda parts: int(parts.square().sum()))
    return [parts.double() / _STEPS for parts in counts]


def run_plugin(request: Request, logits: Path | None) -> tuple[dict[str, Any], str]:
    """Fit a plug-in to a run, or to a file of somebody else's logits, and keep it in the run.

    Returns:
        The document, and the path of its file.

    Raises:
        UserError: if input or settings do not fit.
    """
    settings: Any = request.settings
    if logits and not request.folder:
        outputs = read_outputs(logits, settings.data.val_fraction, settings.train.seed)
        fitted = fit(outputs, settings.plugin, settings.train.seed)
        with open_run(replace(request, settings=_described(settings, outputs))) as run:
            return _keep(fitted, _adopt(run, logits, outputs), request.name)
    assert request.folder is not None
    if request.out:
        raise UserError("--out is for --logits alone", "a plug-in of a run is kept in the run")
    found = open_classifier(settings, request.run, request.folder, request.cpu, logits)
    fitted = fit(found.outputs, settings.plugin, settings.train.seed)
    return _keep(fitted, found, request.name)


def _described(settings: BalpoeSettings, outputs: Outputs) -> BalpoeSettings:
    """Let the settings of the run say what is known of a classifier that came from elsewhere."""
    tree = dump(settings)
    tree["data"]["dataset"] = "list"
    tree["model"]["experts"] = len(outputs.taus)
    tree["loss"]["tau_list"] = outputs.taus
    try:
        return BalpoeSettings(**tree)
    except ValidationError:
        raise UserError(f"model.experts: {len(outputs.taus)} experts are too many") from None


def _adopt(run: Run[BalpoeSettings], path: Path, outputs: Outputs) -> Classifier:
    """Make the new run one of somebody else's classifier: its outputs stand for the weights."""
    digest = sha256(path.read_bytes())
    own = replace(outputs, weights=outputs.weights or digest)
    if run.is_main:
        write_outputs(run.folder / LOGITS, own)
    run.note(parents=[{"path": str(path), "sha256": digest}])
    entry = {"file": LOGITS, "sha256": own.weights, "epoch": 0}
    return Classifier(own, run.folder, entry, "logits", run.is_main)


def _keep(fitted: Fitted, found: Classifier, name: str) -> tuple[dict[str, Any], str]:
    """Write the plug-in under a name that no other fit of the run has, and the report again."""
    document = to_document(replace(fitted, weights=found.weights))
    for number in itertools.count(1):
        folder = found.folder / "plugins" / (name if number == 1 else f"{name}-{number}")
        path = folder / FILE
        if not path.exists() or _same_fit(path, document):
            break
    if found.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, document)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        report(found.folder)
    for point in document["points"]:
        log.info("%s", _line(point))
    return {"file": str(path), **document}, str(path)


def _same_fit(path: Path, document: Mapping[str, Any]) -> bool:
    old = read_json(path)
    return isinstance(old, dict) and {**old, "moectl": None} == {**document, "moectl": None}


def _line(point: Mapping[str, Any]) -> str:
    kind = "rate" if point["cost"] is None else "cost"
    errors = ", ".join(f"{100 * error:.1f}" for error in point["group_errors"][:8])
    return (
        f"{kind} {point[kind]:g}: rejects {100 * point['rejection']:z.1f} %, balanced error"
        f" {100 * point['balanced_error']:.1f} %, worst {100 * point['worst_group_error']:.1f} %"
        f" (groups {errors})"
    )
