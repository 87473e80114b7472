"""From noise to images: diffusers' schedulers, guidance, and a seed for every image.

Letters: N images, B of them at a time, S pixels of a side, T diffusion steps.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moectl.diffusion.process import GaussianDiffusion
from moectl.engine import console
from moectl.engine.errors import RunFailed
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.diffusion.model import UNet
    from moectl.diffusion.settings import SampleSection

Sampler = Literal["ddpm", "ddim", "dpmpp", "unipc"]


def times(total: int, steps: int) -> list[int]:
    """Return the steps of T at which the network is asked: evenly spaced, from the last one down.

    Source: Lin et al. 2024 ("trailing").
    """
    return [round(place * total / steps) - 1 for place in range(steps, 0, -1)]


def scheduler(
    diffusion: GaussianDiffusion, sampler: Sampler, steps: int, *, clip: bool = True
) -> Any:
    """Return diffusers' scheduler of a process, over the steps of `times` alone.

    It counts them from steps - 1 down to 0. If it chose them itself, it would take one too many for
    some numbers (29 of 100), and its ddim would take strides for equal that are not (400 of 1000).

    Args:
        diffusion: the process.
        sampler: which.
        steps: network calls per image, at most T.
        clip: keep the predicted image in -1 to 1 at every step.

    Sources: Ho et al. 2020 (ddpm); Song et al. 2021 (ddim); Lu et al. 2022 (dpmpp, second order);
    Zhao et al. 2023 (unipc).
    """
    import diffusers

    kinds: dict[str, Any] = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpmpp": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }
    if sampler in ("ddpm", "ddim"):
        options: dict[str, Any] = {"clip_sample": clip}
    else:  # a threshold that may not grow beyond 1 clips
        options = {"thresholding": clip, "sample_max_value": 1.0, "solver_order": 2}
    found = kinds[sampler](
        num_train_timesteps=steps,
        prediction_type=diffusion.prediction,
        timestep_spacing="trailing",
        **options,
    )
    # Not through betas, which the library rounds to float32: that of a long stride would be 1.
    alphas = (1 - diffusion.betas).cumprod(0)
    found.alphas_cumprod = alphas[times(diffusion.steps, steps)[::-1]]
    with warnings.catch_warnings():
        # The library asks torch for an array in the manner of NumPy 1.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        found.set_timesteps(steps)
    return found


def first_noise(seeds: Sequence[int], side: int, channels: int = 3) -> Tensor:
    """Draw the noise that each image begins with, (N, C, S, S), from its own seed alone."""
    return torch.stack(
        [torch.randn(channels, side, side, generator=one) for one in _generators(seeds, "start")]
    )


def _generators(seeds: Sequence[int], use: str) -> list[torch.Generator]:
    """One generator an image, on the CPU: the same numbers on every device."""
    return [torch.Generator().manual_seed(key(seed, use)) for seed in seeds]


@torch.inference_mode()
def denoise(  # noqa: PLR0913 - what a solver is made of
    predict: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    noise: Tensor,
    seeds: Sequence[int],
    *,
    sampler: Sampler,
    steps: int,
    eta: float = 0.0,
    clip: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Solve from noise to images.

    Args:
        predict: from images (B, C, S, S) and their step (B,) to what the network predicts.
        diffusion: the process.
        noise: (B, C, S, S) that the images begin with.
        seeds: (B,) of the images, for samplers that add noise.
        sampler: which.
        steps: network calls.
        eta: noise of ddim; 1 adds as much as ddpm.
        clip: see `scheduler`.
        advance: is called after every step.
    """
    solver = scheduler(diffusion, sampler, steps, clip=clip)
    options: dict[str, Any] = {}
    if sampler in ("ddpm", "ddim"):
        options["generator"] = _generators(seeds, "steps")
    if sampler == "ddim":
        # A clipped image goes with the noise that leads to it.
        options |= {"eta": eta, "use_clipped_model_output": clip}
    x = noise * solver.init_noise_sigma
    for time, step in zip(times(diffusion.steps, steps), solver.timesteps, strict=True):
        predicted = predict(x, torch.full((len(x),), time, device=x.device))
        x = solver.step(predicted.to(x), step, x, **options).prev_sample
        advance()
    return x


def guided(model: "UNet", labels: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what predicts for given classes, guided away from what it would say of any class.

    Args:
        model: the network; beyond a scale of 1 it must know the class "none".
        labels: (B,) classes.
        scale: 1 for no guidance, 0 for no class.

    Source: Ho and Salimans 2022, both halves in one batch.
    """
    nothing = torch.full_like(labels, model.num_classes)
    if scale in (0.0, 1.0):
        chosen = labels if scale else nothing
        return lambda x, t: model(x, t, chosen)[0]
    both = torch.cat([nothing, labels])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        # Their small difference is taken in full precision, whatever the network computes in.
        without, given = model(x.repeat(2, 1, 1, 1), t.repeat(2), both)[0].to(x).chunk(2)
        return without + scale * (given - without)

    return predict


def generate(  # noqa: PLR0913 - what making images takes
    model: "UNet",
    diffusion: GaussianDiffusion,
    accelerator: "Accelerator",
    labels: Tensor,
    seeds: Sequence[int],
    section: "SampleSection",
    side: int,
    keep: Callable[[Sequence[int], Tensor], None] = lambda *_: None,
) -> Tensor:
    """Make images of given classes, this process's share of them, with a progress bar.

    Each image follows from its seed and class alone, whatever the batch size or the processes, up
    to the rounding of the network.

    Args:
        model: in evaluation mode.
        diffusion: the process.
        accelerator: devices and processes, over which the images are dealt.
        labels: (N,) classes; `model.num_classes` for none.
        seeds: (N,) of the images.
        section: how.
        side: S.
        keep: is given every batch as it is done: the places of its images, and these.

    Returns:
        (n, 3, S, S) float32 on the CPU, about -1 to 1: images rank, rank + world, …

    Raises:
        RunFailed: if an image holds other than finite numbers.
    """
    places = range(accelerator.process_index, len(labels), accelerator.num_processes)
    parts = [
        places[start : start + section.batch_size]
        for start in range(0, len(places), section.batch_size)
    ]
    made, counter = [], itertools.count(1)
    with console.progress(len(parts) * section.steps) as bar:
        for part in parts:
            own = [seeds[place] for place in part]
            chosen = labels[list(part)].to(accelerator.device)
            ask = guided(model, chosen, section.guidance)
            noise = first_noise(own, side).to(accelerator.device)
            words = f"{part[-1] + 1}/{len(labels)} images"
            with accelerator.autocast():
                images = denoise(
                    ask,
                    diffusion,
                    noise,
                    own,
                    sampler=section.sampler,
                    steps=section.steps,
                    eta=section.eta,
                    advance=lambda: bar.update(next(counter), words),  # noqa: B023
                )
            if not bool(images.isfinite().all()):
                raise RunFailed(
                    f"images {part[0]} to {part[-1]} hold other than finite numbers: the network"
                    " has diverged, or the guidance scale is too large"
                )
            made.append(images.float().cpu())
            keep(part, made[-1])
    return torch.cat(made) if made else torch.zeros(0, 3, side, side)
