"""The whole network against diffusers' UNet2DModel of as many parameters at the same resolution.

Usage: python -m tests.benchmarks.diffusion_network [--side 32] [--batch 16] [--rounds 5]

UNet2DModel is given plain convolutional stages (no attention, two layers each) and class labels;
its width is the multiple of 8 that brings its parameters nearest to ours, experts included. They
are timed in turn.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from moectl.diffusion.model import UNet
from moectl.diffusion.profile import macs, parameters
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"batch": 4, "rounds": 3, "widths": (32,)}
MULTS = (1, 2, 4)
CLASSES = 10


class Theirs(nn.Module):
    """UNet2DModel with our signature."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=side,
            block_out_channels=tuple(width * mult for mult in MULTS),
            down_block_types=("DownBlock2D",) * len(MULTS),
            up_block_types=("UpBlock2D",) * len(MULTS),
            layers_per_block=2,
            norm_num_groups=8,
            add_attention=False,
            num_class_embeds=CLASSES + 1,
        )

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.net(x, t, class_labels=c).sample, []


def count(model: nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


def nearest(wanted: int, side: int) -> Theirs:
    width = min(range(8, 256, 8), key=lambda width: abs(count(Theirs(width, side)) - wanted))
    return Theirs(width, side)


def work(model: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> None:
    if training:
        (model(*inputs)[0] - inputs[0]).square().mean().backward()
        model.zero_grad()
    else:
        with torch.inference_mode():
            model(*inputs)
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()


def measured(
    side: int = 32, batch: int = 16, rounds: int = 5, widths: tuple[int, ...] = (32, 64, 128)
) -> list[Row]:
    table = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, {side} x {side} pixels,")
    print(f"batch {batch}, median of {rounds} rounds, images per second")
    for width in widths:
        torch.manual_seed(0)
        ours = UNet(model_channels=width, channel_mults=MULTS, time_dim=256, class_dim=256)
        dense = UNet(
            model_channels=width, channel_mults=MULTS, time_dim=256, class_dim=256, num_experts=2
        )
        theirs = nearest(count(ours), side)
        models = {"ours": ours, "dense_matched": dense, "UNet2DModel": theirs}
        for model in models.values():
            model.to(device)
        inputs = (
            torch.randn(batch, 3, side, side, device=device),
            torch.randint(1000, (batch,), device=device),
            torch.randint(CLASSES, (batch,), device=device),
        )
        print(f"\nwidth {width}: ours {macs(ours, side) / 1e9:.3f} GMAC, parameters",
              *(f"{name} {count(model):,}" for name, model in models.items()),
              f"(used per image {parameters(ours)[1]:,})")  # fmt: skip
        for training in (True, False):
            taken = {name: [] for name in models}
            for number in range(rounds + 1):
                for name, model in models.items():
                    began = time.perf_counter()
                    work(model.train(training), inputs, training)
                    if number:  # the first is the warm-up
                        taken[name].append(time.perf_counter() - began)
            medians = {name: statistics.median(own) for name, own in taken.items()}
            rates = {name: batch / seconds for name, seconds in medians.items()}
            print(f"{'training' if training else 'inference':>10}",
                  *(f"{name} {rate:.1f}" for name, rate in rates.items()),
                  f"ours/UNet2DModel {rates['ours'] / rates['UNet2DModel']:.2f}")  # fmt: skip
            kind = "training step" if training else "inference"
            what = f"diffusion: {kind}, width {width}, {side} px, batch {batch}"
            peers = (("UNet2DModel", "UNet2DModel of as many parameters", "≥ 0.9"),
                     ("dense_matched", "a dense network of the same work", ""))  # fmt: skip
            for name, peer, aim in peers:
                table.append(in_seconds(what, peer, medians[name], medians["ours"], aim))
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("side", 32), ("batch", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
