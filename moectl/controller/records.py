"""What one question under one plan gave, one line of JSON each."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

from moectl.controller.execution import Execution, Objective
from moectl.controller.plans import Plan
from moectl.engine.errors import UserError

log = logging.getLogger(__name__)

Record = dict[str, Any]

Source = Literal["measured", "table", "flops"]
"""Where a latency comes from: a clock, a fitted estimator, or the work instead of a time."""

_NUMBERS = (
    "num_active_blocks",
    "actual_num_crops",
    "actual_vision_tokens",
    "actual_text_tokens",
    "output_tokens",
    "accuracy",
    "T_vision_total",
    "T_LLM_prefill",
    "T_LLM_decode",
    "T_decode_per_token",
    "T_controller",
    "T_total",
    "gflop",
)
_OTHERS = ("sample_id", "tier", "top_k", "active_block_indices", "pred", "plan")


def record(sample_id: str, plan: Plan, execution: Execution) -> Record:
    """Return what is kept of an execution; times in milliseconds."""
    timings = execution.timings
    return {
        "sample_id": sample_id,
        "tier": plan.tier,
        "top_k": _top_k(plan),
        "num_active_blocks": len(plan.blocks),
        "active_block_indices": list(plan.blocks),
        "actual_num_crops": execution.crops,
        "actual_vision_tokens": execution.vision_tokens,
        "actual_text_tokens": execution.text_tokens,
        "output_tokens": timings.new_tokens,
        "accuracy": execution.accuracy,
        "pred": execution.answer,
        "T_vision_total": timings.vision,
        "T_LLM_prefill": timings.prefill,
        "T_LLM_decode": timings.decode,
        "T_decode_per_token": timings.per_token,
        "T_controller": timings.controller,
        "T_total": timings.latency("total"),
        "gflop": execution.gflop,
        "plan": plan.plain(),
    }


def _top_k(plan: Plan) -> int | list[int]:
    """Return the one number of experts of the blocks that run, or those of all blocks.

    The first block keeps its own number, whatever the plan.
    """
    numbers = {plan.top_k[block] for block in plan.blocks if block > 0} - {0}
    if len(numbers) > 1:
        return list(plan.top_k)
    return numbers.pop() if numbers else plan.top_k[0]


def read_records(path: Path) -> list[Record]:
    """Read what was written line by line.

    A last line that was cut off is dropped with a warning: its writer was stopped.

    Raises:
        UserError: if the file is missing, or another line is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    records = []
    for number, line in numbered:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            if number == numbered[-1][0]:
                log.warning("%s: line %d was cut off and is left out", path, number)
                break
            raise UserError(f"{path}: line {number} is not valid JSON") from None
        records.append(_checked(values, f"{path}: line {number}"))
    return records


def _checked(values: Any, place: str) -> Record:
    if not isinstance(values, dict):
        raise UserError(f"{place} is no record: expected an object with keys")
    if missing := [key for key in (*_OTHERS, *_NUMBERS) if key not in values]:
        raise UserError(f"{place} lacks {', '.join(missing)}")
    for key in _NUMBERS:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{place}: {key} = {value!r}: expected a number")
        if not math.isfinite(value):
            raise UserError(f"{place}: {key} = {value}: expected a finite number")
    plan = values["plan"]
    if not (isinstance(plan, dict) and _integers(plan, "blocks") and _integers(plan, "top_k")):
        raise UserError(f"{place}: plan: expected tier, blocks and top_k")
    top_k = values["top_k"]
    if not (_integer(top_k) or _integers(values, "top_k")):
        raise UserError(f"{place}: top_k = {top_k!r}: expected a number or a list of numbers")
    return values


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(values: Record, key: str) -> bool:
    found = values.get(key)
    return isinstance(found, list) and all(map(_integer, found))


def latency_of(values: Record, objective: Objective, source: Source) -> float:
    """Return what a budget is held against: milliseconds, or 10⁹ operations from `flops`.

    Args:
        values: of `record`.
        objective: which time.
        source: `measured` and `table` both read the times of the record.

    Raises:
        UserError: if the work of one stage is asked for, which is not recorded.
    """
    if source == "flops":
        if objective != "total":
            raise UserError(
                f"objective = {objective}: the work is known of the whole answer alone",
                "Use the objective total, or measured times.",
            )
        return float(values["gflop"])
    first = values["T_controller"] + values["T_vision_total"] + values["T_LLM_prefill"]
    times = {
        "total": values["T_total"],
        "ttft": first,
        "prefill": values["T_LLM_prefill"],
        "per_token": values["T_decode_per_token"],
    }
    return float(times[objective])


def unit_of(source: Source) -> str:
    """Return the unit of `latency_of`."""
    return "GFLOP" if source == "flops" else "ms"
