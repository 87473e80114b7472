"""Stopping in good order: the first signal asks, the second insists."""

import signal
import time
from types import FrameType
from typing import Any

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody wants the run to stop, by signal or by its time limit.

    Args:
        max_seconds: time from now until the run asks itself to stop.
    """

    def __init__(self, max_seconds: float = float("inf")) -> None:
        self.reason = ""
        self.deadline = time.monotonic() + max_seconds
        """When it asks itself, on the clock of `time.monotonic`."""
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() >= self.deadline:
            self.reason = "time limit"
        return bool(self.reason)

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR1."""
        for number in _ASKING:
            self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
