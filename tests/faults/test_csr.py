"""Trainings of csr that are killed in each of their stages."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl.cli import _run

TINY = (
    *("train", "--dataset", "synthetic", "--backbone-type", "tiny", "--no-pretrained"),
    *("--image-size", "64", "--set", "data.synthetic_images=60", "--set", "model.projection=16"),
    *("--batch-size", "16", "--lr", "1e-3", "--lr-mult-stage1", "1", "--lr-mult-stage3", "10"),
    *("--epochs-stage1", "2", "--epochs-stage2", "2", "--epochs-stage3", "2"),
    *("--proto-init", "kmeans", "--revive-every", "1", "--normalize", "dataset"),
    *("--set", "train.precision=no", "--set", "train.tensorboard=false", "--workers", "0"),
    *("--set", "train.save_minutes=0", "--set", "train.log_every=3", "--threads", "1"),
    *("--cpu", "--quiet"),
)
STAGES = ("concept", "prototype", "task")
FILES = (
    "best_model_stage1.pth",
    "model_stage2_epoch2.pth",
    "best_model_stage3.pth",
    "final_model.pth",
)

# One program for all, so that torch is imported once; it forks for each line `STAGE WHERE WORDS…`.
KILLER = """
import os, signal, sys
import accelerate, sklearn.cluster, sklearn.metrics, torch._dynamo, torchvision.transforms.v2
import moectl.csr.train
from moectl.cli import _run
from moectl.engine.loop import Loop, Step
from moectl.engine.run import Run

def kill(cls, name, when, first):
    own = getattr(cls, name)
    def call(*words, **named):
        if first and when(*words):
            os.kill(os.getpid(), signal.SIGKILL)
        found = own(*words, **named)
        if when(*words):
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(cls, name, call)

def arm(stage, where):
    if where.endswith(".pth"):  # is written, the checkpoint of its epoch is not
        kill(Run, "save_weights", lambda _, name, *__: name == where, False)
    elif where == "end":  # the last checkpoint is written, the next stage has not begun
        def ended(loop, *_):
            return loop.root.name == stage and loop.epoch == loop.settings.epochs
        kill(Loop, "_after_update", ended, False)
    else:
        def reached(step, *_):
            return step._loop.root.name == stage and step.index == int(where)
        kill(Step, "update", reached, True)

for line in sys.stdin:
    stage, where, *words = line.split()
    child = os.fork()
    if not child:
        arm(stage, where)
        os._exit(_run(["csr", *words]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Four updates an epoch: 0 is before the first checkpoint of a stage, 5 inside its second epoch.
KILLED = [("concept", "5"), ("concept", "end"), ("concept", FILES[0])]
KILLED += [("prototype", "0"), ("prototype", "5"), ("prototype", FILES[1])]
KILLED += [("task", "0"), ("task", "5"), ("task", FILES[3])]


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, start: Callable[..., subprocess.Popen[str]]
) -> Path:
    """A folder of runs that were killed: `STAGE-WHERE`."""
    root = tmp_path_factory.mktemp("killed")
    lines = [
        f"{stage} {where} {' '.join(TINY)} --out {root}/{stage}-{where}\n"
        for stage, where in KILLED
    ]
    program = start(program=(sys.executable, "-c", KILLER), stdin=subprocess.PIPE)
    with program:
        out, err = program.communicate("".join(lines), timeout=120)
    assert out.split() == ["-9"] * len(lines), err
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert _run(["csr", *TINY, "--out", str(folder)]) == 0
    return folder


def metrics(folder: Path, stage: str) -> list[dict[str, str]]:
    with (folder / f"metrics_{stage}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["elapsed_seconds"]
    return rows


@pytest.mark.parametrize(("stage", "where"), KILLED, ids=["-".join(one) for one in KILLED])
def test_a_killed_training_resumes_exactly(
    killed: Path, whole: Path, stage: str, where: str
) -> None:
    folder = killed / f"{stage}-{where}"
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    begun = STAGES[: STAGES.index(stage) + (where != "0")]  # have a checkpoint
    assert {path.name for path in (folder / "checkpoints").glob("*")} == set(begun)
    assert _run(["csr", *TINY, "--resume", str(folder)]) == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    for one in STAGES:
        assert metrics(folder, one) == metrics(whole, one)


def test_resuming_a_finished_training_changes_nothing(whole: Path) -> None:
    before = {name: (whole / name).read_bytes() for name in FILES}
    assert _run(["csr", *TINY, "--resume", str(whole)]) == 0
    assert {name: (whole / name).read_bytes() for name in FILES} == before
