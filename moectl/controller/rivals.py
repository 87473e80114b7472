"""Policies that a controller must be weighed against: fixed plans, chance, the lookup table.

Letters: N questions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from moectl.controller.plans import Plan, Space
from moectl.controller.settings import Policy
from moectl.controller.table import Table
from moectl.engine.errors import UserError
from moectl.engine.seeding import key

CONTROLLER = "controller"
STEERED = (CONTROLLER, "importance")
"""Policies that run the controller, and so pay for it."""
TABLED = ("lut", "token_only", "depth_only", "width_only", "oracle_table")
"""Policies that a lookup table is needed for."""


@dataclass(frozen=True)
class Scene:
    """What policies may look at before they choose."""

    space: Space
    order: tuple[int, ...]
    """All blocks, the most important first."""
    table: Table | None
    """Of latencies without the controller's."""
    ids: Sequence[str]
    """Of the questions, N."""
    seed: int
    decide: Callable[[float], list[Plan]]
    """The controller's plans under a budget, N."""


def plans_of(policy: Policy, budget: float, scene: Scene) -> list[Plan]:
    """Return the plans that a policy takes for the questions, N of them.

    Args:
        policy: any but `oracle_table`, which must see answers first: see `oracle`.
        budget: latency that an answer may take.
        scene: the questions, and what is known of the plans.

    Raises:
        UserError: if the lookup table has no plan for the policy.
    """
    if policy == "controller":
        return scene.decide(budget)
    if policy == "importance":
        return [by_importance(plan, scene) for plan in scene.decide(budget)]
    if policy == "random":
        draws = [torch.Generator().manual_seed(key(scene.seed, policy, id)) for id in scene.ids]
        return [random_plan(scene.space, generator) for generator in draws]
    plan = tabled(policy, budget, scene) if policy in TABLED else static(policy, scene)
    return [plan] * len(scene.ids)


def static(policy: Policy, scene: Scene) -> Plan:
    """Return the plan of everything, of the middle of each knob, or of the least of each."""
    space = scene.space
    if policy == "static_full":
        return space.full
    experts = space.top_k_choices or (space.default_top_k,)
    knobs: tuple[Sequence[object], ...] = (space.tiers, experts, space.counts)
    places = [(len(choices) - 1) // 2 if policy == "static_medium" else 0 for choices in knobs]
    runs = set(scene.order[: space.counts[places[2]]])
    return Plan(
        space.tiers[places[0]].name,
        tuple(block in runs for block in range(space.blocks)),
        space.uniform(experts[places[1]]),
    )


def by_importance(plan: Plan, scene: Scene) -> Plan:
    """Return a plan with as many blocks, but those that matter most."""
    runs = set(scene.order[: len(plan.blocks)])
    return replace(plan, active=tuple(block in runs for block in range(scene.space.blocks)))


def random_plan(space: Space, generator: torch.Generator) -> Plan:
    """Draw a plan; all that differ in what they compute are equally likely."""

    def one(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def some(blocks: Sequence[int], count: int) -> list[int]:
        order = torch.randperm(len(blocks), generator=generator).tolist()
        return [blocks[place] for place in order[:count]]

    free = [block for block in space.optional if space.free[block]]
    plain = [block for block in space.optional if not space.free[block]]
    choices = space.top_k_choices or (space.default_top_k,)
    always = len(space.always_on)
    # Of the optional blocks that run, some have experts to choose, which makes more plans of them.
    pairs = [
        (chosen, count - always - chosen)
        for count in space.counts
        for chosen in range(len(free) + 1)
        if 0 <= count - always - chosen <= len(plain)
    ]
    weights = [
        math.comb(len(free), chosen) * math.comb(len(plain), others) * len(choices) ** chosen
        for chosen, others in pairs
    ]
    shares = torch.tensor(weights, dtype=torch.float64)
    chosen, others = pairs[int(shares.multinomial(1, generator=generator))]
    runs = {*space.always_on, *some(free, chosen), *some(plain, others)}
    experts = tuple(
        choices[one(len(choices))] if own else space.default_top_k * mixture
        for own, mixture in zip(space.free, space.mixtures, strict=True)
    )
    active = tuple(block in runs for block in range(space.blocks))
    return Plan(space.tiers[one(len(space.tiers))].name, active, experts)


def tabled(policy: Policy, budget: float, scene: Scene) -> Plan:
    """Return the plan that the lookup table has for a budget, if one knob may move or all.

    Raises:
        UserError: if no row of the table moves this knob alone.
    """
    assert scene.table is not None, "no lookup table"
    space = scene.space
    kept = {
        "lut": (),
        "token_only": ("top_k", "count"),
        "depth_only": ("tier", "top_k"),
        "width_only": ("tier", "count"),
    }[policy]
    full = {
        "tier": space.tiers[-1].name,
        "top_k": space.default_top_k,
        "count": space.max_active,
    }
    rows = [row for row in scene.table.rows if all(getattr(row, k) == full[k] for k in kept)]
    if not rows:
        raise UserError(
            f"eval.policies = {policy}: no row of the lookup table has {' and '.join(kept)} in full"
        )
    row = replace(scene.table, rows=tuple(rows)).best(budget)
    return scene.table.plan(row, space, scene.order)


def grid(scene: Scene) -> list[Plan]:
    """Return the plans of all rows of the lookup table."""
    assert scene.table is not None, "no lookup table"
    return [scene.table.plan(row, scene.space, scene.order) for row in scene.table.rows]


def oracle(accuracies: Sequence[float], latencies: Sequence[float], budget: float) -> int:
    """Return the place of the most accurate answer within a budget, of equals the fastest.

    Where none is within, the fastest of all. No policy can know this before it has answered.
    """
    pairs = list(zip(accuracies, latencies, strict=True))
    within = [place for place, (_, latency) in enumerate(pairs) if latency <= budget]
    if within:
        return max(within, key=lambda place: (pairs[place][0], -pairs[place][1]))
    return min(range(len(pairs)), key=lambda place: pairs[place][1])
