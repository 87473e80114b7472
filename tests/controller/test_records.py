"""Records of executions: their keys and latencies."""

import pytest

from moectl.controller.execution import Execution, Objective, Timings
from moectl.controller.plans import Plan
from moectl.controller.records import deviation, latency_of, record, unit_of
from moectl.engine.errors import UserError

PLAN = Plan("medium", (True, False, True, True), (8, 4, 6, 6))
EXECUTION = Execution("a cat", 0.6, Timings(20.0, 50.0, 30.0, 4, 2.0), 7.5, 6, 864, 11)

KEYS = [
    "sample_id", "tier", "top_k", "num_active_blocks", "active_block_indices", "actual_num_crops",
    "actual_vision_tokens", "actual_text_tokens", "output_tokens", "accuracy", "pred",
    "T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_decode_per_token", "T_controller",
    "T_total", "gflop", "plan",
]  # fmt: skip


def test_a_record_holds_what_was_measured() -> None:
    found = record("q7", PLAN, EXECUTION)
    assert list(found) == KEYS
    assert found == {
        "sample_id": "q7",
        "tier": "medium",
        "top_k": 6,
        "num_active_blocks": 3,
        "active_block_indices": [0, 2, 3],
        "actual_num_crops": 6,
        "actual_vision_tokens": 864,
        "actual_text_tokens": 11,
        "output_tokens": 4,
        "accuracy": 0.6,
        "pred": "a cat",
        "T_vision_total": 20.0,
        "T_LLM_prefill": 50.0,
        "T_LLM_decode": 30.0,
        "T_decode_per_token": 10.0,
        "T_controller": 2.0,
        "T_total": 102.0,
        "gflop": 7.5,
        "plan": {"tier": "medium", "blocks": [0, 2, 3], "top_k": [8, 4, 6, 6]},
    }


@pytest.mark.parametrize(
    ("active", "top_k", "expected"),
    [
        ((1, 1, 1, 1), (8, 4, 4, 4), 4),
        ((1, 1, 1, 1), (8, 8, 8, 8), 8),
        ((1, 1, 1, 1), (8, 4, 5, 4), [8, 4, 5, 4]),
        ((1, 1, 0, 1), (8, 4, 5, 4), 4),  # what a skipped block would do says nothing
        ((1, 1, 1, 1), (8, 4, 0, 4), 4),  # a block without experts
        ((1, 1, 1, 1), (0, 0, 0, 0), 0),
        ((1, 1, 1, 1), (0, 6, 6, 6), 6),
        ((1, 1, 1, 1), (8, 0, 0, 0), 8),
    ],
)
def test_one_number_of_experts_stands_for_all_blocks_that_run(
    active: tuple[int, ...], top_k: tuple[int, ...], expected: int | list[int]
) -> None:
    plan = Plan("low", tuple(map(bool, active)), top_k)
    assert record("q", plan, EXECUTION)["top_k"] == expected


def test_one_value_does_not_deviate() -> None:
    assert deviation([3.0]) == 0
    assert deviation([1.0, 2.0, 3.0]) == 1


OBJECTIVES: list[Objective] = ["total", "ttft", "prefill", "per_token"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_record_has_the_latencies_of_its_execution(objective: Objective) -> None:
    found = record("q", PLAN, EXECUTION)
    expected = EXECUTION.timings.latency(objective)
    assert latency_of(found, objective, "measured") == expected
    assert latency_of(found, objective, "table") == expected


def test_work_stands_for_the_whole_answer_alone() -> None:
    found = record("q", PLAN, EXECUTION)
    assert latency_of(found, "total", "flops") == 7.5
    with pytest.raises(UserError, match="objective = ttft"):
        latency_of(found, "ttft", "flops")


def test_work_has_a_unit_of_its_own() -> None:
    assert [unit_of("measured"), unit_of("table"), unit_of("flops")] == ["ms", "ms", "GFLOP"]
