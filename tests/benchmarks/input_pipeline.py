"""Augmentation of CIFAR-sized images: whole batches against torchvision's chain per image.

Usage: python -m tests.benchmarks.input_pipeline [--rounds 7] [--batches 8]

 Both sides run in turn on one thread; every
figure is the median over the rounds, in seconds per 10,000 images.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from moectl.common.autoaugment import AutoAugment, TrivialAugment
from moectl.common.images import Standard
from moectl.engine.sources import Augment
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"rounds": 3, "batches": 2}
AIMS = {"standard": "≥ 2.5", "standard, no rotation": "≥ 4"}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BATCH = 128


def per_image(*policy: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    """Return torchvision's chain over the images of a batch, as its data sets apply it."""
    chain = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *policy,
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def run(images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1).numpy()
        return torch.stack([chain(Image.fromarray(image)) for image in pixels])

    return run


def batched(augment: Augment) -> Callable[[Tensor], Tensor]:
    """Return one of our transforms with its draws, made on the CPU as in training."""

    def run(images: Tensor) -> Tensor:
        uniforms = torch.rand(len(images), augment.draws)
        return augment(images, uniforms.to(images.device, non_blocking=True))

    return run


def seconds(run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> float:
    """Return the seconds per 10,000 images of one pass over the batches."""
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 10_000 / sum(len(batch) for batch in batches)


def measured(rounds: int = 7, batches: int = 8) -> list[Row]:
    """Measure and print one row per recipe."""
    table = []
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rough = torch.rand(BATCH * batches, 3, 8, 8) * 255
    images = torch.nn.functional.interpolate(rough, size=(32, 32), mode="bilinear")
    on_cpu = list(images.to(torch.uint8).split(BATCH))
    policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=(128, 128, 128))
    trivial = transforms.TrivialAugmentWide(interpolation=transforms.InterpolationMode.BILINEAR)
    rows = {
        "standard": (Standard(MEAN, STD), per_image(transforms.RandomRotation(15))),
        "standard, no rotation": (Standard(MEAN, STD, degrees=0), per_image()),
        "autoaugment": (AutoAugment(MEAN, STD), per_image(policy)),
        "trivial": (TrivialAugment(MEAN, STD), per_image(trivial)),
    }
    devices = {"cpu": on_cpu}
    if torch.cuda.is_available():
        devices[torch.cuda.get_device_name()] = [batch.cuda() for batch in on_cpu]
    print(f"{'recipe':24}{'device':24}{'batched':>10}{'per image':>12}{'ratio':>8}")
    for name, (augment, chain) in rows.items():
        for device, parts in devices.items():
            run = batched(augment)
            run(parts[0])
            pairs = [(seconds(run, parts), seconds(chain, on_cpu)) for _ in range(rounds)]
            ours, theirs = map(statistics.median, zip(*pairs, strict=True))
            print(f"{name:24}{device:24}{ours:>9.3f}s{theirs:>11.3f}s{theirs / ours:>7.1f}x")
            work = f"images: {name}, 10,000 of 32 px on {device}"
            aim = AIMS.get(name, "") if device == "cpu" else "≥ 50"
            table.append(in_seconds(work, "torchvision, one by one", theirs, ours, aim))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=8)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
