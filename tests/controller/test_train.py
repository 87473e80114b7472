"""Training of the controller: updates by hand, exact resume, what a run begins and ends with."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.controller import train
from moectl.controller.model import Policy
from moectl.controller.simulator import Simulator
from moectl.controller.weights import open_policy
from moectl.engine.errors import UserError

Train = Callable[..., Path]


def payload(folder: Path, name: str = "checkpoint_epoch_4.pt") -> dict[str, Any]:
    found = torch.load(folder / name, weights_only=True)
    assert isinstance(found, dict)
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        row.pop("seconds", None)
        row.pop("elapsed_seconds", None)
    return found


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    text = (folder / "executions.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def same(one: Path, other: Path) -> None:
    """Two runs of four epochs that differ in nothing but times."""
    for name in ("training_history.csv", "validation_history.csv", "metrics.csv"):
        assert rows(one / name) == rows(other / name), name
    assert len(rows(one / "training_history.csv")) == 4
    assert (one / "executions.jsonl").read_bytes() == (other / "executions.jsonl").read_bytes()
    for name in ("checkpoint_epoch_4.pt", "best_model.pt"):
        first, second = payload(one, name), payload(other, name)
        del first["config"], second["config"]
        for key in first:
            assert equal(first[key], second[key]), key


# Resume

VARIANTS: list[dict[str, Any]] = [
    {},
    {"grpo__inner_iterations": 2, "grpo__kl_coef": 0.5, "grpo__plateau_patience": 0},
    {"train__accumulate": 2, "grpo__scale_rewards": "batch", "policy__blocks": "importance"},
    {"grpo__warm_start": "lut", "latency__source": "table", "budget__mode": "auto"},
    {"policy__blocks": "prefix", "budget__mode": "relative", "budget__low": 0.4, "budget__high": 1},
]


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_a_stop_within_an_epoch_changes_nothing(
    train_sim: Train, sim_tables: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    if "latency__source" in values:
        values = {**values, "latency__tables": str(sim_tables)}
    whole = train_sim(tmp_path / "whole", train__epochs=4, **values)
    folder = train_sim(tmp_path / "parts", train__epochs=4, stop_after=5, **values)
    assert len(rows(folder / "training_history.csv")) == 1
    train_sim(folder, train__epochs=4, **values)
    same(whole, folder)


def test_two_epochs_and_two_are_four(train_sim: Train, sim_run: Path, tmp_path: Path) -> None:
    whole = train_sim(tmp_path / "whole", train__epochs=4)
    folder = shutil.copytree(sim_run, tmp_path / "parts")
    train_sim(folder, train__epochs=4)
    same(whole, folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["scores"]["last"]["epoch"] == 4


def test_before_the_first_checkpoint_a_run_begins_again(
    train_sim: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = train_sim(tmp_path / "start")
    values = {"train__epochs": 4, "grpo__init_from": start / "best_model.pt", "grpo__kl_coef": 0.5}
    whole = train_sim(tmp_path / "whole", **values)
    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(train.Ledger, "record", fails_at(2, "record"))
        with pytest.raises(RuntimeError, match="broken"):
            train_sim(folder, **values)
    assert not (folder / "checkpoints").exists()
    assert len(lines(folder)) == 2 * 6
    # The weights that it began with are in its own folder by now.
    (start / "best_model.pt").unlink()
    train_sim(folder, **values)
    same(whole, folder)


def fails_at(update: int, name: str) -> Callable[..., None]:
    """Do part of the ledger's work as ever, and fail after that of an update, counted from 1."""
    own = getattr(train.Ledger, name)

    def work(ledger: Any, step: Any, *given: Any, **named: Any) -> None:
        own(ledger, step, *given, **named)
        if step.index + 1 == update:
            raise RuntimeError("broken")

    return work


def test_what_was_answered_is_not_asked_again(
    train_sim: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_sim(tmp_path / "whole", train__epochs=4)
    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(train.Ledger, "_save", fails_at(6, "_save"))
        with pytest.raises(RuntimeError, match="broken"):
            train_sim(folder, train__epochs=4)
    known = {(line["sample_id"], line["plan_key"]) for line in lines(folder)}
    assert len(lines(folder)) == 6 * 6
    assert len(rows(folder / "training_history.csv")) == 2
    own = Simulator.execute

    def execute(simulator: Any, row: int, plan: Any) -> Any:
        assert (simulator.ids[row], plan.key()) not in known
        return own(simulator, row, plan)

    # Answers after the last checkpoint, that of update 3, are taken up as well.
    monkeypatch.setattr(Simulator, "execute", execute)
    train_sim(folder, train__epochs=4)
    same(whole, folder)


def test_a_resumed_run_keeps_its_world_when_tables_change(
    train_sim: Train, sim_tables: Path, tmp_path: Path
) -> None:
    tables = shutil.copytree(sim_tables, tmp_path / "tables")
    (tables / "overhead.json").write_text('{"controller_ms": 4.5}')
    values = {
        "train__epochs": 4, "latency__tables": str(tables), "budget__mode": "auto",
        "policy__blocks": "importance", "grpo__warm_start": "lut",
    }  # fmt: skip
    whole = train_sim(tmp_path / "whole", **values)
    folder = train_sim(tmp_path / "parts", stop_after=5, **values)
    before = json.loads((folder / "run.json").read_text())["world"]
    (tables / "overhead.json").write_text('{"controller_ms": 90}')
    scores = {str(block): float(block) for block in range(16)}
    (tables / "importance.json").write_text(json.dumps(scores))
    table = json.loads((tables / "lut.json").read_text())
    for row in table["config_table"].values():
        row["latency"] *= 3
    (tables / "lut.json").write_text(json.dumps(table))
    train_sim(folder, **values)
    assert json.loads((folder / "run.json").read_text())["world"] == before
    assert before["controller_ms"] == 4.5
    same(whole, folder)


def test_a_resumed_run_refuses_other_questions(
    train_sim: Train, sim_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sim_run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["world"]["data"] = {"digest": "other"}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="began with other questions"):
        train_sim(folder, train__epochs=3)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


# Updates by hand


def log_probs(policy: Policy, found: list[dict[str, Any]], questions: Any) -> tuple[Tensor, Tensor]:
    """Log-probability of each plan of blocks that were not chosen, and the sum of entropies."""
    vision, text = questions.features()
    places = [questions.ids.index(line["sample_id"]) for line in found]
    scores = policy(vision[places], text[places], torch.tensor([line["budget"] for line in found]))
    tiers, numbers = ["low", "medium", "high"], [4, 5, 6, 7, 8]
    total = []
    for place, line in enumerate(found):
        plan = line["plan"]
        value = scores.tier[place].log_softmax(0)[tiers.index(plan["tier"])]
        value = value + scores.count[place].log_softmax(0)[len(plan["blocks"]) - 12]
        for block in plan["blocks"][1:]:
            row = scores.top_k[place, block].log_softmax(0)
            value = value + row[numbers.index(plan["top_k"][block])]
        total.append(value)
    entropies = []
    for logits in (scores.tier, scores.count, scores.top_k[:, 1:]):
        p = logits.softmax(-1)
        entropies.append(-(p * p.log()).sum(-1).mean() / torch.tensor(logits.shape[-1]).log())
    return torch.stack(total), torch.stack(entropies).sum()


@pytest.mark.parametrize("inner", [1, 3])
def test_updates_are_those_by_hand(train_sim: Train, tmp_path: Path, inner: int) -> None:
    folder = train_sim(
        tmp_path / "run", policy__blocks="prefix", policy__dropout=0, optim__name="sgd",
        optim__lr=0.03, optim__clip_norm=0, optim__weight_decay=0, grpo__inner_iterations=inner,
        grpo__kl_coef=0.7, grpo__entropy_coef=0.1, grpo__clip=0.05, data__train_samples=2,
        train__epochs=2,
    )  # fmt: skip
    questions = Simulator(2, 42, "train")
    policy, start = (open_policy(folder / "checkpoint_epoch_0.pt")[0] for _ in range(2))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.03)
    clipped = 0
    for update in (1, 2):
        found = [line for line in lines(folder) if line["update"] == update]
        reward = torch.tensor([line["reward"] for line in found]).view(2, 3)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        kept = log_probs(start, found, questions)[0].detach()
        old = log_probs(policy, found, questions)[0].detach()
        assert torch.allclose(old, torch.tensor([line["log_prob"] for line in found]), atol=1e-4)
        for _ in range(inner):
            now, entropy = log_probs(policy, found, questions)
            ratio = (now - old).exp()
            clipped += int(((ratio - 1).abs() > 0.05).sum())
            gain = torch.minimum(
                ratio * advantage.flatten(), ratio.clamp(0.95, 1.05) * advantage.flatten()
            )
            away = (kept - now).exp() - (kept - now) - 1
            loss = -gain.mean() + 0.7 * away.mean() - 0.1 * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (clipped > 0) == (inner > 1)
    trained = payload(folder, "checkpoint_epoch_2.pt")
    for part in ("controller", "budget_encoder"):
        key = {"controller": "one_stage_controller_state_dict"}.get(part, f"{part}_state_dict")
        for name, weights in getattr(policy, part).state_dict().items():
            assert torch.allclose(weights, trained[key][name], atol=1e-5), name
    assert not torch.allclose(policy.controller.tier_head.bias, start.controller.tier_head.bias)


def test_micro_batches_give_the_whole_batch(train_sim: Train, tmp_path: Path) -> None:
    values = {"policy__dropout": 0, "optim__name": "sgd", "train__batch_size": 3}
    whole = train_sim(tmp_path / "whole", **values)
    cut = train_sim(tmp_path / "cut", train__accumulate=3, **values)
    one, two = (payload(folder, "checkpoint_epoch_2.pt") for folder in (whole, cut))
    key = "one_stage_controller_state_dict"
    assert all(torch.allclose(one[key][name], two[key][name], atol=1e-6) for name in one[key])
    for first, second in zip(
        *(rows(folder / "training_history.csv") for folder in (whole, cut)), strict=True
    ):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert float(value) == pytest.approx(float(second[name]), abs=1e-5), name


def test_dropout_is_the_same_in_all_inner_iterations(
    train_sim: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor] = []

    def dropout(given: Tensor, p: float = 0.5, training: bool = True, _: bool = False) -> Tensor:
        if training:
            masks.append(torch.rand(given.shape) > p)
        return given * masks[-1] if training else given

    monkeypatch.setattr(F, "dropout", dropout)
    train_sim(
        tmp_path / "run", policy__dropout=0.5, grpo__inner_iterations=2, data__train_samples=4,
        train__epochs=1,
    )  # fmt: skip
    assert len(masks) == 4 * 4  # layers, twice for each of two updates
    first, again, second, _ = (torch.cat(masks[call : call + 4]) for call in range(0, 16, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# Budgets


def test_budgets_are_a_function_of_their_coordinates() -> None:
    names = [f"q{number}" for number in range(400)]
    found = train.draw_budgets(1, 3, names, (100, 300), "training")
    assert found.shape == (400,)
    assert 100 <= float(found.min()) < 103
    assert 297 < float(found.max()) < 300
    assert float(found.mean()) == pytest.approx(200, abs=10)
    alone = train.draw_budgets(1, 3, names[7:8], (100, 300), "training")
    assert torch.equal(alone, found[7:8])
    for other in (
        train.draw_budgets(2, 3, names, (100, 300), "training"),
        train.draw_budgets(1, 4, names, (100, 300), "training"),
        train.draw_budgets(1, 3, names, (100, 300), "validation"),
    ):
        assert not (other == found).any()


def test_validation_has_the_same_budgets_in_every_epoch(sim_run: Path) -> None:
    def budgets(split: str) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{}, {}]
        for line in lines(sim_run, split):
            found[line["epoch"] - 1][line["sample_id"]] = line["budget"]
        return found

    first, second = budgets("val")
    assert first == second
    assert len(set(first.values())) == 4
    assert list(first.values()) == payload(sim_run, "best_model.pt")["val_budgets"].tolist()
    first, second = budgets("train")
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


# Beginning and end


def test_plans_of_a_question_are_drawn_anew_in_every_epoch(
    train_sim: Train, tmp_path: Path
) -> None:
    # By a policy that stays as it is, under one budget.
    values = {"optim__lr": 1e-12, "budget__low": 200, "budget__high": 200}
    keys: dict[tuple[str, int], list[str]] = {}
    for line in lines(train_sim(tmp_path / "run", **values)):
        keys.setdefault((line["sample_id"], line["epoch"]), []).append(line["plan_key"])
    assert len(keys) == 12
    assert {len(found) for found in keys.values()} == {3}
    assert len(set(map(str, keys.values()))) == 12


def test_the_rate_falls_when_validation_no_longer_improves(
    train_sim: Train, tmp_path: Path
) -> None:
    values = {"optim__lr": 1e-9, "grpo__plateau_factor": 0.25, "grpo__plateau_patience": 1}
    folder = train_sim(tmp_path / "run", train__epochs=5, **values)
    rates = [float(row["lr"]) for row in rows(folder / "training_history.csv")]
    assert rates == pytest.approx([1e-9, 1e-9, 1e-9, 2.5e-10, 2.5e-10])
    last = payload(folder, "checkpoint_epoch_5.pt")
    assert last["scheduler_state_dict"]["factor"] == 0.0625
    assert last["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(2.5e-10)


def test_scores_of_the_best_and_the_last_epoch_are_noted(sim_run: Path) -> None:
    record = json.loads((sim_run / "run.json").read_text())
    history = rows(sim_run / "validation_history.csv")
    best = max(history, key=lambda row: float(row["reward_mean"]))
    for kind, row in (("best", best), ("last", history[-1])):
        assert record["scores"][kind] == {
            "epoch": int(row["epoch"]),
            **{
                name: float(row[name])
                for name in (
                    *("reward_mean", "accuracy_mean", "latency_mean"),
                    "budget_violation_rate",
                )
            },
        }
    assert record["world"]["model"] == "sim"
    assert record["world"]["budgets"] == [100, 340]


def test_the_log_tells_what_is_trained(sim_run: Path) -> None:
    text = (sim_run / "log.txt").read_text()
    assert ": sim; cpu; controller 0.00M, budget encoder 0.00M parameters; 1.28e+12 plans;" in text
    assert "budgets 100 to 340 ms; 6 questions, 4 to validate" in text
    assert "the loss is near 0 by construction" in text
