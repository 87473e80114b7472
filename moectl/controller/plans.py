"""What a plan may set, and plans: image tier, active blocks, experts of each block.

Letters: L blocks.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Tier:
    """How finely an image is tiled."""

    name: str
    fewest: int
    """Crops, without the view of the whole image; `most` likewise."""
    most: int
    nominal: int
    """Crops that costs are computed with."""


@dataclass(frozen=True)
class Space:
    """The plans of one network.

    Raises:
        ValueError: if the numbers do not fit together.
    """

    blocks: int
    """L."""
    mixtures: tuple[bool, ...]
    """(L,) whether a block has experts."""
    default_top_k: int
    """Experts of a token as the network was trained; 0 without experts."""
    top_k_choices: tuple[int, ...]
    """From the smallest up; the default is among them."""
    always_on: tuple[int, ...]
    """Blocks that always run; the first is one of them."""
    min_active: int
    """Fewest blocks that run; `max_active` the most."""
    max_active: int
    tiers: tuple[Tier, ...]
    """From the coarsest up."""

    def __post_init__(self) -> None:
        if len(self.mixtures) != self.blocks:
            raise ValueError(f"{len(self.mixtures)} marks of experts for {self.blocks} blocks")
        once = len(set(self.always_on)) == len(self.always_on)
        if not once or 0 not in self.always_on or not set(self.always_on) < set(range(self.blocks)):
            raise ValueError(f"always_on = {self.always_on}: expected block 0, and not all blocks")
        if not len(self.always_on) <= self.min_active <= self.max_active <= self.blocks:
            raise ValueError(
                f"{self.min_active} to {self.max_active} active blocks: expected at least"
                f" {len(self.always_on)} and at most {self.blocks}"
            )
        if any(self.mixtures) and self.default_top_k not in self.top_k_choices:
            raise ValueError(f"top_k_choices = {self.top_k_choices} without {self.default_top_k}")
        if list(self.top_k_choices) != sorted(set(self.top_k_choices)):
            raise ValueError(f"top_k_choices = {self.top_k_choices}: expected rising numbers")
        names = [tier.name for tier in self.tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tiers {names}: expected at least one, with different names")

    @property
    def optional(self) -> tuple[int, ...]:
        """Blocks that may be skipped, in their order."""
        return tuple(block for block in range(self.blocks) if block not in self.always_on)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of active blocks."""
        return tuple(range(self.min_active, self.max_active + 1))

    @property
    def free(self) -> tuple[bool, ...]:
        """(L,) blocks whose experts a plan may set: the first keeps its own."""
        return tuple(mixture and block > 0 for block, mixture in enumerate(self.mixtures))

    @property
    def size(self) -> int:
        """Number of plans that differ in what they compute."""
        choices = len(self.top_k_choices)
        chosen = sum(self.free[block] for block in self.optional)
        plain = len(self.optional) - chosen
        fixed = choices ** sum(self.free[block] for block in self.always_on)
        # Of the optional blocks that run, some have experts to choose and the others do not.
        runs = (
            math.comb(chosen, some) * choices**some * math.comb(plain, others)
            for others in range(plain + 1)
            for some in range(chosen + 1)
            if len(self.always_on) + some + others in self.counts
        )
        return len(self.tiers) * fixed * sum(runs)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def full(self) -> "Plan":
        """Everything: the network as it is."""
        return Plan(self.tiers[-1].name, (True,) * self.blocks, self.uniform(self.default_top_k))

    def uniform(self, top_k: int) -> tuple[int, ...]:
        """(L,) the same number of experts in every block whose number is free."""
        return tuple(
            top_k if free else self.default_top_k * mixture
            for free, mixture in zip(self.free, self.mixtures, strict=True)
        )


def top_k_choices(default: int) -> tuple[int, ...]:
    """The five largest numbers of experts from half the default up to it."""
    return tuple(range(max(1, -(-default // 2)), default + 1))[-5:]


@dataclass(frozen=True)
class Plan:
    """How one question is answered: prefill and every step of the answer alike."""

    tier: str
    active: tuple[bool, ...]
    """(L,) blocks that run."""
    top_k: tuple[int, ...]
    """(L,) experts of a token in each block; 0 where there are none."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that run."""
        return tuple(block for block, runs in enumerate(self.active) if runs)

    def key(self) -> str:
        """One line that two plans share only if they compute the same."""
        parts = [f"{block}:{self.top_k[block]}" for block in self.blocks]
        return f"{self.tier}/{','.join(parts)}"

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"tier": self.tier, "blocks": list(self.blocks), "top_k": list(self.top_k)}

    def check(self, space: Space) -> None:
        """Refuse a plan that is not of a space.

        Raises:
            ValueError: saying what is wrong.
        """
        names = [tier.name for tier in space.tiers]
        if self.tier not in names:
            raise ValueError(f"tier {self.tier}: expected one of {', '.join(names)}")
        if len(self.active) != space.blocks or len(self.top_k) != space.blocks:
            raise ValueError(f"a plan of {len(self.active)} blocks: expected {space.blocks}")
        if off := [block for block in space.always_on if not self.active[block]]:
            raise ValueError(f"block {off[0]} always runs")
        if not space.min_active <= len(self.blocks) <= space.max_active:
            raise ValueError(
                f"{len(self.blocks)} active blocks: expected {space.min_active} to"
                f" {space.max_active}"
            )
        for block, (top_k, mixture) in enumerate(zip(self.top_k, space.mixtures, strict=True)):
            known = space.top_k_choices if space.free[block] else (space.default_top_k * mixture,)
            if top_k not in known:
                raise ValueError(f"top_k = {top_k} in block {block}: expected one of {known}")


def plan_from(values: dict[str, Any], space: Space) -> Plan:
    """Read what `Plan.plain` wrote.

    Raises:
        ValueError: if it is no plan of the space.
    """
    tier, blocks, top_k = (values.get(key) for key in ("tier", "blocks", "top_k"))
    if not isinstance(tier, str) or not _integers(blocks) or not _integers(top_k):
        raise ValueError(
            "expected the keys tier, blocks and top_k: a name and two lists of numbers"
        )
    if strange := set(blocks) - set(range(space.blocks)):
        raise ValueError(f"block {min(strange)}: expected 0 to {space.blocks - 1}")
    active = tuple(block in blocks for block in range(space.blocks))
    plan = Plan(tier, active, tuple(top_k))
    plan.check(space)
    return plan


def _integers(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)
