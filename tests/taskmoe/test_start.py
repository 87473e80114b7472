"""What a training of the mixture begins with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.launch import build_accelerator
from moectl.engine.run import Run, read_record, reopen
from moectl.engine.settings import resolve
from moectl.taskmoe.model import Specialist
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.stages import MERGED
from moectl.taskmoe.start import begin
from moectl.taskmoe.weights import read_mixture

NewRun = Callable[..., Run[TaskmoeSettings]]
Begun = tuple[artefact.Artefact, Run[TaskmoeSettings]]

TINY = {"data.task": "digits", "model.width": 4, "train.precision": "no"}
NEVER = "2999-01-01T00:00:00+00:00"
NUMBERED = ["m1.pth", "m2.pth", "m3.pth"]


def settings(**changes: Any) -> TaskmoeSettings:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(TaskmoeSettings, {**TINY, **named}, [], [])[0]


def copied(run: Path, name: str, **record: str) -> Path:
    """Copy a run, with other values in its record."""
    folder = shutil.copytree(run, run.with_name(name))
    (folder / "run.json").write_text(json.dumps({**read_record(folder), **record}))
    return folder


def submodels(folder: Path, names: list[str], classes: int = 3) -> Path:
    """Write bare weights, the first with seed 1, the second with seed 2 …; return the folder."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(names, 1):
        torch.manual_seed(seed)
        torch.save(Specialist(classes, 4).state_dict(), folder / name)
    return folder


def same(first: artefact.Artefact, second: artefact.Artefact) -> bool:
    ours, theirs = (each.payload["model_state_dict"] for each in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def begun(new_run: NewRun, merged: str = "", *others: Path | None) -> Begun:
    with new_run() as run:
        start = begin(run, merged, *(others or (None, None)))
    assert start is not None
    return start, run


def refusal(new_run: NewRun, merged: str = "", *others: Path | None, **changes: Any) -> UserError:
    with new_run(**changes) as run, pytest.raises(UserError) as caught:
        begin(run, merged, *(others or (None, None)))
    assert not (run.folder / MERGED).exists()
    return caught.value


def test_a_training_begins_with_the_newest_merge_and_keeps_a_copy(
    own_runs: Path, new_run: NewRun
) -> None:
    submodels(Path("submodels/digits"), NUMBERED)  # a finished merge goes before
    newest = copied(own_runs / "m", "m2", started=NEVER)
    start, run = begun(new_run)
    kept = read_mixture(run.folder / MERGED, run.settings)
    assert same(kept, start)
    assert kept.facts["specialists"] == start.facts["specialists"]
    parents = [{"path": str(newest / MERGED), "sha256": start.sha256}]
    assert read_record(run.folder)["parents"] == parents
    assert [entry["best"] for entry in run.record["weights"]] == [False]


def test_none_begins_with_random_weights(runs: Path, new_run: NewRun) -> None:
    with new_run() as run:
        assert begin(run, "none", None, None) is None
    assert not (run.folder / MERGED).exists()
    assert run.record["parents"] == []


@pytest.mark.parametrize(
    ("reference", "file"),
    [("m", f"m/{MERGED}"), ("t", "t/best_model.pth"), ("t@0", f"t/{MERGED}"), ("", "t/last.pth")],
)
def test_a_reference_or_a_file_says_which_weights_to_begin_with(
    runs: Path, new_run: NewRun, reference: str, file: str
) -> None:
    start, run = begun(new_run, reference, None, None if reference else runs / file)
    assert start.path == runs / file
    assert same(read_mixture(run.folder / MERGED, run.settings), start)


@pytest.mark.parametrize("default", [False, True])
def test_a_folder_of_specialists_is_merged_first(new_run: NewRun, default: bool) -> None:
    folder = submodels(Path("submodels/digits"), NUMBERED)
    start, run = begun(new_run, "", None if default else folder.parent, None)
    assert start.path == run.folder / MERGED
    files = [folder / name for name in NUMBERED]
    parents = [parent["path"] for parent in run.record["parents"]]
    assert parents == [str(file.resolve()) for file in files]
    listed = json.loads((run.folder / "merge_report.json").read_text())["specialists"]
    assert listed == [str(file) for file in files]
    assert [entry["best"] for entry in run.record["weights"]] == [False]
    assert "scores" not in run.record


@pytest.mark.parametrize(
    "chosen", [("m", Path("s"), None), ("m", None, Path("a")), ("", Path("s"), Path("a"))]
)
def test_only_one_beginning_can_be_given(new_run: NewRun, chosen: Any) -> None:
    assert refusal(new_run, *chosen).message.endswith(" exclude each other")


def test_a_file_that_is_not_there_is_an_error(runs: Path, new_run: NewRun) -> None:
    assert "gone.pth: cannot be read" in refusal(new_run, "", None, Path("gone.pth")).message


def test_without_a_merge_of_the_task_the_ways_to_begin_are_told(
    runs: Path, new_run: NewRun
) -> None:
    error = refusal(new_run, data__task="digits_overlap")
    assert error.message == "task digits_overlap: no finished merge"
    for way in ("moectl taskmoe merge", "--submodels-dir", "--merged none"):
        assert way in error.hint


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"model__num_experts": 2}, "num_experts = 3, the settings say 2", "num_experts=3"),
        ({"model__width": 8}, "model.width = 4, the settings say 8", "model.width=4"),
        ({"model__combine": "logits"}, "combine = features, the settings say", "=features"),
        ({"model__gating_feature_dim": 16}, "gating_feature_dim = 256", "feature_dim=256"),
        ({"model__shared_until": "conv1"}, "shared_until = conv2", "shared_until=conv2"),
        ({"data__task": "digits_overlap"}, "data.task = digits, the settings", "task=digits"),
        ({"data__label_map": "offset"}, "label_map = global, the settings say", "=global"),
        ({"merge__method": "align"}, "merge.method = average, the settings", "method=average"),
    ],
)
def test_weights_of_another_form_are_refused_with_the_setting_that_helps(
    runs: Path, new_run: NewRun, change: dict[str, Any], message: str, hint: str
) -> None:
    error = refusal(new_run, "m", **change)
    assert error.message.startswith(f"{runs}/m/{MERGED}: ")
    assert message in error.message
    assert error.hint.endswith(hint)


def test_a_resumed_run_begins_with_its_own_copy(own_runs: Path) -> None:
    shutil.rmtree(own_runs / "m")
    accelerator = build_accelerator(settings().train, cpu=True)
    with reopen(own_runs / "t", settings(), accelerator, auto=False) as run:
        parents = run.record["parents"]
        start = begin(run, "", None, None)
    assert start is not None
    assert start.path == own_runs / "t" / MERGED
    assert run.record["parents"] == parents


def resumed(folder: Path) -> Run[TaskmoeSettings]:
    return reopen(folder, settings(), build_accelerator(settings().train, cpu=True), auto=False)


def test_without_a_reference_the_merge_must_be_as_the_settings_say(
    own_runs: Path, new_run: NewRun
) -> None:
    error = refusal(new_run, merge__method="align", merge__bn="pooled")
    assert "has merge.method = average, the settings say align" in error.message
    copied(own_runs / "m", "newer", started=NEVER)
    sidecar = own_runs / "newer" / f"{MERGED}.json"
    facts = json.loads(sidecar.read_text())
    facts["merge"]["method"] = "align"
    sidecar.write_text(json.dumps(facts))
    shutil.rmtree(own_runs.parent.parent / "run")
    start, _ = begun(new_run)
    assert start.path == own_runs / "m" / MERGED


def test_a_run_that_began_with_random_weights_goes_on_so(runs: Path, new_run: NewRun) -> None:
    with new_run() as run:
        assert begin(run, "none", None, None) is None
    with resumed(run.folder) as again:
        assert begin(again, "", None, None) is None
    assert not (run.folder / MERGED).exists()
    with resumed(run.folder) as again, pytest.raises(UserError, match="began with --merged none"):
        begin(again, "m", None, None)


def test_the_copy_in_the_run_tells_of_itself_without_its_sidecar(
    runs: Path, new_run: NewRun, tmp_path: Path
) -> None:
    start, run = begun(new_run)
    shutil.copy(run.folder / MERGED, tmp_path / "alone.pth")
    facts = read_mixture(tmp_path / "alone.pth", settings()).facts
    assert facts["specialists"] == start.facts["specialists"]
    assert facts["mean"] == start.facts["mean"]


def test_the_report_of_the_merge_comes_along(runs: Path, new_run: NewRun) -> None:
    _, run = begun(new_run)
    report = (run.folder / "merge_report.json").read_text()
    assert report == (runs / "m" / "merge_report.json").read_text()
