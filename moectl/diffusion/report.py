"""The report of a run: tables and pictures from the files of its folder alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.diffusion.pictures import learning_curve, loss_by_step, losses, side_by_side
from moectl.diffusion.settings import DiffusionSettings
from moectl.engine.files import is_file
from moectl.engine.report import image, paragraphs, percent, settings_of, table, write_report
from moectl.engine.tracking import MetricsFile, loads_or_none


def report(folder: Path) -> None:
    """Write `plots/*.png`, `report.md` and `report.html` from what the folder of a run holds."""
    (folder / "plots").mkdir(exist_ok=True)
    rows, steps = _scored(folder), int(settings_of(folder).get("process.steps", 1000))
    parts = [
        _training(folder, rows, steps),
        _comparison(folder, loads_or_none(folder / "ablation.json") or {}),
    ]
    evaluations = sorted(folder.glob("evals/*/eval.json"))
    for path in evaluations:
        if document := loads_or_none(path):
            parts += [f"## `{path.parent.name}`", *_evaluation(document)]
    pictures = sorted(folder.glob("plots/*.png"))
    pictures += sorted(folder.glob("samples/epoch_*.png"), key=_epoch)[-1:]
    pictures += [picture for path in evaluations for picture in sorted(path.parent.glob("*.png"))]
    parts += ["## Pictures"] if pictures else []
    parts += [image(str(path.relative_to(folder)), _caption(path)) for path in pictures]
    write_report(folder, DiffusionSettings(), parts)


def _training(folder: Path, rows: list[dict[str, str]], steps: int) -> str:
    if not rows:
        return ""
    learning_curve(folder / "plots" / "learning_curve.png", rows)
    ends = {f"epoch {row['epoch']}": row for row in (rows[0], rows[-1])}
    spans = {
        name: [_number(row, f"loss_by_step/{span}") for span in range(10)]
        for name, row in ends.items()
    }
    loss_by_step(folder / "plots" / "loss_by_step.png", spans, steps)
    names = ("train/dm_loss", "train/load_loss", "val/loss", "load/largest", "load/dead")
    known = [name for name in names if rows[-1].get(name)]
    shown = [(name, *(_number(row, name) for row in ends.values())) for name in known]
    return "## Training\n\n" + table(("", *ends), shown)


def report_again(folder: Path) -> None:
    """Write the report once more after a measurement, if the folder is that of a run."""
    if is_file(folder / "run.json"):
        report(folder)


def evaluation_text(document: Mapping[str, Any]) -> str:
    """Write what one evaluation found, as Markdown."""
    return paragraphs(_evaluation(document))


def _evaluation(document: Mapping[str, Any]) -> list[str]:
    weights = document["weights"]
    kind = "averaged weights" if weights["ema"] else "weights of the last update"
    rows: list[tuple[str, object]] = [
        ("weights", f"`{weights['file']}`, epoch {weights['epoch']}, {kind}"),
        (f"loss on {document['held_out']} held-out images", f"{document['loss']:.4f}"),
    ]
    if "dead_experts" in document:
        rows.append(("experts that no image used", document["dead_experts"]))
    parts = [table(("", ""), rows)]
    if "sampling" in document:
        parts += _samples(document)
    return parts


def _samples(document: Mapping[str, Any]) -> list[str]:
    made = document["sampling"]
    guidance = f", guidance scale {made['guidance']:g}" if made["guidance"] != 1 else ""
    eta = f", eta {made['eta']:g}" if made["eta"] else ""
    rate = _rate(made["images_per_second"])
    parts = [
        f"{made['num']} samples by {made['sampler']} in {made['steps']} steps{guidance}{eta}, seeds"
        f" from {made['seed']} on: {rate} images a second. All images are"
        " compared as bytes."
    ]
    rows = [
        (
            one["set"], one["against"], one["images"], one["against_images"],
            f"{one['frechet']:.3f}", f"{one['kid']:.4f} ± {one['kid_std']:.4f}",
            f"{one['precision']:.3f}", f"{one['recall']:.3f}",
        )
        for one in document["distances"]
    ]  # fmt: skip
    columns = (
        "set", "against", "images", "against", document["distance"], "KID", "precision", "recall"
    )  # fmt: skip
    parts.append(table(columns, rows))
    if document["distance"] != "FID":
        parts.append(
            "Features are those of a classifier of the same training images: no figure of the"
            " literature compares with these. It reads"
            f" {percent(document['sample_accuracy'])} % of the samples as the class that was asked"
            f" for, and {percent(document['held_out_accuracy'])} % of the held-out images right."
        )
    return [*parts, document["warning"]]


def _comparison(folder: Path, document: Mapping[str, Any]) -> str:
    """Write the table of the variants, and draw their curves and samples."""
    if not document:
        return ""
    places = {row["name"]: folder / "variants" / row["name"] for row in document["variants"]}
    curves = {name: _scored(place) for name, place in places.items()}
    if curves := {name: rows for name, rows in curves.items() if rows}:
        losses(folder / "plots" / "losses.png", curves)
    strips = {name: place / "strip.png" for name, place in places.items()}
    if strips := {name: path for name, path in strips.items() if is_file(path)}:
        side_by_side(folder / "plots" / "side_by_side.png", strips)
    return ablation_text(document)


def ablation_text(document: Mapping[str, Any]) -> str:
    """Write the table of the variants, as Markdown."""
    rows = document["variants"]
    distance = next((row["distance"] for row in rows if "distance" in row), "FD")
    columns = (
        "variant", "parameters", "used per image", "GMAC", "forward + backward, images/s",
        "held-out loss", distance, "precision", "recall", "samples read right",
    )  # fmt: skip
    lines = [
        (row["name"], *(_cells(row) if "loss" in row else [row.get("failed")] + [None] * 8))
        for row in rows
    ]
    whole = next((row for row in rows if row["name"] == "full" and "macs" in row), None)
    dear = [
        f"{row['name']} {row['macs'] / whole['macs']:.2f} times"
        for row in rows
        if whole and row.get("macs", 0) > 1.005 * whole["macs"] and row["name"].startswith("no_")
    ]
    note = f"More arithmetic than full although something is left out: {', '.join(dear)}."
    return paragraphs(
        [
            "## Variants",
            table(columns, lines),
            note if dear else "",
            "All with the same seed, images, order, noise and number of updates. One seed: small"
            " differences are noise.",
        ]
    )


def _cells(row: Mapping[str, Any]) -> list[object]:
    def shown(name: str, digits: int) -> str | None:
        return None if row.get(name) is None else f"{row[name]:.{digits}f}"

    return [
        f"{row['parameters']:,}",
        f"{row['parameters_used']:,}",
        f"{row['macs'] / 1e9:.4g}",
        _rate(row["images_per_second"]),
        shown("loss", 4),
        shown("frechet", 3),
        shown("precision", 3),
        shown("recall", 3),
        None if row.get("sample_accuracy") is None else percent(row["sample_accuracy"]) + " %",
    ]


def _rate(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _scored(folder: Path) -> list[dict[str, str]]:
    return [row for row in MetricsFile(folder / "metrics.csv").rows() if row.get("val/loss")]


def _number(row: Mapping[str, Any], name: str) -> float | None:
    return float(row[name]) if row.get(name) else None


def _epoch(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _caption(path: Path) -> str:
    return path.stem.replace("_", " ")
