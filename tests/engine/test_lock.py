"""One writer per folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from moectl.engine.errors import UserError
from moectl.engine.lock import Lock


def test_the_second_writer_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    with pytest.raises(UserError, match=f"another process is writing here .process {os.getpid()} "):
        Lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        Lock(tmp_path)  # a refusal does not wipe the name
    first.release()
    Lock(tmp_path).release()


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(UserError, match=r"run\.lock: cannot be written \(Is a directory\)$"):
        Lock(tmp_path)


def test_a_file_system_without_locks_is_only_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    Lock(tmp_path).release()
    assert "cannot be locked" in caplog.text


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from moectl.engine.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on "):
            Lock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    Lock(tmp_path).release()


def test_forked_processes_do_not_hold_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        with pytest.raises(UserError, match="another process is writing here"):
            Lock(tmp_path)
        lock.release()
        deadline = time.monotonic() + 5
        while True:  # the child may need a moment to let go
            try:
                Lock(tmp_path).release()
                break
            except UserError:
                assert time.monotonic() < deadline
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_program_that_inherits_a_lock_holds_it_as_well(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "other.lock")
    words = [sys.executable, "-c", "input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[lock.fileno()]) as heir:
        lock.release()
        with pytest.raises(UserError, match="another process is writing here"):
            Lock(tmp_path, "other.lock")
        Lock(tmp_path).release()  # a file of another name is another lock
        heir.communicate(b"\n")
    Lock(tmp_path, "other.lock").release()
