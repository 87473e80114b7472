"""The data files of a task: written, and counted."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.engine.errors import UserError
from moectl.taskmoe.files import read_data_file, write_data_file
from moectl.taskmoe.manifest import TASK_B, WORDNET
from moectl.taskmoe.prepare import build, check
from moectl.taskmoe.settings import DataSection

Call = Callable[..., tuple[int, str, str]]

MANIFEST = """
task = "own"
image_size = 4
[[specialist]]
name = "birds"
train = "birds.pth"
test = "birds_test.pth"
classes = [{id = 7, name = "owl"}, {id = 3, name = "crow"}]
[[specialist]]
name = "night"
train = "night.pth"
test = "night_test.pth"
classes = [{id = 7, name = "owl"}, {id = 9, name = "bat"}]
"""


def pictures(*shades: int) -> torch.Tensor:
    return torch.tensor(shades, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two specialists share the owls: 10 is in both files, 30 in the second alone, 60 is tested."""
    (tmp_path / "manifest.toml").write_text(MANIFEST)
    write_data_file(tmp_path / "birds.pth", pictures(10, 20, 60, 70), [7, 7, 3, 3])
    write_data_file(tmp_path / "night.pth", pictures(10, 30, 90, 90, 99), [7, 7, 9, 9, 9])
    write_data_file(tmp_path / "birds_test.pth", pictures(15, 60), [7, 3])
    write_data_file(tmp_path / "night_test.pth", pictures(15, 95), [7, 9])
    return tmp_path / "manifest.toml"


# Counting


def test_images_are_counted_by_specialist_and_class(own: Path) -> None:
    document, _ = check(DataSection(task=str(own)))
    assert document["specialists"] == {
        "birds": {"train": {"owl": 2, "crow": 2}, "test": {"owl": 1, "crow": 1}},
        "night": {"train": {"owl": 2, "bat": 3}, "test": {"owl": 1, "bat": 1}},
    }
    assert document["classes"] == {
        "crow": {"label": 0, "id": 3, "owners": [1, 0]},
        "owl": {"label": 1, "id": 7, "owners": [1, 1]},
        "bat": {"label": 2, "id": 9, "owners": [0, 1]},
    }


def test_repeats_and_leaks_are_counted(own: Path) -> None:
    document, _ = check(DataSection(task=str(own)))
    assert document["images"] == {"train": 7, "test": 3}
    assert document["dropped"] == {"train": 2, "test": 1}
    assert document["unmatched"] == {"train": 1, "test": 0}
    assert document["duplicates"] == {"train": 2, "test": 1}
    assert document["leakage"] == 1
    kept = np.array([10, 20, 60, 70, 90, 90, 99]) / 255
    assert document["mean"] == pytest.approx([kept.mean()] * 3)
    assert document["std"] == pytest.approx([kept.std()] * 3)


def rows(out: str) -> list[list[str]]:
    """Split the lines of a table where two blanks or more are."""
    lines = [line.split("  ") for line in out.splitlines()]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def test_the_tables_say_what_the_document_says(taskmoe: Call, own: Path) -> None:
    code, out, _ = taskmoe("data", "check", "--task", str(own))
    assert code == 0
    table = rows(out)
    assert ["class", "id", "label", "birds", "night"] in table
    assert ["crow", "3", "0", "2 / 1", "–"] in table
    assert ["owl", "7", "1", "2 / 1", "2 / 1"] in table
    assert ["kept with dedup = owner", "7", "3"] in table
    assert ["left out", "2", "1"] in table
    assert ["left out, equal to none that is kept", "1", "0"] in table
    assert ["also among the training images", "–", "1"] in table


def test_digits_are_checked_without_any_file(taskmoe: Call) -> None:
    code, out, _ = taskmoe("data", "check", "--task", "digits", "--json")
    assert code == 0
    document = json.loads(out)
    assert list(document["classes"]) == list("012345678")
    assert document["images"]["test"] == 647
    assert sum(document["specialists"]["345"]["test"].values()) == 218
    assert document["leakage"] == 0


def test_files_that_are_not_there_are_named(taskmoe: Call) -> None:
    code, _, err = taskmoe("data", "check", "--task", "A")
    assert code == 2
    assert "model1_train_supercls.pth: cannot be read" in err
    assert "moectl taskmoe data build" in err


# Writing


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """One picture of every class, of the shade that its label is."""
    for part in ("train", "val"):
        for id, word in WORDNET.items():
            folder = tmp_path / "imagenet" / part / word
            folder.mkdir(parents=True)
            Image.new("RGB", (64, 64), (id, id, id)).save(folder / "one.png")
    return tmp_path / "imagenet"


def test_task_b_is_written_where_its_check_looks(taskmoe: Call, imagenet: Path) -> None:
    code, out, _ = taskmoe("data", "build", "--task", "B", "--imagenet", str(imagenet))
    assert code == 0
    assert out == "data/TaskB/manifest.toml\n"
    for entry in TASK_B.specialists:
        images, labels = read_data_file(Path("data/TaskB") / entry.train)
        assert labels.tolist() == [one.id for one in entry.classes]
        assert torch.equal(images, labels.byte().view(-1, 1, 1, 1).expand(-1, 3, 64, 64))
    document, _ = check(DataSection(task="B"))
    assert document["images"] == {"train": 12, "test": 12}


def test_files_go_into_the_folder_that_is_asked_for(imagenet: Path, tmp_path: Path) -> None:
    document, text = build(DataSection(task="B", root=tmp_path / "out"), None, imagenet)
    assert document == {"manifest": text}
    assert text == f"{tmp_path}/out/TaskB/manifest.toml"
    assert Path(text).is_file()


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    manifest = tmp_path / "TaskB" / "manifest.toml"
    manifest.parent.mkdir()
    manifest.write_text("mine")
    with pytest.raises(UserError, match=r"TaskB: is not empty"):
        build(DataSection(task="B", root=tmp_path), None, tmp_path)
    assert manifest.read_text() == "mine"


@pytest.mark.parametrize(("cifar", "looked_in"), [(None, "root"), (Path("other"), "other")])
def test_task_a_needs_cifar(cifar: Path | None, looked_in: str) -> None:
    message = rf"^{looked_in}/cifar-100-python: the files of CIFAR-100 are not there"
    with pytest.raises(UserError, match=message):
        build(DataSection(task="A", root=Path("root")), cifar, None)
    assert not Path("root").exists()


def test_task_b_needs_imagenet() -> None:
    with pytest.raises(UserError, match="task B is made from ImageNet") as caught:
        build(DataSection(task="B"), None, None)
    assert "--imagenet DIR" in caught.value.hint


@pytest.mark.parametrize("task", ["digits", "/own/manifest.toml"])
def test_other_tasks_are_not_built(task: str) -> None:
    with pytest.raises(UserError, match=f"data.task is '{task}': files are built for A and B"):
        build(DataSection(task=task), None, None)
