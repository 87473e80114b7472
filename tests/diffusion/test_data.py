"""Images: digits, CIFAR-10's files, folders; what is held out, and how they come to a size."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from moectl.diffusion import data as data_module
from moectl.diffusion.data import load, resized
from moectl.diffusion.settings import DataSection
from moectl.engine.errors import UserError
from moectl.engine.sources import Stream

CPU = torch.device("cpu")


def section(**values):
    return DataSection(**{"dataset": "folder", "image_size": 8, "workers": 0, **values})


def everything(source, **ranks):
    images, labels = zip(*source.ordered(7, CPU, **ranks), strict=True)
    return torch.cat(images), torch.cat(labels)


def batches(source, epoch=0, start=0, size=4):
    chunks = list(Stream(len(source), size, seed=3).epoch(epoch, start))
    return chunks, list(source.batches(iter(chunks), 3, CPU))


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def classes(tmp_path):
    """Two classes of ten and fifteen random images."""
    draws = np.random.default_rng(0)
    for name, count in [("cat", 10), ("dog", 15)]:
        for number in range(count):
            pixels = draws.integers(0, 256, (8, 8, 3))
            save(tmp_path / "set" / name / f"{number:02d}.png", pixels)
    return tmp_path / "set"


# What is already small


def test_digits_are_all_there_once():
    data = load(section(dataset="digits", val_fraction=0.1))
    assert (len(data.train), len(data.test)) == (1617, 180)
    assert data.class_names == list("0123456789")
    assert data.facts["images"] == {"train": 1617, "test": 180}
    parts = [everything(part)[0] for part in (data.train, data.test)]
    assert sum(part.double().sum().item() for part in parts) == pytest.approx(
        _sum_of_digits(), rel=1e-6
    )


def _sum_of_digits():
    from sklearn.datasets import load_digits

    bytes_ = np.round(load_digits().images * 255 / 16)
    return 3 * (bytes_ / 127.5 - 1).sum()


def test_digits_reach_from_minus_one_to_one():
    images, labels = everything(load(section(dataset="digits")).test)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape[1:] == (3, 8, 8)
    assert (images.min().item(), images.max().item()) == pytest.approx((-1, 1), abs=1e-6)
    assert torch.equal(images[:, 0], images[:, 2])


def test_held_out_digits_have_the_same_share_of_every_class():
    data = load(section(dataset="digits", val_fraction=0.25))
    train, test = (torch.bincount(everything(part)[1]) for part in (data.train, data.test))
    share = test / (train + test)
    assert share.tolist() == pytest.approx([0.25] * 10, abs=0.005)


def test_digits_are_never_mirrored():
    data = load(section(dataset="digits", hflip=True))
    plain = everything(data.train)[0]
    chunks, found = batches(data.train, size=500)
    for chunk, (images, _) in zip(chunks, found, strict=True):
        assert torch.equal(images, plain[chunk.rows])


def test_digest_follows_contents_size_and_division(monkeypatch):
    def digest(**values):
        return load(section(dataset="digits", **values)).facts["digest"]

    first = digest()
    assert first == digest(workers=2, hflip=False)
    assert len(first) == len(bytes.fromhex(first)) * 2 == 16
    others = {digest(image_size=16), digest(val_fraction=0.1)}
    from sklearn import datasets

    changed = datasets.load_digits()
    changed.images[5, 3, 3] += 1
    monkeypatch.setattr(datasets, "load_digits", lambda: changed)
    assert len({first, digest(), *others}) == 4


def test_labels_count_in_the_digest(monkeypatch):
    from sklearn import datasets

    first = load(section(dataset="digits", val_fraction=0.5)).facts["digest"]
    changed = datasets.load_digits()
    # Two images of different classes swap them, and stay in the part where they are.
    monkeypatch.setattr("sklearn.model_selection.train_test_split", _halves)
    before = load(section(dataset="digits", val_fraction=0.5)).facts["digest"]
    changed.target[[0, 1]] = changed.target[[1, 0]]
    monkeypatch.setattr(datasets, "load_digits", lambda: changed)
    assert load(section(dataset="digits", val_fraction=0.5)).facts["digest"] != before != first


def _halves(rows, **_):
    return list(rows)[:898], list(rows)[898:]


def test_images_of_their_size_are_left_alone():
    images = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    assert resized(images, 8) is images


def test_images_are_smoothed_where_they_shrink():
    stripes = torch.where(torch.arange(64) % 8 == 0, 240, 0)  # beside the middles of the new pixels
    images = stripes.to(torch.uint8).expand(2, 3, 64, 64)
    small = resized(images, 8)
    assert small.dtype == torch.uint8
    assert small.shape == (2, 3, 8, 8)
    assert (small[..., 1:-1].float() - 30).abs().max() <= 3


def test_enlarged_images_stay_within_bytes_and_in_order():
    images = torch.zeros(2500, 1, 4, 4, dtype=torch.uint8)
    images[:, :, :, 2:] = 255
    images[1700] = 40
    large = resized(images, 8)
    assert large.shape == (2500, 1, 8, 8)
    row = large[0, 0, 0].tolist()  # a cubic runs over at edges; bytes must not wrap
    assert row == sorted(row)
    assert (row[0], row[-1]) == (0, 255)
    assert (large[1700] == 40).all()


# CIFAR-10


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """Ten classes with four training images and two test images each, in the official layout."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name, per_class in [("data_batch_1", 4), ("test_batch", 2)]:
        pixels = draws.integers(0, 256, (per_class * 10, 3072), dtype=np.uint8)
        labels = list(range(10)) * per_class
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return tmp_path


def test_cifar10_keeps_its_division_and_its_pixels(fake_cifar):
    data = load(section(dataset="cifar10", root=fake_cifar, image_size=32, download=False))
    assert data.facts["images"] == {"train": 40, "test": 20}
    assert data.class_names[:2] == ["airplane", "automobile"]
    assert len(data.class_names) == 10
    images, labels = everything(data.test)
    official = CIFAR10(fake_cifar, train=False)
    expected = torch.from_numpy(official.data).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert labels.tolist() == official.targets


@pytest.mark.parametrize("hflip", [True, False])
def test_cifar10_is_mirrored_in_training_if_wanted(fake_cifar, hflip):
    data = load(section(dataset="cifar10", root=fake_cifar, image_size=32, hflip=hflip))
    plain = everything(data.train)[0]
    chunks, found = batches(data.train, size=40)
    as_it_is, mirrored = _compare(found[0][0], plain[chunks[0].rows])
    assert all(a != b for a, b in zip(as_it_is, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32 if hflip else sum(mirrored) == 0


def _compare(images, plain):
    return [
        [torch.equal(one, other) for one, other in zip(images, others, strict=True)]
        for others in (plain, plain.flip(3))
    ]


def test_cifar10_comes_in_the_size_of_the_settings(fake_cifar):
    data = load(section(dataset="cifar10", root=fake_cifar, image_size=64))
    assert everything(data.train)[0].shape == (40, 3, 64, 64)
    assert data.facts["image_size"] == 64


@pytest.mark.parametrize("way", ["setting", "environment"])
@pytest.mark.parametrize("lost", ["test_batch", "batches.meta"])
def test_missing_files_of_cifar10_are_named(fake_cifar, monkeypatch, way, lost):
    (fake_cifar / CIFAR10.base_folder / lost).unlink()
    if way == "environment":
        monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        load(section(dataset="cifar10", root=fake_cifar, download=way == "environment"))
    assert f"{fake_cifar / CIFAR10.base_folder}: {lost} not found" in caught.value.message
    assert "cifar-10-python.tar.gz" in caught.value.hint


# Folders


def test_folders_of_classes_are_labelled_in_the_order_of_their_names(classes):
    data = load(section(root=classes, val_fraction=0.2))
    assert data.class_names == ["cat", "dog"]
    paths = [path for path, _ in data.train.items]
    assert paths == sorted(paths)
    assert torch.bincount(everything(data.train)[1]).tolist() == [8, 12]
    assert torch.bincount(everything(data.test)[1]).tolist() == [2, 3]


def test_flat_folder_is_one_class(tmp_path):
    for number in range(10):
        name = f"{number}.{'JPG' if number % 2 else 'png'}"
        save(tmp_path / "flat" / name, np.full((8, 8, 3), number))
    data = load(section(root=tmp_path / "flat", val_fraction=0.2))
    assert data.class_names == ["image"]
    images, labels = everything(data.train)
    assert len(images) == 8
    assert not labels.any()


def test_train_and_test_folders_are_kept_apart(classes, tmp_path):
    shutil.copytree(classes, tmp_path / "both" / "train")
    save(tmp_path / "both" / "test" / "dog" / "x.png", np.full((8, 8, 3), 255))
    data = load(section(root=tmp_path / "both", val_fraction=0.5))
    assert data.facts["images"] == {"train": 25, "test": 1}
    images, labels = everything(data.test)
    assert labels.tolist() == [1]
    assert (images == 1).all()


def test_hidden_files_and_folders_are_passed_over(classes):
    shutil.copytree(classes / "cat", classes / ".checkpoints")
    (classes / "cat" / "._00.png").write_bytes(b"notes")
    data = load(section(root=classes))
    assert data.class_names == ["cat", "dog"]
    assert len(data.train) + len(data.test) == 25


def test_class_that_is_not_trained_on_is_named(classes, tmp_path):
    shutil.copytree(classes, tmp_path / "both" / "train")
    save(tmp_path / "both" / "test" / "cow" / "x.png", np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match=r"test/cow: not a class of .*train$"):
        load(section(root=tmp_path / "both"))


def test_folders_without_images_are_named(classes, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load(section(root=tmp_path / "nowhere"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"none: no images \(\.png"):
        load(section(root=tmp_path / "none"))
    shutil.copytree(classes, tmp_path / "both" / "train")
    save(tmp_path / "both" / "test" / "x.png", np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match=r"test: no images .* in cat, dog"):
        load(section(root=tmp_path / "both"))


def test_share_that_holds_out_nothing_is_refused(tmp_path):
    for number in range(4):
        save(tmp_path / "few" / f"{number}.png", np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match=r"val_fraction = 0\.05 of 4 images holds out 0"):
        load(section(root=tmp_path / "few"))
    assert load(section(root=tmp_path / "few", val_fraction=0.3)).facts["images"] == {
        "train": 3, "test": 1,
    }  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_one_sentence(classes, workers):
    (classes / "cat" / "03.png").write_bytes(b"\x89PNG cut short")
    data = load(section(root=classes, val_fraction=0.1, workers=workers))
    with pytest.raises(UserError, match=r"cat/03\.png: not a readable image$"):
        _ = everything(data.train), everything(data.test)


def test_link_to_nowhere_is_named(classes):
    (classes / "cat" / "link.png").symlink_to(classes / "gone.png")
    with pytest.raises(UserError, match=r"link\.png: cannot be read \(No such file"):
        load(section(root=classes))


def test_middle_square_is_cut_out_and_smoothed(tmp_path):
    wide = np.zeros((32, 48, 3))
    wide[:, 8:40] = (np.indices((32, 32)).sum(0) % 2 * 255)[..., None]
    for number in range(2):
        save(tmp_path / "wide" / f"{number}.png", wide)
        save(tmp_path / "high" / f"{number}.png", wide.transpose(1, 0, 2))
    for name in ("wide", "high"):
        images = everything(load(section(root=tmp_path / name, val_fraction=0.5)).test)[0]
        assert images.shape == (1, 3, 8, 8)
        assert images[..., 1:-1, 1:-1].abs().max() < 0.02  # grey: neither black nor pixels skipped
        assert images.abs().max() < 0.2


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_images_of_every_kind_become_rgb(tmp_path, mode):
    for number in range(2):
        save(tmp_path / "set" / f"{number}.png", np.full((8, 8, 3), 255), mode)
    images = everything(load(section(root=tmp_path / "set", val_fraction=0.5)).test)[0]
    assert images.shape == (1, 3, 8, 8)
    assert (images == 1).all()


@pytest.mark.parametrize("hflip", [True, False])
def test_folder_images_are_mirrored_in_training_if_wanted(classes, hflip):
    data = load(section(root=classes, hflip=hflip, val_fraction=0.1))
    plain = everything(data.train)[0]
    chunks, found = batches(data.train, size=len(plain))
    as_it_is, mirrored = _compare(found[0][0], plain[chunks[0].rows])
    assert all(a != b for a, b in zip(as_it_is, mirrored, strict=True))
    assert 4 < sum(mirrored) < 18 if hflip else sum(mirrored) == 0


def test_training_images_do_not_depend_on_workers_or_on_a_new_start(classes):
    one, two = (load(section(root=classes, workers=count)).train for count in (0, 2))
    whole = batches(one, epoch=1)[1]
    for start, source in [(0, two), (3, one)]:
        later = batches(source, epoch=1, start=start)[1]
        for (images, labels), (expected, expected_labels) in zip(later, whole[start:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)


def test_processes_see_every_second_image(classes):
    source = load(section(root=classes)).train
    images, labels = everything(source)
    for rank in range(2):
        own, own_labels = everything(source, rank=rank, world=2)
        assert torch.equal(own, images[rank::2])
        assert torch.equal(own_labels, labels[rank::2])


def test_digest_of_a_folder_goes_with_its_files_and_not_its_place(classes, tmp_path, monkeypatch):
    def digest(root=classes, **values):
        return load(section(root=root, **values)).facts["digest"]

    first = digest()
    shutil.copytree(classes, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert digest(tmp_path / "elsewhere") == digest("elsewhere") == first
    found = {first, digest(image_size=16), digest(val_fraction=0.3)}
    save(classes / "cat" / "00.png", np.zeros((8, 8, 3)))
    found.add(digest())
    (classes / "cat" / "00.png").rename(classes / "dog" / "00a.png")
    found.add(digest())
    assert len(found) == 5


def test_copies_in_hidden_folders_are_passed_over(classes):
    shutil.copytree(classes / "cat", classes / "cat" / ".ipynb_checkpoints")
    (classes / "cat" / "zz.png").mkdir()
    data = load(section(root=classes))
    assert len(data.train) + len(data.test) == 25


@pytest.mark.parametrize("name", ["val", "validation"])
def test_held_out_images_may_be_called_validation(classes, tmp_path, name):
    shutil.copytree(classes, tmp_path / "both" / "train")
    save(tmp_path / "both" / name / "dog" / "x.png", np.full((8, 8, 3), 255))
    data = load(section(root=tmp_path / "both"))
    assert data.facts["images"] == {"train": 25, "test": 1}
    assert data.class_names == ["cat", "dog"]


def test_first_held_out_images_are_of_all_classes(tmp_path):
    for label in range(4):
        for number in range(25):
            save(tmp_path / "many" / str(label) / f"{number}.png", np.zeros((4, 4, 3)))
    data = load(section(root=tmp_path / "many", val_fraction=0.8))
    first = [label for _, label in data.test.items[:20]]
    assert set(first) == {0, 1, 2, 3}


def test_digest_is_of_the_images_as_they_came(monkeypatch):
    one = load(section(dataset="digits", image_size=16)).facts["digest"]
    monkeypatch.setattr(data_module, "resized", lambda images, _: images)
    assert load(section(dataset="digits", image_size=16)).facts["digest"] == one
    assert load(section(dataset="digits", image_size=12)).facts["digest"] != one
