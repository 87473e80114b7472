"""The official CIFAR files: what they hold, and what is said where they are missing or damaged."""

import pickle

import numpy as np
import pytest
from torchvision import datasets

from moectl.engine.cifar import read_cifar
from moectl.engine.errors import UserError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Tiny files in the layout of CIFAR-10."""
    kind = datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for name, count in [("data_batch_1", 20), ("test_batch", 10)]:
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [row % 10 for row in range(count)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    return tmp_path


def test_both_parts_are_read(files):
    train, test = read_cifar("cifar10", files, download=False)
    assert train.data.shape == (20, 32, 32, 3)
    assert test.targets == list(range(10))
    assert train.classes == list("abcdefghij")


@pytest.mark.parametrize("way", ["setting", "environment"])
@pytest.mark.parametrize("lost", ["test_batch", "batches.meta"])
def test_a_missing_file_is_named(files, monkeypatch, way, lost):
    (files / "cifar-10-batches-py" / lost).unlink()
    if way == "environment":
        monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        read_cifar("cifar10", files, download=way == "environment")
    assert f"{files / 'cifar-10-batches-py'}: {lost} not found" in caught.value.message
    assert "cifar-10-python.tar.gz" in caught.value.hint


def test_missing_files_are_named_with_their_place(tmp_path):
    with pytest.raises(UserError) as caught:
        read_cifar("cifar100", tmp_path, download=False)
    assert str(tmp_path / "cifar-100-python") in caught.value.message
    assert "train, test, meta not found" in caught.value.message
    assert "cifar-100-python.tar.gz" in caught.value.hint


def test_damaged_files_are_named(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"train, test, meta are not the official files"):
        read_cifar("cifar100", tmp_path, download=True)


def test_a_failed_download_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("MOECTL_OFFLINE", raising=False)

    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR100, "download", fail)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\)"):
        read_cifar("cifar100", tmp_path, download=True)
