"""What a training leaves behind: histories as CSV, every execution as a line of JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.controller.environment import Environment, Remembered
from moectl.controller.execution import Execution, execution_from
from moectl.controller.plans import Plan
from moectl.engine.files import csv_text, write_text
from moectl.engine.tracking import MetricsFile

EXECUTIONS = "executions.jsonl"
TRAINING, VALIDATION = "training_history.csv", "validation_history.csv"
COLUMNS = ("reward", "accuracy", "latency", "budget", "flat", "first")
"""Of a tally: `flat` marks plans of groups whose rewards are all the same, `first` the first of
equal plans in its group."""


class Tally:
    """Numbers of all executions since the epoch began, on every process those of all.

    Letters: P executions, U updates.
    """

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        """P times `COLUMNS`."""
        self.norms: list[float] = []
        """U norms of the gradient, before it is clipped."""

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Count executions."""
        self.rows.extend([float(line[name]) for name in COLUMNS] for line in lines)

    def summary(self, group: int) -> dict[str, float]:
        """Return the columns of a row of the training history; deviations are over executions."""
        table = torch.tensor(self.rows, dtype=torch.float64)
        reward, accuracy, latency, budget, flat, first = table.T
        found = {
            "reward_mean": reward.mean(), "reward_std": _deviation(reward),
            "accuracy_mean": accuracy.mean(), "accuracy_std": _deviation(accuracy),
            "latency_mean": latency.mean(), "latency_std": _deviation(latency),
            "budget_violation_rate": (latency > budget).double().mean(),
            "reward_min": reward.min(), "reward_max": reward.max(),
            "num_groups": torch.tensor(len(table) / group),
            "num_valid_groups": (1 - flat).sum() / group,
            "num_configs": first.sum(),
            "frac_zero_std": flat.mean(),
        }  # fmt: skip
        norm = sum(self.norms) / max(1, len(self.norms))
        return {**{name: float(value) for name, value in found.items()}, "grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"rows": self.rows, "norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.rows, self.norms = list(state["rows"]), list(state["norms"])

    def clear(self) -> None:
        """Begin an epoch."""
        self.rows, self.norms = [], []


def _deviation(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else values.new_zeros(())


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add the row of an epoch to a CSV file."""
    write_text(path, csv_text([*MetricsFile(path).rows(), row]))


def keep_until(path: Path, epoch: int) -> None:
    """Drop the rows of a CSV file after an epoch, as those will be written again."""
    rows = [row for row in MetricsFile(path).rows() if int(row["epoch"]) <= epoch]
    if rows:
        write_text(path, csv_text(rows))
    else:
        path.unlink(missing_ok=True)


class Executions:
    """The file of all executions, one a line.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    def keep_until(self, update: int) -> None:
        """Drop what was done after an update, as that will be done again."""
        if self.path.exists():
            kept = [line for line in self.lines() if line["update"] <= update]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines so far; a torn last one is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def known(self) -> dict[tuple[str, str], Execution]:
        """Return what was answered: by id of the question and key of the plan, the first time."""
        found: dict[tuple[str, str], Execution] = {}
        for line in self.lines():
            found.setdefault(
                (line["sample_id"], line["plan_key"]), execution_from(line["execution"])
            )
        return found


class Kept(Remembered):
    """An environment whose answers are on disk as soon as they are given, and found there again.

    Args:
        inner: answers what is new.
        path: the file.
    """

    def __init__(self, inner: Environment, path: Path) -> None:
        self.file = Executions(path)
        self.file.keep_until(0)  # a torn last line would spoil the next one
        super().__init__(inner, self.file.known())

    def execute(self, row: int, plan: Plan) -> Execution:
        """Answer question number `row` by a plan, or recall how that went."""
        before = self.answered
        found = super().execute(row, plan)
        if self.answered > before:
            line = {"sample_id": self.ids[row], "plan_key": plan.key(), "plan": plan.plain()}
            self.file.add([{**line, "update": 0, "execution": found.plain()}])
        return found
