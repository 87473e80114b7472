import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from moectl.engine.errors import UserError
from moectl.taskmoe.build import build_task_a, build_task_b
from moectl.taskmoe.files import read_data_file
from moectl.taskmoe.manifest import TASK_A, TASK_B, WORDNET, read_manifest


class FakeCifar:
    """Two images per class, train and test in turns."""

    base_folder = datasets.CIFAR100.base_folder
    url = datasets.CIFAR100.url

    def __init__(self, root, train, download):
        assert not download
        if not root.is_dir():
            raise RuntimeError("Dataset not found or corrupted.")
        self.targets = list(range(100)) * 2
        draws = np.random.default_rng(int(train))
        self.data = draws.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)


def test_task_a_is_written_under_the_original_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR100", FakeCifar)
    path = build_task_a(tmp_path, tmp_path / "out")
    folder = tmp_path / "out" / "TaskA"
    assert path == folder / "manifest.toml"
    assert read_manifest(path) == TASK_A
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.pth")) == [
        "Model1_trees_superclass/model1_test_supercls.pth",
        "Model1_trees_superclass/model1_train_supercls.pth",
        "Model2_flowers_superclass/model2_test_supercls.pth",
        "Model2_flowers_superclass/model2_train_supercls.pth",
        "Model3_fruit+veg_superclass/model3_test_supercls.pth",
        "Model3_fruit+veg_superclass/model3_train_supercls.pth",
    ]
    for train in (True, False):
        official = FakeCifar(tmp_path, train, False)
        for entry in TASK_A.specialists:
            file = folder / (entry.train if train else entry.test)
            images, labels = read_data_file(file)
            content = torch.load(file, weights_only=True)
            assert content["data"].shape == (10, 3, 32, 32)
            assert content["labels"] == [official.targets[row] for row in content["indices"]]
            assert sorted(set(labels.tolist())) == [one.id for one in entry.classes]
            expected = torch.from_numpy(official.data[content["indices"]]).permute(0, 3, 1, 2)
            assert torch.equal(images, expected)


def test_missing_cifar_is_named_with_its_place(tmp_path):
    with pytest.raises(UserError, match=r"cifar-100-python: the files of CIFAR-100 are not there"):
        build_task_a(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def picture(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def imagenet(tmp_path):
    """Two training images and one validation image per class, of various sizes."""
    for number, word in enumerate(WORDNET.values()):
        picture(tmp_path / "train" / word / "a.png", (64, 64), number)
        picture(tmp_path / "train" / word / "b.png", (90, 70), 100 + number)
        (tmp_path / "train" / word / "notes.txt").write_text("not an image")
        picture(tmp_path / "val" / word / "c.png", (50, 100), 200 + number)
    return tmp_path


def test_task_b_has_the_original_layout(imagenet):
    path = build_task_b(imagenet, imagenet / "out")
    folder = imagenet / "out" / "TaskB"
    assert read_manifest(path) == TASK_B
    names = [
        f"{part}_dataB_model_{number}.pth" for part in ("train", "val") for number in (1, 2, 3)
    ]
    assert sorted(file.name for file in folder.glob("*.pth")) == names
    for entry in TASK_B.specialists:
        ids = [one.id for one in entry.classes]
        for name, each in ((entry.train, 2), (entry.test, 1)):
            content = torch.load(folder / name, weights_only=True)
            assert set(content) == {"data", "labels"}
            assert content["data"].shape == (5 * each, 64, 64, 3)
            assert content["data"].dtype == torch.uint8
            assert content["labels"].tolist() == [id for id in ids for _ in range(each)]


def test_shared_classes_have_the_same_images_in_both_files(imagenet):
    build_task_b(imagenet, imagenet / "out")
    found = [
        read_data_file(imagenet / "out" / "TaskB" / one.train) for one in TASK_B.specialists[:2]
    ]
    hyenas = [images[labels == 34] for images, labels in found]
    assert torch.equal(*hyenas)
    assert len(hyenas[0]) == 2


def test_small_images_are_taken_as_they_are_and_large_ones_cut_in_the_middle(imagenet):
    word = WORDNET[34]
    small = picture(imagenet / "train" / word / "a.png", (64, 64), 7)
    stripes = np.zeros((128, 256, 3), dtype=np.uint8)
    stripes[:, 64:192] = 200
    Image.fromarray(stripes).save(imagenet / "train" / word / "b.png")
    build_task_b(imagenet, imagenet / "out")
    images, labels = read_data_file(imagenet / "out/TaskB/train_dataB_model_1.pth")
    first, second = images[labels == 34]
    assert torch.equal(first, torch.from_numpy(small).permute(2, 0, 1))
    assert (second[:, :, 3:-3] == 200).all()


def test_a_flat_validation_folder_needs_the_table_of_its_classes(imagenet):
    nested = build_task_b(imagenet, imagenet / "nested").parent
    rows = [["ImageId", "PredictionString"], ["unknown", "n01440764 1 2 3 4"]]
    for word in WORDNET.values():
        (imagenet / "val" / word / "c.png").rename(imagenet / "val" / f"val_{word}.png")
        (imagenet / "val" / word).rmdir()
        rows.append([f"val_{word}", f"{word} 1 2 3 4 {word} 5 6 7 8"])
    with pytest.raises(UserError, match=r"no images in .*val/n02504458") as caught:
        build_task_b(imagenet, imagenet / "flat")
    assert "LOC_val_solution.csv" in caught.value.hint
    with (imagenet / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    flat = build_task_b(imagenet, imagenet / "flat").parent
    for one in TASK_B.specialists:
        assert (flat / one.test).read_bytes() == (nested / one.test).read_bytes()


def test_all_missing_folders_are_named(imagenet):
    for word in (WORDNET[34], WORDNET[202]):
        for file in (imagenet / "train" / word).iterdir():
            file.unlink()
    (imagenet / "train" / WORDNET[202]).rmdir()
    with pytest.raises(UserError, match=r"train/n02117135, .*train/n02116738$"):
        build_task_b(imagenet, imagenet / "out")
    assert not (imagenet / "out").exists()


def test_an_unreadable_image_is_named(imagenet):
    path = imagenet / "val" / WORDNET[80] / "c.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"n02391049/c\.png: not a readable image"):
        build_task_b(imagenet, imagenet / "out")
