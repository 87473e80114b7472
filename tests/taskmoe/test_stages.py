"""What one stage finds of the one before: specialists for a merge, weights for a training."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.run import Run, read_record
from moectl.engine.settings import resolve
from moectl.taskmoe import stages
from moectl.taskmoe.align import renormalise
from moectl.taskmoe.data import Data, load
from moectl.taskmoe.files import write_data_file
from moectl.taskmoe.model import Specialist
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.stages import MERGED, find_specialists, merged, merged_from
from moectl.taskmoe.weights import Member, change_of, read_mixture, rebuild

NewRun = Callable[..., Run[TaskmoeSettings]]
Begun = tuple[artefact.Artefact, Run[TaskmoeSettings]]

CPU = torch.device("cpu")
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


def names(found: list[Any]) -> list[str]:
    return [member.path.name for member in found]


# Specialists by reference, or the newest runs


def test_references_to_runs_mean_their_best_weights_unless_they_say_which(runs: Path) -> None:
    found = find_specialists(settings(), [f"{runs}/s1", "s2", "taskmoe/s3@last"])
    files = ["s1/best_model.pth", "s2/best_model.pth", "s3/last.pth"]
    assert [member.path for member in found] == [runs / file for file in files]
    assert [member.class_ids for member in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_each_specialist_must_be_given_once_and_in_one_way(runs: Path) -> None:
    with pytest.raises(UserError, match="2 specialists are given, the task has 3"):
        find_specialists(settings(), ["s1", "s2"])
    with pytest.raises(UserError, match="--specialists and --submodels-dir exclude each other"):
        find_specialists(settings(), ["s1", "s2", "s3"], Path("submodels"))


def test_another_width_is_refused_with_the_option_that_helps(runs: Path) -> None:
    message = r"s1/best_model\.pth: is 4 channels wide, model\.width is 8"
    with pytest.raises(UserError, match=message) as caught:
        find_specialists(settings(model__width=8), [])
    assert caught.value.hint == "--width 4"


def test_without_references_the_newest_finished_runs_are_taken(own_runs: Path) -> None:
    copied(own_runs / "s2", "s2_new", started=NEVER)
    copied(own_runs / "s2", "s2_old", started="1999-01-01T00:00:00+00:00")
    copied(own_runs / "s1", "s1_failed", started=NEVER, status="failed")
    found = find_specialists(settings(), [])
    assert [member.path.parent.name for member in found] == ["s1", "s2_new", "s3"]


def test_specialists_without_a_run_are_named_with_the_command(own_runs: Path) -> None:
    shutil.rmtree(own_runs / "s2")
    with pytest.raises(UserError, match=r"no finished run of specialist 2$") as caught:
        find_specialists(settings(), [])
    assert caught.value.hint.startswith("moectl taskmoe specialist --task digits --specialist 2")
    with pytest.raises(UserError, match=r"task digits_overlap: no finished run .* 1, 2, 3$"):
        find_specialists(settings(data__task="digits_overlap"), [])


def test_the_dense_network_is_number_0(own_runs: Path) -> None:
    assert stages.newest_specialist("digits", 0) is None
    facts = own_runs / "s3" / "best_model.pth.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "number": 0}))
    assert stages.newest_specialist("digits", 0) == own_runs / "s3" / "best_model.pth"
    assert stages.newest_specialist("digits", 3) is None


# Specialists in a folder


def test_files_are_taken_in_the_order_of_the_first_number_in_their_names(tmp_path: Path) -> None:
    submodels(tmp_path / "digits", ["b_1.pth", "c2_9.pth", "a_3_epoch1.pth"])
    found = find_specialists(settings(), [], tmp_path)
    assert names(found) == ["b_1.pth", "c2_9.pth", "a_3_epoch1.pth"]
    for seed, member in enumerate(found, 1):
        torch.manual_seed(seed)
        assert torch.equal(member.model.conv1.conv.weight, Specialist(3, 4).conv1.conv.weight)


@pytest.mark.parametrize(
    "files",
    [["1", "2"], ["1", "2", "3", "4"], ["1", "2", "2_b"], ["0", "1", "2"], ["2", "3", "trees"], []],
)
def test_files_must_be_numbered_from_1_on(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / "digits").mkdir(exist_ok=True)
        (tmp_path / "digits" / f"{name}.pth").touch()
    listed = ", ".join(f"{name}.pth" for name in files) or "none"
    message = rf"digits: expected 3 files of specialists 1 to 3, found {listed}$"
    with pytest.raises(UserError, match=message) as caught:
        find_specialists(settings(), [], tmp_path)
    assert "the first number in a name" in caught.value.hint


def own_task(folder: Path, checkpoints: str = "") -> TaskmoeSettings:
    """Write a task of two specialists, with two classes each."""
    text = 'task = "own"\nimage_size = 16\n'
    for name, ids in {"a": [0, 1], "b": [2, 3]}.items():
        classes = ", ".join(f'{{id = {id}, name = "class {id}"}}' for id in ids)
        text += f'[[specialist]]\nname = "{name}"\ntrain = "{name}.pt"\ntest = "{name}.pt"\n'
        text += f'checkpoint = "{checkpoints.format(name)}"\nclasses = [{classes}]\n'
        draws = torch.Generator().manual_seed(ids[0])
        images = torch.randint(0, 256, (8, 3, 16, 16), generator=draws).byte()
        write_data_file(folder / f"{name}.pt", images, ids * 4)
    (folder / "manifest.toml").write_text(text)
    return settings(data__task=f"{folder}/manifest.toml")


def test_files_of_a_manifest_lie_in_a_folder_named_as_its_own(tmp_path: Path) -> None:
    wanted = own_task(tmp_path / "Birds", checkpoints="gone_{}.pth")
    submodels(tmp_path / "weights" / "Birds", ["m1.pth", "m2.pth"], classes=2)
    found = find_specialists(wanted, [], tmp_path / "weights")
    assert names(found) == ["m1.pth", "m2.pth"]
    assert [member.class_ids for member in found] == [[0, 1], [2, 3]]


def test_files_that_a_manifest_names_are_taken_by_themselves(tmp_path: Path) -> None:
    wanted = own_task(tmp_path / "Birds", checkpoints="weights/{}.pth")
    folder = submodels(tmp_path / "Birds" / "weights", ["a.pth", "b.pth"], classes=2)
    found = find_specialists(wanted, [])
    assert [member.path for member in found] == [folder / "a.pth", folder / "b.pth"]


# The merge


def test_the_report_has_step_zero_beside_random_weights(runs: Path) -> None:
    document = json.loads((runs / "m" / "merge_report.json").read_text())
    measured = {name: document[name] for name in ("step_zero", "random_control")}
    for found in measured.values():
        assert (found["images"], len(found["own_accuracy"])) == (98, 3)
        assert found["union_chance"] == pytest.approx(1 / 9)
    own = {name: sum(found["own_accuracy"]) for name, found in measured.items()}
    assert own["step_zero"] > own["random_control"]
    assert read_record(runs / "m")["scores"] == measured


def test_the_report_says_what_the_merge_did(runs: Path) -> None:
    document = json.loads((runs / "m" / "merge_report.json").read_text())
    parents = read_record(runs / "m")["parents"]
    assert [parent["path"] for parent in parents] == document["specialists"]
    assert document["specialists"] == [f"{runs}/s{number}/best_model.pth" for number in (1, 2, 3)]
    assert document["owners"] == [[1, 0, 0]] * 3 + [[0, 1, 0]] * 3 + [[0, 0, 1]] * 3
    assert (document["method"], document["bn"]) == ("average", "recalibrate")
    assert document["correlations"] == []
    weights = read_mixture(runs / "m" / MERGED, settings())
    assert weights.facts["specialists"] == parents
    total = sum(part.numel() for part in rebuild(weights).parameters())
    assert document["parameters"]["total"] == total


def test_an_aligned_merge_says_how_well_the_channels_match(runs: Path, new_run: NewRun) -> None:
    with new_run(merge__method="align") as run:
        document = stages.merge(run.settings, run, [])
    assert [len(gains) for gains in document["correlations"]] == [5, 5]
    for gains in document["correlations"]:
        assert all(gain["after"] >= gain["before"] for gain in gains.values())


def merging(runs: Path, **changes: Any) -> tuple[TaskmoeSettings, Data, list[Member]]:
    wanted = settings(**changes)
    return wanted, load(wanted.data), find_specialists(wanted, [])


def test_with_one_gate_open_the_mixture_is_the_specialist_for_union_images(runs: Path) -> None:
    wanted, data, members = merging(runs, merge__method="first", merge__bn="average")
    model, _ = merged(wanted, data, members, CPU)
    change = change_of((data.mean, data.std), members[0].statistics)
    seeing = Specialist(3, 4).eval()
    seeing.load_state_dict(renormalise(members[0].model.state_dict(), *change))
    images, _ = next(iter(data.test.ordered(32, CPU)))
    with torch.no_grad():
        found = model.eval()(images, gates=torch.tensor([1.0, 0.0, 0.0])).logits[:, :3]
        torch.testing.assert_close(found, seeing(images), rtol=0, atol=1e-5)


def test_a_merge_is_the_same_every_time(runs: Path) -> None:
    model, report = merged(*merging(runs), CPU)
    before = read_mixture(runs / "m" / MERGED, settings()).payload["model_state_dict"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    saved = json.loads((runs / "m" / "merge_report.json").read_text())
    assert asdict(report)["correlations"] == saved["correlations"]


def test_specialists_that_do_not_fit_each_other_are_refused(runs: Path) -> None:
    wanted, data, members = merging(runs)
    with pytest.raises(UserError, match="the specialists cannot be merged: specialist 1"):
        merged(wanted, data, members[::-1], CPU)


def test_the_number_of_experts_must_be_that_of_the_specialists(runs: Path, new_run: NewRun) -> None:
    message = r"model\.num_experts is 2, but the task has 3"
    with new_run(model__num_experts=2) as run, pytest.raises(UserError, match=message):
        stages.merge(run.settings, run, [])
    assert not (run.folder / MERGED).exists()


# Teachers


def test_teachers_are_the_specialists_of_the_merge_if_they_are_distilled(runs: Path) -> None:
    start = read_mixture(runs / "m" / MERGED, settings())
    assert stages.teachers(settings(), start) == []
    found = stages.teachers(settings(loss__distill_weight=0.5), start)
    assert [member.path.parent.name for member in found] == ["s1", "s2", "s3"]


@pytest.mark.parametrize("file", [None, "t/best_model.pth"])
def test_unknown_specialists_are_an_error(runs: Path, file: str | None) -> None:
    start = read_mixture(runs / file, settings()) if file else None
    with pytest.raises(UserError, match="the specialists of this mixture are not known"):
        merged_from(settings(), start)


def test_a_specialist_that_changed_since_the_merge_is_refused(new_run: NewRun) -> None:
    folder = submodels(Path("submodels/digits"), NUMBERED)
    with new_run() as run:
        stages.merge(run.settings, run, [], folder.parent)
    start = read_mixture(run.folder / MERGED, settings())
    assert names(merged_from(settings(), start)) == NUMBERED
    torch.save(Specialist(3, 4).state_dict(), folder / "m2.pth")
    with pytest.raises(UserError, match=r"m2\.pth: is not the file that was merged any more"):
        merged_from(settings(), start)
    (folder / "m1.pth").unlink()
    with pytest.raises(UserError, match=r"m1\.pth: cannot be read"):
        merged_from(settings(), start)
