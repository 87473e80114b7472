"""Analysis of the experts: one pass over the images against passes for every image and expert.

Usage: python -m tests.benchmarks.taskmoe_analysis [--images 1500] [--sample 30] [--rounds 3]

The loop passes each image through the network alone, once for every answer that `moectl taskmoe
analyze` gives: the gates as they are, all of them on each expert, without each expert, equal gates,
the largest alone, none, and those of nine temperatures. The one pass keeps what the logits are made
of, in batches of 256, and makes all of that from it. Both are first shown to say the same. They are
timed in turn, in CPU seconds, so that a busy machine changes little.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.taskmoe.analysis import Examined, summary, temperature_sweep
from moectl.taskmoe.analyze import TEMPERATURES
from moectl.taskmoe.model import MergedMoE
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"images": 200, "sample": 8}
CLASSES, EXPERTS, WIDTH, BATCH = 15, 3, 16, 256
PASSES = 1 + 2 * EXPERTS + 3 + len(TEMPERATURES)
OWNERS = F.one_hot(torch.arange(CLASSES) * EXPERTS // CLASSES, EXPERTS)
TOLERANCE = 1e-4


def build() -> MergedMoE:
    torch.manual_seed(0)
    model = MergedMoE(classes=CLASSES, num_experts=EXPERTS, width=WIDTH)
    last: Any = model.gating_network.gate_net[-1]
    last.weight.data.mul_(100)  # gates that differ
    return model


def draw(count: int, side: int) -> Tensor:
    """Coarse noise, so that images differ also in their means."""
    torch.manual_seed(1)
    return F.interpolate(torch.randn(count, 3, 4, 4), size=side)


def examine(model: MergedMoE, images: Tensor, labels: Tensor) -> Examined:
    """Keep what the logits are made of, in one pass."""
    kept = []
    for batch in torch.split(images, BATCH):
        parts = model.parts(batch.contiguous(memory_format=torch.channels_last))
        experts, by_pass, bias = model.split_logits(parts)
        kept.append((experts, by_pass, parts.gate_logits, model.route(parts.gate_logits)))
    experts, by_pass, gate_logits, gates = (torch.cat(column) for column in zip(*kept, strict=True))
    return Examined(experts, by_pass, bias, gate_logits, gates, labels)


def loop(model: MergedMoE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pass images one by one: gates (N, E), and logits (N, PASSES, C) of all passes."""
    every_gates, every_logits = [], []
    for image in images[:, None]:
        own = model(image)
        logits = [own.logits]
        for expert in range(EXPERTS):
            forced, rest = torch.zeros(EXPERTS), own.gates[0].clone()
            forced[expert], rest[expert] = 1, 0
            logits += [model(image, forced).logits, model(image, rest / rest.sum()).logits]
        chosen = [torch.full((EXPERTS,), 1 / EXPERTS), torch.zeros(EXPERTS)]
        chosen += [F.one_hot(own.gates[0].argmax(), EXPERTS).float()]
        chosen += [(own.gate_logits[0] / warm).softmax(0) for warm in TEMPERATURES]
        logits += [model(image, gates).logits for gates in chosen]
        every_gates.append(own.gates)
        every_logits.append(torch.cat(logits))
    return torch.cat(every_gates), torch.stack(every_logits)


def tables(gates: Tensor, logits: Tensor, labels: Tensor) -> dict[str, list[Any]]:
    """Contribution, forced accuracy and knock-out, (E, C), from what the loop found."""
    found: dict[str, list[Any]] = {"contribution": [], "forced_accuracy": [], "knock_out": []}
    hits = (logits.argmax(2) == labels[:, None]).double()
    for expert in range(EXPERTS):
        forced, without = hits[:, 1 + 2 * expert], hits[:, 2 + 2 * expert]
        each = (gates[:, expert], forced, hits[:, 0] - without)
        for rows, values in zip(found.values(), each, strict=True):
            means = [values[labels == label] for label in range(CLASSES)]
            rows.append([float(own.mean()) if len(own) else None for own in means])
    return found


def check_equality(fast: MergedMoE, slow: MergedMoE, images: Tensor) -> None:
    """Compare the logits of all passes, and the tables made of them."""
    gates, logits = loop(slow, images)
    labels = logits[:, 0].argmax(1)
    labels[1::2] = logits[1::2, 1].argmax(1)  # both right and wrong in every table
    examined = examine(fast, images, labels)
    ours = [examined.logits()]
    for expert in range(EXPERTS):
        rest = examined.gates.clone()
        rest[:, expert] = 0
        forced = torch.eye(EXPERTS)[expert]
        ours += [examined.logits(forced), examined.logits(rest / rest.sum(1, keepdim=True))]
    largest = F.one_hot(examined.gates.argmax(1), EXPERTS).float()
    warm = [(examined.gate_logits / one).softmax(1) for one in TEMPERATURES]
    equal, none = torch.full((EXPERTS,), 1 / EXPERTS), torch.zeros(EXPERTS)
    ours += [examined.logits(gates) for gates in (equal, none, largest, *warm)]
    gap = float((torch.stack(ours, 1) - logits).norm() / (logits - logits.mean(0)).norm())
    document, expected = summary(examined, OWNERS), tables(gates, logits, labels)
    same = all(_close(document[name], table) for name, table in expected.items())
    print(f"  logits of {len(images)} images differ by {gap:.1e}, tables equal: {same}")
    if gap > TOLERANCE or not same:
        sys.exit("the two ways do not say the same")


def _close(ours: list[Any], plain: list[Any]) -> bool:
    ours, plain = ([value for row in table for value in row] for table in (ours, plain))
    pairs = list(zip(ours, plain, strict=True))
    return all(a == b or (a is not None and abs(a - b) < TOLERANCE) for a, b in pairs)


def cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(side: int, count: int, sample: int, rounds: int) -> Row:
    print(f"\nwidth {WIDTH}, {side}x{side}, {EXPERTS} experts, {CLASSES} classes")
    slow, images = build().eval(), draw(count, side)
    fast = copy.deepcopy(slow).to(memory_format=torch.channels_last)
    check_equality(fast, slow, images[:sample])
    labels = torch.arange(count) % CLASSES
    examined = examine(fast, images, labels)
    ways: list[Callable[[], object]] = [
        lambda: examine(fast, images, labels),
        lambda: (summary(examined, OWNERS), temperature_sweep(examined, TEMPERATURES)),
        lambda: loop(slow, images[:sample]),
    ]
    seconds = [[cpu_seconds(way) for way in ways] for _ in range(rounds + 1)][1:]
    passed, told, some = (statistics.median(column) for column in zip(*seconds, strict=True))
    plain = some * count / sample
    print(f"  {count} images: one pass {passed:.2f} CPU s, then the summary {told:.4f} CPU s")
    print(f"  {PASSES} passes for each image: {plain:.1f} CPU s, extrapolated from {sample} images")
    print(f"  ratio {plain / (passed + told):.0f}")
    # Evaluation needs the first pass anyway, here as there.
    print(f"  ratio beyond an evaluation {plain * (PASSES - 1) / PASSES / told:.0f}")
    work = f"taskmoe: analysis of {EXPERTS} experts, {count} images of {side} px, CPU time"
    return in_seconds(work, f"{PASSES} passes for each image", plain, passed + told)


def measured(images: int = 1500, sample: int = 30, rounds: int = 3) -> list[Row]:
    """Print one ratio per image size, on one thread."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        return [measure(side, images, sample, rounds) for side in (16, 32)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--sample", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
