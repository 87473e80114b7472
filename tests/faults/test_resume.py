"""A run that was interrupted ends in the same bytes as one that was not."""

import json
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moectl.engine import checkpoint
from moectl.engine.errors import Interrupted, RunFailed, UserError


@pytest.fixture(scope="module")
def whole(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    toy.complete(folder)
    return folder


def same(toy: ModuleType, one: Path, other: Path) -> None:
    assert toy.digests(one) == toy.digests(other)
    assert toy.metrics(one) == toy.metrics(other)


@pytest.mark.parametrize("update", [1, 6, 8, 9], ids=["first", "middle", "epoch-end", "after-end"])
def test_stopped_and_resumed_equals_undisturbed(
    toy: ModuleType, whole: Path, tmp_path: Path, update: int
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"SIGTERM after update {update} of 16"):
        toy.complete(folder, on_step=toy.stop_at(update))
    assert toy.status(folder) == ("interrupted", f"SIGTERM after update {update} of 16")
    assert f"update-{update:08d}" in toy.checkpoints(folder)
    toy.complete(folder, resume="named")
    assert toy.status(folder)[0] == "finished"
    same(toy, whole, folder)


@pytest.mark.parametrize("changes", [{"train__accumulate": 2}, {"optim__clip_norm": 0.1}])
def test_resume_is_exact_with_other_settings(
    toy: ModuleType, tmp_path: Path, changes: dict[str, Any]
) -> None:
    toy.complete(tmp_path / "a", **changes)
    with pytest.raises(Interrupted):
        toy.complete(tmp_path / "b", on_step=toy.stop_at(7), **changes)
    toy.complete(tmp_path / "b", resume="auto", **changes)
    same(toy, tmp_path / "a", tmp_path / "b")


def test_many_stops_in_one_run_are_exact(toy: ModuleType, whole: Path, tmp_path: Path) -> None:
    folder, resume = tmp_path / "run", ""
    for update in range(2, 17, 3):
        try:
            toy.complete(folder, on_step=toy.stop_at(update), resume=resume)
        except Interrupted:
            resume = "auto"
    toy.complete(folder, resume="auto")
    same(toy, whole, folder)


def test_values_logged_between_rows_survive_a_stop(toy: ModuleType, tmp_path: Path) -> None:
    def note(step: Any, loss: Any) -> Any:
        if (
            step.index == 2
        ):  # update 3 writes no row; the value belongs to the row of the epoch's end
            step.log(noted=1.5)
        return loss

    toy.complete(tmp_path / "a", on_step=note)
    stop = toy.stop_at(3)
    with pytest.raises(Interrupted):
        toy.complete(tmp_path / "b", on_step=lambda step, loss: stop(step, note(step, loss)))
    toy.complete(tmp_path / "b", on_step=note, resume="named")
    assert toy.metrics(tmp_path / "a") == toy.metrics(tmp_path / "b")


def test_time_limit_stops_like_a_signal(toy: ModuleType, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="time limit after update 1 of 16"):
        toy.complete(tmp_path / "run", train__max_time="0.0001s")
    toy.complete(tmp_path / "run", resume="auto")
    same(toy, whole, tmp_path / "run")


def test_killed_without_warning_resumes_from_the_newest_checkpoint(
    toy: ModuleType, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with toy.launch(folder, "kill=9", "train__save_minutes=0") as program:
        program.communicate(timeout=60)
    assert program.returncode == -signal.SIGKILL
    assert toy.status(folder)[0] == "running"
    assert toy.checkpoints(folder)[-1] == "update-00000009"
    # The lock went with its process, and the rows after the checkpoint are not there twice.
    toy.complete(folder, resume="auto", train__save_minutes=0)
    same(toy, whole, folder)


def test_rows_of_metrics_never_repeat(toy: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def crash(step: Any, loss: Any) -> Any:
        if step.index == 7:
            raise RuntimeError("no warning")
        return loss

    with pytest.raises(Interrupted):
        toy.complete(folder, on_step=toy.stop_at(3))
    with pytest.raises(RuntimeError, match="no warning"):
        toy.complete(folder, on_step=crash, resume="auto")
    assert toy.status(folder) == ("failed", "RuntimeError: no warning")
    assert [int(row["update"]) for row in toy.metrics(folder)] == [2, 4, 6]
    toy.complete(folder, resume="auto")
    updates = [int(row["update"]) for row in toy.metrics(folder)]
    assert updates == sorted(set(updates)) == list(range(2, 17, 2))


def test_more_epochs_continue_a_finished_run(toy: ModuleType, tmp_path: Path) -> None:
    changes = {"schedule__name": "constant"}
    toy.complete(tmp_path / "a", train__epochs=3, **changes)
    toy.complete(tmp_path / "b", train__epochs=2, **changes)
    toy.complete(tmp_path / "b", resume="named", train__epochs=3, **changes)
    last = "update-00000012"
    assert toy.digests(tmp_path / "a", last) == toy.digests(tmp_path / "b", last)


def test_a_finished_run_stays_finished(toy: ModuleType, whole: Path) -> None:
    before = toy.digests(whole)
    loop = toy.complete(whole, resume="named", on_step=lambda *_: pytest.fail("a step"))
    assert loop.finished
    assert toy.digests(whole) == before


def test_patience_is_remembered(toy: ModuleType, tmp_path: Path) -> None:
    changes = {"train__patience": 2, "train__epochs": 12, "optim__lr": 5.0}
    toy.complete(tmp_path / "a", **changes)
    stopped = toy.checkpoints(tmp_path / "a")[-1]
    end = int(stopped.removeprefix("update-"))
    assert end < 48, "the test needs a run that stops early"
    with pytest.raises(Interrupted):
        toy.complete(tmp_path / "b", on_step=toy.stop_at(end - 3), **changes)
    toy.complete(tmp_path / "b", resume="auto", **changes)
    assert toy.digests(tmp_path / "a", stopped) == toy.digests(tmp_path / "b", stopped)


def test_workers_change_nothing(toy: ModuleType, tmp_path: Path) -> None:
    for workers in (0, 2):
        with toy.open_run(tmp_path / str(workers), toy.settings(train__epochs=2)) as run:
            toy.train(run, data=toy.source(workers=workers))
    last = "update-00000008"
    assert toy.digests(tmp_path / "0", last) == toy.digests(tmp_path / "2", last)
    assert toy.metrics(tmp_path / "0") == toy.metrics(tmp_path / "2")


UNEVEN = (1, 7, 9, 31)


def test_two_processes(toy: ModuleType, whole: Path, tmp_path: Path) -> None:
    """Stop, resume and a broken loss in two real processes; one start, as it takes seconds."""
    a, b, c = (str(tmp_path / name) for name in "abc")
    words = [
        a,
        "--",
        b,
        "term=6",
        "--",
        b,
        "resume=auto",
        "--",
        c,
        "nan=5",
        "train__save_minutes=0",
        "--",
        "collect",
        str(tmp_path / "found"),
        *map(str, UNEVEN),
    ]
    with toy.launch(*words, processes=2, env={"HARM_RANK": "1"}) as program:
        out, err = program.communicate(timeout=120)
    assert out, err
    codes = json.loads(out.splitlines()[-1])

    assert codes == [0, 75, 0, 1, 0], err
    same(toy, Path(a), Path(b))
    assert toy.status(Path(b))[0] == "finished"
    assert json.loads((Path(a) / "run.json").read_text())["processes"] == 2
    # The learning rates of one process; weights differ by batch norm and dropout.
    rates = [[(row["update"], row["lr"]) for row in toy.metrics(run)] for run in (Path(a), whole)]
    assert rates[0] == rates[1]

    assert toy.checkpoints(Path(c))[-1] == "update-00000005"
    assert toy.status(Path(c))[0] == "failed"
    assert "not finite at update 6 (epoch 2, batch 2" in toy.status(Path(c))[1], err

    with pytest.raises(UserError, match="begun with 2 processes, resumed with 1"):
        toy.complete(Path(a), resume="named")

    # Sets that do not divide by two: nothing is lost, doubled or out of order on either process.
    expected = [toy.collect(samples) for samples in UNEVEN]
    assert [len(one["labels"]) for one in expected] == list(UNEVEN)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"found-{rank}.json").read_text()) == expected


@pytest.mark.parametrize("fault", ["kill", "crash"])
def test_a_process_that_dies_alone_ends_the_others(
    toy: ModuleType, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "run"
    words = (folder, f"{fault}=5", "train__save_minutes=0")
    with toy.launch(*words, processes=2, env={"HARM_RANK": "1"}) as program:
        _, err = program.communicate(timeout=90)
    assert program.returncode not in (0, 75), err
    assert toy.checkpoints(folder)[-1] == "update-00000005"
    checkpoint.read(folder / "checkpoints" / "update-00000005")
    if fault == "crash":
        assert "RuntimeError: sample 17 is bad" in (folder / "log.txt").read_text()
        assert toy.status(folder)[0] == "failed"
    # Nobody holds the lock, and what is refused is the other number of processes.
    with pytest.raises(UserError, match="begun with 2 processes, resumed with 1"):
        toy.complete(folder, resume="auto", train__save_minutes=0)


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run(
    toy: ModuleType, tmp_path: Path, fault: str
) -> None:
    def harm(step: Any, loss: Any) -> Any:
        return loss * float(fault) if step.index == 5 else loss

    with pytest.raises(RunFailed, match=r"update 6 \(epoch 2, batch 2, learning rate 0\.05;"):
        toy.complete(tmp_path / "run", on_step=harm, train__save_minutes=0)
    assert toy.checkpoints(tmp_path / "run")[-1] == "update-00000005"
    _all_finite(tmp_path / "run")


def test_a_loss_that_is_not_finite_is_noticed_although_nothing_is_saved(
    toy: ModuleType, tmp_path: Path
) -> None:
    seen = []

    def harm(step: Any, loss: Any) -> Any:
        seen.append(step.index)
        return loss * float("nan") if step.index == 5 else loss

    with pytest.raises(RunFailed, match="not finite at update 6"):
        toy.complete(tmp_path / "run", on_step=harm, train__save_minutes=60)
    assert seen[-1] == 5


def test_a_gradient_that_is_not_finite_ends_the_run(toy: ModuleType, tmp_path: Path) -> None:
    def harm(step: Any, loss: Any) -> Any:
        if step.index == 5 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    with pytest.raises(RunFailed, match=r"update \d+ \(epoch 2, batch \d"):
        toy.complete(tmp_path / "run", on_step=harm, train__save_minutes=0)
    _all_finite(tmp_path / "run")


def _all_finite(folder: Path) -> None:
    from safetensors.torch import load_file

    for file in folder.glob("checkpoints/*/model.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), file


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_every_stop_signal_saves_first(toy: ModuleType, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=signal.Signals(number).name):
        toy.complete(tmp_path / "run", on_step=toy.stop_at(3, number))
    assert toy.checkpoints(tmp_path / "run") == ["update-00000003"]
    assert signal.getsignal(number) == before


def test_second_interrupt_leaves_at_once_with_the_old_checkpoint(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "run", os.fsync

    def harm(step: Any, loss: Any) -> Any:
        if step.index == 6:
            os.kill(os.getpid(), signal.SIGINT)
            # The second one comes while the checkpoint is being written.
            monkeypatch.setattr(os, "fsync", interrupted)
        return loss

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        os.kill(os.getpid(), signal.SIGINT)
        real(descriptor)

    with pytest.raises(KeyboardInterrupt):
        toy.complete(folder, on_step=harm, train__save_minutes=0)
    assert toy.checkpoints(folder)[-1] == "update-00000006", "and no staged folder"
    assert toy.status(folder) == ("interrupted", "second Ctrl-C")


def test_signals_to_a_group_with_loader_workers(toy: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = toy.launch(folder, "workers=2", "slow=0.2", start_new_session=True)
    with program:
        _wait_for(folder / "metrics.csv")
        os.killpg(program.pid, signal.SIGTERM)
        _, err = program.communicate(timeout=30)
    assert program.returncode == 75, err
    assert "Traceback" not in err
    assert len(toy.checkpoints(folder)) >= 1


def _wait_for(path: Path) -> None:
    import time

    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
