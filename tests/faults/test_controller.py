"""Trainings and profiles of controller that are killed, go on, or run in two processes."""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.controller.history import Executions
from moectl.engine import artefact
from moectl.engine.references import newest_unfinished
from tests.faults import procedures

SMALL = (
    *("--model", "sim", "--cpu", "--quiet", "--set", "train.threads=1"),
    *("--set", "train.save_minutes=0", "--set", "train.tensorboard=false"),
)
GRPO = (
    *("grpo", *SMALL, "--train-samples", "8", "--val-samples", "3", "--batch-size", "2"),
    *("--hidden", "8", "--set", "policy.budget_dim=8", "--group-size", "3", "--epochs", "3"),
    *("--budget-min", "100", "--budget-max", "340", "--lr", "0.01", "--kl-coef", "0.1"),
    *("--inner-iterations", "2", "--keep-last", "2"),
)  # 4 updates in each epoch
PROFILE = ("profile", *SMALL, "--what", "importance,grid,latency", "--samples", "2", "--plans", "9")


def first(act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Act between the first weights and what lies beside them."""
    own = artefact.write_json

    def written(path: Path, document: Any) -> None:
        if "epoch_0" in path.name:
            act()
        own(path, document)

    patch.setattr(artefact, "write_json", written)


def torn(act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Act in the middle of the seventh answers that are written down."""
    count = iter(range(1, 10_000))

    def add(executions: Executions, lines: list[Any]) -> None:
        text, seventh = "".join(json.dumps(line) + "\n" for line in lines), next(count) == 7
        with executions.path.open("a") as file:
            file.write(text[: len(text) // 2] if seventh else text)
        if seventh:
            act()

    patch.setattr(Executions, "add", add)


PLACES = {"first": first, "torn": torn}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with procedures.without_pictures():
        yield


def killed(where: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in a process that is killed at a place."""

    def doomed() -> int:
        PLACES[where](procedures.signalled(signal.SIGKILL), monkeypatch)
        return _run(["controller", *words])

    return procedures.exit_code(doomed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training and a profile that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    for words in (GRPO, PROFILE):
        assert _run(["controller", *words, "--out", str(root / words[0])]) == 0
    return root


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def same(one: Path, other: Path) -> None:
    names = {path.name for path in one.glob("*.pt*")}
    assert names == {path.name for path in other.glob("*.pt*")}
    assert len(names) == 2 * 4  # the first, two newest and the best, with what lies beside them
    for name in names:
        if name.endswith(".pt"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (one / "executions.jsonl").read_bytes() == (other / "executions.jsonl").read_bytes()
    for name in ("training_history.csv", "validation_history.csv", "metrics.csv"):
        assert procedures.rows(one / name) == procedures.rows(other / name), name
    assert len(procedures.rows(one / "training_history.csv")) == 3


@pytest.mark.parametrize("where", PLACES)
def test_a_killed_training_resumes_exactly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path))
    words = (*GRPO, "--name", "cut")
    assert killed(where, words, monkeypatch) == -signal.SIGKILL
    folder = newest_unfinished("controller", "cut", "grpo")
    assert folder is not None
    assert (folder / "checkpoint_epoch_0.pt.json").exists() == (where != "first")
    if where == "torn":
        assert not (folder / "executions.jsonl").read_bytes().endswith(b"\n")
    assert _run(["controller", *words, "--resume", "auto"]) == 0
    assert status(folder) == "finished"
    same(folder, whole / "grpo")
    assert newest_unfinished("controller", "cut", "grpo") is None


def test_a_killed_profile_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path))
    words = (*PROFILE, "--name", "cut")
    assert killed("torn", words, monkeypatch) == -signal.SIGKILL
    folder = newest_unfinished("controller", "cut", "profile")
    assert folder is not None
    assert not (folder / "importance.json").exists()
    assert _run(["controller", *words, "--resume", "auto"]) == 0
    assert status(folder) == "finished"
    for name in ("executions.jsonl", "importance.json", "latency.json", "grid.jsonl", "lut.json"):
        assert (folder / name).read_bytes() == (whole / "profile" / name).read_bytes(), name


def test_more_epochs_end_as_if_asked_for_at_once(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert _run(["controller", *GRPO, "--num-epochs", "1", "--out", str(folder)]) == 0
    assert _run(["controller", *GRPO, "--resume", str(folder)]) == 0
    assert (folder / "executions.jsonl").read_bytes() == (
        whole / "grpo" / "executions.jsonl"
    ).read_bytes()
    assert (folder / "checkpoint_epoch_3.pt").read_bytes() == (
        whole / "grpo" / "checkpoint_epoch_3.pt"
    ).read_bytes()


# Two processes

TRAIN = """
import json, sys
from pathlib import Path
from moectl.controller import train as module, world
from moectl.controller.settings import ControllerSettings
from moectl.engine.errors import Interrupted
from moectl.engine.launch import build_accelerator, leave
from moectl.engine.run import create, reopen
from moectl.engine.settings import resolve

given = {
    "backbone.model": "sim", "data.train_samples": 6, "data.val_samples": 5, "policy.hidden": 8,
    "policy.budget_dim": 8, "policy.dropout": 0.0, "budget.low": 100, "budget.high": 340,
    "grpo.group_size": 3, "optim.name": "sgd", "optim.lr": 0.05, "train.epochs": 2,
    "train.batch_size": 2, "train.tensorboard": False, "train.save_minutes": 0,
}
VARIANTS = {
    "learned": {},
    "fixed": {
        "policy.blocks": "prefix", "grpo.inner_iterations": 2, "grpo.kl_coef": 0.5,
        "budget.mode": "relative", "budget.low": 0.4, "budget.high": 1.0,
    },
    "cut": {"train.batch_size": 6, "train.accumulate": 3, "policy.top_k": "shared"},
}

def fit(folder, values, patch, stop_at=0):
    settings = resolve(ControllerSettings, {**given, **values}, [], [])[0]
    accelerator = build_accelerator(settings.train, cpu=True)
    rank, own = accelerator.process_index, module._roll_out

    def rolled(loop, *words):
        if stop_at and loop.update + 1 == stop_at and rank == loop.accelerator.num_processes - 1:
            loop.run.stop.reason = "asked to"  # but one process alone
        return own(loop, *words)

    patch(module, "report", lambda _: None)
    patch(module, "_roll_out", rolled)
    # As if each process had timed the network by itself.
    patch(world, "full_latency", lambda *_: 300.0 + 50 * rank)
    named = {"room": "controller", "command": "grpo", "name": "t", "out": folder, "origin": {}}
    found = folder.exists()
    accelerator.wait_for_everyone()
    with (
        reopen(folder, settings, accelerator, auto=False) if found
        else create(settings, accelerator, **named)
    ) as run:
        module.train(settings, run)
    patch(module, "_roll_out", own)

def main(root, patch=setattr):
    own = module._roll_out
    for name, values in VARIANTS.items():
        fit(root / name, values, patch)
    try:
        fit(root / "parts", VARIANTS["fixed"], patch, stop_at=4)
    except Interrupted:
        patch(module, "_roll_out", own)
        fit(root / "parts", VARIANTS["fixed"], patch)

if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
"""


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., subprocess.Popen[str]],
    finish: Callable[..., tuple[int, str, str]],
) -> tuple[Path, Path]:
    """The same trainings in one process and in two."""
    root = tmp_path_factory.mktemp("processes")
    for name in ("one", "two"):
        (root / name).mkdir()
    (root / "train.py").write_text(TRAIN)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    program = (sys.executable, *words, f"{root}/train.py", f"{root}/two")
    code, _, err = finish(start(program=program), 180)
    assert code == 0, err
    spec = importlib.util.spec_from_file_location("train_controller", root / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        module.main(root / "one", patch.setattr)
    return root / "one", root / "two"


@pytest.mark.parametrize("variant", ["learned", "fixed", "cut"])
def test_two_processes_end_in_the_weights_of_one(both: tuple[Path, Path], variant: str) -> None:
    one, two, first = (
        torch.load(folder / variant / name, weights_only=True)
        for folder, name in (
            (both[0], "checkpoint_epoch_2.pt"),
            (both[1], "checkpoint_epoch_2.pt"),
            (both[0], "checkpoint_epoch_0.pt"),
        )
    )
    moved = 0.0
    for key in ("one_stage_controller_state_dict", "budget_encoder_state_dict"):
        for name, weights in one[key].items():
            assert torch.allclose(weights, two[key][name], atol=1e-5), name
            moved = max(moved, float((weights - first[key][name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("variant", ["learned", "fixed", "cut"])
def test_two_processes_have_the_histories_of_one(both: tuple[Path, Path], variant: str) -> None:
    for name in ("training_history.csv", "validation_history.csv", "metrics.csv"):
        one, two = (procedures.rows(folder / variant / name) for folder in both)
        assert len(one) == len(two) == 2
        for first, second in zip(one, two, strict=True):
            assert list(first) == list(second)
            for column in first:
                expected = pytest.approx(float(second[column] or 0), rel=1e-4, abs=1e-5)
                assert float(first[column] or 0) == expected, column


def test_two_processes_write_what_both_have_answered(both: tuple[Path, Path]) -> None:
    def found(folder: Path) -> list[tuple[Any, ...]]:
        lines = map(json.loads, (folder / "fixed" / "executions.jsonl").read_text().splitlines())
        names = ("update", "split", "sample_id", "plan_key")
        return sorted(tuple(line[name] for name in names) for line in lines)

    assert found(both[0]) == found(both[1])
    assert len(found(both[0])) == 2 * (6 * 3 + 5)


def test_all_processes_have_the_budgets_of_the_first(both: tuple[Path, Path]) -> None:
    record = json.loads((both[1] / "fixed" / "run.json").read_text())
    assert record["world"]["budgets"] == [120, 300]


def test_two_processes_that_are_stopped_resume_exactly(both: tuple[Path, Path]) -> None:
    for root in both:
        for name in ("checkpoint_epoch_2.pt", "best_model.pt", "executions.jsonl"):
            assert (root / "parts" / name).read_bytes() == (root / "fixed" / name).read_bytes()
        assert json.loads((root / "parts" / "run.json").read_text())["resumed"]
