"""What a person sees: results on stdout, everything else on stderr."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moectl.engine.errors import RunFailed

log = logging.getLogger("moectl")


class Markdown(str):
    """A text that a terminal shows drawn, and a pipe gets as it is."""

    __slots__ = ()


class _Talk(Console):
    """A console that falls silent when its reader goes away: a run must outlive its terminal."""

    def on_broken_pipe(self) -> None:
        """Send the rest to nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


_talk = _Talk(stderr=True, highlight=False)
_state = {"json": False, "quiet": False}


class _StderrHandler(logging.Handler):
    """Prints records above a running progress bar; colour only for warnings and errors."""

    def emit(self, record: logging.LogRecord) -> None:
        style = {"WARNING": "yellow", "ERROR": "red"}.get(record.levelname)
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with suppress(OSError):  # a run must not die of a full disk behind stderr
            _talk.print(prefix + record.getMessage(), style=style, markup=False, soft_wrap=True)


def setup(*, quiet: bool = False, as_json: bool = False) -> None:
    """Route the log to stderr. Ranks other than 0 speak only to warn."""
    _state.update(json=as_json, quiet=quiet)
    if not _moves():
        for library in ("HF_HUB", "HF_DATASETS"):  # read as they are imported; others follow them
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    main = os.environ.get("RANK", "0") == "0"
    log.handlers = [_StderrHandler(logging.WARNING if quiet or not main else logging.INFO)]
    log.setLevel(logging.INFO)
    log.propagate = False


def log_to(path: Path) -> logging.Handler:
    """Append the log to a file as well: everything of rank 0, warnings of the others."""
    # Names of files come as they are on the disk, also where the locale cannot read them.
    handler = logging.FileHandler(path, encoding="utf-8", errors="surrogateescape")
    handler.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return handler


def error(message: str, hint: str = "", label: str = "error") -> None:
    """Print one red line, and a hint below it."""
    try:
        _talk.print(f"{label}: {message}", style="red", markup=False, soft_wrap=True)
        if hint:
            _talk.print(f"hint: {hint}", markup=False, soft_wrap=True)
    except OSError:
        pass  # stderr is closed; the exit code still speaks


def result(document: Any, shown: "Table | str | Sequence[Table]") -> None:
    """Print the result of a command: the document as JSON with `--json`, else the text or tables.

    One of several processes prints, the first.

    Raises:
        RunFailed: if it cannot be written, as on a full disk.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        _write(document, shown)
    except BrokenPipeError:  # the reader has seen enough
        raise
    except OSError as error:
        raise RunFailed(f"standard output could not be written: {error.strerror}") from None


def _write(document: Any, shown: "Table | str | Sequence[Table]") -> None:
    if _state["json"]:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    elif isinstance(shown, Markdown) and sys.stdout.isatty():
        from rich.markdown import Markdown as Drawn

        Console(file=sys.stdout, highlight=False).print(Drawn(shown))
    elif isinstance(shown, str):
        sys.stdout.write(shown if shown.endswith("\n") else shown + "\n")
    else:
        # A pipe gets the full width, so that no cell is cut.
        width = None if sys.stdout.isatty() else 10_000
        plain = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
        for one in [shown] if isinstance(shown, Table) else shown:
            plain.print(one)
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> Table:
    """Build a plain table; numbers are aligned to the right."""
    from rich import box

    built = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float | None) for row in rows)
        built.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(cell(value)) for value in row))
    return built


def cell(value: object) -> str:
    """Write a value for people: floats with four significant digits, nothing for None."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress(Protocol):
    """The line that moves."""

    def update(self, done: int, text: str) -> None:
        """Show `done` of the total and a few words."""
        ...


class _Silent:
    def update(self, done: int, text: str) -> None:
        pass


class _Lines:
    """For logs: a plain line now and then, so that a long epoch is not silent."""

    def __init__(self, total: int, seconds: float = 30.0) -> None:
        self.total, self.seconds, self.last = total, seconds, time.monotonic()

    def update(self, done: int, text: str) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            log.info("%d/%d %s", done, self.total, text)


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def update(self, done: int, text: str) -> None:
        self.bar.update(self.task, completed=done, words=text)


def _moves() -> bool:
    """Whether there is a reader for lines that move."""
    return _talk.is_terminal and not _state["quiet"] and "CI" not in os.environ


@contextmanager
def progress(total: int, done: int = 0) -> Iterator[Progress]:
    """Show a bar on a terminal, a line every half minute elsewhere, nothing when quiet."""
    if _state["quiet"] or os.environ.get("RANK", "0") != "0":
        yield _Silent()
    elif not _moves():
        yield _Lines(total)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=_talk, transient=True) as bar:
            yield _Bar(bar, bar.add_task("", total=total, completed=done, words=""))


def epoch_line(row: Mapping[str, float | None]) -> str:
    """Write an epoch's row as one line; the scores of single experts are left out."""
    validation = [
        f"{name.removeprefix('val/')} {cell(value)}"
        for name, value in row.items()
        if name.startswith("val/") and "expert" not in name
    ]
    line = f"lr {cell(row['lr'])}  loss {cell(row.get('train/loss'))}"
    return f"{line}  val: {'  '.join(validation)}" if validation else line
