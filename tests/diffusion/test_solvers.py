"""Solvers against an exact score, and guidance against its formula.

A Gaussian has a known score and the solvers are linear in it, so that even the moments of noisy
samplers are exact.
"""

import pytest
import torch
from torch import nn

from moectl.diffusion.process import GaussianDiffusion
from moectl.diffusion.solvers import denoise, first_noise, guided, times

SAMPLERS = ["ddpm", "ddim", "dpmpp", "unipc"]
MEAN, SPREAD = 0.3, 0.5
START = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5], dtype=torch.float64).view(5, 1, 1, 1)
END = torch.tensor([-0.450964288, 0.049043279, 0.299047063, 0.549050847, 1.049058414]).double()


def exact(diffusion):
    """Predict as a network would that knows the distribution: normal, of that mean and spread."""
    table = (1 - diffusion.betas).cumprod(0)

    def predict(x, t):
        assert t.dtype == torch.int64
        assert t.shape == x.shape[:1]
        alpha = table[t].view(-1, 1, 1, 1)
        signal, rest = alpha.sqrt(), (1 - alpha).sqrt()
        noise = rest * (x - signal * MEAN) / (alpha * SPREAD**2 + rest**2)
        x0 = (x - rest * noise) / signal
        return noise if diffusion.prediction == "epsilon" else signal * noise - rest * x0

    return predict


def solve(sampler, steps, diffusion=None, start=START, **options):
    diffusion = diffusion or GaussianDiffusion()
    words = {"sampler": sampler, "steps": steps, "clip": False} | options
    return denoise(exact(diffusion), diffusion, start, range(len(start)), **words)


def error(*words, **options):
    return (solve(*words, **options).flatten() - END).abs().max().item()


class Told(nn.Module):
    """A network of two classes and none, that says what it was asked; class c predicts c + 1."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, t, c):
        self.asked.append((x, t, c))
        return (c.view(-1, 1, 1, 1) + 1) * x, []


# The exact score


@pytest.mark.parametrize(
    ("steps", "known"),
    [(10, 0.1953), (20, 0.1031), (50, 0.04296), (100, 0.02187), (250, 0.008894)],
)
def test_ddim_has_the_known_errors(steps, known):
    assert error("ddim", steps) == pytest.approx(known, rel=4e-4)


@pytest.mark.parametrize(("steps", "known"), [(10, 0.1430), (20, 0.03274), (50, 8.16e-4)])
def test_second_order_dpm_solver_has_the_known_errors(steps, known):
    assert error("dpmpp", steps) == pytest.approx(known, rel=1e-3)


def test_ddim_in_ten_steps_has_the_known_result():
    known = [-0.255637290, 0.114317519, 0.299294923, 0.484272328, 0.854227137]
    assert solve("ddim", 10).flatten().tolist() == pytest.approx(known, abs=1e-9)


def test_unipc_is_of_second_order():
    errors = [error("unipc", steps) for steps in (10, 20, 40)]
    assert errors[0] / errors[1] > 3.5
    assert errors[1] / errors[2] > 3.5


@pytest.mark.parametrize("steps", [30, 61, 75, 150, 400, 501])
def test_ddim_is_of_first_order_for_any_number_of_steps(steps):
    assert error("ddim", steps) * steps == pytest.approx(2.2, rel=0.06)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "unipc"])
def test_all_steps_reach_the_end_on_either_schedule(sampler, schedule):
    found = solve(sampler, 1000, GaussianDiffusion(schedule)).flatten()
    middle = found[2].item()
    assert middle == pytest.approx(MEAN, abs=1.5e-3)
    assert (found - middle).tolist() == pytest.approx([-0.75, -0.25, 0, 0.25, 0.75], abs=4e-3)


def test_one_step_goes_to_the_predicted_image():
    diffusion = GaussianDiffusion("cosine")
    alpha = (1 - diffusion.betas).cumprod(0)[-1]
    noise = exact(diffusion)(START, torch.full((5,), 999))
    expected = (START - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    for sampler in SAMPLERS:
        found = solve(sampler, 1, diffusion)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.fixture
def unit_noise(monkeypatch):
    """At step j the noise is 1 for image j and 0 for the others."""
    import diffusers.schedulers.scheduling_ddim as ddim
    import diffusers.schedulers.scheduling_ddpm as ddpm

    def one_hot(shape, **_):
        found = torch.zeros(shape, dtype=torch.float64)
        found[calls.pop()] = 1
        return found

    calls: list[int] = []
    for module in (ddim, ddpm):
        monkeypatch.setattr(module, "randn_tensor", one_hot)
    return calls


def moments(unit_noise, sampler, steps, eta=0.0):
    """Return mean and variance of what comes of normal noise: every share of it, one by one."""
    unit_noise[:] = range(steps - 1, -1, -1)
    start = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    start[-1] = 1
    found = solve(sampler, steps, start=start, eta=eta).flatten()
    base = found[-2]  # no noise at all
    return base.item(), (found - base).square().sum().item()


@pytest.mark.parametrize(
    ("sampler", "eta", "steps", "known"),
    [
        ("ddpm", 0, 1000, 0.24612521),
        ("ddpm", 0, 50, 0.197225),
        ("ddim", 0, 10, 0.136867),
        ("ddim", 0, 50, 0.222220),
        ("ddim", 0, 250, 0.244120),
        ("ddim", 0, 1000, 0.248498),
        ("ddim", 1, 10, 0.111206),
        ("ddim", 1, 50, 0.197225),
        ("ddim", 1, 250, 0.236004),
        ("ddim", 1, 1000, 0.246125),
    ],
)
def test_samples_have_the_known_moments(unit_noise, sampler, eta, steps, known):
    mean, variance = moments(unit_noise, sampler, steps, eta)
    assert variance == pytest.approx(known, abs=6e-7)
    if sampler == "ddpm":
        assert mean == pytest.approx(0.29999697, abs=1e-8)


def test_noise_of_the_samplers_is_normal():
    start = first_noise(range(16), 32).double()
    for options in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}):
        found = solve(**options, steps=50, start=start)
        assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert found.var().item() == pytest.approx(0.197225, abs=0.006)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [20, 7])
def test_ddim_with_all_its_noise_is_ddpm(clip, steps):
    diffusion, start = GaussianDiffusion(steps=20), first_noise(range(4), 4).double() * 2
    one, other = (
        solve(sampler, steps, diffusion, start, eta=1.0, clip=clip) for sampler in ("ddpm", "ddim")
    )
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_velocity_and_noise_lead_to_the_same_images(sampler):
    start = first_noise(range(4), 4).double()
    one, other = (
        solve(sampler, 12, GaussianDiffusion(prediction=kind), start, eta=0.5, clip=True)
        for kind in ("epsilon", "v_prediction")
    )
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


# Steps and clipping


@pytest.mark.parametrize(
    ("total", "steps", "known"),
    [(1000, 10, list(range(999, 0, -100))), (10, 3, [9, 6, 2]), (4, 4, [3, 2, 1, 0]), (9, 1, [8])],
)
def test_steps_are_spread_evenly_from_the_last_one(total, steps, known):
    assert times(total, steps) == known


@pytest.mark.parametrize("total", [2, 7, 100, 1000])
def test_steps_are_as_many_as_wanted_and_never_below_zero(total):
    for steps in range(1, total + 1):
        found = times(total, steps)
        assert len(set(found)) == steps
        assert found == sorted(found, reverse=True)
        assert found[0] == total - 1
        assert found[-1] >= 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 29, 31])
def test_network_is_asked_once_a_step(sampler, steps):
    asked, done = [], []

    def predict(x, t):
        asked.append(t.tolist())
        return x

    denoise(
        predict, GaussianDiffusion(steps=100), START, range(5), sampler=sampler, steps=steps,
        advance=lambda: done.append(len(asked)),
    )  # fmt: skip
    assert asked == [[time] * 5 for time in times(100, steps)]
    assert done == list(range(1, steps + 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clipped_images_are_within_minus_one_and_one(sampler, prediction):
    diffusion = GaussianDiffusion(steps=50, prediction=prediction)
    start = first_noise(range(4), 4).double()
    found = {
        clip: denoise(
            lambda x, _: 3 * x.flip(3) - 1, diffusion, start, range(4), sampler=sampler, steps=9,
            clip=clip,
        )
        for clip in (True, False)
    }  # fmt: skip
    assert found[True].abs().max() <= 1 + 1e-6
    assert found[False].abs().max() > 1.5


def gentle(steps):
    """A process that stops long before all is noise."""
    found = GaussianDiffusion(steps=steps)
    found.betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    found.alphas = (1 - found.betas).cumprod(0).float()
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_cuts_off_and_does_not_scale(sampler):
    diffusion, start = gentle(20), first_noise(range(2), 4).double()
    predicted = start.flip(3)
    found = denoise(
        lambda *_: predicted, diffusion, start, range(2), sampler=sampler, steps=1, clip=True
    )
    alpha = (1 - diffusion.betas).prod()
    x0 = (start - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
    assert 0.2 < (x0.abs() > 1).double().mean() < 0.8
    torch.testing.assert_close(found, x0.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_goes_on_with_the_noise_that_leads_to_the_clipped_image(eta):
    diffusion = gentle(10)
    first, last = (1 - diffusion.betas).cumprod(0)[[9, 4]]

    def predict(x, t):
        return torch.full_like(x, -4.0 if t[0] == 9 else 0.1)

    start = first_noise(range(5), 3).double()
    found = denoise(
        predict, diffusion, start, range(5), sampler="ddim", steps=2, eta=eta, clip=True
    )
    x0 = ((start + (1 - first).sqrt() * 4) / first.sqrt()).clamp(-1, 1)
    noise = (start - first.sqrt() * x0) / (1 - first).sqrt()
    sigma = eta * ((1 - last) / (1 - first) * (1 - first / last)).sqrt()
    middle = last.sqrt() * x0 + (1 - last - sigma**2).sqrt() * noise
    random = (found * last.sqrt() + (1 - last).sqrt() * 0.1 - middle)[found.abs() < 1]
    assert len(random) > 10
    if eta:
        assert (random / sigma).std().item() == pytest.approx(1, abs=0.2)
    else:
        assert random.abs().max() < 1e-12


# Guidance


@pytest.mark.parametrize(("scale", "expected"), [(1.0, [0, 1]), (0.0, [2, 2])])
def test_no_guidance_and_no_class_ask_once(scale, expected):
    model, x, t = Told(), torch.randn(2, 3, 4, 4), torch.tensor([5, 5])
    found = guided(model, torch.tensor([0, 1]), scale)(x, t)
    ((asked_x, asked_t, classes),) = model.asked
    assert asked_x is x
    assert asked_t is t
    assert classes.tolist() == expected
    assert torch.equal(found, (classes.view(-1, 1, 1, 1) + 1) * x)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guidance_follows_the_formula_and_asks_both_halves_at_once(scale):
    model, x, t = Told(), torch.randn(2, 3, 4, 4).double(), torch.tensor([5, 7])
    found = guided(model, torch.tensor([0, 1]), scale)(x, t)
    ((asked, times_, classes),) = model.asked
    assert torch.equal(asked, torch.cat([x, x]))
    assert times_.tolist() == [5, 7, 5, 7]
    assert sorted(classes.tolist()) == [0, 1, 2, 2]
    given = torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1) * x
    torch.testing.assert_close(found, 3 * x + scale * (given - 3 * x), atol=1e-12, rtol=0)


def test_guidance_subtracts_in_full_precision():
    class Coarse(Told):
        def forward(self, x, _, c):
            steps = torch.tensor([1.0, 1.0078125, 1.015625])  # what bfloat16 holds
            return steps[c].view(-1, 1, 1, 1).expand_as(x).bfloat16(), []

    x = torch.zeros(1, 3, 2, 2)
    found = guided(Coarse(), torch.tensor([0]), 1.5)(x, torch.tensor([1]))
    assert (found == 1.015625 - 1.5 * 0.015625).all()
    assert found.dtype == torch.float32


# Seeds


def test_other_seeds_begin_and_go_on_with_other_noise():
    assert not torch.equal(*first_noise([1, 2], 4))
    assert torch.equal(*first_noise([1, 1], 4))
    start = first_noise([1], 4).double().expand(2, -1, -1, -1)
    for options in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}):
        words = {"steps": 5, "clip": False, **options}
        one, other = denoise(exact(d := GaussianDiffusion()), d, start, [1, 2], **words)
        assert not torch.allclose(one, other)
        one, other = denoise(exact(d), d, start, [1, 1], **words)
        assert torch.equal(one, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_noise_of_the_steps_is_not_that_of_the_start_again(monkeypatch, sampler):
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    def keep(*words, **options):
        drawn.append(draw(*words, **options))
        return drawn[-1]

    drawn, draw = [], scheduling_ddpm.randn_tensor
    for module in (scheduling_ddim, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", keep)
    start = first_noise(range(3), 4)
    denoise(lambda x, _: x, GaussianDiffusion(), start, range(3), sampler=sampler, steps=4, eta=1.0)
    every = [one for noise in [start, *drawn] for one in noise]
    assert len(every) >= 12
    assert len({one.sum().item() for one in every}) == len(every)
