import math

import pytest
import torch
from torch import tensor

from moectl.common.calibration import (
    ace_class,
    ace_top,
    calibration,
    expected_calibration_error,
    fit_temperature,
    marginal_kl,
    maximum_calibration_error,
    overconfidence_error,
    reliability,
)

PROBABILITIES = tensor(
    [
        [0.9, 0.05, 0.05],
        [0.6, 0.3, 0.1],
        [0.4, 0.35, 0.25],
        [0.2, 0.7, 0.1],
        [0.1, 0.1, 0.8],
        [0.34, 0.33, 0.33],
        [0.05, 0.9, 0.05],
        [0.25, 0.25, 0.5],
    ],
    dtype=torch.float64,
)
LABELS = tensor([0, 1, 0, 1, 2, 2, 1, 0])


def random_case(items=500, classes=6):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(items, classes, generator=generator)
    labels = torch.distributions.Categorical(logits=logits / 2).probs.multinomial(
        1, generator=generator
    )[:, 0]
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_answers(dtype):
    result = calibration(PROBABILITIES.to(dtype), LABELS)
    assert result["accuracy"] == pytest.approx(0.625)
    assert result["confidence"] == pytest.approx(0.6425)
    assert result["ece"] == pytest.approx(0.2575, abs=1e-7)
    assert result["mce"] == pytest.approx(0.60, abs=1e-7)
    assert result["nll"] == pytest.approx(0.6757200601, abs=1e-7)
    assert result["brier"] == pytest.approx(0.397925, abs=1e-7)
    assert result["overconfidence"] == pytest.approx(0.07625, abs=1e-7)
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize(
    ("bins", "expected", "largest"), [(15, 0.2575, 0.60), (5, 0.2575, 0.55), (4, 0.1175, 0.15)]
)
def test_ece_and_mce_known_answers(bins, expected, largest):
    filled = reliability(PROBABILITIES, LABELS, bins)
    assert expected_calibration_error(filled) == pytest.approx(expected, abs=1e-7)
    assert maximum_calibration_error(filled) == pytest.approx(largest, abs=1e-7)


@pytest.mark.parametrize(
    ("ranges", "top", "each_class"), [(4, 0.2575, 0.1733333), (2, 0.1925, 0.0683333)]
)
def test_ace_known_answers(ranges, top, each_class):
    assert ace_top(PROBABILITIES, LABELS, ranges) == pytest.approx(top, abs=1e-7)
    assert ace_class(PROBABILITIES, LABELS, ranges) == pytest.approx(each_class, abs=1e-7)


def test_bins_hold_their_upper_edge_and_empty_ones_say_nothing():
    filled = reliability(PROBABILITIES, LABELS, 5)
    assert [entry.count for entry in filled] == [0, 2, 2, 2, 2]
    assert filled[0].accuracy is None
    assert filled[0].confidence is None
    assert filled[0].weight == 0
    second = filled[1]  # confidences 0.34 and 0.4
    assert (second.lower, second.upper) == (0.2, 0.4)
    assert second.weight == pytest.approx(0.25)
    assert second.accuracy == 0.5
    assert second.confidence == pytest.approx(0.37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_edge_belongs_to_the_bin_below_it(dtype):
    tops = (torch.arange(8, 16, dtype=torch.float64) / 15).to(dtype)
    filled = reliability(torch.stack([tops, 1 - tops], dim=1), torch.zeros(8, dtype=torch.long))
    assert [entry.count for entry in filled] == [0] * 7 + [1] * 8


@pytest.mark.parametrize(("norm", "key"), [("l1", "ece"), ("max", "mce")])
def test_agrees_with_torchmetrics(norm, key):
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = random_case()
    probabilities = logits.softmax(1)
    expected = multiclass_calibration_error(probabilities, labels, 6, n_bins=15, norm=norm)
    assert calibration(probabilities, labels)[key] == pytest.approx(expected.item(), abs=1e-6)


def test_agrees_with_plain_formulas():
    logits, labels = random_case(40)
    probabilities = logits.softmax(1)
    one_hot = torch.nn.functional.one_hot(labels, 6)
    result = calibration(probabilities, labels)
    assert result["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    brier = (probabilities - one_hot).square().sum(1).mean()
    assert result["brier"] == pytest.approx(brier.item(), rel=1e-5)


@pytest.mark.parametrize("ranges", [1, 4, 10])
def test_ace_agrees_with_a_sort_and_chunks(ranges):
    logits, labels = random_case(400)
    probabilities = logits.double().softmax(1)
    total = 0.0
    for index in range(6):
        order = probabilities[:, index].argsort()
        for part in order.chunk(ranges):
            gap = probabilities[part, index].mean() - (labels[part] == index).double().mean()
            total += abs(gap.item()) / (6 * ranges)
    assert ace_class(probabilities, labels, ranges) == pytest.approx(total, abs=1e-12)


def test_ace_class_is_the_same_for_many_classes_at_once():
    generator = torch.Generator().manual_seed(2)
    probabilities = torch.randn(50, 70, generator=generator).double().softmax(1)
    labels = torch.randint(70, (50,), generator=generator)
    each = []
    for index in range(70):
        alone = torch.stack([probabilities[:, index], 1 - probabilities[:, index]], dim=1)
        each.append(ace_class(alone, (labels != index).long(), 5))
    assert ace_class(probabilities, labels, 5) == pytest.approx(sum(each) / 70)


def test_an_item_of_double_weight_is_the_same_item_twice():
    logits, labels = random_case(60)
    probabilities = logits.softmax(1)
    probabilities[10:20] = probabilities[0:10]  # equal scores, different labels
    copies = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(4))
    weighted = calibration(probabilities, labels, weights=copies)
    repeated = calibration(
        probabilities.repeat_interleave(copies, 0), labels.repeat_interleave(copies)
    )
    assert weighted == pytest.approx(repeated, abs=1e-12)
    assert weighted != pytest.approx(calibration(probabilities, labels), abs=1e-3)
    assert calibration(probabilities, labels, weights=7 * copies) == pytest.approx(weighted)


def test_the_order_of_items_does_not_matter_even_with_equal_scores():
    logits, labels = random_case(61)
    probabilities = logits.softmax(1)
    probabilities[20:40] = probabilities[0]
    order = torch.randperm(61, generator=torch.Generator().manual_seed(5))
    plain = calibration(probabilities, labels)
    assert calibration(probabilities[order], labels[order]) == pytest.approx(plain, abs=1e-12)


def test_certain_and_right_is_perfect():
    result = calibration(torch.eye(3), torch.arange(3))
    errors = {
        name: value for name, value in result.items() if name not in ("accuracy", "confidence")
    }
    assert errors == pytest.approx(dict.fromkeys(errors, 0.0), abs=1e-12)


def test_certain_and_wrong_stays_finite():
    result = calibration(torch.eye(2), tensor([1, 0]))
    assert result["nll"] == pytest.approx(87.3, abs=0.1)
    assert result["brier"] == 2.0
    assert result["ece"] == result["mce"] == result["overconfidence"] == 1.0


def test_doubt_is_not_overconfidence():
    modest = reliability(tensor([[0.6, 0.4], [0.7, 0.3]]), tensor([0, 0]))
    assert overconfidence_error(modest) == 0
    assert expected_calibration_error(modest) == pytest.approx(0.35)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_undoes_a_scale(temperature):
    logits, labels = random_case()
    base = fit_temperature(logits, labels)
    assert base == pytest.approx(2, abs=0.4)  # labels were drawn at temperature 2
    fitted = fit_temperature(temperature * logits, labels)
    assert fitted == pytest.approx(temperature * base, rel=1e-5)


def test_fitted_temperature_is_the_best_one():
    logits, labels = random_case()
    fitted = fit_temperature(logits, labels)

    def nll(temperature):
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    assert nll(fitted) < min(nll(0.98 * fitted), nll(1.02 * fitted), nll(1.0))
    weights = torch.ones(500)
    weights[:100] = 3
    more = torch.cat([torch.arange(100), torch.arange(100), torch.arange(500)])
    assert fit_temperature(logits, labels, weights) == pytest.approx(
        fit_temperature(logits[more], labels[more]), rel=1e-5
    )


def test_marginal_kl_by_hand():
    probabilities = tensor([[0.9, 0.1], [0.6, 0.4]])  # marginal 0.75, 0.25
    assert marginal_kl(probabilities, tensor([0.75, 0.25])) == pytest.approx(0, abs=1e-7)
    half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert marginal_kl(probabilities, tensor([0.5, 0.5])) == pytest.approx(half)
    assert marginal_kl(probabilities, tensor([1.0, 0.0])) == pytest.approx(-math.log(0.75))
    weights = tensor([1.0, 2.0])  # marginal 0.7, 0.3
    assert marginal_kl(probabilities, tensor([0.7, 0.3]), weights) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "rows", [[[2.0, -1.0]], [[0.9, 0.3]], [[math.nan, 0.5]]], ids=["logits", "sum", "nan"]
)
def test_rows_that_are_no_probabilities_are_refused(rows):
    with pytest.raises(ValueError, match="not logits"):
        calibration(tensor(rows), tensor([0]))


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [2.0, -1.0]])
def test_weights_that_cannot_weigh_are_refused(weights):
    with pytest.raises(ValueError, match="one number per item"):
        calibration(torch.eye(2), tensor([0, 1]), weights=tensor(weights))


def test_no_items_are_refused():
    with pytest.raises(ValueError, match="positive sum"):
        calibration(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
