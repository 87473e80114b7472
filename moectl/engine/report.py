"""Markdown for reports: tables, percent, images, and what every run has to say of itself."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from moectl.engine.settings import Settings, dump, flatten

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


def paragraphs(parts: Sequence[str]) -> str:
    """Join the parts of a text that are not empty."""
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def run_lines(name: str, record: Mapping[str, Any]) -> str:
    """Write the title of a report, and how the run was made.

    Args:
        name: of the run.
        record: what run.json holds; what is missing is left out.
    """
    git = record.get("git") or {}
    commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else None
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items())
    reason = f" ({record['reason']})" if record.get("reason") else ""
    own = record.get("pid") == os.getpid()  # the run draws its own report shortly before its end
    rows = [
        ("command", f"`{record['argv']}`" if record.get("argv") else None),
        ("status", f"{record['status']}{reason}" if record.get("status") and not own else None),
        ("started", record.get("started")),
        ("time", duration(record["wall_seconds"]) if "wall_seconds" in record else None),
        ("device", record.get("device")),
        ("processes × threads", _times(record.get("processes"), record.get("threads"))),
        ("precision", record.get("precision")),
        ("seed", record.get("seed")),
        ("versions", versions or None),
        ("git commit", commit),
    ]
    known = [row for row in rows if row[1] is not None]
    return f"# {name}\n\n" + (table(("run", ""), known) if known else "")


def _times(processes: int | None, threads: int | None) -> str | None:
    return None if processes is None or threads is None else f"{processes} × {threads}"


def settings_table(
    settings: Mapping[str, Any], defaults: Settings, record: Mapping[str, Any]
) -> str:
    """Write the settings of a run that differ from the defaults, and who set them.

    Args:
        settings: dotted key to value, as settings.toml has them.
        defaults: the same system's.
        record: what run.json holds.
    """
    if not settings:
        return ""
    default, origin = flatten(dump(defaults)), record.get("settings", {})
    rows = [
        (f"`{key}`", value, default.get(key), origin.get(key))
        for key, value in settings.items()
        if value != default.get(key)
    ]
    lines = table(("setting", "value", "default", "set by"), rows) if rows else "None.\n"
    return f"## Settings that differ from the defaults\n\n{lines}"


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
