"""A tiny training of all three stages on glyphs, run once."""

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

TINY = (
    *("--dataset", "synthetic", "--backbone-type", "tiny", "--no-pretrained"),
    *("--image-size", "64", "--set", "data.synthetic_images=120", "--set", "model.projection=16"),
    *("--batch-size", "16", "--lr", "1e-3", "--lr-mult-stage1", "1", "--lr-mult-stage3", "10"),
    *("--epochs-stage1", "2", "--epochs-stage2", "2", "--epochs-stage3", "3"),
    *("--normalize", "dataset", "--workers", "0", "--set", "train.precision=no"),
    *("--set", "train.tensorboard=false", "--cpu", "--quiet"),
)
SETTINGS = {
    "data.dataset": "synthetic",
    "data.image_size": 64,
    "data.synthetic_images": 120,
    "data.normalize": "dataset",
    "data.workers": 0,
    "model.backbone_type": "tiny",
    "model.pretrained": False,
    "model.projection": 16,
    "concept.backbone_lr": 1.0,
    "task.lr_factor": 10.0,
    "optim.lr": 1e-3,
    "train.epochs_stage1": 2,
    "train.epochs_stage2": 2,
    "train.epochs_stage3": 3,
    "train.precision": "no",
    "train.tensorboard": False,
}


@pytest.fixture
def csr(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of csr in this process; return exit code, stdout and stderr."""
    from moectl.cli import _run

    def call(*words: str) -> tuple[int, str, str]:
        code = _run(["csr", *words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_words() -> tuple[str, ...]:
    """What the tiny training is told."""
    return TINY


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny training; not to be written to."""
    from moectl.cli import _run

    root = tmp_path_factory.mktemp("pipeline") / "runs"
    before = os.environ.get("MOECTL_RUNS")
    os.environ["MOECTL_RUNS"] = str(root)
    try:
        assert _run(["csr", "train", *TINY, "--out", f"{root}/csr/t"]) == 0
    finally:
        os.environ.pop("MOECTL_RUNS")
        if before is not None:
            os.environ["MOECTL_RUNS"] = before
    return root / "csr" / "t"


@pytest.fixture(scope="session")
def measured_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny training with `evals/test@best_model_stage3`; not to be written to."""
    from moectl.cli import _run

    folder = tmp_path_factory.mktemp("measured") / "tiny"
    shutil.copytree(finished_run, folder)
    words = ("--run", str(folder), "--bootstrap", "50", "--cpu", "--quiet", "--json")
    assert _run(["csr", "eval", *words]) == 0
    return folder


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Any]:
    """Make a run of the tiny training that has not begun, with changes such as task__loss="bce"."""
    from moectl.csr.settings import CsrSettings
    from moectl.engine.launch import build_accelerator
    from moectl.engine.run import create
    from moectl.engine.settings import resolve

    numbers = count()

    def make(**changes: Any) -> Any:
        named = {name.replace("__", "."): value for name, value in changes.items()}
        wanted = resolve(CsrSettings, {**SETTINGS, **named}, [], [])[0]
        made: Any = {"room": "csr", "command": "train", "name": "train", "origin": {}}
        accelerator = build_accelerator(wanted.train, cpu=True)
        return create(wanted, accelerator, out=tmp_path / f"run{next(numbers)}", **made)

    return make
