import math
from dataclasses import astuple, fields

import pytest
import torch
from sklearn.metrics import accuracy_score, auc
from torch import tensor

from moectl.balpoe.curves import (
    area,
    bootstrap_areas,
    class_bootstrap,
    curve,
    interval,
    mean_interval,
    reject_lowest,
    threshold_at,
)
from moectl.common.scores import prior_weights

RATES = torch.arange(9, dtype=torch.float64) / 10


def random_case(items=400, classes=4, ties=False):
    """Scores of nine rules, what they miss, labels, groups of labels (0 0 1 1) and weights."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(len(RATES), items, generator=generator, dtype=torch.float64)
    if ties:
        scores = (scores * 20).floor() / 20
    wrong = torch.rand(scores.shape, generator=generator) > scores
    labels = torch.arange(items) % classes
    weights = torch.rand(items, generator=generator, dtype=torch.float64)
    return scores, wrong, labels, (labels >= classes // 2).long(), weights


def slow_reject(scores, rate, weights):
    """One row, in plain Python."""
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    total, rejected = 0.0, [False] * len(scores)
    for index in order:
        total += weights[index] / sum(weights)
        rejected[index] = rate > 0 and total <= rate + 1e-9
    return rejected


def slow_errors(rejected, wrong, group, weights, groups):
    """Errors on accepted items of all items and of each group, of one row, in plain Python."""

    def error(chosen):
        mass = sum(weights[index] for index in chosen)
        misses = sum(weights[index] for index in chosen if wrong[index])
        return misses / mass if mass else math.nan

    accepted = [index for index in range(len(wrong)) if not rejected[index]]
    parts = [[index for index in accepted if group[index] == k] for k in range(groups)]
    return error(accepted), [error(part) for part in parts]


def assert_same_curves(first, second):
    for field in fields(first):
        torch.testing.assert_close(
            getattr(first, field.name), getattr(second, field.name), equal_nan=True, msg=field.name
        )


@pytest.mark.parametrize("ties", [False, True])
def test_rejection_agrees_with_a_slow_reference(ties):
    scores, _, _, _, weights = random_case(items=150, ties=ties)
    expected = [
        slow_reject(row.tolist(), rate, weights.tolist())
        for row, rate in zip(scores, RATES.tolist(), strict=True)
    ]
    assert reject_lowest(scores, RATES, weights).tolist() == expected


def test_rejected_weight_is_within_one_item_of_the_rate():
    scores, _, _, _, weights = random_case()
    realised = (reject_lowest(scores, RATES, weights) * weights).sum(1) / weights.sum()
    short = RATES - realised
    assert (short >= -1e-8).all()
    assert (short < weights.max() / weights.sum()).all()


def test_equal_weights_meet_rates_exactly():
    scores = torch.arange(10.0).expand(len(RATES), -1)
    assert reject_lowest(scores, RATES, torch.ones(10)).sum(1).tolist() == list(range(9))


def test_of_equal_scores_the_first_items_are_rejected():
    rejected = reject_lowest(tensor([[1, 0, 0, 0]]), tensor([0.5]), torch.ones(4))
    assert rejected.tolist() == [[False, True, True, False]]


def test_each_row_follows_its_own_scores():
    rejected = reject_lowest(tensor([[0, 1], [1, 0]]), tensor([0.5, 0.5]), torch.ones(2))
    assert rejected.tolist() == [[True, False], [False, True]]


def test_rate_zero_rejects_nobody_not_even_items_without_weight():
    scores, rates, weights = torch.zeros(1, 3), tensor([0.0]), tensor([0.0, 1e-12, 1.0])
    assert not reject_lowest(scores, rates, weights).any()
    assert threshold_at(scores, rates, weights).tolist() == [-math.inf]


def test_rate_one_rejects_everything():
    scores, _, _, _, weights = random_case()
    ones = torch.ones_like(RATES)
    assert reject_lowest(scores, ones, weights).all()
    assert (threshold_at(scores, ones, weights) == math.inf).all()


def test_threshold_is_the_lowest_score_kept():
    scores, _, _, _, weights = random_case()
    rejected = reject_lowest(scores, RATES, weights)
    lowest = scores.masked_fill(rejected, math.inf).amin(1)
    thresholds = threshold_at(scores, RATES, weights)
    assert torch.equal(thresholds[1:], lowest[1:])
    assert torch.equal(scores < thresholds[:, None], rejected)


def test_threshold_keeps_ties_together():
    scores, rates = tensor([[1.0, 1.0, 1.0, 2.0]]), tensor([0.5])
    assert reject_lowest(scores, rates, torch.ones(4)).sum() == 2
    assert threshold_at(scores, rates, torch.ones(4)).tolist() == [1.0]


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_items_change_nothing_behind_a_threshold(copies):
    scores, wrong, _, group, weights = random_case()

    def measure(repeats, weights):
        rows = scores.repeat(1, repeats)
        rejected = rows < threshold_at(rows, RATES, weights)[:, None]
        return curve(rejected, wrong.repeat(1, repeats), group.repeat(repeats), weights, 2)

    once = measure(1, weights)
    assert 0.75 < once.rejection[-1] <= 0.8
    assert_same_curves(measure(copies, weights.repeat(copies)), once)


def test_scaling_the_weights_changes_nothing():
    scores, wrong, labels, group, weights = random_case()
    scaled, counts = 1024 * weights, class_bootstrap(labels, 3, seed=0)
    rejected = reject_lowest(scores, RATES, weights)
    assert torch.equal(reject_lowest(scores, RATES, scaled), rejected)
    assert torch.equal(threshold_at(scores, RATES, scaled), threshold_at(scores, RATES, weights))
    once = curve(rejected, wrong, group, weights, 2)
    assert_same_curves(curve(rejected, wrong, group, scaled, 2), once)
    first, second = (
        bootstrap_areas(scores, wrong, group, w, RATES, 2, counts) for w in (weights, scaled)
    )
    assert torch.equal(first, second)


def test_known_answers_of_six_items_under_a_long_tailed_prior():
    labels = tensor([0, 1, 2, 3, 2, 0])
    group = tensor([0, 0, 1, 1])[labels]
    wrong = (tensor([0, 2, 2, 3, 2, 0]) != labels)[None]
    rejected = tensor([[1, 1, 0, 0, 1, 0]]).bool()
    weights = prior_weights(labels, tensor([60, 30, 7, 3]) / 100)
    torch.testing.assert_close(
        weights, tensor([1.8, 1.8, 0.21, 0.18, 0.21, 1.8], dtype=torch.float64), rtol=1e-6, atol=0
    )
    result = curve(rejected, wrong, group, weights, 2)
    mass = tensor([0.9, 0.1])  # of the groups
    assert (result.group_coverage[0] * mass).tolist() == pytest.approx([0.3, 0.065], abs=1e-7)
    assert result.group_errors.tolist() == [[0, 0]]
    assert result.rejection.item() == pytest.approx(0.635, abs=1e-7)
    assert curve(rejected, wrong, group, torch.ones(6), 2).rejection.item() == pytest.approx(0.5)
    nobody = curve(torch.zeros_like(rejected), wrong, group, weights, 2)
    assert nobody.group_errors[0].tolist() == pytest.approx([1 / 3, 0])
    assert nobody.standard_error.item() == pytest.approx(0.3, abs=1e-7)


def test_plain_selective_risk_known_answer():
    # The mean over all eight coverages of the error among the most confident items.
    confidence = tensor([0.9, 0.6, 0.4, 0.7, 0.8, 0.34, 0.9, 0.5])
    wrong = tensor([0, 1, 0, 0, 0, 1, 0, 1]).bool().expand(8, -1)
    rates = torch.arange(8, dtype=torch.float64) / 8
    rejected = reject_lowest(confidence.expand(8, -1), rates, torch.ones(8))
    result = curve(rejected, wrong, torch.zeros(8, dtype=torch.long), torch.ones(8), 1)
    assert result.standard_error.mean().item() == pytest.approx(0.1492560, abs=1e-7)
    assert torch.equal(result.balanced_error, result.standard_error)
    joint = result.standard_error * (1 - result.rejection)  # P(wrong, accepted)
    assert joint.mean().item() == pytest.approx(0.125)


def test_curve_agrees_with_a_slow_reference_and_scikit_learn():
    scores, wrong, _, group, weights = random_case()
    rejected = reject_lowest(scores, RATES, weights)
    result = curve(rejected, wrong, group, weights, 2)
    for row in range(len(RATES)):
        lists = [x.tolist() for x in (rejected[row], wrong[row], group, weights)]
        standard, errors = slow_errors(*lists, 2)
        assert result.standard_error[row].item() == pytest.approx(standard)
        assert result.group_errors[row].tolist() == pytest.approx(errors)
        assert result.balanced_error[row].item() == pytest.approx(sum(errors) / 2)
        assert result.worst_error[row].item() == pytest.approx(max(errors))
        assert result.gap()[row].item() == pytest.approx(errors[1] - errors[0])
        kept = ~rejected[row]
        right = torch.ones(int(kept.sum()))
        score = accuracy_score(right, ~wrong[row, kept], sample_weight=weights[kept])
        assert result.standard_error[row].item() == pytest.approx(1 - score)


def test_coverage_is_one_at_rate_zero_and_falls_with_it():
    scores, wrong, _, group, weights = random_case()
    scores = scores[:1].expand(len(RATES), -1)
    result = curve(reject_lowest(scores, RATES, weights), wrong, group, weights, 2)
    assert result.group_coverage[0].tolist() == pytest.approx([1, 1])
    assert result.rejection[0] == 0
    assert (result.group_coverage.diff(dim=0) < 0).all()
    share = (weights * group).sum() / weights.sum()
    covered = result.group_coverage @ torch.stack([1 - share, share])
    torch.testing.assert_close(covered, 1 - result.rejection)


def test_a_group_without_accepted_items_counts_as_error_one():
    rejected = tensor([[False, True], [True, True]])
    wrong = torch.zeros(2, 2, dtype=torch.bool)
    result = curve(rejected, wrong, tensor([0, 1]), torch.ones(2), 2)
    assert result.group_errors[0, 0] == 0
    assert result.group_errors.isnan().tolist() == [[False, True], [True, True]]
    assert result.gap().isnan().all()
    assert result.balanced_error.tolist() == [0.5, 1]
    assert result.worst_error.tolist() == [1, 1]
    assert result.standard_error[0] == 0
    assert result.standard_error[1].isnan()
    assert result.group_coverage.tolist() == [[1, 0], [0, 0]]


def test_area_known_answers():
    rates, errors = tensor([0, 0.25, 0.5, 0.75]), tensor([0.4, 0.3, 0.2, 0.1])
    assert astuple(area(rates, errors)) == pytest.approx((0.25, 0.1875, 0.75))
    shuffled = tensor([2, 0, 3, 1])
    assert area(rates[shuffled], errors[shuffled]) == area(rates, errors)
    assert area(rates, errors).raw == pytest.approx(auc(rates, errors))


def test_area_of_a_constant_is_the_constant():
    result = area(RATES, torch.full_like(RATES, 0.3))
    assert astuple(result) == pytest.approx((0.3, 0.3 * 0.8, 0.8))


def test_area_allows_equal_rates():
    result = area(tensor([0.5, 0.0, 0.5]), tensor([0.2, 0.4, 0.6]))
    assert astuple(result) == pytest.approx((0.3, 0.15, 0.5))


def test_area_of_a_single_point_is_its_error():
    assert astuple(area(tensor([0.3]), tensor([0.5]))) == (0.5, 0, 0)


def test_bootstrap_keeps_the_size_of_every_class():
    labels = tensor([2, 0, 2, 1, 0, 2, 2, 5])
    counts = class_bootstrap(labels, 200, seed=3)
    assert counts.shape == (200, 8)
    for label in labels.unique():
        assert (counts[:, labels == label].sum(1) == (labels == label).sum()).all()
    assert (counts[:, labels == 2].max(0).values > 1).all()  # with replacement


def test_bootstrap_draws_all_items_alike():
    labels = torch.arange(40) % 2
    counts = class_bootstrap(labels, 4000, seed=0).double()
    assert (counts.mean(0) - 1).abs().max() < 5 / math.sqrt(4000)
    assert counts.var(0).mean() == pytest.approx(1 - 1 / 20, rel=0.03)  # binomial


def test_bootstrap_is_a_function_of_its_seed():
    labels = torch.arange(40) % 3
    first = class_bootstrap(labels, 5, seed=1)
    torch.rand(3)
    assert torch.equal(class_bootstrap(labels, 5, seed=1), first)
    assert not torch.equal(class_bootstrap(labels, 5, seed=2), first)


@pytest.mark.parametrize("ties", [False, True])
def test_bootstrap_areas_agree_with_curves_of_every_resample(ties):
    scores, wrong, labels, group, weights = random_case(ties=ties)
    order = torch.randperm(len(RATES), generator=torch.Generator().manual_seed(0))
    rates = RATES[order] * 1.2  # up to 0.96, where groups run out of items
    counts = class_bootstrap(labels, 60, seed=0)  # more than are computed at a time
    fast = bootstrap_areas(scores, wrong, group, weights, rates, 2, counts)
    slow = []
    for count in counts:
        drawn = weights * count
        result = curve(reject_lowest(scores, rates, drawn), wrong, group, drawn, 2)
        errors = (result.balanced_error, result.worst_error)
        slow.append([area(rates, error).normalised for error in errors])
    torch.testing.assert_close(fast, tensor(slow, dtype=torch.float64), rtol=0, atol=1e-9)


def test_bootstrap_areas_agree_with_plain_python():
    scores, wrong, labels, _, weights = random_case(items=60)
    group = labels  # four groups
    counts = class_bootstrap(labels, 5, seed=4)
    fast = bootstrap_areas(scores, wrong, group, weights, RATES, 4, counts)
    for count, areas in zip(counts, fast, strict=True):
        drawn = (weights * count).tolist()
        balanced, worst = [], []
        for rate, row, missed in zip(RATES.tolist(), scores.tolist(), wrong.tolist(), strict=True):
            rejected = slow_reject(row, rate, drawn)
            _, errors = slow_errors(rejected, missed, group.tolist(), drawn, 4)
            errors = [1.0 if math.isnan(error) else error for error in errors]
            balanced.append(sum(errors) / 4)
            worst.append(max(errors))
        expected = [auc(RATES, balanced) / 0.8, auc(RATES, worst) / 0.8]
        assert areas.tolist() == pytest.approx(expected, abs=1e-9)


def test_bootstrap_surrounds_the_area():
    scores, wrong, labels, group, weights = random_case(items=2000)
    counts = class_bootstrap(labels, 300, seed=0)
    areas = bootstrap_areas(scores, wrong, group, weights, RATES, 2, counts)[:, 0]
    result = curve(reject_lowest(scores, RATES, weights), wrong, group, weights, 2)
    measured = area(RATES, result.balanced_error).normalised
    lower, upper = interval(areas)
    assert lower < measured < upper
    assert upper - lower < 0.1
    assert areas.mean().item() == pytest.approx(measured, abs=0.01)


def test_interval_leaves_out_the_tails():
    samples = torch.arange(101.0).flip(0)
    assert interval(samples) == pytest.approx((2.5, 97.5))
    assert interval(samples, 0.5) == pytest.approx((25, 75))
    assert interval(tensor([3.0])) == (3, 3)


def test_mean_interval_follows_student():
    # Standard deviation sqrt(2.5), 97.5 % quantile 2.776445 with 4 degrees of freedom.
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776445 * math.sqrt(0.5)), rel=1e-6)
    assert mean_interval([0.25, 0.25]) == (0.25, 0)
    assert mean_interval([0.25]) == (0.25, None)  # one trial has no spread


ONE, TWO = torch.ones(1, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("scores", "rates", "weights", "message"),
    [
        (TWO, tensor([0.5]), TWO, "scores"),
        (tensor([[1.0, math.nan]]), tensor([0.5]), TWO, "scores"),
        (torch.ones(0, 2), tensor([]), TWO, "scores"),
        (ONE, tensor([0.5, 0.5]), TWO, "rate"),
        (ONE, tensor([1.1]), TWO, "rate"),
        (ONE, tensor([math.nan]), TWO, "rate"),
        (ONE, tensor([0.5]), torch.ones(3), "weights"),
        (ONE, tensor([0.5]), torch.zeros(2), "weights"),
        (ONE, tensor([0.5]), tensor([-1.0, 2.0]), "weights"),
        (ONE, tensor([0.5]), tensor([math.nan, 2.0]), "weights"),
    ],
)
@pytest.mark.parametrize("function", [reject_lowest, threshold_at])
def test_what_cannot_be_rejected_is_refused(function, scores, rates, weights, message):
    with pytest.raises(ValueError, match=message):
        function(scores, rates, weights)


NONE, GROUP = torch.zeros(1, 2, dtype=torch.bool), tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curve(NONE, NONE, GROUP, tensor([1.0, 0.0]), 2), "every group"),
        (lambda: curve(NONE, NONE, GROUP, TWO, 1), "from 0 to 0"),
        (lambda: curve(NONE, NONE, GROUP[:1], TWO, 2), "per item"),
        (lambda: curve(NONE, NONE.long(), GROUP, TWO, 2), "bool"),
        (lambda: curve(NONE, NONE[:, :1], GROUP, TWO, 2), "shape"),
        (lambda: area(tensor([]), tensor([])), "at least one"),
        (lambda: area(TWO, ONE), "as many"),
        (lambda: area(tensor([math.nan]), tensor([1.0])), "nan"),
        (lambda: class_bootstrap(GROUP, 0, seed=0), "draws, not 0"),
        (lambda: class_bootstrap(GROUP[:0], 1, seed=0), "labels"),
        (lambda: interval(tensor([])), "samples"),
        (lambda: interval(TWO, 95), "level"),
        (lambda: mean_interval([]), "at least one"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("wrong", "counts", "message"),
    [
        (NONE, tensor([[1, 1], [2, 0]]), "in every resample"),
        (NONE, tensor([1, 1]), "counts"),
        (NONE, tensor([[1, 1, 1]]), "counts"),
        (NONE.long(), tensor([[1, 1]]), "wrong"),
    ],
)
def test_resamples_that_fit_nothing_are_refused(wrong, counts, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_areas(ONE, wrong, GROUP, TWO, tensor([0.5]), 2, counts)
