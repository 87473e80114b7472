"""The commands of csr, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., tuple[int, str, str]]

FLAGS: dict[str, tuple[str, Any]] = {
    "--train-csv": ("data.train_csv", "a.csv"),
    "--test-csv": ("data.test_csv", "b.csv"),
    "--train-dir": ("data.train_dir", "a"),
    "--test-dir": ("data.test_dir", "b"),
    "--train-bbox-csv": ("data.train_bbox_csv", "c.csv"),
    "--test-bbox-csv": ("data.test_bbox_csv", "d.csv"),
    "--train-resize-factor-csv": ("data.train_resize_factor_csv", "e.csv"),
    "--test-resize-factor-csv": ("data.test_resize_factor_csv", "f.csv"),
    "--backbone-type": ("model.backbone_type", "resnet50"),
    "--model-name": ("model.model_name", "some/model"),
    "--num-prototypes": ("model.num_prototypes", 3),
    "--epochs-stage1": ("train.epochs_stage1", 7),
    "--epochs-stage2": ("train.epochs_stage2", 8),
    "--epochs-stage3": ("train.epochs_stage3", 9),
    "--batch-size": ("train.batch_size", 32),
    "--lr": ("optim.lr", 0.25),
    "--seed": ("train.seed", 9),
}


@pytest.mark.parametrize("stage", ["2", "task"])
@pytest.mark.parametrize("words", [(), ("--from", "nowhere.pth"), ("--from", "nobody")])
def test_a_later_stage_asks_for_the_earlier_before_it_reads_data(
    csr: Call, isolated: Path, stage: str, words: tuple[str, ...]
) -> None:
    code, out, err = csr("train", "--stage", stage, *words, "--train-csv", "missing.csv")
    assert (code, out) == (2, "")
    assert "begins with weights of the stage before" in err or (words[1:] and words[1] in err)
    assert "missing.csv" not in err
    assert list(isolated.iterdir()) == []


def dry(csr: Call, *words: str) -> dict[str, object]:
    code, out, err = csr("train", "--dry-run", "--json", *words)
    assert code == 2, err  # the label tables are not there
    return {key: entry["value"] for key, entry in json.loads(out)["settings"].items()}


@pytest.mark.parametrize("spelling", ["dashes", "underscores"])
def test_every_flag_of_the_original_is_taken_in_both_spellings(
    csr: Call, isolated: Path, spelling: str
) -> None:
    def spell(flag: str) -> str:
        return flag if spelling == "dashes" else f"--{flag[2:].replace('-', '_')}"

    words = [word for flag, (_, value) in FLAGS.items() for word in (spell(flag), str(value))]
    values = dry(csr, *words)
    assert {key: values[key] for key, _ in FLAGS.values()} == dict(FLAGS.values())
    assert list(isolated.iterdir()) == []


@pytest.mark.parametrize("flag", ["--exp_name", "--exp-name", "--name"])
def test_the_name_of_a_run_may_be_called_that_of_the_experiment(
    csr: Call, isolated: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(isolated / "runs"))
    monkeypatch.setattr("moectl.csr.train.train", lambda *_: None)
    code, _, err = csr("train", flag, "mine", "--cpu")
    assert code == 0, err
    (folder,) = (isolated / "runs" / "csr").iterdir()
    assert folder.name.startswith("mine-")


def test_train_explains_itself(csr: Call) -> None:
    code, out, err = csr("train", "--help")
    assert (code, err) == (0, "")
    assert "moectl csr train" in out
    assert "--stage" in out
    assert "--epochs-stage1" in out
    assert "--epochs " not in out, "every stage has its own"


def test_train_prints_one_json_document(csr: Call, tiny_words: tuple[str, ...]) -> None:
    code, out, err = csr("train", *tiny_words, "--stage", "1", "--json", "--out", "here")
    assert code == 0, err
    document = json.loads(out)
    assert (document["room"], document["command"], document["folder"]) == ("csr", "train", "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --stage 4", "--stage"),
        ("train --stage concepts", "--stage"),
        ("train --backbone-type alexnet", "--backbone-type"),
        ("train --batch-size 1", "--batch-size = 1"),
        ("train --task-mode multiclass", "task.loss is bce, but data.task_mode is multiclass"),
        ("train --train_bbox_csv a.csv", "belong together"),
        ("train --set prototype.gama=1", "did you mean prototype.gamma?"),
        ("train --epochs 3", "--epochs"),
        ("train extra", "extra"),
    ],
)
def test_bad_input_is_one_line_with_code_2(
    csr: Call, isolated: Path, words: str, message: str
) -> None:
    code, out, err = csr(*words.split())
    assert (code, out) == (2, "")
    assert message in err
    errors = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert list(isolated.iterdir()) == [], "nothing was created"
