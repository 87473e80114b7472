"""What every test starts from: an empty folder, a clean environment, no leftovers."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported; programs started by tests inherit it
)

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, and nothing that another test left behind."""
    for name in list(os.environ):
        if name.upper().startswith(("MOECTL_", "ACCELERATE_")) or name in _LAUNCHER:
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    log = logging.getLogger("moectl")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield folder
    for handler in set(log.handlers) - set(handlers):
        handler.close()
    log.handlers, log.level, log.propagate = handlers, level, propagate
    for number, handler_before in signals.items():
        signal.signal(number, handler_before)
    _reset()


def _reset() -> None:
    if "moectl.engine.console" in sys.modules:
        sys.modules["moectl.engine.console"]._state.update(json=False, quiet=False)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return _ROOT


@pytest.fixture
def balpoe(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of balpoe in this process; return exit code, stdout and stderr."""
    from moectl.cli import _run

    def call(*words: str) -> tuple[int, str, str]:
        code = _run(["balpoe", *words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The tiny system that is trained through the real engine."""
    path = _ROOT / "tests" / "engine" / "toy.py"
    spec = importlib.util.spec_from_file_location("toy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Start `moectl WORDS…`, or another program, as a process of its own."""

    def begin(*words: str, program: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        start = program or (sys.executable, "-m", "moectl")
        return subprocess.Popen([*start, *words], **{"env": environment, **pipes, **options})

    return begin


@pytest.fixture(scope="session")
def finish() -> Callable[..., tuple[int, str, str]]:
    """Wait for a process and return its exit code, stdout and stderr."""

    def end(program: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
        with program:
            out, err = program.communicate(timeout=seconds)
        return program.returncode, out or "", err or ""

    return end
