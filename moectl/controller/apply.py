"""Run the blocks of a text network by a plan, and leave them as they were.

Letters: L blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moectl.controller.plans import Plan, Space

_MARK = "_plan_applied"


@contextmanager
def applied(layers: Sequence[nn.Module], plan: Plan, space: Space) -> Iterator[None]:
    """Skip blocks and set the experts of the others inside the context.

    The list of blocks stays whole, since families look things up by a block's place in it. A
    skipped block hands its input on and writes nothing to a cache.

    Args:
        layers: the L blocks of the text network, each of which returns its hidden states.
        plan: how they run.
        space: that the plan belongs to.

    Raises:
        ValueError: if the plan is not of the space, or the blocks do not look as the space says.
        RuntimeError: if a plan is applied to these blocks already.
    """
    plan.check(space)
    if len(layers) != space.blocks:
        raise ValueError(f"{len(layers)} blocks in the network: expected {space.blocks}")
    if any(_MARK in vars(layer) for layer in layers):
        raise RuntimeError("a plan is applied to this network already: leave its context first")
    changes = _changes(layers, plan, space)
    before = [(module, name, vars(module).get(name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)


def _changes(
    layers: Sequence[nn.Module], plan: Plan, space: Space
) -> list[tuple[nn.Module, str, Any]]:
    changes: list[tuple[nn.Module, str, Any]] = [(layers[0], _MARK, True)]
    for block, layer in enumerate(layers):
        if not plan.active[block]:
            changes.append((layer, "forward", _hand_on))
        elif space.mixtures[block]:
            found = routers(layer)
            if not found:
                raise ValueError(f"block {block} has no number of experts to set")
            changes.extend((router, "top_k", plan.top_k[block]) for router in found)
    return changes


def routers(layer: nn.Module) -> list[nn.Module]:
    """All modules that hold a number of experts: some families keep it in two places."""
    return [module for module in layer.modules() if type(vars(module).get("top_k")) is int]


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
