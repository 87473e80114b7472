"""The commands of controller, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.controller import profile as profile_module
from moectl.controller import train as train_module

Call = Callable[..., tuple[int, str, str]]

LEAVES = ("profile", "grpo", "eval", "infer", "convert")
SMALL = (
    *("--model", "sim", "--train-samples", "4", "--val-samples", "3", "--hidden", "8", "--cpu"),
    *("--set", "policy.budget_dim=8", "--set", "train.tensorboard=false", "--epochs", "1"),
    *("--batch-size", "2", "--group-size", "2", "--budget-min", "100", "--budget-max", "300"),
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: what they show has tests of its own."""
    for module in (train_module, profile_module):
        monkeypatch.setattr(module, "report", lambda _: None)


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_command_explains_itself(controller: Call, leaf: str) -> None:
    code, out, err = controller(leaf, "--help")
    assert (code, err) == (0, "")
    assert f"moectl controller {leaf}" in out


def dry(controller: Call, *words: str) -> dict[str, Any]:
    code, out, err = controller("grpo", "--dry-run", "--json", *words)
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


@pytest.mark.parametrize("sign", ["-", "_"])
def test_the_command_of_the_original_is_taken(controller: Call, isolated: Path, sign: str) -> None:
    words = {
        "dataset_names": "text_vqa,okvqa", "model_path": "nowhere/molmo", "batch_size": "64",
        "num_epochs": "7", "lr": "0.5", "group_size": "4", "seed": "3",
        "importance_scores_file": "scores.json", "load_stage1_checkpoint": "old.pt",
        "wandb_project": "p", "wandb_entity": "e", "wandb_name": "n",
    }  # fmt: skip
    given = [
        word for name, value in words.items() for word in (f"--{name.replace('_', sign)}", value)
    ]
    found = dry(controller, *given, f"--use{sign}wandb")["settings"]
    expected = {
        "data.dataset": ["text_vqa", "okvqa"], "backbone.model": "nowhere/molmo",
        "train.batch_size": 64, "train.epochs": 7, "optim.lr": 0.5, "grpo.group_size": 4,
        "train.seed": 3, "policy.importance": "scores.json", "grpo.init_from": "old.pt",
        "train.wandb": True, "train.wandb_project": "p", "train.wandb_entity": "e",
        "train.wandb_name": "n",
    }  # fmt: skip
    assert {key: found[key]["value"] for key in expected} == expected
    assert {found[key]["from"] for key in expected} == {"flag"}
    assert list(isolated.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "successor"),
    [
        ("--results_dir results", "use --out DIR, or --name"),
        ("--results-dir=x", "use --out DIR, or --name"),
        ("--output_dir x", "use --out DIR for the run folder"),
        ("--use_multi_gpu", "accelerate launch -m moectl controller grpo"),
        ("--use-multi-gpu", "accelerate launch -m moectl controller grpo"),
    ],
)
def test_dropped_options_name_their_successors(
    controller: Call, isolated: Path, words: str, successor: str
) -> None:
    code, out, err = controller("grpo", *words.split())
    assert (code, out) == (2, "")
    name = words.split("=")[0].split()[0].replace("_", "-")
    assert f"{name} is not an option of moectl controller grpo: " in err
    assert successor in err
    assert list(isolated.iterdir()) == []


# Work


@pytest.mark.usefixtures("plain")
def test_a_training_prints_its_folder(controller: Call, isolated: Path) -> None:
    code, out, err = controller("grpo", *SMALL, "--out", "here")
    assert (code, out) == (0, "here\n"), err
    assert "Epoch 1  Loss: " in err
    names = {path.name for path in Path("here").iterdir()}
    assert names == {
        *("settings.toml", "run.json", "run.lock", "log.txt", "metrics.csv", "checkpoints"),
        *("training_history.csv", "validation_history.csv", "executions.jsonl"),
        *("checkpoint_epoch_0.pt", "checkpoint_epoch_1.pt", "best_model.pt"),
        *("checkpoint_epoch_0.pt.json", "checkpoint_epoch_1.pt.json", "best_model.pt.json"),
    }
    more = ("grpo", "--resume", "here", "--epochs", "2", "--json", "--quiet")
    code, out, err = controller(*more)
    assert code == 0, err
    document = json.loads(out)
    assert (document["folder"], document["status"]) == ("here", "finished")
    assert document["scores"]["last"]["epoch"] == 2
    code, _, err = controller("grpo", "--resume", "here", "--lr", "0.5")
    assert code == 2
    assert "cannot resume with other settings: optim.lr = 0.5" in err


@pytest.mark.usefixtures("plain")
def test_a_profile_prints_its_folder_and_gives_tables(controller: Call, isolated: Path) -> None:
    words = ("--model", "sim", "--samples", "2", "--plans", "10", "--cpu", "--quiet", "--name", "p")
    code, out, err = controller("profile", *words)
    assert (code, err) == (0, "")
    folder = Path(out.strip())
    assert {path.name for path in folder.iterdir()} == {
        *("settings.toml", "run.json", "run.lock", "log.txt", "executions.jsonl", "profile.json"),
        *("importance.json", "importance_flat.json", "overhead.json", "latency.json"),
        *("grid.jsonl", "lut.json"),
    }
    tables = ("--tables", "p", "--budget-mode", "auto", "--warm-start", "lut")
    words = (*tables, "--latency-source", "table", "--set", "grpo.clone_steps=2", "--out", "run")
    code, out, err = controller("grpo", *SMALL, *words, "--quiet")
    assert (code, out) == (0, "run\n"), err
    world = json.loads(Path("run/run.json").read_text())["world"]
    assert world["tables"] == str(folder.resolve())
    assert world["controller_ms"] > 0


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("grpo --group-size 1", "--group-size = 1"),
        ("grpo --budget-min 400", "budget.low = 400.0 is above budget.high = 380.0"),
        ("grpo --reward sum", "--reward"),
        ("grpo --latency-source flops --objective ttft", "latency.objective = ttft must be total"),
        ("grpo --dataset imagenet", "--dataset"),
        ("grpo --preset huge", "huge"),
        ("grpo --set grpo.groupsize=3", "did you mean grpo.group_size?"),
        ("grpo --num-epochs 0", "--epochs = 0"),
        ("grpo --resume nowhere", "nowhere: no such run"),
        ("grpo extra", "extra"),
        ("grpo --model sim --tables nowhere --out run", "nowhere"),
        ("grpo --model sim --warm-start lut --out run", "there is no lookup table"),
        ("grpo --model sim --budget-mode auto --out run", "there is no lookup table"),
        ("grpo --model sim --latency-source table --out run", "there is no fitted latency"),
        ("grpo --model sim --init-from gone.pt --out run", "gone.pt: cannot be read"),
        ("grpo --model sim --importance gone.json --out run", "gone.json: cannot be read"),
        ("profile --model sim --method bi --out run", "profile.method = bi needs a network"),
        ("profile --model sim --top-ks 3 --out run", "profile.top_ks: 3: expected some of"),
        ("profile --what all", "--what = 'all'"),
        ("profile --plans 2", "--plans = 2"),
        ("profile --tables x", "--tables"),
    ],
)
def test_bad_input_is_one_line_with_code_2(
    controller: Call, isolated: Path, words: str, message: str
) -> None:
    code, out, err = controller(*words.split())
    assert (code, out) == (2, ""), err
    assert message in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    if "--out" not in words:
        assert list(isolated.iterdir()) == [], "nothing was created"
