"""Trainings of taskmoe that are killed, and its balance over several processes."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.engine import plot
from moectl.taskmoe import eval as evaluation
from moectl.taskmoe import heat_maps, pictures
from moectl.taskmoe.losses import balance_loss, top_shares
from moectl.taskmoe.model import Specialist

TINY = (
    *("--task", "digits", "--width", "4", "--batch-size", "67", "--precision", "no", "--quiet"),
    *("--cpu", "--num-epochs", "2", "--set", "train.save_minutes=0", "--threads", "1"),
    *("--set", "train.log_every=3", "--set", "train.tensorboard=false"),
)
MIXTURE = ("train", *TINY, "--freeze-extractor-epochs", "1", "--expert-analysis-interval", "0")
SPECIALIST = ("specialist", *TINY, "--specialist", "2")

# One program for all, so that torch is imported once; it forks for each line `WHERE WORDS…`.
KILLER = """
import os, signal, sys
import accelerate, scipy.optimize, sklearn.datasets, sklearn.model_selection, torch._dynamo
import moectl.taskmoe.specialist, moectl.taskmoe.stages
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

def arm(where):
    if where == "rehearsal":
        kill(Loop, "rehearse", lambda *_: True, True)
    elif where == "weights":  # of the first epoch are written, its checkpoint is not
        kill(Run, "save_weights", lambda _, name, *__: name == "best_model.pth", False)
    elif where == "end":  # the last checkpoint is written, the test has not begun
        kill(Loop, "_after_update", lambda loop, *_: loop.epoch == loop.settings.epochs, False)
    else:
        kill(Step, "update", lambda step, *_: step.index == int(where), True)

for line in sys.stdin:
    where, *words = line.split()
    child = os.fork()
    if not child:
        arm(where)
        os._exit(_run(["taskmoe", *words]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLED: list[tuple[tuple[str, ...], str]]
KILLED = [(MIXTURE, where) for where in ("7", "weights", "end")]
KILLED += [(SPECIALIST, where) for where in ("7", "weights")]
EARLY = (MIXTURE, "rehearsal")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave pictures empty: what they show has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heat_maps, pictures, plot):
            patch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))
        patch.setattr(evaluation, "sample_predictions", lambda path, _: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def submodels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three specialists as public files, with random weights."""
    root = tmp_path_factory.mktemp("submodels")
    (root / "digits").mkdir()
    for number in (1, 2, 3):
        torch.manual_seed(number)
        state = Specialist(3, 4).state_dict()
        torch.save(state, root / "digits" / f"data{number}_33.33_epoch0.pth")
    return root


def words_of(command: tuple[str, ...], submodels: Path) -> tuple[str, ...]:
    return (*command, "--submodels-dir", str(submodels)) if command is MIXTURE else command


@pytest.fixture(scope="module")
def killed(
    submodels: Path,
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., subprocess.Popen[str]],
) -> Path:
    """A folder of runs that were killed: `COMMAND-WHERE`."""
    root = tmp_path_factory.mktemp("killed")
    gone = shutil.copytree(submodels, root / "submodels")
    lines = [
        f"{where} {' '.join(words_of(command, place))} --out {root}/{command[0]}-{where}\n"
        for command, where, place in (
            (*EARLY, gone),
            *((command, where, submodels) for command, where in KILLED),
        )
    ]
    program = start(program=(sys.executable, "-c", KILLER), stdin=subprocess.PIPE)
    with program:
        out, err = program.communicate("".join(lines), timeout=120)
    assert out.split() == ["-9"] * len(lines), err
    shutil.rmtree(gone)
    return root


@pytest.fixture(scope="module")
def whole(submodels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing disturbed, by command."""
    root = tmp_path_factory.mktemp("whole")
    for command in (MIXTURE, SPECIALIST):
        words = (*words_of(command, submodels), "--out", f"{root}/{command[0]}")
        assert _run(["taskmoe", *words]) == 0
    return {command[0]: root / command[0] for command in (MIXTURE, SPECIALIST)}


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["elapsed_seconds"]
    return rows


def same(one: Path, other: Path) -> None:
    for name in ("best_model.pth", "last.pth"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert metrics(one) == metrics(other)


def resumed(folder: Path, *words: str) -> Path:
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert _run(["taskmoe", *words, "--resume", str(folder)]) == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    return folder


@pytest.mark.parametrize(
    ("command", "where"), KILLED, ids=[f"{command[0]}-{where}" for command, where in KILLED]
)
def test_a_killed_training_resumes_exactly(
    killed: Path, whole: dict[str, Path], submodels: Path, command: tuple[str, ...], where: str
) -> None:
    folder = killed / f"{command[0]}-{where}"
    assert list((folder / "checkpoints").iterdir())
    same(resumed(folder, *words_of(command, submodels)), whole[command[0]])


def test_before_the_first_checkpoint_it_starts_again_from_its_own_merged_weights(
    killed: Path, whole: dict[str, Path]
) -> None:
    folder = killed / "train-rehearsal"
    assert not (folder / "checkpoints").exists()
    # The specialists are gone: the weights can come from nowhere else.
    same(resumed(folder, *words_of(MIXTURE, killed / "submodels")), whole["train"])


# Two processes

SHARES = """
import json, sys
from types import SimpleNamespace
import torch
from moectl.engine.launch import leave
from moectl.taskmoe.losses import balance_loss
from moectl.taskmoe.train import over_processes

torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=world))
given = torch.load(sys.argv[1], weights_only=True)
found = []
for sizes in ([3, 2], [4, 1], [2, 3]):
    for kind in ("l2", "switch"):
        weight = given["weight"].clone().requires_grad_()
        gates = (given["inputs"].split(sizes)[rank] @ weight).softmax(1)
        hot = torch.nn.functional.one_hot(gates.argmax(1), 3).float()
        usage, shares = over_processes(gates, run), over_processes(hot, run)
        loss = balance_loss(usage, kind, shares)
        share = len(gates) / 5
        (loss * (share * world)).backward()  # as the loop weighs it
        torch.distributed.all_reduce(weight.grad)
        found.append({
            "kind": kind, "usage": usage.tolist(), "loss": loss.item(),
            "gradient": (weight.grad / world).tolist(),
        })
if rank == 0:
    print(json.dumps(found))
leave()
"""


def test_two_processes_balance_the_whole_batch(
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    finish: Callable[..., tuple[int, str, str]],
) -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 3, generator=draws) for rows in (5, 3))
    torch.save({"inputs": inputs, "weight": weight}, tmp_path / "given.pth")
    (tmp_path / "shares.py").write_text(SHARES)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    program = (sys.executable, *words, f"{tmp_path}/shares.py", f"{tmp_path}/given.pth")
    code, out, err = finish(start(program=program), 120)
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    assert len(found) == 6
    for case in found:
        weight.grad = None
        gates = (inputs @ weight.requires_grad_()).softmax(1)
        loss = balance_loss(gates.mean(0), case["kind"], top_shares(gates))
        loss.backward()
        assert weight.grad is not None
        assert case["usage"] == pytest.approx(gates.mean(0).tolist(), abs=1e-6)
        assert case["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert torch.allclose(torch.tensor(case["gradient"]), weight.grad, atol=1e-6)
        assert weight.grad.abs().max() > 1e-3
