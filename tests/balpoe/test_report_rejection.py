import json
from pathlib import Path
from typing import Any

import pytest

from moectl.balpoe import published, report_rejection
from moectl.balpoe.report_rejection import METHODS, draw, section
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import plot
from moectl.engine.settings import dump, flatten

RATES = [round(0.1 * number, 1) for number in range(9)]
STANDARD = flatten(dump(BalpoeSettings()))
ALL = list(METHODS)


@pytest.fixture
def drawing() -> None:
    """Asked for by the tests that look at pictures."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures empty where only their number matters."""
    if "drawing" not in request.fixturenames:
        monkeypatch.setattr(plot, "write_png", lambda _, path: path.write_bytes(b""))


def method(place: int, names: list[str], reject: bool = True) -> dict[str, Any]:
    """Write a method whose errors fall as it rejects; the later, the fairer to the last group."""
    last = len(names) - 1
    errors = [
        [
            0.3 + 0.5 * (group == last) * (1 - 0.06 * place) - 0.3 * rate * reject * (1 + group / 3)
            for group in range(last + 1)
        ]
        for rate in RATES
    ]
    means = [sum(row) / len(row) for row in errors]
    worst = [max(row) for row in errors]
    coverage = [[1 - rate * reject for _ in names] for rate in RATES]
    curve = {
        "rejection": [rate * reject for rate in RATES],
        "balanced_error": means,
        "worst_error": worst,
        "standard_error": [0.7 * value for value in means],
        "group_errors": errors,
        "group_coverage": coverage,
        "gap": [row[-1] - row[0] for row in errors],
    }
    areas = {}
    for kind, values in (("balanced", means), ("worst", worst)):
        mean = (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)
        areas[kind] = {
            "normalised": mean,
            "raw": 0.8 * mean,
            "span": 0.8,
            "low": mean - 0.011,
            "high": mean + 0.012,
            "trials_mean": mean + 0.001,
            "trials_half_width": 0.004,
            "transfer": mean + 0.02,
            "minus_chow": -0.05,
            "minus_chow_low": -0.06,
            "minus_chow_high": 0.01,
        }
    rule = {"alpha": [1.0] * len(names), "mu": [0.0] * len(names), "threshold": None}
    curves = {"matched": curve, "transfer": curve}
    return {"aurc": areas, "curve": curves, "rules": [rule] * len(RATES)}


def document(names: list[str] = ALL, groups: tuple[str, ...] = ("head", "tail")) -> dict[str, Any]:
    """Write what an evaluation of methods leaves."""
    methods = {
        name: method(place, list(groups), name != "balpoe") for place, name in enumerate(names)
    }
    for kind in ("balanced", "worst"):
        if "chow" in methods:
            methods["chow"]["aurc"][kind] |= dict.fromkeys(
                ("minus_chow", "minus_chow_low", "minus_chow_high")
            )
    of_class = [min(place // 2, len(groups) - 1) for place in range(2 * len(groups) + 1)]
    found = {
        "tag": "best",
        "weights": {"file": "model_best.pth", "sha256": "0", "epoch": 3},
        "groups": {"names": list(groups), "of_class": of_class},
        "rates": RATES,
        "test_images": 8000,
        "val_images": 2000,
        "trials": 5,
        "bootstrap": 1000,
        "priors": {prior: {"methods": methods, "costs": []} for prior in ("train", "uniform")},
    }
    return json.loads(json.dumps(found))


def rows(text: str, start: str) -> list[list[str]]:
    """Return the cells of all table rows that begin with a text."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_nothing_measured_leaves_nothing(tmp_path: Path) -> None:
    assert section({}, STANDARD) == ""
    assert draw({}, tmp_path) == []


def test_the_text_says_what_was_measured_and_on_what() -> None:
    text = section(document(), STANDARD)
    assert text.startswith("## Rejection, weights `best`\n")
    assert "head (2 classes), tail (3 classes)" in text
    assert "rejection rates from 0 to 80" in text
    assert "intervals of 1000 resamples of the 8000 test images" in text
    assert "### Label prior of the training set" in text
    assert "### Uniform label prior" in text
    assert all(f"\n- `{name}`: " in text for name in METHODS)


def test_areas_stand_in_percent_with_their_intervals() -> None:
    areas, others, _, groups = rows(section(document(), {}), "`plugin_single`")[:4]
    # head: .3 - .3 r, tail: .68 - .4 r, mean rate .4
    assert areas[1:3] == ["35.0 [33.9, 36.2]", "52.0 [50.9, 53.2]"]
    assert areas[3:] == ["-5.0 [-6.0, 1.0]"] * 2
    assert others[1:] == ["28.0", "41.6", "35.1 ± 0.4", "52.1 ± 0.4", "37.0", "54.0"]
    assert groups[1:] == ["18.0", "52.0", "60.0", "60.0", "24.5", "34.0"]


def test_the_span_of_raw_areas_is_said_once() -> None:
    assert section(document(), {}).count("the span of the rates, 0.8.") == 2  # one per prior


def test_errors_are_shown_at_three_rates() -> None:
    text = section(document(), {})
    assert "| balanced at 0 | balanced at 40 | balanced at 80 | worst-group at 0 |" in text
    assert rows(text, "`balpoe`")[2][1:] == ["55.0"] * 3 + ["80.0"] * 3
    assert rows(text, "`plugin_single`")[2][1:] == ["49.0", "35.0", "21.0", "68.0", "52.0", "36.0"]


def test_other_rates_are_shown_at_the_nearest_ones() -> None:
    assert [RATES[place] for place in report_rejection._places(RATES)] == [0.0, 0.4, 0.8]
    assert report_rejection._places([0.3]) == [0]
    assert report_rejection._places([0.1, 0.75, 0.5]) == [0, 2, 1]


def test_what_is_not_known_is_a_dash() -> None:
    found = document(["balpoe", "chow"])
    found |= {"bootstrap": 0, "trials": 1}
    for prior in found["priors"].values():
        for entry in prior["methods"].values():
            for area in entry["aurc"].values():
                area |= {"low": None, "high": None, "trials_half_width": None, "transfer": None}
            entry["curve"]["matched"]["worst_error"] = [None] * len(RATES)
    text = section(found, {})
    assert "In brackets" not in text
    assert "one division into validation and test images" in text
    areas, others, errors, _ = rows(text, "`chow`")[:4]
    assert areas[2:] == ["61.0", "–", "–"]
    assert others[4:] == ["61.1", "–", "–"]
    assert errors[4:] == ["–"] * 3


def test_published_areas_stand_under_those_of_the_training_prior() -> None:
    text = section(document(), STANDARD)
    train, _, uniform = text.partition("### Uniform label prior")
    assert rows(train, "published: Chow") == [
        ["published: Chow", "50.9 ± 0.2", "88.3 ± 0.7", "–", "–"]
    ]
    assert "single ResNet-32 trained by cross-entropy for 256 epochs" in train
    assert "ublished" not in uniform


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": {"names": ["many", "few"], "of_class": [0, 1, 1]}},
        {"config": {"groups": "quantile:0.3", "tail_threshold": 20}},
        {"config": {"groups": "head_tail", "tail_threshold": 30}},
        {"weights": {}},
    ],
)
def test_other_groups_or_logits_from_elsewhere_stand_alone(changes: dict[str, Any]) -> None:
    assert "ublished" in section(document(), STANDARD)
    assert "ublished" not in section({**document(), **changes}, STANDARD)


def test_other_data_stand_alone() -> None:
    assert "ublished" not in section(document(), {**STANDARD, "data.imbalance_ratio": 10.0})


def test_every_group_is_shown_unless_there_are_many() -> None:
    text = section(document(["chow"], ("many", "medium", "few")), {})
    assert "| error many | error medium | error few | accepted many |" in text
    assert "| standard error | few less many |" in text
    found = document(["chow"], tuple("abcdef"))
    found["groups"]["of_class"] = [0, 0, 1, 2, 3, 4, 5]
    text = section(found, {})
    assert "a (2 classes) … f (1 class)" in text
    assert "| error a | error f | accepted a | accepted f |" in text


def test_costs_are_listed_where_they_were_given() -> None:
    found = document(["chow"])
    assert "Risk" not in section(found, {})
    found["priors"]["train"]["costs"] = [
        {"method": name, "cost": cost, "rejection": 0.5 - cost, "balanced_risk": 0.25,
         "worst_risk": None}
        for name in ("chow", "moe_plugin") for cost in (0.1, 0.05)
    ]  # fmt: skip
    text = section(found, {})
    table = text[text.index("Risk") :].splitlines()[4:8]
    assert table == [
        "| 0.05 | `chow` | 45.0 | 25.0 | – |",
        "| 0.05 | `moe_plugin` | 45.0 | 25.0 | – |",
        "| 0.1 | `chow` | 40.0 | 25.0 | – |",
        "| 0.1 | `moe_plugin` | 40.0 | 25.0 | – |",
    ]


def test_a_saved_rule_is_named_and_drawn(tmp_path: Path) -> None:
    found = document(["chow", "plugin:my_rule"])
    assert "- `plugin:my_rule`: the rule that was saved" in section(found, {})
    assert len(rows(section(found, {}), "`plugin:my_rule`")) == 8
    assert len(draw(found, tmp_path)) == 3


def test_three_pictures_are_drawn(tmp_path: Path, drawing: None) -> None:
    names = [
        "risk_coverage_curves.png",
        "risk_coverage_groups.png",
        "risk_coverage_curves_uniform.png",
    ]
    assert [name for name, _ in draw(document(), tmp_path)] == names
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(names)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_pictures_of_what_is_not_there_are_left_out(tmp_path: Path) -> None:
    found = document(["balpoe", "chow_single"])
    del found["priors"]["uniform"]
    assert [name for name, _ in draw(found, tmp_path)] == ["risk_coverage_curves.png"]
    found["priors"] = {"uniform": found["priors"]["train"]}
    assert [name for name, _ in draw(found, tmp_path)] == ["risk_coverage_curves_uniform.png"]


def test_curves_are_drawn_over_the_rates_even_where_nothing_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        plot, "line_panels", lambda path, panels, **_: given.update({path.stem: panels})
    )
    draw(document(), tmp_path)
    xs, ys = given["risk_coverage_curves"]["balanced error"]["balpoe"]
    assert xs == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert ys == pytest.approx([0.55] * 9)
    groups = given["risk_coverage_groups"]
    assert list(groups) == [
        "error of head", "error of tail", "standard error", "error of tail less head",
    ]  # fmt: skip
    assert list(groups["error of tail"]) == [
        "chow", "chow_ce", "plugin_balpoe_avg", "moe_plugin", "plugin_balpoe_avg_worst",
    ]  # fmt: skip
    assert groups["error of tail"]["chow"][1][0] == pytest.approx(0.77)


def test_no_two_methods_look_the_same() -> None:
    names = [*METHODS, "plugin:a", "plugin:b"]
    looks = report_rejection._looks(dict.fromkeys(names))
    size = len(plot.PALETTE)
    assert len({looks[name] for name in names}) == len(names)
    assert looks["moe_plugin_worst"] == looks["moe_plugin"] + size


def test_the_published_methods_are_the_rows_of_the_table() -> None:
    text = section(document(), STANDARD)
    for name in published.PUBLISHED_AREAS["cifar100", 100]:
        assert len(rows(text, f"published: {name}")) == 1
