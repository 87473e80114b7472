"""One writer per folder."""

import os
import signal
import subprocess
import sys
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
