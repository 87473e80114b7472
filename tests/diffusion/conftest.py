"""A tiny training of scanned digits, run once, and what makes more of them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "--data", "digits", "--image-size", "8", "--model-channels", "8", "--channel-mults", "1,2",
    "--num-experts", "3", "--set", "model.time_dim=8", "--set", "model.class_dim=8",
    "--set", "data.val_fraction=0.1", "--set", "train.precision=no", "--batch-size", "256",
    "--lr", "0.003", "--ema-decay", "0.9", "--quiet",
)  # fmt: skip
"""Options of a training that takes a second an epoch."""


@pytest.fixture
def diffusion(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of diffusion in this process; return exit code, stdout and stderr."""
    from moectl.cli import _run

    def call(*words: str) -> tuple[int, str, str]:
        code = _run(["diffusion", *words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two epochs; not to be written to."""
    from moectl.cli import _run

    root = tmp_path_factory.mktemp("diffusion") / "runs"
    folder = root / "diffusion" / "t"
    before = os.environ.get("MOECTL_RUNS")
    os.environ["MOECTL_RUNS"] = str(root)
    try:
        words = ("--epochs", "2", "--sample-every", "2", "--save-every", "1", "--out", str(folder))
        assert _run(["diffusion", "train", *TINY, *words]) == 0
    finally:
        os.environ.pop("MOECTL_RUNS")
        if before is not None:
            os.environ["MOECTL_RUNS"] = before
    return folder


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run, as a copy that may be changed, in the folder that commands look into."""
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    return shutil.copytree(finished_run, tmp_path / "runs" / "diffusion" / "t")


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Any]:
    """Make a run of a training that has not begun, with settings such as model__channels=8."""
    from moectl.diffusion.settings import DiffusionSettings
    from moectl.engine.launch import build_accelerator
    from moectl.engine.run import create
    from moectl.engine.settings import resolve

    def make(**values: Any) -> Any:
        given = {key.replace("__", "."): value for key, value in values.items()}
        settings, origin = resolve(DiffusionSettings, given, [], [])
        return create(
            settings,
            build_accelerator(settings.train, cpu=True),
            room="diffusion",
            command="train",
            name="new",
            out=tmp_path / "new",
            origin=origin,
        )

    return make


SMALL = {
    "data.image_size": 8,
    "model.channels": 8,
    "model.mults": [1, 2],
    "model.time_dim": 8,
    "model.class_dim": 8,
    "model.num_experts": 3,
    "optim.lr": 0.01,
    "train.precision": "no",
    "train.batch_size": 8,
    "train.epochs": 1,
    "train.ema_decay": 0.9,
    "train.log_every": 0,
    "train.sample_every": 0,
    "train.tensorboard": False,
}


@pytest.fixture(scope="session")
def images_of() -> Callable[..., Any]:
    """Make a source of so many images: noise that is brighter the higher the class, in turn."""
    import torch

    from moectl.common.images import Plain
    from moectl.engine.sources import TensorSource

    def make(count: int, copies: int = 1) -> TensorSource:
        labels = torch.arange(count) % 3
        draws = torch.Generator().manual_seed(count)
        noise = torch.randint(0, 80, (count, 3, 8, 8), generator=draws)
        levels = (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        plain = Plain((0.5,) * 3, (0.5,) * 3)
        return TensorSource(levels.repeat(copies, 1, 1, 1), labels.repeat(copies), None, plain)

    return make


@pytest.fixture
def fit(
    images_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Train on 24 images, 3 updates an epoch, with settings such as model__moe=False; no report."""
    from moectl.diffusion import train
    from moectl.diffusion.data import Data
    from moectl.diffusion.settings import DiffusionSettings
    from moectl.engine.launch import build_accelerator
    from moectl.engine.run import create
    from moectl.engine.settings import resolve

    def call(name: str = "t", source: Any = None, **values: Any) -> Path:
        facts = {"dataset": "noise", "image_size": 8, "images": {}, "digest": "0" * 16}
        data = Data(source or images_of(24), images_of(8), ["a", "b", "c"], facts)
        given = SMALL | {key.replace("__", "."): value for key, value in values.items()}
        settings, origin = resolve(DiffusionSettings, given, [], [])
        monkeypatch.setattr(train, "load", lambda _: data)
        monkeypatch.setattr(train, "report", lambda _: None)
        run = create(
            settings,
            build_accelerator(settings.train, cpu=True),
            room="diffusion",
            command="train",
            name=name,
            out=tmp_path / name,
            origin=origin,
        )
        with run:
            train.train(settings, run)
        return tmp_path / name

    return call
