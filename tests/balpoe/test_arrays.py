from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moectl.balpoe.arrays import LARGEST, ArrayFile, numbers, open_arrays, whole
from moectl.engine.errors import UserError


def held(**arrays: object) -> ArrayFile:
    return ArrayFile(
        Path("x.npz"), {name: np.asarray(value) for name, value in arrays.items()}, {}, list(arrays)
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_are_read_by_name_and_others_left_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"some{suffix}"
    if suffix == ".npz":
        np.savez(path, a=np.arange(3), b=np.array([{}], dtype=object))
    else:
        save_file({"a": torch.arange(3), "b": torch.zeros(2)}, path, {"note": "x"})
    found = open_arrays(path, ("a", "missing"))
    assert found.arrays["a"].tolist() == [0, 1, 2]
    assert list(found.arrays) == ["a"]
    assert set(found.keys) == {"a", "b"}
    assert found.metadata == ({} if suffix == ".npz" else {"note": "x"})


def test_narrow_floats_are_widened(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    found = open_arrays(tmp_path / "a.safetensors", ("a",)).arrays["a"]
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 5], r"x.npz: a out of range: row 1 is 5, expected a whole number from 0 to 4"),
        ([0.5], "row 0 is 0.5"),
        ([float("nan")], "row 0 is nan"),
        ([[1]], r"shape \(1, 1\), expected one list"),
        (["one"], "of type"),
    ],
)
def test_what_is_no_list_of_whole_numbers_is_refused(values: list[object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        whole(held(a=values), "a", 0, 4)


def test_whole_numbers_of_any_type_become_int64() -> None:
    for kind in (np.uint8, np.int32, np.float16, np.float64):
        found = whole(held(a=np.array([0, 3], dtype=kind)), "a", 0, LARGEST, 2)
        assert (found.dtype, found.tolist()) == (np.int64, [0, 3])
    with pytest.raises(UserError, match="a has 2 entries for 3 items"):
        whole(held(a=[0, 3]), "a", 0, 4, 3)


def test_a_missing_array_names_what_is_there() -> None:
    with pytest.raises(UserError, match="a is missing, the file holds b, c"):
        numbers(held(b=1, c=2), "a")
