import itertools
import math

import pytest
import torch

from moectl.balpoe.priors import calibrate, estimate_prior, label_prior
from moectl.engine.errors import UserError

COUNTS = [60, 30, 10]
LIKELIHOOD = torch.tensor(  # (J, C): p(x | y), columns sum to 1
    [[0.5, 0.2, 0.1], [0.2, 0.5, 0.1], [0.2, 0.1, 0.2], [0.1, 0.2, 0.6]], dtype=torch.float64
)
TRAINED = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
ACTUAL = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)


def posteriors(likelihood, prior) -> torch.Tensor:
    joint = likelihood * prior
    return (joint / joint.sum(1, keepdim=True)).log()


def population(label_distribution) -> torch.Tensor:
    """Log-posteriors under TRAINED of 10,000 items whose x occur exactly as often as expected."""
    times = (LIKELIHOOD @ label_distribution * 10_000).round().long()
    return posteriors(LIKELIHOOD, TRAINED).repeat_interleave(times, dim=0)


def likelihood_of_items(log_posteriors, estimate) -> float:
    ratios = (log_posteriors - TRAINED.log()).exp()
    return float((ratios @ estimate).log().sum())


def test_train_and_uniform_are_what_they_say():
    assert label_prior("train", COUNTS).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-15)
    assert label_prior("uniform", COUNTS).tolist() == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert label_prior("train", COUNTS).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.json", "[1, 0, 3.0]"),
        ("q.txt", "1\n0\n3\n"),
        ("q.txt", "\n 0.25 \n\n0e0\r\n.75"),
        ("q", "\ufeff5e307\n0\n1.5e308"),
    ],
)
def test_a_file_is_read_and_normalised(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert label_prior(str(path), COUNTS).tolist() == pytest.approx([0.25, 0, 0.75], abs=1e-15)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.json", "[1, 2", "not valid JSON"),
        ("q.json", '{"a": 1}', "holds no list"),
        ("q.json", '[1, "2", 3]', "entry 1: '2' is not a finite number from 0 up"),
        ("q.json", "[1, 2, true]", "entry 2: True is not"),
        ("q.json", "[1, NaN, 3]", "entry 1: nan is not"),
        ("q.json", "[1, 1" + "0" * 400 + ", 3]", "entry 1: 1000000000"),
        ("q.txt", "1\n\n-2\n3", "line 3: -2 is not a finite number from 0 up"),
        ("q.txt", "1\ninf\n3", "line 2: inf is not"),
        ("q.txt", "1 2 3", "line 1: 1 2 3 is not"),
        ("q.txt", "1\n2", "holds 2 numbers, expected 3, one per class"),
        ("q.txt", "", "holds 0 numbers, expected 3"),
        ("q.txt", "0\n0\n0", "every number is 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        label_prior(str(path), COUNTS)
    assert caught.value.message.startswith(str(path))
    assert message in caught.value.message
    assert len(caught.value.message) < 300 + len(str(path))


def test_what_is_neither_kind_nor_file_names_the_kinds():
    with pytest.raises(UserError, match=r"unifrom: expected train, uniform or .* mean uniform\?"):
        label_prior("unifrom", COUNTS)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "q.txt"
    path.write_bytes(b"\xff\xfe1")
    with pytest.raises(UserError, match="not UTF-8 text"):
        label_prior(str(path), COUNTS)


@pytest.mark.parametrize(
    "actual", [[0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3], [0.8, 0.1, 0.1], [0.5, 0.5, 0]]
)
def test_the_prior_of_an_exact_population_is_recovered(actual):
    actual = torch.tensor(actual, dtype=torch.float64)
    found = estimate_prior(population(actual), TRAINED.log())
    assert found.tolist() == pytest.approx(actual.tolist(), abs=1e-3)
    assert found.dtype == torch.float64
    assert found.sum().item() == pytest.approx(1, abs=1e-12)


def test_single_precision_will_do():
    found = estimate_prior(population(ACTUAL).float(), TRAINED.log().float())
    assert found.tolist() == pytest.approx(ACTUAL.tolist(), abs=1e-3)


def test_the_estimate_is_the_mean_of_the_posteriors_that_it_implies():
    items = population(ACTUAL)
    found = estimate_prior(items, TRAINED.log(), tolerance=1e-12)
    implied = torch.log_softmax(items - TRAINED.log() + found.log(), dim=1).exp().mean(0)
    assert implied.tolist() == pytest.approx(found.tolist(), abs=1e-11)
    assert (found - TRAINED).abs().max() > 0.1


def test_one_step_agrees_with_loops():
    items = population(ACTUAL)[::500]
    expected = [0.0, 0.0, 0.0]
    for row in items.exp().tolist():
        # The first step starts at the training prior, whose ratio is 1.
        expected = [total + value / sum(row) for total, value in zip(expected, row, strict=True)]
    found = estimate_prior(items, TRAINED.log(), iterations=1)
    assert found.tolist() == pytest.approx([total / len(items) for total in expected], abs=1e-12)


def test_the_likelihood_never_falls():
    items = population(ACTUAL)[::50]
    steps = [estimate_prior(items, TRAINED.log(), iterations=count) for count in range(30)]
    path = [likelihood_of_items(items, step) for step in steps]
    assert steps[0].tolist() == pytest.approx(TRAINED.tolist())
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(path))
    assert path[-1] > path[0] + 1


def test_a_mean_posterior_equal_to_the_prior_stays():
    found = estimate_prior(population(TRAINED), TRAINED.log(), iterations=1)
    assert found.tolist() == pytest.approx(TRAINED.tolist(), abs=1e-11)


def test_a_single_class_has_all():
    assert estimate_prior(torch.zeros(5, 1), torch.zeros(1)).tolist() == [1]


def test_constants_have_no_effect():
    items = population(ACTUAL)[::50]
    shift = torch.linspace(-900, 900, len(items), dtype=torch.float64)[:, None]
    found = estimate_prior(items + shift, TRAINED.log() - 3)
    expected = estimate_prior(items, TRAINED.log())
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_class_without_prior_keeps_none():
    items = torch.cat([population(ACTUAL)[::50], torch.full((200, 1), -math.inf)], dim=1)
    log_prior = torch.cat([TRAINED.log(), torch.tensor([-math.inf])])
    found = estimate_prior(items, log_prior)
    assert found[3] == 0
    expected = estimate_prior(items[:, :3], log_prior[:3])
    assert found[:3].tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_certain_posteriors_are_counted():
    items = torch.eye(3, dtype=torch.float64)[[0, 1, 1, 1]].log()
    assert estimate_prior(items, TRAINED.log()).tolist() == pytest.approx([0.25, 0.75, 0])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (torch.zeros(0, 3), "at least one item"),
        (torch.zeros(4, 2), r"\(4, 2\) and \(3,\)"),
        (torch.zeros(3), "expected posteriors"),
        (torch.full((4, 3), math.nan), "finite posterior"),
        (torch.full((4, 3), -math.inf), "finite posterior"),
    ],
)
def test_items_that_say_nothing_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        estimate_prior(items, TRAINED.log())


def drawn(items: int, prior: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian classes with exact log-posteriors under the uniform prior, and labels."""
    draws = torch.Generator().manual_seed(seed)
    means = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 1.5
    labels = torch.multinomial(prior, items, replacement=True, generator=draws)
    features = means[labels] + torch.randn(items, 3, generator=draws)
    logits = features @ means.T - means.square().sum(1) / 2
    return logits.log_softmax(1).double(), labels


def test_calibration_undoes_a_temperature_and_biases() -> None:
    exact, labels = drawn(4000, torch.full((5,), 0.2), seed=1)
    bias = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    correction = calibrate(((exact - bias) / 2).log_softmax(1), labels)
    assert correction.scale == pytest.approx(2.0, rel=0.1)
    corrected = correction.apply(((exact - bias) / 2).log_softmax(1))
    torch.testing.assert_close(corrected.exp().sum(1), torch.ones(4000, dtype=torch.float64))
    shares = torch.bincount(labels, minlength=5) / 4000
    torch.testing.assert_close(corrected.exp().mean(0).float(), shares, atol=2e-3, rtol=0)
    assert float((corrected.exp() - exact.exp()).abs().mean()) < 0.02


def test_calibration_counts_weights_like_copies() -> None:
    exact, labels = drawn(300, torch.full((5,), 0.2), seed=2)
    weights = torch.ones(300)
    weights[::2] = 3
    weighted = calibrate(exact, labels, weights)
    rows = torch.arange(300).repeat_interleave(weights.long())
    copied = calibrate(exact[rows], labels[rows])
    assert weighted.scale == pytest.approx(copied.scale, rel=0.05)  # the bias prior is by items


def test_calibration_makes_the_estimate_of_shifted_items_good() -> None:
    skewed = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    bias = torch.tensor([1.5, -1.5, 0.8, 0.0, -0.8], dtype=torch.float64)
    val, labels = drawn(4000, torch.full((5,), 0.2), seed=3)
    new, _ = drawn(4000, skewed, seed=4)
    wrong_val, wrong_new = ((part + bias).log_softmax(1) for part in (val, new))
    uniform = torch.zeros(5)
    plain = estimate_prior(wrong_new, uniform)
    mended = estimate_prior(calibrate(wrong_val, labels).apply(wrong_new), uniform)
    assert float((mended - skewed).abs().sum()) < 0.06
    assert float((plain - skewed).abs().sum()) > 0.3


def test_pseudo_items_pull_towards_even_shares() -> None:
    new, _ = drawn(2000, torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]), seed=5)
    uniform = torch.zeros(5)
    distances = [
        float((estimate_prior(new, uniform, pseudo_items=count) - 0.2).abs().sum())
        for count in (0.0, 400.0, 1e9)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-4
