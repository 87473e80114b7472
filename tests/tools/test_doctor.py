import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl import cli
from moectl.tools import doctor
from moectl.tools.doctor import Finding


def findings(check: Any) -> dict[str, Finding]:
    return {finding.what: finding for finding in check()}


def test_the_first_line_is_that_of_the_table_of_contents() -> None:
    assert (doctor.doctor.__doc__ or "").splitlines()[0] == cli.CONTENTS["doctor"][0]


def test_a_sound_installation_is_fit_for_work(root: Path) -> None:
    command = [sys.executable, "-m", "moectl", "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {entry["what"]: entry["verdict"] for entry in json.loads(done.stdout)}
    assert "fail" not in found.values()
    for what in ("Python", "torch", "torchvision", "bf16", "runs folder", "free disk", "training"):
        assert found[what] == "ok"
    assert done.stderr == ""


def test_a_failure_is_told_and_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("ok", "first", "fine")
        raise OSError("no such thing")

    def poor() -> Iterator[Finding]:
        yield Finding("warn", "last", "so so", "mend [it]")

    monkeypatch.setattr(doctor, "CHECKS", (broken, poor))
    assert cli._run(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [entry["verdict"] for entry in json.loads(out)] == ["ok", "fail", "warn"]
    assert json.loads(out)[1]["found"] == "OSError: no such thing"
    assert "not fit for work: broken" in err


def test_a_warning_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Finding("warn", "a", "b")]),))
    assert cli._run(["doctor"]) == 0


def test_a_library_that_cannot_be_imported_fails_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    found = findings(doctor.libraries)
    assert [entry.verdict for entry in found.values()] == ["ok", "fail", "ok"]
    assert "nms does not exist" in found["torchvision"].found
    assert "more" not in found["torchvision"].found
    assert "pip install" in found["torchvision"].remedy


def test_threads_follow_the_user_and_warn_above_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    assert (
        findings(doctor.threads)["CPU threads"].found == "1 of 2 cores, as OMP_NUM_THREADS=1 says"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    try:
        assert findings(doctor.threads)["CPU threads"].verdict == "warn"
    finally:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        findings(doctor.threads)


def test_a_runs_folder_is_tried_out_and_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_RUNS", "some/runs")
    found = findings(doctor.runs_folder)
    assert found["runs folder"] == Finding("ok", "runs folder", str(Path("some/runs").absolute()))
    assert list(Path("some/runs").iterdir()) == []


def test_a_runs_folder_that_is_a_file_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("taken").write_text("")
    monkeypatch.setenv("MOECTL_RUNS", "taken")
    [found] = doctor.runs_folder()
    assert found.verdict == "fail"
    assert "MOECTL_RUNS" in found.remedy


def test_a_full_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert findings(doctor.runs_folder)["free disk"].verdict == "warn"


def test_variables_that_set_nothing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_BALPOE__TRAIN__EPOCHS", "3")
    monkeypatch.setenv("MOECTL_BALPOE__TRAIN__EPOCH", "3")
    known, unknown = doctor.variables()
    assert known.found == "MOECTL_BALPOE__TRAIN__EPOCHS=3"
    assert unknown.verdict == "warn"
    assert unknown.found == "MOECTL_BALPOE__TRAIN__EPOCH sets nothing"
    assert "presets show balpoe " in unknown.remedy
    monkeypatch.setenv("MOECTL_NOTHING__EPOCH", "3")
    assert "presets show ROOM " in list(doctor.variables())[-1].remedy


def test_a_variable_with_a_wrong_value_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_BALPOE__TRAIN__EPOCHS", "none")
    found = findings(doctor.data)["balpoe settings"]
    assert found.verdict == "fail"
    assert "MOECTL_BALPOE__TRAIN__EPOCHS" in found.found


def test_the_data_folder_is_the_one_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(doctor.data)["balpoe data"].verdict == "warn"
    Path("mine/cifar-100-python").mkdir(parents=True)
    monkeypatch.setenv("MOECTL_BALPOE__DATA__ROOT", "mine")
    found = findings(doctor.data)["balpoe data"]
    assert (found.verdict, found.found) == ("ok", f"{Path('mine').absolute()}: cifar-100-python")


def test_a_missing_extra_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"odd": "no_such_module", "even": "json"})
    found = findings(doctor.surroundings)
    assert found["extra odd"].remedy == "pip install 'moectl[odd]'"
    assert found["extra even"].found == "installed"


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    assert findings(doctor.surroundings)["network"].found == "not used (MOECTL_OFFLINE)"


def test_git_without_a_commit_is_no_error() -> None:
    assert doctor._git().found == "no commit here"


def test_a_tiny_training_learns_saves_and_resumes(tmp_path: Path) -> None:
    before, after = doctor.rehearse(tmp_path / "run")
    assert after < 0.7 * before
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["update-00000008", "update-00000016"]


def test_a_training_that_does_not_learn_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "rehearse", lambda _: (0.5, 0.5))
    [found] = doctor.training()
    assert found.verdict == "fail"
