"""A sweep that is killed, with the cell that runs, ends in the same weights and table."""

import csv
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FILE = """
command = "balpoe train --cpu"
seeds = [1, 2]

[settings]
data.dataset = "synthetic"
data.image_size = 8
model.experts = 2
model.layer2_dimension = 16
model.layer3_dimension = 16
loss.tau_list = "0;2"
train.epochs = 2
train.batch_size = 64
train.precision = "no"
train.threads = 1
train.save_minutes = 0
train.tensorboard = false
schedule.name = "constant"
schedule.warmup = 0

[grid]
optim.lr = [0.01]
"""
SECOND = "lr=0.01,seed=2"

Start = Callable[..., "subprocess.Popen[str]"]
Finish = Callable[..., tuple[int, str, str]]


def weights(folder: Path) -> dict[str, bytes]:
    found = sorted(folder.glob("*/*.pth"))
    assert found
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def table(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def test_a_killed_sweep_ends_as_an_undisturbed_one(
    isolated: Path, start: Start, finish: Finish
) -> None:
    Path("s.toml").write_text(FILE)
    code, _, err = finish(start("sweep", "s.toml", "--out", "whole", "--quiet"), 200)
    assert code == 0, err
    program = start("sweep", "s.toml", "--out", "cut", "--quiet", stderr=subprocess.DEVNULL)
    record = Path("cut") / SECOND / "run.json"
    while not (record.exists() and "checkpoint" in json.loads(record.read_text())):
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.05)
    program.kill()
    os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
    assert finish(program)[0] == -signal.SIGKILL
    assert json.loads(record.read_text())["status"] == "running"
    code, out, err = finish(start("sweep", "s.toml", "--out", "cut", "--json"), 200)
    assert code == 0, err
    assert json.loads(record.read_text())["resumed"]
    assert [one["n"] for one in json.loads(out)["points"]] == [2]
    assert weights(Path("cut")) == weights(Path("whole"))
    assert table(Path("cut")) == table(Path("whole"))
