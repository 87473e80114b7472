"""A seed for every image: whatever is made beside it, and wherever."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moectl.diffusion.model import UNet
from moectl.diffusion.process import GaussianDiffusion
from moectl.diffusion.settings import SampleSection
from moectl.diffusion.solvers import denoise, first_noise, generate, guided

SAMPLERS = ["ddpm", "ddim", "dpmpp", "unipc"]


def network(classes=3):
    """A small network whose weights are all of them other than nothing, in float64."""
    model = UNet(
        model_channels=8, channel_mults=(1, 2), time_dim=8, class_dim=8, num_classes=classes,
        num_experts=3,
    ).double().eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for weights in model.parameters():
        noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        weights.data = noise * 0.2
    return model


class Wide(nn.Module):
    """A network that computes in float64, for rounding not to hide anything."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.model = network()

    def forward(self, x, t, c):
        return self.model(x.double(), t, c)


WIDE = Wide()


def machine(rank=0, world=1):
    return SimpleNamespace(
        process_index=rank, num_processes=world, device=torch.device("cpu"), autocast=nullcontext
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_image_does_not_depend_on_those_beside_it(sampler, scale):
    model, diffusion, seeds = WIDE.model, GaussianDiffusion(steps=20), list(range(7, 12))
    labels = torch.tensor([0, 1, 2, 0, 3])

    def made(rows):
        own = [seeds[row] for row in rows]
        ask = guided(model, labels[rows], scale)
        noise = first_noise(own, 8).double()
        return denoise(ask, diffusion, noise, own, sampler=sampler, steps=6, eta=0.7)

    whole = made([0, 1, 2, 3, 4])
    for rows in ([0], [4], [1, 2], [3, 0]):
        torch.testing.assert_close(made(rows), whole[rows], atol=1e-10, rtol=0)


def made(batch=3, ranks=((0, 1),), labels=(0, 1, 2, 0, 1, 2, 3), first=4, **values):
    section = SampleSection(**{"sampler": "dpmpp", "steps": 4, "batch_size": batch} | values)
    diffusion, seeds = GaussianDiffusion(steps=20), range(first, first + len(labels))
    # Far from noise alone, where a random network would only ever be clipped.
    diffusion.betas = torch.linspace(1e-4, 0.02, 20, dtype=torch.float64)
    return [
        generate(WIDE, diffusion, machine(*rank), torch.tensor(labels), seeds, section, 8)
        for rank in ranks
    ]


@pytest.mark.parametrize("values", [{}, {"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}])
def test_processes_share_the_images(values):
    (whole,) = made(**values)
    assert whole.shape == (7, 3, 8, 8)
    assert whole.dtype == torch.float32
    for world, batch in [(2, 3), (3, 1), (2, 64)]:
        parts = made(batch, [(rank, world) for rank in range(world)], **values)
        for rank, part in enumerate(parts):
            torch.testing.assert_close(part, whole[rank::world], atol=1e-6, rtol=0)
    assert made(ranks=[(8, 9)])[0].shape == (0, 3, 8, 8)


def test_settings_of_a_sample_reach_the_solver():
    (base,) = made()
    for values in (
        {"sampler": "unipc"}, {"steps": 5}, {"guidance": 2.0}, {"guidance": 0.0}, {"first": 5},
        {"labels": (1, 2, 0, 1, 2, 0, 0)},
    ):  # fmt: skip
        (other,) = made(**values)
        pairs = zip(base[:6], other, strict=False)  # the last one is of no class anyway
        assert all((one - two).abs().max() > 1e-6 for one, two in pairs), values
    (still,), (noisy,) = made(sampler="ddim"), made(sampler="ddim", eta=1.0)
    assert (still - noisy).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_generator_is_left_alone(sampler):
    before = torch.get_rng_state()
    made(sampler=sampler)
    assert torch.equal(torch.get_rng_state(), before)
