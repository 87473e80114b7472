import time
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from moectl.csr import bootstrap
from moectl.csr.bootstrap import draw, interval, mean_known


def images(count: int = 60, columns: int = 4, seed: int = 0):
    """Scores with ties, and labels that they know something about."""
    draws = np.random.default_rng(seed)
    labels = draws.random((count, columns)) < 0.3
    scores = (labels + draws.normal(0, 1, (count, columns))).round(1)
    return scores, labels


def drawn(counts, *tables):
    """The rows of one draw, as often as it holds them."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return [table[rows] for table in tables]


def test_a_draw_has_as_many_images_as_there_are_and_follows_from_the_seed():
    counts = draw(30, 50, seed=3)
    assert counts.shape == (50, 30)
    assert (counts.sum(1) == 30).all()
    assert (counts == draw(30, 50, seed=3)).all()
    assert (counts != draw(30, 50, seed=4)).any()
    assert counts.mean(0) == pytest.approx(np.ones(30), abs=0.5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (bootstrap.auroc, reference.roc_auc_score),
        (bootstrap.average_precision, reference.average_precision_score),
    ],
)
def test_ranks_of_all_draws_are_those_of_scikit_learn(ours, theirs):
    scores, labels = images()
    counts = draw(len(scores), 20)
    found = ours(scores, labels, counts)
    for row, count in zip(found, counts, strict=True):
        some, truth = drawn(count, scores, labels)
        wanted = [theirs(truth[:, column], some[:, column]) for column in range(4)]
        assert row == pytest.approx(wanted, abs=1e-12)


def test_f1_and_recall_of_all_draws_are_those_of_scikit_learn():
    scores, labels = images()
    counts = draw(len(scores), 20)
    found = bootstrap.f1(scores > 0.5, labels, counts)
    shares = bootstrap.recall(scores > 0.5, labels, counts)
    micro = bootstrap.f1_micro(scores > 0.5, labels, counts)
    for place, count in enumerate(counts):
        guess, truth = drawn(count, scores > 0.5, labels)
        assert found[place] == pytest.approx(reference.f1_score(truth, guess, average=None))
        assert shares[place] == pytest.approx(reference.recall_score(truth, guess, average=None))
        assert micro[place] == pytest.approx(reference.f1_score(truth, guess, average="micro"))


def test_a_draw_without_both_labels_has_no_auroc():
    scores, labels = np.array([[0.1], [0.2], [0.9]]), np.array([[False], [False], [True]])
    counts = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]])
    assert bootstrap.auroc(scores, labels, counts)[:, 0] == pytest.approx(
        [1, np.nan, np.nan], nan_ok=True
    )
    assert bootstrap.average_precision(scores, labels, counts)[:, 0] == pytest.approx(
        [1, np.nan, 1], nan_ok=True
    )
    assert bootstrap.f1(scores > 0.5, labels, counts)[:, 0] == pytest.approx(
        [1, np.nan, 1], nan_ok=True
    )


def test_means_leave_out_what_is_unknown():
    table = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]])
    assert mean_known(table) == pytest.approx([2, np.nan], nan_ok=True)
    assert interval(np.array([np.nan, 1.0, 2.0, np.nan])) == pytest.approx([1.025, 1.975])
    assert interval(np.array([np.nan])) is None


def test_any_score_gets_the_interval_of_the_same_draws():
    scores, labels = images()

    def macro(rows):
        return reference.roc_auc_score(labels[rows], scores[rows])

    counts = draw(len(scores), 40, seed=5)
    slow = bootstrap.bootstrap(macro, len(scores), 40, seed=5)
    assert slow == pytest.approx(interval(mean_known(bootstrap.auroc(scores, labels, counts))))


def test_an_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(0, 1, 400)
    low, high = bootstrap.bootstrap(lambda rows: values[rows].mean(), 400, 1000) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_a_thousand_draws_of_many_columns_take_seconds():
    scores, labels = images(300, 22)
    start = time.process_time()
    found = bootstrap.multilabel_intervals(
        scores, scores > 0.5, labels, [f"c{n}" for n in range(22)], draw(300, 1000)
    )
    assert time.process_time() - start < 5
    assert len(found["columns"]) == 22
    low, high = found["auroc_macro"]
    point = np.mean([reference.roc_auc_score(labels[:, n], scores[:, n]) for n in range(22)])
    assert low < point < high
    assert high - low < 0.05


def test_classes_get_intervals():
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 3, 80)
    scores = np.eye(3)[labels] + draws.normal(0, 1, (80, 3))
    counts = draw(80, 30)
    found = bootstrap.multiclass_intervals(scores, labels, counts)
    wanted = {name: [] for name in found}
    for count in counts:
        some, truth = drawn(count, scores, labels)
        guess = some.argmax(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted["accuracy"].append(reference.accuracy_score(truth, guess))
            wanted["balanced_accuracy"].append(reference.balanced_accuracy_score(truth, guess))
            wanted["f1_macro"].append(reference.f1_score(truth, guess, average="macro"))
        each = [reference.roc_auc_score(truth == c, some[:, c]) for c in range(3)]
        wanted["auroc_macro"].append(np.mean(each))
    for name, values in wanted.items():
        assert found[name] == pytest.approx(np.quantile(values, (0.025, 0.975))), name


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        draw(0)
