import json

import numpy as np
import pytest
import torch

from moectl.engine.errors import UserError
from moectl.engine.sources import Stream
from moectl.taskmoe.data import check, load, load_specialist
from moectl.taskmoe.files import write_data_file
from moectl.taskmoe.manifest import (
    TASK_A,
    TASK_B,
    ClassEntry,
    Manifest,
    SpecialistEntry,
    write_manifest,
)
from moectl.taskmoe.settings import DataSection

CPU = torch.device("cpu")


def everything(source):
    images, labels = zip(*source.ordered(500, CPU), strict=True)
    return torch.cat(images), torch.cat(labels)


def first_batch(source, size=64):
    return next(iter(source.batches(Stream(len(source), size, seed=0).epoch(0), 0, CPU)))


def counts(source):
    return torch.bincount(everything(source)[1]).tolist()


def drawn(manifest, part, id, each):
    """The same random images for a class wherever it occurs."""
    seed = 1000 * (part == "test") + id
    shape = (each, 3, manifest.image_size, manifest.image_size)
    draws = np.random.default_rng(seed)
    return torch.from_numpy(draws.integers(0, 256, shape, dtype=np.uint8))


def write_files(manifest, folder, train=10, test=5, last=False):
    for entry in manifest.specialists:
        for part, name, each in (("train", entry.train, train), ("test", entry.test, test)):
            images = torch.cat([drawn(manifest, part, one.id, each) for one in entry.classes])
            labels = [one.id for one in entry.classes for _ in range(each)]
            images = images.movedim(1, 3) if last else images
            write_data_file(folder / name, images, torch.tensor(labels) if last else labels)


@pytest.fixture
def task_a(tmp_path):
    write_files(TASK_A, tmp_path / "TaskA")
    return tmp_path


@pytest.fixture
def task_b(tmp_path):
    write_files(TASK_B, tmp_path / "TaskB", last=True)
    return tmp_path


def section(root, task="B", **changes):
    return DataSection(task=task, root=root, **changes)


def test_task_a_is_the_union_of_its_files(task_a):
    data = load(section(task_a, "A", val_fraction=0.2))
    assert (len(data.train), len(data.val), len(data.test)) == (120, 30, 75)
    assert counts(data.train) == [8] * 15
    assert counts(data.val) == [2] * 15
    assert counts(data.test) == [5] * 15
    assert data.class_names[:4] == ["apple", "maple_tree", "mushroom", "oak_tree"]
    assert data.class_ids[:4] == [0, 47, 51, 52]
    assert data.owners.shape == (15, 3)
    assert (data.owners.sum(1) == 1).all()
    assert data.owners[0].tolist() == [0, 0, 1]
    assert data.image_size == 32
    assert data.test_counts.tolist() == [1] * 75
    assert data.test_ids[:6] == [47] * 5 + [52]


def test_labels_index_the_class_names_in_either_map(task_a):
    for kind in ("global", "offset"):
        data = load(section(task_a, "A", label_map=kind))
        labels = everything(data.test)[1].tolist()
        assert [data.class_ids[label] for label in labels] == data.test_ids
    assert labels == sorted(labels)
    assert data.class_names[10:] == ["apple", "mushroom", "orange", "pear", "sweet_pepper"]


def test_shared_classes_come_from_their_first_owner_once(task_b):
    data = load(section(task_b, val_fraction=0.2))
    assert counts(data.train) == [8] * 12
    assert counts(data.val) == [2] * 12
    assert counts(data.test) == [5] * 12
    assert data.owners.sum(1).tolist() == [1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 2]
    assert data.facts["dropped"] == {"train": 30, "test": 15}
    assert data.facts["unmatched"] == {"train": 0, "test": 0}
    assert (data.facts["duplicates"], data.facts["leakage"]) == ({"train": 30, "test": 15}, 0)


def test_750_rows_are_600_images_and_150_repeats(task_b):
    write_files(TASK_B, task_b / "TaskB", train=2, test=50, last=True)
    for dedup, rows in (("owner", 600), ("content", 600), ("none", 750)):
        data = load(section(task_b, dedup=dedup))
        assert len(data.test) == rows
        assert data.test_counts.sum() == 750
    twice = load(section(task_b)).test_counts == 2
    assert int(twice.sum()) == 150


def test_without_dedup_shared_classes_weigh_twice_and_repeats_stay_together(task_b):
    data = load(section(task_b, dedup="none", val_fraction=0.2))
    assert counts(data.train) == [8, 16, 8, 8, 8, 8, 8, 8, 8, 16, 8, 16]
    assert counts(data.val) == [2, 4, 2, 2, 2, 2, 2, 2, 2, 4, 2, 4]
    flat = [
        {image.numpy().tobytes() for image in everything(part)[0]}
        for part in (data.train, data.val)
    ]
    assert not flat[0] & flat[1]


def test_images_of_a_later_owner_alone_are_reported(task_b):
    entry = TASK_B.specialists[0]
    labels = [one.id for one in entry.classes]
    images = torch.cat([drawn(TASK_B, "other", id + 500, 1) for id in labels])
    write_data_file(task_b / "TaskB" / entry.test, images, labels)
    facts = load(section(task_b)).facts
    # The five hyenas of the second specialist and the five Chihuahuas of the third.
    assert facts["unmatched"] == {"train": 0, "test": 10}
    assert load(section(task_b, dedup="content")).facts["unmatched"]["test"] == 0


def test_test_images_that_are_trained_on_are_reported(task_b):
    folder, entry = task_b / "TaskB", TASK_B.specialists[2]
    (folder / entry.test).write_bytes((folder / entry.train).read_bytes())
    # 20 of its own classes' images, and the 30 of its two shared classes in the other files.
    assert load(section(task_b)).facts["leakage"] == 50


def test_specialist_and_union_validate_with_the_same_images(task_b):
    def raw(data, source):
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        images, labels = everything(source)
        pixels = ((images * std + mean) * 255).round().to(torch.uint8)
        return {
            (data.class_ids[label], image.numpy().tobytes())
            for image, label in zip(pixels, labels.tolist(), strict=True)
        }

    for dedup in ("owner", "content", "none"):
        union = load(section(task_b, dedup=dedup))
        for index in range(3):
            alone = load_specialist(section(task_b, dedup=dedup), index)
            assert raw(alone, alone.val) <= raw(union, union.val)
            assert raw(alone, alone.train) <= raw(union, union.train)


def test_a_specialist_has_its_own_rows_and_statistics(task_b):
    data = load_specialist(section(task_b, val_fraction=0.2), 2)
    assert data.class_ids == [124, 125, 130, 173, 202]
    assert data.class_names[3:] == ["Chihuahua", "African_hunting_dog"]
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, 25)
    assert counts(data.test) == [5] * 5
    assert data.owners.tolist() == [[1.0]] * 5
    assert data.facts["specialists"] == ["canids"]
    union = load(section(task_b, val_fraction=0.2))
    assert data.mean != union.mean
    images, _ = everything(data.train)
    assert images.mean((0, 2, 3)).abs().max() < 1e-5


def test_rows_of_a_specialist_follow_the_manifest_not_the_ids(tmp_path):
    classes = (ClassEntry(9, "late"), ClassEntry(2, "early"))
    manifest = Manifest("own", 8, (SpecialistEntry("one", "train.pth", "test.pth", classes),))
    write_files(manifest, tmp_path)
    write_manifest(tmp_path / "manifest.toml", manifest)
    task = str(tmp_path / "manifest.toml")
    assert load_specialist(section(tmp_path, task), 0).class_names == ["late", "early"]
    assert load(section(tmp_path, task)).class_names == ["early", "late"]
    data = load_specialist(section(tmp_path, task), 0)
    assert everything(data.test)[1].tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("index", [-1, 3])
def test_a_specialist_that_is_not_there_is_refused(task_b, index):
    with pytest.raises(UserError, match=f"no specialist {index} in task B"):
        load_specialist(section(task_b), index)


def test_statistics_are_those_of_the_training_pixels_alone(task_a):
    data = load(section(task_a, "A"))
    images, _ = everything(data.train)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    pixels = ((images.double() * std + mean) * 255).round() / 255
    for channel in range(3):
        flat = pixels[:, channel]
        assert data.mean[channel] == pytest.approx(flat.mean().item(), abs=1e-12)
        spread = (flat.square().mean() - flat.mean().square()).sqrt().item()
        assert data.std[channel] == pytest.approx(spread, abs=1e-12)
    assert everything(data.val)[0].mean((0, 2, 3)).abs().max() > 1e-4


def test_validation_is_seeded(task_a):
    first, again, other = (load(section(task_a, "A", split_seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(everything(first.val)[0], everything(again.val)[0])
    assert first.mean == again.mean != other.mean


@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip"])
def test_training_batches_are_augmented_as_asked(task_a, augment):
    data = load(section(task_a, "A", augment=augment))
    images, labels = first_batch(data.train)
    order = Stream(len(data.train), 64, seed=0).order(0)[:64]
    plain, plain_labels = everything(data.train)
    assert torch.equal(labels, plain_labels[order])
    same = int((images == plain[order]).flatten(1).all(1).sum())
    mirrored = int((images == plain[order].flip(3)).flatten(1).all(1).sum())
    match augment:
        case "none":
            assert same == 64
        case "flip":
            assert same + mirrored == 64
            assert 10 < mirrored < 54
        case "crop_flip":
            assert same + mirrored < 5


def test_digits_need_no_files(tmp_path):
    data = load(section(tmp_path, "digits"))
    assert data.class_names == list("012345678")
    assert data.owners.argmax(1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (len(data.train) + len(data.val), len(data.test)) == (970, 647)
    assert everything(data.test)[0].shape[1:] == (3, 16, 16)
    assert everything(data.train)[0].std().item() == pytest.approx(1, abs=0.01)
    assert data.facts["leakage"] == 0


def test_overlapping_digits_are_the_same_images_counted_twice(tmp_path):
    apart, shared = (load(section(tmp_path, task)) for task in ("digits", "digits_overlap"))
    assert len(shared.test) == len(apart.test)
    assert shared.owners.sum(1).tolist() == [2, 1, 1, 2, 1, 1, 2, 1, 1]
    again = {
        id for id, n in zip(shared.test_ids, shared.test_counts.tolist(), strict=True) if n == 2
    }
    assert again == {0, 3, 6}
    assert int(shared.test_counts.sum()) == len(
        load(section(tmp_path, "digits_overlap", dedup="none")).test
    )
    assert len(shared.val) == len(apart.val)


def test_digits_are_the_scans_twice_as_large(tmp_path):
    from sklearn.datasets import load_digits

    data = load(section(tmp_path, "digits"))
    images, labels = everything(data.test)
    grey = (images[:, 0] * data.std[0] + data.mean[0]) * 16
    small = grey.view(-1, 8, 2, 8, 2).mean((2, 4))
    scans = load_digits()
    for picture, label in zip(small[:20], labels[:20].tolist(), strict=True):
        distances = np.abs(scans.images - picture.numpy()).mean((1, 2))
        assert scans.target[distances.argmin()] == label
        assert distances.min() < 2  # enlarging smoothed it


def test_facts_and_findings_are_plain_values(task_b):
    found = json.loads(json.dumps(load(section(task_b)).facts))
    assert found["images"] == {"train": 108, "val": 12, "test": 60}
    assert json.loads(json.dumps(check(section(task_b))))["task"] == "B"


def test_check_counts_what_the_files_hold(task_b):
    found = check(section(task_b))
    assert found["specialists"]["canids"]["test"] == {
        "collie": 5,
        "golden_retriever": 5,
        "boxer": 5,
        "Chihuahua": 5,
        "African_hunting_dog": 5,
    }
    assert found["classes"]["hyena"] == {"label": 1, "id": 34, "owners": [1, 1, 0]}
    assert found["duplicates"] == found["dropped"] == {"train": 30, "test": 15}
    assert found["images"] == {"train": 120, "test": 60}
    assert (found["leakage"], found["conflicts"]) == (0, {"train": 0, "test": 0})
    assert found["mean"] == pytest.approx([0.5] * 3, abs=0.01)
    assert found["std"] == pytest.approx([0.29] * 3, abs=0.01)


def test_offsets_are_refused_for_task_b(task_b):
    with pytest.raises(UserError, match="hyena, Chihuahua, African_hunting_dog"):
        load(section(task_b, label_map="offset"))


@pytest.mark.parametrize(
    ("side", "labels", "complaint"),
    [
        (32, [1] * 5, "label 1 is no class of specialist canids"),
        (32, [124] * 5, r"has no image of golden_retriever \(125\), boxer \(130\)"),
        (16, [124, 125, 130, 173, 202], r"images are 16 x 16, .* image_size = 64"),
    ],
)
def test_a_file_that_does_not_fit_the_manifest_is_named(task_b, side, labels, complaint):
    side = 64 if side == 32 else side
    path = task_b / "TaskB" / TASK_B.specialists[2].test
    write_data_file(path, torch.zeros(5, side, side, 3, dtype=torch.uint8), labels)
    with pytest.raises(UserError, match=r"val_dataB_model_3\.pth: " + complaint):
        load(section(task_b))


def test_a_missing_file_is_named_with_the_command_that_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"TaskA/Model1.*: cannot be read") as caught:
        load(section(tmp_path, "A"))
    assert "taskmoe data build" in caught.value.hint


def test_images_of_one_colour_are_refused(tmp_path):
    entry = SpecialistEntry("one", "a.pth", "a.pth", (ClassEntry(1, "x"),))
    write_manifest(tmp_path / "m.toml", Manifest("own", 8, (entry,)))
    write_data_file(tmp_path / "a.pth", torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [1] * 4)
    with pytest.raises(UserError, match="of one colour"):
        load(section(tmp_path, str(tmp_path / "m.toml")))


def test_the_digest_tells_images_and_their_division_apart(task_a):
    def digest(**changes):
        return load(section(task_a, "A", **changes)).facts["digest"]

    same = digest()
    assert digest() == same
    assert digest(split_seed=99) != same
    path = task_a / "TaskA" / TASK_A.specialists[0].train
    content = torch.load(path, weights_only=True)
    content["data"][3, 0, 0, 0] ^= 1
    torch.save(content, path)
    assert digest() != same
