"""What every test starts from: an empty folder, a clean environment, no leftovers."""

import base64
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported; programs started by tests inherit it
)

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """A page that is whole by itself: tags are balanced, and nothing comes from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert "default-src 'none'" in str(self.all("meta"))
        assert "width=device-width" in str(self.all("meta"))
        assert not {"script", "link", "iframe", "object", "a", "base"} & {
            tag for tag, _ in self.tags
        }
        style = text[text.index("<style>") : text.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style
        for tag, values in self.tags:
            assert not [name for name in values if name.startswith("on")]
            assert "href" not in values
            assert tag == "img" or "src" not in values
        for one in self.all("img"):
            kind, _, data = str(one["src"]).partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            assert base64.b64decode(data, validate=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all such tags."""
        return [values for name, values in self.tags if name == tag]


@pytest.fixture(scope="session")
def parsed() -> Callable[[Path], Page]:
    """Read a page, and check that it is whole by itself."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


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
