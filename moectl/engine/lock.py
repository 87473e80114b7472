"""One writer per run folder."""

import fcntl
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from moectl.engine.errors import UserError

log = logging.getLogger(__name__)


class Held(UserError):  # noqa: N818 - a finding about a folder
    """Another process has the lock."""


class Lock:
    """One writer per run folder; the kernel lets go when the process dies, however it dies.

    Args:
        folder: the folder.
        name: of the file that is locked in it.

    Raises:
        Held: if another process does.
        UserError: if its file cannot be written, as in a folder of others.
    """

    def __init__(self, folder: Path, name: str = "run.lock") -> None:
        try:
            self._file = (folder / name).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise Held(f"{folder}: another process is writing here ({holder})") from None
        except OSError as error:  # some network file systems know no locks
            log.warning("%s: cannot be locked against a second writer: %s", folder, error)
        self._file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        self._file.flush()
        # Loader workers outlive a killed process by seconds and must not keep its lock.
        os.register_at_fork(after_in_child=self.release)

    def fileno(self) -> int:
        """Return the descriptor; a program that inherits it holds the lock as well."""
        return self._file.fileno()

    def release(self) -> None:
        """Let others write. The file stays: removing it would let two writers in."""
        self._file.close()
