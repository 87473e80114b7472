import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from moectl import cli
from moectl.engine.lock import Lock
from moectl.engine.settings import nest
from moectl.tools import sweep_table
from moectl.tools.sweep_plan import read_plan

Calls = Callable[[], list[list[str]]]
Say = Callable[..., None]
Write = Callable[..., Path]

GRID = "[grid]\noptim.lr = [0.5, 1]"
FOLDER = Path("runs/sweep/s")


def sweep(*words: str) -> int:
    return cli._run(["sweep", "s.toml", *words])


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    sweep("--json", *words)
    return dict(json.loads(capsys.readouterr().out))


def test_a_sweep_ends_in_a_table_of_means(
    behave: Say, sweep_file: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID, seeds=[1, 2])
    assert sweep("--metric", "last.accuracy") == 0
    out, err = capfd.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["0.5", "2", "0.75", "±", "0.35"] in rows
    assert ["1", "2", "1.5", "±", "0.71"] in rows
    assert "[1/4] lr=0.5,seed=1" in err
    assert "[4/4] lr=1,seed=2" in err
    assert sorted(path.name for path in FOLDER.iterdir() if path.suffix != ".lock") == [
        "lr=0.5,seed=1", "lr=0.5,seed=2", "lr=1,seed=1", "lr=1,seed=2",
        "plots", "report.md", "sweep.csv", "sweep.json",
    ]  # fmt: skip


def test_stdout_of_json_is_one_document(
    behave: Say, sweep_file: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID, seeds=[1])
    assert sweep("--json", "--quiet") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads((FOLDER / "sweep.json").read_text())
    assert err == ""


def test_the_same_command_again_trains_nothing(
    behave: Say, calls: Calls, sweep_file: Write
) -> None:
    sweep_file(GRID)
    assert sweep() == 0
    assert len(calls()) == 6
    assert sweep() == 0
    assert calls() == []


def test_a_failed_cell_is_shown_and_the_others_go_on(
    behave: Say, calls: Calls, sweep_file: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID)
    behave(seed2="fail")
    assert sweep() == 1
    out, err = capfd.readouterr()
    assert "lr=0.5,seed=2   RunFailed: the loss is not finite" in out
    assert "2 (1 failed)" in out
    assert "error: 2 of 6 cells failed" in err
    assert len(calls()) == 6
    behave()
    assert sweep() == 0
    assert len(calls()) == 2
    assert "failed" not in capfd.readouterr().out


def test_more_seeds_and_values_only_train_what_is_new(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID, seeds=[1])
    sweep()
    calls()
    sweep_file("[grid]\noptim.lr = [0.5, 1, 2]", seeds=[1, 2])
    assert len(answer(capsys)["cells"]) == 6
    assert len(calls()) == 4


@pytest.mark.parametrize(
    ("tables", "keys", "message"),
    [
        ("[settings]\noptim.momentum = 0.5\n", {}, "optim.momentum = 0.5 (the sweep has 0.9)"),
        ("[settings]\ntrain.epochs = 9\n", {}, "train.epochs = 9 (the sweep has 200)"),
        ("[settings]\neval.bins = 9\n", {}, "eval.bins = 9 (the sweep has 15)"),
        ("", {"presets": ["digits_ir20"]}, "data.dataset = 'digits' (the sweep has"),
        ("", {"command": "balpoe train --cpu"}, "begun with 'balpoe train', not 'balpoe train"),
    ],
)
def test_unequal_trainings_are_not_mixed(
    behave: Say,
    calls: Calls,
    sweep_file: Write,
    capsys: pytest.CaptureFixture[str],
    tables: str,
    keys: dict[str, Any],
    message: str,
) -> None:
    sweep_file(GRID)
    sweep()
    calls()
    sweep_file(tables + GRID, **keys)
    capsys.readouterr()
    for words in ((), ("--dry-run",)):
        assert sweep(*words) == 2
        out, err = capsys.readouterr()
        assert f"error: {FOLDER}: begun with " in err
        assert message in err
        assert out == ""
    assert sweep("--out", "other") == 0
    assert len(calls()) == 6


def test_what_changes_no_score_may_change(behave: Say, sweep_file: Write) -> None:
    sweep_file(GRID)
    sweep()
    sweep_file(f"[settings]\ntrain.threads = 1\ndata.root = 'x'\n{GRID}")
    assert sweep() == 0


BATCHES = "[grid]\ntrain.batch_size = [64]"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (BATCHES, "[grid]\neval.batch_size = [64]", "train.batch_size = 128 (the sweep has 64)"),
        ("", "[settings]\ndata.train_list = 'x.txt'", "data.train_list = 'x.txt' (the sweep has"),
        ("[settings]\ndata.train_list = 'x.txt'", "", "data.train_list = None (the sweep has"),
    ],
)
def test_a_trained_cell_of_the_same_name_must_be_the_same_cell(
    behave: Say,
    sweep_file: Write,
    capsys: pytest.CaptureFixture[str],
    first: str,
    second: str,
    message: str,
) -> None:
    plan = read_plan(sweep_file(first, seeds=[1]))
    sweep()
    (cell,) = plan.cells
    tables = tomli_w.dumps(nest(cell.settings))
    (FOLDER / cell.name / "settings.toml").write_text(tables)
    assert sweep() == 0
    assert [one.name for one in read_plan(sweep_file(second, seeds=[1])).cells] == [cell.name]
    capsys.readouterr()
    assert sweep() == 2
    err = capsys.readouterr().err
    assert f"error: {FOLDER / cell.name}: trained with other settings: " in err
    assert message in err


def test_measured_scores_take_the_place_of_the_trainings(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID, eval="balpoe eval", weights="best", metrics=["scores.measured"])
    document = answer(capsys)
    scores = {"scores.measured": {"mean": 2, "std": 1, "n": 3}}
    assert [one["scores"] for one in document["points"]] == [scores, scores]
    assert len(calls()) == 12


def test_a_cell_that_cannot_be_measured_has_failed(
    behave: Say, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file(seeds=[1], eval="balpoe eval")
    behave(eval=4)
    assert sweep() == 1
    assert "balpoe eval: exit code 4" in capsys.readouterr().out


def test_a_dry_run_lists_the_cells_and_writes_nothing(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID, seeds=[1])
    before = sorted(Path().rglob("*"))
    document = answer(capsys, "--dry-run")
    assert document == {
        "folder": str(FOLDER),
        "cells": [
            {
                "cell": f"lr={rate},seed=1",
                "status": "new",
                "command": f"moectl balpoe train --set=optim.lr={rate} --set=train.seed=1"
                f" --out={FOLDER}/lr={rate},seed=1",
            }
            for rate in ("0.5", "1")
        ],
    }
    assert sorted(Path().rglob("*")) == before
    sweep()
    calls()
    assert {one["status"] for one in answer(capsys, "-n")["cells"]} == {"finished"}
    assert calls() == []


@pytest.mark.parametrize("wanted", ["argument", "file"])
def test_an_unknown_score_is_refused_by_its_place(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    sweep_file(GRID, **({"metrics": ["last.acc"]} if wanted == "file" else {}))
    words = [] if wanted == "file" else ["--metric", "last.acc"]
    place = "s.toml: metrics:" if wanted == "file" else "--metric"
    for trained in (6, 0):
        assert sweep(*words) == 2
        message = f"error: {place} last.acc: no such score; did you mean last.accuracy?"
        assert message in capsys.readouterr().err
        assert len(calls()) == trained
    assert sweep("--metric", "last.accuracy") == 0


def test_of_several_cells_one_may_be_new_when_a_score_is_refused_at_once(
    behave: Say, calls: Calls, sweep_file: Write
) -> None:
    sweep_file(seeds=[1])
    sweep()
    sweep_file(seeds=[1, 2])
    calls()
    assert sweep("--metric", "last.acc") == 2
    assert calls() == []


def test_a_cell_that_stops_ends_the_sweep_with_75(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file(GRID)
    behave(seed2="limit")
    assert sweep() == 75
    out, err = capsys.readouterr()
    assert out == ""
    assert "stopped: lr=0.5,seed=2: time limit after update 3" in err
    assert "hint: the same command goes on from here" in err
    assert len(calls()) == 2
    cells = json.loads((FOLDER / "sweep.json").read_text())["cells"]
    assert [one["status"] for one in cells] == ["finished", *["new"] * 5]


def test_a_folder_that_is_no_sweep_is_left_alone(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file()
    folder = Path("mine")
    folder.mkdir()
    (folder / "thesis.tex").touch()
    assert sweep("--out", "mine") == 2
    assert "mine: not empty, and no sweep" in capsys.readouterr().err
    (folder / "thesis.tex").rename(folder / "run.lock")  # killed before its first word
    assert sweep("--out", "mine") == 0
    assert sweep("--out", "s.toml") == 2
    assert "s.toml: cannot be created (File exists)" in capsys.readouterr().err


def test_a_sweep_whose_disk_was_full_at_first_begins_later(
    behave: Say, sweep_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sweep_file(seeds=[1])
    with monkeypatch.context() as patch:
        patch.setattr(sweep_table, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            sweep()
    assert sweep() == 0


def test_cells_that_are_done_cost_no_writing(
    behave: Say, sweep_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    real = sweep_table.write_json
    monkeypatch.setattr(
        sweep_table, "write_json", lambda *words: (written.append(words), real(*words))
    )
    sweep_file(GRID)
    sweep()
    assert len(written) == 7  # before every cell, and at the end
    sweep()
    assert len(written) == 8


def test_a_second_sweep_at_the_same_time_is_refused(
    behave: Say, calls: Calls, sweep_file: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_file()
    FOLDER.mkdir(parents=True)
    lock = Lock(FOLDER)
    assert sweep() == 2
    assert "another process is writing here" in capsys.readouterr().err
    lock.release()
    assert calls() == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"])
def test_launchers_are_refused(
    sweep_file: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    sweep_file()
    monkeypatch.setenv(name, "0")
    assert sweep() == 2
    assert f"starts its cells itself, but a launcher has set {name}" in capsys.readouterr().err
    assert not Path("runs").exists()


PROBE = """
import sys
from moectl import cli
code = cli._run(["sweep", "s.toml", "--dry-run"])
heavy = {"torch", "torchvision", "accelerate", "matplotlib", "numpy"} & set(sys.modules)
sys.exit(code or " ".join(heavy) or 0)
"""


def test_a_dry_run_loads_nothing_heavy(sweep_file: Write, root: Path) -> None:
    sweep_file(GRID)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "lr=0.5,seed=1" in done.stdout


DRIVER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from moectl.cli import main; main(sys.argv[2:])"
)


def wait_for(name: str, program: "subprocess.Popen[str]") -> None:
    while not Path(name).exists():
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.05)


@pytest.fixture
def begun(behave: Say, sweep_file: Write, root: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start a sweep whose second cell waits, and return it when that cell does."""

    def begin(behaviour: str = "wait") -> "subprocess.Popen[str]":
        behave(seed2=behaviour)
        words = [sys.executable, "-P", "-c", DRIVER, str(root), "sweep", "s.toml"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": ""}
        program = subprocess.Popen(words, env=environment, **pipes)
        wait_for("waiting", program)
        return program

    sweep_file(seeds=[1, 2, 3])
    return begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on_to_the_running_cell(
    begun: Callable[..., "subprocess.Popen[str]"],
    behave: Say,
    calls: Calls,
    number: signal.Signals,
) -> None:
    program = begun()
    cell = json.loads((FOLDER / "seed=2" / "run.json").read_text())["pid"]
    assert os.getpgid(cell) == cell  # else a Ctrl-C of the terminal would reach it twice
    program.send_signal(number)
    out, err = program.communicate(timeout=30)
    assert program.returncode == 75, err
    assert out == ""
    assert "stopped: seed=2: SIGTERM after update 3" in err
    assert json.loads((FOLDER / "seed=2" / "run.json").read_text())["status"] == "interrupted"
    assert len(calls()) == 2
    behave()
    assert sweep() == 0
    assert len(calls()) == 2


def test_a_cell_that_was_stopped_before_it_could_listen_has_not_failed(
    begun: Callable[..., "subprocess.Popen[str]"], behave: Say, calls: Calls
) -> None:
    program = begun("start")
    program.terminate()
    _, err = program.communicate(timeout=30)
    assert program.returncode == 75, err
    assert "stopped: seed=2: SIGTERM" in err
    behave()
    calls()
    assert sweep() == 0
    assert [words[-1] for words in calls()] == [f"--out={FOLDER}/seed={seed}" for seed in (2, 3)]


def test_a_stop_that_comes_as_a_cell_ends_starts_no_other(
    begun: Callable[..., "subprocess.Popen[str]"], calls: Calls
) -> None:
    program = begun("finish")
    program.terminate()
    _, err = program.communicate(timeout=30)
    assert program.returncode == 75, err
    assert "stopped: seed=3: SIGTERM" in err
    assert len(calls()) == 2


def test_signals_are_given_back(behave: Say, sweep_file: Write) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    sweep_file(seeds=[1])
    assert sweep() == 0
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_ctrl_c_leaves_at_once_and_takes_the_cell_along(
    begun: Callable[..., "subprocess.Popen[str]"],
) -> None:
    program = begun("stubborn")
    program.send_signal(signal.SIGINT)
    wait_for("told", program)
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == 130
    cell = json.loads((FOLDER / "seed=2" / "run.json").read_text())["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(cell, 0)


def test_a_cell_left_behind_by_a_killed_sweep_is_waited_for(
    begun: Callable[..., "subprocess.Popen[str]"],
    behave: Say,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = begun()
    program.kill()
    program.wait(30)
    for pipe in (program.stdout, program.stderr):
        assert pipe is not None
        pipe.close()
    orphan = json.loads((FOLDER / "seed=2" / "run.json").read_text())["pid"]
    os.kill(orphan, 0)  # it lives, and holds the lock
    behave()
    from moectl.tools import sweep_cells

    told: list[int] = []

    def tell(_: float) -> None:
        if not told:
            told.append(orphan)
            os.kill(orphan, signal.SIGTERM)

    monkeypatch.setattr(sweep_cells, "sleep", tell)
    calls()
    assert sweep() == 0
    assert told == [orphan]
    assert [words[-1] for words in calls()] == [
        f"--out={FOLDER}/seed=2", f"--out={FOLDER}/seed=3"
    ]  # fmt: skip
