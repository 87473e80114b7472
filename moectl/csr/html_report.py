"""The report of one evaluation as a single HTML file that needs nothing beside it."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moectl.csr.charts import (
    Document,
    Table,
    baseline_table,
    concept_table,
    pointing_table,
    skipped,
    study_table,
    summary,
    task_table,
)
from moectl.csr.contact_sheets import file_names
from moectl.csr.settings import CsrSettings
from moectl.engine import plot
from moectl.engine.files import is_file, write_bytes
from moectl.engine.report import MISSING, duration
from moectl.engine.settings import dump, flatten
from moectl.engine.toml import read_toml
from moectl.engine.tracking import loads_or_none

DISCLAIMER = "For research use only. Not a medical device."
CURVES = (
    "Training losses are weighted as the settings say, and hold the boxes where there are any."
    " Validation losses of concepts and verdict are plain cross-entropies, so both need not meet."
)
_DPI = 144  # of pictures, in which an inch is 96 pixels of a page
_SHEETS = 24 * 2**20  # bytes of contact sheets that a page can bear
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #262626; background: #fff;
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 2px solid #0072b2; }
.note { background: #fff4e5; border-left: 4px solid #d55e00; padding: .4rem .8rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
th { text-align: left; font-weight: 600; }
thead th { vertical-align: bottom; min-width: 3.5rem; overflow-wrap: normal; }
tbody th { position: sticky; left: 0; background: #fff; font-weight: 400;
  max-width: min(14rem, 40vw); overflow-wrap: break-word; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers thead th:not(:first-child) { white-space: normal; overflow-wrap: normal; }
figure { margin: 1rem 0; }
figcaption { font-size: .9rem; color: #555; }
img { max-width: 100%; height: auto; }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .25rem; }
  .numbers td { white-space: normal; overflow-wrap: normal; }
  thead th { min-width: 0; }
  tbody th { position: static; max-width: 40mm; }
  h2 { break-after: avoid; }
  tr, figure { break-inside: avoid; }
  img { max-height: 240mm; width: auto; }
}
"""


def write_html(folder: Path, evaluation: Path) -> None:
    """Write `report.html` beside the scores of an evaluation, from files alone.

    Args:
        folder: of the run.
        evaluation: folder with `metrics.json`; without it nothing is written.
    """
    document = loads_or_none(evaluation / "metrics.json")
    if not document:
        return
    record = loads_or_none(folder / "run.json") or {}
    settings = folder / "settings.toml"
    known = flatten(read_toml(settings)) if is_file(settings) else {}
    name = folder.resolve().name
    parts = [
        _title(name, evaluation.name, document, record, known),
        _section("Summary", _table(summary(document))),
        _section("Concepts", _table(concept_table(document)), _lines(document["concepts"])),
        _verdict(evaluation, document),
        _pointing(document),
        _baselines(evaluation, document),
        _study(evaluation, document),
        _atlas(folder, document),
        _curves(folder),
        _making(document, record, known),
    ]
    # A path in a command line may hold what is no UTF-8.
    page = _page(name, "\n".join(part for part in parts if part))
    write_bytes(evaluation / "report.html", page.encode("utf-8", "replace"))


# What the page tells


def _title(
    name: str, measured: str, document: Document, record: Document, settings: Document
) -> str:
    split, _, tag = measured.partition("@")
    weights = document["weights"]
    sizes = record.get("data", {}).get("images", {})
    source = settings.get(f"data.{'test' if split == 'test' else 'train'}_csv")
    if settings.get("data.dataset") == "synthetic":
        source = "generated glyphs"
    words = {"test": "test", "val": "validation"}.get(split, split)
    lines = [f"{document['images']} {words} images of {source or 'unknown data'}."]
    if sizes:
        lines.append(f"Trained on {sizes['train']} images, {sizes['val']} chose the best epochs.")
    lines.append(f"Weights {weights['file']} of epoch {weights['epoch']}.")
    if tag not in ("", Path(weights["file"]).stem):
        lines.append(f"Evaluation {tag}.")
    warning = "The best epoch and the thresholds were chosen on these very images."
    return "\n".join(
        [
            f"<h1>{_text(name)}</h1>",
            _paragraph(DISCLAIMER, "note"),
            _paragraph(" ".join(lines)),
            _paragraph(warning, "note") if split == "val" else "",
        ]
    )


def _lines(found: Document) -> str:
    return "\n".join(_paragraph(line) for line in skipped(found))


def _verdict(evaluation: Path, document: Document) -> str:
    if "task" not in document:
        return ""
    table = _section("Verdict", _table(task_table(document)), _lines(document["task"]))
    return f"{table}\n{_confusion(evaluation, document['task'])}"


def _confusion(evaluation: Path, task: Document) -> str:
    if "confusion" not in task:
        return ""
    path = evaluation / "confusion.png"
    plot.confusion(path, task["confusion"], title="Verdict", names=list(task["columns"]))
    return _section("Confusions", _picture(path, "Rows are true classes."))


def _pointing(document: Document) -> str:
    if "pointing" not in document:
        return ""
    words = (
        "How often the highest cell of a map lies in a box of its concept: of the concept map, and"
        " of the similarity to the nearest prototype. Chance is the share of the image that the"
        " boxes cover. IoU compares the boxes with the cells in which the concept map says yes."
    )
    return _section("Where it looks", _paragraph(words), _table(pointing_table(document)))


def _baselines(evaluation: Path, document: Document) -> str:
    found = loads_or_none(evaluation / "baselines.json")
    if not found:
        return ""
    words = "Simpler verdicts on the same backbone; p of the sign test on right decisions."
    table = _table(baseline_table(found))
    return _section("Baselines", _paragraph(words), _other(found, document), table)


def _study(evaluation: Path, document: Document) -> str:
    folder = evaluation.with_name(f"{evaluation.name}-oracle")
    found = loads_or_none(folder / "study.json")
    if not found:
        return ""
    words = (
        "What corrections would bring if a person always knew the truth."
        " Way and margin of the first row were chosen on"
        f" {found['validation']['images']} validation images."
    )
    return _section(
        "Corrections",
        _paragraph(words),
        _other(found, document),
        _table(study_table(found)),
        _picture(folder / "study.png", "Corrections of more and more concepts of each image."),
    )


def _atlas(folder: Path, document: Document) -> str:
    atlas = loads_or_none(folder / "atlas.json")
    if not atlas:
        return ""
    suspects = [
        f"{one['concept']} {one['index']} ({100 * one['out_of_box']:.0f} %)"
        for one in atlas["prototypes"]
        if one["suspect"]
    ]
    words = "Training images most like each prototype, with the place that is most like it."
    flagged = f"Look outside of the boxes of their concept in most of them: {', '.join(suspects)}."
    sheets = [
        path
        for stem in file_names(atlas["concepts"])
        for path in sorted(folder.glob(f"figures/atlas_{stem}*.png"), key=_sheet_order)
        if re.fullmatch(rf"atlas_{stem}(-\d+)?\.png", path.name)
    ]
    shown, left = [], _SHEETS
    for path in sheets:
        left -= path.stat().st_size
        shown.append(_picture(path) if left >= 0 else "")
    missing = sum(not one for one in shown)
    return _section(
        "Atlas of prototypes",
        _paragraph(words),
        _other(atlas, document),
        _paragraph(flagged, "note") if suspects else "",
        *shown,
        _paragraph(f"{missing} more sheets are in figures/ of the run.") if missing else "",
    )


def _sheet_order(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 1


def _curves(folder: Path) -> str:
    pictures = [_picture(path) for path in sorted(folder.glob("plots/*.png"))]
    return _section("Learning curves", *pictures, _paragraph(CURVES)) if pictures else ""


def _making(document: Document, record: Document, settings: Mapping[str, Any]) -> str:
    defaults = flatten(dump(CsrSettings()))
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items())
    git = record.get("git") or {}
    seconds = record.get("wall_seconds")
    facts = {
        "weights": document["weights"]["file"],
        "SHA-256": document["weights"]["sha256"],
        "command": record.get("argv"),
        "started": record.get("started"),
        "time": None if seconds is None else duration(seconds),
        "device": record.get("device"),
        "seed": record.get("seed"),
        "versions": versions or None,
        "git commit": git.get("commit"),
        "began with": ", ".join(one["path"] for one in record.get("parents", [])) or None,
    }
    rows = [[name, value] for name, value in facts.items() if value is not None]
    changed = [
        [key, value, defaults.get(key)]
        for key, value in settings.items()
        if value != defaults.get(key)
    ]
    return _section(
        "How it was made",
        _table(Table(("", ""), rows), "words"),
        _paragraph("Settings that differ from the defaults:"),
        _table(Table(("setting", "value", "default"), changed), "words"),
    )


def _other(found: Document, document: Document) -> str:
    """Say so if something was measured on other weights."""
    weights = found["weights"]
    if weights["sha256"] == document["weights"]["sha256"]:
        return ""
    return _paragraph(f"Made with other weights: {weights['file']}, {weights['sha256']}.", "note")


# HTML; whatever is handed to these functions as text is escaped


def _page(title: str, body: str) -> str:
    # The policy lets a reader load nothing else, whatever a name should hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{_text(title)}</h2>", *filter(None, parts), "</section>"])


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def _table(table: Table, kind: str = "numbers") -> str:
    names = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.columns)
    head = f"<thead><tr>{names}</tr></thead>\n" if any(table.columns) else ""
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table class="{kind}">\n{head}<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def _cells(row: Sequence[object]) -> str:
    first, *rest = map(_text, row)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in rest)


def _picture(path: Path, caption: str = "") -> str:
    """Put a PNG file into the page; nothing if it is not there."""
    if not is_file(path):
        return ""
    data = path.read_bytes()
    width, height = (
        round(int.from_bytes(data[place : place + 4]) * 96 / _DPI) for place in (16, 20)
    )
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    alternative = _text(path.stem.replace("_", " "))
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img src="{source}" width="{width}" height="{height}" alt="{alternative}">'
        f"{below}</figure>"
    )


def _text(value: object) -> str:
    return MISSING if value is None else escape(str(value))
