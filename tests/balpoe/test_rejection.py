import importlib.util
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.balpoe import curves
from moectl.balpoe.groups import Groups
from moectl.balpoe.longtail import class_sizes
from moectl.balpoe.rejection import Method, exponentiated_step, fit_plugin
from moectl.balpoe.rule import judge, reduce
from moectl.common.scores import prior_weights

_SPEC = importlib.util.spec_from_file_location("slow", Path(__file__).with_name("slow_plugin.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
slow: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(slow)

DOUBLE = torch.float64
RATES = [step / 10 for step in range(9)]


class Population(NamedTuple):
    posteriors: Tensor
    labels: Tensor
    val: Tensor
    groups: list[int]
    prior: Tensor

    def area(self, scores: Tensor, classes: Tensor, thresholds: Tensor) -> tuple[float, float]:
        """Balanced and worst-group normalised areas on what was not fitted."""
        labels = self.labels[~self.val]
        found = curves.curve(
            scores < thresholds[:, None],
            classes != labels,
            torch.tensor(self.groups)[labels],
            prior_weights(labels, self.prior),
            2,
        )
        rates = torch.tensor(RATES, dtype=DOUBLE)
        errors = (found.balanced_error, found.worst_error)
        balanced, worst = (curves.area(rates, error).normalised for error in errors)
        return balanced, worst

    def fitted(self, **method: Any) -> tuple[float, float]:
        labels = self.labels[self.val]
        plugin = fit_plugin(
            self.posteriors[self.val],
            labels,
            self.groups,
            rates=RATES,
            weights=prior_weights(labels, self.prior),
            method=Method(**method),
        )
        scores, classes = plugin.judge(self.posteriors[~self.val])
        return self.area(scores, classes, plugin.thresholds)


def simulate(tail_noise: float = 0.0) -> Population:
    """100 Gaussian classes with long-tailed priors; posteriors exact, but for noisy tail means."""
    draws = np.random.default_rng(0)
    counts = np.array(class_sizes(500, 100, 0.01, "exp"))
    means = draws.normal(0, 1, (100, 20)) * 0.62
    labels = np.arange(10_000) % 100
    features = means[labels] + draws.normal(0, 1, (10_000, 20))
    shifts = np.random.default_rng(1).normal(0, 1, (100, 20)) * (counts <= 20)[:, None]
    means = means + tail_noise * shifts
    logits = features @ means.T - (means**2).sum(1) / 2 + np.log(counts)
    posteriors = torch.softmax(torch.from_numpy(logits), 1)
    val = torch.from_numpy((np.arange(10_000) // 100) % 5 == 0)
    prior = torch.from_numpy(counts / counts.sum())
    groups = (counts <= 20).astype(int).tolist()
    return Population(posteriors, torch.from_numpy(labels), val, groups, prior)


@pytest.fixture(scope="module")
def population() -> Population:
    return simulate()


@pytest.fixture(scope="module")
def noisy() -> Population:
    return simulate(tail_noise=0.62)


@pytest.fixture(scope="module")
def chow(population: Population) -> tuple[float, float]:
    top, classes = population.posteriors.max(1)
    rates = torch.tensor(RATES, dtype=DOUBLE)
    val, held = (top[part].expand(9, -1) for part in (population.val, ~population.val))
    weights = prior_weights(population.labels[population.val], population.prior)
    thresholds = curves.threshold_at(val, rates, weights)
    return population.area(held, classes[~population.val].expand(9, -1), thresholds)


def test_simulation_known_areas(population: Population, chow: tuple[float, float]) -> None:
    assert chow == pytest.approx((0.442, 0.664), abs=0.01)
    assert population.fitted() == pytest.approx((0.264, 0.299), abs=0.01)
    tail_less_head = population.fitted(multipliers="grid", lambdas=(1, 6, 11), iterations=10)
    assert tail_less_head == pytest.approx((0.264, 0.298), abs=0.01)
    without = population.fitted(multipliers="grid", lambdas=(0,), iterations=10)
    assert without == pytest.approx((0.312, 0.357), abs=0.01)


def test_the_other_sign_of_the_multiplier_is_worse(population: Population) -> None:
    wrong = population.fitted(multipliers="grid", lambdas=(-1, -6, -11), iterations=10)
    assert wrong[0] > 0.33
    assert population.fitted(multipliers="grid")[0] < 0.27  # both signs offered


def test_worst_group_objective_lowers_the_worst_error_of_a_badly_known_tail(
    noisy: Population,
) -> None:
    balanced = noisy.fitted()
    for keep in ("last", "best"):
        worst = noisy.fitted(objective="worst", keep=keep)
        assert worst[1] < balanced[1] - 0.03
        assert worst[0] > balanced[0]


@pytest.mark.parametrize(("seed", "rate"), [*itertools.product(range(4), (0.0, 0.25, 0.5))])
def test_equal_to_plain_loops(seed: int, rate: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (60,), generator=draws)
    logits = torch.randn(60, 6, generator=draws, dtype=DOUBLE)
    logits[torch.arange(60), labels] += 1
    posteriors, weights = logits.softmax(1), torch.rand(60, generator=draws, dtype=DOUBLE)
    groups = [0, 1, 0, 1, 1, 2] if seed % 2 else [0, 1, 0, 1, 1, 0]
    plugin = fit_plugin(posteriors, labels, groups, rates=[rate], weights=weights)
    alpha, mu, threshold, error = slow.fit(
        posteriors.tolist(), labels.tolist(), weights.tolist(), groups, rate
    )
    assert float(plugin.errors.mean()) == pytest.approx(error, abs=1e-12)
    assert plugin.alpha[0].tolist() == pytest.approx(alpha)
    assert plugin.mu[0].tolist() == pytest.approx(mu)
    assert float(plugin.thresholds) == pytest.approx(threshold)


class Atoms(NamedTuple):
    """A population of 12 kinds of items, written as 48 weighted items with every label."""

    posteriors: Tensor
    masses: Tensor

    def items(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self.masses[:, None] * self.posteriors).flatten()
        return self.posteriors.repeat_interleave(4, 0), torch.arange(4).repeat(12), weights

    def risk(self, labels: Tensor, rejected: Tensor, cost: float) -> float:
        accepted = self.masses * ~rejected
        risk = cost * float(self.masses[rejected].sum())
        for members in ([0, 1], [2, 3]):
            joint = accepted[:, None] * self.posteriors
            share = float(joint[:, members].sum())
            right = sum(float(joint[labels == y, y].sum()) for y in members)
            risk += 0.5 * (1 - right / share if share > 0 else 1.0)
        return risk

    def best(self, cost: float) -> float:
        """Lowest risk over all 4096 rejectors, each with its best classifier."""
        rejectors = torch.tensor(list(itertools.product([False, True], repeat=12)))
        accepted = self.masses * ~rejectors  # (4096, 12)
        head, tail = self.posteriors[:, :2], self.posteriors[:, 2:]
        shares = torch.stack([accepted @ head.sum(1), accepted @ tail.sum(1)], 1)
        tops = torch.stack([head.amax(1), tail.amax(1)], 1)  # (12, 2)
        # Each accepted item is worth its largest p / share, whichever group that is in.
        worth = (tops / shares.clamp_min(1e-30)[:, None]).amax(2)  # (4096, 12)
        error = 1 - 0.5 * (accepted * worth).sum(1)
        risks = error + cost * (self.masses * rejectors).sum(1)
        return float(risks[(shares > 1e-12).all(1)].min())


def atoms(seed: int) -> Atoms:
    draws = np.random.default_rng(seed)
    posteriors = draws.dirichlet([2, 1.5, 0.4, 0.3], 12)
    return Atoms(torch.from_numpy(posteriors), torch.from_numpy(draws.dirichlet([3.0] * 12)))


def test_brute_force_populations() -> None:
    """Close to the best of all rejectors, and never behind Chow's rule at its best threshold."""
    cost, excess, behind = 0.15, [], []
    for seed in range(30):
        population = atoms(seed)
        posteriors, labels, weights = population.items()
        plugin = fit_plugin(
            posteriors,
            labels,
            [0, 0, 1, 1],
            costs=[cost],
            weights=weights,
            method=Method(iterations=60),
        )
        found = plugin.predict(population.posteriors)
        risk = population.risk(found.labels, found.rejected, cost)
        own = float((plugin.beta * plugin.errors).sum() + cost * plugin.rejection)
        assert risk == pytest.approx(own, abs=1e-9)  # the fit knows its own risk
        top, classes = population.posteriors.max(1)
        chow = min(population.risk(classes, top < limit, cost) for limit in [0.0, *top.tolist()])
        best = population.best(cost)
        assert best <= risk + 1e-9
        excess.append(risk - best)
        behind.append(risk - chow)
    assert np.mean(excess[:15]) < 0.025
    assert max(excess[:15]) < 0.08
    assert max(behind) <= 1e-9
    assert np.mean([gap - lag for gap, lag in zip(excess, behind, strict=True)]) > 0.1


def test_the_iteration_ends_where_shares_and_multipliers_reproduce_themselves(
    population: Population,
) -> None:
    labels, groups = population.labels[population.val], Groups(("0", "1"), (*population.groups,))
    weights = prior_weights(labels, population.prior)
    posteriors = population.posteriors[population.val]
    method = Method(iterations=100)
    plugin = fit_plugin(
        posteriors, labels, groups, rates=[0.2, 0.5], weights=weights, method=method
    )
    alpha, mu = plugin.trace["alpha"][-1], plugin.trace["mu"][-1]
    scores, classes = judge(reduce(posteriors, groups), alpha, mu)
    rates = torch.tensor([0.2, 0.5], dtype=DOUBLE)
    rejected = scores < curves.threshold_at(scores, rates, weights)[:, None]
    group = torch.tensor(population.groups)[labels]
    seen = curves.curve(rejected, classes != labels, group, weights, 2)
    mass = torch.bincount(group, weights) / weights.sum()
    torch.testing.assert_close(alpha, 2 * seen.group_coverage * mass, rtol=0.02, atol=0)
    torch.testing.assert_close(mu, seen.group_errors / alpha, rtol=0.05, atol=0)


def draw(items: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (items,), generator=draws)
    logits = torch.randn(items, 6, generator=draws, dtype=DOUBLE)
    logits[torch.arange(items), labels] += 1.5
    return logits.softmax(1), labels


GROUPS = [0, 0, 0, 1, 1, 1]


def test_one_group_is_chows_rule() -> None:
    posteriors, labels = draw()
    plugin = fit_plugin(posteriors, labels, [0] * 6, rates=[0.3], costs=[0.4])
    top, classes = posteriors.max(1)
    by_rate = plugin.predict(posteriors, rate=0.3)
    assert torch.equal(by_rate.labels, classes)
    assert by_rate.rejected.sum() == 90
    assert top[by_rate.rejected].max() < top[~by_rate.rejected].min()
    by_cost = plugin.predict(posteriors, cost=0.4)
    kept = ~by_cost.rejected
    error = float((classes != labels)[kept].double().mean())
    # With a single group the bar is 1 - (error + cost * coverage) on the posterior.
    bar = 1 - (error + 0.4 * float(kept.double().mean()))
    assert float((kept != (top >= bar)).double().mean()) < 0.02


def test_the_rejected_share_is_the_target_within_one_item() -> None:
    posteriors, labels = draw()
    weights = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    plugin = fit_plugin(posteriors, labels, GROUPS, rates=RATES, weights=weights)
    largest = float(weights.max() / weights.sum())
    for rate, rejection in zip(RATES, plugin.rejection.tolist(), strict=True):
        assert rate - largest < rejection <= rate + 1e-9


def test_an_item_twice_is_an_item_of_twice_the_weight() -> None:
    posteriors, labels = draw(120)
    weights = torch.ones(120, dtype=DOUBLE)
    weights[::3] = 2
    rows = torch.arange(120).repeat_interleave(weights.long())
    options = {"rates": [0.0, 0.4], "costs": [0.3]}
    once = fit_plugin(posteriors, labels, GROUPS, weights=weights, **options)
    twice = fit_plugin(posteriors[rows], labels[rows], GROUPS, **options)
    for name in ("alpha", "mu", "thresholds", "errors", "rejection"):
        torch.testing.assert_close(getattr(once, name), getattr(twice, name))


def test_operating_points_do_not_touch_each_other() -> None:
    posteriors, labels = draw()
    both = fit_plugin(posteriors, labels, GROUPS, rates=[0.2, 0.6], costs=[0.1])
    alone = fit_plugin(posteriors, labels, GROUPS, rates=[0.6])
    torch.testing.assert_close(both.alpha[1], alone.alpha[0])
    torch.testing.assert_close(both.thresholds[1], alone.thresholds[0])
    assert both.rates == (0.2, 0.6, None)
    assert both.costs == (None, None, 0.1)
    assert float(both.thresholds[2]) == -0.1


def test_group_weights_move_errors_between_groups() -> None:
    posteriors, labels = draw()
    first, second = (
        fit_plugin(posteriors, labels, GROUPS, rates=[0.3], method=Method(objective=weights))
        for weights in ((9.0, 1.0), (1.0, 9.0))
    )
    assert first.beta.tolist() == [[0.9, 0.1]]
    assert first.errors[0, 0] < second.errors[0, 0]
    assert first.errors[0, 1] > second.errors[0, 1]


def test_a_grid_point_with_a_cost_obeys_the_first_groups_condition() -> None:
    posteriors, labels = draw()
    method = Method(multipliers="grid", lambdas=(0.0, 0.5), iterations=10)
    plugin = fit_plugin(posteriors, labels, GROUPS, costs=[0.2], method=method)
    offset = float(plugin.mu[0, 1] - plugin.mu[0, 0])
    assert min(abs(offset), abs(offset - 0.5)) < 1e-12
    risk = float(plugin.errors.mean() + 0.2 * plugin.rejection)
    fixed = fit_plugin(posteriors, labels, GROUPS, costs=[0.2])
    assert risk == pytest.approx(float(fixed.errors.mean() + 0.2 * fixed.rejection), abs=0.03)


def test_exponentiated_step() -> None:
    beta = torch.tensor([0.5, 0.5], dtype=DOUBLE)
    errors = torch.tensor([0.2, 0.6], dtype=DOUBLE)
    after = exponentiated_step(beta, errors, 1.0)
    assert after.tolist() == pytest.approx([0.40131234, 0.59868766], abs=1e-8)
    for _ in range(25):
        beta = exponentiated_step(beta, errors, 1.0)
    assert float(beta[1]) == pytest.approx(0.99995460, abs=1e-8)


def test_worst_group_rounds_and_seeds_act() -> None:
    posteriors, labels = draw()
    method = Method(objective="worst", rounds=4)
    plugin = fit_plugin(posteriors, labels, GROUPS, rates=[0.2, 0.5], method=method)
    assert plugin.trace["objective"].shape == (4, 2)
    again = fit_plugin(posteriors, labels, GROUPS, rates=[0.2, 0.5], method=method)
    assert torch.equal(plugin.mu, again.mu)
    other = Method(objective="worst", rounds=4, seed=1)
    changed = fit_plugin(posteriors, labels, GROUPS, rates=[0.2, 0.5], method=other)
    assert not torch.equal(plugin.mu, changed.mu)
    still = Method(objective="worst", rounds=4, step_size=1e-9)
    even = fit_plugin(posteriors, labels, GROUPS, rates=[0.2, 0.5], method=still)
    torch.testing.assert_close(even.beta, torch.full((2, 2), 0.5, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rates": []}, "needs a rejection rate or a cost"),
        ({"rates": [1.0]}, r"rejection rate 1 is not in \[0, 1\)"),
        ({"rates": [], "costs": [1.5]}, r"cost 1.5 is not in \[0, 1\]"),
        ({"labels": torch.full((300,), 6)}, r"label 6 of item 0 is not in 0..5"),
        ({"labels": torch.zeros(7)}, r"labels of shape \(7,\) for 300 items"),
        ({"labels": torch.zeros(300)}, "group 1 has no item to fit on"),
        ({"weights": torch.full((300,), -1.0)}, "weights must be 300 numbers"),
        ({"groups": [0, 0, 0, 2, 2, 2]}, "group 1 has no class"),
        ({"method": Method(objective=(1.0, 0.0))}, "must be 2 positive numbers"),
        ({"method": Method(objective=(1.0,))}, "must be 2 positive numbers"),
        (
            {"groups": range(6), "method": Method(multipliers="grid")},
            "a grid over 6 groups has 16807 points",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    posteriors, labels = draw()
    given = {"labels": labels, "groups": GROUPS, "rates": [0.2], **change}
    with pytest.raises(ValueError, match=words):
        fit_plugin(posteriors, given.pop("labels"), given.pop("groups"), **given)


def test_a_group_that_is_rejected_as_a_whole_is_an_error() -> None:
    """Two items, one for each group, either of which fits into the share that must go."""
    posteriors = [[0.95, 0.05], [0.9, 0.1]]
    with pytest.raises(ValueError, match=r"group . has no accepted item at rejection rate 0.95"):
        fit_plugin(posteriors, [0, 1], [0, 1], rates=[0.95], weights=[0.89, 0.11])


def test_halves_without_a_group_are_an_error() -> None:
    posteriors, labels = draw(40)
    labels[:] = torch.arange(40) % 3
    labels[0] = 3  # the only item of its group
    with pytest.raises(ValueError, match="group 1 has no item in one half"):
        fit_plugin(posteriors, labels, GROUPS, rates=[0.1], method=Method(objective="worst"))


def test_classes_with_one_item_each_can_be_halved() -> None:
    posteriors, _ = draw(6)
    method = Method(objective="worst", rounds=2)
    plugin = fit_plugin(posteriors, torch.arange(6), GROUPS, rates=[0.0], method=method)
    assert plugin.errors.shape == (1, 2)
