"""Faults that every training procedure must stand; what only one room has is beside this file."""

import functools
import itertools
import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moectl.cli import _run
from moectl.engine.run import Run
from tests.faults import procedures
from tests.faults.procedures import PROCEDURES, Procedure, differing, disturbed, outcome, signalled

Whole = Callable[[Procedure], Path]
ALONE = [one for one in PROCEDURES if one.name != "diffusion-ablate"]
"""Those that a failed training ends: a comparison goes on with the next variant."""
EACH = pytest.mark.parametrize("procedure", PROCEDURES, ids=str)
MOMENTS = [
    pytest.param(procedure, moment, id=f"{procedure}-{moment.replace(' ', '-')}")
    for procedure in PROCEDURES
    for moment in procedure.all_moments()
]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with procedures.without_pictures():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    procedures.prepare(folder)
    return folder


@pytest.fixture
def train(home: Path) -> Callable[..., int]:
    """Run a procedure in a folder, from the start or on from where it stands."""

    def call(procedure: Procedure, folder: Path, *words: str) -> int:
        place = ("--resume" if (folder / "run.json").exists() else "--out", str(folder))
        return _run([*procedure.command(home), *place, *words])

    return call


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Undisturbed runs: without a network, by a clock that goes back by a day now and then.

    They lie under a path that is easily misread, and their files are for nobody else.
    """
    days = itertools.count()
    now = time.time

    @functools.cache
    def made(procedure: Procedure) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "Größe 1 ü & 'x'" / "%s [run]"
        before = os.umask(0o077)
        try:
            with procedures.without_network() as tried, pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "time", lambda: now() - 86_400 * (next(days) // 5))
                assert _run([*procedure.command(home), "--out", str(folder)]) == 0
        finally:
            os.umask(before)
        assert not tried
        return folder

    return made


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def newest(folder: Path) -> Path:
    """The newest checkpoint of the first training of a run."""
    return procedures.newest(min(procedures.checkpoint_roots(folder)))


def same(procedure: Procedure, folder: Path, reference: Path) -> None:
    assert status(folder) == "finished"
    assert not differing(outcome(procedure, folder), outcome(procedure, reference))


@EACH
def test_table_counts_the_updates_of_a_procedure(procedure: Procedure, whole: Whole) -> None:
    """Moments that never come would test nothing."""
    folder = whole(procedure)
    ends = [rows[-1] for path in _tables(folder) if (rows := procedures.rows(path))]
    assert sum(int(row["update"]) for row in ends) == procedure.updates
    for path in _tables(folder):
        numbers = [int(row["update"]) for row in procedures.rows(path)]
        assert numbers == sorted(set(numbers)), "no row twice"
        assert procedure.epoch in numbers


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.rglob("metrics*.csv"))


@EACH
def test_files_are_for_those_that_the_umask_allows(whole: Whole, procedure: Procedure) -> None:
    for path in whole(procedure).rglob("*"):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


@pytest.mark.parametrize(("procedure", "moment"), MOMENTS)
def test_a_killed_training_resumes_exactly(
    train: Callable[..., int], whole: Whole, tmp_path: Path, procedure: Procedure, moment: str
) -> None:
    reference, folder = whole(procedure), tmp_path / "run"
    work = functools.partial(train, procedure, folder)
    assert procedures.killed(moment, work) == -signal.SIGKILL
    assert status(folder) == "running"
    assert bool([*folder.rglob("update-*")]) == (moment != "update 1")
    assert train(procedure, folder) == 0
    same(procedure, folder, reference)


@EACH
def test_a_stop_signal_saves_and_the_rest_follows_exactly(
    train: Callable[..., int],
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    procedure: Procedure,
) -> None:
    """In the middle of an epoch, and in a validation."""
    folder, back = tmp_path / "run", itertools.count(0, -1)
    # By a clock that runs backwards no checkpoint is due but the one that the signal asks for.
    monkeypatch.setattr(Run, "elapsed_seconds", property(lambda _: next(back)))
    sittings = (
        (signal.SIGTERM, "update 2", 2),
        (signal.SIGINT, "score 1", procedure.epoch),
        (signal.SIGUSR1, "update 2", procedure.epoch + 2),
    )
    for number, moment, stopped in sittings:
        before = signal.getsignal(number)
        with disturbed(moment, signalled(number)):
            assert train(procedure, folder) == 75
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{signal.Signals(number).name} after update {stopped} of" in err
        assert "Traceback" not in err
        assert status(folder) == "interrupted"
        assert newest(folder).name == f"update-{stopped:08d}"
        assert signal.getsignal(number) == before
    assert train(procedure, folder) == 0
    same(procedure, folder, whole(procedure))


@EACH
def test_damaged_checkpoints_are_refused_by_name_and_passed_over_when_automatic(
    train: Callable[..., int],
    whole: Whole,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    procedure: Procedure,
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    words = [*procedure.command(home), "--name", "hurt"]
    moment = f"update {procedure.epoch + 2}"
    assert procedures.killed(moment, functools.partial(_run, words)) == -signal.SIGKILL
    (folder,) = tmp_path.glob("runs/*/hurt-*")
    newest = f"update-{procedure.epoch + 1:08d}", f"update-{procedure.epoch:08d}"
    flipped, cut = (
        next(folder.rglob(f"{name}/{file}"))
        for name, file in zip(newest, ("model.safetensors", "optimizer.pt"), strict=True)
    )
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-7])

    assert train(procedure, folder) == 2
    assert f"{newest[0]}/model.safetensors: does not match its checksum" in capsys.readouterr().err
    assert flipped.exists(), "an explicit resume changes nothing"
    talking = [word for word in words if word != "--quiet"]
    assert _run([*talking, "--resume", "auto"]) == 0
    err = "".join(capsys.readouterr().err.split())  # however the lines are broken
    assert f"{newest[0]}/model.safetensors:doesnotmatch" in err
    assert f"{newest[1]}/optimizer.pt:doesnotmatch" in err
    same(procedure, folder, whole(procedure))


@pytest.mark.parametrize("procedure", ALONE, ids=str)
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    train: Callable[..., int],
    whole: Whole,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    procedure: Procedure,
) -> None:
    folder, bad = tmp_path / "run", procedure.epoch + 2
    with disturbed(f"update {bad}", lambda: float("nan")):
        assert train(procedure, folder) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: loss or gradient not finite at update {bad} (epoch 2, batch 2" in err
    assert "Traceback" not in err
    assert status(folder) == "failed"
    assert newest(folder).name == f"update-{bad - 1:08d}"
    assert train(procedure, folder) == 0
    same(procedure, folder, whole(procedure))


@EACH
def test_a_finished_run_is_refused_other_settings_and_left_as_it_is(
    train: Callable[..., int],
    whole: Whole,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    procedure: Procedure,
) -> None:
    folder = shutil.copytree(whole(procedure), tmp_path / "run")
    other = ("--set", "train.seed=99", "--set", "train.deterministic=true")
    assert train(procedure, folder, *other) == 2
    err = capsys.readouterr().err
    assert "cannot resume with other settings: " in err
    assert "train.seed = 99 (the run has " in err
    assert "train.deterministic = True (the run has False)" in err
    with disturbed("update 1", lambda: pytest.fail("it trains again")):
        assert train(procedure, folder) == 0
    same(procedure, folder, whole(procedure))


@pytest.mark.parametrize("procedure", [one for one in PROCEDURES if one.name != "controller-grpo"])
def test_a_training_does_not_go_on_with_other_data(
    train: Callable[..., int],
    whole: Whole,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    procedure: Procedure,
) -> None:
    folder = shutil.copytree(whole(procedure), tmp_path / "run")
    if procedure.name == "diffusion-ablate":
        shutil.rmtree(folder / "variants" / "no_freq")  # else nothing is left to train
    split = folder / "splits.json"
    path, key = (split, "train") if split.exists() else (folder / "run.json", "digest")
    text = path.read_text()
    path.write_text(text.replace(f'"{key}": ', f'"{key}": "other", "own": '))
    assert path.read_text() != text
    assert train(procedure, folder, "--quiet") == 2
    assert "other images" in capsys.readouterr().err


@EACH
def test_a_folder_that_vanishes_or_cannot_be_made_is_one_clear_line(
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    procedure: Procedure,
) -> None:
    (tmp_path / "file").touch()
    assert train(procedure, tmp_path / "file" / "run") == 2
    assert "run: cannot be created (Not a directory)" in capsys.readouterr().err
    with disturbed("update 2", functools.partial(shutil.rmtree, tmp_path / "run")):
        assert train(procedure, tmp_path / "run") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path / "run") in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/b", "CON", "x" * 300, "line\nbreak", "-", "é"]
)
@EACH
def test_a_name_that_could_leave_the_folder_of_runs_is_refused(
    home: Path, isolated: Path, procedure: Procedure, name: str
) -> None:
    assert _run([*procedure.command(home), f"--name={name}"]) == 2
    assert not list(isolated.iterdir())
