import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.balpoe.settings import BalpoeSettings
from moectl.engine.report import (
    cell,
    code,
    duration,
    image,
    made,
    parents,
    percent,
    reproduction,
    run_lines,
    settings_of,
    table,
    write_report,
)
from moectl.engine.settings import to_toml

EVIL = "<script>alert('1')</script> [a](http://b) *c* `d` | e"
RECORD = {
    "argv": f"moectl balpoe train --name {EVIL}",
    "status": "finished",
    "started": "2026-01-01T00:00:00+00:00",
    "resumed": [{"at": "2026-01-02T00:00:00+00:00"}],
    "wall_seconds": 3700.0,
    "device": "some processor",
    "processes": 2,
    "threads": 3,
    "precision": "bf16",
    "seed": 7,
    "versions": {"moectl": "0.1.0", "torch": "2.0"},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "settings": {"optim.lr": "flag", "data.root": "MOECTL_BALPOE__DATA__ROOT"},
    "parents": [{"path": f"runs/{EVIL}/a.pth", "sha256": "a1" * 32}, "runs/older"],
    "weights": [
        {"file": "checkpoint-epoch2.pth", "sha256": "b2" * 32, "epoch": 2, "best": False},
        {"file": "model_best.pth", "sha256": "c3" * 32, "epoch": 1, "best": True},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a system, with a name that means harm."""
    folder = tmp_path / "<b>'x' & \"y\"<"
    (folder / "evals" / "test@best").mkdir(parents=True)
    (folder / "evals" / "test@best" / "results.json").write_text("{}")
    (folder / "evals" / ".hidden.part").mkdir()
    (folder / "run.json").write_text(json.dumps(RECORD))
    optim = BalpoeSettings().optim.model_copy(update={"lr": 0.25})
    (folder / "settings.toml").write_text(to_toml(BalpoeSettings(optim=optim)))
    return folder


def row(text: str, start: str) -> list[str]:
    """Return the cells of the table row that begins with a text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def test_a_report_tells_how_the_run_was_made(folder: Path, parsed: Callable[[Path], Any]) -> None:
    write_report(folder, BalpoeSettings(), ["## Own part\n\nown words", ""])
    text, page = (folder / "report.md").read_text(), parsed(folder / "report.html")
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        f"# {folder.name}", "## Own part", "## Made by it", "## Made from",
        "## Settings that differ from the defaults", "## How to reproduce",
    ]  # fmt: skip
    assert row(text, "`optim.lr`") == ["0.25", "0.1", "flag"]
    for words in (
        folder.name, EVIL, "own words", "finished", "2026-01-02", "1 h 02 min", "some processor",
        "2 × 3", "bf16", "torch 2.0", "0123456789abcdef with changes", "a1" * 32, "runs/older",
        "c3" * 32, "evals/test@best", "results.json", "MOECTL_BALPOE__DATA__ROOT",
    ):  # fmt: skip
        assert words in page.words, words
    assert "hidden" not in page.words
    whole = (folder / "settings.toml").read_text()
    assert whole.strip() in page.words, "the page holds all settings"
    assert whole not in text


def test_equal_folders_have_equal_reports(folder: Path) -> None:
    written = []
    for _ in range(2):
        write_report(folder, BalpoeSettings(), ["own words"])
        written.append([(folder / name).read_bytes() for name in ("report.md", "report.html")])
    assert written[0] == written[1]
    assert not list(folder.glob(".*.part"))


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(folder, BalpoeSettings(), [])
    before = (folder / "report.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moectl.engine.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(folder, BalpoeSettings(), ["more"])
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".*.part"))


def test_a_folder_without_a_record_has_a_report(
    tmp_path: Path, parsed: Callable[[Path], Any]
) -> None:
    write_report(tmp_path, BalpoeSettings(), [])
    assert (tmp_path / "report.md").read_text() == f"# {tmp_path.name}\n"
    assert parsed(tmp_path / "report.html").all("h2") == []
    assert settings_of(tmp_path) == {}


def test_what_is_no_utf_8_does_not_stop_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"argv": "moectl \udcff"}))
    write_report(tmp_path, BalpoeSettings(), [])
    assert "moectl ?" in (tmp_path / "report.md").read_text()
    assert b"moectl ?" in (tmp_path / "report.html").read_bytes()


def test_the_command_can_be_copied(tmp_path: Path) -> None:
    text = reproduction(RECORD)
    assert "in a working tree at commit 0123456789abcdef with changes:" in text
    assert f"\n    {RECORD['argv']}\n" in text
    assert "It took 1 h 02 min on some processor." in text
    assert "Variables that it read: `MOECTL_BALPOE__DATA__ROOT`." in text
    assert "\n    moectl x 'a\n    b'\n" in reproduction({"argv": "moectl x 'a\nb'"})
    assert reproduction({}) == ""
    plain = reproduction({"argv": "moectl x"})
    assert "commit" not in plain
    assert "It took" not in plain
    assert "Variables that" not in plain


def test_parents_have_their_checksums() -> None:
    text = parents({"parents": [{"path": "a|b.pth", "sha256": "f0"}, {"path": "c"}, "d"]})
    assert row(text, "`a\\|b.pth`") == ["`f0`"]
    assert row(text, "`c`") == ["–"]
    assert row(text, "`d`") == ["–"]
    assert parents({"parents": []}) == ""


def test_what_a_run_left_is_listed(tmp_path: Path) -> None:
    assert made(tmp_path, {}) == ""
    for name in ("plugins/p", "variants/v", "evals/e"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "evals" / "test@last.json").write_text("{}")
    for number in range(10):
        (tmp_path / "evals" / "e" / f"{number}.png").write_bytes(b"")
    text = made(tmp_path, RECORD)
    assert row(text, "`model_best.pth`") == ["1", "yes", f"`{'c3' * 32}`"]
    assert row(text, "`checkpoint-epoch2.pth`")[1] == ""
    shown = ", ".join(f"`{number}.png`" for number in range(8))
    assert row(text, "`evals/e`") == [f"{shown}, 2 more"]
    for name in ("plugins/p", "variants/v", "evals/test@last.json"):
        assert row(text, f"`{name}`") == [""]


def test_a_run_that_writes_its_own_report_is_at_its_end() -> None:
    def status(**record: Any) -> list[str]:
        return row(run_lines("t", record), "status")

    assert status(status="running", pid=os.getpid()) == ["finished"]
    assert status(status="running", host="elsewhere", pid=1) == ["running"]
    assert status(status="failed", reason="why", pid=os.getpid()) == ["failed (why)"]
    assert "status" not in run_lines("t", {"seed": 1})


@pytest.mark.parametrize(
    ("text", "shown"), [("a", "`a`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```")]
)
def test_code_bears_backticks(text: str, shown: str) -> None:
    assert code(text) == shown


def test_numbers_stand_right_and_text_left() -> None:
    found = table(("a", "b", "c"), [("x", 1.23456, "45.6"), ("y", None, "–")])
    assert found.splitlines() == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| x | 1.235 | 45.6 |",
        "| y | – | – |",
    ]


def test_a_table_without_rows_has_its_head() -> None:
    assert table(("a", "b"), []) == "| a | b |\n| --- | --- |\n"


def test_a_cell_cannot_break_its_row() -> None:
    assert cell("a|b\nc") == "a\\|b c"
    assert cell(None) == "–"
    assert cell(True) == "True"


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "12.3"), (0.0, "0.0"), (1.0, "100.0"), (None, "–")]
)
def test_percent_of_a_fraction(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_percent_with_more_digits() -> None:
    assert percent(0.12345, 2) == "12.35"


def test_an_image_with_a_space_in_its_name_is_still_a_link() -> None:
    assert image("plots/a b.png", "A") == "![A](plots/a%20b.png)\n"
    assert image("a\udcff.png", "A") == "![A](a%FF.png)\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (59.97, "1 min 00 s"), (61, "1 min 01 s"),
     (3599.6, "1 h 00 min"), (11100, "3 h 05 min"), (90_000, "25 h 00 min")],
)  # fmt: skip
def test_durations_show_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
