import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from moectl.taskmoe.losses import (
    balance_loss,
    distillation,
    diversity_loss,
    effective_experts,
    gate_entropy,
    gate_supervision,
    moe_loss,
    owner_targets,
    temperature_at,
    top_shares,
    z_loss,
)
from moectl.taskmoe.model import MoEOutput

KINDS = ["l2", "kl", "switch", "importance"]
OWNERS = tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]])  # class 1 has two owners


def close(expected: float, tolerance: float = 1e-6):
    return pytest.approx(expected, rel=1e-5, abs=tolerance)


def random_gates(images: int = 8, experts: int = 3, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(images, experts, generator=draws, dtype=torch.float64).softmax(1)


def output_of(gate_logits: Tensor, logits: Tensor) -> MoEOutput:
    return MoEOutput(logits, gate_logits.softmax(1), gate_logits)


def a_batch(images: int = 8, classes: int = 4) -> tuple[MoEOutput, Tensor]:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(images, classes, generator=draws).requires_grad_()
    gate_logits = torch.randn(images, 3, generator=draws).requires_grad_()
    return output_of(gate_logits, logits), torch.arange(images) % classes


# Diversity and balance

ONE_HOT_32 = F.one_hot(torch.arange(32) % 3, 3).tolist()  # counts 11, 11, 10
KNOWN = [
    ([[1 / 3] * 3] * 4, 2 / 3, 0, 0.066667),
    ([[1.0, 0, 0]] * 4, 0, 2 / 3, 0.333333),
    (torch.eye(3).tolist(), 0, 0, 0),
    ([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], 0.475, 0.0172222, 0.0561111),
    ([[0.5, 0.5, 0], [0, 0.5, 0.5]], 0.5, 0.0416667, 0.0708333),
    ([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], 0.7, 0, 0.07),
    (ONE_HOT_32, 0, 0.000651042, 0.000325521),
]


@pytest.mark.parametrize(("rows", "diversity", "balance", "both"), KNOWN)
def test_diversity_and_balance_known_answers(rows, diversity, balance, both):
    gates = tensor(rows, dtype=torch.float64)
    found = diversity_loss(gates).mean(), balance_loss(gates.mean(0))
    assert [value.item() for value in found] == close([diversity, balance], 1e-7)
    assert (0.1 * found[0] + 0.5 * found[1]).item() == close(both)


@pytest.mark.parametrize(("rows", "diversity", "balance", "both"), KNOWN)
def test_total_holds_the_known_answers(rows, diversity, balance, both):
    gates = tensor(rows)
    labels = torch.zeros(len(gates), dtype=torch.long)
    output = MoEOutput(torch.zeros(len(gates), 2), gates, gates)
    loss, parts = moe_loss(output, labels, torch.ones(2, gates.shape[1]))
    assert parts["loss_diversity"].item() == close(diversity)
    assert parts["loss_balance"].item() == close(balance)
    assert loss.item() == close(math.log(2) + both)


def test_summed_diversity_of_equal_gates():
    assert diversity_loss(torch.full((32, 3), 1 / 3)).sum().item() == close(21.3333, 1e-3)


def test_diversity_is_the_sum_of_products_of_different_gates():
    gates = random_gates()
    pairs = [(j, k) for j in range(3) for k in range(3) if j != k]
    expected = sum(gates[:, j] * gates[:, k] for j, k in pairs)
    torch.testing.assert_close(diversity_loss(gates), expected)


def test_diversity_is_the_gini_impurity():
    gates = random_gates(experts=5)
    torch.testing.assert_close(diversity_loss(gates), 1 - gates.square().sum(1))


def test_entropy_diversity_runs_from_zero_to_log_experts():
    gates = tensor([[1.0, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0]])
    expected = tensor([0.0, math.log(3), math.log(2)])
    torch.testing.assert_close(diversity_loss(gates, "entropy"), expected)


def test_l2_is_the_population_variation_over_the_experts():
    u = random_gates(experts=4).mean(0)
    variation = u.var(correction=0) / u.mean() ** 2
    assert balance_loss(u).item() == close(variation.item() / 4)
    assert balance_loss(u).item() == close((u.square().sum() - 1 / 4).item())


def test_importance_is_the_unbiased_variation_and_4_5_times_l2_for_three_experts():
    u = random_gates().mean(0)
    importance = balance_loss(u, "importance").item()
    assert importance == close((u.var() / u.mean() ** 2).item())
    assert importance == close(4.5 * balance_loss(u).item())


def test_diversity_and_balance_add_up_to_the_lack_of_variance():
    gates = random_gates(experts=4)
    covariance = torch.cov(gates.T, correction=0).trace()
    total = diversity_loss(gates).mean() + balance_loss(gates.mean(0))
    assert total.item() == close((1 - 1 / 4 - covariance).item())


def test_kl_is_the_divergence_from_equal_usage():
    u = random_gates().mean(0)
    expected = (u * (u * 3).log()).sum()
    assert balance_loss(u, "kl").item() == close(expected.item())
    assert balance_loss(tensor([1.0, 0, 0]), "kl").item() == close(math.log(3))


def test_switch_is_1_when_balanced_and_the_number_of_experts_at_collapse():
    collapsed = tensor([[0.0, 1.0, 0.0]] * 4)
    balanced = torch.eye(3)
    for gates, expected in ((collapsed, 3.0), (balanced, 1.0)):
        found = balance_loss(gates.mean(0), "switch", top_shares(gates))
        assert found.item() == close(expected)
    gates = random_gates()
    shares = [(gates.argmax(1) == j).double().mean() for j in range(3)]
    expected = 3 * sum(f * u for f, u in zip(shares, gates.mean(0), strict=True))
    assert balance_loss(gates.mean(0), "switch", top_shares(gates)).item() == close(expected.item())


def test_switch_without_shares_is_refused():
    with pytest.raises(ValueError, match="shares"):
        balance_loss(tensor([0.5, 0.5]), "switch")


@pytest.mark.parametrize("kind", ["l2", "kl", "importance"])
def test_equal_usage_is_the_best(kind):
    equal = torch.full((4,), 0.25)
    assert balance_loss(equal, kind).item() == close(0)
    assert balance_loss(tensor([0.26, 0.24, 0.25, 0.25]), kind) > 1e-5


@pytest.mark.parametrize("kind", ["l2", "kl", "importance"])
def test_one_expert_has_nothing_to_divide(kind):
    gates = torch.ones(5, 1)
    assert balance_loss(gates.mean(0), kind).item() == 0
    assert not diversity_loss(gates).any()
    assert not diversity_loss(gates, "entropy").any()
    assert effective_experts(gates).item() == 1
    assert gate_entropy(gates).item() == 0


def test_any_one_hot_assignment_that_is_balanced_reaches_zero():
    gates = torch.eye(3).repeat(4, 1)[torch.randperm(12)]
    assert not diversity_loss(gates).any()
    assert balance_loss(gates.mean(0)).item() == close(0)


def test_curvature_at_equal_gates():
    """Splitting the images among experts is downhill, moving all of them together uphill."""
    images, experts = 6, 3

    def terms(flat: Tensor) -> Tensor:
        gates = flat.view(images, experts).softmax(1)
        return 0.1 * diversity_loss(gates).mean() + 0.5 * balance_loss(gates.mean(0))

    start = torch.zeros(images * experts, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(terms, start)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    hessian = torch.autograd.functional.hessian(terms, start)
    direction = tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    signs = tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for each, expected in ((signs, -0.0037037), (signs.abs(), 0.0148148)):
        unit = torch.outer(each, direction).flatten()
        unit = unit / unit.norm()
        assert (unit @ hessian @ unit).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_with_the_usage_of_the_whole_give_its_loss_and_gradient(kind):
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
    shares = top_shares(z.softmax(1))
    found = []
    for parts in (1, 2):
        logits = z.clone().requires_grad_()
        u = torch.stack([part.softmax(1).mean(0) for part in logits.chunk(parts)]).mean(0)
        loss = balance_loss(u, kind, shares)
        found.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["l2", "kl", "importance"])
def test_balance_of_parts_on_their_own_is_never_smaller(kind):
    for seed in range(5):
        gates = random_gates(seed=seed)
        alone = sum(balance_loss(part.mean(0), kind) for part in gates.chunk(2)) / 2
        assert alone > balance_loss(gates.mean(0), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("diversity", ["gini", "entropy"])
def test_gates_of_0_have_finite_gradients(kind, diversity):
    z = tensor([[1.0, 0.5, -torch.inf], [0.3, 0.1, -torch.inf]], requires_grad=True)
    gates = z.softmax(1)
    balance = balance_loss(gates.mean(0), kind, top_shares(gates))
    (diversity_loss(gates, diversity).sum() + balance).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("call", [diversity_loss, lambda g, kind: balance_loss(g.mean(0), kind)])
def test_unknown_kinds_are_refused(call):
    with pytest.raises(ValueError, match="'other'"):
        call(random_gates(), "other")


# Other terms


def test_gate_supervision_counts_all_owners():
    gates = tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    found = gate_supervision(gates, tensor([0, 1, 3]), OWNERS)
    torch.testing.assert_close(found, -tensor([0.5, 0.8, 0.8]).log())


def test_gate_supervision_is_finite_without_an_owner_at_work():
    z = tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    loss = gate_supervision(z.softmax(1), tensor([2]), OWNERS).sum()
    loss.backward()
    assert loss.item() == close(-math.log(1e-8), 1e-3)
    assert z.grad.isfinite().all()


def test_z_loss_known_answers():
    found = z_loss(tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(found, tensor([math.log(3) ** 2, (1 + math.log(3)) ** 2]))


def test_owner_targets_average_softmaxes_over_own_classes():
    logits = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = owner_targets(logits, torch.arange(4), OWNERS, temperature=2.0)
    own = [[0, 1], [1, 2], [3]]
    for image, experts in enumerate([[0], [0, 1], [1], [2]]):
        expected = torch.zeros(4)
        for j in experts:
            expected[own[j]] += (logits[image, j, own[j]] / 2).softmax(0) / len(experts)
        torch.testing.assert_close(targets[image], expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_distillation_is_the_divergence_times_the_squared_temperature():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    softened = (logits / 4).softmax(1)
    expected = 16 * (targets * (targets / softened).log()).sum(1)
    torch.testing.assert_close(distillation(logits, targets, 4.0), expected)


def test_distillation_of_agreeing_logits_is_zero_and_bears_zeros():
    logits = tensor([[3.0, 1.0, -500.0]])
    targets = (logits / 2).softmax(1)
    assert targets[0, 2] == 0
    torch.testing.assert_close(distillation(logits, targets, 2.0), torch.zeros(1))


# The total


def test_without_weights_the_total_is_cross_entropy():
    output, labels = a_batch()
    loss, _ = moe_loss(output, labels, OWNERS, diversity_weight=0, balance_weight=0)
    assert loss.item() == close(F.cross_entropy(output.logits, labels).item())


def test_total_is_the_weighted_sum_of_its_parts():
    output, labels = a_batch()
    targets = torch.full((8, 4), 0.25)
    weights = {
        "diversity_weight": 0.2,
        "balance_weight": 0.3,
        "gate_supervision_weight": 0.4,
        "z_loss_weight": 0.5,
        "distill_weight": 0.6,
    }
    loss, parts = moe_loss(output, labels, OWNERS, targets=targets, **weights)
    names = ["diversity", "balance", "gate_supervision", "z", "distill"]
    expected = parts["loss_task"] + sum(
        weight * parts[f"loss_{name}"] for name, weight in zip(names, weights.values(), strict=True)
    )
    assert loss.item() == close(expected.item())
    assert len(parts) == 6
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    expected_z = z_loss(output.gate_logits).mean()
    assert parts["loss_z"].item() == close(expected_z.item())
    expected_kl = distillation(output.logits, targets, 4.0).mean()
    assert parts["loss_distill"].item() == close(expected_kl.item())
    expected_gate = gate_supervision(output.gates, labels, OWNERS).mean()
    assert parts["loss_gate_supervision"].item() == close(expected_gate.item())


def test_sum_multiplies_all_but_the_balance_by_the_batch():
    output, labels = a_batch()
    options = {"z_loss_weight": 0.1, "gate_supervision_weight": 0.1}
    _, mean = moe_loss(output, labels, OWNERS, **options)
    _, total = moe_loss(output, labels, OWNERS, reduction="sum", **options)
    for name, value in mean.items():
        factor = 1 if name == "loss_balance" else 8
        assert total[name].item() == close(factor * value.item())


def test_label_smoothing_spreads_the_labels():
    output, labels = a_batch()
    _, parts = moe_loss(output, labels, OWNERS, label_smoothing=0.2)
    soft = 0.8 * F.one_hot(labels, 4) + 0.05
    expected = -(soft * output.logits.log_softmax(1)).sum(1).mean()
    assert parts["loss_task"].item() == close(expected.item())


def test_usage_of_the_global_batch_replaces_that_of_the_gates():
    output, labels = a_batch()
    given = tensor([0.6, 0.3, 0.1])
    _, parts = moe_loss(output, labels, OWNERS, usage=given)
    assert parts["loss_balance"].item() == close(balance_loss(given).item())
    shares = tensor([0.5, 0.5, 0.0])
    _, parts = moe_loss(output, labels, OWNERS, usage=given, shares=shares, balance="switch")
    assert parts["loss_balance"].item() == close(3 * 0.45)


def test_switch_takes_the_batchs_own_shares_by_default():
    output, labels = a_batch()
    _, parts = moe_loss(output, labels, OWNERS, balance="switch", diversity="entropy")
    expected = balance_loss(output.gates.mean(0), "switch", top_shares(output.gates))
    assert parts["loss_balance"].item() == close(expected.item())
    assert parts["loss_diversity"].item() == close(gate_entropy(output.gates).item())


def test_half_precision_outputs_give_a_float32_loss():
    output, labels = a_batch()
    exact, _ = moe_loss(output, labels, OWNERS)
    rounded, _ = moe_loss(MoEOutput(*(part.bfloat16() for part in output)), labels, OWNERS)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"distill_weight": 0.5}, "targets"), ({"reduction": "none"}, "reduction 'none'")],
)
def test_what_does_not_fit_is_refused(options, message):
    output, labels = a_batch()
    with pytest.raises(ValueError, match=message):
        moe_loss(output, labels, OWNERS, **options)


# Measures and the schedule


def test_effective_experts_and_entropy_known_answers():
    gates = tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    assert effective_experts(gates).item() == close(1.5)
    assert gate_entropy(gates).item() == close(math.log(2) / 2)
    equal = torch.full((2, 4), 0.25)
    assert effective_experts(equal).item() == close(4)
    assert gate_entropy(equal).item() == close(math.log(4))


COSINE = [2.0, 1.963292, 1.780330, 1.25, 0.719670, 0.536708, 0.500370, 0.5, 0.5]


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [*zip([0, 10, 25, 50, 75, 90, 99, 100, 150], COSINE, strict=True)],
)
def test_cosine_temperature_known_answers(epoch, expected):
    assert temperature_at(epoch, 100, 2.0, 0.5) == pytest.approx(expected, abs=5e-7)


def test_linear_and_constant_temperatures():
    linear = [temperature_at(epoch, 10, 2.0, 0.5, "linear") for epoch in (0, 4, 10, 20)]
    assert linear == pytest.approx([2.0, 1.4, 0.5, 0.5])
    assert {temperature_at(epoch, 10, 2.0, 0.5, "constant") for epoch in (0, 7, 30)} == {2.0}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'step'"):
        temperature_at(0, 10, 2.0, 0.5, "step")
