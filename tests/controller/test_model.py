"""The network: widths, sizes, and what its code of a budget can tell apart."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.controller.model import BudgetEncoder, Controller, build

SMALL: dict[str, Any] = {
    "vision": 5, "language": 6, "budget": 8, "tiers": 3, "counts": 4, "optional": 7, "blocks": 9,
    "choices": 2, "hidden": 16,
}  # fmt: skip
RELEASED: dict[str, Any] = {
    "language": 2048, "budget": 2048, "tiers": 3, "counts": 5, "optional": 15, "blocks": 16,
    "choices": 5,
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vision, text = (torch.randn(batch, width, generator=generator) for width in (5, 6))
    return vision, text, 100 + 300 * torch.rand(batch, generator=generator)


@pytest.mark.parametrize(("scale", "varying", "alike"), [(1, 33, 0.994), (1000, 225, 0.277)])
def test_one_radian_hardly_tells_budgets_apart(scale: float, varying: int, alike: float) -> None:
    encoder = BudgetEncoder(width=4, scale=scale)
    codes = encoder.sinusoid(torch.linspace(50, 500, 1001))
    assert codes.shape == (1001, 256)
    assert int((codes.std(0) > 0.05).sum()) == varying
    low, high = encoder.sinusoid(torch.tensor([170.0, 380.0]))
    assert torch.cosine_similarity(low, high, dim=0).item() == pytest.approx(alike, abs=5e-4)


def test_budgets_are_spread_over_1000_radians_unless_told_otherwise() -> None:
    codes = [encoder.sinusoid(torch.tensor([333.0])) for encoder in (
        BudgetEncoder(width=4), BudgetEncoder(width=4, low=50, high=500, dim=256, scale=1000),
    )]  # fmt: skip
    assert torch.equal(*codes)


def test_sines_and_cosines_of_falling_rates_take_turns() -> None:
    encoder = BudgetEncoder(width=4, low=100, high=300, dim=6, scale=10)
    angles = [0.25 * 10 * 10000 ** (-2 * j / 6) for j in range(3)]
    expected = [wave(torch.tensor(angle)) for angle in angles for wave in (torch.sin, torch.cos)]
    torch.testing.assert_close(encoder.sinusoid(torch.tensor([150.0]))[0], torch.stack(expected))


@pytest.mark.parametrize("sinusoidal", [True, False])
def test_budgets_beyond_the_ends_are_coded_as_the_ends(sinusoidal: bool) -> None:
    encoder = BudgetEncoder(width=4, sinusoidal=sinusoidal)
    codes = encoder(torch.tensor([10.0, 50.0, 500.0, 9e9, 275.0]))
    assert codes.shape == (5, 4)
    torch.testing.assert_close(codes[0], codes[1])
    torch.testing.assert_close(codes[2], codes[3])
    assert not torch.allclose(codes[1], codes[2])
    assert not torch.allclose(codes[1], codes[4])


def test_without_sines_one_line_maps_the_place() -> None:
    encoder = BudgetEncoder(width=4, sinusoidal=False)
    low, middle, high = encoder(torch.tensor([50.0, 275.0, 500.0]))
    torch.testing.assert_close(middle, (low + high) / 2)
    assert parameters(encoder) == 8


def test_budgets_without_a_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"budgets from 50\.0 to 50\.0: expected a range"):
        BudgetEncoder(low=50.0, high=50.0)


@pytest.mark.parametrize(("vision", "count"), [(768, 1.537), (1024, 1.603), (2048, 1.865)])
def test_sizes_of_the_released_networks_controller(vision: int, count: float) -> None:
    controller = Controller(vision=vision, **RELEASED)
    assert parameters(controller.count_head) == 1285
    assert parameters(controller) / 1e6 == pytest.approx(count, abs=5e-4)
    projection, heads = 2048 * 256 + 3 * 256, 256 + 1
    expected = (
        vision * 256 + 3 * 256 + 2 * projection
        + 768 * 256 + 3 * 256 + 256 * 256 + 256
        + heads * (3 + 5 + 15 + 16 * 5)
    )  # fmt: skip
    assert parameters(controller) == expected


def test_size_of_the_budget_encoder() -> None:
    encoder = BudgetEncoder()
    assert parameters(encoder) == 257 * 2048 + 2049 * 2048 + 4 * 2048 == 4730880
    assert "rates" not in encoder.state_dict()


def test_scores_have_the_widths_of_the_choices() -> None:
    policy = build({"budget_encoder": {"width": 8}, "controller": SMALL})
    found = policy(*inputs())
    shapes = {name: tuple(logits.shape) for name, logits in found._asdict().items()}
    assert shapes == {"tier": (4, 3), "count": (4, 4), "blocks": (4, 7), "top_k": (4, 9, 2)}


def test_every_input_and_every_weight_matters() -> None:
    policy = build({"budget_encoder": {"width": 8}, "controller": SMALL | {"dropout": 0.0}})
    seen = [part.requires_grad_() for part in inputs()]
    weights = dict(policy.named_parameters()) | dict(zip("vtb", seen, strict=True))
    total = torch.stack([logits.square().sum() for logits in policy(*seen)]).sum()
    slopes = torch.autograd.grad(total, [*weights.values()])
    assert all(slope.any() for slope in slopes)


def test_samples_do_not_see_each_other() -> None:
    policy = build({"budget_encoder": {"width": 8}, "controller": SMALL}).eval()
    together = policy(*inputs())
    for row in range(4):
        alone = policy(*(part[row : row + 1] for part in inputs()))
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row], one[0])


def test_dropout_is_of_training_alone() -> None:
    policy = build({"budget_encoder": {"width": 8}, "controller": SMALL | {"dropout": 0.5}})
    assert not torch.equal(policy(*inputs()).tier, policy(*inputs()).tier)
    policy.eval()
    assert torch.equal(policy(*inputs()).tier, policy(*inputs()).tier)


def test_each_block_has_a_row_of_its_own() -> None:
    policy = build({"budget_encoder": {"width": 8}, "controller": SMALL}).eval()
    with torch.no_grad():
        policy.controller.top_k_head.weight.zero_()
        policy.controller.top_k_head.bias.copy_(torch.arange(18.0))
    assert policy(*inputs()).top_k[0].tolist() == [[2.0 * row, 2.0 * row + 1] for row in range(9)]


def test_features_are_measured_by_how_they_vary_over_questions() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"tiers": 3, "counts": 2, "optional": 4, "blocks": 5, "choices": 2, "hidden": 8}
    torch.manual_seed(0)
    controller = Controller(vision=3, language=2, budget=4, **sizes).eval()
    vision = torch.randn(50, 3, generator=generator) * 1e-4 + 7
    language = torch.randn(50, 2, generator=generator)
    language[:, 1] = 3  # says nothing
    codes = torch.zeros(50, 4)
    before = controller(vision, language, codes).tier.std(0)
    controller.standardise(vision, language)
    seen = controller(vision, language, codes)
    assert (seen.tier.std(0) > 2 * before).all()
    assert seen.tier.isfinite().all()
    assert {"vision_mean", "vision_std"} <= set(controller.state_dict())
