"""Images of the hub, read from folders that its library takes for data sets; never the network."""

import socket

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from moectl.diffusion.data import load
from moectl.diffusion.settings import DataSection
from moectl.engine.errors import UserError

CPU = torch.device("cpu")
NAMES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def without_network(tmp_path, monkeypatch):
    """Keep the library's files in a folder of the test; return the places it tried to reach."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tried, connect = [], socket.socket.connect

    def refuse(self, place):
        if isinstance(place, str):  # another process here
            return connect(self, place)
        tried.append(place)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **_: refuse(None, place))
    return tried


@pytest.fixture
def publish(tmp_path):
    """Write the parts of a data set: part=(images, labels), labels None for a set without."""

    def write(name="own", **parts):
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        for part, (images, labels) in parts.items():
            columns = {"note": [str(number) for number in range(len(images))], "picture": images}
            features = {"note": datasets.Value("string"), "picture": datasets.Image()}
            if labels is not None:
                columns["kind"] = labels
                features["kind"] = datasets.ClassLabel(names=NAMES)
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            table.to_parquet(folder / "data" / f"{part}-00000-of-00001.parquet")
        return str(folder)

    datasets.disable_progress_bars()
    yield write
    datasets.enable_progress_bars()


def pictures(count, level=None, mode="RGB"):
    draws = np.random.default_rng(count)
    return [
        Image.fromarray(
            np.full((8, 8, 3), level, np.uint8)
            if level is not None
            else draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        ).convert(mode)
        for _ in range(count)
    ]


def section(name, **values):
    return DataSection(
        **{"dataset": "hub", "name": name, "image_size": 8, "workers": 0, "download": False}
        | values
    )


def everything(source):
    images, labels = zip(*source.ordered(5, CPU), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_set_with_a_test_part_is_divided_as_it_is(publish):
    images = pictures(6)
    name = publish(train=(images, [0, 1] * 3), test=(pictures(2, 255), [1, 0]))
    data = load(section(name))
    assert data.class_names == NAMES
    assert data.facts["images"] == {"train": 6, "test": 2}
    found, labels = everything(data.train)
    expected = np.stack([np.asarray(one) for one in images]).transpose(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-6, rtol=0)
    assert labels.tolist() == [0, 1] * 3
    found, labels = everything(data.test)
    assert (found == 1).all()
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_set_without_a_test_part_is_divided_by_a_share(publish, workers):
    name = publish(train=(pictures(20, mode="L"), [0] * 10 + [1] * 10))
    data = load(section(name, val_fraction=0.2, workers=workers))
    assert data.facts["images"] == {"train": 16, "test": 4}
    images, labels = everything(data.test)
    assert images.shape == (4, 3, 8, 8)
    assert torch.bincount(labels).tolist() == [2, 2]


def test_only_part_of_a_set_is_not_trained_and_measured_on_alike(publish):
    data = load(section(publish(test=(pictures(10), [0, 1] * 5)), val_fraction=0.2))
    assert data.facts["images"] == {"train": 8, "test": 2}


def test_part_with_secret_classes_is_passed_over(publish):
    parts = {"train": (pictures(4), [0, 1] * 2), "test": (pictures(3), [-1] * 3)}
    name = publish(**parts, validation=(pictures(2, 0), [1, None]))
    assert load(section(name, val_fraction=0.25)).facts["images"] == {"train": 3, "test": 1}
    name = publish("two", **parts, validation=(pictures(2, 0), [1, 1]))
    data = load(section(name))
    assert data.facts["images"] == {"train": 4, "test": 2}
    assert (everything(data.test)[0] == -1).all()
    with pytest.raises(UserError, match=r"training images without a class"):
        load(section(publish("three", train=parts["test"])))


def test_set_without_classes_has_one(publish):
    data = load(section(publish(train=(pictures(10), None)), val_fraction=0.2))
    assert data.class_names == ["image"]
    assert not everything(data.train)[1].any()


def test_set_without_images_is_refused(publish, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"words: no column of images, it has a, b$"):
        load(section(str(folder)))


def test_missing_image_is_one_sentence(publish):
    name = publish(train=([*pictures(3), None], None))
    data = load(section(name, val_fraction=0.25))
    with pytest.raises(UserError, match=r"train:3: not a readable image \(there is none\)$"):
        _ = everything(data.train), everything(data.test)


def test_set_needs_a_name():
    with pytest.raises(UserError, match=r"needs data\.name"):
        load(section(""))


@pytest.mark.parametrize("way", ["setting", "environment"])
def test_forbidden_network_is_left_alone(monkeypatch, way, without_network):
    if way == "environment":
        monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError, match=r"somebody/unknown: could not be loaded \(") as caught:
        load(section("somebody/unknown", download=way == "environment"))
    assert "fetched before" in caught.value.hint
    assert not without_network
    assert not datasets.config.HF_HUB_OFFLINE  # as it was before


def test_network_is_allowed_when_the_set_is_loaded(publish, monkeypatch):
    name, seen = publish(train=(pictures(10), None)), []
    real = datasets.load_dataset

    def watch(name):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return real(name)

    monkeypatch.setattr(datasets, "load_dataset", watch)
    for download, before in [(True, False), (False, False), (True, True)]:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", before)
        load(section(name, download=download, val_fraction=0.1))
    assert seen == [False, True, True]


def test_digest_goes_with_contents_and_size(publish):
    name = publish(train=(pictures(10), None))
    first = load(section(name, val_fraction=0.1)).facts["digest"]
    assert load(section(name, val_fraction=0.1)).facts["digest"] == first
    large = load(section(name, val_fraction=0.1, image_size=16)).facts["digest"]
    other = publish("other", train=(pictures(11), None))
    assert len({first, large, load(section(other, val_fraction=0.1)).facts["digest"]}) == 3
