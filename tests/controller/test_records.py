"""Records of executions: their keys, and files of them that were cut off or spoilt."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from moectl.controller.execution import Execution, Objective, Timings
from moectl.controller.plans import Plan
from moectl.controller.records import latency_of, read_records, record, unit_of
from moectl.engine.errors import UserError

PLAN = Plan("medium", (True, False, True, True), (8, 4, 6, 6))
EXECUTION = Execution("a cat", 0.6, Timings(20.0, 50.0, 30.0, 4, 2.0), 7.5, 6, 864, 11)

KEYS = [
    "sample_id", "tier", "top_k", "num_active_blocks", "active_block_indices", "actual_num_crops",
    "actual_vision_tokens", "actual_text_tokens", "output_tokens", "accuracy", "pred",
    "T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_decode_per_token", "T_controller",
    "T_total", "gflop", "plan",
]  # fmt: skip


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "records.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lines(count: int) -> list[str]:
    return [json.dumps(record(f"q{number}", PLAN, EXECUTION)) for number in range(count)]


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


def test_records_survive_a_file(tmp_path: Path) -> None:
    varied = Plan("low", (True,) * 4, (8, 4, 5, 6))
    expected = [record("q1", PLAN, EXECUTION), record("q2", varied, EXECUTION)]
    text = "\n".join(map(json.dumps, expected)) + "\n"
    assert read_records(written(tmp_path, text)) == expected
    assert read_records(written(tmp_path, f"\n{text}\n\n")) == expected


def test_a_file_without_lines_has_no_records(tmp_path: Path) -> None:
    assert read_records(written(tmp_path, "")) == []


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_last_line_that_was_cut_off_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    first, second = lines(2)
    path = written(tmp_path, f"{first}\n{second[:cut]}")
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [json.loads(first)]
    assert f"{path}: line 2 was cut off" in caplog.text


def test_a_line_cut_off_within_a_letter_is_dropped(tmp_path: Path) -> None:
    first, second = lines(2)
    cut = second.replace("a cat", "größer").encode().split(b"\xc3")[0] + b"\xc3"
    assert len(read_records(written(tmp_path, first.encode() + b"\n" + cut))) == 1


def test_a_whole_file_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_records(written(tmp_path, "\n".join(lines(2))))
    assert not caplog.records


def test_a_broken_line_in_the_middle_is_refused_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path, "\n".join([lines(1)[0], "", "{", lines(1)[0]]))
    with pytest.raises(UserError, match=rf"{path}: line 3 is not valid JSON"):
        read_records(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": "high"}, "line 2: accuracy = 'high': expected a number"),
        ({"accuracy": True}, "line 2: accuracy = True"),
        ({"T_total": float("nan")}, "line 2: T_total = nan: expected a finite number"),
        ({"gflop": float("inf")}, "line 2: gflop = inf"),
        ({"top_k": "8"}, "line 2: top_k = '8'"),
        ({"top_k": [8, "4"]}, "line 2: top_k"),
        ({"plan": None}, "line 2: plan: expected tier, blocks and top_k"),
        ({"plan": {"tier": "low", "blocks": [0]}}, "line 2: plan"),
    ],
)
def test_values_of_another_kind_are_refused_by_line_and_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    spoilt = json.dumps({**record("q", PLAN, EXECUTION), **changes})
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_records(written(tmp_path, f"{lines(1)[0]}\n{spoilt}\n"))


def test_missing_keys_are_named(tmp_path: Path) -> None:
    values = record("q", PLAN, EXECUTION)
    del values["gflop"], values["plan"]
    with pytest.raises(UserError, match="line 1 lacks plan, gflop"):
        read_records(written(tmp_path, json.dumps(values)))


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 is no record"):
        read_records(written(tmp_path, "[1, 2]\n"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_records(tmp_path / "none.jsonl")


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
