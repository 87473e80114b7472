import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.balpoe.groups import Groups
from moectl.balpoe.rule import Plugin, judge, reduce

POSTERIORS = [
    [0.50, 0.30, 0.15, 0.05],
    [0.30, 0.28, 0.22, 0.20],
    [0.10, 0.10, 0.60, 0.20],
    [0.40, 0.10, 0.05, 0.45],
    [0.25, 0.25, 0.25, 0.25],
    [0.70, 0.20, 0.05, 0.05],
]
GROUPS = Groups(("head", "tail"), (0, 0, 1, 1))
DOUBLE = torch.float64


def plugin(alpha: list[float], mu: list[float], cost: float, groups: Groups = GROUPS) -> Plugin:
    row = torch.zeros(1, len(alpha), dtype=DOUBLE)
    return Plugin(
        groups=groups,
        rates=(None,),
        costs=(cost,),
        alpha=torch.tensor([alpha], dtype=DOUBLE),
        mu=torch.tensor([mu], dtype=DOUBLE),
        thresholds=torch.tensor([-cost], dtype=DOUBLE),
        beta=row,
        rejection=row[0, :1],
        errors=row,
        trace={},
    )


@pytest.mark.parametrize(
    ("alpha", "mu", "cost", "labels", "rejected"),
    [
        ([1, 1], [0, 0], 0.3, [0, 0, 2, 3, 0, 0], [1, 1, 1, 1, 1, 0]),
        ([1.2, 0.4], [0, 0], 0.5, [0, 2, 2, 3, 2, 0], [1, 1, 1, 1, 1, 0]),
        ([1.2, 0.4], [0, 1], 0.5, [0, 2, 2, 3, 2, 0], [1, 1, 0, 0, 1, 0]),
        ([1.2, 0.4], [1, 0], 0.5, [0, 2, 2, 3, 2, 0], [0, 0, 0, 0, 1, 0]),
    ],
)
def test_known_decisions(
    alpha: list[float], mu: list[float], cost: float, labels: list[int], rejected: list[int]
) -> None:
    found = plugin(alpha, mu, cost).predict(POSTERIORS)
    assert found.labels.tolist() == labels
    assert found.rejected.tolist() == [bool(value) for value in rejected]


def test_known_scores_are_left_less_right_side() -> None:
    scores, _ = plugin([1.2, 0.4], [0, 1], 0.5).judge(POSTERIORS)
    left = [0.416667, 0.55, 1.5, 1.125, 0.625, 0.583333]
    right = [0.466667, 0.613333, 0.866667, 0.666667, 0.666667, 0.4]  # less the cost already
    expected = torch.tensor(left, dtype=DOUBLE) - torch.tensor(right, dtype=DOUBLE) - 0.5
    torch.testing.assert_close(scores[0], expected, atol=2e-6, rtol=0)


def some(items: int = 200, classes: int = 8, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(items, classes, generator=draws, dtype=DOUBLE).mul(2).softmax(1)


def test_equal_shares_without_multipliers_are_chows_rule() -> None:
    posteriors = some()
    found = plugin([1, 1], [0, 0], 0.35, Groups(("a", "b"), (0, 1) * 4)).predict(posteriors)
    top, classes = posteriors.max(1)
    assert torch.equal(found.labels, classes)
    assert torch.equal(found.rejected, top - 1 < -0.35)
    scaled = plugin([2, 2], [0, 0], 0.35 / 2, Groups(("a", "b"), (0, 1) * 4)).predict(posteriors)
    assert torch.equal(scaled.rejected, found.rejected)


def test_raising_all_multipliers_equals_raising_the_score() -> None:
    items = reduce(some(), Groups(("a", "b"), (0, 1) * 4))
    alpha, mu = torch.tensor([[1.2, 0.1]], dtype=DOUBLE), torch.tensor([[0.3, 5.0]], dtype=DOUBLE)
    scores, _ = judge(items, alpha, mu)
    raised, _ = judge(items, alpha, mu + 0.7)
    torch.testing.assert_close(raised, scores + 0.7)


def test_permuting_classes_within_a_group_changes_names_only() -> None:
    posteriors, order = some(classes=6), [2, 0, 1, 4, 5, 3]
    rule = plugin([1.0, 0.2], [0.1, 3.0], 0.2, Groups(("a", "b"), (0, 0, 0, 1, 1, 1)))
    found, permuted = rule.predict(posteriors), rule.predict(posteriors[:, order])
    assert torch.equal(found.labels, torch.tensor(order)[permuted.labels])
    torch.testing.assert_close(found.scores, permuted.scores)


def test_a_higher_cost_rejects_less() -> None:
    posteriors = some()
    rejected = [
        plugin([1.5, 0.3], [0.2, 2.0], cost, Groups(("a", "b"), (0, 1) * 4))
        .predict(posteriors)
        .rejected
        for cost in (0.0, 0.2, 0.5, 1.0)
    ]
    for cheap, dear in itertools.pairwise(rejected):
        assert not (dear & ~cheap).any()
    assert rejected[0].sum() > rejected[-1].sum()


def test_groups_by_hand() -> None:
    """Against the formula written out over classes."""
    posteriors, groups = some(classes=7), Groups(("a", "b", "c"), (2, 0, 1, 1, 0, 2, 2))
    alpha = torch.tensor([[0.9, 0.4, 0.05], [1.0, 2.0, 3.0]], dtype=DOUBLE)
    mu = torch.tensor([[0.1, 0.5, 4.0], [0.0, 0.2, -1.0]], dtype=DOUBLE)
    scores, classes = judge(reduce(posteriors, groups), alpha, mu)
    of_class = torch.tensor(groups.of_class)
    for row in range(2):
        ratio = posteriors / alpha[row, of_class]
        against = ((1 / alpha[row] - mu[row])[of_class] * posteriors).sum(1)
        torch.testing.assert_close(scores[row], ratio.amax(1) - against)
        assert torch.equal(classes[row], ratio.argmax(1))


def test_arrays_and_lists_will_do() -> None:
    rule = plugin([1.2, 0.4], [0, 1], 0.5)
    expected = rule.predict(torch.tensor(POSTERIORS, dtype=DOUBLE))
    for given in (POSTERIORS, np.array(POSTERIORS)):
        assert torch.equal(rule.predict(given).scores, expected.scores)


@pytest.mark.parametrize(
    ("posteriors", "words"),
    [
        ([[0.5, 0.5]], r"shape \(1, 2\) for 4 classes"),
        ([[0.5, 0.3, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5]], "item 1 are not shares with sum 1"),
        ([[0.5, 0.7, -0.2, 0.0]], "item 0 are not shares"),
        ([[float("nan"), 1.0, 0.0, 0.0]], "item 0 are not shares"),
    ],
)
def test_what_is_no_posterior_is_refused(posteriors: list[list[float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plugin([1, 1], [0, 0], 0.1).predict(posteriors)


def test_a_point_is_named_by_rate_or_cost() -> None:
    rows = torch.ones(3, 2, dtype=DOUBLE)
    rule = Plugin(
        groups=GROUPS,
        rates=(0.0, 0.3, None),
        costs=(None, None, 0.3),
        alpha=rows,
        mu=rows,
        thresholds=rows[:, 0],
        beta=rows,
        rejection=rows[:, 0],
        errors=rows,
        trace={},
    )
    assert (rule.point(rate=0), rule.point(rate=0.1 * 3), rule.point(cost=0.3)) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"cost 0.1 is not .* rate 0, rate 0.3, cost 0.3"):
        rule.point(cost=0.1)
    with pytest.raises(ValueError, match="say which operating point: rate 0"):
        rule.point()
