"""The report of a run: tables and pictures from the files of its folder alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.csr.charts import (
    Document,
    Table,
    baseline_table,
    best_epoch,
    concept_table,
    learning_curves,
    pointing_table,
    skipped,
    study_table,
    summary,
    task_table,
)
from moectl.csr.html_report import CURVES, DISCLAIMER, write_html
from moectl.csr.settings import CsrSettings
from moectl.engine.files import is_file
from moectl.engine.report import image, settings_of, table, write_report
from moectl.engine.tracking import MetricsFile, loads_or_none

_STAGES = ("concept", "prototype", "task")


def report(folder: Path) -> None:
    """Write `plots/*.png`, `report.md`, and `report.html` of a run and of each evaluation."""
    draw_curves(folder, settings_of(folder))
    parts = [f"> {DISCLAIMER}"]
    for path in sorted(folder.glob("evals/*/metrics.json")):
        if document := loads_or_none(path):
            write_html(folder, path.parent)
            parts += _evaluation(path.parent, document)
    parts += _pictures(folder)
    write_report(folder, CsrSettings(), parts)


def report_again(folder: Path) -> None:
    """Write the report once more after a measurement, if the folder is that of a run."""
    if is_file(folder / "run.json"):
        report(folder)


def draw_curves(folder: Path, settings: Mapping[str, Any]) -> None:
    """Draw `plots/learning_curves.png` from the metrics of the stages that an epoch is done of.

    Args:
        folder: of the run.
        settings: dotted key to value.
    """
    stages = {stage: MetricsFile(folder / f"metrics_{stage}.csv").rows() for stage in _STAGES}
    stages = {
        stage: rows for stage, rows in stages.items() if any(row.get("train/loss") for row in rows)
    }
    if not stages:
        return
    marked = {stage: best_epoch(stage, rows) for stage, rows in stages.items()}
    if settings.get("task.start") != "best":  # the verdict begins with the last prototypes
        marked["prototype"] = None
    (folder / "plots").mkdir(exist_ok=True)
    learning_curves(folder / "plots" / "learning_curves.png", stages, marked)


def _evaluation(folder: Path, document: Document) -> list[str]:
    split, _, tag = folder.name.partition("@")
    words = {"test": "test", "val": "validation"}.get(split, split)
    parts = [f"## Results: {words} images, `{tag}`"]
    if split == "val":
        parts.append("> The best epoch and the thresholds were chosen on these very images.")
    parts += [
        f"All of it: `evals/{folder.name}/report.html`",
        _table(summary(document)),
        "### Concepts",
        _table(concept_table(document)),
        *skipped(document["concepts"]),
    ]
    if "task" in document:
        parts += ["### Verdict", _table(task_table(document)), *skipped(document["task"])]
    if "pointing" in document:
        parts += ["### Where it looks", _table(pointing_table(document))]
    if baselines := loads_or_none(folder / "baselines.json"):
        parts += ["### Baselines", _table(baseline_table(baselines))]
    if study := loads_or_none(folder.with_name(f"{folder.name}-oracle") / "study.json"):
        parts += ["### Corrections", _table(study_table(study))]
    return parts


def _pictures(folder: Path) -> list[str]:
    parts = []
    for pattern in ("plots/*.png", "evals/*/*.png", "figures/atlas_*.png"):
        for path in sorted(folder.glob(pattern)):
            parts.append(image(str(path.relative_to(folder)), path.stem.replace("_", " ")))
            if path.stem == "learning_curves":
                parts.append(CURVES)
    return ["## Pictures", *parts] if parts else []


def _table(found: Table) -> str:
    return table(found.columns, found.rows)
