"""Finding runs and weights by short names."""

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.engine.errors import UserError
from moectl.engine.references import (
    all_runs,
    exact,
    find_run,
    find_weights,
    finished_runs,
    newest_unfinished,
    split_reference,
)


def made(place: str, started: str = "", **record: Any) -> Path:
    folder = Path("runs") / place
    folder.mkdir(parents=True)
    name = folder.name.rpartition("-")[0]
    record = {"name": name, "status": "finished", "started": started or folder.name, **record}
    record = {"room": folder.parent.name, **record}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def runs(isolated: Path) -> dict[str, Path]:
    places = ("a/x-1", "a/x-2", "a/x-20", "a/long-3", "b/x-4")
    folders = {place: made(place) for place in places}
    Path("runs/a/broken").mkdir()
    Path("runs/a/broken/run.json").write_text("{")
    Path("runs/a/empty").mkdir()
    return folders


def test_runs_are_listed_newest_first_and_broken_ones_left_out(runs: dict[str, Path]) -> None:
    assert [folder.name for folder, _ in all_runs("a")] == ["x-20", "x-2", "x-1", "long-3"]
    assert len(all_runs()) == 5
    assert all_runs("none") == []


def test_a_reference_ends_where_a_word_ends(isolated: Path) -> None:
    made("a/set_ir100-2026")
    assert find_run("set", "a") == find_run("set_ir100", "a")
    for cut in ("set_ir10", "se"):
        with pytest.raises(UserError, match="no such run"):
            find_run(cut, "a")


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("run@best", ("run", "best")),
        ("run@50", ("run", "50")),
        ("run", ("run", "")),
        ("w@2/run", ("w@2/run", "")),
        ("w@2/run@last", ("w@2/run", "last")),
    ],
)
def test_only_a_final_word_after_at_names_weights(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts


@pytest.mark.parametrize(
    ("reference", "room", "found"),
    [
        ("x-1", "a", "a/x-1"),
        ("x-2", "a", "a/x-2"),  # whole names win over beginnings
        ("long-", "a", "a/long-3"),
        ("b/x-4", "b", "b/x-4"),
        ("b/x", None, "b/x-4"),
        ("latest", "a", "a/x-20"),
        ("b/latest", None, "b/x-4"),
        ("long", None, "a/long-3"),
        ("runs/a/x-1", "a", "a/x-1"),
        ("runs/a/x-1/", None, "a/x-1"),
    ],
)
def test_references(runs: dict[str, Path], reference: str, room: str | None, found: str) -> None:
    assert find_run(reference, room) == runs[found]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("x", "x: 3 runs begin like this"),
        ("xx-1", r"xx-1: no such run under runs; did you mean x-1\?"),
        ("runs/a/empty", "not a run folder"),
        ("c/latest", "no run of c"),
        ("n" * 5000, "no such run"),
        ("a/" + "n" * 300, "no such run"),
        ("../../etc", r"\.\./\.\./etc: no such run folder"),
        ("/none/x-1", r"/none/x-1: no such run folder; did you mean x-1\?"),
        ("b/x-5", r"b/x-5: no such run under runs; did you mean x-4\?"),
        ("**/x", "no such run"),
        ("a**/x", "no such run"),
        ("/x-1", "/x-1: no such run folder"),
        ("a\0b", "no such run"),
        ("[/x", "no such run"),
    ],
)
def test_references_that_lead_nowhere(runs: dict[str, Path], reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_run(reference, "a")


@pytest.mark.parametrize("reference", ["runs/b/x-4", "b/x-4", "b/latest", "b/x"])
def test_a_run_of_another_system_is_refused(runs: dict[str, Path], reference: str) -> None:
    with pytest.raises(UserError, match=r"^runs/b/x-4: a run of b, expected one of a$"):
        find_run(reference, "a")
    assert find_run(reference, "b") == find_run(reference) == runs["b/x-4"]


def test_a_system_without_runs_is_told_how_to_make_one(isolated: Path) -> None:
    with pytest.raises(UserError, match="no finished grpo run of a under runs") as refusal:
        find_run("latest", "a", "finished", ["grpo"])
    assert refusal.value.hint == ("moectl a grpo makes one; moectl runs list shows what there is")
    with pytest.raises(UserError, match="no run of a") as refusal:
        find_run("a/latest")
    assert refusal.value.hint.startswith("moectl a train makes one")


def test_latest_of_a_status(runs: dict[str, Path]) -> None:
    stopped = made("a/x-0", status="interrupted")
    assert find_run("latest", "a", "interrupted") == stopped
    with pytest.raises(UserError, match="no failed run of a under runs"):
        find_run("latest", "a", "failed")


def test_newest_unfinished_run_of_a_name(runs: dict[str, Path]) -> None:
    assert newest_unfinished("a", "x", "train") is None
    made("a/x-5", status="running")
    newest = made("a/x-6", status="interrupted")
    made("a/y-7", status="running")
    other = made("a/x-8", status="running", command="merge")
    assert newest_unfinished("a", "x", "train") == newest
    assert newest_unfinished("a", "x", "merge") == other
    failed = made("a/x-9", status="failed")
    assert newest_unfinished("a", "x", "train") == newest, "it had nothing to go on with"
    (failed / "variants" / "first" / "checkpoints").mkdir(parents=True)
    assert newest_unfinished("a", "x", "train") == failed


def entry(file: str, epoch: int, best: bool = False) -> dict[str, Any]:
    return {"file": file, "epoch": epoch, "best": best, "sha256": ""}


def test_weights_of_a_run(isolated: Path) -> None:
    weights = [entry("e10", 10), entry("e2", 2), entry("best", 5, best=True), entry("e20", 20)]
    folder = made("a/x-1", weights=weights)
    for wanted, file in {"@last": "e20", "@best": "best", "@2": "e2", "@10": "e10"}.items():
        assert find_weights(f"x-1{wanted}", "a") == folder / file
    assert find_weights("latest", "a") == folder / "e20"
    with pytest.raises(UserError, match="no weights @3") as refusal:
        find_weights("x-1@3", "a")
    assert refusal.value.hint == "it has: @10, @2, @best, @20"
    with pytest.raises(UserError, match="no weights @5"):
        find_weights("x-1@5", "a")  # the best is not a numbered one


def test_weights_of_a_young_run(isolated: Path) -> None:
    made("a/x-1", weights=[])
    with pytest.raises(UserError, match="no weights @last") as refusal:
        find_weights("x-1", "a")
    assert refusal.value.hint == "it has: none yet"


def test_a_weights_file_is_its_own_reference(isolated: Path) -> None:
    Path("w@best.pth").touch()
    assert find_weights("w@best.pth") == Path("w@best.pth")


def test_the_latest_weights_are_those_of_the_newest_finished_run(isolated: Path) -> None:
    weights = [{"file": "w.pth", "epoch": 1, "best": False}]
    done = made("a/x-1", "2026-01-01", status="finished", weights=weights)
    made("a/x-2", "2026-01-02", status="failed", weights=[])
    assert find_weights("latest", "a") == done / "w.pth"


def test_finished_runs_of_a_command_come_newest_first(isolated: Path) -> None:
    old, new = (made(f"a/x-{number}", command="train") for number in (1, 2))
    made("a/x-3", command="merge")
    made("a/x-4", command="train", status="failed")
    made("b/x-5", command="train")
    found = finished_runs("a", "train")
    assert [folder for folder, _ in found] == [new, old]
    assert {record["command"] for _, record in found} == {"train"}


def test_a_reference_is_made_to_say_which_weights(isolated: Path) -> None:
    assert exact("x-1") == "x-1@best"
    assert exact("x-1", default="last") == "x-1@last"
    assert exact("x-1@3") == "x-1@3"
    assert exact("latest", Path("runs/a/x-1")) == "runs/a/x-1@best"
    assert exact("latest@last", Path("runs/a/x-1")) == "runs/a/x-1@last"
    Path("a@b.pth").touch()
    assert exact("a@b.pth", Path("runs/a/x-1")) == "a@b.pth"
