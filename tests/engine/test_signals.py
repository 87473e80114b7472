"""The first signal asks, the second insists."""

import os
import signal

import pytest

from moectl.engine.signals import StopRequest


@pytest.fixture
def stop() -> StopRequest:
    return StopRequest()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request_and_the_handler_is_given_back(
    stop: StopRequest, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    stop.install()
    try:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.reason == number.name
    finally:
        stop.restore()
    assert signal.getsignal(number) == before


def test_only_a_second_ctrl_c_insists(stop: StopRequest) -> None:
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()


def test_the_time_limit_is_a_request_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from moectl.engine import signals

    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    stop = StopRequest(60)
    clock[0] = 159.9
    assert not stop
    clock[0] = 160.0
    assert stop
    assert stop.reason == "time limit"


def test_without_a_limit_time_never_ends(stop: StopRequest) -> None:
    assert not stop
