import numpy as np
import pytest

from moectl.balpoe.longtail import class_sizes, halve, select, shifted_indices, split_indices

FAKE_LABELS = np.arange(50000) % 100


def shots(sizes):
    sizes = np.array(sizes)
    return [(sizes > 100).sum(), ((sizes >= 20) & (sizes <= 100)).sum(), (sizes < 20).sum()]


@pytest.mark.parametrize(
    ("classes", "ratio", "total", "last", "by_shot", "tail", "tail_share"),
    [
        (100, 10, 19573, 50, [69, 31, 0], 0, 0),
        (100, 50, 12608, 10, [41, 41, 18], 19, 0.02134),
        (100, 100, 10847, 5, [35, 35, 30], 31, 0.02996),
        (100, 200, 9502, 2, [30, 31, 39], 40, 0.0341),
        (10, 10, 20431, 500, [10, 0, 0], 0, 0),
        (10, 50, 13996, 100, [9, 1, 0], 0, 0),
        (10, 100, 12406, 50, [8, 2, 0], 0, 0),
    ],
)
def test_cifar_sizes_are_the_published_ones(classes, ratio, total, last, by_shot, tail, tail_share):
    sizes = class_sizes(50000 // classes, classes, 1 / ratio, "exp")
    assert (sum(sizes), sizes[-1]) == (total, last)
    assert shots(sizes) == by_shot
    tail_sizes = [size for size in sizes if size <= 20]
    assert len(tail_sizes) == tail
    assert sum(tail_sizes) / total == pytest.approx(tail_share, abs=5e-5)


def test_cifar100_sizes_begin_and_end_as_published():
    sizes = class_sizes(500, 100, 0.01, "exp")
    assert sizes[:10] == [500, 477, 455, 434, 415, 396, 378, 361, 344, 328]
    assert sizes[-8:] == [6, 6, 6, 6, 5, 5, 5, 5]
    assert sizes[69] == 20
    assert min(sizes[:35]) > 100
    assert max(sizes[70:]) < 20


@pytest.mark.parametrize(
    ("ratio", "sizes"),
    [
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (50, [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]),
    ],
)
def test_cifar10_sizes_are_the_published_ones(ratio, sizes):
    assert class_sizes(5000, 10, 1 / ratio, "exp") == sizes


def test_ratio_one_is_balanced():
    for profile in ("exp", "step", "reverse"):
        assert class_sizes(70, 5, 1.0, profile) == [70] * 5


def test_reverse_mirrors_exp_and_step_has_two_sizes():
    assert class_sizes(500, 100, 0.01, "reverse") == class_sizes(500, 100, 0.01, "exp")[::-1]
    assert class_sizes(500, 5, 0.1, "step") == [500, 500, 50, 50, 50]


@pytest.mark.parametrize(("classes", "factor"), [(1, 0.1), (10, 0.0), (10, 1.5)])
def test_senseless_profiles_are_refused(classes, factor):
    with pytest.raises(ValueError, match=r"classes|imb_factor"):
        class_sizes(100, classes, factor, "exp")


def test_selection_keeps_the_positions_of_the_original():
    sizes = class_sizes(500, 100, 0.01, "exp")
    kept = select(FAKE_LABELS, sizes)
    starts = np.cumsum([0, *sizes])
    assert kept[:5].tolist() == [9000, 25400, 28300, 44500, 46100]
    assert kept[starts[1] :][:5].tolist() == [27701, 30701, 43601, 8801, 26101]
    assert kept[starts[50] :][:5].tolist() == [30750, 48450, 14950, 42350, 35150]
    assert kept[starts[99] :].tolist() == [34899, 15399, 36399, 36199, 29999]
    assert kept.sum() == 271164136


def test_selection_leaves_the_global_generator_alone():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    select(FAKE_LABELS, [5] * 100)
    assert np.random.rand() == expected  # noqa: NPY002


def test_another_seed_selects_other_items_of_the_same_classes():
    sizes = class_sizes(500, 100, 0.01, "exp")
    first, second = select(FAKE_LABELS, sizes, 0), select(FAKE_LABELS, sizes, 1)
    assert (FAKE_LABELS[first] == FAKE_LABELS[second]).all()
    assert set(first) != set(second)


def test_split_is_stratified_disjoint_sorted_and_complete():
    labels = np.arange(10000) % 100
    val, test = split_indices(labels, 0.2, 1)
    assert np.bincount(labels[val]).tolist() == [20] * 100
    assert np.bincount(labels[test]).tolist() == [80] * 100
    assert sorted([*val, *test]) == list(range(10000))
    assert (np.diff(val) > 0).all()
    assert (np.diff(test) > 0).all()


def test_split_depends_on_its_seed_alone():
    labels = np.arange(10000) % 100
    assert split_indices(labels, 0.2, 1)[0].tolist() == split_indices(labels, 0.2, 1)[0].tolist()
    assert split_indices(labels, 0.2, 1)[0].tolist() != split_indices(labels, 0.2, 2)[0].tolist()


@pytest.mark.parametrize(("size", "in_val"), [(1, 0), (2, 1), (3, 1), (7, 1), (8, 2), (50, 10)])
def test_split_of_a_small_class_leaves_an_item_on_either_side(size, in_val):
    val, test = split_indices([4] * size, 0.2, 0)
    assert (len(val), len(test)) == (in_val, size - in_val)


def test_split_by_zero_leaves_validation_empty():
    val, test = split_indices([0, 1, 1], 0.0, 0)
    assert (val.tolist(), test.tolist()) == ([], [0, 1, 2])


@pytest.mark.parametrize(
    ("ratio", "total"), [(50, 2486), (25, 2956), (10, 3876), (5, 4932), (2, 7166)]
)
@pytest.mark.parametrize("profile", ["forward", "backward"])
def test_shifted_tests_have_the_published_sizes(profile, ratio, total):
    labels = np.arange(10000) % 100
    kept = shifted_indices(labels, profile, ratio)
    counts = np.bincount(labels[kept])
    assert len(kept) == len(set(kept)) == total
    ends = (counts[0], counts[-1]) if profile == "forward" else (counts[-1], counts[0])
    assert ends == (100, 100 // ratio)


def test_uniform_shift_keeps_every_item_of_a_balanced_test():
    labels = np.arange(1000) % 10
    assert shifted_indices(labels, "uniform", 50).tolist() == list(range(1000))


def test_shift_of_a_smaller_test_keeps_the_form_of_the_distribution():
    labels = np.arange(8000) % 100
    counts = np.bincount(labels[shifted_indices(labels, "forward", 10)])
    assert counts.tolist() == class_sizes(80, 100, 0.1, "exp")


def test_halves_share_every_class_and_single_items_alike() -> None:
    labels = np.array([0] * 7 + [1] * 4 + [2, 3, 4, 5, 6])
    first, second = halve(labels, 3)
    assert sorted([*first, *second]) == list(range(len(labels)))
    shares = [np.bincount(labels[half], minlength=7) for half in (first, second)]
    assert np.abs(shares[0] - shares[1]).max() == 1
    assert abs(len(first) - len(second)) <= 1
    assert min(share[2:].sum() for share in shares) >= 2
    again, other = halve(labels, 3), halve(labels, 4)
    assert np.array_equal(first, again[0])
    assert not np.array_equal(first, other[0])
