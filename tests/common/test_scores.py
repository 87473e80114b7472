import dataclasses
import json

import pytest
import torch
from torch import tensor

from moectl.common.scores import (
    accuracy,
    balanced_accuracy,
    confusion,
    expert_diversity,
    grouped_accuracy,
    per_class_accuracy,
    prior_weights,
    shot_groups,
    topk_accuracy,
)

PREDICTIONS = tensor([0, 0, 1, 2, 2, 0])
LABELS = tensor([0, 0, 0, 2, 2, 2])  # class 1 has no items, class 3 neither


def random_case(items=200, classes=7):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(items, classes, generator=generator)
    labels = torch.randint(classes, (items,), generator=generator)
    scores[torch.arange(items), labels] += 0.8
    return scores, labels


def test_accuracy_by_hand():
    assert accuracy(PREDICTIONS, LABELS) == pytest.approx(4 / 6)
    assert topk_accuracy(tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1]]), tensor([2, 2]), k=2) == 0.5


def test_weights_count_like_copies():
    scores, labels = random_case(20)
    copies = torch.arange(20) % 4  # some items are absent
    predictions = scores.argmax(1)
    assert accuracy(predictions, labels, copies) == pytest.approx(
        accuracy(predictions.repeat_interleave(copies), labels.repeat_interleave(copies))
    )
    assert topk_accuracy(scores, labels, 2, copies) == pytest.approx(
        topk_accuracy(scores.repeat_interleave(copies, 0), labels.repeat_interleave(copies), 2)
    )


def test_nothing_has_no_accuracy():
    with pytest.raises(ValueError, match="at least one item"):
        accuracy(LABELS[:0], LABELS[:0])
    with pytest.raises(ValueError, match="at least one item"):
        accuracy(LABELS, LABELS, torch.zeros(6))
    with pytest.raises(ValueError, match="at least one item"):
        balanced_accuracy(LABELS[:0], LABELS[:0], 3)


def test_confusion_rows_are_true_classes():
    assert confusion(PREDICTIONS, LABELS, 4).tolist() == [
        [2, 1, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 2, 0],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize("wrong", [-1, 3])
def test_indices_outside_the_classes_are_refused(wrong):
    good, bad = tensor([0, 1]), tensor([0, wrong])
    with pytest.raises(ValueError, match="predictions must be class indices from 0 to 2"):
        confusion(bad, good, 3)
    with pytest.raises(ValueError, match="labels must be class indices from 0 to 2"):
        confusion(good, bad, 3)


def test_a_class_without_items_has_no_accuracy():
    per_class = per_class_accuracy(PREDICTIONS, LABELS, 4)
    assert per_class == [pytest.approx(2 / 3), None, pytest.approx(2 / 3), None]
    assert balanced_accuracy(PREDICTIONS, LABELS, 4) == pytest.approx(2 / 3)


def test_a_group_without_items_has_no_accuracy():
    groups = {"all": [0, 1, 2], "absent": [1, 3], "empty": []}
    assert grouped_accuracy([0.2, None, 0.6, None], groups) == {
        "all": pytest.approx(0.4),
        "absent": None,
        "empty": None,
    }


def test_balanced_accuracy_ignores_the_mix_of_classes():
    predictions = tensor([0] * 90 + [0] * 10)
    labels = tensor([0] * 90 + [1] * 10)
    assert accuracy(predictions, labels) == pytest.approx(0.9)
    assert balanced_accuracy(predictions, labels, 2) == 0.5


def test_prior_weights_undo_and_impose_a_prior():
    labels = tensor([0] * 6 + [1] * 3 + [2])
    prior = tensor([0.2, 0.3, 0.5])
    weights = prior_weights(labels, prior)
    shares = torch.bincount(labels, weights) / weights.sum()
    assert shares.tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert weights.mean().item() == pytest.approx(1)
    predictions = torch.zeros(10, dtype=torch.long)
    assert accuracy(predictions, labels, weights) == pytest.approx(0.2)


def test_uniform_prior_weights_make_accuracy_balanced():
    scores, labels = random_case()
    predictions = scores.argmax(1)
    weights = prior_weights(labels, torch.full((7,), 1 / 7))
    expected = balanced_accuracy(predictions, labels, 7)
    assert accuracy(predictions, labels, weights) == pytest.approx(expected)


def test_agrees_with_torchmetrics():
    from torchmetrics.functional import classification as reference

    scores, labels = random_case()
    predictions = scores.argmax(1)
    expected = {
        average: reference.multiclass_accuracy(scores, labels, 7, average)
        for average in ("micro", "macro", "none")
    }
    top3 = reference.multiclass_accuracy(scores, labels, 7, "micro", top_k=3)
    matrix = reference.multiclass_confusion_matrix(scores, labels, 7)
    assert accuracy(predictions, labels) == pytest.approx(expected["micro"].item(), rel=1e-6)
    assert balanced_accuracy(predictions, labels, 7) == pytest.approx(expected["macro"].item())
    assert per_class_accuracy(predictions, labels, 7) == pytest.approx(expected["none"].tolist())
    assert topk_accuracy(scores, labels, 3) == pytest.approx(top3.item(), rel=1e-6)
    assert confusion(predictions, labels, 7).tolist() == matrix.tolist()


def test_top_k_beyond_the_classes_is_always_right():
    scores, labels = random_case(classes=4)
    assert topk_accuracy(scores, labels) == 1.0
    assert topk_accuracy(scores, labels, 1) == accuracy(scores.argmax(1), labels)


@pytest.mark.parametrize(
    ("classes", "most", "ratio", "total", "sizes"),
    [
        (100, 500, 10, 19573, (69, 31, 0)),
        (100, 500, 50, 12608, (41, 41, 18)),
        (100, 500, 100, 10847, (35, 35, 30)),
        (100, 500, 200, 9502, (30, 31, 39)),
        (10, 5000, 10, 20431, (10, 0, 0)),
        (10, 5000, 50, 13996, (9, 1, 0)),
        (10, 5000, 100, 12406, (8, 2, 0)),
    ],
)
def test_shot_groups_of_long_tailed_cifar(classes, most, ratio, total, sizes):
    counts = [int(most * (1 / ratio) ** (index / (classes - 1))) for index in range(classes)]
    assert sum(counts) == total
    groups = shot_groups(counts)
    assert tuple(len(groups[name]) for name in ("many", "medium", "few")) == sizes
    assert sorted(index for members in groups.values() for index in members) == list(range(classes))


def test_shot_groups_keep_both_bounds_in_medium():
    groups = shot_groups([101, 100, 20, 19, 500])
    assert groups == {"many": [0, 4], "medium": [1, 2], "few": [3]}
    assert shot_groups([10, 6, 5, 4], many=9, few=5) == {"many": [0], "medium": [1, 2], "few": [3]}


def expert_case():
    """Three experts on four items of classes 0 0 1 1; expert e predicts row e below."""
    votes = tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    logits = torch.nn.functional.one_hot(votes.T, 3).float()  # (N, E, K)
    logits[:, 0] *= 1.5  # expert 0 wins ties
    return logits, tensor([0, 0, 1, 1])


def test_diversity_by_hand():
    logits, labels = expert_case()
    result = expert_diversity(logits, labels, {"head": [0], "tail": [1], "none": [2]})
    assert result.disagreement == [[0, 1, 0.25], [1, 0, 0.75], [0.25, 0.75, 0]]
    assert result.accuracy == [0.5, 0.5, 0.75]
    # Votes 1.5 for 0 against 1 or 2 for 1: item by item 0, 0, 1, 0.
    assert result.ensemble_accuracy == 0.75
    assert result.ensemble_gain == 0.0
    assert result.oracle_accuracy == 1.0
    # Without 0: 1 and 2 tie where they differ, and the first class wins: 0 0 1 0.
    # Without 1: 0 has the louder voice: 0 0 0 0. Without 2 the same.
    assert result.leave_one_out == [0.75, 0.5, 0.5]
    assert result.winners == {"head": 0, "tail": 1, "none": None}
    assert json.loads(json.dumps(dataclasses.asdict(result)))["oracle_accuracy"] == 1.0


def test_a_single_expert_has_nothing_to_differ_from():
    logits, labels = expert_case()
    result = expert_diversity(logits[:, 2:], labels, {"head": [0]})
    assert result.disagreement == [[0.0]]
    assert result.ensemble_accuracy == result.oracle_accuracy == 0.75
    assert result.ensemble_gain == 0.0
    assert result.leave_one_out == []
    assert result.winners == {"head": 0}


def test_order_of_experts_only_reorders_the_result():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(60, 3, 5, generator=generator)
    labels = torch.randint(5, (60,), generator=generator)
    groups = {"head": [0, 1], "tail": [2, 3, 4]}
    plain = expert_diversity(logits, labels, groups)
    turned = expert_diversity(logits.flip(1), labels, groups)
    assert turned.accuracy == plain.accuracy[::-1]
    assert turned.leave_one_out == plain.leave_one_out[::-1]
    assert turned.disagreement == [row[::-1] for row in plain.disagreement[::-1]]
    assert turned.ensemble_gain == plain.ensemble_gain
    assert turned.oracle_accuracy == plain.oracle_accuracy
    assert plain.oracle_accuracy > max(plain.accuracy)
