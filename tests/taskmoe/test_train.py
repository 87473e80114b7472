"""Training of the mixture: what each option does to it, and what a run leaves behind."""

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from moectl.cli import _run
from moectl.engine import plot
from moectl.taskmoe import eval as evaluation
from moectl.taskmoe import heat_maps, pictures
from moectl.taskmoe.analysis import Examined
from moectl.taskmoe.data import load
from moectl.taskmoe.settings import DataSection, TaskmoeSettings
from moectl.taskmoe.train import _prepare, build, epoch_scores, over_processes
from moectl.taskmoe.weights import read_mixture, rebuild

TINY = (
    *("--task", "digits", "--width", "4", "--batch-size", "67", "--precision", "no", "--quiet"),
    *("--set", "train.tensorboard=false", "--set", "train.threads=1"),
)
SHORT = (*TINY, "--num-epochs", "1", "--expert-analysis-interval", "0", "--lr", "0.01")
SHARP = ("--initial-temperature", "0.5")  # so that gates move within an epoch
BLIND = (*SHARP, "--diversity-weight", "0", "--balance-weight", "0")
DIVERSE = (*SHARP, "--diversity-weight", "5")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave pictures empty: what they show has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heat_maps, pictures, plot):
            patch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))
        patch.setattr(evaluation, "sample_predictions", lambda path, _: path.write_bytes(b""))
        yield


def trained(folder: Path, *words: str) -> Path:
    assert _run(["taskmoe", "train", *words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def annealed(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs from a merge, the first of them with the extractor frozen."""
    words = (
        *("--initial-temperature", "3", "--final-temperature", "0.5"),
        *("--num-epochs", "3", "--freeze-extractor-epochs", "1", "--expert-analysis-interval", "2"),
        *("--set", "train.save_minutes=0", "--set", "train.keep=99", "--lr", "0.003"),
    )
    folder = tmp_path_factory.mktemp("annealed") / "run"
    return trained(folder, *TINY, *words, "--merged", f"{finished_runs}/taskmoe/m")


@pytest.fixture(scope="module")
def brief(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train one epoch from the merge; the same words give the same run."""
    root = tmp_path_factory.mktemp("brief")
    done: dict[tuple[str, ...], Path] = {}

    def run(*words: str) -> Path:
        if words not in done:
            merged = ("--merged", f"{finished_runs}/taskmoe/m")
            done[words] = trained(root / str(len(done)), *SHORT, *merged, *words)
        return done[words]

    return run


@pytest.fixture(scope="module")
def stuck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without a merge that does not learn and soon loses patience."""
    words = (
        *("--merged", "none", "--num-epochs", "30", "--patience", "1", "--lr", "1e-9"),
        *("--temperature-schedule", "constant", "--initial-temperature", "1.5"),
        *("--expert-analysis-interval", "0"),
    )
    return trained(tmp_path_factory.mktemp("stuck") / "run", *TINY, *words)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["val/accuracy"]]


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(folder)]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def extractor_at(folder: Path, update: int) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"update-{update:08d}" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    return {name: value for name, value in state.items() if name.startswith("feature_extractor.")}


# The temperature


def test_the_temperature_falls_along_a_cosine(annealed: Path) -> None:
    expected = [0.5 + 1.25 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    assert expected == pytest.approx([3, 2.375, 1.125])
    assert column(annealed, "temperature") == pytest.approx(expected)


def test_the_weights_keep_the_temperature_of_their_epoch(annealed: Path) -> None:
    best = read(annealed / "results.json")
    temperatures = column(annealed, "temperature")
    for name, epoch in (("best_model.pth", best["best_epoch"]), ("last.pth", 3)):
        weights = read_mixture(annealed / name, TaskmoeSettings())
        assert float(weights.payload["model_state_dict"]["temperature"]) == temperatures[epoch - 1]
        assert weights.facts["temperature"] == temperatures[epoch - 1]
        assert weights.facts["epoch"] == epoch
    assert best["best_temperature"] == temperatures[best["best_epoch"] - 1]


def test_a_reloaded_mixture_runs_at_its_temperature(annealed: Path) -> None:
    model = rebuild(read_mixture(annealed / "last.pth", TaskmoeSettings()))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, gates = model.parts(images).gate_logits, model(images).gates
    assert torch.allclose(gates, (logits / 1.125).softmax(1), atol=1e-6)
    assert not torch.allclose(gates, (logits / 2).softmax(1), atol=1e-6)


def test_a_constant_temperature_stays(stuck: Path) -> None:
    assert set(column(stuck, "temperature")) == {1.5}


# Frozen layers and left-out batches


def test_a_batch_of_one_image_is_left_out(annealed: Path) -> None:
    images = len(load(DataSection(task="digits")).train)
    assert images == 13 * 67 + 1
    assert [row["update"] for row in rows(annealed)] == ["13", "26", "39"]


def test_frozen_layers_do_not_move_by_a_bit(annealed: Path) -> None:
    merged = read_mixture(annealed / "merged_model.pth", TaskmoeSettings())
    start = merged.payload["model_state_dict"]
    frozen = extractor_at(annealed, 13)
    assert any("running_var" in name for name in frozen)
    assert all(torch.equal(value, start[name]) for name, value in frozen.items())


def test_layers_move_once_they_are_free(annealed: Path) -> None:
    before, after = extractor_at(annealed, 13), extractor_at(annealed, 14)
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


def test_the_rest_moves_while_the_extractor_is_frozen(annealed: Path) -> None:
    merged = read_mixture(annealed / "merged_model.pth", TaskmoeSettings())
    path = annealed / "checkpoints" / "update-00000013" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    start = merged.payload["model_state_dict"]
    name = "experts.0.1.weight"
    assert not torch.equal(state[name], start[name])


# One batch over all processes


def test_the_usage_of_one_process_is_the_mean_of_its_gates() -> None:
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    gates = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], requires_grad=True)
    usage = over_processes(gates, run)
    assert usage.tolist() == [0.625, 0.375]
    usage[0].backward()
    assert gates.grad is not None
    assert gates.grad.tolist() == [[0.25, 0.0]] * 4


# Scores of an epoch


def test_epoch_scores_are_as_computed_by_hand() -> None:
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    examined = Examined(
        expert_logits=torch.zeros(2, 2, 2),
        by_pass=torch.tensor([[math.log(3), 0.0]]).expand(2, 2),
        bias=torch.zeros(2),
        gate_logits=gates,
        gates=gates,
        labels=torch.tensor([0, 1]),
    )
    found = epoch_scores(examined, torch.eye(2), 1.5)
    assert found == pytest.approx(
        {
            "val/loss": -(math.log(0.75) + math.log(0.25)) / 2,
            "val/accuracy": 0.5,
            "val/owner_alignment": 0.75,
            "val/effective_gates": 1.5,
            "val/gate_entropy": math.log(2) / 2,
            "temperature": 1.5,
            "val/usage_expert_0": 0.75,
            "val/usage_expert_1": 0.25,
        }
    )


def test_a_shared_class_may_go_to_either_owner() -> None:
    gates = torch.tensor([[0.5, 0.25, 0.25]])
    examined = Examined(
        expert_logits=torch.zeros(1, 3, 1),
        by_pass=torch.zeros(1, 1),
        bias=torch.zeros(1),
        gate_logits=gates,
        gates=gates,
        labels=torch.tensor([0]),
    )
    found = epoch_scores(examined, torch.tensor([[1.0, 0.0, 1.0]]), 1.0)
    assert found["val/owner_alignment"] == 0.75


# What a run leaves


def test_results_have_the_keys_of_the_original_and_more(runs: Path) -> None:
    results = read(runs / "t" / "results.json")
    assert set(results) == {
        *("best_accuracy", "total_epochs", "early_stopped", "final_train_loss"),
        *("final_train_accuracy", "final_test_accuracy"),
        *("best_epoch", "best_temperature", "selected_on", "test"),
    }
    assert results["total_epochs"] == 2
    assert results["early_stopped"] is False
    last = rows(runs / "t")[-1]
    assert results["final_train_loss"] == float(last["train/loss"])
    assert results["final_train_accuracy"] == 100 * float(last["train/accuracy"])
    assert results["final_test_accuracy"] == results["test"]["overall_accuracy"]


def test_the_configuration_has_the_keys_of_the_original(runs: Path) -> None:
    config = read(runs / "t" / "config.json")
    expected = {
        "num_epochs": 2,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "patience": 20,
        "num_experts": 3,
        "num_classes": 9,
        "expert_analysis_interval": 10,
        "diversity_weight": 0.1,
        "balance_weight": 0.5,
        "initial_temperature": 2.0,
        "final_temperature": 0.5,
        "task": "digits",
    }
    assert expected.items() <= config.items()
    assert {"model_name", "timestamp"} <= set(config)
    assert config["settings"]["model"]["width"] == 4


def test_the_best_epoch_is_the_first_with_the_highest_validation_accuracy(annealed: Path) -> None:
    accuracies = column(annealed, "val/accuracy")
    results = read(annealed / "results.json")
    assert results["selected_on"] == "val"
    assert results["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert results["best_accuracy"] == pytest.approx(100 * max(accuracies))
    assert results["test"]["weights"]["epoch"] == results["best_epoch"]


def test_the_weights_have_the_keys_of_the_original_and_plain_types(runs: Path) -> None:
    payload = torch.load(runs / "t" / "best_model.pth", weights_only=True)
    assert {
        *("epoch", "model_state_dict", "optimizer_state_dict", "accuracy"),
        *("format_version", "config", "label_map", "class_names", "owners"),
        *("mean", "std", "temperature", "image_size"),
    } <= set(payload)
    assert payload["class_names"] == list("012345678")
    assert payload["owners"] == [[1, 0, 0]] * 3 + [[0, 1, 0]] * 3 + [[0, 0, 1]] * 3
    assert payload["accuracy"] == read(runs / "t" / "results.json")["best_accuracy"]


def test_experts_are_analysed_after_the_first_epoch_and_every_interval(annealed: Path) -> None:
    found = {path.name for path in annealed.rglob("expert_analysis_epoch*")}
    assert found == {"expert_analysis_epoch1.png", "expert_analysis_epoch2.png"}


def test_the_last_analysis_is_that_of_the_best_weights_on_the_test_images(annealed: Path) -> None:
    document, results = (read(annealed / f"{name}.json") for name in ("expert_analysis", "results"))
    assert document["epoch"] == results["best_epoch"]
    assert document["usage"] == pytest.approx(results["test"]["usage"])
    assert (annealed / "plots" / "expert_analysis.png").is_file()


def test_an_interval_of_zero_gives_no_analysis(brief: Callable[..., Path]) -> None:
    folder = brief(*BLIND)
    assert not list(folder.rglob("expert_analysis_epoch*"))
    assert not (folder / "expert_analysis.json").exists()


def test_selection_on_the_test_images_is_labelled(brief: Callable[..., Path]) -> None:
    folder = brief("--select-on", "test")
    results = read(folder / "results.json")
    assert results["selected_on"] == results["test"]["selected_on"] == "test"
    assert results["best_accuracy"] == pytest.approx(results["final_test_accuracy"])
    assert "chosen on these very images" in (folder / "report.md").read_text()


def test_selection_on_validation_is_not(annealed: Path) -> None:
    assert "these very images" not in (annealed / "report.md").read_text()


# The terms of the loss


def test_diversity_sharpens_the_gates(brief: Callable[..., Path]) -> None:
    blind, sharp = brief(*BLIND), brief(*DIVERSE, "--balance-weight", "0")
    name = "val/effective_gates"
    assert column(sharp, name)[0] < column(blind, name)[0] - 0.5


def test_without_balance_sharp_gates_prefer_one_expert(brief: Callable[..., Path]) -> None:
    free, held = (brief(*DIVERSE, "--balance-weight", weight) for weight in ("0", "50"))
    usage = [
        [column(run, f"val/usage_expert_{number}")[0] for number in range(3)]
        for run in (free, held)
    ]
    assert [sum(shares) for shares in usage] == pytest.approx([1, 1])
    assert max(usage[0]) > 0.6 > 0.5 > max(usage[1])
    name = "train/loss_balance"
    assert column(held, name)[0] < column(free, name)[0] / 5


def test_supervised_gates_go_to_the_owners(brief: Callable[..., Path]) -> None:
    blind, taught = brief(*BLIND), brief(*BLIND, "--gate-supervision-weight", "10")
    name = "val/owner_alignment"
    assert column(taught, name)[0] > column(blind, name)[0] + 0.05


def test_the_loss_is_the_weighted_sum_of_its_terms(brief: Callable[..., Path]) -> None:
    names = {"diversity": 0.2, "balance": 0.7, "gate_supervision": 0.3, "z_loss": 0.01}
    words = [f"--set=loss.{name}_weight={weight}" for name, weight in names.items()]
    folder = brief(*words, "--distill-weight", "0.4")
    weights = {"task": 1.0, **names, "z": names["z_loss"], "distill": 0.4}
    del weights["z_loss"]
    parts = {name: column(folder, f"train/loss_{name}")[0] for name in weights}
    assert all(value > 0 for value in parts.values())
    total = sum(weight * parts[name] for name, weight in weights.items())
    assert column(folder, "train/loss")[0] == pytest.approx(total, rel=1e-5)


def test_terms_without_weight_have_no_column(brief: Callable[..., Path]) -> None:
    names = {name for name in rows(brief(*BLIND))[0] if name.startswith("train/loss_")}
    assert names == {"train/loss_task", "train/loss_diversity", "train/loss_balance"}


# The rest


def test_patience_ends_early_and_says_so(stuck: Path) -> None:
    results = read(stuck / "results.json")
    assert results["early_stopped"] is True
    assert 1 < results["total_epochs"] == results["best_epoch"] + 1 < 30
    last = read_mixture(stuck / "last.pth", TaskmoeSettings())
    assert last.facts["epoch"] == results["total_epochs"] == len(rows(stuck))
    assert read(stuck / "run.json")["status"] == "finished"


def test_initial_weights_depend_on_the_seed_alone() -> None:
    settings = TaskmoeSettings.model_validate(
        {"data": {"task": "digits"}, "model": {"width": 4}, "train": {"seed": 5}}
    )
    data = load(settings.data)
    torch.manual_seed(99)
    first = build(settings, data).state_dict()
    torch.rand(3)
    again = build(settings, data).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    train = settings.train.model_copy(update={"seed": 6})
    other = build(settings.model_copy(update={"train": train}), data).state_dict()
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_training_goes_on_from_given_weights(
    taskmoe: Callable[..., tuple[int, str, str]], runs: Path, tmp_path: Path
) -> None:
    weights = runs / "t" / "last.pth"
    code, out, _ = taskmoe(
        *("train", *SHORT, "--load-model-path", str(weights), "--out", f"{tmp_path}/run", "--json")
    )
    assert code == 0
    assert json.loads(out)["parents"][0]["path"] == str(weights)
    start = read_mixture(tmp_path / "run" / "merged_model.pth", TaskmoeSettings())
    given = read_mixture(weights, TaskmoeSettings())
    for name, value in given.payload["model_state_dict"].items():
        assert torch.equal(start.payload["model_state_dict"][name], value)


@pytest.mark.parametrize(("anneal", "halfway"), [(0, 2), (8, 2.5)])
def test_the_temperature_falls_over_the_epochs_that_are_set(anneal: int, halfway: float) -> None:
    gate = {"anneal_epochs": anneal, "initial_temperature": 3, "final_temperature": 1}
    settings = TaskmoeSettings(train={"epochs": 4}, gate={**gate, "schedule": "linear"})
    model: Any = SimpleNamespace(
        temperature=torch.tensor(0.0), feature_extractor=torch.nn.Identity()
    )
    loop: Any = SimpleNamespace(run=SimpleNamespace(settings=settings, is_main=False))
    _prepare(loop, model, SimpleNamespace(epoch=2))  # type: ignore[arg-type]
    assert float(model.temperature) == halfway


def test_the_temperature_of_distillation_softens_the_targets(brief: Callable[..., Path]) -> None:
    words = (*BLIND, "--distill-weight", "0.4")
    hard, soft = (
        column(brief(*words, "--set", f"loss.distill_temperature={value}"), "train/loss_distill")
        for value in (1, 8)
    )
    assert hard != pytest.approx(soft, rel=0.05)
