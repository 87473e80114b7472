"""What a network's loss is at each step of the process, on held-out images.

Letters: N images, B of them at a time, T diffusion steps, J buckets of steps.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moectl.diffusion.process import GaussianDiffusion
from moectl.engine.launch import gather_rows
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from moectl.engine.sources import Source

BUCKETS = 10
_GOLDEN = (math.sqrt(5) - 1) / 2


def step_of(index: int, steps: int) -> int:
    """Return the step at which an image is measured: any run of images covers all steps evenly."""
    return int(((index + 0.5) * _GOLDEN % 1) * steps)


@torch.no_grad()
def noise_errors(  # noqa: PLR0913 - what a measurement is made of
    model: "nn.Module",
    diffusion: GaussianDiffusion,
    source: "Source",
    accelerator: "Accelerator",
    *,
    batch_size: int,
    limit: int = 0,
) -> tuple[Tensor, Tensor]:
    """Noise each image at its own step and compare what is predicted with that noise.

    An image's step and noise follow from its place alone, so two networks are compared on equals.

    Args:
        model: in evaluation mode.
        diffusion: the process.
        source: the images.
        accelerator: devices and processes, over which the images are dealt.
        batch_size: images per forward pass.
        limit: about how many images; 0 takes all.

    Returns:
        (N,) the steps, and (N,) the mean squared errors of the noise.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    rows, done = [], 0
    for images, labels in source.ordered(batch_size, device, rank, world):
        places = [rank + world * (done + row) for row in range(len(images))]
        done += len(images)
        t = torch.tensor([step_of(place, diffusion.steps) for place in places]).to(device)
        noise = torch.stack([_noise(place, images.shape[1:]) for place in places]).to(device)
        x = diffusion.add_noise(images, t, noise)
        with accelerator.autocast():
            predicted = model(x, t, labels)[0]
        found = diffusion.noise(x, t, predicted.float())
        rows.append(torch.stack([t.float(), (found - noise).square().mean((1, 2, 3))], 1))
        if limit and done * world >= limit:
            break
    found = gather_rows(accelerator, torch.cat(rows), len(source)).cpu()
    return found[:, 0].long(), found[:, 1]


def _noise(place: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key("held out", place)))


def by_step(t: Tensor, errors: Tensor, steps: int) -> list[float | None]:
    """Return the mean error in each of J equal spans of the steps; None where no image fell."""
    spans = t * BUCKETS // steps
    return [
        float(errors[spans == span].mean()) if bool((spans == span).any()) else None
        for span in range(BUCKETS)
    ]
