"""Times that add up, and records that survive JSON."""

import json

import pytest

from moectl.controller.execution import Execution, Objective, Timings, execution_from

TIMINGS = Timings(vision=10.0, prefill=20.0, decode=30.0, new_tokens=4, controller=1.0)


@pytest.mark.parametrize(
    ("objective", "expected"), [("total", 61), ("ttft", 31), ("prefill", 20), ("per_token", 10)]
)
def test_each_objective_counts_its_stages(objective: Objective, expected: float) -> None:
    assert TIMINGS.latency(objective) == expected


def test_an_answer_of_one_token_takes_nothing_per_further_token() -> None:
    assert Timings(1.0, 2.0, 0.0, 1).per_token == 0


def test_an_execution_survives_json() -> None:
    execution = Execution("two", 0.9, TIMINGS, 1.5, 6, 200, 20)
    assert execution_from(json.loads(json.dumps(execution.plain()))) == execution
