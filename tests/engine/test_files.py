"""Files that are written whole or not at all."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from moectl.engine import files
from moectl.engine.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    path = folder / "a.txt"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(folder.iterdir()) == [path]


def test_the_file_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, real = tmp_path / "a.txt", [], os.fsync

    def watch(descriptor: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    files.write_text(path, "x")
    assert seen == [(False, False), (True, True)], "the file first, the folder after the rename"


def test_json_refuses_nan(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": [1, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, "ü"]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, "ü"]}


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_sha256_is_the_usual_one() -> None:
    assert files.sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_names_that_no_file_can_have_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 5000), tmp_path / "a\0b", tmp_path / "none"):
        assert not files.is_file(path)
        assert not files.is_folder(path)
    assert files.is_folder(tmp_path)
    assert not files.is_file(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    files.require_file(file)
    files.require_folder(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        files.require_file(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        files.require_folder(file)


@pytest.mark.parametrize("data", [b"a\nb", b"\xef\xbb\xbfa\nb", b"a\r\nb"])
def test_text_is_read_whatever_wrote_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "text"
    path.write_bytes(data)
    assert files.read_text(path) == "a\nb"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin: not UTF-8 text \(byte 3\)"):
        files.read_text(tmp_path / "latin")
    for read in (files.read_bytes, files.read_text):
        with pytest.raises(UserError, match=r"none: cannot be read \(No such file") as caught:
            read(tmp_path / "none", "look elsewhere")
        assert caught.value.hint == "look elsewhere"
