"""Training and measuring the cells of a sweep, each in a process of its own."""

import json
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import IO, Any

from moectl.engine.errors import Interrupted, RunFailed
from moectl.engine.files import is_file, write_json
from moectl.engine.lock import Held, Lock
from moectl.engine.settings import flatten
from moectl.engine.signals import StopRequest
from moectl.engine.tracking import loads_or_none
from moectl.tools.sweep_plan import Cell, Plan

log = logging.getLogger(__name__)

_SCORES = "sweep_scores.json"
_STOPPED = 75


class Attendant:
    """Starts the cells of a sweep one after another, and stops with the one that runs.

    Args:
        plan: the sweep.
        stop: what the sweep was asked.
        lock: held by every process that works on a cell, even if it outlives the sweep.
        quiet: cells only warn.
    """

    def __init__(self, plan: Plan, stop: StopRequest, lock: Lock, *, quiet: bool) -> None:
        self.plan, self.stop, self.lock, self.quiet = plan, stop, lock, quiet

    def is_done(self, cell: Cell) -> bool:
        """Whether nothing is left to do for a cell."""
        trained = is_trained(self.plan.folder / cell.name)
        return trained and (not self.plan.eval or kept_scores(self.plan, cell) is not None)

    def attend(self, cell: Cell) -> None:
        """Train a cell, or go on with it, and measure it; nothing is done twice.

        Raises:
            RunFailed: saying why the cell has no scores.
            Interrupted: if the cell was stopped.
            UserError: if somebody else is training it.
        """
        self._train(cell)
        if self.plan.eval and kept_scores(self.plan, cell) is None:
            self._measure(cell)

    def _train(self, cell: Cell) -> None:
        folder = self.plan.folder / cell.name
        if is_trained(folder):
            log.info("trained already")
            return
        before = _record(folder)
        code = self._start([*cell.words, *_place(folder)], subprocess.DEVNULL)
        if is_trained(folder):
            return
        after = _record(folder)
        self._refuse_stopped(code, str(after.get("reason", "")))
        own = after != before and after.get("status") == "failed"
        raise RunFailed(str(after["reason"]) if own else _ending(code))

    def _measure(self, cell: Cell) -> None:
        folder = self.plan.folder / cell.name
        weights = f"@{self.plan.weights}" if self.plan.weights else ""
        words = [*self.plan.eval, f"--run={folder}{weights}", "--json"]
        measuring = " ".join(self.plan.eval[:2])
        with tempfile.TemporaryFile() as answer:
            code = self._start(words, answer)
            answer.seek(0)
            text = answer.read()
        if code:
            self._refuse_stopped(code, "")
            raise RunFailed(f"{measuring}: {_ending(code)}")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise RunFailed(f"{measuring}: answers with a list, not with scores")
        document = {"eval": _asked(self.plan), "scores": numbers(found)}
        write_json(folder / _SCORES, document)

    def _start(self, words: Sequence[str], stdout: int | IO[bytes]) -> int:
        """Run `moectl WORDS…` to its end and return its exit code; asked to stop, pass it on."""
        quiet = ["--quiet"] if self.quiet else []
        child = subprocess.Popen(
            [sys.executable, "-m", "moectl", *words, *quiet],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            process_group=0,  # a Ctrl-C of the terminal would reach it twice
            pass_fds=[self.lock.fileno()],
        )
        try:
            return self._wait(child)
        except KeyboardInterrupt:  # the second Ctrl-C
            child.send_signal(signal.SIGINT)
            child.wait()
            raise

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        told = False
        while True:
            try:
                return child.wait(0.2)
            except subprocess.TimeoutExpired:
                if self.stop and not told:  # a second signal might cut its last words
                    child.terminate()
                    told = True

    def _refuse_stopped(self, code: int, reason: str) -> None:
        if self.stop or code == _STOPPED:
            raise Interrupted(reason or self.stop.reason or "stopped")


@contextmanager
def alone(folder: Path, stop: StopRequest) -> Iterator[Lock]:
    """Keep other sweeps off a folder, and wait for a cell that a killed sweep has left behind.

    Raises:
        UserError: if another sweep works here, or nobody may.
        Interrupted: if asked to stop while waiting.
    """
    sweep = Lock(folder)
    try:
        cell = _wait_for(folder, stop)
        try:
            yield cell
        finally:
            cell.release()
    finally:
        sweep.release()


def _wait_for(folder: Path, stop: StopRequest) -> Lock:
    waiting = False
    while True:
        try:
            return Lock(folder, "cell.lock")
        except Held:
            if stop:
                raise Interrupted(f"{stop.reason} while waiting for a cell") from None
            if not waiting:
                log.warning("%s: a cell of an earlier sweep is still at work: waiting", folder)
            waiting = True
            sleep(0.2)


def is_trained(folder: Path) -> bool:
    """Whether the training of a cell has come to its end."""
    return bool(_record(folder).get("status") == "finished")


def scores_of(plan: Plan, cell: Cell) -> dict[str, float]:
    """Return the scores of a cell that is done, by dotted name."""
    if plan.eval:
        return kept_scores(plan, cell) or {}
    return numbers(_record(plan.folder / cell.name).get("scores", {}))


def kept_scores(plan: Plan, cell: Cell) -> dict[str, float] | None:
    """Return what the measuring command found, unless it was asked otherwise then."""
    kept = loads_or_none(plan.folder / cell.name / _SCORES)
    if isinstance(kept, dict) and kept.get("eval") == _asked(plan):
        return dict(kept["scores"])
    return None


def numbers(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a document by dotted name, without those about the weights file."""
    flat = flatten({name: value for name, value in document.items() if name != "weights"})
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _asked(plan: Plan) -> str:
    return shlex.join([*plan.eval, plan.weights])


def _record(folder: Path) -> dict[str, Any]:
    found = loads_or_none(folder / "run.json")
    return found if isinstance(found, dict) else {}


def _place(folder: Path) -> list[str]:
    """Return the option that makes a new run or goes on with one; what saved nothing is removed."""
    if folder.exists():
        Lock(folder).release()  # somebody may have resumed it by hand
        if is_file(folder / "run.json") and any(folder.rglob("manifest.json")):
            return [f"--resume={folder}"]
        shutil.rmtree(folder)
    return [f"--out={folder}"]


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}, explained on standard error"
