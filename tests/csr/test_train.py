"""Training in three stages, through the whole engine."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.csr import train as module
from moectl.csr.metrics import ranking
from moectl.csr.prototypes import Revived, diagnostics, revive
from moectl.csr.stages import STAGES, Training
from moectl.csr.synthetic import glyphs
from moectl.csr.train import train
from moectl.engine.files import sha256

Weights = dict[str, Tensor]
NewRun = Callable[..., Any]

FILES = (
    "best_model_stage1.pth",
    "model_stage2_epoch2.pth",
    "best_model_stage3.pth",
    "final_model.pth",
)
MOVED = {
    "concept": {"backbone", "concept_head"},
    "prototype": {"projector", "prototypes"},
    "task": {"task_head", "task_mean", "task_std"},
}
SMALL = {"data__synthetic_images": 48}
STILL = {"optim__lr": 1e-12}


def weights(path: Path) -> Weights:
    found: Weights = torch.load(path, weights_only=True)
    return found


def rows(folder: Path, stage: str) -> list[dict[str, str]]:
    with (folder / f"metrics_{stage}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def moved(before: Weights, after: Weights) -> set[str]:
    """Return the parts of which any bit has changed."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def begun(new_run: NewRun) -> Iterable[Callable[..., Training]]:
    """Make the training of a run that has not begun."""
    runs = []

    def make(**changes: Any) -> Training:
        run = new_run(**changes)
        runs.append(run.__enter__())
        return Training(run.settings, run)

    yield make
    for run in runs:
        run.__exit__(None, None, None)


# Files


def test_every_stage_leaves_the_files_of_the_original(finished_run: Path) -> None:
    assert {path.name for path in finished_run.glob("*.pth")} == set(FILES)
    record = json.loads((finished_run / "run.json").read_text())
    assert [entry["file"] for entry in record["weights"]] == list(FILES)
    assert list(record["scores"]) == ["task", "prototype", "concept"]
    assert record["scores"]["concept"]["epoch"] == record["weights"][0]["epoch"]
    assert next(name for name in record["scores"]["task"] if name != "epoch") == "task_auroc"
    stages = ("concept", "prototype", "task", "task")
    for name, stage in zip(FILES, stages, strict=True):
        sidecar = json.loads((finished_run / f"{name}.json").read_text())
        assert (sidecar["model"], sidecar["stage"], sidecar["file"]) == ("CSRNet", stage, name)
        assert sidecar["sha256"] == sha256((finished_run / name).read_bytes())
        assert sidecar["concepts"] == ["square", "ring", "plus", "stripes"]
        assert len(sidecar["targets"]) == 3
        assert sidecar["backbone"]["kind"] == "tiny"
        assert sidecar["arguments"]["num_prototypes"] == 5
        assert np.shape(sidecar["statistics"]) == (2, 3)


@pytest.mark.parametrize("name", FILES)
def test_files_hold_bare_tensors_that_fit_the_network(
    finished_run: Path, begun: Callable[..., Training], name: str
) -> None:
    state = weights(finished_run / name)
    assert all(isinstance(value, Tensor) for value in state.values())
    begun().model.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "stage", "score"),
    [
        ("best_model_stage1.pth", "concept", "val/concept_auroc"),
        ("best_model_stage3.pth", "task", "val/task_auroc"),
    ],
)
def test_the_best_epoch_is_that_of_the_largest_auroc(
    finished_run: Path, name: str, stage: str, score: str
) -> None:
    values = [float(row[score]) for row in rows(finished_run, stage)]
    sidecar = json.loads((finished_run / f"{name}.json").read_text())
    assert sidecar["epoch"] == values.index(max(values)) + 1
    assert sidecar["scores"][score] == pytest.approx(max(values))


@pytest.mark.parametrize(
    ("run_stage", "scores", "score", "name"),
    [
        (module.train_concepts, "_concept_scores", "val/concept_auroc", FILES[0]),
        (module.train_task, "task_scores", "val/task_auroc", FILES[2]),
    ],
    ids=["concept", "task"],
)
def test_the_best_file_holds_the_weights_of_the_best_epoch(
    begun: Callable[..., Training],
    monkeypatch: pytest.MonkeyPatch,
    run_stage: Callable[[Training], None],
    scores: str,
    score: str,
    name: str,
) -> None:
    training, seen = begun(**SMALL), []

    def worse_and_worse(*_: Any) -> dict[str, float]:
        state = training.model.state_dict()
        seen.append({name: value.clone() for name, value in state.items()})
        return {score: 1 / len(seen)}

    monkeypatch.setattr(module, scores, worse_and_worse)
    run_stage(training)
    best = weights(training.run.folder / name)
    assert not moved(best, seen[0])
    assert moved(best, seen[-1])
    if run_stage is module.train_task:
        assert not moved(seen[-1], weights(training.run.folder / "final_model.pth"))


def test_prototypes_are_written_every_fifth_epoch_and_after_the_last(
    begun: Callable[..., Training],
) -> None:
    training = begun(train__epochs_stage2=6, **SMALL)
    module.train_prototypes(training)
    names = {path.name for path in training.run.folder.glob("*.pth")}
    assert names == {"model_stage2_epoch5.pth", "model_stage2_epoch6.pth"}


def test_a_stage_that_ends_early_writes_its_last_epoch(begun: Callable[..., Training]) -> None:
    training = begun(train__epochs_stage2=6, train__patience=1, **SMALL, **STILL)
    module.train_prototypes(training)
    (path,) = training.run.folder.glob("*.pth")
    assert path.name == "model_stage2_epoch2.pth"


def test_one_stage_alone_is_the_same_as_in_a_whole_run(finished_run: Path, new_run: NewRun) -> None:
    with new_run() as run:
        train(run.settings, run, ["concept"])
    (path,) = run.folder.glob("*.pth")
    assert path.name == FILES[0]
    assert path.read_bytes() == (finished_run / FILES[0]).read_bytes()
    assert not (run.folder / "metrics_prototype.csv").exists()


# What moves


@pytest.mark.parametrize("projector", ["mlp", "ibn"])
def test_frozen_parts_stay_bit_identical_over_each_stage(
    finished_run: Path, new_run: NewRun, projector: str
) -> None:
    folder = finished_run
    with new_run(model__projector=projector) as run:
        before = {
            name: value.clone()
            for name, value in Training(run.settings, run).model.state_dict().items()
        }
        if projector == "ibn":  # its norms have batch statistics, too
            train(run.settings, run, STAGES)
            folder = run.folder
    statistics = [name for name in before if "running_mean" in name]
    assert any(name.startswith("backbone") for name in statistics)
    assert any(name.startswith("projector") for name in statistics) == (projector == "ibn")
    for stage, name in zip(STAGES, FILES[:3], strict=True):
        after = weights(folder / name)
        assert moved(before, after) == MOVED[stage]
        for buffer in statistics:
            changed = not torch.equal(before[buffer], after[buffer])
            assert changed == (buffer.split(".")[0] in MOVED[stage])
        before = after
    assert moved(before, weights(folder / FILES[3])) <= {"task_head"}


def test_prototypes_have_unit_length_after_their_stage(finished_run: Path) -> None:
    for name in FILES[1:]:
        lengths = weights(finished_run / name)["prototypes"].flatten(1).norm(dim=1)
        assert lengths == pytest.approx(torch.ones(4 * 5), abs=1e-6)


def test_rates_and_decay_are_those_of_their_parts(begun: Callable[..., Training]) -> None:
    training = begun(optim__weight_decay=0.5, **SMALL)
    model = training.model
    for stage, factors in (
        ("concept", {"backbone": 0.1}),
        ("prototype", {"projector": 10.0, "prototypes": 10.0}),
        ("task", {"task_head": 3.0}),
    ):
        loop = training.loop(stage, training.data.train.source, factors, 1, "")  # type: ignore[arg-type]
        groups = loop.optimizer.param_groups
        found = {id(one): group for group in groups for one in group["params"]}
        wanted = model.stage_parameters(stage)  # type: ignore[arg-type]
        assert len(found) == sum(len(parameters) for parameters in wanted.values())
        for name, parameters in wanted.items():
            for one in parameters:
                group = found[id(one)]
                assert group["lr"] == pytest.approx(1e-3 * factors.get(name, 1.0))
                bare = name == "prototypes" or one.ndim < 2
                assert group["weight_decay"] == (0.0 if bare else 0.5)


def test_the_verdict_sees_standardised_similarities(
    finished_run: Path, begun: Callable[..., Training]
) -> None:
    training = begun()
    training.model.load_state_dict(weights(finished_run / "final_model.pth"))
    inputs = training.model.task_inputs(
        training.outputs(training.data.train, "similarity_scores").similarity_scores
    )
    assert inputs.mean(0) == pytest.approx(torch.zeros(20), abs=1e-4)
    assert inputs.std(0) == pytest.approx(torch.ones(20), abs=1e-4)


@pytest.mark.parametrize("task_input", ["all", "max"])
def test_without_a_norm_the_verdict_sees_plain_similarities(
    begun: Callable[..., Training], task_input: str
) -> None:
    changes = {"model__task_norm": "none", "model__task_input": task_input}
    training = begun(train__epochs_stage3=1, **changes, **SMALL)
    module.train_task(training)
    state = weights(training.run.folder / "final_model.pth")
    assert state["task_mean"].shape == ((20,) if task_input == "all" else (4,))
    assert not state["task_mean"].any()
    assert bool((state["task_std"] == 1).all())


# Learning


def test_concepts_are_learned(begun: Callable[..., Training]) -> None:
    """Images that were never seen: chance is 0.5, the least that is accepted 0.85."""
    changes = {"data__synthetic_images": 240, "data__degrees": 0.0, "data__jitter": 0.0}
    training = begun(train__epochs_stage1=7, optim__lr=3e-3, **changes)

    def auroc() -> float:
        part = training.data.test
        training.forget_features()
        logits = training.outputs(part, "concept_logits").concept_logits.numpy()
        found: float = ranking(logits, part.concepts.numpy(), training.data.concepts)["auroc_macro"]
        return found

    assert auroc() < 0.7
    module.train_concepts(training)
    assert auroc() > 0.85


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_every_stage_falls(finished_run: Path, stage: str) -> None:
    losses = [float(row["train/loss"]) for row in rows(finished_run, stage)]
    assert losses[-1] < 0.98 * losses[0]


# Prototypes


def coverage(training: Training) -> float:
    vectors, concepts = module._pairs(training, training.data.train)
    return diagnostics(training.model.prototype_vectors, vectors, concepts).coverage


def test_prototypes_may_begin_among_the_vectors(begun: Callable[..., Training]) -> None:
    found = {}
    for how in ("random", "sample", "kmeans"):
        training = begun(prototype__init=how, train__epochs_stage2=1, **SMALL, **STILL)
        module.train_prototypes(training)
        found[how] = coverage(training)
    assert found["random"] < 0.8
    assert found["sample"] > 0.9
    assert found["kmeans"] > found["sample"]


def test_revival_moves_dead_prototypes_and_clears_their_moments(
    begun: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"prototype__revive_every": 1, "prototype__loss": "infonce"}
    training = begun(train__epochs_stage2=3, **changes, **SMALL)
    results: list[Revived] = []
    epochs = []

    def recorded(*words: Any) -> Revived:
        results.append(revive(*words))
        return results[-1]

    own = module._revive

    def watched(training: Training, loop: Any, epoch: int) -> None:
        state = loop.optimizer.state[training.model.prototypes]
        names = ("exp_avg", "exp_avg_sq")
        before = {name: state[name].clone() for name in names}
        own(training, loop, epoch)
        epochs.append(epoch)
        rows = results[-1].moved.flatten()
        assert rows.any()
        assert torch.equal(training.model.prototype_vectors, results[-1].prototypes)
        for name in names:
            assert before[name][rows].any(), "there was something to forget"
            assert not state[name][rows].any()
            assert torch.equal(state[name][~rows], before[name][~rows])

    monkeypatch.setattr(module, "revive", recorded)
    monkeypatch.setattr(module, "_revive", watched)
    module.train_prototypes(training)
    assert epochs == [1, 2], "after the last epoch nothing would train them"


# Losses


def first_losses(
    begun: Callable[..., Training],
    stage: str,
    run_stage: Callable[[Training], None],
    options: list[dict[str, Any]],
) -> list[float]:
    """Mean loss of the first epoch with each of some options."""
    found = []
    epochs = {f"train__epochs_stage{STAGES.index(stage) + 1}": 1}
    for changes in options:
        training = begun(**SMALL, **epochs, **changes)
        run_stage(training)
        (row,) = rows(training.run.folder, stage)
        found.append(float(row["train/loss"]))
    assert np.isfinite(found).all()
    return found


def test_every_loss_of_the_concepts_is_another(begun: Callable[..., Training]) -> None:
    options: list[dict[str, Any]] = [
        {"concept__loss": name} for name in ("bce", "focal", "asymmetric")
    ]
    options += [{"concept__loc_loss": "hinge"}, {"concept__alpha": 0.5}, {"concept__beta": 0.0}]
    options += [{"concept__pos_weight_cap": 1.0}]
    found = first_losses(begun, "concept", module.train_concepts, options)
    assert len(set(found)) == len(options)


def test_every_loss_of_the_prototypes_is_another(begun: Callable[..., Training]) -> None:
    options: list[dict[str, Any]] = [
        {"prototype__margin_mode": mode} for mode in ("subtract", "add", "numerator", "none")
    ]
    options += [{"prototype__loss": "infonce"}, {"prototype__diversity_weight": 5.0}]
    options += [{"prototype__loss": "infonce", "prototype__temperature": 0.1}]
    found = first_losses(begun, "prototype", module.train_prototypes, options)
    assert len(set(found)) == len(options)


def test_every_loss_of_the_task_is_another(begun: Callable[..., Training]) -> None:
    names = ("bce", "bce_pos_weight", "focal", "asymmetric", "class_balanced")
    found = first_losses(begun, "task", module.train_task, [{"task__loss": name} for name in names])
    assert len(set(found)) == len(names)


def test_one_class_per_image_is_trained_from_files(tmp_path: Path, new_run: NewRun) -> None:
    from PIL import Image

    changes: dict[str, Any] = {"data__dataset": "csv", "data__task_mode": "multiclass"}
    for part, count, seed in (("train", 40, 1), ("test", 8, 2)):
        drawn = glyphs(count, seed)
        (tmp_path / part).mkdir()
        lines = ["image_id,square,ring,plus,stripes,Pneumonia"]
        for name, image, present in zip(
            drawn.labels.image_ids, drawn.images, drawn.labels.concept_values, strict=True
        ):
            Image.fromarray((image[0] * 255).astype(np.uint8)).save(tmp_path / part / f"{name}.png")
            values = [str(int(value)) for value in present]
            lines.append(",".join([name, *values, "round" if present[1] else "flat"]))
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
        changes[f"data__{part}_csv"] = tmp_path / f"{part}.csv"
        changes[f"data__{part}_dir"] = tmp_path / part
    epochs = {f"train__epochs_stage{number}": 1 for number in (1, 2, 3)}
    with new_run(task__loss="ce", **changes, **epochs) as run:
        train(run.settings, run, STAGES)
    (row,) = rows(run.folder, "task")
    assert 0 <= float(row["val/macro_f1"]) <= 1
    assert "train/loss_boxes" not in rows(run.folder, "concept")[0], "there are no boxes"
    sidecar = json.loads((run.folder / "final_model.pth.json").read_text())
    assert sidecar["targets"] == ["flat", "round"]
    assert weights(run.folder / "final_model.pth")["task_head.weight"].shape == (2, 20)
