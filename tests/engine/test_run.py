"""The run folder: what it records, and who may write into it."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moectl.engine import run as engine
from moectl.engine.errors import Interrupted, UserError


def opened(toy: ModuleType, **options: Any) -> Any:
    from moectl.engine.launch import build_accelerator

    made = toy.settings()
    given = {"room": "toy", "command": "train", "name": "x", "out": None, "origin": {}}
    return engine.create(made, build_accelerator(made.train, cpu=True), **{**given, **options})


def test_a_new_run_records_what_it_is(toy: ModuleType, isolated: Path) -> None:
    origin = {"optim.lr": "flag", "train.seed": "default"}
    with opened(toy, origin=origin) as run:
        record = json.loads((run.folder / "run.json").read_text())
    assert run.folder.parent == Path("runs/toy")
    assert record["run"] == f"toy/{run.folder.name}"
    assert run.folder.name.startswith("x-2")
    assert record["settings"] == {"optim.lr": "flag"}
    assert record["status"] == "running"
    assert (record["room"], record["command"], record["name"]) == ("toy", "train", "x")
    assert (record["seed"], record["processes"], record["precision"]) == (1, 1, "no")
    assert record["versions"]["torch"]
    assert record["host"]
    from moectl.engine.settings import from_toml

    assert from_toml(toy.ToySettings, run.folder / "settings.toml") == toy.settings()


def test_a_run_keeps_to_the_images_it_began_with(toy: ModuleType) -> None:
    facts = {"dataset": "cats", "images": {"train": 3}, "digest": "a", "mean": 0.5}
    with opened(toy) as run:
        run.keep_to(facts)
        run.keep_to({**facts, "mean": 0.25})
        assert run.record["data"] == {**facts, "mean": 0.25}
        with pytest.raises(UserError, match=r"other images of cats: \{'train': 3\} then, "):
            run.keep_to({**facts, "digest": "b", "images": {"train": 4}})
        assert run.record["data"]["digest"] == "a"


def test_runs_of_one_second_get_folders_of_their_own(toy: ModuleType) -> None:
    runs = []
    for _ in range(3):
        with opened(toy) as run:
            runs.append(run.folder.name)
    assert len(set(runs)) == 3


def test_the_folder_of_all_runs_can_be_moved(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "else where ü"))
    with opened(toy) as run:
        assert run.folder.parent == tmp_path / "else where ü" / "toy"


def test_out_is_the_folder_itself_and_must_be_empty(toy: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/deep", "empty"):
        with opened(toy, out=tmp_path / name) as run:
            assert run.folder == tmp_path / name
    (tmp_path / "file").touch()
    for name in ("empty", "file"):
        with pytest.raises(UserError, match=f"--out .*{name}: exists and is not an empty folder"):
            opened(toy, out=tmp_path / name)
    with pytest.raises(UserError, match="cannot be created"):
        opened(toy, out=tmp_path / "file" / "below")


def test_a_link_in_the_place_of_the_folder_is_not_followed(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    outside = tmp_path / "outside"
    outside.mkdir()
    parent = Path("runs/toy")
    parent.mkdir(parents=True)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2030, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(engine, "datetime", Clock)
    (parent / "x-20300102-030405").symlink_to(outside)
    with opened(toy) as run:
        assert run.folder.name == "x-20300102-030405-2"
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "finished", ""),
        (Interrupted("SIGTERM after update 3"), "interrupted", "SIGTERM after update 3"),
        (KeyboardInterrupt(), "interrupted", "second Ctrl-C"),
        (ValueError("bad\nsecond line"), "failed", "ValueError: bad"),
    ],
)
def test_leaving_records_how_it_went(
    toy: ModuleType, error: BaseException | None, status: str, reason: str
) -> None:
    run = opened(toy)

    def work() -> None:
        with run:
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()
    assert toy.status(run.folder) == (status, reason)
    log = (run.folder / "log.txt").read_text()
    assert ("Traceback" in log) == (status == "failed")


@pytest.mark.parametrize("named", [True, False])
def test_a_mistake_found_before_any_result_leaves_no_run_behind(
    toy: ModuleType, tmp_path: Path, named: bool
) -> None:
    def work(run: Any) -> None:
        with run:
            (run.folder / "split.json").touch()
            raise UserError("no such file")

    out = tmp_path / "out" if named else None
    for _ in range(2):  # the same command can be given again
        run = opened(toy, out=out)
        with pytest.raises(UserError, match="no such file"):
            work(run)
        assert run.folder.exists() == named
        assert list(Path("runs/toy").glob("*") if out is None else out.iterdir()) == []


@pytest.mark.parametrize("result", ["weights", "file", "resumed"])
def test_a_mistake_found_later_leaves_what_was_done(toy: ModuleType, result: str) -> None:
    def work(run: Any) -> None:
        with run:
            if result == "weights":
                run.save_weights("a.pth", {}, {}, epoch=1)
            if result == "file":
                (run.folder / "answers.jsonl").touch()
            raise UserError("no such file")

    run = opened(toy)
    if result == "resumed":
        with pytest.raises(ValueError, match="ours"), run:
            raise ValueError("ours")
        run = toy.open_run(run.folder, toy.settings(), resume="named")
    with pytest.raises(UserError):
        work(run)
    assert toy.status(run.folder) == ("failed", "UserError: no such file")
    assert "Traceback" in (run.folder / "log.txt").read_text()


def test_a_traceback_goes_to_the_file_but_not_to_the_screen(
    toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from moectl.engine import console

    console.setup()
    with pytest.raises(ValueError, match="inside"), opened(toy):
        raise ValueError("inside")
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err


def test_two_writers_of_one_folder_are_refused(toy: ModuleType) -> None:
    with opened(toy) as first, pytest.raises(UserError, match="another process is writing here"):
        toy.open_run(first.folder, toy.settings(), resume="named")
    with toy.open_run(first.folder, toy.settings(), resume="named"):
        pass


def test_the_last_words_of_whoever_had_the_run_before_are_not_lost(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(toy)
    first.__enter__()
    look = engine.environment

    def slow(accelerator: Any) -> dict[str, Any]:
        first.note(scores={"last": 1})
        first.__exit__(None, None, None)
        return look(accelerator)

    monkeypatch.setattr(engine, "environment", slow)
    with toy.open_run(first.folder, toy.settings(), resume="named") as run:
        assert run.record["scores"] == {"last": 1}


def test_reopening_counts_time_and_sittings(toy: ModuleType) -> None:
    with opened(toy) as run:
        pass
    record = engine.read_record(run.folder)
    record["wall_seconds"] = 1000.0
    (run.folder / "run.json").write_text(json.dumps(record))
    with toy.open_run(run.folder, toy.settings(train__epochs=9), resume="named") as run:
        assert run.elapsed_seconds >= 1000
        assert run.resuming == "named"
    record = engine.read_record(run.folder)
    assert len(record["resumed"]) == 1
    assert record["wall_seconds"] >= 1000
    assert "epochs = 4" in (run.folder / "settings.toml").read_text(), "nothing was trained yet"


def test_settings_are_written_once_the_checkpoint_fits(toy: ModuleType) -> None:
    with opened(toy) as run:
        toy.train(run)
    more = toy.settings(train__epochs=5)
    with toy.open_run(run.folder, more, resume="named") as again:
        assert "epochs = 4" in (run.folder / "settings.toml").read_text()
        toy.train(again)
    assert "epochs = 5" in (run.folder / "settings.toml").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\xff"])
def test_a_folder_without_a_record_is_not_a_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="not a run folder"):
        engine.read_record(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        engine.read_record(tmp_path / "none")


def test_weights_are_listed_and_replaced_when_written_again(toy: ModuleType) -> None:
    import torch

    with opened(toy) as run:
        for epoch in (1, 2):
            run.save_weights("a.pth", {"x": torch.tensor(epoch)}, {"model": "Toy"}, epoch=epoch)
        run.save_weights("b.pth", {"x": torch.tensor(0)}, {}, epoch=1, best=True)
    weights = engine.read_record(run.folder)["weights"]
    assert [(entry["file"], entry["epoch"], entry["best"]) for entry in weights] == [
        ("a.pth", 2, False),
        ("b.pth", 1, True),
    ]
    sidecar = json.loads((run.folder / "a.pth.json").read_text())
    assert sidecar["sha256"] == weights[0]["sha256"]
    assert (sidecar["run"], sidecar["epoch"], sidecar["model"]) == (run.record["run"], 2, "Toy")


def test_a_run_whose_record_cannot_be_written_still_ends(toy: ModuleType) -> None:
    with opened(toy) as run:
        shutil.rmtree(run.folder)


def test_a_refused_resume_does_not_undo_a_finished_run(toy: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    toy.complete(folder, train__epochs=1)
    for file in folder.glob("checkpoints/*/loop.json"):
        file.write_text("{")
    with pytest.raises(UserError, match="corrupt checkpoint"):
        toy.complete(folder, resume="named", train__epochs=2)
    assert toy.status(folder)[0] == "finished"
