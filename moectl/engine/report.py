"""Markdown for reports: tables, percent, images."""

from collections.abc import Sequence
from urllib.parse import quote

MISSING = "–"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; None is shown as a dash, columns of numbers are aligned right."""
    texts = [[cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(_is_number(row[place]) for row in rows) for place in range(len(columns))
    ]
    rule = ["---:" if right else "---" for right in numeric]
    body = [[cell(name) for name in columns], rule, *texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in body) + "\n"


def cell(value: object) -> str:
    """Write one value so that it stays inside its cell."""
    if value is None:
        return MISSING
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as percent, without the sign."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def image(path: str, caption: str) -> str:
    """Return a link to a picture beside the report."""
    return f"![{caption}]({quote(path)})\n"


def duration(seconds: float) -> str:
    """Write a time in its two largest units, for instance `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _is_number(value: object) -> bool:
    if isinstance(value, str):  # what `percent` wrote
        value = value.removesuffix("%").strip()
        return value == MISSING or value.replace(".", "", 1).removeprefix("-").isdigit()
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
