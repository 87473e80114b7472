"""Advantages, the clipped surrogate, the divergence and the rewards, against slow references."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.controller.losses import (
    Scale,
    advantages,
    composite,
    divergence,
    hinge,
    policy_loss,
)

ORIGINAL = {"accuracy": 1.0, "latency": 0.5, "over": 10.0, "cost": 0.05, "under": 0.1}
COST = (6 / 12 + 8 / 32 + 1) / 3  # as the original counted it


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randoms(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()


PLACES = torch.arange(24) % 4  # groups, not one after another


def test_advantages_of_a_group_have_mean_0_and_deviation_1() -> None:
    rewards = randoms(24)
    found, flat = advantages(rewards, PLACES)
    assert not flat.any()
    for group in range(4):
        here = torch.arange(group, 24, 4)
        own, raw = found[here], rewards[here]
        assert own.mean().item() == pytest.approx(0, abs=1e-12)
        assert own.std().item() == pytest.approx(1, abs=2e-4)
        assert own.std().item() == pytest.approx((raw.std() / (raw.std() + 1e-4)).item())
        assert own.argsort().tolist() == raw.argsort().tolist()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_agree_with_a_loop(scale: Scale) -> None:
    rewards = randoms(24, seed=1)
    rewards[PLACES == 2] = 0.7
    found, flat = advantages(rewards, PLACES, scale)
    for place, group in enumerate(PLACES.tolist()):
        own = rewards[group::4].tolist()
        divisor = {
            "group": statistics.stdev(own) + 1e-4,
            "batch": statistics.stdev(rewards.tolist()) + 1e-4,
            "none": 1,
        }[scale]
        expected = 0.0 if group == 2 else (own[place // 4] - statistics.fmean(own)) / divisor
        assert found[place].item() == pytest.approx(expected, abs=1e-12)
        assert flat[place].item() == (group == 2)


@pytest.mark.parametrize("reward", [0.1, 0.7312, -3.3, -1960.123, 1e4 / 3])
@pytest.mark.parametrize("group", [2, 3, 5, 16])
def test_equal_rewards_give_exactly_nothing_however_large(reward: float, group: int) -> None:
    found, flat = advantages(torch.full((group,), reward), torch.zeros(group, dtype=torch.long))
    assert found.tolist() == [0] * group
    assert flat.all()
    assert found.dtype == torch.float32


def test_a_small_difference_counts() -> None:
    found, flat = advantages(doubles(0.5, 0.50001), torch.tensor([0, 0]))
    assert not flat.any()
    assert found[1] > 0 > found[0]


def test_a_group_of_one_says_nothing() -> None:
    found, flat = advantages(doubles(1, 2, 3), torch.tensor([0, 1, 1]))
    assert flat.tolist() == [True, False, False]
    assert found[0] == 0


def test_groups_without_a_spread_have_no_gradient() -> None:
    log_probs = randoms(8).requires_grad_()
    rewards = torch.cat([doubles(1, 1, 1, 1), randoms(4, seed=2)])
    advantage, _ = advantages(rewards, torch.tensor([0] * 4 + [1] * 4))
    loss = policy_loss(log_probs, log_probs.detach(), advantage)
    (slopes,) = torch.autograd.grad(loss, log_probs)
    assert not slopes[:4].any()
    assert slopes[4:].all()


def test_the_first_gradient_is_that_of_minus_advantage_times_log_probability() -> None:
    logits, picks, advantage = randoms(6).view(2, 3), [0, 2, 1, 1], randoms(4, seed=3)
    logits.requires_grad_()

    def log_probs() -> Tensor:
        return logits.log_softmax(1)[[0, 0, 1, 1], picks]

    (wanted,) = torch.autograd.grad(-(advantage * log_probs()).mean(), logits)
    now = log_probs()
    loss = policy_loss(now, now.detach(), advantage)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15)
    assert loss.item() == pytest.approx(-advantage.mean().item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, -2.0), (1.0, -2.0, 2.0),
        (1.19, 2.0, -2.38), (0.81, -2.0, 1.62),
        # Far enough already: nothing is gained by going on.
        (1.21, 2.0, 0.0), (0.79, -2.0, 0.0),
        # The wrong way: always pulled back.
        (1.21, -2.0, 2.42), (0.79, 2.0, -1.58), (5.0, -1.0, 5.0),
    ],
)  # fmt: skip
def test_the_clip_holds_only_what_went_far_enough(
    ratio: float, advantage: float, slope: float
) -> None:
    now = doubles(math.log(ratio) - 3).requires_grad_()
    loss = policy_loss(now, doubles(-3), doubles(advantage))
    (found,) = torch.autograd.grad(loss, now)
    assert found.item() == pytest.approx(slope)
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage))


def test_the_clip_is_as_wide_as_asked() -> None:
    now = doubles(math.log(1.4)).requires_grad_()
    slopes = [
        torch.autograd.grad(policy_loss(now, doubles(0), doubles(1), clip), now)[0].item()
        for clip in (0.3, 0.5)
    ]
    assert slopes == pytest.approx([0, -1.4])


def test_the_divergence_is_never_negative_and_0_of_equals() -> None:
    ours = randoms(50).requires_grad_()
    for seed in range(5):
        for one, other in zip(ours, randoms(50, seed), strict=True):
            assert divergence(one, other) >= 0
    equal = divergence(ours, ours.detach())
    (slope,) = torch.autograd.grad(equal, ours)
    assert equal.item() == 0
    assert not slope.any()
    assert divergence(doubles(-1), doubles(0)).item() == pytest.approx(math.e - 2)


def test_the_divergence_is_that_of_kullback_and_leibler_on_average() -> None:
    ours, theirs = (randoms(4, seed).log_softmax(0) for seed in (0, 1))
    each = torch.stack([divergence(*pair) for pair in zip(ours, theirs, strict=True)])
    exact = (ours.exp() * (ours - theirs)).sum()
    assert (ours.exp() * each).sum().item() == pytest.approx(exact.item())


@pytest.mark.parametrize(
    ("accuracy", "latency", "reward"),
    [(0.8, 160, 0.7312), (0.8, 200, 0.5208), (0.8, 220, 0.3053), (0.8, 300, -2.2258),
     (1, 200, 0.7208)],
)  # fmt: skip
def test_the_composite_reward_has_the_known_answers(
    accuracy: float, latency: float, reward: float
) -> None:
    budget, cost = doubles(200), doubles(COST)
    found = composite(doubles(accuracy), doubles(latency), budget, cost, ORIGINAL)
    assert found.item() == pytest.approx(reward, abs=5e-5)


@pytest.mark.parametrize("term", ORIGINAL)
def test_each_weight_has_its_term(term: str) -> None:
    accuracy, latency, budget, cost = doubles(0.6, 0.6), doubles(90, 110), 100.0, doubles(0.5, 0.9)
    ratio = latency / budget
    expected = {
        "accuracy": accuracy,
        "latency": -1 / (1 + (-10 * (ratio - 1)).exp()),
        "over": doubles(0, -0.01),
        "cost": -cost,
        "under": doubles(0.1, 0),
    }[term]
    weights = dict.fromkeys(ORIGINAL, 0.0) | {term: 3.0}
    budgets = torch.full_like(latency, budget)
    torch.testing.assert_close(composite(accuracy, latency, budgets, cost, weights), 3 * expected)


def test_the_composite_reward_falls_with_latency_below_the_budget_too() -> None:
    latency = torch.linspace(20, 300, 50).double()
    same = torch.ones(50).double()
    rewards = composite(0.8 * same, latency, 200 * same, same, ORIGINAL)
    assert (rewards.diff() < 0).all()


@pytest.mark.parametrize(
    ("latency", "options", "reward"),
    [
        (50, {}, 0.8),
        (97, {}, 0.8),
        (99, {}, 0.8 - 10 * 0.02**2),
        (100, {}, 0.8 - 10 * 0.03**2),
        (110, {}, 0.8 - 10 * 0.13**2 - 0.1),
        (200, {}, 0.8 - 10 * 1.03**2 - 0.1),
        (100, {"margin": 0.0}, 0.8),
        (110, {"margin": 0.0, "violation": 0.0}, 0.7),
        (110, {"margin": 0.1, "violation": 0.5, "over": 2.0}, 0.8 - 2 * 0.2**2 - 0.5),
    ],
)
def test_the_hinge_reward_has_the_known_answers(
    latency: float, options: dict[str, Any], reward: float
) -> None:
    found = hinge(doubles(0.8), doubles(latency), doubles(100), **options)
    assert found.item() == pytest.approx(reward, abs=1e-12)


def test_a_budget_that_is_just_met_is_no_violation() -> None:
    just, missed = hinge(doubles(1, 1), doubles(100, 100.001), doubles(100, 100)).tolist()
    assert just - missed == pytest.approx(0.1, abs=1e-4)
