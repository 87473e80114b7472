import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.engine.errors import Interrupted, RunFailed, UserError
from moectl.engine.lock import Lock
from moectl.engine.signals import StopRequest
from moectl.tools import sweep_cells
from moectl.tools.sweep_cells import Attendant, alone, numbers, scores_of
from moectl.tools.sweep_plan import Plan, read_plan

Calls = Callable[[], list[list[str]]]
Say = Callable[..., None]
Write = Callable[..., Path]


@pytest.fixture
def attend(sweep_file: Write) -> Iterator[Callable[..., Plan]]:
    """Attend to the first cell of a sweep."""
    with_lock = None

    def call(quiet: bool = False, **keys: Any) -> Plan:
        nonlocal with_lock
        plan = read_plan(sweep_file("[grid]\noptim.lr = [0.5]", **keys))
        plan.folder.mkdir(parents=True, exist_ok=True)
        with_lock = with_lock or Lock(plan.folder, "cell.lock")
        Attendant(plan, StopRequest(), with_lock, quiet=quiet).attend(plan.cells[0])
        return plan

    yield call
    if with_lock:
        with_lock.release()


FOLDER = Path("runs/sweep/s/lr=0.5,seed=1")


def record() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "run.json").read_text()))


def test_a_cell_is_trained_once(
    behave: Say, calls: Calls, attend: Callable[..., Plan], capfd: pytest.CaptureFixture[str]
) -> None:
    plan = attend()
    words = ["balpoe", "train", "--set=optim.lr=0.5", "--set=train.seed=1", f"--out={FOLDER}"]
    assert calls() == [words]
    assert scores_of(plan, plan.cells[0]) == {"last.accuracy": 0.5, "last.epoch": 2}
    attend()
    assert calls() == []
    assert capfd.readouterr().out == ""


def test_a_quiet_sweep_has_quiet_cells(
    behave: Say, calls: Calls, attend: Callable[..., Plan]
) -> None:
    attend(quiet=True)
    assert calls()[0][-1] == "--quiet"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "RunFailed: the loss is not finite"),
        ("die", "killed by SIGKILL"),
        ("refuse", "exit code 2, explained on standard error"),
    ],
)
def test_a_failed_cell_says_why_and_begins_anew(
    behave: Say, calls: Calls, attend: Callable[..., Plan], behaviour: str, reason: str
) -> None:
    behave(seed1=behaviour)
    with pytest.raises(RunFailed, match=f"^{reason}$"):
        attend()
    calls()
    behave()
    attend()
    assert calls()[0][-1] == f"--out={FOLDER}"
    assert record()["status"] == "finished"


def test_an_old_reason_is_not_that_of_a_new_failure(
    behave: Say, attend: Callable[..., Plan]
) -> None:
    behave(seed1="savefail")
    FOLDER.mkdir(parents=True)
    (FOLDER / "manifest.json").touch()
    (FOLDER / "run.json").write_text('{"status": "failed", "reason": "old"}')
    behave(seed1="refuse")
    with pytest.raises(RunFailed, match="exit code 2"):
        attend()


def test_a_cell_that_saved_something_is_resumed(
    behave: Say, calls: Calls, attend: Callable[..., Plan]
) -> None:
    behave(seed1="save die")
    with pytest.raises(RunFailed, match="killed by SIGKILL"):
        attend()
    calls()
    behave()
    attend()
    words = ["balpoe", "train", "--set=optim.lr=0.5", "--set=train.seed=1", f"--resume={FOLDER}"]
    assert calls() == [words]


def test_a_folder_without_a_record_is_begun_anew(
    behave: Say, calls: Calls, attend: Callable[..., Plan]
) -> None:
    (FOLDER / "checkpoints").mkdir(parents=True)
    (FOLDER / "checkpoints" / "manifest.json").touch()
    attend()
    assert calls()[0][-1] == f"--out={FOLDER}"


def test_a_cell_that_somebody_else_trains_is_left_alone(
    behave: Say, calls: Calls, attend: Callable[..., Plan]
) -> None:
    FOLDER.mkdir(parents=True)
    (FOLDER / "run.json").write_text('{"status": "running"}')
    lock = Lock(FOLDER)
    with pytest.raises(UserError, match="another process is writing here"):
        attend()
    lock.release()
    assert calls() == []
    assert record() == {"status": "running"}


def test_a_cell_that_stops_by_itself_stops_the_sweep(
    behave: Say, attend: Callable[..., Plan]
) -> None:
    behave(seed1="limit")
    with pytest.raises(Interrupted, match="time limit after update 3"):
        attend()


def test_a_cell_is_measured_once_for_each_question(
    behave: Say, calls: Calls, attend: Callable[..., Plan]
) -> None:
    plan = attend(eval="balpoe eval --cpu")
    assert calls()[1] == ["balpoe", "eval", "--cpu", f"--run={FOLDER}", "--json"]
    assert scores_of(plan, plan.cells[0]) == {"scores.measured": 1}
    attend(eval="balpoe eval --cpu")
    assert calls() == []
    attend(eval="balpoe eval --cpu", weights="best")
    assert calls() == [["balpoe", "eval", "--cpu", f"--run={FOLDER}@best", "--json"]]
    assert scores_of(plan, plan.cells[0]) == {}  # the answer to another question


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (3, RunFailed, "^balpoe eval: exit code 3, explained on standard error$"),
        (75, Interrupted, "^stopped$"),
    ],
)
def test_a_failed_measurement_says_so(
    behave: Say,
    attend: Callable[..., Plan],
    code: int,
    error: type[Exception],
    message: str,
) -> None:
    behave(eval=code)
    with pytest.raises(error, match=message):
        attend(eval="balpoe eval")
    behave()
    plan = attend(eval="balpoe eval")
    assert scores_of(plan, plan.cells[0]) == {"scores.measured": 1}


def test_a_command_without_scores_measures_nothing(
    behave: Say, attend: Callable[..., Plan]
) -> None:
    behave(eval="list")
    with pytest.raises(RunFailed, match="balpoe eval: answers with a list, not"):
        attend(eval="balpoe eval")


def test_a_second_sweep_of_a_folder_is_refused(tmp_path: Path) -> None:
    stop = StopRequest()
    with (
        alone(tmp_path, stop),
        pytest.raises(UserError, match="another process is writing here"),
        alone(tmp_path, stop),
    ):
        pass
    with alone(tmp_path, stop):
        pass


HOLDER = """
import subprocess, sys
from pathlib import Path
from moectl.engine.lock import Lock
lock = Lock(Path(sys.argv[1]), "cell.lock")
child = subprocess.Popen(
    [sys.executable, "-c", "input()"], stdin=sys.stdin, pass_fds=[lock.fileno()]
)
"""


def test_a_cell_that_outlives_its_sweep_is_waited_for(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    orphan = subprocess.Popen(
        words, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert orphan.stdin is not None
    orphan.wait(20)
    monkeypatch.setattr(sweep_cells, "sleep", lambda _: end(orphan))
    with alone(tmp_path, StopRequest()):
        assert caplog.text.count("a cell of an earlier sweep is still at work: waiting") == 1


def end(orphan: "subprocess.Popen[bytes]") -> None:
    assert orphan.stdin is not None
    if not orphan.stdin.closed:
        orphan.stdin.write(b"\n")
        orphan.stdin.close()


def test_a_lock_that_nobody_can_take_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "cell.lock").mkdir()
    with (
        pytest.raises(UserError, match=r"cell\.lock: cannot be written"),
        alone(tmp_path, StopRequest()),
    ):
        pass


def test_waiting_for_a_cell_can_be_stopped(tmp_path: Path) -> None:
    held, stop = Lock(tmp_path, "cell.lock"), StopRequest()
    stop.reason = signal.SIGTERM.name
    with pytest.raises(Interrupted, match="SIGTERM while waiting"), alone(tmp_path, stop):
        pass
    held.release()
    Lock(tmp_path).release()  # it let go of its own


def test_numbers_have_dotted_names() -> None:
    document = {
        "a": {"b": 1, "c": {"d": 0.5, "yes": True, "no": None}}, "list": [1], "text": "2",
        "weights": {"epoch": 3},
    }  # fmt: skip
    assert numbers(document) == {"a.b": 1, "a.c.d": 0.5}
