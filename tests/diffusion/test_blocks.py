"""Blocks: answers of routers and embeddings, mixtures and dilated fusion by plain references."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.diffusion.blocks import (
    DilatedBlock,
    Form,
    MixtureBlock,
    Router,
    TimeEmbedding,
    block,
    convolution,
    sinusoid,
)

B, E, TIME, LABEL = 5, 4, 6, 4


def form(**options) -> Form:
    plain = {"num_experts": E, "k_active": 2, "separable": True, "norm": "group", "film": False}
    return Form(**{**plain, "time": TIME, "label": LABEL, **options})


def made(kind, *values) -> nn.Module:
    """A part in float64 whose start of zeros is broken."""
    torch.manual_seed(0)
    part = kind(*values).double()
    for parameter in part.parameters():
        if not parameter.any() or (parameter == 1).all():
            nn.init.normal_(parameter)
    return part


def inputs(channels: int = 3, sides: tuple[int, int] = (6, 5)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, channels, *sides), (B, TIME), (B, LABEL)]
    x, time, label = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, time, label


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_two_of_four_logits_give_the_known_weights():
    mixture = made(MixtureBlock, 3, 8, form())
    mixture.router = Fixed(torch.tensor([0.1, 0.9, -0.3, 0.5], dtype=torch.float64))
    mixture.experts = Echo()
    found, logits = mixture(*inputs())
    assert mixture.experts.chosen.tolist() == [1, 3] * B
    weights = found[:, 0, 0, 0] - 1, 2 - found[:, 0, 0, 0]  # of the second, of the first
    torch.testing.assert_close(weights[1], torch.full_like(weights[1], 0.59868765))
    torch.testing.assert_close(weights[0], torch.full_like(weights[0], 0.40131232))
    assert logits.shape == (B, E)


class Fixed(nn.Module):
    """A router that says the same of every image."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor, *_) -> Tensor:
        return self.logits.expand(len(x), -1)


class Echo(nn.Module):
    """Experts of which the first chosen says 1 and the second 2."""

    def forward(self, rows: Tensor, chosen: Tensor, *_) -> Tensor:
        self.chosen = chosen
        said = torch.arange(len(rows)).remainder(2) + 1
        return said.to(rows)[:, None, None, None].expand_as(rows)


@pytest.mark.parametrize("dispatch", ["grouped", "stacked"])
@pytest.mark.parametrize("filmed", [False, True])
@pytest.mark.parametrize("k_active", [1, 2, 4])
def test_mixture_is_the_sum_of_all_experts_with_weight_0_for_those_not_chosen(
    k_active, filmed, dispatch
):
    own = form(k_active=k_active, film=filmed, dispatch=dispatch)
    mixture = made(MixtureBlock, 3, 8, own)
    x, time, label = inputs()
    found, logits = mixture(x, time, label)

    rows = mixture.proj(x)
    width = torch.cat([rows.mean((2, 3)), time, label], 1)
    first, _, second = mixture.router.mlp
    expected_logits = F.linear(
        F.gelu(F.linear(width, first.weight, first.bias)), second.weight, second.bias
    )
    same(logits, expected_logits)
    film = None
    if filmed:
        film = F.gelu(torch.cat([time, label], 1)) @ mixture.film.weight.T + mixture.film.bias
    kept = logits >= logits.sort(1, descending=True).values[:, k_active - 1 : k_active]
    weights = torch.where(kept, logits, -torch.inf).softmax(1)
    assert (weights > 0).sum(1).tolist() == [k_active] * B
    expected = torch.zeros_like(found)
    for expert in range(E):
        said = mixture.experts(rows, torch.full((B,), expert), film, "stacked")
        expected += weights[:, expert, None, None, None] * said
    same(found, expected)


def test_logits_get_a_gradient_through_the_weights_of_the_chosen():
    mixture = made(MixtureBlock, 3, 8, form())
    found, logits = mixture(*inputs())
    (gradient,) = torch.autograd.grad(found.square().sum(), logits)
    chosen = torch.zeros_like(gradient).scatter_(1, logits.topk(2).indices, 1)
    assert ((gradient != 0) == chosen.bool()).all()
    same(gradient.sum(1), torch.zeros(B, dtype=torch.float64))


@pytest.mark.parametrize("experts", [E, 0])
@pytest.mark.parametrize("separable", [True, False])
def test_film_changes_nothing_at_its_start(experts, separable):
    torch.manual_seed(0)
    with_film = block(3, 8, form(num_experts=experts, separable=separable, film=True)).double()
    without = block(3, 8, form(num_experts=experts, separable=separable)).double()
    left = without.load_state_dict(with_film.state_dict(), strict=False)
    assert left.missing_keys == []
    assert sorted(left.unexpected_keys) == ["film.bias", "film.weight"]
    found, logits = with_film(*inputs())
    expected, expected_logits = without(*inputs())
    assert torch.equal(found, expected)
    assert (logits is None) is (expected_logits is None) is (experts == 0)


@pytest.mark.parametrize("experts", [E, 0])
def test_film_lets_time_and_class_reach_the_features(experts):
    part = made(block, 3, 8, form(num_experts=experts, film=True))
    if experts:
        nn.init.zeros_(part.router.mlp[2].weight)  # the same experts whatever time and class
    x, time, label = inputs()
    found = part(x, time, label)[0]
    assert not torch.allclose(part(x, time + 1, label)[0], found)
    assert not torch.allclose(part(x, time, label + 1)[0], found)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("filmed", [False, True])
@pytest.mark.parametrize("separable", [True, False])
def test_dilated_block_equals_a_plain_reference(separable, filmed, norm):
    part = made(
        DilatedBlock, 3, 8, form(num_experts=0, separable=separable, film=filmed, norm=norm)
    )
    x, time, label = inputs(sides=(9, 8))
    found, logits = part(x, time, label)
    assert logits is None

    rows = part.proj(x)
    said = []
    for branch, dilation in zip(part.branches, (1, 2, 4), strict=True):
        layers = [branch[0], branch[1]] if separable else [branch]
        wide = F.pad(rows, [dilation] * 4)
        groups = 8 if separable else 1
        out = F.conv2d(wide, layers[0].weight, layers[0].bias, dilation=dilation, groups=groups)
        if separable:
            assert layers[0].bias is layers[1].bias is None
            out = torch.einsum("oi,bihw->bohw", layers[1].weight[:, :, 0, 0], out)
        said.append(out)
    weight, bias = part.fuse.weight[:, :, 0, 0], part.fuse.bias
    fused = torch.einsum("oi,bihw->bohw", weight, torch.cat(said, 1)) + bias[:, None, None]
    scale = shift = gate = torch.zeros(())
    if filmed:
        film = F.gelu(torch.cat([time, label], 1)) @ part.film.weight.T + part.film.bias
        scale, shift, gate = (film[:, i * 8 : i * 8 + 8, None, None] for i in range(3))
    mixed = rows + fused + gate * fused
    if norm == "batch":
        mean, variance = mixed.mean((0, 2, 3)), mixed.var((0, 2, 3), unbiased=False)
        mean, variance = mean[None, :, None, None], variance[None, :, None, None]
    else:
        pairs = mixed.unflatten(1, (2, 4))
        mean = pairs.mean((2, 3, 4)).repeat_interleave(4, 1)[:, :, None, None]
        variance = pairs.var((2, 3, 4), unbiased=False).repeat_interleave(4, 1)[:, :, None, None]
    normed = (mixed - mean) / (variance + 1e-5).sqrt()
    normed = normed * part.norm.weight[:, None, None] + part.norm.bias[:, None, None]
    same(found, F.gelu(normed * (1 + scale) + shift))


@pytest.mark.parametrize(
    ("experts", "kind"), [(4, MixtureBlock), (1, MixtureBlock), (0, DilatedBlock)]
)
def test_block_without_experts_is_dilated(experts, kind):
    assert isinstance(block(3, 8, form(num_experts=experts, k_active=1)), kind)


@pytest.mark.parametrize(("separable", "size"), [(True, 9 * 3 + 3 * 8), (False, 9 * 3 * 8 + 8)])
def test_convolutions_have_a_bias_only_where_dense(separable, size):
    part = convolution(3, 8, separable=separable, dilation=2)
    assert sum(p.numel() for p in part.parameters()) == size
    assert part(torch.zeros(1, 3, 5, 7)).shape == (1, 8, 5, 7)


def test_router_stays_float32_under_autocast():
    torch.manual_seed(0)
    router = Router(8, form())
    x, time, label = (value.float() for value in inputs(8))
    expected = router(x, time, label)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x, time, label)
        half = router(x.bfloat16(), time.bfloat16(), label.bfloat16())
    assert found.dtype == half.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(half, half.bfloat16().float())


@pytest.mark.parametrize("dispatch", ["grouped", "stacked"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("filmed", [False, True])
def test_mixture_runs_under_autocast(filmed, norm, dispatch):
    torch.manual_seed(0)
    mixture = MixtureBlock(3, 8, form(film=filmed, norm=norm, dispatch=dispatch))
    values = [value.float() for value in inputs()]
    expected, _ = mixture(*values)
    with torch.autocast("cpu", torch.bfloat16):
        found, logits = mixture(*values)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    (found.float().sum() + logits.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixture.parameters())


def test_sinusoid_has_the_known_answer():
    found = sinusoid(torch.tensor([10, 0]), 8)
    known = [-0.8390715, 0.5403023, 0.9950042, 0.9999500]
    known += [-0.5440211, 0.8414710, 0.0998334, 0.0099998]
    expected = torch.tensor([known, [1.0] * 4 + [0.0] * 4])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sinusoid_of_late_steps_keeps_its_digits():
    found = sinusoid(torch.tensor([999]), 512)[0]
    angles = [999 * 10_000 ** (-j / 256) for j in range(256)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-4)


def test_time_embedding_is_two_layers_over_the_sinusoid():
    torch.manual_seed(0)
    embedding = TimeEmbedding(8)
    assert [tuple(p.shape) for p in embedding.parameters()] == [(32, 8), (32,), (8, 32), (8,)]
    steps = torch.tensor([0, 10, 999])
    first, _, second = embedding.mlp
    hidden = F.gelu(sinusoid(steps, 8) @ first.weight.T + first.bias)
    torch.testing.assert_close(embedding(steps), hidden @ second.weight.T + second.bias)


def test_time_embedding_takes_the_precision_of_its_weights():
    assert TimeEmbedding(8).double()(torch.tensor([3])).dtype == torch.float64
