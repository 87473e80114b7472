"""Clocks for the stages of an answer."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from moectl.engine.errors import UserError

_TIMES = 20

Kind = Literal["wall", "cpu"]
"""The clock on the wall, or the processor time of this process, which others disturb less."""


class Clock:
    """Milliseconds between two moments, after the device has done what it was given.

    Args:
        device: that computes; a GPU is waited for.
        kind: `cpu` is for the CPU alone.

    Raises:
        ValueError: if a GPU is to be timed by processor time.
    """

    def __init__(self, device: torch.device, kind: Kind = "wall") -> None:
        if kind == "cpu" and device.type != "cpu":
            raise ValueError(f"processor time says nothing about {device}: use the clock wall")
        self._cuda = device.type == "cuda"
        self._read = time.process_time if kind == "cpu" else time.perf_counter

    def now(self) -> float:
        """Return this moment, in seconds."""
        if self._cuda:
            torch.cuda.synchronize()
        return self._read()

    def since(self, start: float) -> float:
        """Return the milliseconds since a moment."""
        return (self.now() - start) * 1000


def open_clock(device: torch.device, kind: Kind) -> Clock:
    """Return the clock of the settings.

    Raises:
        UserError: if it is none for the device.
    """
    try:
        return Clock(device, kind)
    except ValueError as error:
        raise UserError(f"latency.clock = {kind}: {error}") from None


def median_ms(clock: Clock, work: Callable[[], Any]) -> float:
    """Return the median milliseconds of some work, the first time left out."""
    times = []
    for _ in range(_TIMES + 1):
        start = clock.now()
        work()
        times.append(clock.since(start))
    return statistics.median(times[1:])
