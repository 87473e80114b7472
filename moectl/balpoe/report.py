"""The report of a run: tables and plots from the files of its folder alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.balpoe import report_rejection
from moectl.balpoe.published import (
    PAPER,
    PUBLISHED,
    PUBLISHED_SHIFTS,
    configuration,
    departures,
)
from moectl.balpoe.settings import BalpoeSettings
from moectl.balpoe.taus import tau_values
from moectl.engine import plot
from moectl.engine.report import image, paragraphs, percent, settings_of, table, write_report
from moectl.engine.tracking import MetricsFile, loads_or_none

if TYPE_CHECKING:
    from moectl.engine.figure import Scale

SHOTS = ("many", "medium", "few")


@dataclass(frozen=True)
class Evidence:
    """What the files of a run folder hold; empty where one is missing."""

    settings: Mapping[str, Any]
    """Dotted key to value, as settings.toml has them."""
    epochs: Sequence[Mapping[str, str]]
    """The rows of metrics.csv at the ends of epochs."""
    evaluations: Mapping[str, Mapping[str, Any]]
    """`last`, `best`, `epoch50` … to the document of the evaluation."""
    rejections: Mapping[str, Mapping[str, Any]]
    """The same tags to the document of the evaluation of rejection."""
    summary: Mapping[str, Mapping[str, Any]]

    @property
    def details(self) -> Mapping[str, Any]:
        """The evaluation that tables and plots are about: the last epoch's, as in the paper."""
        return _preferred(self.evaluations)

    @property
    def rejection(self) -> Mapping[str, Any]:
        """The evaluation of rejection that is shown; not one of weights that were replaced."""
        return _preferred(
            {
                tag: document
                for tag, document in self.rejections.items()
                if document["weights"] == self.evaluations.get(tag, {}).get("weights")
            }
        )


def _preferred(documents: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    for tag in ("last", "best", *documents):
        if tag in documents:
            return {"tag": tag, **documents[tag]}
    return {}


def report(folder: Path) -> None:
    """Write `plots/*.png`, `report.md` and `report.html` from what the folder of a run holds."""
    evidence = read(folder)
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    pictures = [
        *_draw_training(evidence, plots),
        *_draw_evaluation(evidence.details, plots),
        *report_rejection.draw(evidence.rejection, plots),
    ]
    parts = [
        _results(evidence),
        _experts(evidence),
        _calibration(evidence),
        _diversity(evidence.details),
        _shifts(evidence),
        *report_rejection.rules(folder),
        report_rejection.section(evidence.rejection, evidence.settings),
        *(["## Plots"] if pictures else []),
        *(image(f"plots/{name}", caption) for name, caption in pictures),
    ]
    write_report(folder, BalpoeSettings(), parts)


def read(folder: Path) -> Evidence:
    """Collect the files of a run folder, whichever there are."""
    rows = MetricsFile(folder / "metrics.csv").rows()
    evaluations = sorted(folder.glob("evals/test@*.json"))
    rejections = sorted(folder.glob("evals/rejection@*/metrics.json"))
    return Evidence(
        settings=settings_of(folder),
        epochs=[row for row in rows if row.get("train/loss")],
        evaluations=_documents({path.stem: path for path in evaluations}),
        rejections=_documents({path.parent.name: path for path in rejections}),
        summary=loads_or_none(folder / "summary.json") or {},
    )


def _documents(paths: Mapping[str, Path]) -> dict[str, Mapping[str, Any]]:
    """Read documents by name, such as `test@last`; the keys are the tags behind the @."""
    found = {name.partition("@")[2]: loads_or_none(path) for name, path in paths.items()}
    return {tag: document for tag, document in found.items() if document}


def _results(evidence: Evidence) -> str:
    documents = {
        tag: {"epoch": document.get("weights", {}).get("epoch"), **document.get("scores", {})}
        for tag, document in evidence.evaluations.items()
    }
    found = {**evidence.summary, **documents}
    if not found:
        return ""
    names = ("accuracy", "balanced_accuracy", *(f"accuracy_{shot}" for shot in SHOTS), "top5")
    rows: list[list[object]] = []
    for tag, scores in found.items():
        shares = [percent(scores.get(name)) for name in (*names, "ece", "mce")]
        rows.append([tag, scores.get("epoch"), *shares, scores.get("nll")])
    published = PUBLISHED.get(configuration(evidence.settings))
    if published:
        figures = [percent(published.accuracy), *[None] * 5]
        errors = [percent(published.ece), percent(published.mce), None]
        rows.append([f"published: {PAPER}", None, *figures, *errors])
    columns = ("weights", "epoch", "accuracy", "balanced", *SHOTS, "top 5", "ECE", "MCE", "NLL")
    lines = [
        "## Results",
        "Percent of the test images, but for NLL. Classes with more than 100 training images are"
        " many, those with fewer than 20 few.",
        table(columns, rows),
        departures(evidence.settings, published) if published else "",
    ]
    return paragraphs(lines)


def _experts(evidence: Evidence) -> str:
    document = evidence.details
    if not document.get("accuracy"):
        return ""
    names = ("accuracy", "balanced_accuracy", *(f"accuracy_{shot}" for shot in SHOTS), "top5")
    rows = [
        [_label(name, evidence.settings), *(percent(row.get(column)) for column in names)]
        for name, row in document["accuracy"].items()
    ]
    columns = ("model", "accuracy", "balanced", *SHOTS, "top 5")
    return (
        f"## Accuracy per expert, weights `{document['tag']}`\n\n"
        "Percent. Adjusted: moved from the prior it was trained for to the uniform one.\n\n"
        + table(columns, rows)
    )


def _label(name: str, settings: Mapping[str, Any]) -> str:
    """Turn `expert_0_adjusted` into `expert 0 (tau 1), adjusted`."""
    words = name.split("_")
    text = " ".join(word for word in words if word != "adjusted")
    if words[0] == "expert" and "loss.tau_list" in settings:
        limits = (settings["loss.tau_min"], settings["loss.tau_max"])
        taus = tau_values(settings["loss.tau_list"], settings["model.experts"], *limits)
        text += f" (tau {taus[int(words[1])]:.3g})"
    return f"{text}, adjusted" if words[-1] == "adjusted" else text


def _calibration(evidence: Evidence) -> str:
    found = evidence.details.get("calibration")
    if not found:
        return ""
    shares = ("confidence", "ece", "mce", "overconfidence", "ace_top", "ace_class")
    rows = [
        [
            _label(name, evidence.settings),
            *(percent(row.get(column)) for column in shares),
            *(row.get(column) for column in ("nll", "brier", "kl")),
        ]
        for name, row in found.items()
    ]
    columns = ("model", "confidence", "ECE", "MCE", "overconfidence", "ACE top", "ACE class")
    temperature = found.get("ensemble", {}).get("temperature")
    lines = [
        "## Calibration",
        "Percent, but for NLL, Brier score and KL, the divergence of the mean prediction from the"
        " prior aimed at. An expert is measured under that prior, an adjusted one under the uniform"
        " prior.",
        table((*columns, "NLL", "Brier", "KL"), rows),
        f"Temperature of the ensemble, fitted on the validation images: {temperature:.3f}."
        if temperature is not None
        else "",
    ]
    return paragraphs(lines)


def _diversity(document: Mapping[str, Any]) -> str:
    found = document.get("diversity")
    if not found:
        return ""
    experts = range(len(found["accuracy"]))
    left_out = found["leave_one_out"] or [None] * len(experts)
    rows = [
        [
            f"expert {number}",
            percent(found["accuracy"][number]),
            percent(left_out[number]),
            *(percent(value) for value in found["disagreement"][number]),
            ", ".join(shot for shot, winner in found["winners"].items() if winner == number),
        ]
        for number in experts
    ]
    gain = found["ensemble_gain"]
    differs = [f"differs from {number}" for number in experts]
    columns = ("model", "accuracy", "ensemble without it", *differs, "best in")
    return (
        "## Diversity of the experts\n\n"
        "Percent, all experts adjusted to the uniform prior."
        f" At least one expert is right on {percent(found['oracle_accuracy'])};"
        f" the ensemble reaches {percent(found['ensemble_accuracy'])},"
        f" {percent(abs(gain))} {'less' if gain < 0 else 'more'} than the best expert.\n\n"
        + table(columns, rows)
    )


def _shifts(evidence: Evidence) -> str:
    found = evidence.details.get("shifted")
    if not found:
        return ""
    published = PUBLISHED_SHIFTS.get(configuration(evidence.settings), {})
    names = ("accuracy", "accuracy_estimated_prior", "accuracy_known_prior")
    rows = []
    for row in found:
        theirs = published.get((row["profile"], row["ratio"]), (None, None))
        mine = [row.get(name) for name in names]
        shares = [percent(value) for value in (*mine, *(theirs if published else ()))]
        rows.append([_distribution(row), row["images"], *shares])
    columns = ["test distribution", "images", "accuracy", "prior estimated", "prior known"]
    columns += ["published", "published, prior known"] if published else []
    source = f" Published: {PAPER}." if published else ""
    how = "The estimate is made from the test images without their labels."
    return f"## Shifted test sets\n\nPercent. {how}{source}\n\n{table(columns, rows)}"


def _distribution(row: Mapping[str, Any]) -> str:
    return "uniform" if row["profile"] == "uniform" else f"{row['profile']} {row['ratio']:g}"


def _curve(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[float], list[float | None]]:
    points = [(float(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
    return [x for x, _ in points], [y for _, y in points]


def _draw_training(evidence: Evidence, plots: Path) -> list[tuple[str, str]]:
    rows = evidence.epochs
    columns = list(rows[0]) if rows else []
    experts = [name for name in columns if name.startswith("train/loss_expert_")]
    losses = {"train/loss": "training", "val/loss": "validation"}
    losses |= {
        name: _label(name.removeprefix("train/loss_"), evidence.settings) for name in experts
    }
    balanced = {"val/balanced_accuracy": "balanced"}
    accuracies = balanced | {f"val/accuracy_{shot}": shot for shot in SHOTS}
    charts: list[tuple[str, str, dict[str, str], str, Scale]] = [
        ("loss.png", "Loss", losses, "loss", "plain"),
        ("accuracy.png", "Validation accuracy", accuracies, "accuracy", "percent"),
        ("learning_rate.png", "Learning rate", {"lr": "learning rate"}, "learning rate", "log"),
    ]
    drawn = []
    for name, title, wanted, label, scale in charts:
        series = {words: _curve(rows, column) for column, words in wanted.items()}
        series = {words: curve for words, curve in series.items() if curve[0]}
        if series:
            words = {"title": title, "x_label": "epoch", "y_label": label}
            plot.lines(plots / name, series, scale=scale, **words)
            drawn.append((name, title))
    return drawn


def _draw_evaluation(document: Mapping[str, Any], plots: Path) -> list[tuple[str, str]]:
    drawn = []
    if document.get("reliability"):
        panels = {name.replace("_", " "): bins for name, bins in document["reliability"].items()}
        plot.reliability(plots / "reliability.png", panels, title="Reliability on the test set")
        drawn.append(("reliability.png", "Reliability"))
    if document.get("confusion"):
        title, names = "Confusion of the ensemble", document["class_names"]
        plot.confusion(plots / "confusion.png", document["confusion"], title=title, names=names)
        drawn.append(("confusion.png", "Confusion"))
    if document.get("per_class"):
        _draw_classes(document, plots / "classes.png")
        drawn.append(("classes.png", "Accuracy of every class"))
    if document.get("shifted"):
        groups = {
            _distribution(row): {
                "prior unknown": row["accuracy"],
                "prior estimated": row.get("accuracy_estimated_prior"),
                "prior known": row["accuracy_known_prior"],
            }
            for row in document["shifted"]
        }
        labels = {"x_label": "test distribution", "y_label": "accuracy"}
        title = "Shifted test sets"
        plot.bars(plots / "shifted.png", groups, title=title, scale="percent", **labels)
        drawn.append(("shifted.png", title))
    return drawn


def _draw_classes(document: Mapping[str, Any], path: Path) -> None:
    counts, accuracies = document["class_counts"], document["per_class"]
    order = sorted(range(len(counts)), key=lambda index: -counts[index])
    panels = {
        "training images": [counts[index] for index in order],
        "test accuracy": [accuracies[index] for index in order],
    }
    plot.bar_panels(
        path,
        [document["class_names"][index] for index in order],
        panels,
        title="Accuracy of every class",
        x_label="classes, those with most training images first",
        scales={"training images": "log", "test accuracy": "percent"},
    )
