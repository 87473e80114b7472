from dataclasses import replace

import pytest

from moectl.engine.errors import UserError
from moectl.taskmoe.manifest import (
    DIGITS,
    DIGITS_OVERLAP,
    TASK_A,
    TASK_B,
    WORDNET,
    class_names,
    find_manifest,
    label_map,
    owners,
    read_manifest,
    write_manifest,
)

TEXT = """
task = "own"
image_size = 8

[[specialist]]
name = "pets"
train = "pets/train.pth"
test = "pets/test.pth"
classes = [{id = 7, name = "dog"}, {id = 3, name = "cat"}]
checkpoint = "pets/weights.pth"

[[specialist]]
name = "wild"
train = "wild/train.pth"
test = "wild/test.pth"
classes = [{id = 5, name = "lion"}, {id = 3, name = "cat"}]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "manifest.toml"
    path.write_text(TEXT)
    return path


def names(manifest, kind):
    return class_names(manifest, label_map(manifest, kind))


def test_task_a_has_the_published_global_map():
    labels = label_map(TASK_A, "global")
    expected = (
        "apple maple_tree mushroom oak_tree orange orchid palm_tree pear pine_tree poppy rose"
        " sunflower sweet_pepper tulip willow"
    )
    assert " ".join(names(TASK_A, "global")) == expected
    assert list(labels) == [0, 47, 51, 52, 53, 54, 56, 57, 59, 62, 70, 82, 83, 92, 96]


def test_task_a_has_the_published_offset_map():
    labels = label_map(TASK_A, "offset")
    assert [labels[id] for id in (47, 52, 56, 59, 96)] == [0, 1, 2, 3, 4]
    assert [labels[id] for id in (54, 62, 70, 82, 92)] == [5, 6, 7, 8, 9]
    assert [labels[id] for id in (0, 51, 53, 57, 83)] == [10, 11, 12, 13, 14]
    assert owners(TASK_A, labels) == [[1, 0, 0]] * 5 + [[0, 1, 0]] * 5 + [[0, 0, 1]] * 5


def test_task_b_has_the_published_map_and_three_shared_classes():
    labels = label_map(TASK_B, "global")
    ids = [24, 34, 80, 124, 125, 130, 135, 137, 159, 173, 201, 202]
    assert labels == {id: label for label, id in enumerate(ids)}
    found = dict(zip(names(TASK_B, "global"), owners(TASK_B, labels), strict=True))
    shared = {name: row for name, row in found.items() if sum(row) > 1}
    assert shared == {
        "hyena": [1, 1, 0],
        "Chihuahua": [1, 0, 1],
        "African_hunting_dog": [0, 1, 1],
    }
    assert found["African_elephant"] == [0, 1, 0]
    assert set(WORDNET) == set(ids)
    assert len(set(WORDNET.values())) == 12


def test_the_rows_of_every_built_in_specialist_are_sorted_by_id():
    for manifest in (TASK_A, TASK_B, DIGITS, DIGITS_OVERLAP):
        for one in manifest.specialists:
            ids = [entry.id for entry in one.classes]
            assert ids == sorted(ids)
            assert len(ids) in {3, 4, 5}


def test_offsets_are_refused_for_shared_classes():
    with pytest.raises(UserError, match=r"offset.* B know hyena, Chihuahua, African_hunting_dog"):
        label_map(TASK_B, "offset")
    with pytest.raises(UserError, match="digits_overlap know 0, 3, 6"):
        label_map(DIGITS_OVERLAP, "offset")


def test_a_file_is_read_in_the_order_of_its_rows(path):
    manifest = read_manifest(path)
    pets, wild = manifest.specialists
    assert (manifest.task, manifest.image_size) == ("own", 8)
    assert [(entry.id, entry.name) for entry in pets.classes] == [(7, "dog"), (3, "cat")]
    assert (pets.train, pets.test, pets.checkpoint) == (
        "pets/train.pth",
        "pets/test.pth",
        "pets/weights.pth",
    )
    assert wild.checkpoint == ""
    assert names(manifest, "global") == ["cat", "lion", "dog"]
    assert owners(manifest, label_map(manifest, "global")) == [[1, 1], [0, 1], [1, 0]]
    alone = replace(manifest, specialists=(pets,))
    assert names(alone, "offset") == ["dog", "cat"]


@pytest.mark.parametrize("manifest", [TASK_A, TASK_B])
def test_round_trip(tmp_path, manifest):
    path = tmp_path / "new" / "manifest.toml"
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"specialist\[0\]\.train is empty"):
        write_manifest(tmp_path / "manifest.toml", DIGITS)
    assert list(tmp_path.glob("*.toml")) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('task = "own"', "", r"task is missing"),
        ('task = "own"', "task = 3", r"task is 3, expected text"),
        ('task = "own"', 'task = ""', r"task is empty"),
        ("image_size = 8", "image_size = true", r"image_size is True, expected a whole number"),
        ("image_size = 8", "image_size = 8.0", r"image_size is 8\.0, expected a whole number"),
        ("image_size = 8", "image_size = 0", r"image_size is 0, expected at least 4"),
        ("image_size = 8", "image_sise = 8", r"image_sise is not known"),
        ('name = "wild"', 'name = "pets"', r"specialist: the name 'pets' occurs twice"),
        ('name = "wild"', "", r"specialist\[1\]\.name is missing"),
        ('train = "wild', 'trains = "wild', r"specialist\[1\]\.trains is not known"),
        ("wild/train.pth", "../train.pth", r"specialist\[1\]\.train: '\.\./train\.pth' leads out"),
        ("wild/test.pth", "/etc/passwd", r"specialist\[1\]\.test: '/etc/passwd' leads out"),
        ("wild/test.pth", r"C:\\x", r"specialist\[1\]\.test: .* leads out"),
        ("wild/test.pth", r"x\u0000", r"specialist\[1\]\.test: .* leads out"),
        ("pets/weights.pth", "a/../../b", r"specialist\[0\]\.checkpoint: .* leads out"),
        ("id = 5", "id = -5", r"specialist\[1\]\.classes\[0\]\.id is -5"),
        ("id = 5", 'id = "5"', r"specialist\[1\]\.classes\[0\]\.id is '5', expected a whole"),
        ("id = 5", "id = 3", r"specialist\[1\]\.classes: the id 3 occurs twice"),
        ('5, name = "lion"', "5", r"specialist\[1\]\.classes\[0\]\.name is missing"),
        ('{id = 5, name = "lion"}', '"lion"', r"specialist\[1\]\.classes\[0\]: 'lion' is not a"),
        (
            'id = 3, name = "cat"}]\n\n',
            'id = 3, name = "cat"}, 4]\n',
            r"specialist\[1\]\.classes\[2\]: 4 is not",
        ),
        (
            'name = "lion"',
            'name = "dog"',
            r"specialist\.classes: 'dog' is the name of both id 5 and id 7",
        ),
        ("id = 5", "id = 7", r"specialist\.classes: id 7 is named both 'dog' and 'lion'"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(path, old, new, complaint):
    text = TEXT + "\n"
    assert old in text
    head, _, tail = text.rpartition(old)
    path.write_text(head + new + tail)
    with pytest.raises(UserError, match=r"manifest\.toml: " + complaint):
        read_manifest(path)


@pytest.mark.parametrize("empty", ["specialist = []", ""])
def test_a_task_without_specialists_is_refused(path, empty):
    path.write_text(f'task = "own"\nimage_size = 8\n{empty}')
    with pytest.raises(UserError, match=r"specialist is (empty|missing)"):
        read_manifest(path)
    path.write_text(TEXT.replace('[{id = 5, name = "lion"}, {id = 3, name = "cat"}]', "[]"))
    with pytest.raises(UserError, match=r"specialist\[1\]\.classes is empty"):
        read_manifest(path)


def test_tasks_are_found_by_name_or_path(path, tmp_path):
    assert find_manifest("A", tmp_path) == (TASK_A, tmp_path / "TaskA")
    assert find_manifest("B", tmp_path) == (TASK_B, tmp_path / "TaskB")
    assert find_manifest("digits_overlap", tmp_path)[0] == DIGITS_OVERLAP
    found, folder = find_manifest(str(path), tmp_path / "elsewhere")
    assert (found.task, folder) == ("own", tmp_path)


def test_a_manifest_in_the_folder_of_a_task_goes_before_the_built_in_one(path, tmp_path):
    (tmp_path / "TaskA").mkdir()
    path.rename(tmp_path / "TaskA" / "manifest.toml")
    assert find_manifest("A", tmp_path)[0].task == "own"


@pytest.mark.parametrize("task", ["C", "a", "", "nowhere/manifest.toml"])
def test_an_unknown_task_is_refused(tmp_path, task):
    with pytest.raises(UserError, match=r"data\.task is .*, which is no task and no file"):
        find_manifest(task, tmp_path)
