"""Results on stdout, everything else on stderr."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from moectl.engine import console
from moectl.engine.errors import RunFailed


def test_result_is_text_or_json_but_never_both(capsys: pytest.CaptureFixture[str]) -> None:
    console.setup()
    console.result({"a": 1}, "runs/x")
    assert capsys.readouterr().out == "runs/x\n"
    console.setup(as_json=True)
    console.result({"a": [1.5, None, "ü"]}, "runs/x")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": [1.5, None, "ü"]}
    assert err == ""


def test_markdown_is_drawn_on_a_terminal_and_left_alone_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.setup()
    text = console.Markdown("## Front\n\n| policy | ms |\n| --- | ---: |\n| lut | 31.8 |\n")
    console.result({}, text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.result({}, text)
    drawn = capsys.readouterr().out
    assert "Front" in drawn
    assert "lut" in drawn
    assert "|" not in drawn
    assert "#" not in drawn


def test_json_has_no_nan() -> None:
    console.setup(as_json=True)
    with pytest.raises(ValueError, match="JSON"):
        console.result({"a": float("nan")}, "")


def test_a_piped_table_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.setup()
    wide = "w" * 3000
    console.result({}, console.table(("name", "value"), [(wide, 1.0), ("[bold]x[/bold]", None)]))
    out = capsys.readouterr().out
    assert wide in out
    assert "–" in out


def test_cells_show_their_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.setup()
    console.result({}, console.table(("name",), [("[1, 2] [red]x[/red] :smile:",)]))
    assert "[1, 2] [red]x[/red] :smile:" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_that_cannot_be_written_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    console.setup(as_json=as_json)
    message = "^standard output could not be written: No space left on device$"
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails as well
    monkeypatch.setattr(sys, "stdout", full)
    for shown in ("text", console.table(("name",), [("x",)])):
        with pytest.raises(RunFailed, match=message):
            console.result({}, shown)
    os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    full.close()


def test_scores_are_written_alike_everywhere() -> None:
    row = {"lr": 0.1, "train/loss": 0.98764, "val/accuracy": 0.98764}
    line = console.epoch_line(row)
    assert line.count(console.cell(0.98764)) == line.count("0.9876") == 2


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.123456, "0.1235"), (12, "12"), ("a", "a"), (1e-9, "1e-09")]
)
def test_cells(value: object, text: str) -> None:
    assert console.cell(value) == text


def test_log_goes_to_stderr_and_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    console.setup()
    logging.getLogger("moectl.x").info("hello [red]")
    assert "hello [red]" in capsys.readouterr().err
    console.setup(quiet=True)
    logging.getLogger("moectl.x").info("unheard")
    logging.getLogger("moectl.x").warning("heard")
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "warning: heard")


def test_other_processes_speak_only_to_warn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.setup()
    handler = console.log_to(tmp_path / "log.txt")
    logging.getLogger("moectl.x").info("unheard")
    logging.getLogger("moectl.x").warning("heard")
    handler.close()
    assert capsys.readouterr().err.strip() == "warning: heard"
    assert [line[24:] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "WARNING heard"
    ]


def test_error_prints_message_and_hint(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("[x] is wrong", "use y")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["error: [x] is wrong", "hint: use y"]


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.setup()
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.progress(100) as bar:
        for done in range(1, 101):
            clock[0] += 1
            bar.update(done, "epoch 1")
    assert capsys.readouterr().err.split("\n")[:-1] == [f"{n}/100 epoch 1" for n in (30, 60, 90)]
    console.setup(quiet=True)
    with console.progress(100) as bar:
        clock[0] += 100
        bar.update(1, "epoch 1")
    assert capsys.readouterr().err == ""


def test_epoch_line_leaves_out_single_experts() -> None:
    row = {"lr": 0.1, "train/loss": 1.23456, "val/accuracy": 0.5, "val/expert_0": 0.4, "x": None}
    line = console.epoch_line(row)
    assert "1.23" in line
    assert "accuracy 0.5" in line
    assert "expert" not in line


def test_only_the_first_process_prints_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.result({}, "text")
    monkeypatch.setenv("RANK", "0")
    console.result({}, "once")
    assert capsys.readouterr().out == "once\n"


@pytest.mark.parametrize(
    ("terminal", "quiet", "hidden"),
    [(True, False, False), (True, True, True), (False, False, True)],
)
def test_bars_of_libraries_are_for_terminals_that_may_be_talked_to(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool, hidden: bool
) -> None:
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for name in (*names, "CI"):
        monkeypatch.setenv(name, "0")  # put back after the test, whatever is set below
        monkeypatch.delenv(name)
    monkeypatch.setattr(console._talk, "_force_terminal", terminal)
    console.setup(quiet=quiet)
    assert [os.environ.get(name) for name in names] == ["1" if hidden else None] * 2


def test_a_wish_for_bars_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    console.setup(quiet=True)
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
