"""How often classifiers that may reject are wrong on what they accept, by how much they reject.

Letters: N items, R operating points (rejection rates), K groups of classes, D resamples. An item
of weight 2 counts like the same item twice; only the ratios of weights matter. Tensors live on the
CPU; results are float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

_TOLERANCE = 1e-9  # 0.1 + 0.1 + 0.1 must fit into 0.3
_CHUNK = 50  # resamples at a time: bounds the memory and stays in the cache


def reject_lowest(scores: Tensor, rates: Tensor, weights: Tensor) -> Tensor:
    """Reject the least certain items of each row, as many as fit into a share of the weight.

    The rejected weight lies within one item's weight below the rate. Of equal scores the first
    items go first; rate 0 rejects nobody. The result is bool, (R, N).

    Args:
        scores: (R, N), higher is more certain; a row per point, as the rule differs between points.
        rates: (R,) float64, from 0 to 1.
        weights: (N,), not negative.

    Raises:
        ValueError: if shapes do not fit, a rate or score is no number, or no item has weight.
    """
    scores, rates, weights = _checked(scores, rates, weights)
    order = scores.argsort(stable=True)
    rejected = _fits(weights[order], rates)
    return torch.zeros_like(rejected).scatter_(1, order, rejected)


def threshold_at(scores: Tensor, rates: Tensor, weights: Tensor) -> Tensor:
    """Score of the first item that `reject_lowest` keeps; what lies below it is to be rejected.

    Takes what `reject_lowest` takes. Equal scores share their fate, so copies of an item count like
    its weight. The result, (R,), is -inf for rate 0 and inf if everything would be rejected.
    """
    scores, rates, weights = _checked(scores, rates, weights)
    ascending, order = scores.sort(dim=1, stable=True)
    first_kept = _fits(weights[order], rates).sum(1, keepdim=True)
    threshold = pad(ascending, (0, 1), value=math.inf).gather(1, first_kept)[:, 0]
    return threshold.masked_fill(rates == 0, -math.inf)


@dataclass(frozen=True)
class Curve:
    """Errors on the accepted items at R operating points, float64."""

    rejection: Tensor
    """(R,) share of the weight."""
    standard_error: Tensor
    """(R,) P(wrong | accepted); nan where nothing is accepted."""
    group_errors: Tensor
    """(R, K) P(wrong | accepted, group); nan where nothing of the group is accepted."""
    group_coverage: Tensor
    """(R, K) P(accepted | group)."""
    balanced_error: Tensor
    """(R,) mean of the groups' errors; a group of which nothing is accepted counts as error 1."""
    worst_error: Tensor
    """(R,) largest of the groups' errors; same convention."""

    def gap(self) -> Tensor:
        """Last group's error less the first's, (R,): tail minus head; nan where either is."""
        return self.group_errors[:, -1] - self.group_errors[:, 0]


def curve(rejected: Tensor, wrong: Tensor, group: Tensor, weights: Tensor, groups: int) -> Curve:
    """Measure the errors of rejectors and classifiers on weighted items.

    Args:
        rejected: (R, N) bool.
        wrong: (R, N) bool, whether each point's classifier misses the label.
        group: (N,) int64, group of each item's label.
        weights: (N,), not negative.
        groups: K.

    Raises:
        ValueError: if shapes do not fit or a group has no item with weight.

    Source: Narasimhan et al. 2024.
    """
    if rejected.dtype != torch.bool or wrong.dtype != torch.bool or rejected.shape != wrong.shape:
        raise ValueError("rejected and wrong must be bool and of one shape, (R, N)")
    weights = _shares(weights, rejected.shape[-1])
    members = _members(group, len(weights), groups)
    mass = weights @ members
    if not (mass > 0).all():
        raise ValueError(f"every group needs an item with weight, the groups weigh {mass.tolist()}")
    accepted = weights * ~rejected  # (R, N)
    accepted_mass, wrong_mass = accepted @ members, (accepted * wrong) @ members  # (R, K)
    errors = wrong_mass / accepted_mass
    balanced, worst = _summary(errors).unbind(-1)
    return Curve(
        rejection=rejected.double() @ weights,
        standard_error=wrong_mass.sum(1) / accepted_mass.sum(1),
        group_errors=errors,
        group_coverage=accepted_mass / mass,
        balanced_error=balanced,
        worst_error=worst,
    )


@dataclass(frozen=True)
class Area:
    """Area under errors over rejection rates; `normalised` is `raw` per `span`: the mean error."""

    normalised: float
    raw: float
    span: float


def area(rates: Tensor, errors: Tensor) -> Area:
    """Integrate errors over rates by trapezoids.

    A single point has its error as normalised area. A nan among the errors makes the areas nan.

    Args:
        rates: (R,) in any order.
        errors: (R,).

    Raises:
        ValueError: if there is no point, a rate is nan, or shapes differ.
    """
    if rates.dim() != 1 or not len(rates) or errors.shape != rates.shape or rates.isnan().any():
        raise ValueError("an area needs as many errors as rates, at least one, and no rate nan")
    span = float(rates.double().max() - rates.double().min())
    normalised = float(_mean_over(rates, errors))
    return Area(normalised=normalised, raw=normalised * span, span=span)


def class_bootstrap(labels: Tensor, draws: int, seed: int) -> Tensor:
    """Resample every class of labels to its own size.

    Args:
        labels: (N,) class indices.
        draws: D.
        seed: of all draws.

    Returns:
        (D, N) int16, how often each resample holds each item.

    Raises:
        ValueError: if there is no item or no draw.

    Source: Efron 1979.
    """
    if labels.dim() != 1 or not len(labels) or draws < 1:
        raise ValueError(f"a bootstrap needs labels, (N,), and draws, not {draws}")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(draws, len(labels), dtype=torch.int16)
    for label in sorted(set(labels.tolist())):
        items = (labels == label).nonzero()[:, 0]
        picks = torch.randint(len(items), (draws, len(items)), generator=generator)
        once = torch.ones(picks.shape, dtype=torch.int16)
        counts[:, items] = torch.zeros_like(once).scatter_add_(1, picks, once)
    return counts


def bootstrap_areas(  # noqa: PLR0913 - what a curve is made of, and the resamples
    scores: Tensor,
    wrong: Tensor,
    group: Tensor,
    weights: Tensor,
    rates: Tensor,
    groups: int,
    counts: Tensor,
) -> Tensor:
    """Normalised areas of the balanced and the worst-group curve of every resample, (D, 2).

    Equals the `area` over `rates` of the `curve` of what `reject_lowest` rejects when the weights
    are multiplied by the counts, (D, N), of a resample; the other arguments are as there. So it
    raises ValueError, too, if a resample leaves a group without weight.
    """
    scores, rates, weights = _checked(scores, rates, weights)
    members = _members(group, len(weights), groups)
    if wrong.dtype != torch.bool or wrong.shape != scores.shape:
        raise ValueError("wrong must be bool and of the shape of the scores, (R, N)")
    if counts.dim() != 2 or counts.shape[1] != len(weights):
        raise ValueError(f"counts must be (draws, N), not {tuple(counts.shape)}")
    chunks = torch.split(counts, _CHUNK)
    if not all(((chunk * weights) @ members > 0).all() for chunk in chunks):
        raise ValueError("every group needs an item with weight in every resample")
    points = []
    for order, misses, rate in zip(scores.argsort(stable=True), wrong, rates, strict=True):
        columns = torch.cat([members, members * misses[:, None]], dim=1)[order]  # (N, 2K)
        drawn = (chunk.index_select(1, order) * weights[order] for chunk in chunks)
        sums = torch.cat([_accepted(chunk, rate) @ columns for chunk in drawn])  # (D, 2K)
        points.append(_summary(sums[:, groups:] / sums[:, :groups]))
    return _mean_over(rates, torch.stack(points, dim=-1))


def interval(samples: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Central range that holds a share `level` of the samples, (D,), by percentiles."""
    if samples.dim() != 1 or not len(samples) or not 0 < level < 1:
        raise ValueError(f"an interval needs samples, (D,), and a level in (0, 1), not {level}")
    samples = samples.double()
    return float(samples.quantile((1 - level) / 2)), float(samples.quantile((1 + level) / 2))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of trials and half its 95 % confidence interval by Student's t, None for one trial."""
    from scipy.stats import t  # type: ignore[import-untyped]

    if not len(values):
        raise ValueError("a mean needs at least one value")
    trials = torch.tensor(values, dtype=torch.float64)
    if len(trials) == 1:
        return float(trials), None
    standard_error = float(trials.std()) / math.sqrt(len(trials))
    return float(trials.mean()), float(t.ppf(0.975, len(trials) - 1)) * standard_error


def _checked(scores: Tensor, rates: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if scores.dim() != 2 or not len(scores) or scores.isnan().any():
        raise ValueError("scores must be numbers, (R, N), with at least one row")
    if rates.shape != scores.shape[:1] or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"{len(scores)} rows need a rate from 0 to 1 each, not {rates.tolist()}")
    return scores.double(), rates.double(), _shares(weights, scores.shape[1])


def _shares(weights: Tensor, items: int) -> Tensor:
    weights = weights.double()
    if weights.shape != (items,) or not 0 < weights.sum() < math.inf or weights.min() < 0:
        raise ValueError("weights must be one number per item, not negative, with a positive sum")
    return weights / weights.sum()


def _members(group: Tensor, items: int, groups: int) -> Tensor:
    """Mark the group of each item, (N, K)."""
    if group.shape != (items,) or group.min() < 0 or group.max() >= groups:
        raise ValueError(f"group must be one number per item, from 0 to {groups - 1}")
    return one_hot(group.long(), groups).double()


def _fits(ordered: Tensor, rates: Tensor) -> Tensor:
    """Which of the ordered weights, (..., N) with sum 1, fit into the rate, (...)."""
    # Below 0 at rate 0, so that items without weight are not rejected either.
    limits = torch.where(rates > 0, rates + _TOLERANCE, -1.0)
    return ordered.cumsum(-1) <= limits[..., None]


def _accepted(ordered: Tensor, rate: Tensor) -> Tensor:
    """Scale ordered weights, (D, N), to sum 1 and set those of rejected items to zero."""
    ordered = ordered / ordered.sum(1, keepdim=True)
    return ordered.masked_fill(_fits(ordered, rate), 0)


def _summary(errors: Tensor) -> Tensor:
    """Mean and largest of group errors, (..., K) -> (..., 2), where nan counts as error 1."""
    errors = errors.nan_to_num(1.0)
    return torch.stack([errors.mean(-1), errors.amax(-1)], dim=-1)


def _mean_over(rates: Tensor, errors: Tensor) -> Tensor:
    """Trapezoidal mean of errors, (..., R), over rates; the plain mean if all rates are equal."""
    order = rates.argsort(stable=True)
    rates, errors = rates.double()[order], errors.double()[..., order]
    span = rates[-1] - rates[0]
    return torch.trapezoid(errors, rates) / span if span > 0 else errors.mean(-1)
