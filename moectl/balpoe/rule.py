"""The plug-in rule: when a classifier should abstain, fair to groups of classes of unequal size.

Letters: N items, C classes, K groups of classes, R operating points. The rule of one operating
point has acceptance shares alpha (K,), multipliers mu (K,) and a threshold:

    class   argmax_y p_y / alpha_[y]
    score   max_y p_y / alpha_[y] - sum_y (1 / alpha_[y] - mu_[y]) p_y
    reject  if the score is below the threshold, which is minus the cost of a rejection

Here [y] is the group of class y. It is optimal for sum_k beta_k e_k + cost * P(reject), with e_k
the error among accepted items of group k, if alpha_k = P(accepted, group k) / beta_k and
mu_k = e_k / alpha_k: the second follows by asking when accepting one more item pays.

Source: Narasimhan et al. 2024, Theorem 1 and Algorithms 1 and 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moectl.balpoe.groups import Groups


class Decisions(NamedTuple):
    """What a rule says about N items."""

    labels: Tensor
    """(N,) the classes."""
    rejected: Tensor
    """(N,) whether to abstain."""
    scores: Tensor
    """(N,) the lower, the sooner an item is rejected."""


@dataclass(frozen=True)
class Plugin:
    """Fitted rules, one per operating point: first those of target rates, then those of costs."""

    groups: Groups
    rates: tuple[float | None, ...]
    """(R,) share to be rejected; None where a cost is given."""
    costs: tuple[float | None, ...]
    """(R,) cost of a rejection; None where a rate is given."""
    alpha: Tensor
    """(R, K) acceptance shares, each over the weight of its group in the objective."""
    mu: Tensor
    """(R, K) multipliers."""
    thresholds: Tensor
    """(R,)"""
    beta: Tensor
    """(R, K) weights of the groups in the objective."""
    rejection: Tensor
    """(R,) share of the fitting items that is rejected."""
    errors: Tensor
    """(R, K) errors of the fitting items, by group."""
    trace: dict[str, Tensor]
    """`alpha`, `mu`, `errors` (M, R, K) and `objective` (M, R) of every iteration or round."""

    def point(self, *, rate: float | None = None, cost: float | None = None) -> int:
        """Return the number of an operating point; the only one needs no name.

        Raises:
            ValueError: if there is none like this, naming those there are.
        """
        if rate is None and cost is None and len(self.rates) == 1:
            return 0
        wanted, kind = (self.rates, "rate") if cost is None else (self.costs, "cost")
        value = rate if cost is None else cost
        for number, fitted in enumerate(wanted):
            if fitted is not None and value is not None and abs(fitted - value) < 1e-9:
                return number
        known = [f"rate {rate:g}" for rate in self.rates if rate is not None]
        known += [f"cost {cost:g}" for cost in self.costs if cost is not None]
        asked = "say which operating point" if value is None else f"{kind} {value:g}"
        what = "" if value is None else " is not among the fitted ones"
        raise ValueError(f"{asked}{what}: {', '.join(known)}")

    def predict(
        self, posteriors: Any, *, rate: float | None = None, cost: float | None = None
    ) -> Decisions:
        """Classify items or abstain.

        Args:
            posteriors: (N, C), under the label prior that the plug-in was fitted for.
            rate: the target rejection rate of the rule to apply.
            cost: or its cost.
        """
        number = self.point(rate=rate, cost=cost)
        scores, labels = self.judge(posteriors, [number])
        return Decisions(labels[0], scores[0] < self.thresholds[number], scores[0])

    def judge(self, posteriors: Any, points: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return scores and classes, both (R, N), of all or of some operating points."""
        rows = list(range(len(self.rates)) if points is None else points)
        return judge(reduce(posteriors, self.groups), self.alpha[rows], self.mu[rows])


class Reduced(NamedTuple):
    """Posteriors boiled down to what the rule can see of a group."""

    top: Tensor
    """(N, K) largest posterior among the classes of each group."""
    classes: Tensor
    """(N, K) whose it is."""
    mass: Tensor
    """(N, K) posterior of each group."""

    def rows(self, rows: Tensor) -> "Reduced":
        """Return some of the items."""
        return Reduced(self.top[rows], self.classes[rows], self.mass[rows])


def reduce(posteriors: Any, groups: Groups) -> Reduced:
    """Boil posteriors, (N, C), down to groups.

    Raises:
        ValueError: if a row is not one of shares with sum 1, or a group has no class.
    """
    posteriors = doubles(posteriors)
    classes = len(groups.of_class)
    if posteriors.ndim != 2 or posteriors.shape[1] != classes:
        raise ValueError(f"posteriors of shape {tuple(posteriors.shape)} for {classes} classes")
    sums = posteriors.sum(1)
    bad = ~((sums - 1).abs() < 1e-3) | (posteriors < 0).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"posteriors of item {row} are not shares with sum 1 ({sums[row]:.4g})")
    of_class = torch.tensor(groups.of_class)
    parts = []
    for group in range(len(groups.names)):
        members = (of_class == group).nonzero()[:, 0]
        if not len(members):
            raise ValueError(f"group {groups.names[group]} has no class")
        own = posteriors[:, members]
        top, place = own.max(1)
        parts.append((top, members[place], own.sum(1)))
    return Reduced(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))


def judge(items: Reduced, alpha: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and classes, (R, N), for alpha and mu (R, K)."""
    inverse = 1 / alpha
    best = inverse[:, :1] * items.top[:, 0]
    classes = items.classes[:, 0].expand_as(best)
    for group in range(1, alpha.shape[1]):  # (R, N, K) at once would not fit for many groups
        other = inverse[:, group : group + 1] * items.top[:, group]
        better = other > best
        best = torch.where(better, other, best)
        classes = torch.where(better, items.classes[:, group], classes)
    return best - (inverse - mu) @ items.mass.T, classes


def doubles(values: Any) -> Tensor:
    """Return numbers, arrays or tensors as float64."""
    return torch.as_tensor(values, dtype=torch.float64)
