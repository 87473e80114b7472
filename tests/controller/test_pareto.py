"""Fronts, areas and intervals against slow references and known answers."""

import numpy as np
import pytest

from moectl.controller.pareto import (
    Point,
    budget_area,
    compare,
    dominates,
    front,
    hypervolume,
    mean_interval,
)


def cloud(seed: int, count: int = 12) -> list[Point]:
    """Points on a coarse grid, so that some agree in one respect or both."""
    draws = np.random.default_rng(seed)
    return [
        Point(float(a), float(b))
        for a, b in zip(draws.integers(6, size=count), draws.integers(6, size=count), strict=True)
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.8, 100), (0.7, 200), True),
        ((0.8, 100), (0.8, 200), True),
        ((0.8, 100), (0.7, 100), True),
        ((0.8, 100), (0.8, 100), False),
        ((0.8, 200), (0.7, 100), False),
        ((0.7, 100), (0.8, 200), False),
        ((0.7, 200), (0.8, 100), False),
    ],
)
def test_dominating_needs_one_better_and_none_worse(
    first: tuple[float, float], second: tuple[float, float], expected: bool
) -> None:
    assert dominates(Point(*first), Point(*second)) is expected


def test_a_known_front() -> None:
    points = [Point(0.5, 300), Point(0.4, 170), Point(0.76, 371), Point(0.3, 180), Point(0.7, 290)]
    assert front(points) == [1, 4, 2]


@pytest.mark.parametrize("seed", range(20))
def test_a_front_is_what_nothing_dominates_and_covers_the_rest(seed: int) -> None:
    points = cloud(seed)
    found = [points[place] for place in front(points)]
    for point in points:
        beaten = any(dominates(other, point) for other in found)
        assert beaten != (point in found)
    assert found == sorted(found, key=lambda point: point.latency)
    assert [p.accuracy for p in found] == sorted(p.accuracy for p in found)


def test_equal_points_are_all_on_the_front() -> None:
    assert front([Point(0.5, 10), Point(0.4, 20), Point(0.5, 10)]) == [0, 2]
    assert front([]) == []


def test_a_known_hypervolume() -> None:
    # 0.4 over 170 to 200, 0.7 over 200 to 300; the third is dominated.
    points = [Point(0.7, 200), Point(0.4, 170), Point(0.3, 180)]
    assert hypervolume(points, 300) == pytest.approx(0.4 * 30 + 0.7 * 100)


@pytest.mark.parametrize("seed", range(20))
def test_hypervolume_is_the_sum_of_the_best_accuracy_of_each_budget(seed: int) -> None:
    points = cloud(seed)
    for reference in (2, 5, 9):
        cells = [
            max((p.accuracy for p in points if p.latency <= start), default=0.0)
            for start in range(reference)
        ]
        assert hypervolume(points, reference) == sum(cells)


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_that_of_the_front_and_in_any_order(seed: int) -> None:
    points = cloud(seed)
    area = hypervolume(points, 7)
    assert hypervolume([points[place] for place in front(points)], 7) == area
    assert hypervolume(points[::-1], 7) == area
    assert hypervolume([*points, Point(7.0, 0.0)], 7) == 49


def test_points_beyond_the_corner_add_nothing() -> None:
    assert hypervolume([Point(0.9, 300), Point(0.9, 400), Point(-0.5, 10)], 300) == 0
    assert hypervolume([], 300) == 0


def test_budget_area_is_the_mean_over_the_range() -> None:
    assert budget_area([100, 200, 400], [0.5, 0.5, 0.5]) == pytest.approx(0.5)
    # 0.2 to 0.6 over 100, then 0.6 to 0.8 over 200.
    expected = (100 * 0.4 + 200 * 0.7) / 300
    assert budget_area([100, 200, 400], [0.2, 0.6, 0.8]) == pytest.approx(expected)
    assert budget_area([400, 100, 200], [0.8, 0.2, 0.6]) == pytest.approx(expected)
    assert budget_area([200], [0.3]) == 0.3


@pytest.mark.parametrize(
    ("budgets", "accuracies"), [([], []), ([1, 1], [0.1, 0.2]), ([1, 2], [0.1])]
)
def test_no_curve_without_one_accuracy_for_each_budget(
    budgets: list[float], accuracies: list[float]
) -> None:
    with pytest.raises(ValueError, match="different budgets"):
        budget_area(budgets, accuracies)


def test_the_interval_of_a_mean_is_as_wide_as_normal_theory_says() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = mean_interval(values.tolist(), draws=4000)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = mean_interval(draws.exponential(size=60).tolist(), draws=300, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_equal_values_have_no_width() -> None:
    assert mean_interval([0.25] * 5) == (0.25, 0.25)
    assert mean_interval([0.25]) == (0.25, 0.25)


def test_seeds_decide_the_interval() -> None:
    values = [0.0, 0.3, 0.6, 1.0, 1.0]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert compare(values, values[::-1], seed=3) == compare(values, values[::-1], seed=3)
    wide = np.random.default_rng(0).normal(size=50).tolist()
    assert mean_interval(wide, seed=3) != mean_interval(wide, seed=4)


def test_intervals_need_samples() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="at least one"):
        compare([], [])
    with pytest.raises(ValueError, match="2 and 1 samples"):
        compare([0.1, 0.2], [0.1])


def test_policies_that_agree_everywhere_do_not_differ() -> None:
    assert compare([0.3, 0.6, 1.0], [0.3, 0.6, 1.0]) == (0.0, 0.0, 0.0, 1.0)


def test_a_constant_gain_is_certain() -> None:
    first = [0.1, 0.4, 0.7, 0.9, 0.2]
    found = compare([value + 0.1 for value in first], first, draws=999)
    assert found.difference == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    assert found.p_value == 1 / 1000


def test_pairing_sees_what_the_spread_between_samples_hides() -> None:
    draws = np.random.default_rng(2)
    second = draws.uniform(0, 1, size=100)
    first = second + draws.normal(0.05, 0.05, size=100)
    paired = compare(first.tolist(), second.tolist())
    shuffled = compare(draws.permutation(first).tolist(), second.tolist())
    assert paired.difference == pytest.approx(shuffled.difference)
    assert paired.p_value < 0.01 < shuffled.p_value
    assert 0 < paired.low < paired.difference < paired.high
    assert shuffled.low < 0 < shuffled.high


def test_swapping_the_policies_turns_the_comparison_around() -> None:
    first, second = [0.3, 0.6, 1.0, 0.0, 0.9], [0.6, 0.3, 0.3, 0.0, 0.6]
    one, other = compare(first, second), compare(second, first)
    assert one == pytest.approx((-other.difference, -other.high, -other.low, other.p_value))


def test_p_values_are_uniform_where_nothing_differs() -> None:
    draws = np.random.default_rng(3)
    found = [
        compare(draws.normal(size=60).tolist(), draws.normal(size=60).tolist(), 200, seed).p_value
        for seed in range(200)
    ]
    assert 0.02 <= np.mean(np.array(found) < 0.1) <= 0.18
    assert 0.4 <= np.mean(found) <= 0.6
