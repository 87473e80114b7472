"""Weights files: checked, and read without running what they hold."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.engine import artefact
from moectl.engine.errors import UserError


def test_round_trip(tmp_path: Path) -> None:
    payload = {"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "epoch": 3, "name": "ü"}
    sidecar = artefact.save(tmp_path / "a.pth", payload, {"model": "Net"})
    found = artefact.load(tmp_path / "a.pth")
    assert torch.equal(found.payload["state_dict"]["w"], payload["state_dict"]["w"])  # type: ignore[index]
    assert (found.payload["epoch"], found.facts["model"]) == (3, "Net")
    assert found.facts == sidecar == json.loads((tmp_path / "a.pth.json").read_text())
    assert found.sha256 == sidecar["sha256"]
    assert sidecar["bytes"] == (tmp_path / "a.pth").stat().st_size


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        artefact.save(tmp_path / name, {"w": torch.ones(3)}, {})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_a_file_without_a_sidecar_is_foreign_but_fine(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    assert artefact.load(tmp_path / "a.pth").facts == {}


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_weights_file_never_runs(tmp_path: Path, old_format: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "a.pth"
    holder = {"state_dict": Payload(mark)}
    torch.save(holder, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match=r"a\.pth: holds more than tensors and plain types"):
        artefact.load(path)
    assert not mark.exists()


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    match kind:
        case "flipped":
            path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>404</html>")


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "text"])
def test_damage_is_found_by_the_checksum(tmp_path: Path, kind: str) -> None:
    artefact.save(tmp_path / "a.pth", {"w": torch.ones(100)}, {})
    damage(tmp_path / "a.pth", kind)
    with pytest.raises(UserError, match=r"a\.pth: does not match the checksum in a\.pth\.json"):
        artefact.load(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_damage_without_a_checksum_is_refused_too(tmp_path: Path, kind: str) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "a.pth")
    damage(tmp_path / "a.pth", kind)
    with pytest.raises(UserError, match=r"a\.pth: (not a weights file|holds more than)"):
        artefact.load(tmp_path / "a.pth")


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth: cannot be read \(No such file"):
        artefact.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        artefact.load(tmp_path)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, expected a dictionary"):
        artefact.load(tmp_path / "list.pth")
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pth")
    for text in ("{", "[]", "3", "\xff"):
        (tmp_path / "a.pth.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"a\.pth\.json"):
            artefact.load(tmp_path / "a.pth")


@pytest.mark.parametrize("text", ["epoch loss\n1 0.5\n", "x", "\n" * 50, "I1\n."])
def test_what_is_wrong_with_a_file_is_said_without_names_of_python(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "tr.txt").write_text(text)
    with pytest.raises(UserError, match=r"tr\.txt: ") as caught:
        artefact.load(tmp_path / "tr.txt")
    assert "Error" not in caught.value.message


def test_allowed_names_may_be_read_and_no_others(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "a.pth"
    torch.save([np.int64(3)], path)
    with pytest.raises(UserError, match="holds more than tensors") as caught:
        artefact.safe_load(path.read_bytes(), "a.pth", hint="do this")
    assert caught.value.hint == "do this"
    allowed = [np._core.multiarray.scalar, np.dtype, type(np.dtype("l"))]
    assert artefact.safe_load(path.read_bytes(), "a.pth", allowed=allowed) == [3]
    with pytest.raises(UserError, match="holds more than tensors"):
        artefact.safe_load(path.read_bytes(), "a.pth")  # allowed once, not for ever
    torch.save([Payload(tmp_path / "ran")], path)
    with pytest.raises(UserError, match="holds more than tensors"):
        artefact.safe_load(path.read_bytes(), "a.pth", allowed=allowed)


def test_a_trusted_file_may_run_code(tmp_path: Path) -> None:
    torch.save([Payload(tmp_path / "ran")], tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    assert artefact.trusting_load(data, "a.pth") == [None]
    assert (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"a\.pth: cannot be read \(.*File exists"):
        artefact.trusting_load(data, "a.pth")
    with pytest.raises(UserError, match=r"b\.pth: cannot be read"):
        artefact.trusting_load(data[:50], "b.pth")


def test_a_file_that_is_cut_off_is_called_so(tmp_path: Path) -> None:
    artefact.save(tmp_path / "a.pth", {"x": torch.zeros(1000)}, {})
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"b\.pth: not a weights file \(cut off\)"):
        artefact.load(tmp_path / "b.pth")
