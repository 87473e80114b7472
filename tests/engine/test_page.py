"""Pages: whole by themselves, with every name as text and only pictures of their own folder."""

import base64
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.engine import page as module
from moectl.engine.page import page

EVIL = "<script>alert(\"1\")</script> & '$x$' [a](http://b) <http://c> **d** _e_ &lt; \\* ~~f~~"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def made(parsed: Callable[[Path], Any], tmp_path: Path) -> Callable[..., Any]:
    """Make the page of a text about `tmp_path`, and read it."""

    def make(text: str, title: str = "t") -> Any:
        path = tmp_path / "page.html"
        path.write_bytes(page(title, text, tmp_path))
        return parsed(path)

    return make


def sized(width: int, height: int, dots: int = 0) -> bytes:
    """Return the beginning of a PNG file of so many pixels, and dots per metre if it says so."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    density = struct.pack(">IIB", dots, dots, 1)
    chunks = [(b"IHDR", header)] + ([(b"pHYs", density)] if dots else [])
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_a_report_keeps_its_parts(made: Callable[..., Any]) -> None:
    text = "# A\n\n## B `c`\n\nwords\n\n> note\n\n    code here\n\n- one\n- two\n\n"
    found = made(f"{text}| a | b |\n| --- | ---: |\n| x | 1 |\n")
    assert [tag for tag, _ in found.tags if tag in ("h1", "h2", "blockquote", "li", "pre")] == [
        "h1", "h2", "blockquote", "pre", "li", "li",
    ]  # fmt: skip
    assert [one.get("style") for one in found.all("td")] == [None, "text-align:right"]
    wide = [values for tag, values in found.tags if tag == "div"]
    assert wide == [{"class": "wide"}], "a table scrolls inside itself"


def test_names_are_text_wherever_they_stand(made: Callable[..., Any]) -> None:
    found = made(f"# {EVIL}\n\nis {EVIL}\n\n| {EVIL} |\n| --- |\n| {EVIL} |\n", EVIL)
    assert found.words.count(EVIL) == 5


def test_a_picture_is_inside(made: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a b.png").write_bytes(PIXEL)
    (tmp_path / "c.jpg").write_bytes(b"\xff\xd8\xffrest")
    found = made('![A "b" <c>](plots/a%20b.png)\n\n![C](c.jpg)\n')
    first, second = found.all("img")
    assert base64.b64decode(str(first["src"]).partition(",")[2]) == PIXEL
    assert first["alt"] == 'A "b" <c>'
    assert 'A "b" <c>' in found.words, "the caption is read below it too"
    assert str(second["src"]).startswith("data:image/jpeg;base64,")
    assert "width" not in second


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (sized(144, 288, 5669), ("96", "192")),  # 144 dots per inch, as plots have
        (sized(144, 288), ("144", "288")),
        (sized(144, 288, 3780), ("144", "288")),
        (b"\x89PNG\r\n\x1a\n", (None, None)),
    ],
)
def test_a_picture_has_the_size_it_was_made_for(
    made: Callable[..., Any], tmp_path: Path, data: bytes, size: tuple[str | None, str | None]
) -> None:
    (tmp_path / "a.png").write_bytes(data)
    (found,) = made("![a](a.png)").all("img")
    assert (found.get("width"), found.get("height")) == size


def test_a_missing_picture_is_a_sentence(made: Callable[..., Any]) -> None:
    found = made("![a](plots/gone.png)")
    assert found.all("img") == []
    assert "The picture plots/gone.png is not there." in found.words


@pytest.mark.parametrize("data", [b"", b"<svg onload='x'/>", b"GIF89a"])
def test_what_is_no_picture_is_not_shown(
    made: Callable[..., Any], tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "a.png").write_bytes(data)
    found = made("![a](a.png)")
    assert found.all("img") == []
    assert "The file a.png is no picture that a page can show." in found.words


def test_pictures_of_other_folders_are_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-secret.png"
    outside.write_bytes(PIXEL)
    (tmp_path / "link.png").symlink_to(outside)
    for name in (f"../{outside.name}", str(outside), "link.png", f"%2e%2e/{outside.name}"):
        found = made(f"![a]({name})")
        assert found.all("img") == [], name
        assert "lies outside of the folder and is not shown." in found.words, name


@pytest.mark.parametrize("name", ["https://example.org/a.png", "a%00b.png", "x" * 300, "."])
def test_a_name_that_can_be_no_file_is_not_there(made: Callable[..., Any], name: str) -> None:
    found = made(f"![a]({name})")
    assert found.all("img") == []
    assert "is not there." in found.words


def test_pictures_that_would_be_too_much_are_left_out(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(PIXEL)
    monkeypatch.setattr(module, "_ROOM", 2 * len(PIXEL))
    found = made("![a](a.png)\n\n![b](a.png)\n\n![c](a.png)\n")
    assert [one["alt"] for one in found.all("img")] == ["a", "b"]
    assert "The picture a.png is left out: the page would become too large." in found.words


def test_a_head_without_names_is_hidden_by_style(made: Callable[..., Any], tmp_path: Path) -> None:
    made("| | |\n| --- | --- |\n| a | b |\n")
    text = (tmp_path / "page.html").read_text()
    assert "thead:not(:has(th:not(:empty))) { display: none; }" in text
    assert "<th></th>" in text


def test_what_is_no_utf_8_does_not_stop_a_page(made: Callable[..., Any]) -> None:
    assert "a?b" in made("a\udcffb").words


def test_equal_reports_make_equal_pages(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PIXEL)
    text = "# t\n\n![a](a.png)\n"
    assert page("t", text, tmp_path) == page("t", text, tmp_path)
