"""Fitting the plug-in rule to held-out items of any classifier.

Letters: N items, C classes, K groups of classes, R operating points.

Source: Narasimhan et al. 2024, Algorithms 1 and 2.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moectl.balpoe.curves import threshold_at
from moectl.balpoe.groups import Groups
from moectl.balpoe.longtail import halve
from moectl.balpoe.rule import Plugin, Reduced, doubles, judge, reduce

_STARTS = (1.0, 0.5, 0.25)
_SMALLEST_SHARE = 1e-6
_TRACED = ("alpha", "mu", "errors", "objective")


@dataclass(frozen=True)
class Method:
    """How a plug-in is fitted."""

    objective: Literal["balanced", "worst"] | tuple[float, ...] = "balanced"
    """Mean of the group errors, the largest of them, or the weight beta of each group."""
    multipliers: Literal["fixed-point", "grid"] = "fixed-point"
    """Where mu comes from: its stationarity condition, or a search over differences of it."""
    lambdas: tuple[float, ...] = (0.0, 1.0, -1.0, 6.0, -6.0, 11.0, -11.0)
    """The grid: multiplier of each further group less that of the first."""
    iterations: int = 30
    """Steps towards consistent acceptance shares."""
    rounds: int = 25
    """Of the worst-group objective: how often the group weights are updated."""
    step_size: float = 1.0
    """Of the worst-group objective: exponent of the update per unit of error."""
    keep: Literal["best", "last"] = "best"
    """Of the worst-group objective: the round whose rule is returned."""
    seed: int = 0
    """Of the worst-group objective: which items fit the rule, and which the group weights."""


class _Sample(NamedTuple):
    """Items to fit on."""

    items: Reduced
    labels: Tensor
    """(N,)"""
    member: Tensor
    """(N, K) 1 in the column of the label's group."""
    weights: Tensor
    """(N,) with sum 1."""

    def rows(self, rows: Tensor) -> "_Sample":
        weights = self.weights[rows]
        labels, member = self.labels[rows], self.member[rows]
        return _Sample(self.items.rows(rows), labels, member, weights / weights.sum())


class _Target(NamedTuple):
    """Operating points; the other of rate and cost is nan."""

    rates: Tensor
    """(R,)"""
    costs: Tensor
    """(R,)"""

    def repeated(self, times: int) -> "_Target":
        return _Target(*(part.repeat_interleave(times) for part in self))

    def thresholds(self, scores: Tensor, weights: Tensor) -> Tensor:
        wanted = -self.costs
        by_rate = ~self.rates.isnan()
        if by_rate.any():
            wanted[by_rate] = threshold_at(scores[by_rate], self.rates[by_rate], weights)
        return wanted


class _State(NamedTuple):
    """Rules with what they do to a sample: (R, K) and (R,)."""

    alpha: Tensor
    mu: Tensor
    thresholds: Tensor
    shares: Tensor
    """P(accepted, group k)"""
    errors: Tensor
    """P(wrong | accepted, group k), 1 where nothing is accepted"""
    objective: Tensor
    """sum_k beta_k e_k + cost * P(reject), the latter only where a cost is given"""


def fit_plugin(  # noqa: PLR0913 - options after the items
    posteriors: Any,
    labels: Any,
    groups: Groups | Sequence[int],
    *,
    rates: Sequence[float] = (),
    costs: Sequence[float] = (),
    weights: Any = None,
    method: Method | None = None,
    must_accept: bool = True,
) -> Plugin:
    """Fit the plug-in rule to held-out items of any classifier.

    Args:
        posteriors: (N, C) tensor or array, rows with sum 1.
        labels: (N,) classes.
        groups: the group of each class; plain numbers from 0 on will do.
        rates: target rejection rates in [0, 1), each an operating point.
        costs: costs of a rejection in [0, 1], each an operating point.
        weights: (N,) how much each item stands for, in line with the prior of the posteriors.
        method: how to fit; the defaults if left out.
        must_accept: whether it is an error that a rule accepts none of a group. Otherwise the
            group's error counts as 1.

    Raises:
        ValueError: if something does not fit together, a group has no item, or a rule accepts
            none of a group.
    """
    method = method or Method()
    groups = _named(groups)
    if not (len(rates) or len(costs)):
        raise ValueError("a plug-in needs a rejection rate or a cost")
    _check_range("rejection rate", rates, below_one=True)
    _check_range("cost", costs)
    sample = _sample(posteriors, labels, groups, weights)
    nan = [float("nan")]
    target = _Target(doubles([*rates, *nan * len(costs)]), doubles([*nan * len(rates), *costs]))
    if method.objective == "worst":
        found, beta, trace = _worst_group(sample, target, groups, method)
    else:
        beta = _beta(method.objective, len(groups.names)).expand(len(target.rates), -1)
        found, trace = _cost_sensitive(sample, target, beta, method)
    found = _measured(sample, target, beta, found.alpha, found.mu)
    if must_accept:
        _check_accepted(found, target, groups)
    return Plugin(
        groups=groups,
        rates=(*rates, *[None] * len(costs)),
        costs=(*[None] * len(rates), *costs),
        alpha=found.alpha,
        mu=found.mu,
        thresholds=found.thresholds,
        beta=beta,
        rejection=1 - found.shares.sum(1),
        errors=found.errors,
        trace=trace,
    )


def _named(groups: Groups | Sequence[int]) -> Groups:
    if isinstance(groups, Groups):
        return groups
    of_class = tuple(int(group) for group in groups)
    return Groups(tuple(map(str, range(max(of_class) + 1))), of_class)


def _check_range(what: str, values: Sequence[float], below_one: bool = False) -> None:
    for value in values:
        if not (0 <= value <= 1) or (below_one and value == 1):
            raise ValueError(f"{what} {value:g} is not in [0, 1{')' if below_one else ']'}")


def _sample(posteriors: Any, labels: Any, groups: Groups, weights: Any) -> _Sample:
    items = reduce(posteriors, groups)
    labels = torch.as_tensor(labels).long()
    classes, count = len(groups.of_class), len(items.top)
    if labels.shape != (count,):
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {count} items")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"label {int(labels[row])} of item {row} is not in 0..{classes - 1}")
    weights = torch.ones(count) if weights is None else weights
    weights = doubles(weights)
    if weights.shape != (count,) or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"weights must be {count} numbers, not negative and not all zero")
    weights = weights / weights.sum()
    member = torch.nn.functional.one_hot(
        torch.tensor(groups.of_class)[labels], len(groups.names)
    ).double()
    _check_groups(weights @ member, groups)
    return _Sample(items, labels, member, weights)


def _check_groups(shares: Tensor, groups: Groups, where: str = "to fit on") -> None:
    empty = [name for name, share in zip(groups.names, shares, strict=True) if share <= 0]
    if empty:
        raise ValueError(f"group {empty[0]} has no item {where}")


def _check_accepted(state: _State, target: _Target, groups: Groups) -> None:
    empty = (state.shares <= 0).nonzero()
    if len(empty):
        point, group = empty[0].tolist()
        rate, cost = float(target.rates[point]), float(target.costs[point])
        where = f"cost {cost:g}" if rate != rate else f"rejection rate {rate:g}"
        raise ValueError(f"group {groups.names[group]} has no accepted item at {where}")


def _measured(
    sample: _Sample,
    target: _Target,
    beta: Tensor,
    alpha: Tensor,
    mu: Tensor,
    thresholds: Tensor | None = None,
) -> _State:
    """Apply rules to a sample; without thresholds, those that meet the target on it."""
    scores, classes = judge(sample.items, alpha, mu)
    if thresholds is None:
        thresholds = target.thresholds(scores, sample.weights)
    accepted = torch.where(scores < thresholds[:, None], 0.0, sample.weights)
    shares = accepted @ sample.member
    wrong = torch.where(classes == sample.labels, 0.0, accepted) @ sample.member
    errors = torch.where(shares > 0, wrong / shares, 1.0)
    paid = target.costs.nan_to_num(0.0) * (1 - shares.sum(1))
    return _State(alpha, mu, thresholds, shares, errors, (beta * errors).sum(1) + paid)


def _beta(objective: Any, groups: int) -> Tensor:
    if objective == "balanced":
        return torch.full((groups,), 1 / groups, dtype=torch.float64)
    beta = doubles(objective)
    if beta.shape != (groups,) or not (beta > 0).all() or not beta.isfinite().all():
        raise ValueError(f"group weights must be {groups} positive numbers, got {beta.tolist()}")
    return beta / beta.sum()


def _cost_sensitive(
    sample: _Sample, target: _Target, beta: Tensor, method: Method
) -> tuple[_State, dict[str, Tensor]]:
    """Find the rules with the lowest objective for group weights beta, (R, K)."""
    search = _fixed_point if method.multipliers == "fixed-point" else _grid
    return search(sample, target, beta, method)


def _fixed_point(
    sample: _Sample, target: _Target, beta: Tensor, method: Method
) -> tuple[_State, dict[str, Tensor]]:
    """Iterate towards shares and multipliers that reproduce themselves, from several starts.

    The steps are damped: the plain iteration can alternate between two rules on finite samples.
    """
    starts = doubles(_STARTS)
    prior = sample.weights @ sample.member
    beta = beta.repeat_interleave(len(starts), 0)
    target = target.repeated(len(starts))
    share = prior * starts.repeat(len(beta) // len(starts))[:, None]
    mu = torch.zeros_like(share)
    best = _Best(len(starts))
    for _ in range(method.iterations):
        state = _measured(sample, target, beta, share / beta, mu)
        best.offer(state)
        share = ((share + state.shares) / 2).clamp_min(_SMALLEST_SHARE)
        mu = (mu + state.errors * beta / share) / 2
    return best.chosen()


def _grid(
    sample: _Sample, target: _Target, beta: Tensor, method: Method
) -> tuple[_State, dict[str, Tensor]]:
    """Try every combination of differences between multipliers, iterating the shares for each.

    Only differences matter for a target rate. For a cost the level does too, and is that of the
    first group's stationarity condition.
    """
    groups = beta.shape[1]
    if not method.lambdas:
        raise ValueError("a grid needs candidates for the multipliers")
    combinations = len(method.lambdas) ** (groups - 1)
    if combinations > 1000:
        raise ValueError(f"a grid over {groups} groups has {combinations} points; take fixed-point")
    grid = doubles([(0.0, *rest) for rest in itertools.product(method.lambdas, repeat=groups - 1)])
    points = len(beta)
    beta = beta.repeat_interleave(len(grid), 0)
    target = target.repeated(len(grid))
    differences = grid.repeat(points, 1)
    share = (sample.weights @ sample.member).expand_as(beta)
    mu = differences
    best = _Best(len(grid))
    for _ in range(method.iterations):
        state = _measured(sample, target, beta, share / beta, mu)
        best.offer(state)
        share = state.shares.clamp_min(_SMALLEST_SHARE)
        mu = differences + (state.errors * beta / share)[:, :1]
    return best.chosen()


class _Best:
    """Keeps the best state of every row over iterations, then the best row of every point."""

    def __init__(self, rows_per_point: int) -> None:
        self.rows_per_point = rows_per_point
        self.kept: _State | None = None
        self.history: list[_State] = []

    def offer(self, state: _State) -> None:
        self.history.append(state)
        if self.kept is None:
            self.kept = state
            return
        better = state.objective < self.kept.objective
        self.kept = _State(
            *(
                torch.where(better if new.ndim == 1 else better[:, None], new, old)
                for new, old in zip(state, self.kept, strict=True)
            )
        )

    def chosen(self) -> tuple[_State, dict[str, Tensor]]:
        assert self.kept is not None
        objective = self.kept.objective.view(-1, self.rows_per_point)
        rows = objective.argmin(1) + torch.arange(len(objective)) * self.rows_per_point
        trace = {
            name: torch.stack([getattr(state, name)[rows] for state in self.history])
            for name in _TRACED
        }
        return _State(*(part[rows] for part in self.kept)), trace


def _worst_group(
    sample: _Sample, target: _Target, groups: Groups, method: Method
) -> tuple[_State, Tensor, dict[str, Tensor]]:
    """Raise the weights of the groups with large held-out errors, and fit again.

    One half of every class fits the rules, the other measures their errors.
    """
    halves = halve(sample.labels, method.seed)
    fitting, held = (sample.rows(torch.from_numpy(half)) for half in halves)
    for half in (fitting, held):
        _check_groups(half.weights @ half.member, groups, "in one half of the items")
    beta = _beta("balanced", len(groups.names)).expand(len(target.rates), -1)
    states, betas = [], []
    for _ in range(method.rounds):
        found, _ = _cost_sensitive(fitting, target, beta, method)
        seen = _measured(held, target, beta, found.alpha, found.mu, thresholds=found.thresholds)
        paid = target.costs.nan_to_num(0.0) * (1 - seen.shares.sum(1))
        states.append(seen._replace(objective=seen.errors.amax(1) + paid))
        betas.append(beta)
        beta = exponentiated_step(beta, seen.errors, method.step_size)
    trace = {name: torch.stack([getattr(state, name) for state in states]) for name in _TRACED}
    chosen = torch.full((len(beta),), method.rounds - 1)
    if method.keep == "best":
        chosen = trace["objective"].argmin(0)
    points = torch.arange(len(beta))
    parts = (torch.stack(part)[chosen, points] for part in zip(*states, strict=True))
    return _State(*parts), torch.stack(betas)[chosen, points], trace


def exponentiated_step(beta: Tensor, errors: Tensor, step_size: float) -> Tensor:
    """Shift group weights, (…, K), towards the groups with large errors."""
    return torch.softmax(beta.log() + step_size * errors, dim=-1)
