import math

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from moectl.balpoe.losses import (
    Mixed,
    balpoe_loss,
    expert_losses,
    log_posterior,
    log_prior,
    mix,
    mixed_accuracy,
    target_log_priors,
    to_uniform,
)

PRIOR = log_prior([500, 50, 5])
TAUS = tensor([0.0, 1.0, 2.0])
LOGITS = tensor(  # (B, E, K) = (2, 3, 3)
    [
        [[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 3.0]],
        [[0.5, -0.5, 1.5], [0.0, 2.0, -1.0], [-1.0, 0.0, 1.0]],
    ]
)
UNIFORM = torch.zeros(3)
CIFAR = [int(500 * 0.01 ** (index / 99)) for index in range(100)]


def close(expected, tolerance=1e-6):
    return pytest.approx(expected, abs=tolerance)


def unmixed(labels):
    return Mixed(torch.empty(len(labels)), labels, labels, 1.0)


def random_experts(items=7, experts=3, classes=5):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(items, experts, classes, generator=generator, dtype=torch.float64)
    prior = log_prior([400, 90, 30, 7, 2]).double()
    return logits, prior, torch.linspace(0, 2, experts, dtype=torch.float64)


# --- the prior and the loss


def test_log_prior_known_answer():
    assert PRIOR.tolist() == close([-0.104360, -2.406945, -4.709530])


def test_log_prior_of_an_empty_class_is_finite():
    assert log_prior(tensor([3, 0]))[1].item() == close(math.log(1e-9), 1e-4)


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1], [[1, 2]]])
def test_counts_that_give_no_prior_are_refused(counts):
    with pytest.raises(ValueError, match="class_counts"):
        log_prior(counts)


def test_expert_losses_known_answer():
    labels = tensor([0, 2])
    losses = expert_losses(LOGITS, labels, PRIOR, TAUS)
    assert losses.tolist() == close([0.40760595, 3.13244963, 3.62490773])
    loss, parts = balpoe_loss(LOGITS, unmixed(labels), PRIOR, TAUS)
    assert loss.item() == close(2.38832116)
    assert {name: part.item() for name, part in parts.items()} == {
        "loss_expert_0": losses[0].item(),
        "loss_expert_1": losses[1].item(),
        "loss_expert_2": losses[2].item(),
    }


@pytest.mark.parametrize(
    ("label", "experts", "mean"),
    [
        (0, [1.0986123, 0.1043600, 0.0100493], 0.4043405),
        (1, None, 2.7069256),
        (2, [1.0986123, 4.7095299, 9.2203884], 5.0095100),
    ],
)
def test_zero_logits_known_answer(label, experts, mean):
    losses = expert_losses(torch.zeros(1, 3, 3), tensor([label]), PRIOR, TAUS)
    assert losses.mean().item() == close(mean)
    if experts:
        assert losses.tolist() == close(experts)


def test_zero_logits_on_one_image_of_each_cifar_class():
    losses = expert_losses(torch.zeros(100, 3, 100), torch.arange(100), log_prior(CIFAR), TAUS)
    assert losses.tolist() == close([4.6051707, 5.3999453, 7.0631475], 2e-6)
    assert losses.mean().item() == close(5.6894212, 2e-6)


def test_balanced_expert_at_zero_logits_has_the_entropy_of_the_prior():
    labels = torch.arange(100).repeat_interleave(tensor(CIFAR))
    prior = log_prior(CIFAR)
    losses = expert_losses(torch.zeros(len(labels), 3, 100), labels, prior, TAUS)
    assert losses[1].item() == close(4.0074996, 1e-5)
    assert losses[1].item() == close(-(prior.exp() * prior).sum().item(), 1e-5)
    assert losses[2].item() == close(4.2782564, 1e-5)


def test_zero_tau_is_cross_entropy():
    labels = tensor([1, 2])
    losses = expert_losses(LOGITS, labels, PRIOR, torch.zeros(3))
    expected = [F.cross_entropy(LOGITS[:, index], labels).item() for index in range(3)]
    assert losses.tolist() == close(expected)


def test_tau_one_is_balanced_softmax():
    counts = tensor([500.0, 50.0, 5.0])
    weighted = counts * LOGITS[0, 0].exp()
    loss = expert_losses(LOGITS[:1, :1], tensor([2]), PRIOR, torch.ones(1))
    assert loss.item() == close(-math.log(weighted[2] / weighted.sum()))


def test_half_precision_logits_give_a_float32_loss():
    halves = LOGITS.bfloat16()  # these values are exact in bfloat16
    losses = expert_losses(halves, tensor([0, 2]), PRIOR, TAUS)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expert_losses(LOGITS, tensor([0, 2]), PRIOR, TAUS))


def test_each_expert_learns_from_its_own_loss_only():
    logits = LOGITS.clone().requires_grad_()
    expert_losses(logits, tensor([0, 2]), PRIOR, TAUS)[1].backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum((0, 2)) > 0).tolist() == [False, True, False]


def test_gradient_reaches_all_experts_and_no_part_carries_one():
    logits = LOGITS.clone().requires_grad_()
    loss, parts = balpoe_loss(logits, unmixed(tensor([0, 2])), PRIOR, TAUS)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum((0, 2)) > 0).all()
    assert not any(part.requires_grad for part in parts.values())


def test_one_tau_per_expert_is_demanded():
    with pytest.raises(ValueError, match=r"\(2,\) for 3 experts"):
        expert_losses(LOGITS, tensor([0, 2]), PRIOR, TAUS[:2])


# --- mixing


def test_mixed_loss_known_answer():
    mixed = Mixed(torch.empty(2), tensor([0, 2]), tensor([1, 0]), 0.3)
    loss, parts = balpoe_loss(LOGITS, mixed, PRIOR, TAUS)
    assert loss.item() == close(1.9324164)
    assert sum(parts.values()).item() / 3 == close(1.9324164)


def test_mixed_loss_is_cross_entropy_against_blended_labels():
    mixed = Mixed(torch.empty(2), tensor([0, 2]), tensor([1, 0]), 0.3)
    soft = 0.3 * F.one_hot(mixed.labels, 3) + 0.7 * F.one_hot(mixed.partners, 3)
    adjusted = LOGITS + TAUS[:, None] * PRIOR
    expected = [F.cross_entropy(adjusted[:, index], soft).item() for index in range(3)]
    loss, _ = balpoe_loss(LOGITS, mixed, PRIOR, TAUS)
    assert loss.item() == close(sum(expected) / 3)


def batch(size=16, height=8, width=6):
    """Images that are filled with their own number, and that number as label."""
    labels = torch.arange(size)
    return labels.float().view(-1, 1, 1, 1).repeat(1, 3, height, width), labels


@pytest.mark.parametrize(
    ("mode", "mixup_alpha", "cutmix_alpha"),
    [("default", 0.4, 1.0), ("mixup", 0, 1.0), ("cutmix", 0.4, 0), ("mixup_cutmix", 0, 0)],
)
def test_without_mixing_the_batch_is_passed_through(mode, mixup_alpha, cutmix_alpha):
    images, labels = batch()
    mixed = mix(images, labels, mode, mixup_alpha, cutmix_alpha)
    assert mixed.images is images
    assert mixed.labels is labels
    assert mixed.partners is labels
    assert mixed.lam == 1.0


@pytest.mark.parametrize("mode", ["mixup", "cutmix", "mixup_cutmix"])
def test_the_global_seed_decides_and_the_input_stays(mode):
    images, labels = batch()
    before = images.clone()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(mix(images, labels, mode, 0.4, 1.0))
    first, again, other = results
    assert first.lam == again.lam != other.lam
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.partners, again.partners)
    assert not torch.equal(first.partners, other.partners)
    assert torch.equal(images, before)
    assert sorted(first.partners.tolist()) == labels.tolist()


def test_mixup_blends_images_by_lam():
    images, labels = batch()
    torch.manual_seed(0)
    mixed = mix(images, labels, "mixup", 1.0, 0)
    expected = mixed.lam * mixed.labels + (1 - mixed.lam) * mixed.partners
    assert 0 < mixed.lam < 1
    assert torch.allclose(mixed.images, expected.view(-1, 1, 1, 1).expand_as(images), atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_lam_is_the_share_of_pixels_that_stayed(seed):
    images, labels = batch(height=8, width=6)
    torch.manual_seed(seed)
    mixed = mix(images, labels, "cutmix", 0, 1.0)
    stayed = mixed.images == mixed.labels.view(-1, 1, 1, 1)
    pasted = mixed.images == mixed.partners.view(-1, 1, 1, 1)
    assert (stayed | pasted).all()
    moved = mixed.labels != mixed.partners
    assert moved.any()
    shares = stayed[moved].double().mean((1, 2, 3))
    assert shares.tolist() == pytest.approx([mixed.lam] * len(shares), abs=1e-12)


def test_cutmix_box_covers_one_minus_lam_when_it_fits(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda size, _: tensor(size // 2))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda _: tensor(0.75))
    images, labels = batch(height=32, width=32)
    mixed = mix(images, labels, "cutmix", 0, 1.0)
    assert mixed.lam == 0.75
    moved = int((mixed.labels != mixed.partners).nonzero()[0])
    pasted = (mixed.images[moved, 0] == mixed.partners[moved]).nonzero()
    assert pasted.min().item() == 8
    assert pasted.max().item() == 23


def test_lam_follows_the_beta_distribution():
    images, labels = batch(size=2, height=1, width=1)
    torch.manual_seed(0)
    draws = tensor([mix(images, labels, "mixup", 0.4, 0).lam for _ in range(2000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


def test_mixup_cutmix_does_each_about_half_of_the_time():
    images, labels = batch()
    torch.manual_seed(0)
    results = [mix(images, labels, "mixup_cutmix", 1.0, 1.0) for _ in range(200)]
    blended = sum(bool((mixed.images % 1 != 0).any()) for mixed in results)
    assert 70 < blended < 130


def test_mixed_accuracy_weighs_both_labels():
    mixed = Mixed(torch.empty(4), tensor([0, 1, 2, 0]), tensor([2, 0, 1, 0]), 0.3)
    predictions = tensor([0, 0, 1, 2])  # 1 of 4 labels, 2 of 4 partners
    assert mixed_accuracy(predictions, mixed).item() == close(0.3 * 0.25 + 0.7 * 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("mode", ["mixup", "cutmix"])
def test_nothing_waits_for_the_accelerator(mode):
    images, labels = (part.cuda() for part in batch())
    logits = torch.randn(16, 3, 16, device="cuda")
    prior, taus = log_prior([1] * 16).cuda(), TAUS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed = mix(images, labels, mode, 0.4, 1.0)
        balpoe_loss(logits, mixed, prior, taus)
        mixed_accuracy(logits.mean(1).argmax(-1), mixed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- posteriors


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("poe", UNIFORM, [0.3213219, 0.2302372, 0.4484409]),
        ("poe", PRIOR, [0.9211417, 0.0660027, 0.0128556]),
        ("mixture", UNIFORM, [0.3856554, 0.2040669, 0.4102777]),
        ("single:0", UNIFORM, [0.054908, 0.201995, 0.743097]),
        ("single:1", UNIFORM, [1 / 3, 1 / 3, 1 / 3]),
        ("single:2", UNIFORM, [0.768725, 0.076872, 0.154403]),
        ("single:0", PRIOR, [0.665241, 0.244728, 0.090031]),
        ("single:1", PRIOR, [0.900901, 0.090090, 0.009009]),
        ("single:2", PRIOR, [0.988134, 0.009881, 0.001985]),
    ],
)
def test_posterior_known_answers(kind, target, expected):
    posterior = log_posterior(LOGITS[:1], PRIOR, TAUS, target, kind).exp()
    assert posterior[0].tolist() == close(expected)


def test_poe_is_the_softmax_of_mean_logits_when_the_mean_tau_is_one():
    logits, prior, taus = random_experts()
    posterior = log_posterior(logits, prior, taus, torch.zeros(5))
    assert torch.allclose(posterior, logits.mean(1).log_softmax(-1))


def test_poe_is_the_normalised_geometric_mean_of_uniform_posteriors():
    logits, prior, taus = random_experts()
    uniform = torch.zeros(5)
    each = [log_posterior(logits, prior, taus, uniform, f"single:{e}").exp() for e in range(3)]
    product = (each[0] * each[1] * each[2]) ** (1 / 3)
    expected = product / product.sum(1, keepdim=True)
    assert torch.allclose(log_posterior(logits, prior, taus, uniform).exp(), expected)


def test_mixture_is_the_mean_of_posteriors_under_one_prior():
    logits, prior, taus = random_experts()
    weights = tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    each = [log_posterior(logits, prior, taus, prior, f"single:{e}").exp() for e in range(3)]
    expected = sum(weight * posterior for weight, posterior in zip(weights, each, strict=True))
    mixture = log_posterior(logits, prior, taus, prior, "mixture", weights).exp()
    assert torch.allclose(mixture, expected)


@pytest.mark.parametrize("kind", ["poe", "single:0", "single:2"])
def test_train_and_uniform_posteriors_differ_by_the_prior(kind):
    logits, prior, taus = random_experts()
    uniform = log_posterior(logits, prior, taus, torch.zeros(5), kind)
    train = log_posterior(logits, prior, taus, prior, kind)
    assert torch.allclose(torch.log_softmax(uniform + prior, -1), train)
    assert torch.allclose(torch.log_softmax(train - prior, -1), uniform)


@pytest.mark.parametrize("kind", ["poe", "mixture", "single:1"])
def test_constants_added_to_logits_or_target_are_neutral(kind):
    logits, prior, taus = random_experts()
    shifts = torch.randn(7, 3, 1, dtype=torch.float64)
    plain = log_posterior(logits, prior, taus, prior, kind)
    shifted = log_posterior(logits + shifts, prior, taus, prior + 4, kind)
    assert torch.allclose(plain, shifted)
    assert torch.allclose(plain.exp().sum(1), torch.ones(7, dtype=torch.float64))


def test_an_expert_under_its_own_target_is_its_bare_softmax():
    logits, prior, taus = random_experts()
    for index, target in enumerate(target_log_priors(prior, taus)):
        posterior = log_posterior(logits, prior, taus, target, f"single:{index}")
        assert torch.allclose(posterior, logits[:, index].log_softmax(-1))


def test_targets_of_tau_0_1_2_are_the_train_uniform_and_inverted_priors():
    train, uniform, inverted = target_log_priors(PRIOR, TAUS).exp().tolist()
    assert train == close([500 / 555, 50 / 555, 5 / 555])
    assert uniform == close([1 / 3] * 3)
    assert inverted == close([1 / 111, 10 / 111, 100 / 111])


@pytest.mark.parametrize("kind", ["poe", "mixture"])
def test_all_weight_on_one_expert_is_that_expert(kind):
    logits, prior, taus = random_experts()
    weights = tensor([0.0, 0.0, 1.0])
    pooled = log_posterior(logits, prior, taus, prior, kind, weights)
    assert torch.allclose(pooled, log_posterior(logits, prior, taus, prior, "single:2"))


@pytest.mark.parametrize("kind", ["poe", "mixture"])
def test_the_order_of_experts_does_not_matter(kind):
    logits, prior, taus = random_experts()
    order = tensor([2, 0, 1])
    weights = tensor([0.2, 0.5, 0.3])
    plain = log_posterior(logits, prior, taus, prior, kind, weights)
    turned = log_posterior(logits[:, order], prior, taus[order], prior, kind, weights[order])
    assert torch.allclose(plain, turned)


def test_a_mean_tau_other_than_one_is_corrected():
    logits, prior, taus = random_experts()
    posterior = log_posterior(logits, prior, 2 * taus, torch.zeros(5))
    assert torch.allclose(posterior, torch.log_softmax(logits.mean(1) + prior, -1))


def test_a_balanced_expert_is_already_uniform():
    logits, prior, taus = random_experts()
    moved = to_uniform(logits, prior, taus)
    assert torch.equal(moved[:, 1], logits[:, 1])
    assert not torch.allclose(moved[:, 0], logits[:, 0])


@pytest.mark.parametrize("kind", ["product", "single:", "single:3", "single:-1", "single:x"])
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(ValueError, match=kind):
        log_posterior(LOGITS, PRIOR, TAUS, UNIFORM, kind)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0.0]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="3 shares with sum 1"):
        log_posterior(LOGITS, PRIOR, TAUS, UNIFORM, weights=tensor(weights))
