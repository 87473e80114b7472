"""A tiny pipeline, run once: three specialists of scanned digits, their merge, its training."""

import os
from collections.abc import Callable
from pathlib import Path

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
