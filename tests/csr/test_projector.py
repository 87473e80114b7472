"""Known answers of the projector."""

import torch

from moectl.csr.projector import HalfNorm


def test_half_of_the_channels_are_normalised_alone():
    norm = HalfNorm(7)
    x = 3 + 5 * torch.rand(4, 7, 2, 2, generator=torch.Generator().manual_seed(0))
    found = norm(x)
    own, batch = found[:, :3], found[:, 3:]
    assert torch.allclose(own.mean(1), torch.zeros(4, 2, 2), atol=1e-5)
    assert torch.allclose(batch.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    alone = norm.eval()(x[1:2, :, :1, :1])
    assert torch.allclose(alone[:, :3], own[1:2, :, :1, :1], atol=1e-5)
