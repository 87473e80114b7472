"""TOML from strangers: bounded in size, key length and nesting."""

import time
from pathlib import Path

import pytest

from moectl.engine.errors import UserError
from moectl.engine.toml import MAX_BYTES, MAX_NESTING, MAX_PARTS, parse_toml, read_toml

BOMBS = {
    "dotted-key": (".".join("a" * 16_000) + " = 1").encode(),
    "dotted-table": b"[" + b".".join([b"a"] * 16_000) + b"]",
    "quoted-dotted-key": b".".join([b'"a"'] * 12_000) + b" = 1",
    "literal-dotted-key": b".".join([b"'a'"] * 12_000) + b" = 1",
    "mixed-dotted-key": b".".join([b'"a"', b"b"] * 8_000) + b" = 1",
    "spaced-dotted-key": b" . ".join([b"a"] * 12_000) + b" = 1",
    "brackets": b"x = " + b"[" * 30_000 + b"]" * 30_000,
    "braces": b"x = " + b"{a=" * 15_000 + b"1" + b"}" * 15_000,
    "huge-integer": b"x = " + b"9" * 5000,
    "huge": b"#" * 5_000_000,
    "nul": b"x = '\x00'",
    "duplicate": b"x = 1\nx = 2",
    "not-utf8": b"x = '\xff\xfe'",
    "unclosed": b'x = "' + b"\\" * 60_000,
    "quotes": b"'\"" * 30_000,
    "directory": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.toml"
    if name == "directory":
        path.mkdir()
    else:
        path.write_bytes(BOMBS[name])
    start = time.process_time()
    with pytest.raises(UserError, match=path.name):
        read_toml(path)
    assert time.process_time() - start < 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: cannot be read \(No such file"):
        read_toml(tmp_path / "none.toml")


def test_what_is_within_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b'\xef\xbb\xbf[a.b]\nc = [[1, 2], [3]] # \'\nd = {x = "[[[.a.b.c"}\n')
    assert read_toml(path) == {"a": {"b": {"c": [[1, 2], [3]], "d": {"x": "[[[.a.b.c"}}}}
    exact = b"x = 1\n"
    path.write_bytes(exact + b"#" * (MAX_BYTES - len(exact)))
    assert read_toml(path) == {"x": 1}


def test_the_bounds_themselves_are_allowed() -> None:
    key = ".".join("a" * MAX_PARTS)
    assert parse_toml(f"{key} = 1", "here")
    with pytest.raises(UserError, match=f"here: a key has more than {MAX_PARTS} dotted parts"):
        parse_toml(f"{key}.a = 1", "here")
    nested = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert parse_toml(f"x = {nested}", "here")
    with pytest.raises(UserError, match=f"here: brackets nested deeper than {MAX_NESTING}"):
        parse_toml(f"x = [{nested}]", "here")


def test_strings_may_hold_what_keys_may_not() -> None:
    dots = ".".join("a" * 50)
    text = f"one = '{dots}'\ntwo = \"\"\"\n{dots}\n{'[' * 50}\"\"\"\nthree = '''{dots}'''"
    assert parse_toml(text, "here")["one"] == dots
    assert parse_toml("x = '1.2.3.4.5.6.7.8.9'", "here")
