"""Lookup tables against searching all rows, and what the original got wrong."""

import json
import logging
import statistics
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from moectl.controller.execution import Execution, Timings
from moectl.controller.importance import MOLMOE, order_of
from moectl.controller.plans import Plan, Space, Tier, top_k_choices
from moectl.controller.records import Record, record
from moectl.controller.table import Row, Table, build, read_table
from moectl.engine.errors import UserError
from moectl.engine.files import write_json

SPACE = Space(
    blocks=16,
    mixtures=(True,) * 16,
    default_top_k=8,
    top_k_choices=top_k_choices(8),
    always_on=(0,),
    min_active=12,
    max_active=16,
    tiers=(Tier("low", 1, 3, 3), Tier("medium", 4, 8, 6), Tier("very_high", 9, 12, 12)),
)
ORDER = order_of(MOLMOE, SPACE.always_on)


def row(accuracy: float, latency: float, tier: str = "low", top_k: int = 8, count: int = 16) -> Row:
    return Row(tier, top_k, count, accuracy, latency, 4, 0.1, 2.0)


def table(*rows: Row) -> Table:
    return Table(rows, "total", "ms", {"aggregation": "mean"})


def measured(
    tier: str, top_k: int, count: int, *, accuracy: float, prefill: float, new_tokens: int = 3
) -> Record:
    """A record of a uniform plan: 5 ms of vision, 10 ms a step."""
    active = tuple(block in ORDER[:count] for block in range(16))
    timings = Timings(5.0, prefill, 10.0 * (new_tokens - 1), new_tokens)
    execution = Execution("yes", accuracy, timings, prefill / 10, 3, 400, 10)
    return record("q", Plan(tier, active, SPACE.uniform(top_k)), execution)


SAMPLES = [
    measured("low", 4, 12, accuracy=0.0, prefill=50.0),
    measured("low", 4, 12, accuracy=1.0, prefill=52.0),
    measured("low", 4, 12, accuracy=0.6, prefill=90.0),
    measured("medium", 8, 16, accuracy=1.0, prefill=130.0),
    measured("medium", 8, 16, accuracy=0.6, prefill=134.0),
    measured("medium", 8, 16, accuracy=1.0, prefill=120.0),
]


def test_rows_hold_mean_accuracy_and_latency() -> None:
    found = build(SAMPLES, "total")
    assert [(r.tier, r.top_k, r.count, r.samples) for r in found.rows] == [
        ("low", 4, 12, 3),
        ("medium", 8, 16, 3),
    ]
    low, medium = found.rows
    assert low.accuracy == pytest.approx(1.6 / 3)
    assert low.latency == pytest.approx(64 + 25)
    assert medium.latency == pytest.approx(128 + 25)
    assert low.accuracy_std == pytest.approx(statistics.stdev([0.0, 1.0, 0.6]))
    assert low.latency_std == pytest.approx(statistics.stdev([50.0, 52.0, 90.0]))
    assert (found.objective, found.unit) == ("total", "ms")


def test_objectives_read_other_times() -> None:
    assert build(SAMPLES, "prefill").rows[0].latency == pytest.approx(64)
    assert build(SAMPLES, "ttft").rows[0].latency == pytest.approx(69)
    assert build(SAMPLES, "per_token").rows[0].latency == pytest.approx(10)


def test_work_makes_a_table_of_another_unit() -> None:
    found = build(SAMPLES, "total", source="flops")
    assert found.unit == "GFLOP"
    assert found.rows[0].latency == pytest.approx(6.4)


def test_one_sample_has_no_spread() -> None:
    found = build(SAMPLES[:1], "total").rows[0]
    assert (found.accuracy_std, found.latency_std) == (0.0, 0.0)


def test_answers_of_one_token_tell_nothing_of_a_step() -> None:
    short = measured("low", 4, 12, accuracy=1.0, prefill=50.0, new_tokens=1)
    found = build([short, SAMPLES[0]], "per_token").rows[0]
    assert (found.latency, found.accuracy, found.samples) == (10.0, 0.5, 2)
    with pytest.raises(UserError, match="no per_token latency"):
        build([short], "per_token")


def test_plans_with_varied_experts_are_left_out() -> None:
    active = (True,) * 16
    varied = Plan("low", active, (8, *(4, 5) * 7, 4))
    extra = record("q", varied, Execution("", 1.0, Timings(1, 1, 1, 2), 1.0, 3, 400, 10))
    assert build([*SAMPLES, extra], "total") == build(SAMPLES, "total")
    with pytest.raises(UserError, match="same number of experts"):
        build([extra], "total")


def test_samples_of_another_objective_are_refused() -> None:
    other = {**SAMPLES[0], "objective": "prefill"}
    with pytest.raises(UserError, match="sample q was measured for the objective prefill"):
        build([*SAMPLES, other], "total")
    assert build([other], "prefill").rows[0].latency == 50.0


def test_rows_of_different_blocks_are_refused() -> None:
    other = {**SAMPLES[0], "active_block_indices": list(range(12))}
    with pytest.raises(UserError, match="expected the same blocks"):
        build([*SAMPLES, other], "total")


def test_unequal_numbers_of_samples_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(SAMPLES, "total")
        assert not caplog.records
        build(SAMPLES[:-1], "total")
    assert "not all run on the same number of samples" in caplog.text


def test_the_best_row_is_the_most_accurate_within_the_budget() -> None:
    low, middle, high = row(0.4, 170), row(0.7, 290), row(0.76, 371)
    found = table(middle, high, low)
    assert found.best(200) is low
    assert found.best(289.9) is low
    assert found.best(290) is middle
    assert found.best(1000) is high


def test_a_cheaper_better_row_wins_over_one_close_to_the_budget() -> None:
    assert table(row(0.7, 100), row(0.6, 195)).best(200).latency == 100


def test_of_equally_accurate_rows_the_faster_is_best() -> None:
    assert table(row(0.7, 190), row(0.7, 150), row(0.7, 170)).best(200).latency == 150


def test_without_a_row_within_the_budget_the_fastest_is_best() -> None:
    assert table(row(0.9, 120), row(0.1, 110), row(0.3, 110), row(0.5, 300)).best(50) == row(
        0.3, 110
    )


def test_more_budget_never_means_less_accuracy() -> None:
    rows = [
        row(accuracy / 10, latency)
        for accuracy, latency in zip(
            (3, 1, 5, 5, 2, 8, 7), (20, 30, 40, 35, 60, 80, 90), strict=True
        )
    ]
    found = [table(*rows).best(budget) for budget in range(20, 120)]
    assert all(a.accuracy <= b.accuracy for a, b in pairwise(found))
    assert all(best.latency <= budget for best, budget in zip(found, range(20, 120), strict=True))
    for best, budget in zip(found, range(20, 120), strict=True):
        assert best.accuracy == max(r.accuracy for r in rows if r.latency <= budget)


def test_plans_of_rows_run_the_most_important_blocks() -> None:
    plan = table().plan(row(0.5, 100, "medium", 6, 13), SPACE, ORDER)
    assert plan == Plan(
        "medium", tuple(block not in (4, 13, 10) for block in range(16)), (8, *(6,) * 15)
    )
    for tier, top_k, count in product(("low", "very_high"), (4, 8), SPACE.counts):
        plan = table().plan(row(0.5, 100, tier, top_k, count), SPACE, ORDER)
        plan.check(SPACE)
        assert len(plan.blocks) == count


@pytest.mark.parametrize(
    ("tier", "top_k", "count"), [("huge", 8, 16), ("low", 3, 16), ("low", 8, 9)]
)
def test_rows_of_other_networks_have_no_plan(tier: str, top_k: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        table().plan(row(0.5, 100, tier, top_k, count), SPACE, ORDER)


def test_building_and_planning_agree() -> None:
    found = build(SAMPLES, "total")
    for sample in SAMPLES:
        key = (sample["tier"], sample["top_k"], sample["num_active_blocks"])
        (match,) = [r for r in found.rows if (r.tier, r.top_k, r.count) == key]
        assert found.plan(match, SPACE, ORDER).plain() == sample["plan"]


@pytest.mark.parametrize(
    ("fastest", "slowest", "expected"),
    [
        (166.5, 371.5, (170.0, 380.0)),  # the range of the original
        (9.3, 16.6, (9.5, 17.0)),
        (50.0, 100.0, (51.0, 110.0)),
        (0.031, 1234.0, (0.032, 1300.0)),
    ],
)
def test_budgets_range_from_just_above_the_fastest_to_above_the_slowest(
    fastest: float, slowest: float, expected: tuple[float, float]
) -> None:
    found = table(row(0.5, slowest), row(0.4, fastest), row(0.4, (fastest + slowest) / 2))
    assert found.budget_range() == expected
    low, high = found.budget_range()
    assert found.best(low).latency <= low
    assert high >= slowest


def test_the_file_has_the_known_parts() -> None:
    rows = (row(0.4, 43, "low", 4, 12), row(0.7, 51, "very_high", 8, 16))
    found = Table(rows, "total", "ms", {"aggregation": "mean", "model": "tiny"}).plain()
    assert found == {
        "config_table": {
            "low_4_12": {
                "accuracy": 0.4,
                "latency": 43,
                "num_samples": 4,
                "accuracy_std": 0.1,
                "latency_std": 2.0,
            },
            "very_high_8_16": {
                "accuracy": 0.7,
                "latency": 51,
                "num_samples": 4,
                "accuracy_std": 0.1,
                "latency_std": 2.0,
            },
        },
        "lookup_table": {
            "40": "low_4_12",  # none is within: the fastest
            "45": "low_4_12",
            "50": "low_4_12",
            "55": "very_high_8_16",
        },
        "statistics": {
            "num_configs": 2,
            "num_samples": 8,
            "accuracy": {"min": 0.4, "max": 0.7},
            "latency": {"min": 43, "max": 51},
        },
        "metadata": {
            "aggregation": "mean",
            "model": "tiny",
            "objective": "total",
            "unit": "ms",
        },
    }


@pytest.mark.parametrize("latency", [0.4, 5.0, 5.1])
def test_small_latencies_have_lookups_too(latency: float) -> None:
    found = table(row(0.4, latency)).plain()["lookup_table"]
    assert found == {str(budget): "low_8_16" for budget in ([5, 10] if latency > 5 else [5])}


def test_tables_survive_a_file(tmp_path: Path) -> None:
    named = [*SAMPLES, measured("very_high", 8, 16, accuracy=0.7, prefill=180.0)]
    for found in (build(named, "total"), build(named, "total", source="flops")):
        found.metadata["order"] = ORDER
        write_json(tmp_path / "lut.json", found.plain())
        assert read_table(tmp_path / "lut.json") == found


def test_tables_of_another_latency_are_refused() -> None:
    build(SAMPLES, "total").require("total", "measured")
    build(SAMPLES, "total").require("total", "table")
    with pytest.raises(UserError, match="objective total in ms: expected prefill in ms"):
        build(SAMPLES, "total").require("prefill", "measured")
    with pytest.raises(UserError, match="in ms: expected total in GFLOP"):
        build(SAMPLES, "total").require("total", "flops")


def spoilt(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(build(SAMPLES, "total").plain())), **changes}


@pytest.mark.parametrize(
    "document",
    [
        spoilt(config_table={}),
        spoilt(config_table={"low_4_12": {"accuracy": 1}}),
        spoilt(config_table={"low": SAMPLES[0]}),
        spoilt(config_table={"low_4_12": 3}),
        spoilt(
            config_table={
                "low_4_12": {
                    "accuracy": 1.0,
                    "latency": float("nan"),
                    "num_samples": 1,
                    "accuracy_std": 0.0,
                    "latency_std": 0.0,
                }
            }
        ),
        spoilt(metadata={"unit": "ms"}),
        *(
            spoilt(metadata={"objective": "total", "unit": "ms", "order": order})
            for order in (None, 5, [], list(range(15)), [*range(15), 14], [*ORDER, "x"])
        ),
        [1, 2],
        {},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, document: Any) -> None:
    path = tmp_path / "lut.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"{path}: not a lookup table"):
        read_table(path)
