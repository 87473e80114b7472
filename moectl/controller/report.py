"""The report of a run: tables and pictures from the files of its folder alone."""

from pathlib import Path

from moectl.controller.settings import ControllerSettings
from moectl.engine.files import write_text
from moectl.engine.report import paragraphs, run_lines, settings_table
from moectl.engine.settings import flatten
from moectl.engine.toml import read_toml
from moectl.engine.tracking import loads_or_none


def report(folder: Path) -> None:
    """Write `plots/*.png` and `report.md` from what the folder of a run holds."""
    (folder / "plots").mkdir(exist_ok=True)
    record = loads_or_none(folder / "run.json") or {}
    settings = flatten(read_toml(folder / "settings.toml"))
    parts = [
        run_lines(folder.resolve().name, record),
        settings_table(settings, ControllerSettings(), record),
    ]
    write_text(folder / "report.md", paragraphs(parts))
