"""The run: a folder that records everything one command did, and who may write into it."""

import logging
import os
import secrets
import shlex
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moectl.engine import artefact, console
from moectl.engine.environment import environment
from moectl.engine.errors import Interrupted, UserError
from moectl.engine.files import write_json, write_text
from moectl.engine.launch import agree
from moectl.engine.lock import Lock
from moectl.engine.settings import Settings, to_toml
from moectl.engine.signals import StopRequest
from moectl.engine.tracking import loads_or_none

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

    from moectl.engine.loop import Loop
    from moectl.engine.optim import Schedule
    from moectl.engine.sections import TrainSection
    from moectl.engine.sources import Source

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)

_FIRST_FILES = frozenset(
    {"run.json", "settings.toml", "log.txt", "run.lock", "metrics.csv", "split.json", "tensorboard"}
)
"""What a run has before there is anything worth keeping."""


def runs_root() -> Path:
    """Return the folder of all runs: ./runs, or where MOECTL_RUNS points."""
    return Path(os.environ.get("MOECTL_RUNS", "runs"))


def read_record(folder: Path) -> dict[str, Any]:
    """Return a run's record.

    Raises:
        UserError: if the folder is not a run.
    """
    record = loads_or_none(folder / "run.json")
    if not isinstance(record, dict):
        raise UserError(f"{folder}: not a run folder (no readable run.json)")
    return record


def parents_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run was made from: `path`, and `sha256` where it was one file."""
    # Older records name some by their path alone.
    return [{"path": one} if isinstance(one, str) else one for one in record.get("parents", [])]


def status_of(record: Mapping[str, Any]) -> str:
    """Return the status of a run; `killed` if it says running and its process here is gone."""
    status = str(record.get("status", "?"))
    if status == "running" and record.get("host") == socket.gethostname() and record.get("pid"):
        try:
            os.kill(int(record["pid"]), 0)
        except ProcessLookupError:
            return "killed"
        except PermissionError:  # alive, and another user's
            pass
    return status


class Run(Generic[S]):
    """A run folder opened for writing, with the accelerator that computes for it.

    Used as a context manager: entering takes over signals, leaving records how it went. A new run
    that a user's mistake ends before there is a result leaves nothing behind.

    Args:
        folder: the run folder, existing on rank 0 and decided by it.
        settings: the resolved settings.
        accelerator: devices and processes.
        record: what run.json holds so far, read under the lock.
        lock: of the folder, on rank 0.
        resuming: "" for a new run; "auto" or "named" if the training of this folder goes on.
        keep_folder: whether the folder was named by the user, and stays if the run comes to
            nothing.
    """

    def __init__(  # noqa: PLR0913 - what a run is
        self,
        folder: Path,
        settings: S,
        accelerator: "Accelerator",
        record: dict[str, Any],
        lock: Lock | None,
        resuming: str = "",
        *,
        keep_folder: bool = False,
    ) -> None:
        self.folder, self.settings, self.accelerator = folder, settings, accelerator
        self.record, self.resuming, self._keep_folder = record, resuming, keep_folder
        self._was_finished = record.get("status") == "finished"
        self.stop = StopRequest(_train(settings).max_seconds)
        self._lock = lock
        self._log = console.log_to(folder / "log.txt")
        self._started = time.monotonic() - float(record.get("wall_seconds", 0.0))

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> Any:
        """The torch device of this process."""
        return self.accelerator.device

    @property
    def elapsed_seconds(self) -> float:
        """Time spent on this run, over all its sittings."""
        return time.monotonic() - self._started

    def note(self, **values: Any) -> None:
        """Put values into run.json."""
        self.record.update(values)
        self.record["wall_seconds"] = round(self.elapsed_seconds, 3)
        self.record["updated"] = _now()
        if self.is_main:
            write_json(self.folder / "run.json", self.record)

    def keep_to(self, data: Mapping[str, Any]) -> None:
        """Note what is trained on; a resumed run must find the same.

        Args:
            data: plain values: `dataset`, `images` of each part, and a `digest` of the contents.

        Raises:
            UserError: if the digest is not the one that the run began with.
        """
        known = self.record.get("data") or data
        if known["digest"] != data["digest"]:
            raise UserError(
                f"{self.folder}: began with other images of {known['dataset']}: {known['images']}"
                f" then, {data['images']} now, or other contents",
                "start a new run for these",
            )
        self.note(data=dict(data))

    def write_settings(self) -> None:
        """Write settings.toml, once it is sure that they are the run's."""
        if self.is_main:
            write_text(self.folder / "settings.toml", to_toml(self.settings))

    def loop(  # noqa: PLR0913 - what a training is made of
        self,
        model: "nn.Module",
        source: "Source",
        optimizer: "Optimizer",
        schedule: "Schedule",
        monitor: str = "",
        smallest: int = 1,
        stage: str = "",
        train: "TrainSection | None" = None,
    ) -> "Loop":
        """Prepare a training loop over this run, continued where its newest checkpoint stands.

        Args:
            model: the network, on any device.
            source: the training data.
            optimizer: over the parameters of the model.
            schedule: factor on the learning rate by epochs done.
            monitor: name of the validation score whose largest value is best.
            smallest: samples that every process needs in a forward pass; the last batch of an epoch
                is left out if it has fewer.
            stage: of a run with several trainings; keeps checkpoints and metrics of its own.
            train: how it runs, if not as the settings say.

        Raises:
            UserError: if the data is too small for a single batch.
        """
        from moectl.engine.loop import Loop

        return Loop(self, model, source, optimizer, schedule, monitor, smallest, stage, train)

    def save_weights(
        self,
        name: str,
        payload: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        epoch: int,
        best: bool = False,
    ) -> None:
        """Write a weights file with its sidecar and list it in run.json.

        Args:
            name: file name, as the original document gives it.
            payload: tensors and plain types.
            facts: what rebuilds the model.
            epoch: epochs done, for references such as `@50`.
            best: whether this file is what `@best` means.
        """
        if self.is_main:
            facts = {**facts, "run": self.record["run"], "epoch": epoch}
            sidecar = artefact.save(self.folder / name, payload, facts)
            entry = {"file": name, "sha256": sidecar["sha256"], "epoch": epoch, "best": best}
            # A replayed epoch writes the same file again.
            others = [old for old in self.record.get("weights", []) if old["file"] != name]
            self.note(weights=[*others, entry])
        self.accelerator.wait_for_everyone()

    def __enter__(self) -> "Run[S]":
        self.stop.install()
        self.note(status="running", reason="", pid=os.getpid())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop.restore()
        stillborn = isinstance(error, UserError) and self._is_stillborn()
        try:
            if stillborn:
                pass  # nothing is left to say it in
            elif error is None:
                self.note(status="finished", reason="")
            elif isinstance(error, UserError) and self._was_finished:
                self.note(status="finished", reason="")  # refused: nothing was changed
            elif isinstance(error, Interrupted | KeyboardInterrupt):
                self.note(status="interrupted", reason=str(error) or "second Ctrl-C")
            else:
                with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                    file.writelines(traceback.format_exception(error))
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.note(status="failed", reason=reason)
        except OSError as problem:
            log.warning("run.json could not be updated: %s", problem)
        finally:
            console.log.removeHandler(self._log)
            self._log.close()
            if self._lock:
                self._lock.release()
                if stillborn:
                    self._remove()

    def _is_stillborn(self) -> bool:
        """Whether a new run has done nothing yet that would be missed."""
        begun = self.resuming or self.record.get("checkpoint") or self.record.get("weights")
        try:
            return not begun and {path.name for path in self.folder.iterdir()} <= _FIRST_FILES
        except OSError:  # another process was faster
            return True

    def _remove(self) -> None:
        """Take away what this run wrote, so that the same command can be given again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._keep_folder:
            self.folder.mkdir(exist_ok=True)


def _train(settings: Settings) -> "TrainSection":
    return settings.train  # type: ignore[attr-defined]


def create(  # noqa: PLR0913 - what a run is
    settings: S,
    accelerator: "Accelerator",
    *,
    room: str,
    command: str,
    name: str,
    out: Path | None,
    origin: Mapping[str, str],
) -> Run[S]:
    """Make a new run folder, on rank 0 for all.

    Raises:
        UserError: if `out` exists and is not empty, or cannot be created.
    """
    folder = agree(accelerator, lambda: _new_folder(room, name, out))
    record = {
        "format": 1,
        "run": f"{room}/{folder.name}",
        "id": f"{name}-{secrets.token_hex(4)}",
        "room": room,
        "command": command,
        "name": name,
        "status": "running",
        "started": _now(),
        "wall_seconds": 0.0,
        "argv": shlex.join(["moectl", *sys.argv[1:]]),
        "seed": _train(settings).seed,
        "settings": {key: where for key, where in origin.items() if where != "default"},
        **environment(accelerator),
        "parents": [],
        "weights": [],
    }
    lock = _lock(folder, accelerator)
    run = Run(folder, settings, accelerator, record, lock, keep_folder=out is not None)
    run.write_settings()
    run.note()
    accelerator.wait_for_everyone()
    return run


def reopen(folder: Path, settings: S, accelerator: "Accelerator", *, auto: bool) -> Run[S]:
    """Open an existing run folder to go on with its training.

    Args:
        folder: the run.
        settings: its settings, perhaps with more epochs.
        accelerator: devices and processes.
        auto: skip a corrupt newest checkpoint instead of refusing.
    """
    here = environment(accelerator)
    lock = _lock(folder, accelerator)  # before the last words of whoever worked here are read
    record = read_record(folder)
    record["resumed"] = [*record.get("resumed", []), {"at": _now(), **here}]
    for name in ("device", "threads", "versions"):
        if here[name] != record.get(name):
            log.warning(
                "%s: %s instead of %s; the result may differ in the last digits",
                name,
                here[name],
                record.get(name),
            )
    return Run(folder, settings, accelerator, record, lock, "auto" if auto else "named")


def _lock(folder: Path, accelerator: "Accelerator") -> Lock | None:
    return Lock(folder) if accelerator.is_main_process else None


def _new_folder(room: str, name: str, out: Path | None) -> Path:
    try:
        if out is not None:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(
                    f"--out {out}: exists and is not an empty folder", "--resume continues a run"
                )
            out.mkdir(parents=True, exist_ok=True)
            return out
        parent = runs_root() / room
        parent.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        for number in range(1, 1000):
            folder = parent / (f"{name}-{stamp}" if number == 1 else f"{name}-{stamp}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            if parent.resolve() not in folder.resolve().parents:
                raise UserError(f"{folder}: lies outside {parent}")
            return folder
    except OSError as error:
        raise UserError(f"{out or runs_root()}: cannot be created ({error.strerror})") from None
    raise UserError(f"{runs_root() / room}: too many runs named {name} in one second")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
