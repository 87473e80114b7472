"""Reports: tables, percent and images as Markdown, and what every run has to say of itself."""

import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moectl.engine.files import is_file, is_folder, write_bytes
from moectl.engine.page import page
from moectl.engine.run import parents_of, status_of
from moectl.engine.settings import Settings, dump, flatten
from moectl.engine.toml import read_toml
from moectl.engine.tracking import loads_or_none

MISSING = "–"
_MADE = ("evals/*", "plugins/*", "variants/*")
_NAMED = 8  # more files of one folder than this are counted


def write_report(folder: Path, defaults: Settings, parts: Sequence[str]) -> None:
    """Write `report.md` of a run and, with the pictures inside, `report.html`.

    Args:
        folder: of the run.
        defaults: settings of the same system.
        parts: what the run's own system has to tell, as Markdown.
    """
    record, settings = loads_or_none(folder / "run.json") or {}, settings_of(folder)
    name = one_line(folder.resolve().name)
    text = paragraphs(
        [
            run_lines(name, record),
            *parts,
            made(folder, record),
            *making(record, settings, defaults),
        ]
    )
    # A path in a command line may hold what is no UTF-8.
    write_bytes(folder / "report.md", text.encode("utf-8", "replace"))
    whole = paragraphs([text, _settings_file(folder)])
    write_bytes(folder / "report.html", page(name, whole, folder))


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a run, dotted key to value; none if it has no file of them."""
    path = folder / "settings.toml"
    return flatten(read_toml(path)) if is_file(path) else {}


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
    return one_line(text).replace("|", "\\|")


def one_line(text: str) -> str:
    """Put text on one line, with single spaces."""
    return " ".join(text.split())


def code(text: str) -> str:
    """Write text as code, whatever backticks it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    space = " " if longest else ""
    return f"{'`' * (longest + 1)}{space}{text}{space}{'`' * (longest + 1)}"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as percent, without the sign."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def image(path: str, caption: str) -> str:
    """Return a link to a picture beside the report."""
    return f"![{caption}]({quote(path, errors='surrogateescape')})\n"


def paragraphs(parts: Sequence[str]) -> str:
    """Join the parts of a text that are not empty."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def run_lines(name: str, record: Mapping[str, Any]) -> str:
    """Write the title of a report, and how the run was made.

    Args:
        name: of the run.
        record: what run.json holds; what is missing is left out.
    """
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items())
    rows = [
        ("command", code(record["argv"]) if record.get("argv") else None),
        ("status", _status(record)),
        ("started", record.get("started")),
        ("resumed", ", ".join(str(one.get("at")) for one in record.get("resumed", [])) or None),
        ("time", duration(record["wall_seconds"]) if "wall_seconds" in record else None),
        ("device", record.get("device")),
        ("processes × threads", _times(record.get("processes"), record.get("threads"))),
        ("precision", record.get("precision")),
        ("seed", record.get("seed")),
        ("versions", versions or None),
        ("git commit", _commit(record, 12)),
    ]
    known = [row for row in rows if row[1] is not None]
    return f"# {name}\n\n" + (table(("run", ""), known) if known else "")


def _status(record: Mapping[str, Any]) -> str | None:
    if not record.get("status"):
        return None
    status = status_of(record)
    if status == "running" and record.get("pid") == os.getpid():
        status = "finished"  # the last thing that a run does is to write its own report
    return f"{status} ({record['reason']})" if record.get("reason") else status


def _commit(record: Mapping[str, Any], digits: int | None = None) -> str | None:
    git = record.get("git")
    return f"{git['commit'][:digits]}{' with changes' if git['dirty'] else ''}" if git else None


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


def making(record: Mapping[str, Any], settings: Mapping[str, Any], defaults: Settings) -> list[str]:
    """Write what a run was made from, by which settings, and how it is made again.

    Args:
        record: what run.json holds.
        settings: dotted key to value, as settings.toml has them.
        defaults: the same system's.
    """
    table_of_settings = settings_table(settings, defaults, record)
    return [parents(record), table_of_settings, reproduction(record)]


def parents(record: Mapping[str, Any]) -> str:
    """Write what a run was made from, with checksums.

    Args:
        record: what run.json holds.
    """
    rows = [
        (code(str(one["path"])), code(one["sha256"]) if one.get("sha256") else None)
        for one in parents_of(record)
    ]
    return "## Made from\n\n" + table(("file or run", "SHA-256"), rows) if rows else ""


def made(folder: Path, record: Mapping[str, Any]) -> str:
    """Write what a run left: its weights with checksums, and what was measured or made with them.

    Args:
        folder: of the run.
        record: what run.json holds.
    """
    weights = [
        (code(one["file"]), one.get("epoch"), "yes" if one.get("best") else "", code(one["sha256"]))
        for one in record.get("weights", [])
    ]
    later = [
        (code(path.relative_to(folder).as_posix()), ", ".join(_contents(path)))
        for pattern in _MADE
        for path in sorted(folder.glob(pattern))
        if not path.name.startswith(".")
    ]
    parts = [
        table(("weights", "epoch", "best", "SHA-256"), weights) if weights else "",
        table(("measured or made with them", "files"), later) if later else "",
    ]
    return paragraphs(["## Made by it", *parts]) if any(parts) else ""


def _contents(path: Path) -> Iterator[str]:
    """Yield the names of the files in a folder, the first of them."""
    names = sorted(one.name for one in path.iterdir()) if is_folder(path) else []
    names = [name for name in names if not name.startswith(".")]
    yield from map(code, names[:_NAMED])
    if len(names) > _NAMED:
        yield f"{len(names) - _NAMED} more"


def reproduction(record: Mapping[str, Any]) -> str:
    """Write what has to be done to get the same run again.

    Args:
        record: what run.json holds.
    """
    if not record.get("argv"):
        return ""
    commit = _commit(record)
    place = f", in a working tree at commit {commit}" if commit else ""
    origin = record.get("settings", {}).values()
    variables = sorted({one for one in origin if str(one).startswith("MOECTL_")})
    wall = record.get("wall_seconds")
    device = record.get("device") or "a device without a name"
    known = [
        "Every setting that came of it is in `settings.toml` beside this report. Where presets or"
        " variables have changed since, `--preset settings.toml` brings them back; what is no"
        " setting, such as names of runs and files, stays on the command line.",
        f"Variables that it read: {', '.join(map(code, variables))}." if variables else "",
        "The last digits depend on versions, device, processes and threads, which the table of the"
        " run names.",
        f"It took {duration(wall)} on {device}." if wall else "",
    ]
    return paragraphs(
        [
            "## How to reproduce",
            f"The command{place}:",
            textwrap.indent(record["argv"], "    "),
            " ".join(filter(None, known)),
        ]
    )


def _settings_file(folder: Path) -> str:
    path = folder / "settings.toml"
    if not is_file(path):
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"## settings.toml\n\n{textwrap.indent(text, '    ')}"


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
