"""What a network's loss is at each step of the process, and whom its routers choose.

Letters: N measurements, B images at a time, L blocks of experts, E experts, K chosen experts,
C classes, T diffusion steps, J spans of steps.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moectl.diffusion.process import GaussianDiffusion
from moectl.engine.launch import gather_rows
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.diffusion.model import UNet
    from moectl.engine.sources import Source

SPANS = 10
_GOLDEN = (math.sqrt(5) - 1) / 2


class Held(NamedTuple):
    """What was measured on held-out images, on the CPU."""

    t: Tensor
    """(N,) the step at which each image was noised."""
    labels: Tensor
    """(N,) its class."""
    errors: Tensor
    """(N,) mean squared error of the noise."""
    chosen: Tensor
    """(N, L, K) the experts that saw it."""


def step_of(place: int, steps: int) -> int:
    """Return the step at which a measurement is made: any run of them covers all steps evenly."""
    return int(((place + 0.5) * _GOLDEN % 1) * steps)


@torch.no_grad()
def measure(  # noqa: PLR0913 - what a measurement is made of
    model: "UNet",
    diffusion: GaussianDiffusion,
    source: "Source",
    accelerator: "Accelerator",
    *,
    batch_size: int,
    limit: int = 0,
    rounds: int = 1,
) -> Held:
    """Noise images, each at a step of its own, and compare what is predicted with that noise.

    Step and noise follow from the place of an image alone, so networks are compared on equals.

    Args:
        model: in evaluation mode.
        diffusion: the process.
        source: the images.
        accelerator: devices and processes, over which the images are dealt.
        batch_size: images per forward pass.
        limit: about how many images; 0 takes all.
        rounds: measurements of each image, at other steps.
    """
    found = [
        _round(model, diffusion, source, accelerator, batch_size, limit, number * len(source))
        for number in range(rounds)
    ]
    rows = torch.cat(found)
    chosen = rows[:, 3:].long().view(len(rows), -1, model.k_active)
    return Held(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2], chosen)


def _round(  # noqa: PLR0913
    model: "UNet",
    diffusion: GaussianDiffusion,
    source: "Source",
    accelerator: "Accelerator",
    batch_size: int,
    limit: int,
    first: int,
) -> Tensor:
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    rows = [torch.zeros(0, 3 + len(model.blocks) * model.k_active, device=device)]
    done = 0  # a process may get no image at all
    for images, labels in source.ordered(batch_size, device, rank, world):
        places = [first + rank + world * (done + row) for row in range(len(images))]
        done += len(images)
        t = torch.tensor([step_of(place, diffusion.steps) for place in places]).to(device)
        noise = torch.stack([_noise(place, images.shape[1:]) for place in places]).to(device)
        x = diffusion.add_noise(images, t, noise)
        with accelerator.autocast():
            predicted, logits = model(x, t, labels)
        error = diffusion.noise(x, t, predicted.float()) - noise
        columns = [t, labels, error.square().mean((1, 2, 3))]
        chosen = [one.topk(model.k_active, dim=1).indices for one in logits]
        rows.append(torch.cat([torch.stack(columns, 1), *chosen], 1))
        if limit and done * world >= limit:
            break
    return gather_rows(accelerator, torch.cat(rows), len(source)).cpu()


def _noise(place: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key("held out", place)))


def by_step(held: Held, steps: int) -> list[float | None]:
    """Return the mean error in each of J equal spans of the steps; None where nothing fell."""
    spans = held.t * SPANS // steps
    found = [held.errors[spans == span] for span in range(SPANS)]
    return [float(errors.mean()) if len(errors) else None for errors in found]


def usage(chosen: Tensor, groups: Tensor, count: int, experts: int) -> list[list[list[float]]]:
    """Return of every block the share of each expert in each group of measurements.

    Args:
        chosen: (N, L, K).
        groups: (N,) from 0 to count - 1.
        count: of the groups.
        experts: E.

    Returns:
        (L, E, count) shares; over the experts they sum to 1, or to 0 in an empty group.
    """
    found = []
    for block in chosen.unbind(1):
        places = groups[:, None] * experts + block
        table = places.flatten().bincount(minlength=count * experts).view(count, experts)
        shares = table / table.sum(1, keepdim=True).clamp(min=1)
        found.append(shares.T.tolist())
    return found


def dead(shares: Sequence[Sequence[Sequence[float]]]) -> int:
    """Count the experts that no group uses."""
    return sum(not any(expert) for block in shares for expert in block)
