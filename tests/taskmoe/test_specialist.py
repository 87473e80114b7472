"""Training of one specialist, and of the dense network beside the mixture."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.engine import artefact
from moectl.engine.errors import UserError
from moectl.engine.run import read_record
from moectl.engine.settings import resolve
from moectl.taskmoe.data import load
from moectl.taskmoe.model import MergedMoE, Specialist
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.specialist import build, facts_of, load_classes
from moectl.taskmoe.weights import read_specialist

Call = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")


def settings(number: int = 1, **changes: Any) -> TaskmoeSettings:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    tiny = {"data.task": "digits", "model.width": 4, "specialist.number": number}
    return resolve(TaskmoeSettings, {**tiny, **named}, [], [])[0]


def size(model: torch.nn.Module) -> int:
    return sum(part.numel() for part in model.parameters())


def parts(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the summary of a run and the rows of its metrics."""
    with (folder / "metrics.csv").open() as file:
        return json.loads((folder / "summary.json").read_text()), list(csv.DictReader(file))


# What it is made of


@pytest.mark.parametrize(("number", "ids"), [(1, [0, 1, 2]), (2, [3, 4, 5]), (3, [6, 7, 8])])
def test_a_specialist_knows_its_own_classes_alone(number: int, ids: list[int]) -> None:
    data = load_classes(settings(number))
    assert data.class_ids == ids
    for source in (data.train, data.val, data.test):
        assert set(source.labels.tolist()) == {0, 1, 2}
    assert build(settings(number), data).classifier[3].out_features == 3


def test_shared_classes_are_trained_by_each_owner() -> None:
    data = load_classes(settings(3, data__task="digits_overlap"))
    assert data.class_names == ["0", "6", "7", "8"]
    assert set(data.train.labels.tolist()) == {0, 1, 2, 3}


def test_number_0_knows_what_the_mixture_knows() -> None:
    wanted = settings(0)
    found, union = load_classes(wanted), load(wanted.data)
    assert found.class_names == union.class_names
    assert torch.equal(found.train.images, union.train.images)


@pytest.mark.parametrize("width", [4, 16])
def test_number_0_is_as_large_as_the_mixture(width: int) -> None:
    wanted = settings(0, model__width=width)
    model = build(wanted, load_classes(wanted))
    mixture = size(MergedMoE(classes=9, **wanted.model.model_dump()))
    own = model.conv1.conv.out_channels
    others = [size(Specialist(9, own + step)) for step in (-1, 1)]
    assert all(abs(size(model) - mixture) <= abs(other - mixture) for other in others)
    assert own > width


def test_initial_weights_depend_on_the_seed_alone() -> None:
    data = load_classes(settings())
    first = build(settings(), data).state_dict()
    torch.rand(5)
    again = build(settings(), data).state_dict()
    other = build(settings(train__seed=101), data).state_dict()
    assert all(torch.equal(first[name], value) for name, value in again.items())
    assert not torch.equal(first["conv1.conv.weight"], other["conv1.conv.weight"])


def test_the_facts_rebuild_it_and_name_its_classes() -> None:
    wanted = settings(2, model__dropout_expert=0.3)
    data = load_classes(wanted)
    facts = facts_of(wanted, data, build(wanted, data))
    assert facts["arguments"] == {"classes": 3, "width": 4, "dropout": 0.3}
    assert (facts["model"], facts["task"], facts["number"]) == ("Specialist", "digits", 2)
    assert (facts["class_names"], facts["class_ids"]) == (["3", "4", "5"], [3, 4, 5])
    assert (facts["mean"], facts["std"]) == (list(data.mean), list(data.std))
    model = Specialist(**facts["arguments"])
    model.load_state_dict(build(wanted, data).state_dict())
    assert json.loads(json.dumps(facts)) == facts


# What a run leaves behind


def test_the_best_epoch_on_validation_images_is_tested_though_not_the_last(taskmoe: Call) -> None:
    words = ("--task", "digits", "--width", "2", "--batch-size", "64", "--quiet")
    wild = ("--num-epochs", "4", "--lr", "0.5", "--set", "train.precision=no")  # soon sees nothing
    assert taskmoe("specialist", *words, *wild, "--out", "wild")[0] == 0
    summary, metrics = parts(Path("wild"))
    accuracies = [float(row["val/accuracy"]) for row in metrics]
    best = accuracies.index(max(accuracies)) + 1
    assert best < 4
    assert summary["best"]["epoch"] == best
    stored = artefact.load(Path("wild/best_model.pth"))
    assert stored.facts["epoch"] == stored.payload["epoch"] == best
    assert stored.payload["accuracy"] == pytest.approx(100 * max(accuracies))


def test_the_last_epoch_is_kept_too(runs: Path) -> None:
    last = artefact.load(runs / "s1" / "last.pth")
    assert last.facts["epoch"] == last.payload["epoch"] == 2
    files = {entry["file"]: entry["best"] for entry in read_record(runs / "s1")["weights"]}
    assert files == {"best_model.pth": True, "last.pth": False}


@pytest.mark.parametrize("number", [1, 3])
def test_the_best_weights_are_tested_on_the_specialists_own_classes(
    runs: Path, number: int
) -> None:
    summary, _ = parts(runs / f"s{number}")
    wanted = settings(number)
    member = read_specialist(runs / f"s{number}" / "best_model.pth", wanted, number)
    test = load_classes(wanted).test
    images, labels = next(iter(test.ordered(len(test), CPU)))
    with torch.no_grad():
        hits = member.model(images).argmax(1) == labels
    assert summary["best"]["images"] == len(test)
    assert summary["best"]["accuracy"] == pytest.approx(float(hits.double().mean()))
    own = {
        str(id): float(hits[labels == row].double().mean())
        for row, id in enumerate(member.class_ids)
    }
    assert summary["best"]["classes"] == pytest.approx(own)


def test_the_record_has_the_scores_and_the_report_is_written(runs: Path) -> None:
    summary, _ = parts(runs / "s1")
    assert read_record(runs / "s1")["scores"] == summary
    assert json.loads((runs / "s1" / "config.json").read_text())["specialist"] == {"number": 1}
    assert (runs / "s1" / "report.md").is_file()


def test_the_dense_network_is_trained_on_all_classes(taskmoe: Call) -> None:
    words = ("--task", "digits", "--width", "2", "--set", "model.gating_feature_dim=0")
    short = ("--num-epochs", "1", "--batch-size", "512", "--set", "train.precision=no", "--quiet")
    code, out, _ = taskmoe("specialist", *words, *short, "--specialist", "0", "--out", "dense")
    assert (code, out) == (0, "dense\n")
    summary, _ = parts(Path("dense"))
    assert summary["best"]["images"] == 647
    assert list(summary["best"]["classes"]) == list("012345678")
    assert artefact.load(Path("dense/best_model.pth")).facts["number"] == 0


def test_a_number_beyond_the_manifest_is_refused() -> None:
    with pytest.raises(UserError, match=r"number is 4, task digits has 3 specialists$"):
        load_classes(settings(4))
