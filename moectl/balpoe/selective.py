"""How errors fall as classifiers reject: Chow's rule against plug-ins, over the rejection rate.

Letters: N items, C classes, K groups, R rejection rates, P operating points: the rates, then the
costs of the settings.

Sources: Chow 1970; Narasimhan et al. 2024.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moectl.balpoe import curves
from moectl.balpoe.fitted import Fitted, posteriors
from moectl.balpoe.groups import Groups
from moectl.balpoe.logits import Outputs
from moectl.balpoe.longtail import split_indices
from moectl.balpoe.plugin import method_of, search_weights
from moectl.balpoe.priors import label_prior
from moectl.balpoe.rejection import fit_plugin
from moectl.balpoe.settings import BalpoeSettings
from moectl.common.scores import prior_weights

log = logging.getLogger(__name__)

Areas = dict[str, dict[str, curves.Area]]
"""Method to `balanced` and `worst`."""


class Rejector(NamedTuple):
    """What a method says about the test items at every operating point."""

    scores: Tensor
    """(P, N) the lower, the sooner rejected."""
    wrong: Tensor
    """(P, N) whether it misses the label."""
    thresholds: Tensor
    """(P,) from the validation items, or the costs."""
    rules: list[dict[str, Any]] | None = None
    """alpha, mu and threshold of every point, of a plug-in."""
    rejects: bool = True
    """False for the classifier that always answers."""


class Task(NamedTuple):
    """What is to be judged, and under which label prior."""

    outputs: Outputs
    settings: BalpoeSettings
    groups: Groups
    prior: Tensor
    """(C,)"""
    seed: int

    @property
    def rates(self) -> Tensor:
        """The rejection rates, (R,)."""
        return torch.tensor(self.settings.plugin.rates, dtype=torch.float64)

    @property
    def group(self) -> Tensor:
        """The group of each test item's label, (N,)."""
        return torch.tensor(self.groups.of_class)[self.outputs.test_labels]

    @property
    def weights(self) -> Tensor:
        """How much each test item stands for under the prior, (N,)."""
        return prior_weights(self.outputs.test_labels, self.prior)


def compare(task: Task, saved: Mapping[str, Fitted]) -> dict[str, Any]:
    """Measure all methods, and saved plug-ins, under one label prior.

    Returns:
        `methods`: name to areas with intervals, curves and rules; `costs`: a row for each method
        and cost.

    Raises:
        ValueError: if a group has no item.
    """
    found = methods(task)
    found |= {f"plugin:{name}": apply_saved(task, fitted) for name, fitted in saved.items()}
    matched = {name: _matched(task, method) for name, method in found.items()}
    transfer = {name: _transferred(task, method) for name, method in found.items()}
    areas = {name: _areas(task, curve) for name, curve in matched.items()}
    trials = [areas, *(_trial(task, number) for number in range(1, task.settings.eval.trials))]
    samples = _resampled(task, found)
    described = {}
    for name, method in found.items():
        summary = {
            kind: {
                **vars(areas[name][kind]),
                **_intervals(samples, name, column),
                "minus_chow": None
                if name == "chow"
                else areas[name][kind].normalised - areas["chow"][kind].normalised,
                **_over_trials([trial[name][kind] for trial in trials if name in trial]),
                "transfer": _areas(task, transfer[name])[kind].normalised,
            }
            for column, kind in enumerate(("balanced", "worst"))
        }
        described[name] = {
            "aurc": summary,
            "curve": {"matched": _plain(matched[name]), "transfer": _plain(transfer[name])},
            "rules": method.rules,
        }
    return {"methods": described, "costs": _at_costs(task, found)}


def methods(task: Task) -> dict[str, Rejector]:
    """Judge the test items by Chow's rule and by plug-ins fitted to the validation items.

    Chow's rule takes the ensemble as it was trained, for the uniform prior (`chow`), moved to the
    training prior (`chow_ce`), and its most balanced expert alone (`chow_single`). Plug-ins take
    that expert, the ensemble, or the ensemble with weights searched for the balanced error;
    each for the mean of the group errors and for the largest.
    """
    outputs, section = task.outputs, task.settings.plugin
    counts, taus = outputs.class_counts, outputs.taus
    uniform, train = (label_prior(name, counts) for name in ("uniform", "train"))
    single = f"single:{min(range(len(taus)), key=lambda expert: abs(taus[expert] - 1))}"

    def both(prior: Tensor, kind: str = "poe", shares: Tensor | None = None) -> _Pair:
        parts = (outputs.val_logits, outputs.test_logits)
        return _Pair(*(posteriors(part, counts, taus, prior, kind, shares) for part in parts))

    chow = _chow(task, both(uniform))
    found = {
        "balpoe": chow._replace(rejects=False),
        "chow": chow,
        "chow_ce": _chow(task, both(train)),
    }
    fitted = {"plugin_single": both(task.prior, single)}
    if len(taus) > 1:
        found["chow_single"] = _chow(task, both(uniform, single))
        poe = section.model_copy(update={"posterior": "poe", "objective": "balanced"})
        shares = search_weights(outputs, poe, task.groups, task.prior, task.seed)
        fitted["plugin_balpoe_avg"] = both(task.prior)
        fitted["moe_plugin"] = both(task.prior, "poe", shares)
    variants: tuple[tuple[Literal["balanced", "worst"], str], ...]
    variants = (("balanced", ""), ("worst", "_worst"))
    for objective, ending in variants:
        for name, pair in fitted.items():
            found[name + ending] = _plugin(task, pair, objective)
    return found


class _Pair(NamedTuple):
    """Posteriors, (N, C), of the validation and the test items."""

    val: Tensor
    test: Tensor


def _chow(task: Task, pair: _Pair) -> Rejector:
    """Reject what has a small largest posterior; at cost c, one below 1 - c."""
    points = len(task.rates) + len(task.settings.plugin.costs)
    labels = task.outputs.val_labels
    certain = pair.val.amax(1).expand(len(task.rates), -1)
    by_rate = curves.threshold_at(certain, task.rates, prior_weights(labels, task.prior))
    by_cost = 1 - torch.tensor(task.settings.plugin.costs, dtype=torch.float64)
    top, classes = pair.test.max(1)
    wrong = classes != task.outputs.test_labels
    return Rejector(top.expand(points, -1), wrong.expand(points, -1), torch.cat([by_rate, by_cost]))


def _plugin(task: Task, pair: _Pair, objective: Literal["balanced", "worst"]) -> Rejector:
    section, labels = task.settings.plugin, task.outputs.val_labels
    plugin = fit_plugin(
        pair.val,
        labels,
        task.groups,
        rates=section.rates,
        costs=section.costs,
        weights=prior_weights(labels, task.prior),
        method=replace(method_of(section, task.seed), objective=objective),
        must_accept=False,
    )
    scores, classes = plugin.judge(pair.test)
    rules = [
        {"alpha": alpha, "mu": mu, "threshold": _number(threshold)}
        for alpha, mu, threshold in zip(
            plugin.alpha.tolist(), plugin.mu.tolist(), plugin.thresholds, strict=True
        )
    ]
    return Rejector(scores, classes != task.outputs.test_labels, plugin.thresholds, rules)


def apply_saved(task: Task, fitted: Fitted) -> Rejector:
    """Judge the test items by a saved plug-in, at the operating points of the settings.

    Raises:
        ValueError: if it has no rule for one of them.
    """
    section, plugin = task.settings.plugin, fitted.plugin
    rows = [plugin.point(rate=rate) for rate in section.rates]
    rows += [plugin.point(cost=cost) for cost in section.costs]
    scores, classes = plugin.judge(fitted.posteriors(task.outputs.test_logits), rows)
    return Rejector(scores, classes != task.outputs.test_labels, plugin.thresholds[rows])


def _matched(task: Task, method: Rejector) -> curves.Curve:
    """Reject the wanted share of the test items themselves; their labels play no part."""
    points = len(task.rates)
    wanted = task.rates if method.rejects else torch.zeros_like(task.rates)
    rejected = curves.reject_lowest(method.scores[:points], wanted, task.weights)
    return _curve(task, method, rejected)


def _transferred(task: Task, method: Rejector) -> curves.Curve:
    """Reject below the threshold of the validation items, as one must in use."""
    points = len(task.rates)
    rejected = method.scores[:points] < method.thresholds[:points, None]
    return _curve(task, method, rejected & method.rejects)


def _curve(task: Task, method: Rejector, rejected: Tensor) -> curves.Curve:
    wrong = method.wrong[: len(rejected)]
    return curves.curve(rejected, wrong, task.group, task.weights, len(task.groups.names))


def _areas(task: Task, found: curves.Curve) -> dict[str, curves.Area]:
    return {
        "balanced": curves.area(task.rates, found.balanced_error),
        "worst": curves.area(task.rates, found.worst_error),
    }


def _trial(task: Task, number: int) -> Areas:
    """Divide the held-out items anew, fit everything again and measure the areas."""
    log.info("rejection: division %d of %d", number + 1, task.settings.eval.trials)
    seed = task.seed + number
    own = task._replace(outputs=redivided(task.outputs, seed), seed=seed)
    return {name: _areas(own, _matched(own, method)) for name, method in methods(own).items()}


def redivided(outputs: Outputs, seed: int) -> Outputs:
    """Divide validation and test items anew, class by class, in the same proportion."""
    logits = torch.cat([outputs.val_logits, outputs.test_logits])
    labels = torch.cat([outputs.val_labels, outputs.test_labels])
    indices = [*outputs.val_indices, *outputs.test_indices]
    share = len(outputs.val_labels) / len(labels)
    val, test = (torch.from_numpy(part) for part in split_indices(labels.numpy(), share, seed))
    return replace(
        outputs,
        val_logits=logits[val],
        val_labels=labels[val],
        test_logits=logits[test],
        test_labels=labels[test],
        val_indices=[indices[row] for row in val.tolist()],
        test_indices=[indices[row] for row in test.tolist()],
    )


def _resampled(task: Task, found: Mapping[str, Rejector]) -> dict[str, Tensor]:
    """Return the balanced and worst areas, (D, 2), of every method on the same resamples."""
    draws, points = task.settings.eval.bootstrap, len(task.rates)
    if not draws:
        return {}
    counts = curves.class_bootstrap(task.outputs.test_labels, draws, task.seed)
    samples = {}
    for name, method in found.items():
        rows = points if method.rejects else 1
        wanted = task.rates if method.rejects else torch.zeros(1, dtype=torch.float64)
        samples[name] = curves.bootstrap_areas(
            method.scores[:rows],
            method.wrong[:rows],
            task.group,
            task.weights,
            wanted,
            len(task.groups.names),
            counts,
        )
    return samples


def _intervals(samples: Mapping[str, Tensor], name: str, column: int) -> dict[str, Any]:
    """Return the interval of an area, and of its difference to that of Chow's rule."""
    own: Any = (None, None)
    versus: Any = (None, None)
    if samples:
        areas = samples[name][:, column]
        own = curves.interval(areas)
        if name != "chow":
            versus = curves.interval(areas - samples["chow"][:, column])
    names = ("low", "high", "minus_chow_low", "minus_chow_high")
    return dict(zip(names, (*own, *versus), strict=True))


def _over_trials(areas: Sequence[curves.Area]) -> dict[str, Any]:
    values = [area.normalised for area in areas]
    mean, half_width = curves.mean_interval(values)
    return {"trials": values, "trials_mean": mean, "trials_half_width": half_width}


def _at_costs(task: Task, found: Mapping[str, Rejector]) -> list[dict[str, Any]]:
    """Return error plus cost times rejection of every method that rejects, at every cost."""
    first, rows = len(task.rates), []
    for name, method in found.items():
        rejected = method.scores[first:] < method.thresholds[first:, None]
        if not (method.rejects and len(rejected)):
            continue
        wrong = method.wrong[first:]
        groups = len(task.groups.names)
        measured = curves.curve(rejected, wrong, task.group, task.weights, groups)
        for number, cost in enumerate(task.settings.plugin.costs):
            paid = cost * float(measured.rejection[number])
            row = {
                "cost": cost,
                "rejection": float(measured.rejection[number]),
                "balanced_risk": float(measured.balanced_error[number]) + paid,
                "worst_risk": float(measured.worst_error[number]) + paid,
            }
            rows.append({"method": name, **row})
    return rows


def _plain(measured: curves.Curve) -> dict[str, Any]:
    """Write a curve as lists; undefined numbers become None."""
    columns = {**vars(measured), "gap": measured.gap()}
    return {name: _list(values) for name, values in columns.items()}


def _list(values: Tensor) -> list[Any]:
    if values.ndim > 1:
        return [_list(row) for row in values]
    return [_number(value) for value in values]


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None
