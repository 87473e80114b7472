import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.balpoe import inference
from moectl.balpoe.data import load
from moectl.balpoe.inference import (
    LOGITS,
    Classifier,
    _same_split,
    _tag,
    open_classifier,
    outputs_of,
)
from moectl.balpoe.logits import read_facts, read_outputs, write_outputs
from moectl.balpoe.settings import BalpoeSettings
from moectl.balpoe.train import build
from moectl.cli import _run
from moectl.engine.errors import UserError
from moectl.engine.launch import build_accelerator
from moectl.engine.settings import from_toml, resolve
from moectl.engine.sources import TensorSource

SMALL = {
    "data.dataset": "synthetic",
    "data.imbalance_ratio": "20",
    "data.image_size": "8",
    "model.experts": "2",
    "model.layer2_dimension": "16",
    "model.layer3_dimension": "16",
    "loss.tau_list": "0;2",
    "train.precision": "no",
    "train.tensorboard": "false",
}
FILES = ("val_logits", "val_labels", "test_logits", "test_labels")


def lines(*assignments: str) -> list[str]:
    changed = dict(assignment.split("=") for assignment in assignments)
    return [f"{name}={value}" for name, value in {**SMALL, **changed}.items()]


def settings_of(*assignments: str) -> BalpoeSettings:
    return resolve(BalpoeSettings, {}, lines(*assignments), [])[0]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights are those of the start: nothing here asks for good ones."""
    place = tmp_path_factory.mktemp("runs")
    state = build(settings_of(), 10).state_dict()
    torch.save({"state_dict": state, "epoch": 7}, place / "public.pth")
    words = [word for line in lines() for word in ("--set", line)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        arguments = [str(place / "public.pth"), *words, "--quiet", "--out", str(place / "run")]
        assert _run(["balpoe", "import", *arguments]) == 0
    return place / "run"


@pytest.fixture
def run(imported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(imported, tmp_path / "run"))


def opened(folder: Path, *assignments: str) -> Classifier:
    own = from_toml(BalpoeSettings, folder / "settings.toml")
    settings = settings_of(*assignments) if assignments else own
    return open_classifier(settings, str(folder), folder, cpu=True)


def kept(folder: Path) -> Path:
    (cache,) = (folder / "logits").iterdir()
    return cache


def fail(*_: object) -> None:
    raise AssertionError("computed again")


class Brightness(nn.Module):
    """Two experts for three classes, whose logits tell which image they belong to."""

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.stack([level, -level], 1)[:, :, None] * torch.tensor([1.0, 2.0, 3.0])


def bright(items: int) -> TensorSource:
    images = torch.arange(items, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return TensorSource(images, torch.arange(items) % 3, None, lambda chosen: chosen.float())


def accelerator(precision: str = "no") -> Any:
    return build_accelerator(settings_of().train, True, precision)


def test_outputs_tell_which_held_out_images_they_belong_to() -> None:
    settings = settings_of("eval.batch_size=37")
    data = load(settings.data, 1)
    model = build(settings, 10).eval()
    found = outputs_of(model, data, settings, accelerator(), "abc")
    assert (found.val_logits.shape, found.test_logits.shape) == ((80, 2, 10), (320, 2, 10))
    (images, labels) = next(iter(data.val.ordered(80, torch.device("cpu"))))
    with torch.no_grad():
        torch.testing.assert_close(found.val_logits, model(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.val_labels, labels)
    assert (found.val_indices, found.test_indices) == (data.val_indices, data.test_indices)
    assert found.taus == [0.0, 2.0]
    assert (found.class_counts, found.class_names) == (data.class_counts, data.class_names)
    assert found.weights == "abc"


def test_weights_are_opened_with_their_outputs_and_their_name(run: Path) -> None:
    found = opened(run)
    sidecar = json.loads((run / "checkpoint-epoch7.pth.json").read_text())
    assert found.weights == {
        "file": "checkpoint-epoch7.pth",
        "sha256": sidecar["sha256"],
        "epoch": 7,
    }
    assert (found.folder, found.tag, found.is_main) == (run, "last", True)
    assert found.outputs.weights == sidecar["sha256"]
    assert found.outputs.class_counts == sidecar["class_counts"]
    split = json.loads((run / "split.json").read_text())
    assert {"val": found.outputs.val_indices, "test": found.outputs.test_indices} == split


def test_outputs_are_computed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(run)
    assert kept(run).name == f"{first.weights['sha256'][:16]}.safetensors"
    for name in ("load", "rebuild", "outputs_of", "write_outputs"):
        monkeypatch.setattr(inference, name, fail)
    again = opened(run)
    for name in FILES:
        assert torch.equal(getattr(again.outputs, name), getattr(first.outputs, name))
    assert (again.weights, again.tag, again.folder) == (first.weights, first.tag, first.folder)


def test_moved_data_and_other_batches_need_no_new_outputs(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(run)
    monkeypatch.setattr(inference, "load", fail)
    opened(run, "data.root=elsewhere", "data.workers=0", "data.download=false")
    opened(run, "eval.batch_size=3", "plugin.rates=[0.5]")


@pytest.mark.parametrize("change", ["data.val_fraction=0.5", "train.seed=2"])
def test_images_divided_otherwise_are_refused_in_spite_of_kept_outputs(
    run: Path, change: str
) -> None:
    opened(run)
    before = kept(run).read_bytes()
    with pytest.raises(UserError, match=r"split\.json: the data is split otherwise now"):
        opened(run, change)
    assert kept(run).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.imbalance_ratio=5", "class_counts 100, 71, 51, 36, 26 …, the settings now give"),
        ("data.profile=reverse", "class_counts 100, 71, 51, 36, 26 …, the settings now give 5, "),
        ("loss.tau_list=0;1", r"taus 0\.0, 2\.0, the settings now give 0\.0, 1\.0"),
    ],
)
def test_another_training_is_refused_in_spite_of_kept_outputs(
    run: Path, change: str, told: str
) -> None:
    opened(run)
    with pytest.raises(UserError, match=f"the weights were trained with {told}"):
        opened(run, change)


def test_outputs_of_other_weights_are_not_used(run: Path) -> None:
    first = opened(run)
    cache, true = kept(run), first.outputs.test_logits
    key, foreign = read_facts(cache)["key"], {"test_logits": torch.zeros_like(true)}
    altered = type(first.outputs)(**{**vars(first.outputs), **foreign})
    write_outputs(cache, altered, {"key": key})
    assert not opened(run).outputs.test_logits.any()  # the name and the key are trusted
    write_outputs(cache, altered, {"key": key.replace(first.weights["sha256"], "0" * 64)})
    assert torch.equal(opened(run).outputs.test_logits, true)
    assert read_facts(cache)["key"] == key
    assert torch.equal(read_outputs(cache, 0.5, 0).test_logits, true)


def test_a_run_that_cannot_be_written_to_is_read_with_a_warning(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("moectl"), "propagate", True)
    (run / "logits").write_text("in the way of the folder")
    assert opened(run).outputs.test_logits.shape == (320, 2, 10)
    assert "not kept for the next time" in caplog.text


def test_weights_without_facts_are_sent_to_the_import(run: Path) -> None:
    (run / "checkpoint-epoch7.pth.json").unlink()
    with pytest.raises(UserError, match=r"has no checkpoint-epoch7\.pth\.json") as caught:
        opened(run)
    assert "balpoe import" in caught.value.hint


def test_a_run_of_somebody_elses_logits_has_no_weights_to_open(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = opened(run).outputs
    folder = tmp_path / "other"
    folder.mkdir()
    write_outputs(folder / LOGITS, outputs)
    monkeypatch.setattr(inference, "find_weights", fail)
    found = open_classifier(settings_of(), str(folder), folder, cpu=True)
    assert found.weights == {"file": LOGITS, "sha256": outputs.weights, "epoch": 0}
    assert (found.folder, found.tag, found.is_main) == (folder, "logits", True)
    assert torch.equal(found.outputs.val_logits, outputs.val_logits)


@pytest.mark.parametrize(
    ("reference", "tag"),
    [("latest", "last"), ("run@last", "last"), ("run@best", "best"), ("run@50", "epoch50")],
)
def test_results_are_named_after_the_weights(reference: str, tag: str) -> None:
    assert _tag(reference, 50) == tag


def test_results_of_a_weights_file_are_named_after_its_epoch(tmp_path: Path) -> None:
    file = tmp_path / "run@best"
    file.write_bytes(b"")
    assert _tag(str(file), 50) == "epoch50"


def test_another_division_is_refused(tmp_path: Path) -> None:
    _same_split(Path("x"), tmp_path, [1], [2])  # nothing is known of it
    (tmp_path / "split.json").write_text(json.dumps({"val": [1], "test": [2]}))
    _same_split(Path("x"), tmp_path, [1], [2])
    with pytest.raises(UserError, match="x: the data is split otherwise now"):
        _same_split(Path("x"), tmp_path, [2], [1])


def test_damaged_outputs_are_computed_again(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(run)
    whole = kept(run).read_bytes()
    kept(run).write_bytes(whole[: len(whole) // 2])
    again = opened(run)
    assert "computed again" in caplog.text
    assert torch.equal(first.outputs.test_logits, again.outputs.test_logits)
    assert len(kept(run).read_bytes()) == len(whole)
