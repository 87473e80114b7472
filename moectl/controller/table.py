"""The lookup table: what each uniform plan scores and takes, and the best of them in a budget."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moectl.controller.execution import Objective
from moectl.controller.plans import Plan, Space
from moectl.controller.records import Record, Source, deviation, latency_of, unit_of
from moectl.engine.errors import UserError
from moectl.engine.files import read_json

log = logging.getLogger(__name__)

_STEP = 5
_HEADROOM = 1.02


@dataclass(frozen=True)
class Row:
    """One tier, one number of experts, one number of active blocks."""

    tier: str
    top_k: int
    count: int
    accuracy: float
    latency: float
    """In the table's unit."""
    samples: int
    accuracy_std: float
    """Between samples; `latency_std` likewise."""
    latency_std: float

    @property
    def name(self) -> str:
        """Under which the row stands in the file."""
        return f"{self.tier}_{self.top_k}_{self.count}"


@dataclass(frozen=True)
class Table:
    """Rows and what they were measured by."""

    rows: tuple[Row, ...]
    """At least one."""
    objective: Objective
    unit: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def require(self, objective: Objective, source: Source) -> None:
        """Refuse to be used for other latencies than the table holds.

        Raises:
            UserError: saying which it holds.
        """
        if (self.objective, self.unit) != (objective, unit_of(source)):
            raise UserError(
                f"the lookup table was made for the objective {self.objective} in {self.unit}:"
                f" expected {objective} in {unit_of(source)}",
                "Make one with: moectl controller profile --what grid",
            )

    def best(self, budget: float) -> Row:
        """Return the most accurate row within a budget, of equals the faster.

        Where none is within, the fastest of all: it misses the budget by the least.

        Args:
            budget: in the table's unit.
        """
        within = [row for row in self.rows if row.latency <= budget]
        if within:
            return max(within, key=lambda row: (row.accuracy, -row.latency))
        return min(self.rows, key=lambda row: (row.latency, -row.accuracy))

    def plan(self, row: Row, space: Space, order: Sequence[int]) -> Plan:
        """Return the plan of a row.

        Args:
            row: of this table.
            space: of the network.
            order: all blocks, the most important first; the first ones run. A table that knows the
                order that it was measured with keeps to that.

        Raises:
            ValueError: if the network has no such plan.
        """
        runs = set(self.metadata.get("order", order)[: row.count])
        active = tuple(block in runs for block in range(space.blocks))
        plan = Plan(row.tier, active, space.uniform(row.top_k))
        plan.check(space)
        return plan

    def budget_range(self) -> tuple[float, float]:
        """Return the range of budgets that the rows make interesting.

        From what the fastest row takes to what the slowest takes, each with 2 % on top and rounded
        up to two digits: so the fastest row meets the smallest budget and all meet the largest.
        """
        latencies = [row.latency for row in self.rows]
        return _rounded_up(min(latencies) * _HEADROOM), _rounded_up(max(latencies) * _HEADROOM)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON, with the best row of every fifth budget."""
        latencies = [row.latency for row in self.rows]
        first = max(_STEP, _STEP * math.floor(min(latencies) / _STEP))
        last = max(first, _STEP * math.ceil(max(latencies) / _STEP))
        accuracies = [row.accuracy for row in self.rows]
        return {
            "config_table": {row.name: _row_plain(row) for row in self.rows},
            "lookup_table": {
                str(budget): self.best(budget).name for budget in range(first, last + 1, _STEP)
            },
            "statistics": {
                "num_configs": len(self.rows),
                "num_samples": sum(row.samples for row in self.rows),
                "accuracy": {"min": min(accuracies), "max": max(accuracies)},
                "latency": {"min": min(latencies), "max": max(latencies)},
            },
            "metadata": {**self.metadata, "objective": self.objective, "unit": self.unit},
        }


def _rounded_up(value: float) -> float:
    """Round up to two digits, but not for a last bit."""
    digits = 1 - math.floor(math.log10(value))
    return round(math.ceil(round(value * 10.0**digits, 9)) / 10.0**digits, 12)


def _row_plain(row: Row) -> dict[str, Any]:
    return {
        "accuracy": row.accuracy,
        "latency": row.latency,
        "num_samples": row.samples,
        "accuracy_std": row.accuracy_std,
        "latency_std": row.latency_std,
    }


def build(
    records: Sequence[Record],
    objective: Objective,
    source: Source = "measured",
) -> Table:
    """Make a table of all records whose plan has one number of experts.

    Args:
        records: of `records.record`, of one network.
        objective: which latency. Answers of one token have no `per_token`.
        source: times, or work.

    Raises:
        UserError: if there is no such record, a record says that it was made for another objective,
            or plans of one row ran different blocks.
    """
    groups: dict[tuple[str, int, int], list[Record]] = {}
    for values in records:
        if (other := values.get("objective", objective)) != objective:
            raise UserError(
                f"sample {values['sample_id']} was measured for the objective {other}:"
                f" expected {objective}"
            )
        if isinstance(values["top_k"], int):
            key = (values["tier"], values["top_k"], values["num_active_blocks"])
            groups.setdefault(key, []).append(values)
    if not groups:
        raise UserError("no record has the same number of experts in all blocks: no table")
    rows = tuple(_row(groups[key], objective, source) for key in sorted(groups))
    if len({row.samples for row in rows}) > 1:
        log.warning("the plans of the table were not all run on the same number of samples")
    return Table(rows, objective, unit_of(source), {"aggregation": "mean"})


def _row(records: Sequence[Record], objective: Objective, source: Source) -> Row:
    tier, top_k = records[0]["tier"], records[0]["top_k"]
    blocks = {tuple(values["active_block_indices"]) for values in records}
    if len(blocks) > 1:
        first, second = sorted(blocks)[:2]
        raise UserError(
            f"plans of tier {tier} with {top_k} experts ran blocks {list(first)} and"
            f" {list(second)}: expected the same blocks",
            "Make the table of one profile, with one order of the blocks.",
        )
    latencies = [
        latency_of(values, objective, source)
        for values in records
        if objective != "per_token" or values["output_tokens"] > 1
    ]
    if not latencies or min(latencies) <= 0:
        raise UserError(
            f"tier {tier} with {top_k} experts has no {objective} latency above 0 in each sample"
        )
    accuracies = [float(values["accuracy"]) for values in records]
    return Row(
        tier,
        top_k,
        records[0]["num_active_blocks"],
        statistics.fmean(accuracies),
        statistics.fmean(latencies),
        len(records),
        deviation(accuracies),
        deviation(latencies),
    )


def table_from(values: dict[str, Any]) -> Table:
    """Read what `Table.plain` wrote.

    Raises:
        ValueError, KeyError, TypeError: if it is no table.
    """
    metadata = dict(values["metadata"])
    objective, unit = metadata.pop("objective"), metadata.pop("unit")
    rows = []
    for name, row in values["config_table"].items():
        tier, top_k, count = name.rsplit("_", 2)
        numbers = {key: row[key] for key in ("accuracy", "latency", "accuracy_std", "latency_std")}
        if not all(math.isfinite(number) for number in numbers.values()):
            raise ValueError(f"{name} holds a number that is not finite")
        rows.append(Row(tier, int(top_k), int(count), samples=row["num_samples"], **numbers))
    if not rows:
        raise ValueError("no rows")
    if "order" in metadata:
        _check_order(metadata["order"], max(row.count for row in rows))
    return Table(tuple(rows), objective, unit, metadata)


def _check_order(order: Any, most: int) -> None:
    whole = isinstance(order, list) and all(type(block) is int for block in order)
    if not whole or sorted(order) != list(range(len(order))) or len(order) < most:
        raise ValueError(f"order = {order}: expected all blocks, {most} or more, each once")


def read_table(path: Path) -> Table:
    """Read a table from a file.

    Raises:
        UserError: if it is no table.
    """
    try:
        return table_from(read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a lookup table ({type(error).__name__}: {error})",
            "Write one with: moectl controller profile --what grid",
        ) from None
