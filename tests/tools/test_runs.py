import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moectl import cli
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import artefact
from moectl.engine.settings import to_toml
from moectl.engine.tracking import MetricsFile
from moectl.tools import runs

SCORES = {"last": {"epoch": 2, "accuracy": 0.5, "ece": None}, "best": {"epoch": 1, "accuracy": 0.6}}


def make_run(name: str, **changes: Any) -> Path:
    """Write a run folder as training leaves it."""
    folder = Path("runs/balpoe") / name
    folder.mkdir(parents=True)
    epochs = changes.pop("epochs", 2)
    settings = BalpoeSettings(train=BalpoeSettings().train.model_copy(update={"epochs": epochs}))
    (folder / "settings.toml").write_text(to_toml(settings))
    metrics = MetricsFile(folder / "metrics.csv")
    for epoch in range(1, 3):
        place = {"update": 10 * epoch, "epoch": epoch, "elapsed_seconds": 1.0}
        metrics.write({**place, "lr": 0.1, "val/loss": 1 / epoch, "val/accuracy": 0.3 * epoch})
    record = {
        "run": f"balpoe/{name}",
        "room": "balpoe",
        "command": "train",
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "wall_seconds": 75.0,
        "argv": "moectl balpoe train",
        "parents": [],
        "weights": [],
        "scores": SCORES,
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def with_weights(folder: Path, payload: dict[str, Any] | None = None) -> Path:
    import torch

    weight = torch.arange(6.0).view(2, 3)
    state = {"a.weight": weight, "b.weight": weight, "a.transposed": weight.T}
    facts = {"model": "BalpoeNet", "arguments": {"experts": 3}, "epoch": 2}
    artefact.save(folder / "checkpoint-epoch2.pth", payload or {"state_dict": state}, facts)
    record = json.loads((folder / "run.json").read_text())
    record["weights"] = [{"file": "checkpoint-epoch2.pth", "epoch": 2, "best": False}]
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def run(*arguments: str) -> int:
    return cli._run(["runs", *arguments])


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_first_lines_are_those_of_the_table_of_contents() -> None:
    for name, line in cli.CONTENTS["runs"][1].items():
        function = getattr(runs, name, None) or getattr(runs, f"{name}_")
        assert (function.__doc__ or "").splitlines()[0] == line


def test_nothing_is_listed_where_nothing_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "list") == []


def test_list_has_the_newest_first_with_its_score(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("old")
    make_run("new", started="2026-02-01T00:00:00+00:00", scores={}, epochs=5)
    new, old = answer(capsys, "list")
    assert (new["name"], old["name"]) == ("new", "old")
    assert (new["epoch"], new["epochs"], new["update"], new["score"]) == (2, 5, 20, {})
    assert old["score"] == {"name": "last/accuracy", "value": 0.5}
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "2/5" in out
    assert "last/accuracy 0.5" in out
    assert "1 min 15 s" in out


def test_list_shows_the_newest_stage_of_a_run_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("staged", scores={"task": {"epoch": 7, "auroc": 0.9}})
    (folder / "metrics.csv").rename(folder / "metrics_concept.csv")
    place = {"update": 70, "epoch": 7, "elapsed_seconds": 9.0}
    MetricsFile(folder / "metrics_a_later_stage.csv").write({**place, "val/auroc": 0.9})
    (entry,) = answer(capsys, "list")
    assert (entry["epoch"], entry["epochs"], entry["update"]) == (7, None, 70)
    assert entry["score"] == {"name": "task/auroc", "value": 0.9}
    assert run("list") == 0
    assert "7/" not in capsys.readouterr().out


def test_list_of_one_status(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a")
    make_run("b", status="failed")
    assert [entry["name"] for entry in answer(capsys, "list", "--status", "failed")] == ["b"]
    assert answer(capsys, "list", "balpoe", "--status", "interrupted") == []
    assert run("list", "--status", "odd") == 2
    assert run("list", "nothing") == 2


def test_a_run_whose_process_is_gone_is_not_running(capsys: pytest.CaptureFixture[str]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    make_run("gone", status="running", host=host, pid=gone.pid)
    make_run("here", status="running", host=host, pid=os.getpid())
    make_run("elsewhere", status="running", host="another", pid=gone.pid)
    found = {entry["name"]: entry["status"] for entry in answer(capsys, "list")}
    assert found == {"gone": "killed", "here": "running", "elsewhere": "running"}


def test_a_damaged_run_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("a")
    (folder / "settings.toml").write_text("[")
    (folder / "metrics.csv").write_text("update,epoch\n1,")
    make_run("b")
    assert len(answer(capsys, "list")) == 2


def test_show_has_record_scores_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("a", reason="", parents=[{"path": "other.pth"}, "older"])
    (folder / "plots").mkdir()
    (folder / "plots" / "b.png").write_bytes(b"12345")
    document = answer(capsys, "show", "a")
    assert document["files"]["plots/b.png"] == 5
    assert document["scores"] == SCORES
    assert run("show", str(folder)) == 0
    out = capsys.readouterr().out
    for text in ("moectl balpoe train", "other.pth", "older", "last.accuracy", "plots/"):
        assert text in out


def test_an_unknown_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("digits")
    assert run("show", "digts") == 2
    assert "did you mean digits" in capsys.readouterr().err


def test_compare_has_what_differs_and_every_score(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a")
    make_run("b", epochs=5, scores={"last": {"epoch": 5, "accuracy": 0.7, "top5": 0.9}})
    document = answer(capsys, "compare", "a", "b")
    assert document["settings"] == {"train.epochs": [2, 5]}
    assert document["scores"]["last.accuracy"] == [0.5, 0.7]
    assert document["scores"]["last.top5"] == [None, 0.9]
    assert document["scores"]["best.accuracy"] == [0.6, None]
    assert run("compare", "a", "b") == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line.split() for line in lines if "last.top5" in line) == ["last.top5", "–", "0.9"]


def test_compare_needs_two_runs_and_a_place_for_the_plot() -> None:
    make_run("a")
    assert run("compare", "a") == 2
    assert run("compare", "a", "a", "--metric", "val/loss") == 2
    assert run("compare", "a", "a", "--plot", "no/such/folder.png") == 2
    assert run("compare", "a", "a", "--plot", "a.jpg") == 2


def test_compare_draws_a_metric(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a")
    make_run("b")
    assert run("compare", "a", "b", "--plot", "c.png", "--metric", "val/accuracy") == 0
    assert run("compare", "a", "b", "--plot", "d.png") == 0
    pictures = [Path(name).read_bytes() for name in ("c.png", "d.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]
    capsys.readouterr()
    assert run("compare", "a", "b", "--plot", "c.png", "--metric", "val/accurac") == 2
    err = capsys.readouterr().err
    assert "did you mean val/accuracy" in err
    assert "val/loss" in err


def test_compare_without_anything_in_common_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("a")
    (make_run("b") / "metrics.csv").unlink()
    assert run("compare", "a", "b", "--plot", "c.png") == 0, "they have scores in common"
    (make_run("c", scores={}) / "metrics.csv").unlink()
    assert run("compare", "a", "c", "--plot", "d.png") == 2
    assert "in common" in capsys.readouterr().err
    assert not Path("d.png").exists()


def test_compare_replaces_no_file_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a")
    make_run("b")
    picture = Path("c.png")
    picture.write_text("precious")
    assert run("compare", "a", "b", "--plot", "c.png") == 2
    assert "--plot c.png: exists already" in capsys.readouterr().err
    assert picture.read_text() == "precious"
    assert run("compare", "a", "b", "--plot", "c.png", "--force") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("compare", "a", "b", "--force") == 2, "nothing to replace"


def test_a_pipe_gets_each_run_on_one_line(root: Path) -> None:
    names = [f"a_rather_long_name_of_a_run_that_fills_half_a_line-2026110{day}" for day in (1, 2)]
    for name in names:
        make_run(name)
    done = subprocess.run(
        [sys.executable, "-m", "moectl", "runs", "list"],
        env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "80"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) == 4, "a head, a rule, and a line for each run"
    for line in lines[2:]:
        assert "finished" in line
        assert "1 min 15 s" in line
    assert {line.split()[0] for line in lines[2:]} == set(names)


def test_report_is_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("a")
    assert run("report", "a") == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == folder / "report.md"
    assert str(folder / "report.html") in err
    assert (folder / "report.md").read_text().startswith("# a\n")
    document = answer(capsys, "report", "a")
    assert Path(document["page"]).read_bytes().startswith(b"<!DOCTYPE html>")


def test_report_of_a_foreign_record_imports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("a", room="os.path")
    assert run("report", "a") == 2
    assert "no such system" in capsys.readouterr().err


def test_export_has_the_weights_and_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors import safe_open

    folder = with_weights(make_run("a"))
    assert run("export", "a@2") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == folder / "checkpoint-epoch2.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(tensors) == {"a.weight", "b.weight", "a.transposed"}
    assert torch.equal(tensors["a.transposed"], torch.arange(6.0).view(2, 3).T)
    assert (facts["model"], json.loads(facts["arguments"])) == ("BalpoeNet", {"experts": 3})
    assert facts["format"] == "pt"


def test_export_replaces_nothing_unless_forced() -> None:
    with_weights(make_run("a"))
    target = Path("x.safetensors")
    target.write_text("precious")
    assert run("export", "a", "--to", str(target)) == 2
    assert target.read_text() == "precious"
    assert run("export", "a", "--to", str(target), "--force") == 0
    assert len(target.read_bytes()) > 100
    assert list(Path().glob(".*.part")) == []


def test_export_follows_the_umask() -> None:
    with_weights(make_run("a"))
    before = os.umask(0o027)
    try:
        assert run("export", "a", "--to", "x.safetensors") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("x.safetensors").stat().st_mode) == 0o640


def test_export_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_weights(make_run("a"))
    assert run("export", "a@best") == 2
    assert run("export", "a", "--to", "x.pth") == 2
    assert run("export", "a", "--to", "no/folder/x.safetensors") == 2
    with_weights(folder, {"state_dict": {"epoch": 3}})
    assert run("export", "a") == 2
    assert "holds no weights" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model_state_dict", "model"])
def test_export_knows_other_names_of_the_weights(key: str) -> None:
    import torch
    from safetensors.torch import load_file

    with_weights(make_run("a"), {key: {"w": torch.ones(2)}, "optimizer": {}})
    assert run("export", "a", "--to", "x.safetensors") == 0
    assert list(load_file("x.safetensors")) == ["w"]


def test_export_takes_averaged_weights_first() -> None:
    import torch
    from safetensors.torch import load_file

    both = {"model_state_dict": {"w": torch.ones(2)}, "ema_state_dict": {"w": torch.zeros(2)}}
    with_weights(make_run("a"), both)
    assert run("export", "a", "--to", "x.safetensors") == 0
    assert load_file("x.safetensors")["w"].tolist() == [0, 0]


def test_listing_imports_no_heavy_library(root: Path) -> None:
    make_run("a")
    make_run("b")
    code = (
        "import sys; from moectl import cli\n"
        "for words in (['runs','list'], ['runs','show','a'], ['runs','compare','a','b'],\n"
        "              ['presets','list'], ['presets','validate']):\n"
        "    assert cli._run(words) == 0, words\n"
        "heavy = {'torch', 'accelerate', 'torchvision', 'matplotlib', 'transformers', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
