"""Standard output holds the result alone, and a reader that fails it is told in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., subprocess.Popen[str]]
Finish = Callable[..., tuple[int, str, str]]


def test_json_into_a_pipe_is_one_document(start: Start, finish: Finish) -> None:
    code, out, err = finish(start("presets", "list", "--json"))
    assert (code, err) == (0, "")
    assert any(entry["name"] == "digits_ir20" for entry in json.loads(out))


def test_stderr_may_be_closed(start: Start, finish: Finish) -> None:
    shell = f"{sys.executable} -m moectl balpoe train --set optim.lrr=1 2>&-"
    assert finish(start("-c", shell, program=("sh",)))[0] == 2
    shell = f"{sys.executable} -m moectl presets list --json 2>&-"
    code, out, _ = finish(start("-c", shell, program=("sh",)))
    assert code == 0
    assert json.loads(out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["presets list", "presets list --json", "--help"])
def test_a_full_device_is_an_error_without_a_traceback(
    start: Start, finish: Finish, words: str
) -> None:
    with Path("/dev/full").open("w") as full:
        code, _, err = finish(start(*words.split(), stdout=full))
    assert code == 1
    assert "No space left" in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_a_reader_that_leaves_is_no_drama(start: Start, finish: Finish) -> None:
    shell = f"({sys.executable} -m moectl presets show balpoe; echo code $? >&2) | head -n 1"
    _, out, err = finish(start("-c", shell, program=("sh",)))
    assert len(out.splitlines()) == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_closed_stdout_is_an_error_without_a_traceback(start: Start, finish: Finish) -> None:
    shell = f"{sys.executable} -m moectl presets list >&-"
    code, _, err = finish(start("-c", shell, program=("sh",)))
    assert code in (0, 1)
    assert "Traceback" not in err


def test_the_folder_can_be_run_by_path(start: Start, finish: Finish, root: Path) -> None:
    program = (sys.executable, str(root / "moectl"))
    code, out, _ = finish(start("presets", "list", "--json", program=program))
    assert code == 0
    assert json.loads(out)
