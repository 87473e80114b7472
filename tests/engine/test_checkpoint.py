"""Checkpoint folders: names, order, rotation. What may go wrong is in tests/faults."""

import json
from pathlib import Path

import pytest

from moectl.engine import checkpoint


def saved(root: Path, *updates: int) -> None:
    for update in updates:
        checkpoint.save(root, update, {"a": b"x" * update, "b": b""}, {"processes": 1})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "c", 12, {"a": b"\x00\xff", "b": b""}, {"processes": 2})
    files, manifest = checkpoint.read(folder)
    assert files == {"a": b"\x00\xff", "b": b""}
    assert (manifest["update"], manifest["processes"], manifest["format"]) == (12, 2, 1)
    assert folder.name == "update-00000012"
    assert checkpoint.update_of(folder) == 12
    assert json.loads((folder / "manifest.json").read_text())["files"]["a"]["bytes"] == 2


def test_newest_is_chosen_by_number(tmp_path: Path) -> None:
    saved(tmp_path / "c", 9, 100, 20)
    assert checkpoint.choose(tmp_path / "c", fall_back=False).name == "update-00000100"


def test_none_at_all_is_the_empty_path(tmp_path: Path) -> None:
    for root in (tmp_path / "none", tmp_path):
        chosen = checkpoint.choose(root, fall_back=False)
        assert chosen == Path()
        assert checkpoint.update_of(chosen) == -1


def test_strangers_are_not_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "c"
    saved(root, 1)
    for name in ("update-2", "update-00000003x", ".part-00000004-1", "corrupt-update-00000005-1"):
        (root / name).mkdir()
    assert [path.name for path in checkpoint.existing(root)] == ["update-00000001"]
    checkpoint.clean(root)
    assert ".part-00000004-1" not in names(root)
    assert "corrupt-update-00000005-1" in names(root), "evidence is kept"


def test_the_same_update_can_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1, 2)
    folder = checkpoint.save(tmp_path / "c", 2, {"new": b"1"}, {})
    assert checkpoint.read(folder)[0] == {"new": b"1"}
    assert names(tmp_path / "c") == ["update-00000001", "update-00000002"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 5, [4, 5]),
        (3, 2, [2, 3, 4, 5]),
        (9, 1, [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    root = tmp_path / "c"
    saved(root, 1, 2, 3, 4, 5)
    checkpoint.prune(root, keep, best)
    assert names(root) == [f"update-{update:08d}" for update in left]


def test_a_failed_deletion_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "c"
    saved(root, 1, 2, 3)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    checkpoint.prune(root, 2, None)
    assert "could not be deleted" in caplog.text
    assert len(names(root)) == 3
