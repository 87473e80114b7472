"""A Markdown report as one HTML page that needs nothing beside it: no picture, style or script.

Headings, tables, lists, quotes, code and pictures are all that a page knows. Whatever else a name
holds, tags and links among them, is text.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from moectl.engine.files import is_file

_KNOWN = ("heading", "table", "list", "blockquote", "code", "backticks", "image")
_ROOM = 32 * 2**20  # bytes of pictures that a page can bear
_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_INCH = 96  # pixels of a page
_METRE = 39.37  # inches
_STYLE = """
:root { color-scheme: light dark; --ink: #262626; --soft: #595959; --line: #e3e3e3;
  --paper: #fff; --shade: #f5f5f5; --mark: #0072b2; --note: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a6a6a6; --line: #3a3a3a;
  --paper: #181818; --shade: #242424; --mark: #56b4e9; --note: #33260f; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 2px solid var(--mark); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
blockquote { background: var(--note); border-left: 4px solid #d55e00; margin: .8rem 0;
  padding: .1rem .8rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: break-word; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
td[style] { white-space: nowrap; }
thead:not(:has(th:not(:empty))) { display: none; }
td:first-child:not(:nth-last-child(-n+2)) { position: sticky; left: 0; background: var(--paper);
  max-width: min(18rem, 40vw); }
code, pre { font: .9em/1.45 ui-monospace, monospace; background: var(--shade); }
code { padding: .1em .25em; border-radius: 3px; }
td code { overflow-wrap: anywhere; }
td:first-child:not(:nth-last-child(-n+2)) code { overflow-wrap: break-word; }
pre { padding: .6rem .8rem; overflow: auto; max-height: 28rem; border-radius: 4px; }
pre code { padding: 0; font-size: 1em; overflow-wrap: normal; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
small { display: block; font-size: .85rem; color: var(--soft); }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide, pre { overflow: visible; max-height: none; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .25rem; }
  td[style] { white-space: normal; }
  td:first-child:not(:nth-last-child(-n+2)) { position: static; }
  h2, h3 { break-after: avoid; }
  tr, img { break-inside: avoid; }
  img { max-height: 240mm; width: auto; }
}
"""


def page(title: str, text: str, folder: Path) -> bytes:
    """Return the page of a report.

    Args:
        title: of the window.
        text: the Markdown.
        folder: that the pictures are looked for in; none is taken from outside.

    Returns:
        HTML, as UTF-8. Equal files make equal pages.
    """
    # The policy lets a reader load nothing else, whatever a name should hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    document = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{_body(text, folder)}</body>
</html>
"""
    # A path in a command line may hold what is no UTF-8.
    return document.encode("utf-8", "replace")


def _body(text: str, folder: Path) -> str:
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("zero").enable(_KNOWN)
    left = _ROOM

    def picture(_renderer: object, tokens: Sequence[Any], place: int, *_: object) -> str:
        nonlocal left
        name, caption = unquote(str(tokens[place].attrs["src"])), tokens[place].content
        found = _read(folder, name)
        if isinstance(found, str):
            return escape(found)
        left -= len(found)
        if left < 0:
            return escape(f"The picture {name} is left out: the page would become too large.")
        return _picture(found, caption)

    markdown.add_render_rule("image", picture)
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return str(markdown.render(text))


def _read(folder: Path, name: str) -> bytes | str:
    """Return the bytes of a picture, or a sentence why there is none."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        data = path.read_bytes() if inside and is_file(path) else None
    except (OSError, ValueError):  # a name that the system cannot have
        inside, data = True, None
    if not inside:
        return f"The picture {name} lies outside of the folder and is not shown."
    if data is None:
        return f"The picture {name} is not there."
    return data if _kind(data) else f"The file {name} is no picture that a page can show."


def _kind(data: bytes) -> str:
    return next((kind for start, kind in _KINDS.items() if data.startswith(start)), "")


def _picture(data: bytes, caption: str) -> str:
    width, height = _size(data)
    size = f' width="{width}" height="{height}"' if width else ""
    source = f"data:image/{_kind(data)};base64,{base64.b64encode(data).decode()}"
    words = escape(caption)
    return f'<img src="{source}"{size} alt="{words}"><small>{words}</small>'


def _size(data: bytes) -> tuple[int, int]:
    """Return width and height in pixels of a page; zeros for what is no PNG or a torn one."""
    if _kind(data) != "png" or len(data) < 24:
        return 0, 0
    sides = [int.from_bytes(data[place : place + 4]) for place in (16, 20)]
    density = data.find(b"pHYs", 0, 200) + 4
    dots = int.from_bytes(data[density : density + 4]) / _METRE if density > 3 else _INCH
    width, height = (round(side * _INCH / dots) if dots else side for side in sides)
    return width, height
