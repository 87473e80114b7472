"""Stages hand over by files, and nothing is trained on what does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.csr.stages import STAGES, Training, predecessor
from moectl.csr.train import train
from moectl.engine.errors import UserError

NewRun = Callable[..., Any]
Command = Callable[..., tuple[int, str, str]]


def weights(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def test_stages_one_by_one_end_as_in_one_command(
    finished_run: Path, csr: Command, tiny_words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "steps"
    assert csr("train", *tiny_words, "--stage", "1", "--out", str(folder))[0] == 0
    assert [path.name for path in folder.glob("*.pth")] == ["best_model_stage1.pth"]
    for stage in ("prototype", "3"):
        assert csr("train", "--stage", stage, "--resume", str(folder), "--cpu")[0] == 0
    for path in finished_run.glob("*.pth"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_run_may_begin_with_another_ones_weights(
    finished_run: Path, csr: Command, tiny_words: tuple[str, ...], tmp_path: Path
) -> None:
    folder, words = tmp_path / "second", ("--from", str(finished_run))
    assert csr("train", *tiny_words, *words, "--stage", "2", "--out", str(folder))[0] == 0
    name = "model_stage2_epoch2.pth"
    assert (folder / name).read_bytes() == (finished_run / name).read_bytes()
    record = json.loads((folder / "run.json").read_text())
    (parent,) = record["parents"]
    assert Path(parent["path"]) == (finished_run / "best_model_stage1.pth").resolve()
    third = tmp_path / "third"
    words = ("--from", str(folder / name), "--stage", "3", "--out", str(third))
    assert csr("train", *tiny_words, *words)[0] == 0
    for name in ("best_model_stage3.pth", "final_model.pth"):
        assert (third / name).read_bytes() == (finished_run / name).read_bytes()


def test_prototypes_may_be_others_than_those_of_the_first_stage(
    finished_run: Path, new_run: NewRun
) -> None:
    start = str(finished_run)
    with new_run(model__num_prototypes=2, model__projector="ibn") as run:
        train(run.settings, run, ["prototype"], start)
    assert len(weights(run.folder / "model_stage2_epoch2.pth")["prototypes"]) == 4 * 2
    with new_run(model__num_prototypes=2) as run, pytest.raises(UserError, match="num_prototypes"):
        train(run.settings, run, ["task"], start)
    with new_run(model__concept_pool="avg") as run, pytest.raises(UserError) as refused:
        train(run.settings, run, ["prototype"], start)
    assert "concept_pool is max, this run has avg" in refused.value.message


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_later_stage_needs_an_earlier_one(new_run: NewRun, stage: Any) -> None:
    with new_run() as run, pytest.raises(UserError, match="no weights of the stage before"):
        train(run.settings, run, [stage])


def test_weights_of_too_early_a_stage_are_refused(finished_run: Path, new_run: NewRun) -> None:
    start = str(finished_run / "best_model_stage1.pth")
    with new_run() as run, pytest.raises(UserError, match="of stage concept, too early"):
        train(run.settings, run, ["task"], start)


def test_what_trained_elsewhere_does_not_validate_here(finished_run: Path, new_run: NewRun) -> None:
    with new_run(train__seed=1) as run, pytest.raises(UserError) as refused:
        train(run.settings, run, ["prototype"], str(finished_run))
    assert "images that validate here" in refused.value.message


@pytest.mark.parametrize(("kind", "stage"), [("concepts", "concept"), ("targets", "task")])
def test_labels_that_choose_no_epoch_are_refused_before_anything(
    new_run: NewRun, kind: str, stage: Any
) -> None:
    with new_run() as run:
        training = Training(run.settings, run)
        training.check_labels(stage)
        getattr(training.data.val, kind)[:] = 1
        with pytest.raises(UserError, match=f"of none of the {kind}"):
            training.check_labels(stage)


def test_a_resumed_run_goes_on_with_its_own_stages(
    finished_run: Path, csr: Command, tiny_words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "third"
    words = ("--from", str(finished_run), "--stage", "3", "--out", str(folder))
    assert csr("train", *tiny_words, *words)[0] == 0
    assert csr("train", "--resume", str(folder), "--cpu")[0] == 0
    assert not (folder / "best_model_stage1.pth").exists()
    assert json.loads((folder / "run.json").read_text())["stages"] == ["task"]


def test_curation_needs_prototypes_that_are_there(new_run: NewRun, tmp_path: Path) -> None:
    with (
        new_run(task__curation=tmp_path / "x.toml") as run,
        pytest.raises(UserError, match="goes with --stage task"),
    ):
        train(run.settings, run, STAGES)


def test_the_norm_is_that_of_what_has_a_say(finished_run: Path, new_run: NewRun, tmp_path) -> None:
    file = tmp_path / "curation.toml"
    entry = '[[prototypes]]\nconcept = "ring"\nindex = {}\nkeep = false\n'
    file.write_text("".join(entry.format(index) for index in range(4)))
    with new_run(task__curation=file, model__task_input="max") as run:
        train(run.settings, run, ["task"], str(finished_run))
        training = Training(run.settings, run)
        state = weights(run.folder / "final_model.pth")
        training.model.load_state_dict(state)
        scores = training.outputs(training.data.train, "similarity_scores").similarity_scores
    assert torch.allclose(state["task_mean"][1], scores[:, 1, 4].mean(), atol=1e-5)
    inputs = training.model.task_inputs(scores.to(run.device))
    assert torch.allclose(inputs.mean(0), torch.zeros(4), atol=1e-4)


def test_the_first_stage_begins_with_no_run(csr: Command, tiny_words: tuple[str, ...]) -> None:
    code, _, err = csr("train", *tiny_words, "--from", "latest")
    assert code == 2
    assert "--from goes with" in err


def test_the_original_ones_folder(csr: Command, tiny_words: tuple[str, ...], tmp_path: Path):
    words = ("--output_dir", str(tmp_path / "checkpoints"), "--exp_name", "csr_exp")
    code, out, _ = csr("train", *tiny_words, *words, "--stage", "1", "--epochs_stage1", "0")
    assert code == 0
    assert out.strip() == str(tmp_path / "checkpoints" / "csr_exp")
    assert (tmp_path / "checkpoints" / "csr_exp" / "best_model_stage1.pth").exists()
    code, _, err = csr("train", *tiny_words, *words[:2], "--out", str(tmp_path / "x"))
    assert code == 2
    assert "--output-dir goes neither" in err


def test_no_epochs_hand_on_what_is_there(new_run: NewRun) -> None:
    epochs = {f"train__epochs_stage{number}": 0 for number in (1, 2, 3)}
    with new_run(**epochs) as run:
        before = {
            name: value.clone()
            for name, value in Training(run.settings, run).model.state_dict().items()
        }
        train(run.settings, run, STAGES)
    after = weights(run.folder / "final_model.pth")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"task_mean", "task_std"}
    names = {path.name for path in run.folder.glob("*.pth")}
    assert "model_stage2_epoch0.pth" in names
    assert len(names) == 4


def test_the_last_prototypes_are_those_of_the_highest_epoch(tmp_path: Path) -> None:
    assert predecessor(tmp_path, "task") is None
    for epoch in (5, 10, 9):
        (tmp_path / f"model_stage2_epoch{epoch}.pth").touch()
    (tmp_path / "model_stage2_epochs.pth").touch()
    found = predecessor(tmp_path, "task")
    assert found is not None
    assert found.name == "model_stage2_epoch10.pth"
    assert predecessor(tmp_path, "prototype") is None


def test_the_best_prototypes_may_be_picked(new_run: NewRun, monkeypatch) -> None:
    from moectl.csr import train as module

    own, epochs = module._prototype_scores, []

    def worse(training: Training) -> dict[str, float | None]:
        epochs.append(weights_of(training))
        return {**own(training), "val/assignment_accuracy": 1 / len(epochs)}

    def weights_of(training: Training) -> torch.Tensor:
        return training.model.prototypes.detach().clone()

    monkeypatch.setattr(module, "_prototype_scores", worse)
    for start, place in (("best", 0), ("last", -1)):
        epochs.clear()
        with new_run(task__start=start) as run:
            train(run.settings, run, STAGES)
        found = weights(run.folder / "final_model.pth")["prototypes"]
        assert torch.equal(found, epochs[place])
        assert not torch.equal(epochs[0], epochs[-1])


def test_other_images_are_noticed(new_run: NewRun) -> None:
    with new_run() as run:
        Training(run.settings, run)
        split = json.loads((run.folder / "splits.json").read_text())
        assert len(split["train"]) == 108
        assert not set(split["train"]) & set(split["val"])
        split["val"][0] = "another"
        (run.folder / "splits.json").write_text(json.dumps(split))
        with pytest.raises(UserError, match=r"splits\.json: the label table has other images"):
            Training(run.settings, run)


def test_curation_takes_away_what_prototypes_say(
    finished_run: Path, new_run: NewRun, tmp_path: Path
) -> None:
    file = tmp_path / "curation.toml"
    file.write_text('[[prototypes]]\nconcept = "ring"\nindex = 2\nkeep = false\n')
    with new_run(task__curation=file) as run:
        train(run.settings, run, ["task"], str(finished_run))
    found = weights(run.folder / "best_model_stage3.pth")
    kept = torch.ones(4, 5, dtype=torch.bool)
    kept[1, 2] = False
    assert torch.equal(found["kept"], kept)
    before = weights(finished_run / "best_model_stage3.pth")["task_head.weight"]
    assert not torch.equal(found["task_head.weight"], before)
    file.unlink()
    with new_run(task__curation=file) as other, pytest.raises(UserError, match="cannot be read"):
        train(other.settings, other, ["task"], str(finished_run))
    file.write_text("changed")  # the run has kept what it began with
    train(run.settings, run, ["task"])


def test_what_a_later_sitting_knows_of_the_verdict(finished_run: Path) -> None:
    sidecar = json.loads((finished_run / "best_model_stage3.pth.json").read_text())
    assert len(sidecar["thresholds"]["concepts"]) == 4
    assert len(sidecar["thresholds"]["targets"]) == 3
    table = torch.tensor(sidecar["score_statistics"]["absent_median"])
    assert table.shape == (4, 5)
    assert bool((table.abs() <= 1).all())


def test_the_verdict_may_be_trained_longer(
    finished_run: Path, csr: Command, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished_run, tmp_path / "longer"))
    words = ("train", "--resume", str(folder), "--cpu", "--quiet")
    assert csr(*words, "--epochs-stage3", "5")[0] == 0
    assert json.loads((folder / "final_model.pth.json").read_text())["epoch"] == 5
    for changed in (("--epochs-stage3", "4"), ("--epochs-stage1", "3")):
        code, _, err = csr(*words, *changed)
        assert code == 2
        assert "cannot resume with other settings" in err


def test_values_of_the_stages_stand_side_by_side(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moectl.engine.tracking import Trackers

    names: set[str] = set()
    monkeypatch.setattr(Trackers, "log", lambda _, row, *__: names.update(row))
    with new_run() as run:
        train(run.settings, run, STAGES)
    assert {f"{stage}/train/loss" for stage in STAGES} <= names
    assert "train/loss" not in names
