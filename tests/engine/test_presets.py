"""Finding preset files, and names that are safe as file names."""

from pathlib import Path

import pytest

from moectl.engine import presets
from moectl.engine.errors import UserError


@pytest.fixture
def own(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Only the presets of the working folder, of two rooms."""
    monkeypatch.setattr(presets, "roots", lambda: [Path("presets"), Path("shipped")])
    for place in (
        "presets/a/x2",
        "presets/a/x10",
        "shipped/a/x2",
        "shipped/b/x2",
        "shipped/b/only",
    ):
        path = Path(f"{place}.toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# source: {place}\n")
    return isolated


def test_presets_are_listed_by_room_and_natural_order(own: Path) -> None:
    names = [(preset.room, preset.name) for preset in presets.available()]
    assert names == [("a", "x2"), ("a", "x10"), ("b", "only"), ("b", "x2")]
    assert [preset.name for preset in presets.available("a")] == ["x2", "x10"]
    assert presets.available("none") == []


def test_the_nearer_folder_hides_the_shipped_one(own: Path) -> None:
    assert presets.find("a", "x2").path == Path("presets/a/x2.toml")
    assert presets.find("b", "x2").path == Path("shipped/b/x2.toml")


def test_references(own: Path) -> None:
    assert presets.find(None, "only").room == "b"
    assert presets.find(None, "b/x2").path == Path("shipped/b/x2.toml")
    assert presets.find("b", "b/x2").path == Path("shipped/b/x2.toml")
    by_path = presets.find("b", "presets/a/x10.toml")
    assert (by_path.room, by_path.name) == ("b", "x10")
    assert presets.find(None, "presets/a/x10.toml").room == "a"


@pytest.mark.parametrize(
    ("room", "reference", "message"),
    [
        ("a", "x3", r"x3: no such preset for a; did you mean x2\?"),
        (None, "x2", "x2: more than one preset has this name"),
        (None, "c/x2", "x2: no such preset for c"),
        ("a", "none.toml", r"none\.toml: no such preset file"),
        ("a", "../b/x2", "is not a usable name"),
        ("a", "../x2", "is not a usable name"),
        ("a", "b/only", "b/only: a preset of b, expected one of a"),
        ("a", "", "is not a usable name"),
        ("a", "n" * 300, "is not a usable name"),
        ("a", "n" * 300 + ".toml", "no such preset file"),
    ],
)
def test_references_that_lead_nowhere(
    own: Path, room: str | None, reference: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        presets.find(room, reference)


def test_header_is_read_from_the_first_comments(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        "# command: moectl a train: now\n#expected:  5\n# other: no\n\n# cost: too late\n"
    )
    header = presets.Preset("a", "p", path).header()
    assert header == {"command": "moectl a train: now", "expected": "5"}


@pytest.mark.parametrize("name", ["a", "A1", "a.b-c_d", "0", "console", "com10", "n" * 64])
def test_usable_names(name: str) -> None:
    assert presets.check_name(name, "run name") == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a..b", "../x", "a/b", "a\\b", "/etc/x", "-a", ".a", "_a", "a b", "a\n"),
        *("a\0b", "ü", "CON", "con", "nul.txt", "Com1", "LPT9", "n" * 65),
    ],
)
def test_unusable_names(name: str) -> None:
    with pytest.raises(UserError, match=r"run name .* is not a usable name"):
        presets.check_name(name, "run name")


def test_shipped_presets_are_found_from_anywhere() -> None:
    assert presets.find("balpoe", "digits_ir20").path.is_file()
