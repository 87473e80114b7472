"""A program in the place of `python -m moectl`, for sweeps that train nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STUB = """
import json, os, shutil, signal, sys
from pathlib import Path

words = sys.argv[1:]
options = dict(word[2:].split("=", 1) for word in words if "=" in word)
values = dict(word[6:].split("=", 1) for word in words if word.startswith("--set="))
with open("calls.txt", "a") as file:
    file.write(json.dumps(words) + "\\n")
behaviours = json.loads(Path("behave.json").read_text()) if Path("behave.json").exists() else {}

if words[1] == "eval":
    if behaviours.get("eval") == "list":
        print("[1, 2]")
        sys.exit(0)
    if "eval" in behaviours:
        sys.exit(behaviours["eval"])
    folder = Path(options["run"].split("@")[0])
    seed = json.loads((folder / "run.json").read_text())["seed"]
    print(json.dumps({"run": str(folder), "weights": {"epoch": 9}, "scores": {"measured": seed}}))
    sys.exit(0)

folder = Path(options.get("out") or options["resume"])
seed, rate = int(values["train.seed"]), float(values.get("optim.lr", 1))
behaviour = behaviours.get(str(seed), "")


def note(status, reason="", **more):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"seed": seed, "status": status, "reason": reason, "wall_seconds": 2.0, **more}
    (folder / "run.json").write_text(json.dumps(record))


def stop(*_):
    # A run gives the signal back before it writes its last words: a second one would cut them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    again = signal.sigtimedwait([signal.SIGTERM], 0.6)
    note("interrupted", "told twice" if again else "SIGTERM after update 3")
    sys.exit(75)


def end(*_):
    note("finished", scores={})
    sys.exit(0)


if "resume" in options and behaviour == "":
    assert (folder / "run.json").exists()
if behaviour == "refuse":
    sys.exit(2)
if "out" in options and folder.exists():
    sys.exit("not empty")
if behaviour == "fail":
    note("failed", "RunFailed: the loss is not finite")
    sys.exit(1)
if behaviour.startswith("save"):
    (folder / "checkpoints" / "update-1").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "update-1" / "manifest.json").write_text("{}")
if behaviour.endswith("die"):
    note("running")
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "limit":
    note("interrupted", "time limit after update 3")
    sys.exit(75)
if behaviour == "start":  # not yet so far that it could listen
    signal.alarm(60)
    Path("waiting").touch()
    signal.pause()
if behaviour in ("wait", "finish", "stubborn"):
    answers = {"wait": stop, "finish": end, "stubborn": lambda *_: Path("told").touch()}
    signal.signal(signal.SIGTERM, answers[behaviour])
    note("running", pid=os.getpid())
    signal.alarm(60)  # no test leaves it behind for long
    Path("waiting").touch()
    while True:
        signal.pause()
print("runs are not printed by a sweep")
note("finished", scores={"last": {"accuracy": seed * rate, "name": "x", "epoch": 2, "ok": True}})
"""


@pytest.fixture
def behave(isolated: Path) -> Callable[..., None]:
    """Put the stub in the place of moectl; a call says what cells of a seed do."""
    package = isolated / "moectl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STUB)

    def say(**behaviours: Any) -> None:
        named = {name.removeprefix("seed"): value for name, value in behaviours.items()}
        (isolated / "behave.json").write_text(json.dumps(named))

    return say


@pytest.fixture
def calls(isolated: Path) -> Callable[[], list[list[str]]]:
    """Return what the stub was asked for since the last time."""

    def read() -> list[list[str]]:
        path = isolated / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def sweep_file(isolated: Path) -> Callable[..., Path]:
    """Write a sweep file; None leaves a key out."""

    def write(tables: str = "", file: str = "s.toml", **keys: Any) -> Path:
        keys = {"command": "balpoe train", "seeds": [1, 2, 3], **keys}
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
        path = isolated / file
        path.write_text("\n".join([*lines, tables]) + "\n")
        return Path(file)

    return write
