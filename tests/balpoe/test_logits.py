import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from moectl.balpoe.logits import Outputs, read_facts, read_items, read_outputs, write_outputs
from moectl.balpoe.longtail import split_indices
from moectl.engine.errors import UserError

COUNTS = np.array([90, 30, 5])
DRAWS = np.random.default_rng(0)
LOGITS = DRAWS.normal(size=(30, 2, 3)).astype(np.float32)
LABELS = np.arange(30) % 3
TAUS = np.array([0.0, 1.5])
FLAT = {"logits": LOGITS[:, 0], "labels": LABELS, "class_counts": COUNTS}
DIVIDED = {
    "val_logits": LOGITS[:12],
    "val_labels": LABELS[:12],
    "test_logits": LOGITS[12:],
    "test_labels": LABELS[12:],
    "class_counts": COUNTS,
    "taus": TAUS,
}
POSTERIORS = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)


def saved(tmp_path, arrays, suffix=".npz", metadata=None):
    path = tmp_path / f"outputs{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays, **(metadata or {}))
    else:
        packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(packed, path, metadata)
    return path


def changed(arrays, **changes):
    kept = {**arrays, **changes}
    return {name: array for name, array in kept.items() if array is not None}


def refused(path, read=lambda path: read_outputs(path, 0.2, 0)) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def assert_equal(found: Outputs, expected: Outputs) -> None:
    for field in dataclasses.fields(Outputs):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


@pytest.fixture
def outputs():
    logits = torch.from_numpy(LOGITS)
    return Outputs(
        val_logits=logits[:12],  # both are views of one storage
        val_labels=torch.from_numpy(LABELS[:12]),
        test_logits=logits[12:].transpose(0, 1).contiguous().transpose(0, 1),
        test_labels=torch.from_numpy(LABELS[12:]),
        class_counts=COUNTS.tolist(),
        taus=[0.1, 1.9],
        class_names=["äpfel", "b, c", '"d"'],
        val_indices=list(range(0, 24, 2)),
        test_indices=[*range(1, 25, 2), *range(24, 30)],
        weights="ab" * 32,
    )


def test_what_is_written_reads_back_equal(tmp_path, outputs):
    path = tmp_path / "logits.safetensors"
    write_outputs(path, outputs, {"split": "0.2", "note": "ü"})
    assert_equal(read_outputs(path, 0.9, 7), outputs)
    assert not list(tmp_path.glob("*.part"))


def test_facts_come_without_reading_tensors(tmp_path, outputs):
    path = tmp_path / "logits.safetensors"
    assert read_facts(path) == {}
    write_outputs(path, outputs, {"split": "0.2"})
    names = json.dumps(outputs.class_names)
    assert read_facts(path) == {"split": "0.2", "class_names": names, "weights": "ab" * 32}
    path.write_bytes(path.read_bytes()[:40])
    refused(path, read_facts)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_whole_set_is_divided_as_everywhere(tmp_path, suffix):
    found = read_outputs(saved(tmp_path, FLAT, suffix), 0.2, 5)
    val, test = split_indices(LABELS, 0.2, 5)
    assert found.val_indices == val.tolist()
    assert found.test_indices == test.tolist()
    assert torch.equal(found.val_logits, torch.from_numpy(LOGITS[val, :1]))
    assert torch.equal(found.test_logits, torch.from_numpy(LOGITS[test, :1]))
    assert torch.equal(found.test_labels, torch.from_numpy(LABELS[test]))
    assert found.class_counts == [90, 30, 5]
    assert (found.taus, found.class_names, found.weights) == ([0.0], ["0", "1", "2"], "")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_divided_set_stays_divided(tmp_path, suffix):
    found = read_outputs(saved(tmp_path, DIVIDED, suffix), 0.2, 5)
    assert torch.equal(found.val_logits, torch.from_numpy(LOGITS[:12]))
    assert torch.equal(found.test_logits, torch.from_numpy(LOGITS[12:]))
    assert found.taus == [0.0, 1.5]
    assert found.val_indices + found.test_indices == list(range(30))


def test_given_indices_are_kept(tmp_path):
    indices = {"val_indices": np.arange(12) * 7, "test_indices": np.arange(18) * 7 + 1}
    found = read_outputs(saved(tmp_path, {**DIVIDED, **indices}), 0.2, 5)
    assert found.val_indices == indices["val_indices"].tolist()
    assert found.test_indices == indices["test_indices"].tolist()


@pytest.mark.parametrize(
    ("suffix", "metadata"),
    [
        (".npz", {"class_names": np.array(["a", "b", "c"]), "weights": np.array("f00")}),
        (".safetensors", {"class_names": '["a", "b", "c"]', "weights": "f00"}),
    ],
)
def test_names_and_weights_are_texts(tmp_path, suffix, metadata):
    path = saved(tmp_path, FLAT, suffix, metadata)
    found = read_outputs(path, 0.2, 0)
    assert (found.class_names, found.weights) == (["a", "b", "c"], "f00")
    assert read_items(path).weights == "f00"


def test_any_type_of_number_will_do(tmp_path):
    expected = read_outputs(saved(tmp_path, DIVIDED), 0.2, 0)
    types = {
        "val_logits": np.float64,
        "test_logits": ">f4",
        "val_labels": np.uint8,
        "test_labels": np.float16,
        "class_counts": np.float16,
        "taus": np.float16,
    }
    arrays = {name: array.astype(types[name]) for name, array in DIVIDED.items()}
    assert_equal(read_outputs(saved(tmp_path, arrays), 0.2, 0), expected)


def test_bfloat16_is_widened(tmp_path):
    path = tmp_path / "outputs.safetensors"
    arrays = {name: torch.from_numpy(array).contiguous() for name, array in FLAT.items()}
    narrow = arrays["logits"].bfloat16()
    save_torch({**arrays, "logits": narrow}, path)
    assert torch.equal(read_items(path).logits[:, 0], narrow.float())


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_posteriors_become_their_logs(tmp_path, kind):
    arrays = changed(FLAT, logits=None, posteriors=POSTERIORS[:, 0].astype(kind))
    found = read_outputs(saved(tmp_path, arrays), 0.2, 0)
    expected = read_outputs(saved(tmp_path, FLAT), 0.2, 0)
    wanted = expected.test_logits.log_softmax(-1)
    assert torch.allclose(found.test_logits, wanted, rtol=0, atol=1e-6)
    parts = changed(
        DIVIDED,
        val_logits=None,
        val_posteriors=POSTERIORS[:12].astype(kind),
        test_logits=None,
        test_posteriors=POSTERIORS[12:].astype(kind),
    )
    found = read_outputs(saved(tmp_path, parts), 0.2, 0)
    assert torch.allclose(found.val_logits.exp(), torch.from_numpy(POSTERIORS[:12]), atol=1e-6)


def test_certain_posteriors_stay_finite(tmp_path):
    arrays = {"posteriors": np.array([[1, 0, 0], [1e-300, 1, 0]])}
    logits = read_items(saved(tmp_path, arrays)).logits
    assert logits.isfinite().all()
    assert logits.dtype == torch.float32
    assert (logits.softmax(-1)[:, 0, 2] < 1e-30).all()


def test_new_items_may_lack_labels(tmp_path):
    found = read_items(saved(tmp_path, {"logits": LOGITS}))
    assert torch.equal(found.logits, torch.from_numpy(LOGITS))
    assert (found.labels, found.weights) == (None, "")
    found = read_items(saved(tmp_path, FLAT, ".safetensors"))
    assert found.logits.shape == (30, 1, 3)
    assert torch.equal(found.labels, torch.from_numpy(LABELS))
    message = refused(saved(tmp_path, changed(FLAT, labels=LABELS + 1)), read_items)
    assert "labels out of range: row 2 is 3, expected a whole number from 0 to 2" in message
    message = refused(saved(tmp_path, changed(FLAT, logits=None)), read_items)
    assert "logits or posteriors is missing, the file holds labels, class_counts" in message


def at(array, row, value):
    copy = np.array(array, dtype=np.float64)
    copy[row] = value
    return copy


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_counts": None}, "class_counts is missing, the file holds "),
        ({"labels": None}, "labels is missing, the file holds "),
        ({"logits": None}, "logits or posteriors is missing, the file holds "),
        ({"posteriors": POSTERIORS[:, 0]}, "holds both logits and posteriors"),
        ({"val_logits": LOGITS}, "holds both logits and val_logits"),
        ({"class_counts": COUNTS[:2]}, "of 3 classes, class_counts of 2"),
        ({"class_counts": at(COUNTS, 1, 0)}, "class_counts out of range: row 1 is 0.0, expected"),
        ({"class_counts": at(COUNTS, 1, 2.5)}, "row 1 is 2.5, expected a whole number from 1 up"),
        ({"class_counts": at(COUNTS, 1, 1e300)}, "class_counts out of range: row 1 is 1e+300"),
        ({"class_counts": COUNTS[None]}, "class_counts has shape (1, 3), expected one list"),
        ({"labels": LABELS[:-1]}, "labels has 29 entries for 30 items"),
        ({"labels": LABELS - 1}, "labels out of range: row 0 is -1, expected a whole number"),
        ({"labels": at(LABELS, 4, 3)}, "labels out of range: row 4 is 3.0, expected"),
        ({"labels": at(LABELS, 4, 0.5)}, "labels out of range: row 4 is 0.5, expected"),
        ({"labels": at(LABELS, 4, np.nan)}, "labels out of range: row 4 is nan"),
        ({"labels": LABELS > 1}, "labels is of type bool, expected numbers"),
        ({"logits": at(LOGITS[:, 0], 7, np.nan)}, "logits: row 7 is not finite"),
        ({"logits": at(LOGITS[:, 0], 7, 1e300)}, "logits: row 7 is not finite"),
        ({"logits": LOGITS[:, 0, 0]}, "logits has shape (30,), expected at least one"),
        ({"logits": LOGITS[:0, 0]}, "logits has shape (0, 3), expected at least one"),
        ({"logits": LOGITS[:, :0]}, "logits has shape (30, 0, 3), expected at least one"),
        ({"logits": LOGITS}, "taus is missing, which 2 experts need"),
        ({"taus": TAUS}, "taus is [0.0, 1.5], expected one finite number for each of the 1"),
        ({"taus": TAUS[:1] + np.inf}, "taus is [inf], expected"),
        ({"labels": LABELS[:1], "logits": LOGITS[:1, 0]}, "none of the 1 items can be set aside"),
    ],
)
def test_a_wrong_whole_set_is_refused_in_one_sentence(tmp_path, suffix, changes, message):
    assert message in refused(saved(tmp_path, changed(FLAT, **changes), suffix))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_logits": LOGITS[:12]}, "12 items are both validation and test"),
        ({"test_labels": None}, "test_labels is missing, the file holds val_logits, val_labels"),
        ({"test_logits": None}, "test_logits or test_posteriors is missing"),
        ({"test_logits": LOGITS[12:, :1]}, "validation items have 2 experts, test items 1"),
        ({"val_indices": np.arange(12)}, "test_indices is missing"),
        ({"val_indices": np.arange(11)}, "val_indices has 11 entries for 12 items"),
        ({"val_indices": np.arange(12) / 2}, "val_indices out of range: row 1 is 0.5"),
        (
            {"val_indices": np.arange(12), "test_indices": np.arange(18) + 9},
            "3 items are both validation and test",
        ),
    ],
)
def test_a_wrong_division_is_refused_in_one_sentence(tmp_path, changes, message):
    if message.startswith("12"):
        changes = {**changes, "test_labels": LABELS[:12]}
    assert message in refused(saved(tmp_path, changed(DIVIDED, **changes)))


@pytest.mark.parametrize(
    ("posteriors", "message"),
    [
        (LOGITS[:, 0] - 9, "posteriors: row 0 holds -"),
        (POSTERIORS[:, 0] * 1.002, "posteriors: row 0 sums to 1.002, expected probabilities"),
        (at(POSTERIORS[:, 0], 6, 0.4), "posteriors: row 6 sums to 1.2, expected probabilities"),
        (at(POSTERIORS[:, 0], 6, np.nan), "posteriors: row 6 sums to nan"),
        (at(POSTERIORS[:, 0], 6, [np.inf, -np.inf, 1]), "posteriors: row 6 holds -inf"),
        (at(POSTERIORS, (6, 1), 0.4), "posteriors: row 6 of expert 1 sums to 1.2"),
    ],
)
def test_what_is_no_posterior_is_refused(tmp_path, posteriors, message):
    arrays = changed(FLAT, logits=None, posteriors=posteriors)
    assert message in refused(saved(tmp_path, arrays))


def test_posteriors_may_be_rounded(tmp_path):
    arrays = {"posteriors": POSTERIORS[:, 0].astype(np.float16)}
    assert read_items(saved(tmp_path, arrays)).logits.shape == (30, 1, 3)


@pytest.mark.parametrize(
    ("suffix", "metadata", "message"),
    [
        (".npz", {"class_names": np.array(["a", "b"])}, "class_names has 2 entries for 3 classes"),
        (".npz", {"class_names": np.arange(3)}, "class_names is not a list of texts"),
        (".npz", {"class_names": np.array("abc")}, "class_names is not a list of texts"),
        (".npz", {"weights": np.arange(3)}, "weights is not a text"),
        (".npz", {"weights": np.array(3)}, "weights is not a text"),
        (".safetensors", {"class_names": "a, b, c"}, "class_names is not a list of texts"),
        (".safetensors", {"class_names": "[0, 1, 2]"}, "class_names is not a list of texts"),
        (".safetensors", {"class_names": '["a"]'}, "class_names has 1 entries for 3 classes"),
    ],
)
def test_wrong_texts_are_refused(tmp_path, suffix, metadata, message):
    assert message in refused(saved(tmp_path, FLAT, suffix, metadata))


def test_objects_are_not_read(tmp_path):
    arrays = changed(FLAT, labels=LABELS.astype(object))
    assert "labels: not readable (Object arrays" in refused(saved(tmp_path, arrays))


def test_what_is_not_ours_may_be_anything(tmp_path):
    arrays = {**FLAT, "notes": np.array([{"a": 1}], dtype=object), "test_images": np.zeros(3)}
    assert len(read_outputs(saved(tmp_path, arrays), 0.2, 0).test_labels) == 24


def test_other_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    assert "expected a .npz or .safetensors file" in refused(tmp_path / "a.csv")
    for name in ("b.npz", "b.safetensors"):
        assert "cannot be read (No such file" in refused(tmp_path / name)
    (tmp_path / "c.npz").mkdir()
    assert "cannot be read (Is a directory)" in refused(tmp_path / "c.npz")


def test_one_array_under_the_name_of_many_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", LOGITS)
    assert "not readable" in refused((tmp_path / "a.npy").rename(tmp_path / "a.npz"))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_torn_file_is_refused(tmp_path, suffix):
    path = saved(tmp_path, DIVIDED, suffix)
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        assert "not readable" in refused(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_or_read_as_it_was(tmp_path, save):
    path = tmp_path / "outputs.npz"
    save(path, **DIVIDED)
    data = path.read_bytes()
    whole = read_outputs(path, 0.2, 0)
    for place in range(0, len(data), 29):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        with contextlib.suppress(UserError):
            assert_equal(read_outputs(path, 0.2, 0), whole)


def test_validation_within_the_test_part_is_noticed_without_indices(tmp_path):
    """As when a fifth of the test set was set aside and then tested on all the same."""
    leaking = {"val_logits": LOGITS[::5], "test_logits": LOGITS, "class_counts": COUNTS}
    leaking |= {"val_labels": LABELS[::5], "test_labels": LABELS, "taus": TAUS}
    assert "6 items are both validation and test" in refused(saved(tmp_path, leaking))
    for name in ("val_logits", "test_logits"):  # those of a hard classifier recur by nature
        leaking[name] = np.where(leaking[name] == leaking[name].max(-1, keepdims=True), 9, 0)
    hard = {**leaking, "val_logits": np.tile(leaking["val_logits"], (4, 1, 1))}
    hard["val_labels"] = np.tile(leaking["val_labels"], 4)
    assert len(read_outputs(saved(tmp_path, hard)).test_labels) == len(LABELS)


def test_an_item_named_twice_is_refused(tmp_path):
    arrays = {**DIVIDED, "val_indices": np.zeros(12, int), "test_indices": np.arange(1, 19)}
    assert "val_indices names an item twice" in refused(saved(tmp_path, arrays))
