"""What is written down in training: every execution, the histories, validation, weights."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moectl.controller.execution import Execution
from moectl.controller.history import EXECUTIONS, TRAINING, VALIDATION, Executions, Tally, append
from moectl.controller.importance import rank_correlation
from moectl.controller.model import Policy
from moectl.controller.objective import Objective
from moectl.controller.plans import Plan
from moectl.controller.rollout import Player
from moectl.controller.schedule import Plateau
from moectl.controller.weights import BEST, prune, save_policy
from moectl.engine.launch import gather_objects
from moectl.engine.loop import Loop, Step
from moectl.engine.settings import dump

log = logging.getLogger(__name__)

_COLLAPSED = 0.05  # share of the largest entropy


class Ledger:
    """Keeps the records of a training.

    Args:
        loop: of the training.
        judge: the policy on the validation questions.
        budgets: of these, (N,), the same in every epoch.
        plateau: of the learning rate.
        arguments: that built the policy.
    """

    def __init__(
        self,
        loop: Loop,
        judge: Player,
        budgets: Tensor,
        plateau: Plateau,
        arguments: Mapping[str, Any],
    ) -> None:
        self.loop, self.run, self.judge, self.budgets = loop, loop.run, judge, budgets
        self.plateau, self.arguments = plateau, arguments
        self.tally = Tally()
        self.executions = Executions(loop.run.folder / EXECUTIONS)
        self._warned = False
        loop.says_epochs = False  # what the ledger says of an epoch is more

    def record(self, step: Step, objective: Objective) -> None:
        """Count and write the executions of a step, those of all processes."""
        rollout, ids = objective.rollout, objective.player.environment.ids
        found, seen = [], set()
        for number, plan in enumerate(rollout.plans):
            name = ids[int(rollout.rows[number])]
            line = {
                **_place(step, "train"),
                **_line(name, plan, rollout.executions[number]),
                "budget": float(rollout.budgets[number]),
                "latency": float(rollout.latency[number]),
                "reward": float(rollout.rewards[number]),
                "log_prob": float(rollout.log_prob[number]),
                "flat": bool(rollout.flat[number]),
                "first": (name, plan.key()) not in seen,
            }
            seen.add((name, plan.key()))
            found.append(line)
        self.tally.add(self._write(found))
        if step.ends_update:
            self.tally.norms.append(float(self.loop.grad_norm))

    def end_epoch(self, step: Step) -> None:
        """Validate, let the plateau know, and write histories and weights."""
        loop, run, epoch = self.loop, self.run, step.epoch + 1
        held = self._validate(step)
        means = loop.means("epoch")
        row = {
            "epoch": epoch,
            "loss": means.pop("loss"),
            **self.tally.summary(run.settings.grpo.group_size),
            **means,
            "lr": loop.optimizer.param_groups[0]["lr"],
            "seconds": round(run.elapsed_seconds, 3),
        }
        self.tally.clear()
        if run.is_main:
            append(run.folder / TRAINING, row)
            append(run.folder / VALIDATION, {"epoch": epoch, **held})
        step.log(**_tags("Train", row), **_tags("Val", held))
        better = step.score({f"val/{name}": value for name, value in held.items()})
        self._say(row, held)
        self.plateau.step(held["reward_mean"])
        self._save(step, held, better=better)

    def _validate(self, step: Step) -> dict[str, float]:
        """Answer the validation questions by the most probable plans, each under its budget."""
        judge, accelerator = self.judge, self.loop.accelerator
        ids = judge.environment.ids
        rows = torch.arange(len(ids))[accelerator.process_index :: accelerator.num_processes]
        plans = judge.decide(rows, self.budgets[rows])
        pairs = list(zip(rows.tolist(), plans, strict=True))
        answers = [judge.environment.execute(row, plan) for row, plan in pairs]
        _, latency, reward = judge.pricing.price(plans, answers, self.budgets[rows])
        lines = [
            {
                **_place(step, "val"),
                **_line(ids[row], plan, answers[number]),
                "budget": float(self.budgets[row]),
                "latency": float(latency[number]),
                "reward": float(reward[number]),
            }
            for number, (row, plan) in enumerate(pairs)
        ]
        return validation_summary(self._write(lines))

    def _write(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write the lines of all processes, and return them everywhere."""
        everyone = [line for part in gather_objects(self.loop.accelerator, lines) for line in part]
        if self.run.is_main:
            self.executions.add(everyone)
        return everyone

    def _say(self, row: Mapping[str, float], held: Mapping[str, float]) -> None:
        unit = self.judge.pricing.unit
        log.info(
            "Epoch %d  Loss: %.4f  Reward: %.4f (%.4f)  Accuracy: %.4f (%.4f)  Latency: %.2f %s"
            " (%.2f)  Budget Violation Rate: %.4f",
            row["epoch"], row["loss"], row["reward_mean"], row["reward_std"], row["accuracy_mean"],
            row["accuracy_std"], row["latency_mean"], unit, row["latency_std"],
            row["budget_violation_rate"],
        )  # fmt: skip
        log.info(
            "Validation  Reward: %.4f  Accuracy: %.4f  Latency: %.2f %s  Budget Violation Rate:"
            " %.4f  Plans: %d",
            held["reward_mean"], held["accuracy_mean"], held["latency_mean"], unit,
            held["budget_violation_rate"], held["distinct_plans"],
        )  # fmt: skip
        spread = min(
            (value for name, value in row.items() if name.startswith("entropy_")), default=1.0
        )
        if (spread < _COLLAPSED or held["distinct_plans"] == 1) and not self._warned:
            self._warned = True
            log.warning(
                "the policy hardly varies any more (smallest entropy of a head %.3f of 1, plans in"
                " validation: %d): a larger grpo.entropy_coef keeps it open",
                spread, held["distinct_plans"],
            )  # fmt: skip

    def _save(self, step: Step, held: Mapping[str, float], *, better: bool) -> None:
        loop, run, epoch = self.loop, self.run, step.epoch + 1
        policy = loop.module
        assert isinstance(policy, Policy)
        more = {
            "global_step": step.index + 1,
            "optimizer_state_dict": loop.optimizer.state_dict(),
            "scheduler_state_dict": self.plateau.state_dict(),
            "best_val_reward": loop.best["value"],
            "val_budgets": self.budgets,
            "config": dump(run.settings),
            "metrics": dict(held),
        }
        arguments, space = self.arguments, self.judge.space
        name = f"checkpoint_epoch_{epoch}.pt"
        save_policy(run, name, policy, arguments, space, epoch=epoch, more=more)
        if better:
            save_policy(run, BEST, policy, arguments, space, epoch=epoch, best=True, more=more)
        prune(run, run.settings.grpo.keep_last)


def _place(step: Step, split: str) -> dict[str, Any]:
    return {"update": step.index + 1, "epoch": step.epoch + 1, "split": split}


def _line(name: str, plan: Plan, execution: Execution) -> dict[str, Any]:
    return {
        "sample_id": name,
        "plan_key": plan.key(),
        "plan": plan.plain(),
        "execution": execution.plain(),
        "accuracy": execution.accuracy,
    }


def _tags(kind: str, row: Mapping[str, float]) -> dict[str, float]:
    """Return values under the names that the original's TensorBoard files have."""
    return {
        f"{kind}/{name.title()}": value
        for name, value in row.items()
        if name not in ("epoch", "lr", "seconds")
    }


def validation_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the columns of a row of the validation history."""
    latency = [line["latency"] for line in lines]
    budgets = [line["budget"] for line in lines]
    over = [max(0.0, time / budget - 1) for time, budget in zip(latency, budgets, strict=True)]
    ordered = sorted(latency)
    return {
        "reward_mean": statistics.fmean(line["reward"] for line in lines),
        "accuracy_mean": statistics.fmean(line["accuracy"] for line in lines),
        "latency_mean": statistics.fmean(latency),
        "budget_violation_rate": statistics.fmean(excess > 0 for excess in over),
        "latency_p95": float(torch.tensor(ordered, dtype=torch.float64).quantile(0.95)),
        "mean_overshoot": statistics.fmean(over),
        "spearman_budget_latency": rank_correlation(budgets, latency),
        "distinct_plans": len({line["plan_key"] for line in lines}),
    }
