"""What one question under one plan gave, in plain values for a line of JSON."""

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from moectl.controller.execution import Execution, Objective
from moectl.controller.plans import Plan
from moectl.engine.errors import UserError

Record = dict[str, Any]

Source = Literal["measured", "table", "flops"]
"""Where a latency comes from: a clock, a fitted estimator, or the work instead of a time."""


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


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample, 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


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
