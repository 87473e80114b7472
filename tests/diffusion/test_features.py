"""Features: the classifier and what is kept of it, Inception's weights, bytes and order."""

import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.common.images import Plain
from moectl.diffusion import features
from moectl.diffusion.data import Data, load
from moectl.diffusion.features import (
    Classifier,
    extract,
    extract_images,
    inception,
    quantised,
    to_bytes,
    trained_classifier,
)
from moectl.diffusion.settings import DataSection
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.sources import TensorSource

CPU = torch.device("cpu")


def source(images: Tensor, labels: Tensor) -> TensorSource:
    return TensorSource(images, labels, None, Plain((0.5,) * 3, (0.5,) * 3))


def numbered(count: int) -> TensorSource:
    """Images of one level each: the number of the image, which is its label too."""
    levels = torch.arange(count, dtype=torch.uint8)
    return source(levels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), levels.long())


def stripes(digest: str = "0123456789abcdef", classes: int = 2, side: int = 8) -> Data:
    """Bright on the left, or on the right."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (40, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40) % 2
    images[labels == 0, :, :, : side // 2] += 120
    images[labels == 1, :, :, side // 2 :] += 120
    part = source(images, labels)
    facts = {"dataset": "stripes", "image_size": side, "digest": digest}
    return Data(part, part, ["left", "right"][:classes], facts)


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trainings of 20 updates; counts them."""
    monkeypatch.setattr(features, "_FEWEST", 20)
    monkeypatch.setattr(features, "_EPOCHS", 1)
    trainings: list[int] = []
    real = features._train

    def counted(*inputs: Any) -> Classifier:
        trainings.append(len(inputs[0]))
        return real(*inputs)

    monkeypatch.setattr(features, "_train", counted)
    return trainings


def grey(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def test_bytes_are_the_nearest_levels() -> None:
    step = 2 / 255
    values = torch.tensor([-1.0, -1 + 0.49 * step, -1 + 0.51 * step, 0.0, 1 - 0.49 * step, 1.0])
    assert to_bytes(values).tolist() == [0, 0, 1, 128, 255, 255]
    assert to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    assert to_bytes(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.uint8


def test_bytes_survive_the_way_there_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    plain = Plain((0.5,) * 3, (0.5,) * 3)(levels.view(-1, 1, 1, 1).expand(-1, 3, 1, 1))
    assert torch.equal(to_bytes(plain)[:, 0].flatten(), levels)
    assert torch.equal(to_bytes(quantised(plain))[:, 0].flatten(), levels)
    assert torch.equal(quantised(quantised(plain)), quantised(plain))


def test_conversions_leave_the_images_alone() -> None:
    images = torch.tensor([-3.0, 0.1])
    to_bytes(images), quantised(images)
    assert images.tolist() == [-3.0, pytest.approx(0.1)]


def test_extract_keeps_the_order_and_gives_doubles(accelerator: Any) -> None:
    found, labels = extract(grey, numbered(23), accelerator, batch_size=5)
    assert found.shape == (23, 3)
    assert found.dtype == torch.float64
    assert labels.tolist() == list(range(23))
    assert torch.allclose(found[:, 0], torch.arange(23.0).double() / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (5, 5), (12, 12), (23, 23), (99, 23)])
def test_extract_stops_at_the_limit(accelerator: Any, limit: int, expected: int) -> None:
    seen: list[int] = []

    def give(images: Tensor) -> Tensor:
        seen.append(len(images))
        return grey(images)

    found, labels = extract(give, numbered(23), accelerator, batch_size=5, limit=limit)
    assert labels.tolist() == list(range(expected))
    assert len(found) == expected
    assert sum(seen) < expected + 5


def test_real_and_generated_images_take_the_same_way() -> None:
    from accelerate import Accelerator

    mixed, conv = Accelerator(cpu=True, mixed_precision="bf16"), Classifier(2).eval()
    part = numbered(20)
    real, _ = extract(conv.features, part, mixed, batch_size=4)
    images = torch.cat([images for images, _ in part.ordered(20, CPU)])
    noisy = images + 0.003 * torch.rand(images.shape) - 0.0015  # less than half a level
    assert torch.equal(real, extract_images(conv.features, noisy, 4, CPU))
    assert not real.requires_grad


def test_images_of_a_diverged_network_are_refused() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(RunFailed, match="diverged"):
        extract_images(grey, images, 2, CPU)


@pytest.mark.parametrize("side", [8, 9, 16, 33])
def test_the_classifier_takes_any_side(side: int) -> None:
    model, images = Classifier(7).eval(), torch.rand(2, 3, side, side)
    assert model.features(images).shape == (2, 128)
    assert torch.equal(model(images), model.head(model.features(images)))
    assert model(images).shape == (2, 7)


def test_the_classifier_learns_the_digits(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_FEWEST", 1)  # 12 epochs
    data = load(DataSection(dataset="digits", image_size=8, val_fraction=0.2))
    model, digest = trained_classifier(data, accelerator, tmp_path)
    logits, truth = extract(model, data.test, accelerator, batch_size=64)
    assert (logits.argmax(1) == truth).float().mean() >= 0.97
    assert len(digest) == 8
    assert not model.training


def test_a_classifier_is_trained_once(
    accelerator: Any, tmp_path: Path, short: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moectl")
    first, name = trained_classifier(stripes(), accelerator, tmp_path / "new" / "folder")
    again, same = trained_classifier(stripes(), accelerator, tmp_path / "new" / "folder")
    assert short == [40]
    assert name == same
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not one.requires_grad
    assert "100.0% of 40 held-out images right" in caplog.text
    kept = features.artefact.load(tmp_path / "new/folder/classifier-0123456789abcdef.pth")
    assert kept.sha256[:8] == name
    assert kept.facts["classes"] == ["left", "right"]
    assert kept.facts["image_size"] == 8
    assert kept.facts["test_accuracy"] == 1


def test_a_classifier_is_a_function_of_the_data_alone(
    accelerator: Any, tmp_path: Path, short: list[int]
) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    _, first = trained_classifier(stripes(), accelerator, tmp_path / "a")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    with torch.no_grad():
        _, second = trained_classifier(stripes(), accelerator, tmp_path / "b")
    assert first == second
    assert len(short) == 2


def test_a_classifier_of_something_else_is_trained_again(
    accelerator: Any, tmp_path: Path, short: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    trained_classifier(stripes(), accelerator, tmp_path)
    trained_classifier(stripes(side=16), accelerator, tmp_path)
    assert len(short) == 2
    path = tmp_path / "classifier-0123456789abcdef.pth"
    path.write_bytes(path.read_bytes()[:-10])
    trained_classifier(stripes(side=16), accelerator, tmp_path)
    assert len(short) == 3
    assert "trained again" in caplog.text
    trained_classifier(stripes("fedcba9876543210"), accelerator, tmp_path)
    assert len(short) == 4


def test_other_processes_read_what_the_first_has_written(
    accelerator: Any, tmp_path: Path, short: list[int]
) -> None:
    other: Any = SimpleNamespace(is_main_process=False, num_processes=1, device=CPU)
    with pytest.raises(UserError, match="cannot be read"):
        trained_classifier(stripes(), other, tmp_path)
    _, name = trained_classifier(stripes(), accelerator, tmp_path)
    assert trained_classifier(stripes(), other, tmp_path)[1] == name
    assert short == [40]


def test_one_class_is_refused(accelerator: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stripes: one class"):
        trained_classifier(stripes(classes=1), accelerator, tmp_path)


def test_a_cache_that_cannot_be_written_is_named(
    accelerator: Any, tmp_path: Path, short: list[int]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        trained_classifier(stripes(), accelerator, tmp_path / "file")


@pytest.mark.parametrize("turn", [False, True])
def test_a_large_set_is_thinned_and_keeps_all_classes(
    turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_KEPT", 100)
    rows = torch.arange(200)
    labels = rows % 10 if turn else rows // 20
    images, kept = features._held(source(torch.zeros(200, 3, 8, 8).byte(), labels), 10, CPU)
    assert 50 < len(kept) <= 100
    assert len(images) == len(kept)
    assert kept.unique().tolist() == list(range(10))


def test_a_small_set_is_held_as_its_own_bytes() -> None:
    images, labels = features._held(numbered(200), 10, CPU)
    assert torch.equal(images, numbered(200).images)
    assert labels.tolist() == list(range(200))


def test_inception_without_its_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="torch-fidelity") as refusal:
        inception(None)
    assert refusal.value.hint == "pip install 'moectl[fid]'"


def test_offline_weights_come_from_the_cache_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("network"))
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError, match="MOECTL_OFFLINE forbids"):
        features._hub_file()
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    path.touch()
    assert features._hub_file() == path


def test_a_failed_download_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match="no route"):
        features._hub_file()


class _Trap:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of a weights file has run')",)


def test_code_in_a_weights_file_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": _Trap()}, path)
    with pytest.raises(UserError, match="not read for safety"):
        features._tensors(path)
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(UserError, match=r"weights\.pth"):
        features._tensors(path)


def test_weights_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        features._tensors(tmp_path / "absent.pth")
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"):
        features._tensors(path)


def test_inception_gives_2048_features_of_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity", reason="torch-fidelity (moectl[fid]) is not installed")
    from torchmetrics.image.fid import NoTrainInceptionV3

    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    with pytest.raises(UserError, match="not the weights of Inception-v3"):
        inception(empty)

    with monkeypatch.context() as patch:
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        copy: Any = io.BytesIO()
        torch.save({}, copy)
        copy.seek(0)
        untrained = NoTrainInceptionV3("inception-v3-compat", ["2048"], copy)
    path = tmp_path / "weights.pth"
    torch.save(untrained.state_dict(), path)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    model = inception(path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "not the published weights" in caplog.text
    assert not model.training
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found = extract_images(lambda batch: model(to_bytes(batch)), images, 2, CPU)
    assert found.shape == (2, 2048)
    assert torch.equal(found.float(), untrained(to_bytes(images)))
