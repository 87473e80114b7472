"""Training of the network: each update by hand, what options do to it, what a run leaves behind."""

import copy
import csv
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from moectl.diffusion import train, usage
from moectl.diffusion.blocks import MixtureBlock
from moectl.diffusion.measures import step_of
from moectl.diffusion.model import UNet, build
from moectl.diffusion.settings import DiffusionSettings
from moectl.engine.settings import resolve
from moectl.engine.sources import Stream

_SPEC = importlib.util.spec_from_file_location("slow", Path(__file__).with_name("slow_train.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
slow: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(slow)

Fit = Callable[..., Path]


def payload(folder: Path, epoch: int = 1) -> dict[str, Any]:
    found = torch.load(folder / f"checkpoint_epoch_{epoch}.pth", weights_only=True)
    assert isinstance(found, dict)
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def apart(one: Path, other: Path, key: str = "model_state_dict") -> float:
    """Largest difference of any weight."""
    first, second = (payload(folder)[key] for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def experts_chosen(model: nn.Module, bias: list[float]) -> None:
    """Let the routers choose by a bias alone."""
    for part in model.modules():
        if isinstance(part, MixtureBlock):
            last: Any = part.router.mlp[2]
            nn.init.zeros_(last.weight)
            last.bias.data = torch.tensor(bias)


# What a run leaves


def test_weights_files_have_the_keys_of_the_original_and_plain_types(finished_run: Path) -> None:
    for number, epoch in enumerate((1, 2)):
        found = payload(finished_run, epoch)
        assert set(found) == {
            *("epoch", "model_state_dict", "optimizer_state_dict", "loss"),
            *("ema_state_dict", "config", "format_version"),
        }
        assert found["epoch"] == number
        assert found["format_version"] == 1
        assert found["config"]["model"]["num_experts"] == 3
        assert found["ema_state_dict"].keys() == found["model_state_dict"].keys()
        assert len(found["optimizer_state_dict"]["state"]) > 50
    last = [row for row in rows(finished_run) if row["train/loss"]][-1]
    assert found["loss"] == pytest.approx(float(last["train/loss"]))


def test_the_sidecar_rebuilds_the_network(finished_run: Path) -> None:
    facts = json.loads((finished_run / "checkpoint_epoch_2.pth.json").read_text())
    assert (facts["model"], facts["epoch"], facts["run"]) == ("UNet", 2, "diffusion/t")
    assert facts["process"] == {"steps": 1000, "schedule": "linear", "prediction": "epsilon"}
    assert facts["class_names"] == list("0123456789")
    assert (facts["dataset"], facts["image_size"]) == ("digits", 8)
    build(facts["arguments"]).load_state_dict(payload(finished_run, 2)["model_state_dict"])


def test_the_log_has_the_lines_of_the_original(fit: Fit) -> None:
    folder = fit(train__log_every=2, train__epochs=2)
    lines = [line.split(" INFO ")[-1] for line in (folder / "log.txt").read_text().splitlines()]
    assert "3 classes" in lines[0]
    assert "MoE on, Freq on, DS-Conv on; cpu; 0.02M parameters; 24 images of" in lines[0]
    for row in rows(folder):
        kind = "train" if row["train/loss"] else "running"
        values = [
            f"{float(row[f'{kind}/{name}']):.4f}" for name in ("loss", "dm_loss", "load_loss")
        ]
        place, avg = f"[Epoch {row['epoch']}, Step {row['update']}] ", ""
        if kind == "train":
            place, avg = f"[Epoch {row['epoch']}/2] ", "Avg "
        text = f"{avg}Loss: {{}}, {avg}DM Loss: {{}}, {avg}Load Loss: {{}}".format(*values)
        assert place + text in lines
    assert sum("] Loss" in line for line in lines) == 2
    assert lines.count(f"Saved checkpoint: {folder}/checkpoint_epoch_2.pth") == 1
    assert not any("checkpoint_epoch_1" in line for line in lines)


def test_metrics_have_the_held_out_loss_and_its_tenths(fit: Fit) -> None:
    folder = fit(train__epochs=2)
    for row in rows(folder):
        spans = [row.get(f"loss_by_step/{number}") for number in range(10)]
        images = Counter(step_of(place, 1000) // 100 for place in range(8))
        assert [number for number in range(10) if spans[number]] == sorted(images)
        total = sum(float(spans[number]) * count for number, count in images.items())
        assert float(row["val/loss"]) == pytest.approx(total / 8, rel=1e-5)
    record = json.loads((folder / "run.json").read_text())
    last = record["scores"]["last"]
    assert last["epoch"] == 2
    assert last["val/loss"] == float(row["val/loss"])
    assert record["status"] == "finished"


def test_the_held_out_loss_is_that_of_the_averaged_weights(fit: Fit) -> None:
    still = fit("still", train__ema_decay=0.999999, train__epochs=4)
    moving = fit("moving", train__ema_decay=0.0, train__epochs=4)
    assert payload(still, 4)["loss"] == payload(moving, 4)["loss"]
    one, other = (float(rows(folder)[-1]["val/loss"]) for folder in (still, moving))
    assert one > other + 0.01


def test_weights_and_samples_appear_when_they_are_due(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Path, UNet]] = []
    monkeypatch.setattr(train, "write_samples", lambda path, model, *_: made.append((path, model)))
    folder = fit(train__epochs=5, train__save_every=2, train__sample_every=3)
    assert {path.name for path in folder.glob("*.pth")} == {
        f"checkpoint_epoch_{epoch}.pth" for epoch in (2, 4, 5)
    }
    assert [path for path, _ in made] == [folder / "samples" / f"epoch_{n}.png" for n in (3, 5)]
    averaged = payload(folder, 5)["ema_state_dict"]
    assert not made[-1][1].training
    for name, value in made[-1][1].state_dict().items():
        assert torch.equal(value, averaged[name])


def test_patience_ends_with_weights(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    own, scores = train._measure, iter([3.0, 2.0, 1.0, 2.0, 1.5, 0.5])

    def measured(loop: Any, *given: Any, **named: Any) -> dict[str, Any]:
        found: Any = own(loop, *given, **named)
        if named:  # the rehearsal
            return found
        assert found[loop.monitor] == -found["val/loss"]
        return found | {loop.monitor: -next(scores)}

    monkeypatch.setattr(train, "_measure", measured)
    folder = fit(train__epochs=6, train__patience=2)
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3", "4", "5"]
    assert payload(folder, 5)["epoch"] == 4


# The average


@pytest.mark.parametrize("decay", [0.9, 0.3, 0.0])
def test_the_average_is_that_of_a_slow_reference(decay: float) -> None:
    model = nn.Linear(3, 2)
    averaged = train.average(model, decay, torch.device("cpu"))  # type: ignore[arg-type]
    expected: list[float] = []
    for done in range(8):
        with torch.no_grad():
            for weights in model.parameters():
                weights.normal_()
        averaged.update_parameters(model)
        values = nn.utils.parameters_to_vector(model.parameters()).tolist()
        now = min(decay, (1 + done) / (10 + done)) if done else 0.0
        old = expected or values
        expected = [now * a + (1 - now) * b for a, b in zip(old, values, strict=True)]
        found = nn.utils.parameters_to_vector(averaged.module.parameters()).tolist()
        assert found == pytest.approx(expected, abs=1e-6)
        assert decay or found == values


def test_without_an_average_there_are_raw_weights_alone(fit: Fit) -> None:
    found = payload(fit(train__ema_decay=0.0))
    assert "ema_state_dict" not in found


# Draws


def drawn(
    index: int = 0, size: int = 12, slots: Tensor | None = None, seed: int = 0, **loss: Any
) -> tuple[Tensor, Tensor, Tensor]:
    values = {f"loss.{name}": value for name, value in loss.items()}
    settings, _ = resolve(DiffusionSettings, {"train.seed": seed, **values}, [], [])
    slots = torch.arange(size) if slots is None else slots
    step: Any = SimpleNamespace(index=index, size=size, slots=slots)
    model: Any = SimpleNamespace(num_classes=10)
    images, labels = torch.zeros(len(slots), 3, 2, 2), torch.full((len(slots),), 4)
    return train.draw(settings, step, images, labels, model)


def test_steps_are_even_and_some_labels_hidden() -> None:
    parts = [drawn(index, 1000) for index in range(20)]
    t, noise, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    counts = torch.bincount(t * 10 // 1000, minlength=10)
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 5 * 43  # standard deviations
    assert [int(t.min()), int(t.max())] == [0, 999]
    assert set(labels.tolist()) == {4, 10}
    assert float((labels == 10).double().mean()) == pytest.approx(0.1, abs=0.012)
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_a_share_of_zero_hides_no_label() -> None:
    assert set(drawn(size=2000, p_uncond=0.0)[2].tolist()) == {4}


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 2)])
def test_draws_do_not_depend_on_how_a_batch_is_cut(world: int, accumulate: int) -> None:
    whole = drawn(p_uncond=0.5)
    for rank in range(world):
        for chunk in Stream(12, 12, 0, rank, world, accumulate).epoch(0):
            for own, all_of_them in zip(drawn(slots=chunk.slots, p_uncond=0.5), whole, strict=True):
                assert torch.equal(own, all_of_them[chunk.slots])


def test_every_update_and_every_seed_draws_anew() -> None:
    first = drawn()
    assert all(torch.equal(one, two) for one, two in zip(first, drawn(), strict=True))
    for other in (drawn(index=1), drawn(seed=1)):
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])


# Updates by hand


@pytest.mark.parametrize(
    "values",
    [
        {"optim__name": "sgd", "optim__clip_norm": 0.0, "loss__lambda_load": 0.5},
        {"optim__name": "sgd", "optim__clip_norm": 0.1, "loss__balance": "none"},
        {"loss__balance": "variance", "loss__lambda_load": 2.0},
        {"loss__weight": "min_snr"},
        {"process__prediction": "v_prediction"},
        {"model__moe": False},
    ],
    ids=lambda values: " ".join(str(value) for value in values.values()),
)
def test_updates_are_those_by_hand(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    seen: list[Any] = []
    models: list[UNet] = []
    own = train.draw

    def draw(settings: Any, step: Any, images: Tensor, labels: Tensor, model: UNet) -> Any:
        found = own(settings, step, images, labels, model)
        seen.append((images, *found))
        return found

    def built(arguments: dict[str, Any]) -> UNet:
        model = build(arguments)
        models.append(copy.deepcopy(model))
        return model

    monkeypatch.setattr(train, "draw", draw)
    monkeypatch.setattr(train, "build", built)
    folder = fit(**values)
    assert len(seen) == 3
    means = slow.trained(models[0], seen, values)
    trained = payload(folder)["model_state_dict"]
    # AdamW makes whole steps of gradients that are nothing but rounding.
    exact = 1e-6 if values.get("optim__name") == "sgd" else 1e-4
    for name, weights in models[0].state_dict().items():
        assert torch.allclose(weights, trained[name], atol=exact), name
    names = ("loss", "dm_loss", "load_loss")
    found = [float(rows(folder)[0][f"train/{name}"]) for name in names]
    assert found == pytest.approx(means, rel=1e-5)


# What options do


def test_checkpointing_changes_nothing(fit: Fit) -> None:
    assert apart(fit("plain"), fit("again", model__checkpointing=True)) < 1e-6


def test_micro_batches_give_the_whole_batch(fit: Fit) -> None:
    values = {"loss__balance": "none", "optim__name": "sgd"}
    whole, cut = fit("whole", **values), fit("cut", train__accumulate=2, **values)
    assert apart(whole, cut) < 1e-6
    assert apart(whole, cut, "ema_state_dict") < 1e-6


def test_micro_batches_balance_nearly_as_the_whole(fit: Fit) -> None:
    values = {"optim__name": "sgd", "loss__lambda_load": 0.5}
    whole, cut = fit("whole", **values), fit("cut", train__accumulate=2, **values)
    assert 0 < apart(whole, cut) < 2e-3
    one, two = (float(rows(folder)[0]["train/load_loss"]) for folder in (whole, cut))
    assert one == pytest.approx(two, rel=0.02)
    assert rows(whole)[0]["load/largest"] == rows(cut)[0]["load/largest"]


@pytest.mark.parametrize(
    "values",
    [
        {"model__compat": "seed", "loss__balance": "variance", "loss__p_uncond": 0.0},
        {"model__compat": "seed", "model__moe": False, "loss__p_uncond": 0.0},
        {"model__compat": "seed", "model__moe": False, "model__freq": False},
        {"model__moe": False, "model__freq": False, "model__dsconv": False},
        {"model__freq": False, "model__dispatch": "stacked", "process__schedule": "cosine"},
    ],
    ids=lambda values: " ".join(f"{key[7:]}={value}" for key, value in values.items()),
)
def test_every_form_trains(fit: Fit, values: dict[str, Any]) -> None:
    folder = fit(train__epochs=3, **values)
    losses = [float(row["train/dm_loss"]) for row in rows(folder)]
    assert losses[2] < losses[0]
    found, seed = payload(folder, 3), values.get("model__compat") == "seed"
    averages = [name for name in found["model_state_dict"] if "running_" in name]
    assert bool(averages) == seed
    for name in averages:
        assert torch.equal(found["model_state_dict"][name], found["ema_state_dict"][name])
    if not values.get("model__moe", True):
        assert {row["train/load_loss"] for row in rows(folder)} == {"0.0"}
        assert "load/dead" not in rows(folder)[0]


def test_sixteen_images_are_learned_by_heart(fit: Fit, images_of: Callable[..., Any]) -> None:
    values = {"model__channels": 16, "train__batch_size": 16, "train__epochs": 5}
    folder = fit(source=images_of(16, copies=20), **values)
    losses = [float(row["train/dm_loss"]) for row in rows(folder)]
    assert losses[0] > 0.4
    assert losses[-1] < 0.15


def test_idle_experts_are_counted_and_told_of(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def one_sided(arguments: dict[str, Any]) -> UNet:
        model = build(arguments)
        experts_chosen(model, [9.0, 0.0, -9.0])
        return model

    with caplog.at_level(logging.WARNING):
        even = fit("even", train__batch_size=24, model__num_experts=2)
    assert not caplog.records
    assert rows(even)[0]["load/dead"] == "0.0"
    monkeypatch.setattr(train, "build", one_sided)
    with caplog.at_level(logging.WARNING):
        folder = fit(model__k_active=1)
    assert [record.getMessage() for record in caplog.records] == [
        "experts without an image in epoch 1: 6"
    ]
    row = rows(folder)[0]
    found = [float(row[f"load/{name}"]) for name in ("largest", "entropy", "dead")]
    assert found == pytest.approx([3, 0, 6])


def test_an_expert_that_every_image_goes_to_is_told_of(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def one_ahead(logits: torch.Tensor, k_active: int) -> torch.Tensor:
        return torch.tensor([0.5, 0.25, 0.25])

    monkeypatch.setattr(usage, "shares", one_ahead)
    values = {"train__epochs": 10, "model__num_experts": 3, "model__k_active": 2}
    with caplog.at_level(logging.WARNING):
        folder = fit(**values)
    told = [record.getMessage() for record in caplog.records]
    assert [float(row["load/largest"]) for row in rows(folder)] == pytest.approx([1.5] * 10)
    assert [line.partition(" (")[0] for line in told] == [
        f"one expert of a block gets every image in epoch {epoch}" for epoch in (1, 10)
    ]


def test_a_flat_folder_of_images_is_one_class(
    diffusion: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for number in range(12):
        Image.new("RGB", (9, 8), (20 * number, 90, 0)).save(tmp_path / f"{number}.png")
    values = {"data.image_size": 8, "model.channels": 8, "model.mults": [1, 2], "train.epochs": 1}
    values |= {"model.time_dim": 8, "train.sample_every": 1, "data.workers": 0}
    words = [f"--set={key}={value}" for key, value in values.items()]
    words += ["--data=folder", f"--data-dir={tmp_path}", "--out=run", "--cpu"]
    code, out, err = diffusion("train", *words)
    assert code == 0, err
    assert out == "run\n"
    facts = json.loads(Path("run/checkpoint_epoch_1.pth.json").read_text())
    assert facts["class_names"] == ["image"]
    assert facts["images"] == {"train": 11, "test": 1}
    with Image.open("run/samples/epoch_1.png") as picture:
        assert picture.width > 4 * picture.height


def test_a_resumed_training_has_the_same_images(own_run: Path, diffusion: Any) -> None:
    record = json.loads((own_run / "run.json").read_text())
    record["data"]["digest"] = "other"
    (own_run / "run.json").write_text(json.dumps(record))
    code, _, err = diffusion("train", "--resume", str(own_run), "--epochs", "3")
    assert code == 2
    assert "began with other images of digits" in err
