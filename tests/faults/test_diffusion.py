"""Trainings of diffusion that get more epochs, or run in two processes."""

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.engine import plot

TINY = (
    *("train", "--data", "digits", "--image-size", "8", "--model-channels", "8", "--cpu"),
    *("--channel-mults", "1,2", "--num-experts", "3", "--quiet", "--threads", "1"),
    *("--set", "model.time_dim=8", "--set", "model.class_dim=8", "--set", "data.val_fraction=0.5"),
    *("--set", "train.precision=no", "--set", "train.tensorboard=false", "--lr", "0.01"),
    *("--batch-size", "256", "--set", "train.accumulate=2", "--set", "train.save_minutes=0"),
    *("--save-every", "1", "--sample-every", "0", "--log-every", "3", "--ema-decay", "0.9"),
)
TWICE = (*TINY, "--epochs", "2")  # of 4 updates each


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave pictures empty: what they show has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "write_png", lambda _, path: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _run(["diffusion", *TWICE, "--out", str(folder)]) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["elapsed_seconds"]
    return rows


def test_more_epochs_end_as_if_asked_for_at_once(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert _run(["diffusion", *TINY, "--epochs", "1", "--out", str(folder)]) == 0
    assert _run(["diffusion", *TWICE, "--resume", str(folder)]) == 0
    name = "checkpoint_epoch_2.pth"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert metrics(folder) == metrics(whole)


# Two processes

TRAIN = """
import json, sys
from pathlib import Path
import torch
from moectl.common.images import Plain
from moectl.diffusion import train as module, usage
from moectl.diffusion.blocks import MixtureBlock
from moectl.diffusion.data import Data
from moectl.diffusion.model import build
from moectl.diffusion.settings import DiffusionSettings
from moectl.engine.launch import build_accelerator, gather_objects, leave
from moectl.engine.run import create
from moectl.engine.settings import resolve
from moectl.engine.sources import Stream, TensorSource

given = {
    "data.image_size": 8, "model.channels": 8, "model.mults": [1, 2], "model.time_dim": 4,
    "model.class_dim": 4, "model.num_experts": 3, "loss.p_uncond": 0.0, "loss.lambda_load": 0.5,
    "optim.name": "sgd", "optim.lr": 0.05, "train.precision": "no", "train.tensorboard": False,
    "train.epochs": 1, "train.batch_size": 8, "train.ema_decay": 0.5, "train.sample_every": 0,
}

def images(count):
    draws = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=draws, dtype=torch.uint8)
    labels, plain = torch.zeros(count, dtype=torch.long), Plain((0.5,) * 3, (0.5,) * 3)
    return TensorSource(pixels, labels, None, plain)

def by_class(arguments):
    '''Class 0 goes to experts 0 and 1, class 1 to experts 1 and 2.'''
    model = build(arguments)
    model.class_embed.weight.data = torch.tensor([[10.0] * 4, [-10.0] * 4])
    for part in model.modules():
        if isinstance(part, MixtureBlock):
            first, last = part.router.mlp[0], part.router.mlp[2]
            first.weight.data[0] = 0
            first.weight.data[0, -4:] = 0.25
            last.weight.data *= 0.01
            last.weight.data[:, 0] = torch.tensor([0.2, 0.0, -0.2])
            last.bias.data = torch.tensor([-1.0, 0.0, 1.0])
    return model

def main(folder, patch=setattr):
    settings = resolve(DiffusionSettings, given, [], [])[0]
    accelerator = build_accelerator(settings.train, cpu=True)
    train, test = images(28), images(11)
    for chunk in Stream(28, 8, settings.train.seed, 1, 2).epoch(0):
        train.labels[chunk.rows] = 1  # all that the second of two processes sees
    facts = {"dataset": "noise", "image_size": 8, "images": {}, "digest": "0" * 16}
    seen, count = [], usage.counts

    def counted(logits, k_active):
        seen.append(count(logits, k_active))
        return seen[-1]

    patch(module, "load", lambda _: Data(train, test, ["a", "b"], facts))
    patch(module, "build", by_class)
    patch(module, "report", lambda _: None)
    patch(usage, "counts", lambda *given: counted(*given).clone())
    named = {"room": "diffusion", "command": "train", "name": "t", "out": folder, "origin": {}}
    with create(settings, accelerator, **named) as run:
        module.train(settings, run)
    everyone = gather_objects(accelerator, [one.sum(0).tolist() for one in seen])
    if accelerator.is_main_process:
        (folder / "seen.json").write_text(json.dumps(everyone))

if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
"""


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., subprocess.Popen[str]],
    finish: Callable[..., tuple[int, str, str]],
) -> tuple[Path, Path]:
    """The same training in one process, and in two of which each uses two experts of three."""
    root = tmp_path_factory.mktemp("processes")
    (root / "train.py").write_text(TRAIN)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    program = (sys.executable, *words, f"{root}/train.py", f"{root}/two")
    code, _, err = finish(start(program=program), 120)
    assert code == 0, err
    spec = importlib.util.spec_from_file_location("train_by_class", root / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        module.main(root / "one", patch.setattr)
    return root / "one", root / "two"


def test_each_process_leaves_an_expert_unused(both: tuple[Path, Path]) -> None:
    one, two = (json.loads((folder / "seen.json").read_text()) for folder in both)
    assert one == [[[12, 24, 12]] * 3 + [[6, 12, 6]]]
    assert two == [
        [[12, 12, 0]] * 3 + [[6, 6, 0]],
        [[0, 12, 12]] * 3 + [[0, 6, 6]],
    ]


def test_two_processes_end_in_the_weights_of_one(both: tuple[Path, Path]) -> None:
    one, two = (torch.load(folder / "checkpoint_epoch_1.pth", weights_only=True) for folder in both)
    for key in ("model_state_dict", "ema_state_dict"):
        for name, weights in one[key].items():
            assert torch.allclose(weights, two[key][name], atol=1e-5), name
    name = "decoder.1.conv_block.experts.conv2.pointwise"
    moved = one["model_state_dict"][name] - one["ema_state_dict"][name]
    assert (moved.flatten(1).abs().amax(1) > 1e-5).all(), "every expert has learned"


def test_two_processes_have_the_losses_of_one(both: tuple[Path, Path]) -> None:
    (one,), (two,) = (metrics(folder) for folder in both)
    assert one.keys() == two.keys()
    for name in one:
        assert float(one[name] or 0) == pytest.approx(float(two[name] or 0), abs=1e-5), name
    assert float(one["load/largest"]) == pytest.approx(1.5)
    # By the shares of its own images alone, each process would come near 1.4.
    assert float(one["train/load_loss"]) < 1.1
