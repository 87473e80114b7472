import io
import os
import re

import numpy as np
import pytest
import torch

from moectl.engine.errors import UserError
from moectl.taskmoe.files import read_data_file, write_data_file

LABELS = [47, 52, 47, 96]


@pytest.fixture
def images():
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 6, 5), generator=draws).to(torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    return images


def saved(path, data, labels=LABELS, **more):
    torch.save({"data": data, "labels": labels, **more}, path)
    return path


def same(found, images):
    assert torch.equal(found[0], images)
    assert found[0].dtype == torch.uint8
    assert found[0].is_contiguous()
    assert found[1].tolist() == LABELS
    assert found[1].dtype == torch.int64


FORMS = {
    "bytes": lambda images: images,
    "unit floats": lambda images: images.float() / 255,
    "unit doubles": lambda images: images.double() / 255,
    "float bytes": lambda images: images.float(),
    "integers": lambda images: images.long(),
    "array": lambda images: images.numpy(),
    "float array": lambda images: (images.float() / 255).numpy(),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_layout_and_type_gives_the_same_bytes(tmp_path, images, form, last):
    data = FORMS[form](images.movedim(1, 3).contiguous() if last else images)
    same(read_data_file(saved(tmp_path / "a.pth", data)), images)


@pytest.mark.parametrize(
    "labels",
    [
        tuple(LABELS),
        [np.int64(label) for label in LABELS],
        [np.uint8(label) for label in LABELS],
        [torch.tensor(label) for label in LABELS],
        np.array(LABELS),
        np.array(LABELS, dtype=np.int32),
        np.array(LABELS, dtype=object),
        torch.tensor(LABELS),
        torch.tensor(LABELS, dtype=torch.int32),
    ],
    ids=["tuple", "int64s", "uint8s", "tensors", "array", "int32", "objects", "tensor", "ints"],
)
def test_every_kind_of_labels_is_read_safely(tmp_path, images, labels):
    indices = [np.int64(row) for row in range(4)]
    same(read_data_file(saved(tmp_path / "a.pth", images, labels, indices=indices)), images)


def test_scalars_saved_by_numpy_1_are_read(tmp_path, images):
    buffer = io.BytesIO()
    labels = [np.int64(label) for label in LABELS]
    content = {"data": images, "labels": labels}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    assert b"numpy._core.multiarray" in data
    path = tmp_path / "a.pth"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    same(read_data_file(path), images)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("key", ["data", "labels", "indices"])
def test_code_in_a_data_file_runs_only_if_it_is_allowed(tmp_path, images, key):
    mark = tmp_path / "ran"
    path = tmp_path / "a.pth"
    torch.save({"data": images, "labels": LABELS, key: Runs(mark)}, path)
    with pytest.raises(UserError, match=r"a\.pth: holds more than tensors") as caught:
        read_data_file(path)
    assert "--allow-pickle" in caught.value.hint
    assert not mark.exists()
    if key == "indices":
        same(read_data_file(path, allow_pickle=True), images)
        assert mark.exists()


@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ((4, 3, 3, 3), "several axes"),
        ((4, 3, 5, 3), "several axes"),
        ((4, 3, 3, 5), "several axes"),
        ((4, 5, 3, 5), "neither the second nor the last axis"),
        ((4, 1, 5, 5), "neither the second nor the last axis"),
    ],
)
def test_an_ambiguous_layout_is_an_error(tmp_path, shape, fault):
    path = saved(tmp_path / "a.pth", torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(
        UserError, match=rf"a\.pth: data has shape {re.escape(str(shape))}.*{fault}"
    ):
        read_data_file(path)


def test_three_images_are_no_colours(tmp_path):
    path = saved(tmp_path / "a.pth", torch.zeros(3, 5, 5, 3, dtype=torch.uint8), [1, 2, 3])
    assert read_data_file(path)[0].shape == (3, 3, 5, 5)


@pytest.mark.parametrize("values", [(-0.5, 1.0), (0.0, 256.0), (0.0, 1.3), (float("nan"), 1.0)])
def test_numbers_in_another_range_are_an_error(tmp_path, values):
    data = torch.zeros(4, 3, 5, 5)
    data[0, 0, 0, :2] = torch.tensor(values)
    with pytest.raises(UserError, match=r"a\.pth: data lies in .*, expected 0\.\.1 or 0\.\.255"):
        read_data_file(saved(tmp_path / "a.pth", data))


def test_darkest_integers_are_not_scaled(tmp_path):
    data = torch.ones(4, 3, 5, 5, dtype=torch.int64)
    assert read_data_file(saved(tmp_path / "a.pth", data))[0].max() == 1


@pytest.mark.parametrize(
    ("data", "labels", "complaint"),
    [
        (torch.zeros(4, 3, 5), LABELS, r"data is a Tensor of shape \(4, 3, 5\)"),
        (torch.zeros(0, 3, 5, 5), [], r"data is a Tensor of shape \(0, 3, 5, 5\)"),
        ("images", LABELS, r"data is a str of shape \(\)"),
        (np.zeros((4, 3, 5, 5), dtype=object), LABELS, r"data is a ndarray"),
        (torch.zeros(4, 3, 5, 5), LABELS[:3], "has 4 images, but 3 labels"),
        (torch.zeros(4, 3, 5, 5), [1, 2, 3, 4.5], r"labels: 4\.5 is not a whole number"),
        (torch.zeros(4, 3, 5, 5), [1, 2, 3, -1], "labels: -1 is not a whole number"),
        (torch.zeros(4, 3, 5, 5), [1, 2, 3, True], "labels: True is not a whole number"),
        (torch.zeros(4, 3, 5, 5), ["cat"] * 4, "labels: cat is not a whole number"),
        (torch.zeros(4, 3, 5, 5), [[1]] * 4, r"labels: \[1\] is not a whole number"),
        (torch.zeros(4, 3, 5, 5), torch.zeros(4, 2).long(), r"labels: \[0, 0\] is not a"),
        (torch.zeros(4, 3, 5, 5), torch.tensor(3), "labels is a int"),
        (torch.zeros(4, 3, 5, 5), {"a": 1}, "labels is a dict"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path, data, labels, complaint):
    with pytest.raises(UserError, match=r"a\.pth: " + complaint):
        read_data_file(saved(tmp_path / "a.pth", data, labels))


def test_keys_that_are_missing_are_named(tmp_path):
    torch.save({"data": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: has no labels"):
        read_data_file(tmp_path / "a.pth")
    torch.save([1], tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: has no data and no labels"):
        read_data_file(tmp_path / "a.pth")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_missing_and_damaged_files_are_named(tmp_path, allow_pickle):
    with pytest.raises(UserError, match=r"none\.pth: cannot be read \(No such file"):
        read_data_file(tmp_path / "none.pth", allow_pickle)
    (tmp_path / "a.pth").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"a\.pth: "):
        read_data_file(tmp_path / "a.pth", allow_pickle)


@pytest.mark.parametrize("last", [False, True])
def test_what_is_written_is_read_back_without_trust(tmp_path, images, last):
    path = tmp_path / "new" / "a.pth"
    data = images.movedim(1, 3) if last else images
    write_data_file(path, data, torch.tensor(LABELS) if last else LABELS, [3, 1, 4, 1])
    same(read_data_file(path), images)
    content = torch.load(path, weights_only=True)
    assert content["data"].shape == data.shape
    assert content["indices"] == [3, 1, 4, 1]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.pth"]


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    many = torch.zeros(1000, 3, 5, 5, dtype=torch.uint8)
    write_data_file(tmp_path / "a.pth", many[:4], LABELS)
    assert (tmp_path / "a.pth").stat().st_size < 5000
    assert "indices" not in torch.load(tmp_path / "a.pth", weights_only=True)


def test_the_same_content_gives_the_same_bytes(tmp_path, images):
    for name in ("a.pth", "b.pth"):
        write_data_file(tmp_path / name, images, LABELS)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
