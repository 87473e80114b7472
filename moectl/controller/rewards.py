"""From an execution to what it is worth: its latency, and the reward under a budget."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moectl.controller.execution import Execution
from moectl.controller.latency import Estimator
from moectl.controller.losses import composite, hinge
from moectl.controller.plans import Plan, Space
from moectl.controller.table import Table


class Pricing:
    """Latency and reward of executions, as the settings have them.

    Args:
        settings: the tables `reward` and `latency`.
        space: of the plans.
        estimator: of latency, if that comes from tables.
        controller_ms: what features and choice take, counted in times that are measured or
            predicted.
    """

    def __init__(
        self, settings: Any, space: Space, estimator: Estimator | None, controller_ms: float
    ) -> None:
        self.reward, self.space = settings.reward, space
        self.source, self.objective = settings.latency.source, settings.latency.objective
        self.estimator, self.controller_ms = estimator, controller_ms

    @property
    def once(self) -> float:
        """What choosing a plan adds to every latency."""
        return self.controller_ms if self.objective in ("total", "ttft") else 0.0

    def charged(self, table: Table) -> Table:
        """Return a table with what choosing a plan takes, as it is held against budgets."""
        rows = tuple(replace(row, latency=row.latency + self.once) for row in table.rows)
        return replace(table, rows=rows)

    @property
    def unit(self) -> str:
        """Of latencies and budgets."""
        return "GFLOP" if self.source == "flops" else "ms"

    def latency(self, plan: Plan, execution: Execution) -> float:
        """Return what is held against a budget."""
        if self.source == "flops":
            return execution.gflop
        timings = execution.timings
        if self.source == "table":
            assert self.estimator is not None, "no tables"
            tokens = execution.vision_tokens + execution.text_tokens
            timings = self.estimator.timings(plan, execution.crops, tokens, timings.new_tokens)
        return timings.latency(self.objective) + self.once

    def cost(self, plan: Plan) -> float:
        """Return the share of the full network that a plan uses: crops, experts, blocks."""
        tiers = {tier.name: tier.nominal for tier in self.space.tiers}
        crops = tiers[plan.tier] / max(1, *tiers.values())
        mixtures = [plan.top_k[block] for block in plan.blocks if self.space.mixtures[block]]
        experts = sum(mixtures) / len(mixtures) / self.space.default_top_k if mixtures else 1.0
        return (crops + experts + len(plan.blocks) / self.space.blocks) / 3

    def rewards(self, accuracy: Tensor, latency: Tensor, budget: Tensor, cost: Tensor) -> Tensor:
        """Return the rewards of plans, (B,) as all arguments."""
        weights = self.reward.model_dump()
        if self.reward.kind == "composite":
            return composite(accuracy, latency, budget, cost, weights)
        kept = {name: weights[name] for name in ("over", "margin", "violation")}
        return hinge(weights["accuracy"] * accuracy, latency, budget, **kept)

    def price(
        self, plans: list[Plan], executions: list[Execution], budgets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return accuracy, latency and reward of each plan, (B,)."""
        accuracy = torch.tensor([execution.accuracy for execution in executions])
        pairs = list(zip(plans, executions, strict=True))
        latency = torch.tensor([self.latency(*pair) for pair in pairs])
        cost = torch.tensor([self.cost(plan) for plan in plans])
        return accuracy, latency, self.rewards(accuracy, latency, budgets, cost)
