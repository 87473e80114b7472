"""A plan made cheaper, move by move, until its predicted latency fits a budget."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moectl.controller.plans import Plan, Space
from moectl.controller.table import Table

_FREE = 1e-3  # accuracy that even a harmless move is taken to cost


def fit_budget(
    plan: Plan,
    limit: float,
    predict: Callable[[Plan], float],
    value: Callable[[Plan], float],
    space: Space,
    order: Sequence[int],
) -> Plan:
    """Return the plan, or a cheaper one that is predicted not to exceed a limit.

    Of all moves (a tier lower, one expert fewer in every block, one block fewer) that one is made
    which saves most of what is too much for what it costs in accuracy, again and again. If none of
    them saves anything any more, what is left is returned: the cheapest plan.

    Args:
        plan: to begin with.
        limit: largest latency.
        predict: latency of a plan.
        value: accuracy to expect of a plan.
        space: of the plans.
        order: all blocks, those to keep first.
    """
    while (now := predict(plan)) > limit:
        worth, moves = value(plan), []
        for number, move in enumerate(cheaper(plan, space, order)):
            saved = now - max(limit, predict(move))
            moves.append((saved / (max(0.0, worth - value(move)) + _FREE), number, move))
        gain, _, best = max(moves, default=(0.0, 0, plan))
        if gain <= 0:
            return plan
        plan = best
    return plan


def cheaper(plan: Plan, space: Space, order: Sequence[int]) -> Iterator[Plan]:
    """Yield the plans that are one move cheaper."""
    tiers = [tier.name for tier in space.tiers]
    if (place := tiers.index(plan.tier)) > 0:
        yield replace(plan, tier=tiers[place - 1])
    choices = space.top_k_choices
    lowered = tuple(
        choices[max(0, choices.index(chosen) - 1)] if free else chosen
        for chosen, free in zip(plan.top_k, space.free, strict=True)
    )
    if lowered != plan.top_k:
        yield replace(plan, top_k=lowered)
    if len(plan.blocks) > space.min_active:
        runs = [block for block in order if plan.active[block] and block not in space.always_on]
        active = tuple(kept and block != runs[-1] for block, kept in enumerate(plan.active))
        yield replace(plan, active=active)


def expected_accuracy(table: Table, space: Space) -> Callable[[Plan], float]:
    """Return what a lookup table lets expect of a plan: the sum of what its parts add.

    Each part adds by how much the mean of its rows differs from the mean of all. Between numbers of
    experts or blocks that the table has, a straight line is drawn.
    """
    overall = statistics.fmean(row.accuracy for row in table.rows)
    tiers, experts, counts = (_means(table, name) for name in ("tier", "top_k", "count"))

    def value(plan: Plan) -> float:
        mixtures = [plan.top_k[block] for block in plan.blocks if space.free[block]]
        top_k = statistics.fmean(mixtures) if mixtures else 0.0
        parts = tiers.get(plan.tier, overall) + _between(experts, top_k)
        return parts + _between(counts, len(plan.blocks)) - 2 * overall

    return value


def _means(table: Table, name: str) -> dict[Any, float]:
    """Return the mean accuracy of the rows by one of their parts."""
    groups: dict[Any, list[float]] = {}
    for row in table.rows:
        groups.setdefault(getattr(row, name), []).append(row.accuracy)
    return {part: statistics.fmean(found) for part, found in sorted(groups.items())}


def _between(means: dict[Any, float], wanted: float) -> float:
    return float(np.interp(wanted, list(means), list(means.values())))
