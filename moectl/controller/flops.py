"""Floating-point operations of an answer, counted from the weights.

A multiplication and an addition count as two. Attention is counted over all pairs of a query and a
key, those behind the causal mask included, as torch's own counter does and as kernels without a
causal path compute.

Letters: E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moectl.controller.plans import Plan


@dataclass(frozen=True)
class Block:
    """What one token costs in one block of the text network."""

    dense: int
    """Operations outside the experts, without attention's products: projections, router."""
    expert: int
    """Operations of one expert; 0 without experts."""
    pair: int
    """Operations for a query and a key: scores and their weighted sum."""


def linear(module: nn.Module) -> int:
    """Operations of one token in all matrices below a module; lookup tables are none."""
    tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
    sizes = (weight.numel() for weight in module.parameters() if weight.ndim == 2)
    return 2 * (sum(sizes) - sum(table.numel() for table in tables))


def expert(module: nn.Module, experts: int) -> int:
    """Operations of one token in one of the E experts whose matrices are stacked below a module."""
    stacks = (weight for weight in module.parameters() if weight.ndim == 3)
    return sum(2 * stack.numel() // experts for stack in stacks if len(stack) == experts)


def pair(width: int) -> int:
    """Operations of attention for a query and a key.

    Args:
        width: of a query over all heads.
    """
    return 4 * width


def convolution(module: nn.Module) -> int:
    """Operations of a convolution at one place, biases left out."""
    return sum(2 * weight.numel() for weight in module.parameters() if weight.ndim > 2)


def text(blocks: Sequence[Block], head: int, plan: Plan, tokens: int, new_tokens: int) -> int:
    """Operations of the text network in a whole answer.

    The first new token comes from the prefill. Later ones take a step each, which attends to all
    before it; the last one of the answer is never fed.

    Args:
        blocks: all blocks of the network.
        head: operations of the output head for a token.
        plan: how the blocks run.
        tokens: length of the sequence that the prefill reads.
        new_tokens: of the answer.
    """
    steps = new_tokens - 1
    read = tokens + steps
    pairs = tokens * tokens + steps * tokens + steps * (steps + 1) // 2
    total = new_tokens * head
    for number in plan.blocks:
        block = blocks[number]
        each = block.dense + plan.top_k[number] * block.expert
        total += read * each + pairs * block.pair
    return total


def tower(layers: nn.Module, width: int, tokens: int) -> int:
    """Operations of an image tower's layers on one crop.

    Args:
        layers: with attention of all tokens to all, and their width.
        width: of a query over all heads.
        tokens: of the crop, marks such as a class token included.
    """
    depth = sum(1 for _ in layers.children())
    return tokens * linear(layers) + depth * pair(width) * tokens * tokens
