"""Every training procedure at its smallest, and how to disturb it at a chosen moment."""

import csv
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOME = "@home"
"""In a command line: the folder that `prepare` has filled."""

ENGINE = (
    *("--cpu", "--quiet", "--set", "train.threads=1", "--set", "train.precision=no"),
    *("--set", "train.tensorboard=false", "--set", "train.save_minutes=0"),
    *("--set", "train.keep=3", "--set", "train.log_every=2"),
)  # a checkpoint after every update


@dataclass(frozen=True)
class Procedure:
    """A training command, what it leaves behind, and when to disturb it."""

    name: str
    words: tuple[str, ...]
    weights: tuple[str, ...]
    """Patterns of the files that must come out byte for byte the same."""
    epoch: int
    """Updates of an epoch."""
    updates: int
    """Updates of the whole."""
    tables: tuple[str, ...] = ("metrics.csv",)
    """Patterns of the tables that must come out the same, but for columns of time."""
    moments: tuple[str, ...] = ()
    """When to kill it, besides the moments that every single training has: see `disturbed`."""
    trainings: int = 1
    """Trainings one after the other: stages or variants."""

    def __str__(self) -> str:
        return self.name

    def command(self, home: Path) -> list[str]:
        """Return the words after `moectl`, without those that name the run's folder."""
        return [word.replace(HOME, str(home)) for word in (*self.words, *ENGINE)]

    def all_moments(self) -> tuple[str, ...]:
        """Return when to kill it."""
        if self.trainings > 1:
            return self.moments
        # Before the first checkpoint, inside the second epoch, at the end of the first.
        return ("update 1", f"update {self.epoch + 2}", f"saved {self.epoch}", *self.moments)


TASKMOE = ("--task", "digits", "--width", "4", "--batch-size", "67", "--num-epochs", "2")
DIFFUSION = (
    *("--data", "digits", "--image-size", "8", "--model-channels", "8", "--channel-mults", "1,2"),
    *("--set", "model.num_experts=3", "--set", "model.time_dim=8", "--set", "model.class_dim=8"),
    *("--epochs", "2", "--sample-every", "0"),
)

PROCEDURES = (
    Procedure(
        "balpoe-train",
        (
            *("balpoe", "train", "--dataset", "synthetic", "--imbalance-ratio", "10"),
            *("--set", "data.image_size=8", "--layer2-dimension", "16", "--layer3-dimension", "16"),
            *("--experts", "2", "--tau-list", "0;2", "--epochs", "2", "--bs", "96"),
            *("--warmup", "0", "--save-period", "1"),
        ),
        ("checkpoint-epoch*.pth", "model_best.pth"),
        epoch=5,
        updates=10,
        moments=("weights checkpoint-epoch1.pth", "weights model_best.pth"),
    ),
    Procedure(
        "taskmoe-specialist",
        ("taskmoe", "specialist", *TASKMOE, "--specialist", "2"),
        ("best_model.pth", "last.pth"),
        epoch=5,
        updates=10,
        moments=("weights best_model.pth",),
    ),
    Procedure(
        "taskmoe-train",
        (
            *("taskmoe", "train", *TASKMOE, "--freeze-extractor-epochs", "1"),
            *("--expert-analysis-interval", "0", "--submodels-dir", f"{HOME}/submodels"),
        ),
        ("best_model.pth", "last.pth"),
        epoch=13,
        updates=26,
        moments=("weights best_model.pth", "saved 26"),
    ),
    Procedure(
        "csr-train",
        (
            *("csr", "train", "--dataset", "synthetic", "--backbone-type", "tiny"),
            *("--no-pretrained", "--image-size", "64", "--set", "data.synthetic_images=60"),
            *("--set", "model.projection=16", "--batch-size", "16", "--lr", "1e-3"),
            *("--lr-mult-stage1", "1", "--lr-mult-stage3", "10", "--epochs-stage1", "2"),
            *("--epochs-stage2", "2", "--epochs-stage3", "2", "--proto-init", "kmeans"),
            *("--revive-every", "1", "--normalize", "dataset", "--workers", "0"),
        ),
        ("best_model_*.pth", "model_stage2_epoch2.pth", "final_model.pth"),
        epoch=4,
        updates=24,
        tables=("metrics_*.csv",),
        moments=(
            *("update 1", "update 6", "weights best_model_stage1.pth", "saved 8", "update 9"),
            *("update 14", "weights model_stage2_epoch2.pth", "update 17", "update 22"),
            "weights final_model.pth",
        ),  # in and between its three stages
        trainings=3,
    ),
    Procedure(
        "diffusion-train",
        (
            *("diffusion", "train", *DIFFUSION, "--set", "data.val_fraction=0.5"),
            *("--lr", "0.01", "--batch-size", "256", "--set", "train.accumulate=2"),
            *("--save-every", "1", "--ema-decay", "0.9"),
        ),
        ("checkpoint_epoch_*.pth",),
        epoch=4,
        updates=8,
        moments=("weights checkpoint_epoch_1.pth",),
    ),
    Procedure(
        "diffusion-ablate",
        (
            *("diffusion", "ablate", *DIFFUSION, "--no-freq", "--batch-size", "240"),
            *("--features", "none", "--set", "data.val_fraction=0.5"),
        ),
        ("variants/*/checkpoint_epoch_2.pth",),
        epoch=4,
        updates=16,
        tables=("variants/*/metrics.csv",),
        moments=("saved 8", "update 14"),  # between its two variants and in the second
        trainings=2,
    ),
    Procedure(
        "controller-toy",
        (
            *("controller", "toy", "--dataset", "synth_vqa", "--size", "nano"),
            *("--toy-train", "16", "--toy-val", "2", "--epochs", "2", "--batch-size", "2"),
        ),
        ("vlm.safetensors",),
        epoch=4,
        updates=8,
        tables=("metrics.csv", "toy.csv"),
    ),
    Procedure(
        "controller-grpo",
        (
            *("controller", "grpo", "--model", "sim", "--train-samples", "8"),
            *("--val-samples", "3", "--batch-size", "2", "--hidden", "8"),
            *("--set", "policy.budget_dim=8", "--group-size", "3", "--epochs", "3"),
            *("--budget-min", "100", "--budget-max", "340", "--lr", "0.01", "--kl-coef", "0.1"),
            *("--inner-iterations", "2", "--keep-last", "2"),
        ),
        ("*.pt", "executions.jsonl"),
        epoch=4,
        updates=12,
        tables=("metrics.csv", "*_history.csv"),
        moments=("weights checkpoint_epoch_2.pt",),
    ),
)


def prepare(home: Path) -> None:
    """Make what the procedures start from: three specialists of taskmoe with random weights."""
    import torch

    from moectl.taskmoe.model import Specialist

    folder = home / "submodels" / "digits"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        torch.manual_seed(number)
        state = Specialist(3, 4).state_dict()
        torch.save(state, folder / f"data{number}_33.33_epoch0.pth")


# What came out


def outcome(procedure: Procedure, folder: Path) -> dict[str, Any]:
    """Return what must not depend on how often a run was disturbed, by file.

    These are weights, tables without their columns of time, and the newest checkpoint of each
    training.
    """
    files: list[Path] = []
    found: dict[str, Any] = {}
    for root in sorted(checkpoint_roots(folder)):
        files += [newest(root) / name for name in ("model.safetensors", "loop.json")]
        found[f"{root.relative_to(folder)}: optimizer"] = moving(newest(root) / "optimizer.pt")
    for pattern in procedure.weights:
        matching = sorted(folder.glob(pattern))
        assert matching, f"{folder}: no {pattern}"
        files += matching
    found |= {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for pattern in procedure.tables:
        files = sorted(folder.glob(pattern))
        assert files, f"{folder}: no {pattern}"
        for path in files:
            found[str(path.relative_to(folder))] = [list(row.items()) for row in rows(path)]
    return found


def checkpoint_roots(folder: Path) -> set[Path]:
    """Return the folders of checkpoints: a run of stages or variants has several."""
    return {path.parent for path in folder.glob("**/checkpoints/**/update-*")}


def newest(root: Path) -> Path:
    """Return the checkpoint of the latest update."""
    return max(root.glob("update-*"))


def moving(path: Path) -> Any:
    """Read optimiser and averages; the order in which weights got their first gradient is lost."""
    import torch

    def settled(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
        if isinstance(value, dict):
            return {str(key): settled(own) for key, own in value.items()}
        return [settled(own) for own in value] if isinstance(value, list | tuple) else value

    return settled(torch.load(path, weights_only=True))


def rows(path: Path) -> list[dict[str, str]]:
    """Read a table without what tells the time."""
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if not name.endswith("seconds")}
        for row in found
    ]


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what is not the same in two outcomes."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


# Disturbing


@contextmanager
def disturbed(moment: str, act: Callable[[], Any]) -> Iterator[None]:
    """Do something at a moment of the trainings inside.

    Args:
        moment: `update N`, just before the N-th update moves the weights; `saved N`, when the N-th
            checkpoint is on the disk; `score N`, at the end of the N-th validation; `weights NAME`,
            when that file is there and the checkpoint of its epoch is not. N counts from 1, over
            all stages and variants.
        act: what to do; a number that it returns multiplies the loss of an update.
    """
    from moectl.engine import checkpoint
    from moectl.engine.loop import Step
    from moectl.engine.run import Run

    kind, _, which = moment.partition(" ")
    update, save, score, save_weights = Step.update, checkpoint.save, Step.score, Run.save_weights
    count = 0

    def reached(happened: str) -> Any:
        nonlocal count
        count += happened == kind
        return act() if happened == kind and count == int(which) else None

    def updating(step: Step, loss: Any, **parts: Any) -> None:
        factor = reached("update") if step.ends_update else None
        update(step, loss if factor is None else loss * factor, **parts)

    def saving(root: Path, *given: Any) -> Path:
        folder = save(root, *given)
        if root.name != "rehearsal":
            reached("saved")
        return folder

    def scoring(step: Step, metrics: Any) -> bool:
        reached("score")
        return score(step, metrics)

    def writing(run: Run[Any], name: str, *given: Any, **named: Any) -> None:
        save_weights(run, name, *given, **named)
        if (kind, which) == ("weights", name):
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "update", updating)
        patch.setattr(checkpoint, "save", saving)
        patch.setattr(Step, "score", scoring)
        patch.setattr(Run, "save_weights", writing)
        yield


def signalled(number: int) -> Callable[[], None]:
    """Return what sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def in_child(work: Callable[[], object]) -> int:
    """Run something in a forked process, without its clean-up, and return the process number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(120)  # rather dead than hanging
            code = int(work() or 0)  # type: ignore[call-overload]
        finally:
            os._exit(code)
    return child


def exit_code(work: Callable[[], object]) -> int:
    """Run something in a forked process, and return how that ended."""

    def silent() -> object:
        with Path(os.devnull).open("w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            return work()

    _, status = os.waitpid(in_child(silent), 0)
    return os.waitstatus_to_exitcode(status)


def killed(moment: str, work: Callable[[], object]) -> int:
    """Run something in a forked process that is killed at a moment; return how that ended."""

    def doomed() -> object:
        with disturbed(moment, signalled(signal.SIGKILL)):
            return work()

    return exit_code(doomed)


@contextmanager
def without_network() -> Iterator[list[str]]:
    """Refuse every connection to another machine; yield those that were tried."""
    tried: list[str] = []
    connect = socket.socket.connect

    def refuse(*given: Any, **_: Any) -> None:
        tried.append(str(given))
        raise OSError("there is no network")

    def connecting(one: socket.socket, place: Any) -> None:
        if one.family != socket.AF_UNIX:  # between processes of this machine
            refuse(place)
        connect(one, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket.socket, "connect_ex", connecting)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield tried


@contextmanager
def without_pictures() -> Iterator[None]:
    """Leave reports, pictures and stop-watches out: they have tests of their own."""
    import moectl.balpoe.train
    import moectl.controller.profile
    import moectl.controller.train
    import moectl.csr.train
    import moectl.diffusion.ablate
    import moectl.diffusion.train
    import moectl.taskmoe.specialist
    import moectl.taskmoe.train
    from moectl.controller import toy
    from moectl.diffusion import heat_maps as expert_maps
    from moectl.diffusion import profile
    from moectl.engine import plot
    from moectl.taskmoe import eval as evaluation
    from moectl.taskmoe import heat_maps, pictures

    reporting = [
        moectl.balpoe.train, moectl.controller.profile, moectl.controller.train, moectl.csr.train,
        moectl.diffusion.ablate, moectl.diffusion.train, moectl.taskmoe.specialist,
        moectl.taskmoe.train,
    ]  # fmt: skip
    every = toy.plans_of
    with pytest.MonkeyPatch.context() as patch:
        for module in reporting:
            patch.setattr(module, "report", lambda _: None)
        patch.setattr(toy, "plans_of", lambda space: list(every(space))[:2])
        patch.setattr(profile, "times", lambda *_: profile.Times(1.0, 1.0))
        for module in (expert_maps, heat_maps, pictures, plot):
            patch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))
        patch.setattr(evaluation, "sample_predictions", lambda path, _: path.write_bytes(b""))
        yield
