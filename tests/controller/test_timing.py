"""Clocks that read the right time and refuse what they cannot say."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.controller.timing import Clock, median_ms, open_clock
from moectl.engine.errors import UserError

CPU = torch.device("cpu")


def test_milliseconds_are_counted_from_the_moment_given(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([2.0, 2.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = Clock(CPU)
    assert clock.since(clock.now()) == 250


def test_the_wall_goes_on_while_the_process_sleeps_and_its_own_time_does_not() -> None:
    wall, own = Clock(CPU), Clock(CPU, "cpu")
    start = wall.now(), own.now()
    time.sleep(0.05)
    assert wall.since(start[0]) >= 49
    assert own.since(start[1]) < 45


def test_processor_time_of_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda: use the clock wall"):
        Clock(torch.device("cuda"), "cpu")


def test_a_gpu_is_waited_for_at_every_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    clock = Clock(torch.device("cuda"))
    clock.since(clock.now())
    assert len(waits) == 2
    Clock(CPU).now()
    assert len(waits) == 2


def test_the_median_leaves_the_first_time_out() -> None:
    moments = iter([0.0, 9.0, *(value for n in range(20) for value in (0.0, 1.0 + (n == 3)))])
    clock: Any = SimpleNamespace(
        now=lambda: next(moments), since=lambda start: 1000 * (next(moments) - start)
    )
    done: list[int] = []
    assert median_ms(clock, lambda: done.append(1)) == 1000
    assert len(done) == 21


def test_a_clock_that_does_not_suit_the_device_is_refused_by_its_setting() -> None:
    with pytest.raises(UserError, match=r"latency\.clock = cpu: processor time says nothing"):
        open_clock(torch.device("cuda"), "cpu")
