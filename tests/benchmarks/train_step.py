"""Time one training step of the network against a plain implementation of the same network.

Usage: python -m tests.benchmarks.train_step [--batch 64] [--rounds 9]

Both hold the same weights and are first shown to give the same outputs and gradients. The rows of a
table are timed in turn, round by round, so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.balpoe.model import BalpoeNet
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"batch": 16, "rounds": 3}
CLASSES, EXPERTS = 100, 3
TAU = torch.tensor([0.0, 1.0, 2.0])
COUNTS = torch.tensor([int(500 * 0.01 ** (k / 99)) for k in range(CLASSES)])
TOLERANCE = 1e-4


class PlainBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2 if stride > 1 else None

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad is not None:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class PlainHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, CLASSES))

    def forward(self, x):
        return 30 * F.normalize(x, dim=1).mm(F.normalize(self.weight, dim=0))


def plain_stage(inputs, outputs, stride):
    rest = [PlainBlock(outputs, outputs, 1) for _ in range(4)]
    return nn.Sequential(PlainBlock(inputs, outputs, stride), *rest)


class PlainBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = plain_stage(16, 16, 1)
        self.layer2s = nn.ModuleList([plain_stage(16, 32, 2) for _ in range(EXPERTS)])
        self.layer3s = nn.ModuleList([plain_stage(32, 64, 2) for _ in range(EXPERTS)])
        self.linears = nn.ModuleList([PlainHead() for _ in range(EXPERTS)])

    def forward(self, x):
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        logits = []
        for expert in range(EXPERTS):
            out = self.layer3s[expert](self.layer2s[expert](x))
            out = F.avg_pool2d(out, out.shape[3]).flatten(1)
            logits.append(self.linears[expert](out))
        return torch.stack(logits, dim=1)


class PlainNet(nn.Module):
    """The network as research code has it: a loop, padded slices, nothing in place."""

    def __init__(self):
        super().__init__()
        self.backbone = PlainBackbone()

    def forward(self, images):
        return self.backbone(images)


def expert_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over experts of cross-entropy with the logits (B, E, K) shifted by tau log prior."""
    log_prior = (COUNTS / COUNTS.sum()).log().to(logits)
    shifted = logits + TAU.to(logits)[:, None] * log_prior
    return F.cross_entropy(shifted.flatten(0, 1), labels.repeat_interleave(EXPERTS))


def pair(device="cpu") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    ours, plain = BalpoeNet(classes=CLASSES, experts=EXPERTS), PlainNet()
    plain.load_state_dict(ours.state_dict())
    return plain.to(device), ours.to(device)


def draw(batch: int, device="cpu") -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.randn(batch, 3, 32, 32, device=device)
    return images, torch.randint(0, CLASSES, (batch,), device=device)


def relative_gap(actual: list[Tensor], expected: list[Tensor]) -> float:
    gaps = [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]
    return max(float(gap) for gap in gaps)


def check_equality(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Compare outputs and every gradient with the plain network's.

    The layouts are compared in double precision: in single precision their roundings differ, and a
    ReLU that flips at zero changes a gradient by far more than the rounding that flipped it.
    """
    (plain, ours), (images, labels) = pair(), draw(8)
    images = images.to(dtype)
    expected = plain.to(dtype)(images)
    actual = ours.to(dtype).to(memory_format=layout)(images.contiguous(memory_format=layout))
    for logits in (expected, actual):
        expert_loss(logits, labels).backward()
    gradients = [[p.grad for p in model.parameters()] for model in (ours, plain)]
    gaps = relative_gap([actual.detach()], [expected.detach()]), relative_gap(*gradients)
    print(f"{dtype}, {layout}: outputs differ by {gaps[0]:.1e}, gradients by {gaps[1]:.1e}")
    if max(gaps) > TOLERANCE:
        sys.exit("the two networks are not the same")


@dataclass
class Way:
    """One way to train, and the seconds (CPU, wall) its steps took."""

    name: str
    step: Callable[[], None]
    seconds: list[tuple[float, float]] = field(default_factory=list)


def row(name: str, model: nn.Module, batch: tuple[Tensor, Tensor], *, layout, bf16) -> Way:
    images, labels = batch
    images = images.contiguous(memory_format=layout)
    model.to(memory_format=layout)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        expert_loss(logits.float(), labels).backward()

    return Way(name, step)


def rows(batch_size: int, device: str) -> list[Way]:
    """Build the rows; every row has a network of its own, because the layout is a state of it."""
    batch = draw(batch_size, device)
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    table = [
        row("plain fp32", pair(device)[0], batch, layout=nchw, bf16=False),
        row("ours fp32 channels_last", pair(device)[1], batch, layout=nhwc, bf16=False),
        row("plain bf16", pair(device)[0], batch, layout=nchw, bf16=True),
        row("ours bf16 channels_last", pair(device)[1], batch, layout=nhwc, bf16=True),
    ]
    if device == "cuda":
        model = pair(device)[1].to(memory_format=nhwc)
        compiled = torch.compile(model)
        table.append(
            row("ours bf16 channels_last compiled", compiled, batch, layout=nhwc, bf16=True)
        )
    return table


def cpu_seconds(step: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def cuda_seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Time ten steps with events, since the calls return before the work is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu = time.process_time()
    start.record()
    for _ in range(10):
        step()
    end.record()
    torch.cuda.synchronize()
    return (time.process_time() - cpu) / 10, start.elapsed_time(end) / 10_000


def measure(title: str, table: list[Way], clock, rounds: int) -> list[Row]:
    for entry in table:
        for _ in range(2):
            entry.step()
    for _ in range(rounds):
        for entry in table:
            entry.seconds.append(clock(entry.step))
    print(f"\n{title:34}  {'CPU ms':>8} {'wall ms':>8} {'speed-up (wall)':>16}")
    walls = [statistics.median(wall for _, wall in entry.seconds) for entry in table]
    for entry, wall in zip(table, walls, strict=True):
        cpu = statistics.median(cpu for cpu, _ in entry.seconds)
        print(f"{entry.name:34}  {cpu * 1e3:8.1f} {wall * 1e3:8.1f} {walls[0] / wall:15.2f}x")
    aims = ["≥ 1.1", ""] if title.startswith("CPU") else ["≥ 1.5", "≥ 4"]
    ours = [(entry, wall) for entry, wall in zip(table, walls, strict=True) if "ours" in entry.name]
    return [
        in_seconds(
            f"balpoe: training step, {entry.name}, {title}", "plain fp32", walls[0], wall, aim
        )
        for (entry, wall), aim in zip(ours, [*aims, aims[-1]], strict=False)
    ]


def measured(batch: int = 64, rounds: int = 9) -> list[Row]:
    """Check equality, then print one table per device and number of threads."""
    check_equality(torch.float32, torch.contiguous_format)
    check_equality(torch.float64, torch.channels_last)
    print(f"\nforward and backward, batch {batch}, medians of {rounds} rounds")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found += measure(f"CPU, {threads} threads", rows(batch, "cpu"), cpu_seconds, rounds)
    if torch.cuda.is_available():
        found += measure(torch.cuda.get_device_name(), rows(batch, "cuda"), cuda_seconds, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
