import math

import pytest
import torch

from moectl.balpoe.eval import (
    _tag,
    accuracy_table,
    calibration_table,
    epoch_scores,
    reliability_table,
    shifted_table,
)
from moectl.balpoe.losses import log_prior
from moectl.common.calibration import calibration

COUNTS = [500, 50, 5]
TAUS = torch.tensor([0.0, 1.0, 2.0])


def random_case(items: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(items) % 3
    logits = torch.randn(items, 3, 3, generator=generator)
    logits += 1.5 * torch.nn.functional.one_hot(labels, 3)[:, None]
    return logits, labels


def test_an_empty_shot_group_scores_none():
    logits, labels = random_case()
    found = epoch_scores(logits, labels, [500, 400, 300])
    assert found["val/accuracy_few"] is None
    assert found["val/accuracy_many"] == found["val/balanced_accuracy"]


def test_epoch_scores_agree_with_counting():
    logits, labels = random_case()
    found = epoch_scores(logits, labels, COUNTS)
    hits = logits.mean(1).argmax(1) == labels
    assert found["val/accuracy"] == pytest.approx(hits.double().mean().item())
    by_hand = [hits[labels == shot].double().mean().item() for shot in range(3)]
    names = ("accuracy_many", "accuracy_medium", "accuracy_few")
    assert [found[f"val/{name}"] for name in names] == pytest.approx(by_hand)
    second = (logits[:, 1].argmax(1) == labels).double().mean().item()
    assert found["val/balanced_accuracy_expert_1"] == pytest.approx(second)


def test_adjusting_moves_each_expert_to_the_uniform_prior():
    # All experts know nothing but their target prior: adjusted, they must know nothing at all.
    prior = log_prior(COUNTS)
    logits = ((1 - TAUS)[:, None] * prior).expand(30, 3, 3)
    labels = torch.arange(30) % 3
    table = calibration_table(logits, labels, prior, TAUS, 15)
    for number in range(3):
        assert table[f"expert_{number}_adjusted"]["nll"] == pytest.approx(math.log(3), abs=1e-4)
        assert table[f"expert_{number}"]["kl"] == pytest.approx(0, abs=1e-5)
        assert table[f"expert_{number}"]["ece"] == pytest.approx(0, abs=1e-5)


def test_the_ensemble_is_adjusted_only_if_the_mean_tau_is_not_one():
    logits, labels = random_case()
    same = accuracy_table(logits, labels, COUNTS, TAUS)
    assert same["ensemble"] == same["ensemble_adjusted"]
    other = accuracy_table(logits, labels, COUNTS, torch.tensor([0.0, 2.0, 4.0]))
    assert other["ensemble"] != other["ensemble_adjusted"]


def test_the_plot_and_the_table_show_the_same_calibration():
    logits, labels = random_case()
    prior = log_prior(COUNTS)
    table = calibration_table(logits, labels, prior, TAUS, 15)
    for name, bins in reliability_table(logits, labels, prior, TAUS, 15).items():
        drawn = sum(
            row["weight"] * abs(row["accuracy"] - row["confidence"])
            for row in bins
            if row["accuracy"] is not None
        )
        assert drawn == pytest.approx(table[name]["ece"], abs=1e-6)
    plain = calibration(logits.mean(1).softmax(1), labels)
    assert table["ensemble"]["ece"] == pytest.approx(plain["ece"])


def test_a_known_prior_helps_where_the_test_set_is_shifted():
    logits, labels = random_case(3000)
    logits = 4.5 * logits  # three draws of unit noise about 1.5: this makes the mean calibrated
    rows = shifted_table(logits, labels, log_prior(COUNTS), (50.0,))
    assert [(row["profile"], row["ratio"]) for row in rows] == [
        ("forward", 50.0),
        ("uniform", 1.0),
        ("backward", 50.0),
    ]
    assert rows[1]["accuracy"] == rows[1]["accuracy_known_prior"]
    assert rows[0]["images"] == rows[2]["images"] < rows[1]["images"]
    for row in (rows[0], rows[2]):
        assert row["accuracy_known_prior"] > row["accuracy"]


def test_no_shifts_asked_for_gives_none():
    logits, labels = random_case()
    assert shifted_table(logits, labels, log_prior(COUNTS), ()) == []


def test_a_test_set_without_a_class_cannot_be_shifted():
    logits, labels = random_case()
    kept = labels != 1
    assert shifted_table(logits[kept], labels[kept], log_prior(COUNTS), (10.0,)) == []


@pytest.mark.parametrize(
    ("reference", "tag"),
    [("latest", "last"), ("run@last", "last"), ("run@best", "best"), ("run@50", "epoch50")],
)
def test_results_are_named_after_the_weights(reference, tag):
    assert _tag(reference, 50) == tag
