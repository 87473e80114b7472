import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from moectl.balpoe.data import load
from moectl.balpoe.longtail import class_sizes, select
from moectl.balpoe.settings import DataSection
from moectl.engine.errors import UserError
from moectl.engine.sources import Stream

CPU = torch.device("cpu")


def everything(source):
    images, labels = zip(*source.ordered(500, CPU), strict=True)
    return torch.cat(images), torch.cat(labels)


def first_batch(source, size=64):
    chunks = Stream(len(source), size, seed=0).epoch(0)
    return next(iter(source.batches(chunks, 0, CPU)))


def counts(labels):
    return torch.bincount(labels).tolist()


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
@pytest.mark.parametrize("profile", ["exp", "step", "reverse"])
def test_embedded_sets_have_the_long_tail_of_the_settings(dataset, profile):
    data = load(DataSection(dataset=dataset, imbalance_ratio=20, profile=profile), 1)
    expected = class_sizes(data.facts["n_max"], 10, 1 / 20, profile)
    assert data.class_counts == expected == counts(everything(data.train)[1])
    assert len(data.class_names) == len(set(data.class_names)) == 10


def test_digits_have_their_known_sizes():
    data = load(DataSection(dataset="digits", imbalance_ratio=20), 1)
    assert data.class_counts == [104, 74, 53, 38, 27, 19, 14, 10, 7, 5]
    assert (len(data.train), len(data.val), len(data.test)) == (351, 143, 576)


def test_digits_are_enlarged_and_keep_their_grey_levels():
    small = load(DataSection(dataset="digits"), 1)
    large = load(DataSection(dataset="digits", image_size=16), 1)
    assert small.facts["image_size"] == 8
    assert large.facts["image_size"] == 16
    levels = (everything(small.test)[0] * 0.35 + 0.3) * 255
    assert levels.min().item() == pytest.approx(0, abs=1e-3)
    assert levels.max().item() == pytest.approx(255, abs=1e-3)
    assert everything(large.test)[0].shape[1:] == (3, 16, 16)
    assert abs(everything(large.train)[0].mean()) < 0.2
    assert everything(large.train)[0].std().item() == pytest.approx(1, abs=0.15)


def test_held_out_parts_are_stratified_and_seeded():
    section = DataSection(dataset="synthetic")
    data, again, other = load(section, 1), load(section, 1), load(section, 2)
    assert counts(everything(data.val)[1]) == [8] * 10
    assert counts(everything(data.test)[1]) == [32] * 10
    assert sorted(data.val_indices + data.test_indices) == list(range(400))
    assert data.val_indices == again.val_indices != other.val_indices
    assert torch.equal(everything(data.val)[0], everything(again.val)[0])


def test_indices_tell_which_held_out_images_the_parts_hold():
    first, second = (load(DataSection(dataset="synthetic"), seed) for seed in (1, 2))
    whole = torch.zeros(400, 3, 16, 16)
    for data in (first, second):
        held = torch.zeros(400, 3, 16, 16)
        held[data.val_indices] = everything(data.val)[0]
        held[data.test_indices] = everything(data.test)[0]
        assert whole.eq(0).all() or torch.equal(held, whole)
        whole = held


def test_training_images_are_the_same_for_every_seed():
    section = DataSection(dataset="digits", imbalance_ratio=10)
    first, second = everything(load(section, 1).train), everything(load(section, 2).train)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_linear_model_learns_the_synthetic_classes():
    data = load(DataSection(dataset="synthetic", imbalance_ratio=1), 1)
    (images, labels), (new_images, new_labels) = everything(data.train), everything(data.test)
    targets = torch.nn.functional.one_hot(labels).float()
    flat = images.flatten(1)
    weights = torch.linalg.solve(flat.T @ flat + 100 * torch.eye(flat.shape[1]), flat.T @ targets)
    accuracy = ((new_images.flatten(1) @ weights).argmax(1) == new_labels).float().mean()
    assert accuracy > 0.5


@pytest.mark.parametrize("augment", ["standard", "autoaugment", "trivial"])
@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_training_batches_are_augmented_but_evaluation_is_not(dataset, augment):
    data = load(DataSection(dataset=dataset, augment=augment, cutout=True), 1)
    images, labels = first_batch(data.train)
    order = Stream(len(data.train), 64, seed=0).order(0)[:64]
    plain, plain_labels = everything(data.train)
    assert torch.equal(labels, plain_labels[order])
    assert images.shape == plain[order].shape
    assert images.dtype == torch.float32
    assert (images != plain[order]).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(everything(data.test)[0], everything(data.test)[0])


def test_facts_are_plain_values():
    facts = load(DataSection(dataset="synthetic", imbalance_ratio=50), 1).facts
    assert json.loads(json.dumps(facts))["imbalance_ratio"] == 50
    assert facts["n_max"] == 100


def test_a_data_set_without_a_few_shot_class_loads():
    data = load(DataSection(dataset="synthetic", imbalance_ratio=1), 1)
    assert data.class_counts == [100] * 10


def test_a_ratio_that_empties_a_class_is_refused():
    with pytest.raises(UserError, match=r"imbalance_ratio is 1000.* without images") as caught:
        load(DataSection(dataset="digits", imbalance_ratio=1000), 1)
    assert "at most 104" in caught.value.hint


def test_randaugment_is_refused_for_images_in_memory():
    with pytest.raises(UserError, match=r"data\.augment is randaugment"):
        load(DataSection(dataset="digits", augment="randaugment"), 1)


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """Ten classes with 20 training and 10 test images each, in the files of CIFAR-10."""
    kind = datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name, per_class in [("data_batch_1", 20), ("test_batch", 10)]:
        pixels = draws.integers(0, 256, (per_class * 10, 3072), dtype=np.uint8)
        labels = list(range(10)) * per_class
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    return tmp_path


def test_cifar_images_are_read_in_the_order_of_the_recipe(fake_cifar):
    data = load(DataSection(dataset="cifar10", root=fake_cifar, imbalance_ratio=10), 1)
    assert data.class_counts == class_sizes(20, 10, 0.1, "exp")
    assert data.class_names == list("abcdefghij")
    assert (len(data.val), len(data.test)) == (20, 80)
    official = datasets.CIFAR10(fake_cifar)
    rows = select(official.targets, data.class_counts)
    mean, std = torch.tensor([(0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)])[..., None, None]
    expected = (torch.from_numpy(official.data[rows]).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(everything(data.train)[0], expected, atol=2e-6, rtol=0)


def test_cifar_images_are_not_resized():
    with pytest.raises(UserError, match=r"image_size is 64.*32 x 32"):
        load(DataSection(dataset="cifar100", image_size=64), 1)


@pytest.fixture(scope="session")
def cifar100():
    """Folder that holds the official CIFAR-100 files."""
    place = os.environ.get("MOECTL_TEST_DATA")
    if not place:
        pytest.skip("MOECTL_TEST_DATA names no folder with cifar100/cifar-100-python")
    root = Path(place) / "cifar100"
    if not (root / "cifar-100-python" / "train").is_file():
        pytest.skip(f"{root / 'cifar-100-python'} is missing")
    return root


def test_real_cifar100_has_the_published_long_tail(cifar100):
    section = DataSection(dataset="cifar100", root=cifar100, imbalance_ratio=100, download=False)
    data = load(section, 1)
    labels = everything(data.train)[1]
    assert len(data.train) == sum(data.class_counts) == 10847
    assert counts(labels) == data.class_counts == class_sizes(500, 100, 0.01, "exp")
    assert counts(everything(data.val)[1]) == [20] * 100
    assert counts(everything(data.test)[1]) == [80] * 100
    assert data.class_names[:3] == ["apple", "aquarium_fish", "baby"]
    official = datasets.CIFAR100(cifar100)
    last = [row for row, label in enumerate(official.targets) if label == 99]
    rows = select(official.targets, data.class_counts)[-5:]
    assert set(rows.tolist()) <= set(last)
    assert first_batch(data.train, 128)[0].shape == (128, 3, 32, 32)
