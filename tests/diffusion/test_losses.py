"""Losses: known answers of the balance, where its gradient goes, weights of the steps."""

import math

import pytest
import torch
from torch import Tensor

from moectl.diffusion.losses import (
    balance_loss,
    diffusion_loss,
    load,
    loss_weights,
    shares,
    switch_balance,
    variance_balance,
)
from moectl.diffusion.process import betas


def table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


MIXED = table([[4, 3, 2, 1], [1, 2, 3, 4], [4, 1, 3, 2]])
GUIDE = table([[1, 2, 3, 4], [0, 0, 0, 0], [2, 0, 0, 0]])
RAMP = table([[i / 10 for i in range(8)]] * 2)
BALANCED = 40 * torch.eye(8, dtype=torch.float64) - 20
COLLAPSED = table([[0.02, 0.01, 0, 0, 0, 0, 0, 0]] * 8)


@pytest.mark.parametrize(
    ("k_active", "share", "loss"),
    [(1, [2 / 3, 0, 0, 1 / 3], 1.5123962), (2, [1 / 3, 1 / 6, 1 / 3, 1 / 6], 1.0846217)],
)
def test_switch_balance_has_the_known_answers(k_active, share, loss):
    found = shares(MIXED, k_active)
    torch.testing.assert_close(found, torch.tensor(share, dtype=torch.float64))
    assert switch_balance(MIXED, found).item() == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize(
    ("logits", "loss"),
    [
        (GUIDE, 0.0570011847),
        (RAMP, 9.26724e-4),
        (MIXED, 0.0764536),
        (BALANCED, 0.125),
        (COLLAPSED, 8.744e-7),
        (torch.zeros(3, 8), 0),
        (100 * torch.eye(4), 0.25),
        (100 * torch.eye(16), 0.0625),
        (torch.randn(3, 1), 0),
    ],
)
def test_variance_balance_has_the_known_answers(logits, loss):
    assert variance_balance(logits).item() == pytest.approx(loss, rel=5e-5, abs=1e-9)


def test_variance_balance_is_the_unbiased_variance_of_the_probabilities():
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(variance_balance(logits), logits.softmax(1).var(1).mean())


def test_variance_balance_is_the_mean_over_blocks():
    found = balance_loss([GUIDE, RAMP], "variance", [])
    assert found.item() == pytest.approx(0.0289639551, rel=1e-6)
    total = 1 + 0.01 * balance_loss([GUIDE], "variance", [])
    assert total.item() == pytest.approx(1.00057, abs=1e-6)


def test_switch_balance_is_the_mean_over_blocks():
    logits = [MIXED, COLLAPSED]
    found = balance_loss(logits, "switch", [shares(one, 2) for one in logits])
    assert found.item() == pytest.approx((1.0846217 + 1.0113015) / 2, abs=1e-7)


def test_blocks_without_shares_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        balance_loss([MIXED, MIXED], "switch", [shares(MIXED, 2)])


@pytest.mark.parametrize(("logits", "kind"), [([], "switch"), ([], "variance"), ([MIXED], "none")])
def test_there_is_no_balance_without_blocks_or_kind(logits, kind):
    assert balance_loss(logits, kind, [shares(one, 1) for one in logits]) is None


def test_balanced_router_has_the_least_switch_loss_and_full_entropy():
    share = shares(BALANCED, 1)
    assert switch_balance(BALANCED, share).item() == pytest.approx(1)
    found = load(share)
    assert found.largest.item() == pytest.approx(1)
    assert found.entropy.item() == pytest.approx(1)


def test_collapsed_router_has_a_third_of_the_entropy():
    share = shares(COLLAPSED, 2)
    assert share.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert switch_balance(COLLAPSED, share).item() == pytest.approx(1.0113015, abs=1e-7)
    found = load(share)
    assert found.largest.item() == pytest.approx(8 / 2)
    assert found.entropy.item() == pytest.approx(1 / 3)
    assert torch.equal(found.shares, share)


def test_dead_experts_have_no_share():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    logits[:, [2, 5]] -= 100
    share = shares(logits, 2)
    assert (share == 0).nonzero().flatten().tolist() == [2, 5]
    assert share.sum().item() == pytest.approx(1)
    found = load(share)
    assert found.entropy.isfinite()
    assert found.entropy < math.log(6) / math.log(8)
    assert load(torch.eye(8)[3]).entropy.item() == 0


def test_only_expert_is_in_balance():
    found = load(shares(torch.randn(5, 1), 1))
    assert (found.largest.item(), found.entropy.item()) == (1, 1)


def test_shares_count_every_assignment():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    counts = [0.0] * 6
    for row in logits.tolist():
        for expert in sorted(range(6), key=row.__getitem__)[-3:]:
            counts[expert] += 1 / 150
    torch.testing.assert_close(shares(logits, 3), torch.tensor(counts))


def test_gradient_reaches_the_logits_and_not_the_shares():
    logits = MIXED.clone().requires_grad_()
    share = shares(logits, 2)
    assert not share.requires_grad
    switch_balance(logits, share).backward()
    probabilities = MIXED.softmax(1)
    inner = (probabilities * share).sum(1, keepdim=True)
    expected = 4 / 3 * probabilities * (share - inner)  # E / B times the softmax's derivative
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)
    assert logits.grad.any()


def test_step_against_the_gradient_takes_from_the_loaded_expert():
    logits = COLLAPSED.clone().requires_grad_()
    switch_balance(logits, shares(logits, 2)).backward()
    assert (logits.grad[:, :2] > 0).all()
    assert (logits.grad[:, 2:] < 0).all()


def test_shares_of_the_whole_batch_serve_its_parts():
    share = shares(MIXED, 1)
    parts = [switch_balance(MIXED[i : i + 1], share) for i in range(3)]
    assert (sum(parts) / 3).item() == pytest.approx(1.5123962, abs=1e-6)


@pytest.mark.parametrize("loss", [lambda x: switch_balance(x, shares(x, 2)), variance_balance])
def test_half_logits_are_taken_in_float32(loss):
    assert loss(MIXED.bfloat16()).dtype == torch.float32


def linear() -> Tensor:
    return (1 - betas("linear", 1000)).cumprod(0)


def test_min_snr_weights_have_the_known_answers():
    found = loss_weights(linear(), "min_snr", "epsilon")
    assert found[0].item() == pytest.approx(5.0005e-4, rel=1e-7)
    assert found[100].item() == pytest.approx(0.5857085, abs=1e-7)
    assert (found[249:] == 1).all()
    assert (found[:100] < 1).all()


@pytest.mark.parametrize("gamma", [5, 1])
def test_weights_of_velocities_are_those_of_the_same_error_in_the_image(gamma):
    alphas = linear()
    ratio = alphas / (1 - alphas)
    image = ratio.clamp(max=gamma)  # weight of the image's squared error
    # an error d of the noise is one of -d / sqrt(ratio) of the image, of v one of sqrt(1 - alpha) d
    noise = loss_weights(alphas, "min_snr", "epsilon", gamma)
    velocity = loss_weights(alphas, "min_snr", "v_prediction", gamma)
    torch.testing.assert_close(noise, image / ratio)
    torch.testing.assert_close(velocity, image * (1 - alphas))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_1_without_a_kind(prediction):
    found = loss_weights(linear(), "none", prediction)
    assert torch.equal(found, torch.ones(1000, dtype=torch.float64))


class TestDiffusionLoss:
    def test_it_is_the_error_and_the_weighted_balance(self):
        predicted, target = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, 3, 4, 4)
        logits = [torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])]
        own = [shares(logits[0], 2)]
        found = diffusion_loss(predicted, target, logits, own, lambda_load=0.1)
        assert found.dm_loss == 0.25
        torch.testing.assert_close(found.load_loss, switch_balance(logits[0], own[0]))
        torch.testing.assert_close(found.loss, 0.25 + 0.1 * found.load_loss)

    def test_images_have_weights(self):
        predicted = torch.stack([torch.ones(3, 4, 4), torch.full((3, 4, 4), 2.0)])
        weights = torch.tensor([3.0, 0.5])
        found = diffusion_loss(predicted, torch.zeros_like(predicted), [], [], weights=weights)
        assert found.dm_loss == (3 * 1 + 0.5 * 4) / 2
        assert found.load_loss == 0
        assert found.loss == found.dm_loss

    def test_without_a_balance_it_is_the_error(self):
        logits = [torch.randn(2, 4)]
        zeros = torch.zeros(2, 3, 4, 4)
        found = diffusion_loss(zeros, zeros, logits, [shares(logits[0], 2)], balance="none")
        assert found == (0, 0, 0)

    def test_half_precision_is_compared_in_that_of_the_target(self):
        predicted = torch.full((1, 3, 2, 2), 0.1, dtype=torch.bfloat16)
        found = diffusion_loss(predicted, torch.zeros(1, 3, 2, 2), [], [])
        assert found.dm_loss.dtype == torch.float32
        assert float(found.dm_loss) == pytest.approx(float(predicted[0, 0, 0, 0]) ** 2, rel=1e-6)
