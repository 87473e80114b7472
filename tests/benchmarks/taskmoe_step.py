"""Time one training step of the mixture against plain forms of the same network.

Usage: python -m tests.benchmarks.taskmoe_step [--batch 32] [--rounds 7]

"loop" is the network as research code has it, with a loop over the experts and one module after the
other. "batched" computes its experts as one grouped convolution over the channels of all of them.
All hold the same weights and are first shown to give the same outputs and gradients, without
dropout, whose draws differ. Rows are timed in turn, so that a busy machine slows all of them alike.
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

from moectl.taskmoe.model import ConvBlock, MergedMoE, ReluDropoutMean, ResidualBlock
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"batch": 8, "rounds": 3, "widths": (16,)}
CLASSES, EXPERTS, SIDE = 15, 3, 32
TOLERANCE = 1e-4


class PlainConvBlock(ConvBlock):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class PlainResidualBlock(ResidualBlock):
    def forward(self, x):
        return F.relu(self.main_path(x) + self.shortcut(x))


class PlainReluDropoutMean(ReluDropoutMean):
    def forward(self, x):
        return F.dropout(F.relu(x), self.dropout, self.training).mean((2, 3))


PLAIN = {
    ConvBlock: PlainConvBlock,
    ResidualBlock: PlainResidualBlock,
    ReluDropoutMean: PlainReluDropoutMean,
}


def make_plain(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]


class BatchedMoE(MergedMoE):
    """Experts side by side in the channels; running statistics are left out."""

    def _ask(self, trunk, acting):  # noqa: ARG002
        depthwise, pointwise, norms = zip(*(expert[:3] for expert in self.experts), strict=True)

        def joined(modules: tuple[nn.Module, ...], name: str = "weight") -> Tensor:
            return torch.cat([getattr(module, name) for module in modules])

        x = trunk.repeat(1, EXPERTS, 1, 1)
        x = F.conv2d(x, joined(depthwise), padding=1, groups=x.shape[1])
        x = F.conv2d(x, joined(pointwise), groups=EXPERTS)
        x = F.batch_norm(x, None, None, joined(norms), joined(norms, "bias"), training=True)
        for tail in self.experts[0][3:]:
            x = tail(x)
        return x.view(len(x), EXPERTS, -1)


def build(kind: str, width: int, dropout: float) -> MergedMoE:
    torch.manual_seed(0)
    options = {"dropout_expert": dropout, "dropout_gate": dropout and 0.2}
    make = BatchedMoE if kind == "batched" else MergedMoE
    model = make(classes=CLASSES, num_experts=EXPERTS, width=width, gate_noise_std=0.0, **options)
    if kind == "loop":
        make_plain(model)
    return model


def draw(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE), torch.randint(0, CLASSES, (batch,))


def relative_gap(actual: list[Tensor], expected: list[Tensor]) -> float:
    gaps = [
        (a - e).norm() / e.norm().clamp(min=1e-9) for a, e in zip(actual, expected, strict=True)
    ]
    return max(float(gap) for gap in gaps)


def check_equality(kind: str, width: int) -> None:
    """Compare outputs and gradients with the plain loop's, in double precision and channels_last.

    In single precision, a ReLU that flips at zero changes a gradient by more than what flipped it.
    """
    images, labels = draw(8)
    found = []
    for name in (kind, "loop"):
        model = build(name, width, 0.0).double()
        model.gating_network.gate_net[-1].weight.data.mul_(100)  # gates that differ
        model.to(memory_format=torch.channels_last if name == kind else torch.contiguous_format)
        logits = model(images.double()).logits
        F.cross_entropy(logits, labels).backward()
        weights = dict(model.named_parameters())
        # A bias before a batch norm has no gradient but rounding.
        kept = [w.grad for key, w in weights.items() if not key.endswith(("_net.0.bias", "4.bias"))]
        found.append(([logits.detach()], kept))
    gaps = [relative_gap(ours, plain) for ours, plain in zip(*found, strict=True)]
    print(f"{kind}, width {width}: outputs differ by {gaps[0]:.1e}, gradients by {gaps[1]:.1e}")
    if max(gaps) > TOLERANCE:
        sys.exit("the networks are not the same")


@dataclass
class Way:
    """One way to train, and the CPU seconds its steps took."""

    name: str
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)


def row(kind: str, width: int, batch: int, *, last: bool, bf16: bool) -> Way:
    layout = torch.channels_last if last else torch.contiguous_format
    images, labels = draw(batch)
    images = images.contiguous(memory_format=layout)
    model = build(kind, width, 0.5).to(memory_format=layout)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images).logits
        F.cross_entropy(logits.float(), labels).backward()

    return Way(f"{kind}{', channels_last' if last else ''}", step)


def measure(width: int, batch: int, rounds: int, *, bf16: bool) -> Row:
    ways = [(kind, last) for last in (False, True) for kind in ("loop", "batched", "ours")]
    table = [row(kind, width, batch, last=last, bf16=bf16) for kind, last in ways]
    for number in range(rounds + 1):
        for entry in table:
            start = time.process_time()
            entry.step()
            if number:
                entry.seconds.append(time.process_time() - start)
    print(f"\nwidth {width}, {'bf16' if bf16 else 'fp32':24}  {'CPU ms':>8} {'speed-up':>9}")
    first = statistics.median(table[0].seconds)
    for entry in table:
        seconds = statistics.median(entry.seconds)
        print(f"{entry.name:34}  {seconds * 1e3:8.1f} {first / seconds:8.2f}x")
    kind = "bf16" if bf16 else "fp32"
    work = f"taskmoe: forward and backward, width {width}, {kind}, batch {batch}, CPU time"
    return in_seconds(work, "loop over experts", first, statistics.median(table[-1].seconds))


def measured(batch: int = 32, rounds: int = 7, widths: tuple[int, ...] = (64, 16)) -> list[Row]:
    """Check equality, then print one table per width and precision, on one thread."""
    torch.set_num_threads(1)
    for width in widths:
        for kind in ("batched", "ours"):
            check_equality(kind, width)
    print(f"\nforward and backward, {SIDE}x{SIDE}, batch {batch}, medians of {rounds} rounds")
    return [measure(width, batch, rounds, bf16=bf16) for width in widths for bf16 in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
