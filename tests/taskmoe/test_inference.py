"""Opening a trained mixture, and the parts of what it says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.common.images import Plain
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.launch import build_accelerator
from moectl.engine.run import read_record
from moectl.engine.settings import dump, flatten, resolve
from moectl.engine.sources import TensorSource
from moectl.taskmoe.analysis import Examined
from moectl.taskmoe.inference import examine, for_task, open_mixture
from moectl.taskmoe.model import MergedMoE
from moectl.taskmoe.settings import TaskmoeSettings

LATER = "2999-01-01T00:00:00+00:00"
FORMS: dict[str, dict[str, Any]] = {
    "features": {"combine": "features"},
    "logits": {"combine": "logits"},
    "top 2 of features": {"combine": "features", "top_k": 2},
    "top 1 of logits": {"combine": "logits", "top_k": 1},
    "no by-pass": {"combine": "features", "gating_feature_dim": 0},
    "short trunk": {"combine": "features", "shared_until": "residual1"},
}


def mixture(**arguments: Any) -> MergedMoE:
    """An untrained mixture in which gates differ and every entry of batch norm matters."""
    torch.manual_seed(0)
    model = MergedMoE(**{"classes": 5, "width": 4, "gating_feature_dim": 12, **arguments})
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.2)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("gate_net.4.weight", "classifier.weight", "0.weight", "1.weight")):
            value.mul_(10)
    return model.eval()


def source(count: int) -> TensorSource:
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, 16, 16), generator=draws)
    light = torch.rand(count, 3, 1, 1, generator=draws)  # without it all gates are alike
    images = (noise * light).byte()
    return TensorSource(images, torch.arange(count) % 5, None, Plain([0.4] * 3, [0.3] * 3))


def examined(model: MergedMoE, count: int = 40, batches: int = 0) -> Examined:
    accelerator = build_accelerator(settings().train, cpu=True)
    return examine(model, source(count), accelerator, 16, batches)


def images(count: int = 40) -> Tensor:
    given = source(count)
    return given.plain(given.images)


def settings(**changes: Any) -> TaskmoeSettings:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return resolve(TaskmoeSettings, {"train.precision": "no", **named}, [], [])[0]


def request(folder: Path | None, reference: str = "", **asked: Any) -> Request:
    """What the command line makes of a reference to a run, with some settings on top."""
    named = {name.replace("__", "."): value for name, value in asked.items()}
    stored = folder / "settings.toml" if folder else None
    wanted, origin = resolve(TaskmoeSettings, named, [], [], stored)
    return Request(
        room="taskmoe",
        command="eval",
        settings=wanted,
        origin=origin,
        name="eval",
        cpu=True,
        out=None,
        resume="",
        folder=folder,
        run=reference or str(folder or ""),
    )


# The parts of the logits


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_add_up_to_what_the_model_says(form: str) -> None:
    model = mixture(**FORMS[form])
    found = examined(model)
    with torch.no_grad():
        expected = model(images())
    torch.testing.assert_close(found.logits(), expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.gates, expected.gates, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.gate_logits, expected.gate_logits, rtol=0, atol=1e-5)
    assert found.gates.std(0).max() > 0.01
    assert ((found.gates > 0).sum(1) == (model.top_k or 3)).all()
    assert found.top_k == model.top_k


@pytest.mark.parametrize("form", FORMS)
def test_they_do_so_for_any_gates(form: str) -> None:
    model, gates = mixture(**FORMS[form]), torch.tensor([0.2, 0.0, 0.8])
    with torch.no_grad():
        expected = model(images(), gates=gates).logits
    torch.testing.assert_close(examined(model).logits(gates), expected, rtol=0, atol=1e-5)


def test_parts_come_in_the_order_of_the_images_with_their_labels() -> None:
    found = examined(mixture(), 37)
    assert found.labels.tolist() == [number % 5 for number in range(37)]
    assert found.expert_logits.shape == (37, 3, 5)
    assert found.by_pass.shape == (37, 5)
    assert found.bias.shape == (5,)


def test_without_a_by_pass_its_part_is_nothing() -> None:
    assert not examined(mixture(gating_feature_dim=0)).by_pass.any()
    assert examined(mixture()).by_pass.any()


def test_only_the_first_batches_are_examined_on_request() -> None:
    model = mixture()
    some, everything = examined(model, batches=2), examined(model)
    assert len(some.labels) == 32
    assert torch.equal(some.logits(), everything.logits()[:32])


# Opening


@pytest.mark.parametrize(
    ("reference", "file", "tag", "epoch"),
    [
        ("{}/t", "best_model.pth", "best", None),
        ("{}/t@best", "best_model.pth", "best", None),
        ("{}/t@last", "last.pth", "last", 2),
        ("{}/t@0", "merged_model.pth", "epoch0", 0),
        ("{}/t/last.pth", "last.pth", "last", 2),
        ("{}/t/merged_model.pth", "merged_model.pth", "merged_model", 0),
    ],
)
def test_a_reference_is_opened_under_its_tag(
    runs: Path, reference: str, file: str, tag: str, epoch: int | None
) -> None:
    opened = open_mixture(request(runs / "t", reference.format(runs)), None, None)
    assert opened.weights["file"] == str(runs / "t" / file)
    assert (opened.tag, opened.folder) == (tag, runs / "t")
    assert opened.weights["epoch"] == (opened.facts["epoch"] if epoch is None else epoch)
    assert not opened.model.training
    assert float(opened.model.temperature) == pytest.approx(opened.facts["temperature"])


def test_the_newest_run_is_opened_by_the_folder_that_was_found(runs: Path) -> None:
    opened = open_mixture(request(runs / "t", "latest"), None, None)
    assert (opened.weights["file"], opened.tag) == (f"{runs}/t/best_model.pth", "best")


def test_a_checkpoint_goes_before_the_run(runs: Path) -> None:
    opened = open_mixture(request(None), runs / "m" / "merged_model.pth", None)
    assert (opened.tag, opened.folder) == ("merged_model", runs / "m")
    assert opened.accelerator.mixed_precision == read_record(runs / "m")["precision"] == "no"


def test_another_temperature_may_be_given(runs: Path) -> None:
    usual, other = (open_mixture(request(runs / "t"), None, given) for given in (None, 0.7))
    assert float(other.model.temperature) == pytest.approx(0.7)
    some = images()
    with torch.no_grad():
        expected = (usual.model(some).gate_logits / 0.7).softmax(1)
        torch.testing.assert_close(other.model(some).gates, expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperatures_must_be_above_0(runs: Path, temperature: float) -> None:
    with pytest.raises(UserError, match=f"--temperature {temperature}: expected a number above 0"):
        open_mixture(request(runs / "t"), None, temperature)


def test_a_specialist_is_not_opened(runs: Path) -> None:
    with pytest.raises(UserError, match="is specialist 1 of task digits, expected a mixture"):
        open_mixture(request(None), runs / "s1" / "best_model.pth", None)


def test_settings_take_task_and_split_of_the_weights(runs: Path) -> None:
    file = replace(request(None), origin={})
    opened = open_mixture(file, runs / "t" / "best_model.pth", None)
    assert (opened.settings.data.task, opened.settings.data.split_seed) == ("digits", 100)
    assert opened.data.class_names == opened.facts["class_names"]


def test_a_file_of_another_task_than_the_one_named_is_refused(runs: Path) -> None:
    wanted = for_task(request(None), "digits_overlap")
    message = r"best_model\.pth: has data\.task = digits, asked for is digits_overlap$"
    with pytest.raises(UserError, match=message):
        open_mixture(wanted, runs / "t" / "best_model.pth", None)
    top = request(runs / "t", model__top_k=1)
    with pytest.raises(UserError, match=r"has model\.top_k = 0, asked for is 1$"):
        open_mixture(top, None, None)


# Its data


def test_data_is_normalised_by_the_stored_statistics(runs: Path) -> None:
    opened = open_mixture(request(runs / "t"), None, None)
    assert [list(opened.data.mean), list(opened.data.std)] == [
        opened.facts["mean"],
        opened.facts["std"],
    ]
    other = open_mixture(request(runs / "t"), None, None)
    other.facts.update({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    assert (other.data.mean, other.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for one in (opened, other):
        found = one.data.test.plain(one.data.test.images[:2])
        raw = one.data.test.images[:2].double() / 255
        mean, std = (torch.tensor(one.facts[key]).view(3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(found, ((raw - mean) / std).float())


def test_data_is_loaded_once(runs: Path) -> None:
    opened = open_mixture(request(runs / "t"), None, None)
    assert opened.loaded is None
    assert opened.data is opened.data


def test_other_classes_than_those_of_the_weights_are_refused(runs: Path) -> None:
    opened = open_mixture(request(runs / "t"), None, None)
    opened.facts["class_names"] = ["cat", *opened.facts["class_names"][1:]]
    with pytest.raises(UserError, match=r"has the classes cat, 1, .* task digits 0, 1,") as caught:
        _ = opened.data
    assert caught.value.hint == "--set data.task=digits --set data.label_map=global"


def test_the_test_images_are_examined(runs: Path) -> None:
    opened = open_mixture(request(runs / "t"), None, None)
    found = opened.examine()
    stored = json.loads((runs / "t" / "results.json").read_text())["test"]
    assert torch.equal(found.labels, opened.data.test.labels)
    accuracy = (found.logits().argmax(1) == found.labels).double().mean()
    assert 100 * float(accuracy) == pytest.approx(stored["overall_accuracy"])


# Runs of a task


@pytest.fixture
def two_tasks(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of digits, and newer ones of another task and without an end."""
    root = tmp_path / "runs" / "taskmoe"
    monkeypatch.setenv("MOECTL_RUNS", str(root.parent))
    changes: dict[str, tuple[str, dict[str, str]]] = {
        "old": ("digits", {}),
        "failed": ("digits", {"status": "failed", "started": LATER}),
        "merge": ("digits", {"command": "merge", "started": LATER}),
        "other": ("digits_overlap", {"started": LATER}),
    }
    for name, (task, record) in changes.items():
        folder = shutil.copytree(runs / "t", root / name)
        (folder / "run.json").write_text(json.dumps({**read_record(folder), **record}))
        written = (folder / "settings.toml").read_text()
        (folder / "settings.toml").write_text(written.replace('"digits"', f'"{task}"'))
    return root


def test_the_newest_finished_training_of_a_task_is_found(two_tasks: Path) -> None:
    latest = request(two_tasks / "other", "latest")
    found = for_task(latest, "digits")
    assert (found.folder, found.run) == (two_tasks / "old", f"{two_tasks}/old@best")
    assert found.settings.data.task == "digits"  # type: ignore[attr-defined]
    assert for_task(latest, "digits_overlap").folder == two_tasks / "other"
    assert open_mixture(found, None, None).tag == "best"


def test_its_settings_keep_what_the_command_line_asks_for(two_tasks: Path) -> None:
    latest = request(two_tasks / "other", "latest", eval__batch_size=7)
    found, own = (
        flatten(dump(one))
        for one in (for_task(latest, "digits").settings, request(two_tasks / "old").settings)
    )
    assert found == {**own, "eval.batch_size": 7}


def test_a_task_without_a_training_is_an_error(two_tasks: Path) -> None:
    with pytest.raises(UserError, match="task A: no finished run of the training") as caught:
        for_task(request(two_tasks / "other", "latest"), "A")
    assert caught.value.hint == "moectl taskmoe train --task A"


def test_a_run_that_is_named_must_be_of_the_task(two_tasks: Path) -> None:
    named = request(two_tasks / "other", "other")
    assert for_task(named, "digits_overlap") is named
    with pytest.raises(UserError, match=r"other: is of task digits_overlap, not digits$"):
        for_task(named, "digits")


def test_without_a_task_the_request_stays_as_it_is(runs: Path) -> None:
    latest = request(runs / "t", "latest")
    assert for_task(latest, "") is latest


def test_for_a_file_the_task_goes_into_the_settings() -> None:
    file = request(None)
    found = for_task(file, "digits")
    assert found.settings.data.task == "digits"  # type: ignore[attr-defined]
    assert replace(found, settings=file.settings, origin=file.origin) == file
    assert file.settings.data.task == "A"  # type: ignore[attr-defined]
