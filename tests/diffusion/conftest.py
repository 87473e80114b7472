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
