"""A tiny pipeline, run once: three specialists of scanned digits, their merge, its training."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "--task",
    "digits",
    "--width",
    "4",
    "--set",
    "train.batch_size=64",
    "--set",
    "train.precision=no",
    "--quiet",
)


@pytest.fixture
def taskmoe(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of taskmoe in this process; return exit code, stdout and stderr."""
    from moectl.cli import _run

    def call(*words: str) -> tuple[int, str, str]:
        code = _run(["taskmoe", *words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs `s1`, `s2`, `s3` (specialists), `m` (merge), `t` (training)."""
    from moectl.cli import _run

    root = tmp_path_factory.mktemp("pipeline") / "runs"
    before = os.environ.get("MOECTL_RUNS")
    os.environ["MOECTL_RUNS"] = str(root)
    try:
        for number in "123":
            words = (
                "--specialist",
                number,
                "--num-epochs",
                "2",
                "--out",
                f"{root}/taskmoe/s{number}",
            )
            assert _run(["taskmoe", "specialist", *TINY, *words]) == 0
        assert _run(["taskmoe", "merge", *TINY, "--out", f"{root}/taskmoe/m"]) == 0
        words = ("--num-epochs", "2", "--out", f"{root}/taskmoe/t")
        assert _run(["taskmoe", "train", *TINY, *words]) == 0
    finally:
        os.environ.pop("MOECTL_RUNS")
        if before is not None:
            os.environ["MOECTL_RUNS"] = before
    return root


@pytest.fixture
def runs(finished_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the one that commands look into; not to be written to."""
    monkeypatch.setenv("MOECTL_RUNS", str(finished_runs))
    return finished_runs / "taskmoe"


@pytest.fixture
def own_runs(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished runs, as a copy that may be changed."""
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    return shutil.copytree(runs, tmp_path / "runs" / "taskmoe")


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Any]:
    """Make a run of a training that has not begun, with settings such as model__width=8."""
    from moectl.engine.launch import build_accelerator
    from moectl.engine.run import create
    from moectl.engine.settings import resolve
    from moectl.taskmoe.settings import TaskmoeSettings

    tiny = {"data.task": "digits", "model.width": 4, "train.precision": "no"}

    def make(**changes: Any) -> Any:
        named = {name.replace("__", "."): value for name, value in changes.items()}
        wanted = resolve(TaskmoeSettings, {**tiny, **named}, [], [])[0]
        made: Any = {"room": "taskmoe", "command": "train", "name": "train", "origin": {}}
        accelerator = build_accelerator(wanted.train, cpu=True)
        return create(wanted, accelerator, out=tmp_path / "run", **made)

    return make
