"""The report of a run: tables and pictures from the files of its folder alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.diffusion.pictures import learning_curve, loss_by_step
from moectl.diffusion.settings import DiffusionSettings
from moectl.engine.files import write_text
from moectl.engine.report import image, paragraphs, run_lines, settings_table, table
from moectl.engine.settings import flatten
from moectl.engine.toml import read_toml
from moectl.engine.tracking import MetricsFile, loads_or_none


def report(folder: Path) -> None:
    """Write `plots/*.png` and `report.md` from what the folder of a run holds."""
    (folder / "plots").mkdir(exist_ok=True)
    record = loads_or_none(folder / "run.json") or {}
    path = folder / "settings.toml"
    settings = flatten(read_toml(path)) if path.exists() else {}
    rows = [row for row in MetricsFile(folder / "metrics.csv").rows() if row.get("val/loss")]
    parts = [
        run_lines(folder.resolve().name, record),
        settings_table(settings, DiffusionSettings(), record),
        _training(folder, rows, int(settings.get("process.steps", 1000))),
    ]
    pictures = sorted(folder.glob("plots/*.png"))
    pictures += sorted(folder.glob("samples/epoch_*.png"), key=_epoch)[-1:]
    parts += ["## Pictures"] if pictures else []
    parts += [image(str(path.relative_to(folder)), _caption(path)) for path in pictures]
    write_text(folder / "report.md", paragraphs(parts))


def _training(folder: Path, rows: list[dict[str, str]], steps: int) -> str:
    if not rows:
        return ""
    learning_curve(folder / "plots" / "learning_curve.png", rows)
    first, last = rows[0], rows[-1]
    spans = {
        f"epoch {row['epoch']}": [
            float(value) if (value := row.get(f"loss_by_step/{span}")) else None
            for span in range(10)
        ]
        for row in (first, last)
    }
    loss_by_step(folder / "plots" / "loss_by_step.png", spans, steps)
    names = ("train/dm_loss", "train/load_loss", "val/loss", "load/largest", "load/dead")
    known = [name for name in names if last.get(name)]
    shown = [(name, *(_number(row, name) for row in (first, last))) for name in known]
    columns = ("", f"epoch {first['epoch']}", f"epoch {last['epoch']}")
    return "## Training\n\n" + table(columns, shown)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def _epoch(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _caption(path: Path) -> str:
    return path.stem.replace("_", " ")
