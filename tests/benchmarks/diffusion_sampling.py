"""Few steps of a modern solver against the thousand of DDPM, on the network of the digits.

Usage: python -m tests.benchmarks.diffusion_sampling [--images 64] [--rounds 3]

The weights are random: only the time is measured here. What the samples are worth says
`moectl diffusion eval` on a trained run.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time

import torch

from moectl.diffusion.model import build
from moectl.diffusion.process import GaussianDiffusion
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.solvers import denoise, first_noise, guided
from moectl.diffusion.variants import arguments_of
from moectl.engine.presets import find
from moectl.engine.settings import from_toml
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"images": 4, "rounds": 1}
AIMS = {"ddim": "≥ 15", "dpmpp": "≥ 40"}
WAYS = (("ddpm", 1000), ("dpmpp", 20), ("unipc", 20), ("ddim", 50))


def measured(images: int = 64, rounds: int = 3) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = from_toml(DiffusionSettings, find("diffusion", "digits").path)
    model = build(arguments_of(settings, 10)).to(device).eval()
    diffusion = GaussianDiffusion(**settings.process.model_dump()).to(device)
    labels = torch.arange(images, device=device) % 10
    noise = first_noise(range(images), settings.data.image_size).to(device)
    taken = {way: [] for way in WAYS}
    for _ in range(rounds):
        for sampler, steps in WAYS:
            began = time.perf_counter()
            ask = guided(model, labels, 1.0)
            seeds = range(images)
            denoise(ask, diffusion, noise, seeds, sampler=sampler, steps=steps).cpu()
            taken[sampler, steps].append(time.perf_counter() - began)
    medians = {way: statistics.median(times) for way, times in taken.items()}
    slowest = medians[WAYS[0]]
    print(f"{device}, {torch.get_num_threads()} threads, {images} images of"
          f" {settings.data.image_size} pixels, median of {rounds} rounds")  # fmt: skip
    for (sampler, steps), seconds in medians.items():
        print(f"{sampler:>6} {steps:>5} steps {images / seconds:>8.1f} images/s"
              f" {slowest / seconds:>6.1f} times as fast as {WAYS[0][0]}")  # fmt: skip
    return [
        in_seconds(f"diffusion: {images} images by {sampler}, {steps} steps", "ddpm, 1000 steps",
                   slowest, medians[sampler, steps], AIMS.get(sampler, ""))
        for sampler, steps in WAYS[1:]
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("images", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
