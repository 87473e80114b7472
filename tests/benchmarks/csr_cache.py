"""Stages 2 and 3 from features computed once, against the backbone in every epoch.

Usage: python -m tests.benchmarks.csr_cache [--images 900] [--epochs 10] [--size 128] [--batch 32]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moectl.csr.settings import CsrSettings
from moectl.csr.stages import STAGES
from moectl.csr.train import train
from moectl.engine.launch import build_accelerator, choose_threads
from moectl.engine.run import create
from moectl.engine.settings import resolve
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"images": 100, "epochs": 3, "size": 64}


def trained(folder: Path, given: dict[str, Any], stages: Any, start: str) -> float:
    """Train some stages, and return the seconds that they took."""
    settings = resolve(CsrSettings, given, [], [])[0]
    accelerator = build_accelerator(settings.train, cpu=True)
    named: dict[str, Any] = {"room": "csr", "command": "train", "name": "t", "origin": {}}
    with create(settings, accelerator, out=folder, **named) as run:
        began = time.perf_counter()
        train(run.settings, run, stages, start)
        return time.perf_counter() - began


def measured(
    images: int = 900,
    epochs: int = 10,
    size: int = 128,
    batch: int = 32,
    backbone: str = "resnet18",
) -> list[Row]:
    """Print seconds, their ratio, and how far the weights are from each other."""
    choose_threads(1)
    torch.set_num_threads(1)
    given = {
        "data.dataset": "synthetic",
        "data.synthetic_images": images,
        "data.image_size": size,
        "data.augment_heads": False,
        "data.workers": 0,
        "model.backbone_type": backbone,
        "model.pretrained": False,
        "train.batch_size": batch,
        "train.precision": "no",
        "train.tensorboard": False,
        "train.epochs_stage1": 1,
        "train.epochs_stage2": epochs,
        "train.epochs_stage3": epochs,
    }
    with tempfile.TemporaryDirectory() as root:
        start = Path(root) / "start"
        trained(start, given, STAGES[:1], "")
        seconds, weights = {}, {}
        for kept in ("off", "auto"):
            folder = Path(root) / kept
            changed = {**given, "train.feature_cache": kept}
            seconds[kept] = trained(folder, changed, STAGES[1:], str(start))
            weights[kept] = torch.load(folder / "final_model.pth", weights_only=True)
    differences = [
        float((value.float() - weights["auto"][name].float()).abs().max())
        for name, value in weights["off"].items()
    ]
    print(f"{backbone}, {images} images of {size} px, {epochs} epochs each")
    print(f"backbone in every epoch  {seconds['off']:8.1f} s")
    print(f"features computed once   {seconds['auto']:8.1f} s")
    print(f"ratio {seconds['off'] / seconds['auto']:.1f}, weights differ by {max(differences):.1e}")
    work = f"csr: stages 2 and 3, {epochs} epochs each, {images} images of {size} px, {backbone}"
    before, after = seconds["off"], seconds["auto"]
    aim = f"≥ {2 * epochs / 1.5:.0f}"
    return [in_seconds(work, "the backbone in every epoch", before, after, aim)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("images", 900), ("epochs", 10), ("size", 128), ("batch", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backbone", default="resnet18")
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
