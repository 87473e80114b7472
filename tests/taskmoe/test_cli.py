"""The commands of taskmoe, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl.taskmoe.cli import _DROPPED

Call = Callable[..., tuple[int, str, str]]

LEAVES = ("data", "specialist", "merge", "train", "eval", "analyze", "plot", "compare", "predict")
DIGITS = ("--task", "digits", "--width", "4", "--quiet")


def test_eval_prints_one_json_document(taskmoe: Call, runs: Path) -> None:
    code, out, _ = taskmoe("eval", "--run", f"{runs}/t", "--json", "--out", "here")
    assert code == 0
    assert json.loads(out)["n"] == 647
    assert Path("here/sample_predictions.png").is_file()


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_command_explains_itself(taskmoe: Call, leaf: str) -> None:
    code, out, err = taskmoe(leaf, "--help")
    assert (code, err) == (0, "")
    assert f"moectl taskmoe {leaf}" in out


def test_the_room_lists_its_commands(taskmoe: Call) -> None:
    code, out, _ = taskmoe("--help")
    assert code == 0
    words = out.split()
    assert all(leaf in words for leaf in LEAVES)


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf != "data"])
@pytest.mark.parametrize("option", [*_DROPPED, "--save_dir"])
def test_dropped_options_name_their_successors(taskmoe: Call, leaf: str, option: str) -> None:
    words = ("picture.png",) if leaf == "predict" else ()
    code, out, err = taskmoe(leaf, *words, option, "x")
    assert (code, out) == (2, "")
    assert f"is not an option of moectl taskmoe {leaf}" in err
    assert "--out DIR" in err


# Settings


def dry(taskmoe: Call, *words: str) -> dict[str, object]:
    code, out, err = taskmoe("train", "--dry-run", "--json", *words)
    assert code == 2, err  # the data of the task is not there
    return {key: entry["value"] for key, entry in json.loads(out)["settings"].items()}


def test_the_defaults_are_those_of_the_original(taskmoe: Call) -> None:
    values = dry(taskmoe)
    expected = {
        "data.task": "A",
        "train.epochs": 100,
        "train.batch_size": 32,
        "train.patience": 20,
        "train.seed": 100,
        "train.expert_analysis_interval": 10,
        "optim.name": "adam",
        "optim.lr": 1e-3,
        "optim.weight_decay": 1e-4,
        "schedule.name": "constant",
        "model.num_experts": 3,
        "loss.diversity_weight": 0.1,
        "loss.balance_weight": 0.5,
        "gate.initial_temperature": 2.0,
        "gate.final_temperature": 0.5,
    }
    assert {key: values[key] for key in expected} == expected


def test_every_flag_of_the_original_is_taken_in_both_spellings(
    taskmoe: Call, isolated: Path
) -> None:
    flags = {
        "--num-epochs": ("train.epochs", 7),
        "--lr": ("optim.lr", 0.25),
        "--weight-decay": ("optim.weight_decay", 0.5),
        "--patience": ("train.patience", 3),
        "--batch-size": ("train.batch_size", 64),
        "--seed": ("train.seed", 9),
        "--expert-analysis-interval": ("train.expert_analysis_interval", 0),
        "--diversity-weight": ("loss.diversity_weight", 0.125),
        "--balance-weight": ("loss.balance_weight", 0.75),
        "--initial-temperature": ("gate.initial_temperature", 3.0),
        "--final-temperature": ("gate.final_temperature", 0.375),
        "--task": ("data.task", "B"),
        "--num-experts": ("model.num_experts", 4),
    }
    for spell in (str, lambda flag: f"--{flag[2:].replace('-', '_')}"):
        words = [word for flag, (_, value) in flags.items() for word in (spell(flag), str(value))]
        values = dry(taskmoe, *words)
        assert {key: values[key] for key, _ in flags.values()} == dict(flags.values())
    assert list(isolated.iterdir()) == []


def test_the_name_of_a_run_may_be_called_that_of_the_model(
    taskmoe: Call, runs: Path, isolated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(isolated / "runs"))
    monkeypatch.setattr("moectl.taskmoe.start.begin", lambda *_: 1 / 0)
    assert taskmoe("train", *DIGITS, "--merged", "none", "--model-name", "mine")[0] == 1
    (folder,) = (isolated / "runs" / "taskmoe").iterdir()
    assert folder.name.startswith("mine-")


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --initial-temperature 0", "--initial-temperature = 0"),
        ("train --balance-weight -1", "--balance-weight = -1"),
        ("train --balance none", "--balance"),
        ("train --batch-size 1", "--batch-size = 1"),
        ("train --top-k 4", "model.top_k is 4, but model.num_experts is 3"),
        ("train --set train.accumulate=2", "loss.balance_weight = 0"),
        ("train --set loss.z=1", "loss.z"),
        ("train extra", "extra"),
        ("specialist --specialist -1", "--specialist = -1"),
        ("merge --method guess", "--method"),
        ("merge --set merge.methods=align", "did you mean merge.method?"),
        ("eval", "no finished train or merge run"),
        ("eval --run nowhere", "nowhere: no such run"),
        ("eval --checkpoint nowhere.pth", "nowhere.pth: cannot be read"),
        ("eval --temperature warm", "--temperature"),
        ("eval --model-dir nowhere", "nowhere: no .pth file in it"),
        ("analyze --run nowhere", "nowhere: no such run"),
        ("plot", "no finished train or merge run"),
        ("compare", "no finished train run"),
        ("predict", "Missing argument 'images'"),
        ("data build --task digits", "digits"),
        ("data check --task nowhere.toml", "no task and no file"),
        ("data tidy", "tidy"),
    ],
)
def test_bad_input_is_one_line_with_code_2(
    taskmoe: Call, isolated: Path, words: str, message: str
) -> None:
    code, out, err = taskmoe(*words.split())
    assert (code, out) == (2, "")
    assert message in err
    errors = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert list(isolated.iterdir()) == [], "nothing was created"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-experts 4", "but the task has 3 specialists\nhint: --num-experts 3"),
        ("--distill-weight 1", "the specialists of this mixture are not known"),
    ],
)
def test_a_training_that_cannot_be_is_refused(taskmoe: Call, words: str, message: str) -> None:
    code, out, err = taskmoe("train", *DIGITS, "--merged", "none", *words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_merge_of_another_form_is_refused_with_the_right_one(taskmoe: Call, runs: Path) -> None:
    words = ("--task", "digits", "--merged", f"{runs}/m", "--width", "8", "--out", "run")
    code, out, err = taskmoe("train", *words)
    assert (code, out) == (2, "")
    assert "has model.width = 4, the settings say 8" in err
    assert "hint: --set model.width=4" in err


@pytest.mark.parametrize("other", [("--task", "both"), ("--model-dir", "models")])
def test_one_file_cannot_be_two(taskmoe: Call, runs: Path, other: tuple[str, str]) -> None:
    words = ("eval", "--checkpoint", f"{runs}/t/best_model.pth", *other)
    code, out, err = taskmoe(*words)
    assert (code, out) == (2, "")
    assert "--checkpoint goes neither with --model-dir nor with --task both" in err


def test_both_tasks_need_the_runs_of_both(taskmoe: Call, runs: Path) -> None:
    code, out, err = taskmoe("eval", "--task", "both")
    assert (code, out) == (2, "")
    assert "task A: no finished run of the training" in err


@pytest.mark.parametrize(
    "words",
    [
        ("--select-on", "test"),
        ("--freeze-extractor-epochs", "1"),
        ("--expert-analysis-interval", "0"),
    ],
)
def test_what_a_specialist_does_not_have_is_no_option_of_it(
    taskmoe: Call, isolated: Path, words: tuple[str, str]
) -> None:
    code, _, err = taskmoe("specialist", *words, "--dry-run")
    assert code == 2
    assert f"No such option: {words[0]}" in err
    assert "No such option" not in taskmoe("train", *words, "--dry-run")[2]
