"""The diffusion process: known alphas, predictions and their inverse, the library's own numbers."""

import importlib.util

import pytest
import torch
from torch import Tensor

from moectl.diffusion.process import GaussianDiffusion, betas

STEPS = [0, 1, 9, 99, 249, 499, 749, 998, 999]
ALPHAS = {
    "linear": [
        0.9999, 0.99978009207, 0.99810520479, 0.89701814567, 0.52408537383,
        0.078587242882, 3.3505504389e-3, 4.1181936381e-5, 4.0358297654e-5,
    ],
    "cosine": [
        0.99995871578, 0.99991257593, 0.99936871840, 0.97209273711, 0.84701216133,
        0.49384359044, 0.14427210239, 2.4287669070e-6, 2.4287669070e-9,
    ],
}  # fmt: skip


def draw(count: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 3, 4, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x0, noise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_alphas_have_the_known_answers(schedule):
    found = (1 - betas(schedule, 1000)).cumprod(0)[STEPS]
    expected = torch.tensor(ALPHAS[schedule], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=2e-9, atol=0)
    stored = GaussianDiffusion(schedule).alphas
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored[STEPS], expected.float())


@pytest.mark.parametrize(
    ("step", "image", "noised", "variance"),
    [
        (1, 0.545291500, 0.454708499, 5.45318766e-5),
        (500, 3.05805708e-3, 0.994104351, 1.00513358e-2),
        (999, 1.28351487e-4, 0.989948678, 1.99999835e-2),
    ],
)
def test_posterior_of_these_variances_has_the_known_answers(step, image, noised, variance):
    beta = betas("linear", 1000)
    alphas = (1 - beta).cumprod(0)
    rest = 1 - alphas[step]
    found = [
        alphas[step - 1].sqrt() * beta[step] / rest,
        (1 - beta[step]).sqrt() * (1 - alphas[step - 1]) / rest,
        beta[step] * (1 - alphas[step - 1]) / rest,
    ]
    assert [value.item() for value in found] == pytest.approx([image, noised, variance], rel=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_variances_lie_between_0_and_1_and_grow(schedule, steps):
    found = betas(schedule, steps)
    assert (found.shape, found.dtype) == ((steps,), torch.float64)
    assert found.min() > 0
    assert found.max() <= 0.999
    assert ((found.diff() > 0) | (found[1:] == 0.999)).all()


@pytest.mark.parametrize("steps", [100, 250, 1000])
def test_all_numbers_of_linear_steps_end_in_the_same_noise(steps):
    assert 1e-5 < (1 - betas("linear", steps)).prod() < 5e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noised_images_are_drawn_from_the_known_mixture(schedule):
    x0, noise = draw()
    alphas = torch.tensor(ALPHAS[schedule], dtype=torch.float64)[:, None, None, None]
    found = GaussianDiffusion(schedule).add_noise(x0, torch.tensor(STEPS), noise)
    expected = alphas**0.5 * x0 + (1 - alphas) ** 0.5 * noise
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_goes_in_step_after_step():
    generator = torch.Generator().manual_seed(0)
    process = GaussianDiffusion("linear", 20)
    pieces = torch.randn(20, 1, 4, generator=generator, dtype=torch.float64)
    x0 = x = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    left, mixed = 1.0, torch.zeros_like(x)
    for beta, piece in zip(betas("linear", 20).tolist(), pieces, strict=True):
        x = (1 - beta) ** 0.5 * x + beta**0.5 * piece
        mixed, left = (1 - beta) ** 0.5 * mixed + beta**0.5 * piece, left * (1 - beta)
    noise = mixed / (1 - left) ** 0.5
    found = process.add_noise(x0, torch.tensor([19]), noise)
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_undoes_noise_given_the_target(prediction, schedule):
    process = GaussianDiffusion(schedule, prediction=prediction)
    x0, noise = draw()
    t = torch.tensor(STEPS)
    x = process.add_noise(x0, t, noise)
    found = process.clean(x, t, process.target(x0, t, noise))
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)


def test_targets_are_the_noise_or_the_velocity():
    x0, noise = draw(2)
    t = torch.tensor([0, 499])
    assert torch.equal(GaussianDiffusion().target(x0, t, noise), noise)
    alphas = torch.tensor([0.9999, 0.078587242882], dtype=torch.float64)[:, None, None, None]
    found = GaussianDiffusion(prediction="v_prediction").target(x0, t, noise)
    expected = alphas.sqrt() * noise - (1 - alphas).sqrt() * x0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ratio_of_signal_and_noise_is_that_of_the_factors(schedule):
    process = GaussianDiffusion(schedule)
    t = torch.arange(1000)
    one, none = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    signal, rest = process.add_noise(one, t, none), process.add_noise(none, t, one)
    torch.testing.assert_close(signal**2 + rest**2, one, rtol=0, atol=1e-12)
    alphas = process.alphas.double()
    torch.testing.assert_close((signal / rest)[:, 0] ** 2, alphas / (1 - alphas))
    assert ((signal / rest)[:, 0].diff() < 0).all()


def test_half_images_still_get_the_noise_of_early_steps():
    process = GaussianDiffusion()
    x0, noise = draw(1, torch.bfloat16)
    found = process.add_noise(torch.zeros_like(x0), torch.tensor([0]), noise)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, noise / 100, rtol=0.02, atol=1e-4)


def test_each_image_has_its_own_step():
    process = GaussianDiffusion(prediction="v_prediction")
    x0, noise = draw(3)
    t = torch.tensor([5, 700, 20])
    for call in (process.add_noise, process.target, process.clean):
        together = call(x0, t, noise)
        for image in range(3):
            part = slice(image, image + 1)
            assert torch.equal(call(x0[part], t[part], noise[part]), together[part])


def test_alphas_are_not_saved_with_weights():
    assert GaussianDiffusion().state_dict() == {}


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="needs diffusers")
@pytest.mark.parametrize(
    ("schedule", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_process_is_that_of_diffusers(schedule, name):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    torch.testing.assert_close(betas(schedule, 1000).float(), theirs.betas)
    x0, noise = draw(9, torch.float32)
    t = torch.tensor(STEPS)
    ours = GaussianDiffusion(schedule, prediction="v_prediction")
    torch.testing.assert_close(ours.add_noise(x0, t, noise), theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(ours.target(x0, t, noise), theirs.get_velocity(x0, noise, t))
