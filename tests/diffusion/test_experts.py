"""Experts with stacked weights: equal to plain modules, row by row, whichever way they are run."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.diffusion.experts import ExpertConv, ExpertNorm, Experts, groups_of

E, C, SIDES = 4, 8, (5, 4)
CHOSEN = torch.tensor([3, 0, 3, 1, 0, 3, 3])  # 2 has no rows
KINDS = [(True, "group"), (False, "group"), (True, "batch"), (False, "batch")]


class Plain(nn.Module):
    """One expert of PyTorch's own modules."""

    def __init__(self, separable: bool, norm: str, channels: int = C) -> None:
        super().__init__()
        self.separable = separable
        self.conv1, self.conv2 = self.conv(channels), self.conv(channels)
        if norm == "batch":
            self.norm1 = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)
            self.norm2 = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)
        else:
            self.norm1 = nn.GroupNorm(channels // 4, channels, eps=1e-5)
            self.norm2 = nn.GroupNorm(channels // 4, channels, eps=1e-5)

    def conv(self, channels: int) -> nn.Module:
        if not self.separable:
            return nn.Conv2d(channels, channels, 3, padding=1)
        deep = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        return nn.Sequential(deep, nn.Conv2d(channels, channels, 1, bias=False))

    def forward(self, row: Tensor, film: Tensor | None) -> Tensor:
        hidden = self.norm1(self.conv1(row))
        gate = torch.zeros(())
        if film is not None:
            scale, shift, gate = (film[None, i * C : (i + 1) * C, None, None] for i in range(3))
            hidden = hidden + scale * hidden + shift
        found = self.norm2(self.conv2(F.gelu(hidden)))
        return F.gelu(row + found + gate * found)


def pairs(stacked: Experts, one: Plain) -> list[tuple[Tensor, Tensor]]:
    """Parameters of all experts, beside those of a plain one."""
    found = []
    for name in ("conv1", "conv2"):
        own, plain = getattr(stacked, name), getattr(one, name)
        if stacked.conv1.separable:
            found += [(own.depthwise, plain[0].weight), (own.pointwise, plain[1].weight)]
        else:
            found += [(own.weight, plain.weight), (own.bias, plain.bias)]
    for name in ("norm1", "norm2"):
        own, plain = getattr(stacked, name), getattr(one, name)
        found += [(own.weight, plain.weight), (own.bias, plain.bias)]
    return found


def averages(stacked: Experts, one: Plain) -> list[tuple[Tensor, Tensor]]:
    norms = [(stacked.norm1, one.norm1), (stacked.norm2, one.norm2)]
    names = ("running_mean", "running_var")
    return [(getattr(own, name), getattr(plain, name)) for own, plain in norms for name in names]


def made(separable: bool, norm: str, count: int = E) -> Experts:
    """Experts in float64 of which no two numbers are alike."""
    torch.manual_seed(0)
    experts = Experts(count, C, separable=separable, norm=norm).double()
    for part in (experts.norm1, experts.norm2):
        nn.init.uniform_(part.weight, 0.5, 1.5)
        nn.init.normal_(part.bias)
        if norm == "batch":
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return experts


def plain(stacked: Experts, norm: str) -> list[Plain]:
    found = []
    for expert in range(stacked.count):
        one = Plain(stacked.conv1.separable, norm).double().train(stacked.training)
        both = pairs(stacked, one) + (averages(stacked, one) if norm == "batch" else [])
        with torch.no_grad():
            for own, other in both:
                other.copy_(own[expert].view_as(other))
        found.append(one)
    return found


def rows_and_film(count: int = len(CHOSEN)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, C, *SIDES, generator=generator, dtype=torch.float64)
    return rows, torch.randn(count, 3 * C, generator=generator, dtype=torch.float64)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["grouped", "stacked", "auto"])
@pytest.mark.parametrize("filmed", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("separable", "norm"), KINDS)
def test_all_ways_equal_a_loop_of_plain_modules(separable, norm, training, filmed, how):
    stacked = made(separable, norm).train(training)
    slow = plain(stacked, norm)
    rows, film = (value.requires_grad_() for value in rows_and_film())
    other, other_film = (value.detach().clone().requires_grad_() for value in (rows, film))

    found = stacked(rows, CHOSEN, film if filmed else None, how)
    expected = torch.cat(
        [
            slow[expert](other[row : row + 1], other_film[row] if filmed else None)
            for row, expert in enumerate(CHOSEN.tolist())
        ]
    )
    same(found, expected)

    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    same(rows.grad, other.grad)
    if filmed:
        same(film.grad, other_film.grad)
    for expert, one in enumerate(slow):
        for own, single in pairs(stacked, one):
            wanted = torch.zeros_like(single) if single.grad is None else single.grad
            same(own.grad[expert].view_as(wanted), wanted)
        if norm == "batch":
            for own, single in averages(stacked, one):
                same(own[expert], single)


@pytest.mark.parametrize("how", ["grouped", "stacked"])
@pytest.mark.parametrize(("separable", "norm"), KINDS)
def test_expert_without_rows_gets_a_zero_gradient(separable, norm, how):
    stacked = made(separable, norm)
    stacked(rows_and_film()[0], CHOSEN, None, how).square().sum().backward()
    for name, parameter in stacked.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad[2].any(), name
        assert all(parameter.grad[expert].any() for expert in (0, 1, 3)), name


def test_running_averages_move_row_after_row_by_a_tenth_of_unbiased_variances():
    norm = ExpertNorm(2, 1, "batch").double()
    rows = torch.tensor([[0.0, 2.0], [4.0, 10.0], [1.0, 1.0]], dtype=torch.float64)
    norm.each(rows.view(3, 1, 1, 2), torch.tensor([1, 1, 0]))
    # means 1 and 7, variances 2 and 18
    same(norm.running_mean[1], torch.tensor([0.9 * 0.1 + 0.7], dtype=torch.float64))
    same(norm.running_var[1], torch.tensor([0.9 * (0.9 + 0.2) + 1.8], dtype=torch.float64))
    same(norm.running_mean[0], torch.tensor([0.1], dtype=torch.float64))
    same(norm.running_var[0], torch.tensor([0.9], dtype=torch.float64))


def test_running_averages_stay_in_evaluation_and_need_no_gradient():
    norm = ExpertNorm(2, C, "batch").eval()
    norm.each(torch.randn(3, C, 4, 4), torch.tensor([0, 1, 1]))
    assert torch.equal(norm.running_mean, torch.zeros(2, C))
    norm.train().each(torch.randn(3, C, 4, 4, requires_grad=True), torch.tensor([0, 1, 1]))
    assert norm.running_mean.any()
    assert not norm.running_mean.requires_grad


def test_running_averages_stay_float32_when_rows_are_half():
    norm = ExpertNorm(2, C, "batch")
    norm.one(torch.randn(3, C, 4, 4).bfloat16(), 1)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.running_mean[1].any()
    assert not norm.running_mean[0].any()


@pytest.mark.parametrize("how", ["grouped", "stacked"])
@pytest.mark.parametrize(("separable", "norm"), KINDS)
def test_renumbered_experts_say_the_same(separable, norm, how):
    stacked, renumbered = made(separable, norm), made(separable, norm)
    order = torch.tensor([2, 0, 3, 1])  # new number -> old number
    renumbered.load_state_dict({name: v[order] for name, v in stacked.state_dict().items()})
    rows, film = rows_and_film()
    same(renumbered(rows, order.argsort()[CHOSEN], film, how), stacked(rows, CHOSEN, film, how))
    for name, value in renumbered.state_dict().items():
        same(value, stacked.state_dict()[name][order])


@pytest.mark.parametrize("how", ["grouped", "stacked"])
@pytest.mark.parametrize(("separable", "norm"), KINDS)
def test_row_alone_equals_the_row_among_others(separable, norm, how):
    stacked = made(separable, norm)
    rows, film = rows_and_film()
    together = stacked(rows, CHOSEN, film, how)
    for row in range(len(rows)):
        part = slice(row, row + 1)
        same(stacked(rows[part], CHOSEN[part], film[part], how), together[part])


@pytest.mark.parametrize("separable", [True, False])
def test_shuffled_rows_stay_with_their_experts(separable):
    stacked = made(separable, "group")
    rows, film = rows_and_film()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    found = stacked(rows[order], CHOSEN[order], film[order], "grouped")
    same(found, stacked(rows, CHOSEN, film, "stacked")[order])


@pytest.mark.parametrize("separable", [True, False])
def test_memory_layout_of_the_rows_does_not_matter(separable):
    stacked = made(separable, "group")
    rows, film = rows_and_film()
    for count in (1, len(rows)):
        last = rows[:count].to(memory_format=torch.channels_last)
        for how in ("grouped", "stacked"):
            found = stacked(last, CHOSEN[:count], film[:count], how)
            same(found, stacked(rows[:count], CHOSEN[:count], film[:count], how))


def test_one_image_of_one_pixel_is_normalised_over_its_groups():
    stacked = made(True, "group")
    rows = torch.randn(3, C, 1, 1, dtype=torch.float64)
    chosen = torch.tensor([0, 1, 1])
    same(stacked(rows, chosen, None, "grouped"), stacked(rows, chosen, None, "stacked"))


def test_films_of_zeros_change_nothing():
    stacked = made(True, "group")
    rows, film = rows_and_film()
    assert torch.equal(stacked(rows, CHOSEN, torch.zeros_like(film)), stacked(rows, CHOSEN))


@pytest.mark.parametrize(("rows", "grouped"), [(4 * E, False), (4 * E + 1, True)])
def test_cpus_group_the_rows_where_there_are_many(monkeypatch, rows, grouped):
    stacked = made(True, "group")
    called = []
    own = stacked._grouped
    monkeypatch.setattr(stacked, "_grouped", lambda *v: called.append(1) or own(*v))
    stacked(torch.randn(rows, C, 2, 2, dtype=torch.float64), torch.arange(rows) % E)
    assert bool(called) is grouped


def test_weights_start_as_those_of_plain_convolutions():
    torch.manual_seed(0)
    separable, dense = ExpertConv(16, 64, separable=True), ExpertConv(4, 16, separable=False)
    bounds = [(separable.depthwise, 1 / 3), (separable.pointwise, 1 / 8)]
    bounds += [(dense.weight, 1 / 12), (dense.bias, 1 / 12)]
    for weight, bound in bounds:
        assert 0.9 * bound < weight.abs().max() <= bound
        assert abs(weight.mean().item()) < 0.1 * bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (8, 2), (24, 6), (64, 16), (128, 32), (1024, 32), (10, 2), (200, 8)],
)
def test_groups_divide_the_channels(channels, groups):
    assert groups_of(channels) == groups
    assert channels % groups == 0


@pytest.mark.parametrize(("separable", "parameters"), [(True, 8 * 35_072), (False, 8 * 295_168)])
def test_sizes_of_128_channels(separable, parameters):
    with torch.device("meta"):
        experts = Experts(8, 128, separable=separable, norm="batch")
    assert sum(p.numel() for p in experts.parameters()) == parameters + 8 * 4 * 128
    assert sum(b.numel() for b in experts.buffers()) == 8 * 4 * 128


def test_weights_that_would_fill_the_memory_are_not_gathered(monkeypatch):
    from moectl.diffusion import experts

    stacked, rows = made(True, "group"), torch.randn(2, C, 2, 2, dtype=torch.float64)
    called: list[int] = []
    device = rows.new_empty(2, C, 2, 2, device="meta")
    one = sum(weights[0].numel() for weights in stacked.parameters())
    for most, grouped in ((2 * one, False), (2 * one - 1, True)):
        monkeypatch.setattr(experts, "_LARGEST", most)
        called.clear()
        monkeypatch.setattr(stacked, "_run", lambda *_: device)
        monkeypatch.setattr(stacked, "_grouped", lambda *_: called.append(1))
        stacked(device, torch.zeros(2, dtype=torch.int64))
        assert bool(called) is grouped
