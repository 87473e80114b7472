"""The part of a run's report about rejection: tables and pictures from one document.

Letters: R rejection rates, K groups of classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moectl.balpoe.published import PublishedArea, area_departures, published_areas
from moectl.engine import plot
from moectl.engine.figure import PALETTE
from moectl.engine.report import MISSING, code, percent, table
from moectl.engine.tracking import loads_or_none

Document = Mapping[str, Any]

METHODS = {
    "balpoe": "the ensemble, which rejects nothing",
    "chow": "Chow's rule, which rejects where the largest probability is lowest, on the ensemble"
    " as it was trained, for the uniform prior",
    "chow_ce": "Chow's rule on the ensemble moved to the training prior",
    "chow_single": "Chow's rule on the most balanced expert alone",
    "plugin_single": "the plug-in rule for the balanced error on the most balanced expert",
    "plugin_balpoe_avg": "the plug-in rule on the ensemble of equal weights",
    "moe_plugin": "the plug-in rule on the ensemble with weights searched for the balanced error",
    "plugin_single_worst": "the plug-in rule for the worst group on the most balanced expert",
    "plugin_balpoe_avg_worst": "that rule on the ensemble of equal weights",
    "moe_plugin_worst": "that rule on the ensemble with those weights",
}
PRIORS = {
    "train": ("label prior of the training set", "re-weighted to the class shares in training"),
    "uniform": ("uniform label prior", "weighted so that all classes are equally frequent"),
}
_KINDS = ("balanced", "worst")
_RATES = (0.0, 0.4, 0.8)
_BY_GROUP = ("chow", "chow_ce", "plugin_balpoe_avg", "moe_plugin", "plugin_balpoe_avg_worst")
_COLOURED = (
    "chow", "chow_ce", "chow_single", "plugin_single", "plugin_balpoe_avg", "moe_plugin", "balpoe",
)  # fmt: skip
_NAMED_GROUPS = 4  # of more groups, only the first and the last are shown


def rules(folder: Path) -> list[str]:
    """Write what the rejection rules in a run were fitted to do, as Markdown, one table for each.

    Args:
        folder: of the run.
    """
    parts = []
    for path in sorted(folder.glob("plugins/*/optimized_parameters.json")):
        document = loads_or_none(path) or {}
        points = document.get("points", [])
        if not points:
            continue
        names = document["groups"]["names"]
        shown = names if len(names) <= _NAMED_GROUPS else []
        rows = [
            [
                "cost" if one["rate"] is None else "rate",
                one["cost"] if one["rate"] is None else one["rate"],
                *(
                    percent(one[name])
                    for name in ("rejection", "balanced_error", "worst_group_error")
                ),
                *(percent(error) for error in one["group_errors"][: len(shown)]),
            ]
            for one in points
        ]
        columns = ["asked for", "", "rejected", "balanced error", "worst group", *shown]
        parts += [
            f"## Rejection rule {code(path.parent.name)}",
            f"Percent of the validation images it was fitted to; for the {document['objective']}"
            f" error, weights {code(document['checkpoint']['file'])}.",
            table(columns, rows),
        ]
    return parts


def section(document: Document, settings: Mapping[str, Any]) -> str:
    """Write what was measured about rejection as Markdown, empty for an empty document.

    Args:
        document: `metrics.json` of the evaluation, and its `tag`.
        settings: dotted key to value, which tell the published figures to compare with.
    """
    if not document.get("priors"):
        return ""
    parts = [
        f"## Rejection, weights `{document.get('tag', '')}`",
        _introduction(document),
        _glossary(document),
    ]
    for prior, found in document["priors"].items():
        title, items = PRIORS.get(prior, (f"label prior {prior}", "re-weighted to it"))
        published = published_areas(settings) if prior == "train" and _usual(document) else {}
        parts += [
            f"### {title[0].upper()}{title[1:]}",
            f"Test images {items}.",
            _areas(found["methods"], published),
            area_departures(settings) if published else "",
            *_same_areas(document, found["methods"]),
            *_errors(document, found["methods"]),
            *_groups(document, found["methods"]),
            *_costs(found.get("costs", [])),
        ]
    return "\n\n".join(part.strip() for part in parts if part)


def _usual(document: Document) -> bool:
    """Whether weights of this run were measured on the groups of the published figures."""
    chosen = {"groups": "head_tail", "tail_threshold": 20, **document.get("config", {})}
    named = document["groups"]["names"] == ["head", "tail"]
    own = bool(document.get("weights"))  # the settings do not tell whence others' logits are
    return own and named and (chosen["groups"], chosen["tail_threshold"]) == ("head_tail", 20)


def _introduction(document: Document) -> str:
    names, of_class = document["groups"]["names"], document["groups"]["of_class"]
    sizes = [f"{names[place]} ({_classes(of_class.count(place))})" for place in _shown(names)]
    rates = document["rates"]
    resamples = (
        f" In brackets: 95 percent intervals of {document['bootstrap']} resamples of the"
        f" {document['test_images']} test images."
        if document.get("bootstrap")
        else ""
    )
    return (
        "Percent. Classifiers may reject images; what counts is how often they are wrong on those"
        " that they accept. Balanced is the mean error of the groups, worst-group the largest of"
        f" them: {' … '.join(sizes) if len(names) > len(sizes) else ', '.join(sizes)}. A group of"
        " which nothing is accepted counts as error 100. AURC is the mean error over the rejection"
        f" rates from {percent(min(rates), 0)} to {percent(max(rates), 0)}, the normalised area"
        " under the curve: lower is better. If not said otherwise, thresholds are those that meet"
        f" each rate on the test images, without a look at their labels.{resamples}"
    )


def _classes(count: int) -> str:
    return f"{count} class{'' if count == 1 else 'es'}"


def _shown(names: Sequence[str]) -> list[int]:
    places = list(range(len(names)))
    return places if len(names) <= _NAMED_GROUPS else [places[0], places[-1]]


def _glossary(document: Document) -> str:
    names = dict.fromkeys(
        name for found in document["priors"].values() for name in found["methods"]
    )
    saved = "the rule that was saved under this name"
    return "\n".join(f"- `{name}`: {METHODS.get(name, saved)}" for name in names)


def _areas(methods: Document, published: Mapping[str, PublishedArea]) -> str:
    rows = [
        [
            f"`{name}`",
            *(
                _interval(method["aurc"][kind], value, low, high)
                for value, low, high in (
                    ("normalised", "low", "high"),
                    ("minus_chow", "minus_chow_low", "minus_chow_high"),
                )
                for kind in _KINDS
            ),
        ]
        for name, method in methods.items()
    ]
    rows += [
        [
            f"published: {name}",
            _plus_minus(area.balanced, area.balanced_half_width),
            _plus_minus(area.worst, area.worst_half_width),
            MISSING,
            MISSING,
        ]
        for name, area in published.items()
    ]
    columns = ("method", "balanced AURC", "worst-group AURC")
    return table((*columns, "balanced, less `chow`", "worst-group, less `chow`"), rows)


def _interval(numbers: Document, value: str, low: str, high: str) -> str:
    text = percent(numbers.get(value))
    if numbers.get(low) is None or numbers.get(high) is None:
        return text
    return f"{text} [{percent(numbers[low])}, {percent(numbers[high])}]"


def _plus_minus(value: float | None, half_width: float | None) -> str:
    return percent(value) if half_width is None else f"{percent(value)} ± {percent(half_width)}"


def _same_areas(document: Document, methods: Document) -> list[str]:
    rows = []
    for name, method in methods.items():
        areas = [method["aurc"][kind] for kind in _KINDS]
        raw = [percent(area.get("raw")) for area in areas]
        means = [
            _plus_minus(area.get("trials_mean"), area.get("trials_half_width")) for area in areas
        ]
        transfer = [percent(area.get("transfer")) for area in areas]
        rows.append([f"`{name}`", *raw, *means, *transfer])
    found = [method["aurc"]["balanced"].get("span") for method in methods.values()]
    spans = dict.fromkeys(f"{span:g}" for span in found if span is not None)
    trials = document.get("trials") or 0
    repeated = (
        f"mean ± half-width of the 95 percent interval over {trials} divisions into validation"
        " and test images"
        if trials > 1
        else "of one division into validation and test images"
    )
    columns = [f"{kind}, {what}" for what in ("raw", "trials", "transfer") for kind in _KINDS]
    return [
        f"The same areas. Raw: not divided by the span of the rates, {' or '.join(spans)}."
        f" Trials: {repeated}{_known(document) if trials > 1 else ''}. Transfer: with the"
        f" thresholds of the {document['val_images']} validation images, over the rates aimed at.",
        table(("method", *columns), rows),
    ]


def _known(document: Document) -> str:
    chosen = document.get("tag") == "best"
    return ", some of which had a say in the choice of the epoch" if chosen else ""


def _errors(document: Document, methods: Document) -> list[str]:
    places = _places(document["rates"])
    rates = [percent(document["rates"][place], 0) for place in places]
    rows = [
        [
            f"`{name}`",
            *(
                percent(method["curve"]["matched"][kind][place])
                for kind in ("balanced_error", "worst_error")
                for place in places
            ),
        ]
        for name, method in methods.items()
    ]
    columns = [f"{kind} at {rate}" for kind in ("balanced", "worst-group") for rate in rates]
    return ["Errors at single rejection rates.", table(("method", *columns), rows)]


def _places(rates: Sequence[float]) -> list[int]:
    """Find the rates closest to those that are shown."""
    every = range(len(rates))
    closest = [min(every, key=lambda place: abs(rates[place] - wanted)) for wanted in _RATES]
    return list(dict.fromkeys(closest))


def _groups(document: Document, methods: Document) -> list[str]:
    wanted = [name for name in methods if name == "chow" or "plugin" in name]
    if not wanted:
        return []
    rates, names = document["rates"], document["groups"]["names"]
    middle = sorted(range(len(rates)), key=lambda place: rates[place])[len(rates) // 2]
    rows = []
    for name in wanted:
        curve = methods[name]["curve"]["matched"]
        by_group = [
            percent(curve[kind][middle][group])
            for kind in ("group_errors", "group_coverage")
            for group in _shown(names)
        ]
        single = [percent(curve[kind][middle]) for kind in ("standard_error", "gap")]
        rows.append([f"`{name}`", *by_group, *single])
    columns = [
        f"{what} {names[group]}" for what in ("error", "accepted") for group in _shown(names)
    ]
    gap = f"{names[-1]} less {names[0]}"
    return [
        f"Groups at rejection rate {percent(rates[middle], 0)}: error on what is accepted, and how"
        " much is accepted. Standard error: of all accepted images. Last column: the error of"
        f" {names[-1]} less that of {names[0]}.",
        table(("method", *columns, "standard error", gap), rows),
    ]


def _costs(costs: Sequence[Document]) -> list[str]:
    if not costs:
        return []
    shares = ("rejection", "balanced_risk", "worst_risk")
    rows = [
        [row["cost"], f"`{row['method']}`", *(percent(row[name]) for name in shares)]
        for row in sorted(costs, key=lambda row: row["cost"])  # keeps the order of the methods
    ]
    return [
        "Where a rejection has a cost, in units of an error. Risk: error plus cost times rejected"
        " share, by which methods that reject different shares can be compared.",
        table(("cost", "method", "rejected", "balanced risk", "worst-group risk"), rows),
    ]


def draw(document: Document, plots: Path) -> list[tuple[str, str]]:
    """Draw errors over rejection rates; return file names and captions."""
    drawn = []
    for prior, name in (("train", ""), ("uniform", "_uniform")):
        methods = document.get("priors", {}).get(prior, {}).get("methods", {})
        where = PRIORS[prior][0]
        groups = {method: methods[method] for method in _BY_GROUP if method in methods}
        if methods:
            path, title = plots / f"risk_coverage_curves{name}.png", f"Errors, {where}"
            _draw_errors(document["rates"], methods, path, title)
            drawn.append((path.name, title))
        if groups and prior == "train":
            path, title = plots / "risk_coverage_groups.png", f"Errors of groups, {where}"
            _draw_groups(document, groups, path, title)
            drawn.append((path.name, title))
    return drawn


def _draw_errors(rates: Sequence[float], methods: Document, path: Path, title: str) -> None:
    panels = {"balanced error": "balanced_error", "worst-group error": "worst_error"}
    curves = {
        label: {
            name: (_percent(rates), method["curve"]["matched"][kind])
            for name, method in methods.items()
        }
        for label, kind in panels.items()
    }
    _draw(path, curves, methods, title)


def _draw_groups(document: Document, methods: Document, path: Path, title: str) -> None:
    first, last = document["groups"]["names"][0], document["groups"]["names"][-1]
    panels: dict[str, plot.Curves] = {}
    for label, kind, group in (
        (f"error of {first}", "group_errors", 0),
        (f"error of {last}", "group_errors", -1),
        ("standard error", "standard_error", None),
        (f"error of {last} less {first}", "gap", None),
    ):
        panels[label] = {
            name: (
                _percent(document["rates"]),
                [
                    value if group is None else value[group]
                    for value in method["curve"]["matched"][kind]
                ],
            )
            for name, method in methods.items()
        }
    _draw(path, panels, methods, title)


def _draw(path: Path, panels: Mapping[str, plot.Curves], methods: Document, title: str) -> None:
    x_label = "rejected, percent"
    looks = _looks(methods)
    plot.line_panels(path, panels, title=title, x_label=x_label, scale="percent", looks=looks)


def _percent(rates: Sequence[float]) -> list[float]:
    return [round(100 * rate, 6) for rate in rates]


def _looks(methods: Document) -> dict[str, int]:
    """Give each method a look that is the same in all pictures.

    The rule for the worst group has the colour of its balanced sister, dashed; saved rules are
    dotted.
    """
    size = len(PALETTE)
    looks = {name: number for number, name in enumerate(_COLOURED)}
    looks |= {f"{name}_worst": size + number for name, number in looks.items()}
    saved = [name for name in methods if name not in looks]
    return looks | {name: 2 * size + number for number, name in enumerate(saved)}
