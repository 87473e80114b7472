import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from moectl.common import calibration
from moectl.csr.metrics import (
    calibration_error,
    f1_scores,
    multiclass,
    multilabel,
    plain,
    ranking,
    sensitivity_at,
    sigmoid,
    tune_thresholds,
)

SCORES = np.array([0.1, 0.4, 0.35, 0.8, 0.4, 0.7])
LABELS = np.array([0, 0, 1, 1, 1, 0])


def images(count: int = 200, columns: int = 3, seed: int = 0):
    draws = np.random.default_rng(seed)
    labels = (draws.random((count, columns)) < 0.3).astype(float)
    logits = (2 * labels - 1 + draws.normal(0, 2, (count, columns))).round(1)
    return logits, labels


def logit(probabilities):
    return np.log(probabilities) - np.log1p(-probabilities)


# Known answers


def test_known_scores_of_six_images():
    found = multilabel(logit(SCORES)[:, None], LABELS[:, None], ["a"])
    column = found["columns"]["a"]
    assert column["auroc"] == pytest.approx(0.611111, abs=1e-6)
    assert column["ap"] == pytest.approx(0.7)
    assert column["f1"] == pytest.approx(0.4)
    assert (column["positives"], column["negatives"], found["n"]) == (3, 3, 6)
    assert found["auroc_macro"] == column["auroc"]
    assert found["map"] == column["ap"]


def test_known_calibration_error_counts_images_not_bins():
    confidences, correct = np.array([0.95] * 9 + [0.55]), np.array([True] * 9 + [False])
    assert calibration_error(confidences, correct) == pytest.approx(0.10)


# Ranks


def test_auroc_is_the_share_of_ordered_pairs():
    logits, labels = images()
    found = ranking(logits, labels, ["a", "b", "c"])
    for place, name in enumerate("abc"):
        positives = logits[labels[:, place] == 1, place]
        negatives = logits[labels[:, place] == 0, place]
        difference = positives[:, None] - negatives
        wanted = ((difference > 0) + 0.5 * (difference == 0)).mean()
        assert found["columns"][name]["auroc"] == pytest.approx(wanted)


def test_average_precision_is_a_sum_of_steps():
    logits, labels = images(columns=1)
    steps, seen = 0.0, 0.0
    for threshold in sorted({*logits[:, 0]}, reverse=True):
        predicted = logits[:, 0] >= threshold
        hits = labels[predicted, 0].sum()
        steps += (hits / labels.sum() - seen) * hits / predicted.sum()
        seen = hits / labels.sum()
    assert ranking(logits, labels, ["a"])["map"] == pytest.approx(steps)


@pytest.mark.parametrize("change", [np.exp, lambda x: 5 * x - 3, lambda x: x**3])
def test_ranks_do_not_change_with_a_rising_function(change):
    logits, labels = images()
    names = ["a", "b", "c"]
    assert ranking(change(logits), labels, names) == ranking(logits, labels, names)


def test_reversed_scores_have_the_rest_to_one_as_auroc():
    logits, labels = images()
    first, second = (ranking(part, labels, ["a", "b", "c"]) for part in (logits, -logits))
    assert first["auroc_macro"] + second["auroc_macro"] == pytest.approx(1)


def test_sensitivity_is_the_best_with_nine_of_ten_negatives_right():
    scores = np.array([*range(10), 8.5, 9.5, 3.5, 8.5]) * 1.0
    actual = np.array([False] * 10 + [True] * 4)
    assert sensitivity_at(scores, actual) == pytest.approx(0.75)  # one negative, 9, is above
    logits, labels = images()
    best = 0.0
    for threshold in logits[:, 0]:
        predicted = logits[:, 0] >= threshold
        if (~predicted[labels[:, 0] == 0]).mean() >= 0.9:
            best = max(best, predicted[labels[:, 0] == 1].mean())
    assert sensitivity_at(logits[:, 0], labels[:, 0] == 1) == pytest.approx(best)


def test_sensitivity_counts_points_on_a_line_between_others():
    scores = np.arange(20.0).repeat(2)  # every score has one positive and one negative
    assert sensitivity_at(scores, np.tile([True, False], 20)) == pytest.approx(0.1)


def test_columns_without_both_labels_are_skipped_and_named():
    logits, labels = images()
    labels[:, 0], labels[:, 2] = 0, 1
    found = multilabel(logits, labels, ["none", "some", "all"])
    some = found["columns"]["some"]
    assert found["skipped"]["auroc"] == ["none", "all"]
    assert found["skipped"]["ap"] == found["skipped"]["f1"] == ["none"]
    assert found["auroc_macro"] == some["auroc"]
    assert found["f1_macro"] == pytest.approx((some["f1"] + found["columns"]["all"]["f1"]) / 2)
    assert found["columns"]["none"]["auroc"] is None
    assert found["columns"]["none"]["ece"] > 0


def test_without_any_valid_column_there_is_no_score():
    found = multilabel(np.zeros((3, 1)), np.zeros((3, 1)), ["a"], draws=20)
    assert found["auroc_macro"] is found["map"] is found["f1_macro"] is found["f1_micro"] is None
    assert found["intervals"]["auroc_macro"] is None
    json.dumps(found, allow_nan=False)


# Several findings


def test_f1_is_that_of_scikit_learn():
    logits, labels = images()
    found = multilabel(logits, labels, ["a", "b", "c"])
    guess = logits > 0
    assert found["f1_macro"] == pytest.approx(reference.f1_score(labels, guess, average="macro"))
    assert found["f1_micro"] == pytest.approx(reference.f1_score(labels, guess, average="micro"))


def test_soft_labels_are_positive_from_a_half_on():
    logits, labels = images()
    soft = np.where(labels == 1, 0.5, 0.49)
    assert multilabel(logits, soft, ["a", "b", "c"]) == multilabel(logits, labels, ["a", "b", "c"])


def test_findings_are_calibrated_by_their_probability():
    logits, labels = images(columns=1)
    probabilities, total = sigmoid(logits[:, 0]), 0.0
    for low in range(10):
        inside = (probabilities > low / 10) & (probabilities <= (low + 1) / 10)
        if inside.any():
            gap = probabilities[inside].mean() - labels[inside, 0].mean()
            total += abs(gap) * inside.mean()
    assert multilabel(logits, labels, ["a"])["ece"] == pytest.approx(total)


def test_logits_that_round_to_one_in_float32_still_have_an_order():
    found = multilabel(np.array([[20.0], [30.0]]), np.array([[0], [1]]), ["a"])
    assert found["auroc_macro"] == 1
    assert sigmoid([20.0]) < sigmoid([30.0])


def test_intervals_hold_the_scores():
    logits, labels = images()
    found = multilabel(logits, labels, ["a", "b", "c"], draws=200, seed=1)
    again = multilabel(logits, labels, ["a", "b", "c"], draws=200, seed=1)
    assert found["intervals"] == again["intervals"]
    for score in ("auroc_macro", "map", "f1_macro", "f1_micro"):
        low, high = found["intervals"][score]
        assert low < found[score] < high
    low, high = found["intervals"]["columns"]["b"]["auroc"]
    assert low < found["columns"]["b"]["auroc"] < high


# Thresholds


def test_tuned_thresholds_are_as_good_as_any():
    logits, labels = images(60)
    thresholds = tune_thresholds(logits, labels)
    probabilities = sigmoid(logits)
    tuned, _ = f1_scores(probabilities > thresholds, labels == 1)
    for column in range(3):
        every = [0.0, *probabilities[:, column]]
        best = max(
            reference.f1_score(labels[:, column], probabilities[:, column] > threshold)
            for threshold in every
        )
        assert tuned[column] == pytest.approx(best)


def test_tuned_thresholds_lie_midway_and_nearest_to_a_half():
    logits = logit(np.array([[0.1], [0.3], [0.6], [0.9]]))
    assert tune_thresholds(logits, [[0], [0], [1], [1]]) == pytest.approx([0.45])
    # Above 0.75 and above 0.2 F1 is 2/3, the first with one hit of one, the other with two of four.
    assert tune_thresholds(logits, [[1], [0], [0], [1]]) == pytest.approx([0.75], abs=1e-9)


def test_columns_without_both_labels_keep_a_half():
    assert tune_thresholds([[3.0, 3.0], [1.0, 1.0]], [[0, 1], [0, 1]]).tolist() == [0.5, 0.5]


def test_neighbouring_floats_are_told_apart():
    low = high = logit(np.array([0.7]))
    while sigmoid(high) == sigmoid(low):
        high = np.nextafter(high, 9)
    logits = np.stack([low, high])
    found = sigmoid(logits) > tune_thresholds(logits, [[0], [1]])
    assert found.tolist() == [[False], [True]]


def test_thresholds_of_other_images_are_applied():
    logits, labels = images()
    found = multilabel(logits, labels, ["a", "b", "c"], thresholds=[0.2, 0.5, 0.8])
    guess = sigmoid(logits) > np.array([0.2, 0.5, 0.8])
    wanted = reference.f1_score(labels, guess, average=None)
    assert [found["columns"][name]["f1_tuned"] for name in "abc"] == pytest.approx(wanted)
    assert found["f1_macro_tuned"] == pytest.approx(wanted.mean())
    assert found["f1_micro_tuned"] == pytest.approx(
        reference.f1_score(labels, guess, average="micro")
    )
    assert found["columns"]["c"]["threshold"] == 0.8
    assert found["columns"]["b"]["f1_tuned"] == found["columns"]["b"]["f1"]


# One class


def classes(count: int = 150, seed: int = 0):
    draws = np.random.default_rng(seed)
    labels = draws.choice(4, count, p=[0.6, 0.3, 0.1, 0.0])
    return 2 * np.eye(4)[labels] + draws.normal(0, 1.5, (count, 4)), labels


def test_scores_of_classes_are_those_of_scikit_learn():
    logits, labels = classes()
    found = multiclass(logits, labels, ["a", "b", "c", "d"])
    guess = logits.argmax(1)
    present = [0, 1, 2]
    f1 = reference.f1_score(labels, guess, average="macro", labels=present)
    recall = reference.recall_score(labels, guess, average="macro", labels=present)
    assert found["accuracy"] == pytest.approx((guess == labels).mean())
    assert found["f1_macro"] == pytest.approx(f1)
    assert found["balanced_accuracy"] == pytest.approx(recall)
    assert found["confusion"] == reference.confusion_matrix(labels, guess, labels=range(4)).tolist()
    assert found["skipped"]["auroc"] == found["skipped"]["recall"] == ["d"]
    assert found["columns"]["d"]["f1"] is None
    assert found["columns"]["a"]["positives"] == (labels == 0).sum()
    json.dumps(found, allow_nan=False)


def test_calibration_of_classes_is_that_of_the_other_rooms():
    logits, labels = classes()
    probabilities = torch.tensor(logits).softmax(1)
    bins = calibration.reliability(probabilities, torch.tensor(labels), 10)
    wanted = calibration.expected_calibration_error(bins)
    assert multiclass(logits, labels, ["a", "b", "c", "d"])["ece"] == pytest.approx(wanted)


def test_intervals_of_classes_hold_the_scores():
    logits, labels = classes()
    found = multiclass(logits, labels, ["a", "b", "c", "d"], draws=200)
    for score in ("accuracy", "balanced_accuracy", "f1_macro", "auroc_macro"):
        low, high = found["intervals"][score]
        assert low < found[score] < high


# What goes wrong


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 1)), r"\(2, 2\) and \(2, 1\)"),
        (np.zeros((0, 1)), np.zeros((0, 1)), "at least one image"),
        (np.array([[math.nan]]), np.zeros((1, 1)), "finite"),
        (np.zeros((1, 1)), np.array([[2.0]]), "from 0 to 1"),
        (np.zeros((1, 1)), np.array([[math.nan]]), "from 0 to 1"),
    ],
)
def test_wrong_tables_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        multilabel(scores, labels, ["a"] * scores.shape[1])


def test_wrong_classes_are_refused():
    with pytest.raises(ValueError, match="from 0 to 1 expected"):
        multiclass(np.zeros((2, 2)), [0, 2], ["a", "b"])


def test_plain_values_have_no_nan():
    found = plain({"a": np.array([1.0, math.nan]), "b": (np.int64(2), np.float32(math.nan))})
    assert found == {"a": [1.0, None], "b": [2, None]}
