"""The report of one evaluation as a single HTML file that needs nothing beside it."""

import re
from pathlib import Path

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
from moectl.engine.page import page
from moectl.engine.report import image, making, one_line, paragraphs, run_lines, settings_of, table
from moectl.engine.tracking import loads_or_none

DISCLAIMER = "For research use only. Not a medical device."
CURVES = (
    "Training losses are weighted as the settings say, and hold the boxes where there are any."
    " Validation losses of concepts and verdict are plain cross-entropies, so both need not meet."
)
_SHEETS = 24 * 2**20  # bytes of contact sheets that a page can bear


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
    known = settings_of(folder)
    name = one_line(folder.resolve().name)
    parts = [
        run_lines(name, record),
        *_introduction(evaluation.name, document, record, known),
        _section("Summary", _table(summary(document))),
        _section("Concepts", _table(concept_table(document)), *skipped(document["concepts"])),
        _verdict(folder, evaluation, document),
        _pointing(document),
        _baselines(evaluation, document),
        _study(folder, evaluation, document),
        _atlas(folder, document),
        _curves(folder),
        _weights(document),
        *making(record, known, CsrSettings()),
    ]
    write_bytes(evaluation / "report.html", page(name, paragraphs(parts), folder))


def _introduction(
    measured: str, document: Document, record: Document, settings: Document
) -> list[str]:
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
    return [f"> {DISCLAIMER}", " ".join(lines), f"> {warning}" if split == "val" else ""]


def _verdict(folder: Path, evaluation: Path, document: Document) -> str:
    if "task" not in document:
        return ""
    task = document["task"]
    parts = [_section("Verdict", _table(task_table(document)), *skipped(task))]
    if "confusion" in task:
        path = evaluation / "confusion.png"
        plot.confusion(path, task["confusion"], title="Verdict", names=list(task["columns"]))
        parts.append(_section("Confusions", _picture(folder, path), "Rows are true classes."))
    return paragraphs(parts)


def _pointing(document: Document) -> str:
    if "pointing" not in document:
        return ""
    words = (
        "How often the highest cell of a map lies in a box of its concept: of the concept map, and"
        " of the similarity to the nearest prototype. Chance is the share of the image that the"
        " boxes cover. IoU compares the boxes with the cells in which the concept map says yes."
    )
    return _section("Where it looks", words, _table(pointing_table(document)))


def _baselines(evaluation: Path, document: Document) -> str:
    found = loads_or_none(evaluation / "baselines.json")
    if not found:
        return ""
    words = "Simpler verdicts on the same backbone; p of the sign test on right decisions."
    table = _table(baseline_table(found))
    return _section("Baselines", words, _other(found, document), table)


def _study(folder: Path, evaluation: Path, document: Document) -> str:
    place = evaluation.with_name(f"{evaluation.name}-oracle")
    found = loads_or_none(place / "study.json")
    if not found:
        return ""
    words = (
        "What corrections would bring if a person always knew the truth."
        " Way and margin of the first row were chosen on"
        f" {found['validation']['images']} validation images."
    )
    return _section(
        "Corrections",
        words,
        _other(found, document),
        _table(study_table(found)),
        _picture(folder, place / "study.png"),
        "The picture: corrections of more and more concepts of each image.",
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
        shown.append(_picture(folder, path) if left >= 0 else "")
    missing = sum(not one for one in shown)
    return _section(
        "Atlas of prototypes",
        words,
        _other(atlas, document),
        f"> {flagged}" if suspects else "",
        *shown,
        f"{missing} more sheets are in figures/ of the run." if missing else "",
    )


def _sheet_order(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 1


def _curves(folder: Path) -> str:
    pictures = [_picture(folder, path) for path in sorted(folder.glob("plots/*.png"))]
    return _section("Learning curves", *pictures, CURVES) if pictures else ""


def _weights(document: Document) -> str:
    weights = document["weights"]
    rows = [("weights", f"`{weights['file']}`"), ("SHA-256", f"`{weights['sha256']}`")]
    return _section("Weights", table(("", ""), rows))


def _other(found: Document, document: Document) -> str:
    """Say so if something was measured on other weights."""
    weights = found["weights"]
    if weights["sha256"] == document["weights"]["sha256"]:
        return ""
    return f"> Made with other weights: {weights['file']}, {weights['sha256']}."


def _section(title: str, *parts: str) -> str:
    return paragraphs([f"## {title}", *parts])


def _table(found: Table) -> str:
    return table(found.columns, found.rows)


def _picture(folder: Path, path: Path) -> str:
    """Show a picture of the run; nothing if it is not there."""
    if not is_file(path):
        return ""
    return image(path.relative_to(folder).as_posix(), path.stem.replace("_", " "))
