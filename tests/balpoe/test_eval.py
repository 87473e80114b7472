import json
import math
from dataclasses import replace

import pytest
import torch

from moectl.balpoe.eval import (
    accuracy_table,
    calibration_table,
    epoch_scores,
    measure,
    reliability_table,
    shifted_table,
)
from moectl.balpoe.logits import Outputs
from moectl.balpoe.losses import log_prior
from moectl.balpoe.settings import BalpoeSettings, EvalSection
from moectl.common.calibration import calibration, fit_temperature

COUNTS = [500, 50, 5]
TAUS = torch.tensor([0.0, 1.0, 2.0])


def random_case(items: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(items) % 3
    logits = torch.randn(items, 3, 3, generator=generator)
    logits += 1.5 * torch.nn.functional.one_hot(labels, 3)[:, None]
    return logits, labels


def outputs_of(logits: torch.Tensor, labels: torch.Tensor) -> Outputs:
    """Let the first third of the items validate."""
    val = len(labels) // 3
    return Outputs(
        val_logits=logits[:val],
        val_labels=labels[:val],
        test_logits=logits[val:],
        test_labels=labels[val:],
        class_counts=COUNTS,
        taus=TAUS.tolist(),
        class_names=["car", "cat", "cow"],
        val_indices=list(range(val)),
        test_indices=list(range(val, len(labels))),
        weights="",
    )


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
    rows = shifted_table(outputs_of(logits, labels), (50.0,))
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
    assert shifted_table(outputs_of(logits, labels), ()) == []


def test_a_test_set_without_a_class_cannot_be_shifted():
    outputs = outputs_of(*random_case())
    kept = outputs.test_labels != 1
    logits, labels = outputs.test_logits[kept], outputs.test_labels[kept]
    without = replace(outputs, test_logits=logits, test_labels=labels)
    assert shifted_table(without, (10.0,)) == []


def test_the_estimated_prior_is_measured_too():
    logits, labels = random_case(3000)
    rows = shifted_table(outputs_of(4.5 * logits, labels), (50.0,))
    for row in rows:
        columns = [name for name in row if name.startswith("accuracy")]
        assert columns == ["accuracy", "accuracy_estimated_prior", "accuracy_known_prior"]
        assert 0 <= row["accuracy_estimated_prior"] <= 1
    # Calibrated as they are, these logits leave the estimate no reason to spoil the balanced set.
    assert rows[1]["accuracy_estimated_prior"] == pytest.approx(rows[1]["accuracy"], abs=0.05)


def test_everything_but_the_temperature_is_measured_on_the_test_items():
    outputs = outputs_of(*random_case(135))
    settings = BalpoeSettings(eval=EvalSection(shifts=(5.0,), bins=7))
    found = measure(outputs, settings)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    logits, labels, prior = outputs.test_logits, outputs.test_labels, log_prior(COUNTS)
    assert found["accuracy"] == accuracy_table(logits, labels, COUNTS, TAUS)
    assert found["shifted"] == shifted_table(outputs, (5.0,))
    assert found["reliability"] == reliability_table(logits, labels, prior, TAUS, 7)
    assert [sum(row) for row in found["confusion"]] == [30, 30, 30]
    hits = [found["confusion"][number][number] / 30 for number in range(3)]
    assert found["per_class"] == pytest.approx(hits)
    assert found["scores"]["balanced_accuracy"] == pytest.approx(sum(hits) / 3)
    assert found["scores"]["ece"] == found["calibration"]["ensemble"]["ece"]
    own = fit_temperature(outputs.val_logits.mean(1), outputs.val_labels)
    assert found["calibration"]["ensemble"]["temperature"] == own
    assert own != fit_temperature(logits.mean(1), labels)
    assert (found["images"], found["class_names"]) == (90, ["car", "cat", "cow"])
