"""What a kill, a full disk or a flipped bit leave behind never passes for a checkpoint."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moectl.engine import checkpoint
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.files import sha256
from tests.faults.procedures import in_child

FILES = ("model.safetensors", "optimizer.pt", "loop.json", "manifest.json")


def state(update: int, size: int = 64) -> dict[str, bytes]:
    return {name: f"{update} ".encode() * size for name in FILES[:3]}


def sabotage(after: int) -> None:
    """Let the process die before its n-th call to the file system."""
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                os._exit(9)
            return real(*values, **options)

        return call

    for place, name in [
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "open"),
        (Path, "rename"),
        (shutil, "rmtree"),
    ]:
        setattr(place, name, dying(getattr(place, name)))


@pytest.mark.parametrize("first", [True, False], ids=["first-save", "later-save"])
def test_death_between_any_two_steps_of_a_save_loses_at_most_that_save(
    tmp_path: Path, first: bool
) -> None:
    old = [] if first else [1, 2]
    for point in range(100):
        root = tmp_path / str(point)
        for update in old:
            checkpoint.save(root, update, state(update), {})

        def work(root: Path = root, point: int = point) -> None:
            sabotage(point)
            checkpoint.save(root, 3, state(3), {})
            checkpoint.prune(root, 2, best=1)

        _, code = os.waitpid(in_child(work), 0)
        chosen = checkpoint.choose(root, fall_back=False)
        found = checkpoint.update_of(chosen)
        assert found in ([-1, 3] if first else [2, 3]), f"died at call {point}"
        if chosen.name:
            assert checkpoint.read(chosen)[0] == state(found)
        assert not list(root.glob(".*")), "half-written folders are removed"
        if code == 0:
            assert found == 3
            break
    assert point > 8, "the save has more steps than that"


def test_random_kills_while_saving_leave_a_valid_newest_checkpoint(tmp_path: Path) -> None:
    root, chance = tmp_path / "checkpoints", random.Random(0)
    blob = os.urandom(10 * 2**20)
    start = 1
    for trial in range(150):
        if trial >= 25 and start > 5:  # a busy machine ends few saves in a trial
            break

        def work(start: int = start) -> None:
            for update in range(start, 10_000):
                files = {"model.safetensors": blob, "loop.json": str(update).encode()}
                checkpoint.save(root, update, files, {})
                checkpoint.prune(root, 2, None)

        child = in_child(work)
        time.sleep(chance.uniform(0.02, 0.2) * (1 + trial / 25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        chosen = checkpoint.choose(root, fall_back=False)
        found = checkpoint.update_of(chosen)
        assert found >= start - 1 or found == -1
        if chosen.name:
            assert checkpoint.read(chosen)[0]["loop.json"] == str(found).encode()
        start = max(found, 0) + 1
    assert start > 5, "the test needs some saves that end"
    assert len(checkpoint.existing(root)) <= 3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def stopped(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints that was stopped at update 6."""
    from moectl.engine.errors import Interrupted

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        toy.complete(folder, on_step=toy.stop_at(6), train__save_minutes=0)
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, Path.unlink])
def test_damage_is_named_when_explicit_and_skipped_when_automatic(
    stopped: Path, tmp_path: Path, file: str, damage: Callable[[Path], Any]
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", root)
    newest, before = checkpoint.existing(root)[:2]
    damage(newest / file)
    with pytest.raises(UserError) as refusal:
        checkpoint.choose(root, fall_back=False)
    assert file in refusal.value.message or damage is Path.unlink
    assert newest.name in refusal.value.message
    assert "auto" in refusal.value.hint
    assert newest.exists(), "an explicit resume changes nothing"
    assert checkpoint.choose(root, fall_back=True) == before
    assert checkpoint.existing(root)[0] == before, "the corrupt one is set aside"


def test_a_run_goes_on_from_the_checkpoint_before_a_corrupt_one(
    toy: ModuleType, stopped: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(stopped, folder)
    _flip(folder / "checkpoints" / "update-00000006" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: does not match its checksum"):
        toy.complete(folder, resume="named")
    toy.complete(folder, resume="auto")
    toy.complete(whole)
    assert toy.digests(folder) == toy.digests(whole)
    assert toy.metrics(folder) == toy.metrics(whole)


def _edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = checkpoint._signature(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest["files"].pop("loop.json"),
        lambda manifest: manifest["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
        lambda manifest: manifest["files"]["loop.json"].update(bytes=1),
        lambda manifest: manifest["files"].update({"loop.json": "text"}),
    ],
    ids=["version", "no-files", "missing-entry", "escape", "wrong-size", "wrong-type"],
)
def test_manifest_that_lies_is_corrupt(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    folder = checkpoint.save(tmp_path, 1, state(1), {})
    _edited(folder, change)
    with pytest.raises(checkpoint.Corrupt):
        checkpoint.read(folder)


def test_a_bit_that_flips_anywhere_in_a_manifest_is_noticed(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, state(1, size=1), {"processes": 2})
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(checkpoint.Corrupt):
            checkpoint.read(folder)


def test_every_checkpoint_corrupt_is_an_error_even_when_automatic(tmp_path: Path) -> None:
    for update in (1, 2):
        _flip(checkpoint.save(tmp_path, update, state(update), {}) / "loop.json")
    with pytest.raises(UserError, match="none of the 2 checkpoints is readable"):
        checkpoint.choose(tmp_path, fall_back=True)


class _Payload:
    """Something that acts when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_code_inside_a_signed_optimizer_file_never_runs(
    toy: ModuleType, stopped: Path, tmp_path: Path
) -> None:
    import torch

    folder, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(stopped, folder)
    target = folder / "checkpoints" / "update-00000006"
    torch.save({"optimizer": _Payload(mark)}, target / "optimizer.pt")
    data = (target / "optimizer.pt").read_bytes()
    entry = {"bytes": len(data), "sha256": sha256(data)}
    _edited(target, lambda manifest: manifest["files"].update({"optimizer.pt": entry}))
    with pytest.raises(UserError, match=r"optimizer\.pt: holds more than tensors"):
        toy.complete(folder, resume="named")
    assert not mark.exists()


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """As if the disk were full: no file can grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_failed_save_is_a_warning_and_training_goes_on(toy: ModuleType, tmp_path: Path) -> None:
    folder, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def harm(step: Any, loss: Any) -> Any:
        if step.index in (5, 6):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            assert step.index != 7 or toy.checkpoints(folder)[-1] == "update-00000005"
        return loss

    try:
        toy.complete(folder, on_step=harm, train__save_minutes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log = (folder / "log.txt").read_text()
    assert "checkpoint at update 6 could not be written" in log
    assert "checkpoint at update 7 could not be written" in log
    assert toy.checkpoints(folder)[-1] == "update-00000016"
    assert toy.status(folder)[0] == "finished"


def test_three_failed_saves_in_a_row_end_the_run(toy: ModuleType, tmp_path: Path) -> None:
    folder, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def harm(step: Any, loss: Any) -> Any:
        if step.index == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
        return loss

    try:
        with pytest.raises(RunFailed, match="3 checkpoints in a row could not be written"):
            toy.complete(folder, on_step=harm, train__save_minutes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    for name in toy.checkpoints(folder):
        checkpoint.read(folder / "checkpoints" / name)
    assert toy.checkpoints(folder)[-1] == "update-00000005"
    assert toy.status(folder)[0] == "failed"


def test_no_room_is_found_out_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 1, state(1), {})
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "work"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    made = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False)
    if not made or made.returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoints_before(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the want of room is foreseen, or met while the files are written."""
    big = {"model.safetensors": bytes(100 * 2**10), "loop.json": b"{}"}
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(small_disk, 1, big, {})
    usage = shutil.disk_usage(small_disk)  # as if others filled it after the look
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    for update in (1, 2):
        checkpoint.save(small_disk, update, big, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small_disk, 3, big, {})
    assert not list(small_disk.glob(".*")), "what was begun is gone"
    newest = checkpoint.choose(small_disk, fall_back=False)
    assert (checkpoint.update_of(newest), checkpoint.read(newest)[0]) == (2, big)
    checkpoint.prune(small_disk, 1, None)
    assert checkpoint.save(small_disk, 3, big, {}).is_dir()


def test_vanished_run_folder_ends_the_run_and_says_so(toy: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def harm(step: Any, loss: Any) -> Any:
        if step.index == 5:
            shutil.rmtree(folder)
        return loss

    with pytest.raises((OSError, RunFailed), match=r"metrics\.csv|run"):
        toy.complete(folder, on_step=harm)


def test_rehearsal_finds_an_unwritable_folder_in_the_first_minute(
    toy: ModuleType, tmp_path: Path
) -> None:
    seen = []
    with toy.open_run(tmp_path / "run", toy.settings()) as run:
        loop = _loop(toy, run)
        loop.rehearse(lambda: seen.append("evaluated"))
        assert seen == ["evaluated"]
        assert not (run.folder / "rehearsal").exists()
        with largest_file(8192), pytest.raises(RunFailed, match="cannot be written into"):
            loop.rehearse(lambda: None)
        assert not (run.folder / "rehearsal").exists()


def _loop(toy: ModuleType, run: Any) -> Any:
    import torch

    net = toy.model()
    return run.loop(net, toy.source(), torch.optim.SGD(net.parameters(), lr=0.1), lambda _: 1.0)
