"""Records of a training: columns, weights files, names for TensorBoard, warnings."""

import csv
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.controller.ledger import validation_summary

Train = Callable[..., Path]

TRAINING = (
    *("epoch", "loss", "reward_mean", "reward_std", "accuracy_mean", "accuracy_std"),
    *("latency_mean", "latency_std", "budget_violation_rate", "reward_min", "reward_max"),
    *("num_groups", "num_valid_groups", "num_configs", "frac_zero_std", "grad_norm"),
    *("entropy_tier", "entropy_count", "entropy_blocks", "entropy_top_k", "lr", "seconds"),
)
VALIDATION = (
    *("epoch", "reward_mean", "accuracy_mean", "latency_mean", "budget_violation_rate"),
    *("latency_p95", "mean_overshoot", "spearman_budget_latency", "distinct_plans"),
)


def history(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}_history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def lines(folder: Path, split: str) -> list[dict[str, Any]]:
    text = (folder / "executions.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def test_histories_have_the_columns_of_the_document_in_its_order(sim_run: Path) -> None:
    for name, columns in (("training", TRAINING), ("validation", VALIDATION)):
        found = history(sim_run, name)
        assert tuple(found[0]) == columns
        assert [row["epoch"] for row in found] == ["1", "2"]


def test_the_training_history_is_that_of_the_executions(sim_run: Path) -> None:
    for row in history(sim_run, "training"):
        found = [line for line in lines(sim_run, "train") if line["epoch"] == int(row["epoch"])]
        assert len(found) == 6 * 3
        for name in ("reward", "accuracy", "latency"):
            values = [line[name] for line in found]
            assert float(row[f"{name}_mean"]) == pytest.approx(statistics.fmean(values))
            assert float(row[f"{name}_std"]) == pytest.approx(statistics.stdev(values))
        rewards = [line["reward"] for line in found]
        assert [float(row[f"reward_{end}"]) for end in ("min", "max")] == pytest.approx(
            [min(rewards), max(rewards)]
        )
        late = [line["latency"] > line["budget"] for line in found]
        assert float(row["budget_violation_rate"]) == pytest.approx(sum(late) / 18)
        assert float(row["num_groups"]) == 6
        distinct = {(line["sample_id"], line["plan_key"]) for line in found}
        assert float(row["num_configs"]) == len(distinct)


def test_equal_plans_of_a_group_count_once(train_sim: Train, tmp_path: Path) -> None:
    values = {"policy__blocks": "prefix", "policy__top_k": "shared", "grpo__group_size": 16}
    folder = train_sim(tmp_path / "run", data__train_samples=4, train__epochs=1, **values)
    found = {(line["sample_id"], line["plan_key"]) for line in lines(folder, "train")}
    assert len(found) < 4 * 16
    assert float(history(folder, "training")[0]["num_configs"]) == len(found)


def test_the_validation_history_is_that_of_the_executions(sim_run: Path) -> None:
    for row in history(sim_run, "validation"):
        found = [line for line in lines(sim_run, "val") if line["epoch"] == int(row["epoch"])]
        assert [line["sample_id"] for line in found] == [f"sim/val/{place}" for place in range(4)]
        values = validation_summary(found)
        assert {name: float(row[name]) for name in values} == values


def test_a_validation_is_summed_up() -> None:
    given = [(1.0, 0.5, 100, 200, "a"), (0.0, 0.3, 330, 300, "b"), (0.2, 1.0, 90, 100, "a")]
    names = ("reward", "accuracy", "latency", "budget", "plan_key")
    found = validation_summary([dict(zip(names, values, strict=True)) for values in given])
    assert tuple(found) == VALIDATION[1:]
    assert list(found.values()) == pytest.approx(
        [0.4, 0.6, 520 / 3, 1 / 3, 100 + 0.9 * 230, 0.1 / 3, 1.0, 2]
    )


def test_an_execution_is_written_with_all_that_made_it(sim_run: Path) -> None:
    line = lines(sim_run, "train")[0]
    assert set(line) == {
        *("update", "epoch", "split", "sample_id", "plan_key", "plan", "execution", "accuracy"),
        *("budget", "latency", "reward", "log_prob", "flat", "first"),
    }
    assert (line["update"], line["epoch"]) == (1, 1)
    assert line["plan"]["blocks"][0] == 0
    assert set(line["execution"]["timings"]) == {
        *("vision", "prefill", "decode", "new_tokens", "controller"),
    }
    assert line["log_prob"] < 0
    assert set(lines(sim_run, "val")[0]) == set(line) - {"log_prob", "flat", "first"}


# The gradient's norm


def test_each_update_counts_one_norm_of_the_gradient(train_sim: Train, tmp_path: Path) -> None:
    values = {"policy__dropout": 0, "train__batch_size": 6, "train__epochs": 1}
    whole = train_sim(tmp_path / "whole", **values)
    cut = train_sim(tmp_path / "cut", train__accumulate=3, **values)
    one, two = (float(history(folder, "training")[0]["grad_norm"]) for folder in (whole, cut))
    assert one > 0
    assert one == pytest.approx(two, rel=1e-4)


# Weights


def test_weights_files_have_the_keys_of_the_document(sim_run: Path) -> None:
    record = json.loads((sim_run / "run.json").read_text())
    for epoch in (1, 2):
        found = torch.load(sim_run / f"checkpoint_epoch_{epoch}.pt", weights_only=True)
        assert set(found) == {
            *("schema", "epoch", "global_step", "one_stage_controller_state_dict"),
            *("budget_encoder_state_dict", "optimizer_state_dict", "scheduler_state_dict"),
            *("best_val_reward", "val_budgets", "config", "backbone_spec", "metrics"),
        }
        assert (found["schema"], found["epoch"], found["global_step"]) == (1, epoch, 3 * epoch)
        row = history(sim_run, "validation")[epoch - 1]
        assert found["metrics"] == {name: float(row[name]) for name in VALIDATION[1:]}
        assert found["config"]["grpo"]["group_size"] == 3
        assert found["backbone_spec"]["max_active"] == 16
        parts = ("one_stage_controller_state_dict", "budget_encoder_state_dict")
        held = sum(len(found[part]) for part in parts)
        # Mean and deviation of both features are no weights that an optimiser moves.
        assert len(found["optimizer_state_dict"]["state"]) == held - 4
    best = torch.load(sim_run / "best_model.pt", weights_only=True)
    assert best["epoch"] == record["scores"]["best"]["epoch"]
    assert best["best_val_reward"] == best["metrics"]["reward_mean"]
    assert found["best_val_reward"] == best["best_val_reward"]


def test_old_weights_go_but_never_the_best_nor_the_first(train_sim: Train, tmp_path: Path) -> None:
    # Too slow to learn: the first epoch stays the best.
    folder = train_sim(tmp_path / "run", train__epochs=5, grpo__keep_last=2, optim__lr=1e-12)
    names = {"checkpoint_epoch_0.pt", "checkpoint_epoch_4.pt", "checkpoint_epoch_5.pt"}
    expected = names | {"best_model.pt"}
    assert {path.name for path in folder.glob("*.pt")} == expected
    assert {path.name for path in folder.glob("*.pt.json")} == {f"{one}.json" for one in expected}
    assert torch.load(folder / "best_model.pt", weights_only=True)["epoch"] == 1
    weights = json.loads((folder / "run.json").read_text())["weights"]
    assert {entry["file"] for entry in weights} == expected


# What is told


def test_tensorboard_has_the_names_of_the_original(train_sim: Train, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of tensorboard's own imports
        folder = train_sim(tmp_path / "run", train__tensorboard=True, data__train_samples=2)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
    names = ("Reward_Mean", "Accuracy_Mean", "Latency_Mean", "Budget_Violation_Rate")
    deviations = ("Loss", "Reward_Std", "Accuracy_Std", "Latency_Std")
    expected = {f"Train/{name}" for name in (*names, *deviations)}
    expected |= {f"Val/{name}" for name in names}
    assert expected <= set(events.Tags()["scalars"])
    for name in expected:
        kind, _, column = name.partition("/")
        rows = history(folder, {"Train": "training", "Val": "validation"}[kind])
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [
            (update, pytest.approx(float(row[column.lower()]), rel=1e-6))
            for update, row in enumerate(rows, 1)
        ]


def test_the_summary_of_an_epoch_has_the_words_of_the_original(sim_run: Path) -> None:
    row, held = history(sim_run, "training")[1], history(sim_run, "validation")[1]
    value = {name: float(text) for name, text in row.items()}
    text = (sim_run / "log.txt").read_text()
    assert (
        f"Epoch 2  Loss: {value['loss']:.4f}  Reward: {value['reward_mean']:.4f}"
        f" ({value['reward_std']:.4f})  Accuracy: {value['accuracy_mean']:.4f}"
        f" ({value['accuracy_std']:.4f})  Latency: {value['latency_mean']:.2f} ms"
        f" ({value['latency_std']:.2f})  Budget Violation Rate:"
        f" {value['budget_violation_rate']:.4f}\n"
    ) in text
    assert f"Validation  Reward: {float(held['reward_mean']):.4f}  Accuracy: " in text
    assert text.rstrip().endswith("at epoch 1") == (
        float(history(sim_run, "validation")[0]["reward_mean"]) > float(held["reward_mean"])
    )


@pytest.mark.parametrize(("samples", "warned"), [(1, True), (40, False)])
def test_a_policy_with_one_plan_is_warned_about(
    train_sim: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    samples: int,
    warned: bool,
) -> None:
    with caplog.at_level(logging.WARNING):
        train_sim(
            tmp_path / "run", data__val_samples=samples, train__epochs=1, data__train_samples=2
        )
    assert ("a larger grpo.entropy_coef keeps it open" in caplog.text) == warned


def test_an_epoch_is_told_in_two_lines(sim_run: Path) -> None:
    told = (sim_run / "log.txt").read_text().splitlines()
    lines = [line for line in told if "reward" in line.lower() and "epoch" in line.lower()]
    assert [line.partition(" INFO ")[2][:9] for line in lines[:2]] == ["Epoch 1  ", "Epoch 2  "]
    assert sum("Validation  Reward: " in line for line in told) == 2
    assert not [line for line in told if "val: reward_mean" in line]
