"""A block of experts against the plain loop over images and their experts; and against all experts.

Usage: python -m tests.benchmarks.diffusion_block [--rounds 5] [--sizes 32x16,128x8,512x4]

A step is a forward and a backward pass with the same weights. The loop is what research code has:
one expert on one image at a time, chosen by a number that is read back from the device. It and ours
are first shown to give the same outputs and gradients. "all experts" runs every expert on every
image and takes the same weighted sum. The rows are timed in turn, so that a busy machine slows all
of them alike.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.diffusion.blocks import Form, MixtureBlock
from tests.benchmarks.rows import Row

QUICK = {"rounds": 3, "sizes": "128x8"}
AIMS = {16: "≥ 1.4", 64: "≥ 3.5"}
"""By batch, for the loop over images."""
WIDTH = 128  # of the embeddings of time and class
EXPERTS, ACTIVE = 8, 2
BATCHES = (16, 64)

Step = Callable[[], Tensor]


def routed(block: MixtureBlock, x: Tensor, time_: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    """What ours and the others begin with: projected maps, chosen experts, their weights, FiLM."""
    x = block.proj(x)
    values, chosen = block.router(x, time_, label).topk(ACTIVE, dim=1)
    assert block.film is not None
    film = block.film(F.gelu(torch.cat([time_, label], 1)))
    return x, chosen, values.softmax(1), film


def loop(block: MixtureBlock, *inputs: Tensor) -> Tensor:
    x, chosen, weights, film = routed(block, *inputs)
    found = torch.zeros_like(x)
    for image in range(len(x)):
        for place in range(ACTIVE):
            expert = chosen[image, place].item()  # a read that makes the device wait
            own = torch.tensor([expert], device=x.device)
            rows, parts = x[image : image + 1], film[image : image + 1]
            output = block.experts(rows, own, parts, "grouped")
            found[image] += weights[image, place] * output[0]
    return found


def every(block: MixtureBlock, *inputs: Tensor) -> Tensor:
    x, chosen, weights, film = routed(block, *inputs)
    count = block.experts.count
    shares = torch.zeros(len(x), count, device=x.device).scatter(1, chosen, weights)
    found = 0
    for expert in range(count):
        own = torch.full((len(x),), expert, device=x.device)
        found = found + shares[:, expert, None, None, None] * block.experts(x, own, film, "grouped")
    return found


def ours(how: str) -> Callable[..., Tensor]:
    def run(block: MixtureBlock, *inputs: Tensor) -> Tensor:
        block.dispatch = how
        return block(*inputs)[0]

    return run


def step(run: Callable[..., Tensor], block: MixtureBlock, inputs: tuple[Tensor, ...]) -> Tensor:
    block.zero_grad()
    output = run(block, *inputs)
    output.square().mean().backward()
    if output.device.type == "cuda":
        torch.cuda.synchronize()
    return output.detach()


def gradients(block: MixtureBlock) -> Tensor:
    return torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])


def measured(rounds: int = 5, sizes: str = "32x16,64x16,128x8,256x8,512x4") -> list[Row]:
    table = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, {EXPERTS} experts, {ACTIVE} active,"
          f" median of {rounds} rounds, milliseconds")  # fmt: skip
    rows = {
        "loop": loop,
        "all experts": every,
        **{how: ours(how) for how in ("grouped", "stacked", "auto")},
    }
    print(f"{'channels x side':>16} {'batch':>5}", *(f"{name:>11}" for name in rows),
          f"{'loop/auto':>9} {'all/auto':>9}")  # fmt: skip
    for size in sizes.split(","):
        channels, side = map(int, size.split("x"))
        torch.manual_seed(0)
        form = Form(EXPERTS, ACTIVE, True, "group", True, WIDTH, WIDTH)
        block = MixtureBlock(channels, channels, form).to(device)
        torch.nn.init.normal_(block.film.weight, std=0.02)
        for batch in BATCHES:
            inputs = (
                torch.randn(batch, channels, side, side, device=device),
                torch.randn(batch, WIDTH, device=device),
                torch.randn(batch, WIDTH, device=device),
            )
            reference = step(loop, block, inputs), gradients(block)
            for name in ("all experts", "grouped", "stacked", "auto"):
                found = step(rows[name], block, inputs), gradients(block)
                for one, other in zip(found, reference, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
            taken = {name: [] for name in rows}
            for _ in range(rounds):
                for name, run in rows.items():
                    began = time.perf_counter()
                    step(run, block, inputs)
                    taken[name].append(1000 * (time.perf_counter() - began))
            medians = {name: statistics.median(values) for name, values in taken.items()}
            best = medians["auto"]
            ratios = (medians["loop"] / best, medians["all experts"] / best)
            times = (f"{value:>11.1f}" for value in medians.values())
            print(f"{size:>16} {batch:>5}", *times, *(f"{ratio:>9.2f}" for ratio in ratios))
            work = f"diffusion: block of experts, {size}, batch {batch}, forward and backward"
            table.append(
                Row(work, "loop over images and experts", medians["loop"], best, AIMS[batch])
            )
            table.append(Row(work, "every expert on every image", medians["all experts"], best))
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="32x16,64x16,128x8,256x8,512x4")
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
