import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from moectl.balpoe import lists
from moectl.balpoe.data import load
from moectl.balpoe.lists import read_image, read_list
from moectl.balpoe.settings import DataSection
from moectl.engine.errors import UserError
from moectl.engine.sources import Stream

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Three classes with 4, 2 and 1 training images, and five held-out images of each."""
    draws = np.random.default_rng(0)

    def write(name, per_class):
        lines = []
        for label, count in enumerate(per_class):
            for number in range(count):
                path = tmp_path / "images" / f"class {label}" / f"{name}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = draws.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                lines.append(f"class {label}/{path.name} {label}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))

    write("train", [4, 2, 1])
    write("test", [5, 5, 5])
    write("val", [2, 2, 2])
    return tmp_path


def section(folder, **changes):
    return DataSection(
        **{
            "dataset": "list",
            "images": folder / "images",
            "train_list": folder / "train.txt",
            "test_list": folder / "test.txt",
            "image_size": 14,
            "workers": 0,
            **changes,
        }
    )


def labels(source):
    return torch.cat([part for _, part in source.ordered(4, CPU)]).tolist()


def first_batch(source, seed=0):
    return next(iter(source.batches(Stream(len(source), 7, seed=0).epoch(0), seed, CPU)))


def test_lists_give_the_classes_and_an_own_division(folder):
    data = load(section(folder), 1)
    assert data.class_counts == [4, 2, 1]
    assert data.facts["imbalance_ratio"] == 4
    assert labels(data.train) == [0, 0, 0, 0, 1, 1, 2]
    assert labels(data.val) == [0, 1, 2]
    assert sorted(data.val_indices + data.test_indices) == list(range(15))


def test_a_validation_list_is_used_as_it_stands(folder):
    data = load(section(folder, val_list=folder / "val.txt"), 1)
    assert labels(data.val) == [0, 0, 1, 1, 2, 2]
    assert len(data.test) == 15
    assert (data.val_indices, data.test_indices) == (list(range(6)), list(range(6, 21)))


@pytest.mark.parametrize("augment", ["standard", "randaugment"])
def test_training_images_depend_on_the_seed_alone(folder, augment):
    data = load(section(folder, augment=augment), 1)
    images, _ = first_batch(data.train)
    assert images.shape == (7, 3, 14, 14)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    torch.manual_seed(5)
    assert torch.equal(images, first_batch(data.train)[0])
    assert not torch.equal(images, first_batch(data.train, seed=1)[0])


@pytest.mark.parametrize("augment", ["standard", "randaugment"])
def test_workers_change_nothing(folder, augment):
    alone, shared = (load(section(folder, augment=augment, workers=n), 1) for n in (0, 1))
    assert torch.equal(first_batch(alone.train)[0], first_batch(shared.train)[0])


def test_evaluation_equals_torchvisions_chain(folder):
    data = load(section(folder), 1)
    chain = transforms.Compose(
        [
            transforms.Resize(16),
            transforms.CenterCrop(14),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images, _ = next(iter(data.train.ordered(7, CPU)))
    expected = chain(read_image(str(folder / "images/class 0/train3.png")))
    torch.testing.assert_close(images[3], expected, atol=2e-6, rtol=0)


def test_imagenet_images_have_224_pixels_after_a_short_side_of_256(folder):
    data = load(section(folder, image_size=0), 1)
    assert data.facts["image_size"] == 224
    chain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    image = chain(read_image(str(folder / "images/class 0/train0.png")))
    ours = next(iter(data.train.ordered(1, CPU)))[0][0]
    theirs = transforms.functional.to_tensor(image)
    mean, std = (torch.tensor(data.facts[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(ours * std + mean, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("imagenet_lt", ["ImageNet_LT_train", "ImageNet_LT_val", "ImageNet_LT_test"]),
        ("inat18", ["iNaturalist18_train", "iNaturalist18_val"]),
    ],
)
def test_known_sets_find_their_lists_by_the_usual_names(folder, dataset, names):
    for name, source in zip(names, ["train", "val", "test"], strict=False):
        (folder / "train.txt").parent.joinpath(f"{name}.txt").write_text(
            (folder / f"{source}.txt").read_text()
        )
    data = load(
        DataSection(dataset=dataset, root=folder, images=folder / "images", image_size=14), 1
    )
    assert data.class_counts == [4, 2, 1]
    if dataset == "inat18":
        assert (len(data.val), len(data.test)) == (3, 3)
        assert data.facts["mean"] == (0.466, 0.471, 0.380)
    else:
        assert (len(data.val), len(data.test)) == (6, 15)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("image.png", r"'image.png' has no label"),
        ("a/b.png dog", r"label 'dog' is not a whole number"),
        ("a/b.png 1.0", r"label '1.0' is not a whole number"),
        ("a/b.png -1", r"label '-1' is not a whole number from 0 on"),
        ("/etc/b.png 1", r"'/etc/b.png' leads out of the folder"),
        ("a/../../b.png 1", r"'a/../../b.png' leads out of the folder"),
    ],
)
def test_a_bad_line_is_named_with_its_number(folder, line, complaint):
    path = folder / "train.txt"
    path.write_text(f"class 0/train0.png 0\n\n{line}\n")
    with pytest.raises(UserError, match=rf"train\.txt, line 3: {complaint}"):
        load(section(folder), 1)


def test_tabs_blanks_and_a_byte_order_mark_are_no_problem(folder):
    path = folder / "odd.txt"
    path.write_bytes(b"\xef\xbb\xbfclass 0/train0.png\t 0 \r\n\r\n  class 1/train0.png 1")
    images = folder / "images"
    assert read_list(path, images) == [
        (str(images / "class 0/train0.png"), 0),
        (str(images / "class 1/train0.png"), 1),
    ]


def test_a_missing_class_is_named(folder):
    path = folder / "train.txt"
    path.write_text("class 0/train0.png 0\nclass 2/train0.png 2\n")
    with pytest.raises(
        UserError, match=r"train\.txt: class 1 has no image, although classes go up to 2"
    ):
        load(section(folder), 1)


def test_a_class_of_the_test_list_needs_training_images(folder):
    (folder / "test.txt").write_text("class 0/test0.png 0\nclass 2/test0.png 99999999999\n")
    with pytest.raises(UserError, match=r"class 3 has no image"):
        load(section(folder), 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train_list": "nowhere.txt"}, r"nowhere\.txt: cannot be read \(No such file"),
        ({"train_list": None}, r"data\.train_list is not set"),
        ({"test_list": None}, r"data\.test_list is not set"),
        ({"images": "nowhere"}, r"nowhere: no such folder"),
        ({"augment": "trivial"}, r"data\.augment is trivial"),
        ({"cutout": True}, r"data\.cutout is on"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        load(section(folder, **changes), 1)


def test_empty_and_binary_lists_are_named(folder):
    (folder / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.txt: names no image"):
        load(section(folder, train_list=folder / "empty.txt"), 1)
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.txt: not UTF-8 text \(byte 0\)"):
        load(section(folder, train_list=folder / "binary.txt"), 1)


def test_a_wrong_image_folder_is_noticed_at_once(folder):
    with pytest.raises(UserError, match=r"train\.txt, line 1: .*train0\.png: no such") as caught:
        load(section(folder, images=folder), 1)
    assert "folder of images" in caught.value.hint


@pytest.mark.parametrize(("damage", "problem"), [("text", "not a readable"), ("gone", "no such")])
@pytest.mark.parametrize("name", ["train", "test"])
def test_a_file_that_is_no_image_is_named_before_the_training(folder, name, damage, problem):
    path = folder / f"images/class 1/{name}1.png"
    path.write_text("no image")
    if damage == "gone":
        path.unlink()
    lines = (folder / f"{name}.txt").read_text().splitlines()
    line = lines.index(f"class 1/{name}1.png 1") + 2
    (folder / f"{name}.txt").write_text("\n" + "\n".join(lines))
    with pytest.raises(UserError) as caught:
        load(section(folder), 1)
    assert caught.value.message == f"{folder}/{name}.txt, line {line}: {path}: {problem} image"


def test_an_image_that_is_cut_off_is_named_when_it_is_read(folder):
    path = folder / "images/class 1/train1.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        labels(load(section(folder), 1).train)
    assert caught.value.message == f"{path}: not a readable image (image file is truncated)"


def test_the_first_of_many_unreadable_files_is_named(folder, monkeypatch):
    monkeypatch.setattr(lists, "_PART", 2)
    for number in (1, 3):
        (folder / f"images/class 0/train{number}.png").write_text("no image")
    with pytest.raises(UserError, match=r"train\.txt, line 2: .*train1\.png"):
        load(section(folder), 1)


@pytest.mark.parametrize("change", [{}, {"imbalance_ratio": 10.0}, {"profile": "step"}])
def test_settings_that_do_nothing_with_lists_are_named(folder, caplog, change):
    load(section(folder, **change), 1)
    said = [f"data.{name} does nothing with list files: their counts are 4 to 1" for name in change]
    assert [record.getMessage() for record in caplog.records] == said


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    levels = np.array([[0, 20_000], [40_000, 65_535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    read = np.asarray(read_image(str(tmp_path / "deep.png")))
    assert read[..., 0].tolist() == [[0, 78], [156, 255]]
    assert (read[..., 0] == read[..., 2]).all()
