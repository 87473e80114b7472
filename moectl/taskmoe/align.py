"""Channels of specialists, reordered so that networks trained apart can be averaged.

Letters: B batch, C channels, H W pixels. The order of the channels of a hidden layer is arbitrary:
whoever reorders them everywhere at once leaves the network's outputs as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moectl.taskmoe.model import Specialist

State = dict[str, Tensor]

_BATCH = 64
_DEAD = 1e-12  # variances below: such a channel correlates with nothing


@dataclass(frozen=True)
class Group:
    """Channels that must be reordered together, by the names of the layers that hold them."""

    layer: str
    """Module whose output has the channels."""
    producers: tuple[str, ...]
    """Prefixes of the entries that have them on axis 0."""
    consumers: tuple[str, ...]
    """Prefixes of the entries that have them on axis 1."""


GROUPS: Mapping[str, Group] = {
    "P1": Group("conv1", ("conv1.",), ("residual1.main_path.0.conv.", "residual1.shortcut.")),
    "P2": Group(
        "residual1",
        ("residual1.main_path.0.", "residual1.shortcut."),
        ("residual2.main_path.0.conv.", "residual2.shortcut."),
    ),
    "P3": Group(
        "residual2.main_path.0", ("residual2.main_path.0.",), ("residual2.main_path.1.conv.",)
    ),
    "P4": Group("residual2", ("residual2.main_path.1.", "residual2.shortcut."), ("conv2.conv.",)),
    "P5": Group("conv2", ("conv2.", "conv3.0.depthwise."), ("conv3.0.pointwise.",)),
}


@dataclass(frozen=True)
class Correlation:
    """Mean correlation of a group's channels with those at the same place in the reference."""

    before: float
    after: float


def permute(state: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> State:
    """Reorder the channels of a specialist; its outputs stay the same.

    Channel i of the result is channel `permutations[group][i]` of the state. Groups that are left
    out keep their order, and the state is not written to.

    Args:
        state: state dict of a `Specialist`.
        permutations: per name in `GROUPS`, (C,) indices.

    Raises:
        ValueError: if a group is unknown or its indices are no permutation of its channels.

    Source: Ainsworth et al. 2023.
    """
    permuted = dict(state)
    for name, order in permutations.items():
        if name not in GROUPS:
            raise ValueError(f"no channel group {name!r}: the groups are {', '.join(GROUPS)}")
        group = GROUPS[name]
        for key, value in permuted.items():
            if value.ndim and key.startswith(group.producers):
                permuted[key] = _reorder(value, 0, order, key)
            elif key.startswith(group.consumers):
                permuted[key] = _reorder(value, 1, order, key)
    return permuted


def _reorder(value: Tensor, axis: int, order: Tensor, key: str) -> Tensor:
    channels = value.shape[axis]
    if order.sort().values.tolist() != list(range(channels)):
        raise ValueError(
            f"{key} of shape {tuple(value.shape)} has {channels} channels on axis {axis}, and the"
            f" {len(order)} indices given are no permutation of them"
        )
    return value.index_select(axis, order.to(value.device))


def renormalise(state: Mapping[str, Tensor], factor: Tensor, addend: Tensor) -> State:
    """Make a specialist expect images that are normalised in another way.

    Its outputs for `images` are then those for `images * factor + addend` before, except that the
    zeros around an image stay zeros.

    Args:
        state: state dict of a `Specialist`; not written to.
        factor: (3,) per colour.
        addend: (3,) likewise.
    """
    weight = state["conv1.conv.weight"]
    factor, addend = (part.to(weight).view(1, 3, 1, 1) for part in (factor, addend))
    constant = (weight * addend).sum((1, 2, 3))
    return {
        **state,
        "conv1.conv.weight": weight * factor,
        "conv1.bn.running_mean": state["conv1.bn.running_mean"] - constant,
    }


def match(
    reference: Specialist,
    other: Specialist,
    images: Tensor,
    groups: Sequence[str] = tuple(GROUPS),
) -> tuple[dict[str, Tensor], dict[str, Correlation]]:
    """Find the order of the other's channels that resembles the reference most.

    Channels resemble each other by the correlation of their activations over images and positions;
    the best one-to-one assignment is exact. `permute(other.state_dict(), permutations)` is then in
    the reference's order.

    Args:
        reference: the network whose order stays.
        other: a network of the same width.
        images: (B, 3, H, W) as the networks expect them, a few hundred.
        groups: names in `GROUPS`.

    Returns:
        Per group the (C,) permutation on the CPU, and what it gained.

    Raises:
        ValueError: if the networks differ in the width of a layer, or there are no images.

    Source: Ainsworth et al. 2023 (activation matching); Stoica et al. 2024.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    permutations, correlations = {}, {}
    for name, matrix in _correlate(reference, other, images, groups).items():
        rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
        permutations[name] = torch.as_tensor(columns)
        correlations[name] = Correlation(
            before=matrix.diagonal().mean().item(), after=matrix[rows, columns].mean().item()
        )
    return permutations, correlations


@torch.no_grad()
def _correlate(
    reference: Specialist, other: Specialist, images: Tensor, groups: Sequence[str]
) -> dict[str, Tensor]:
    """Correlate all pairs of channels: per group (C, C), the reference's channels on axis 0."""
    if not len(images):
        raise ValueError("channels are matched on images, and none were given")
    sums: dict[str, _Sums] = {}
    with _recorded(reference, groups) as ours, _recorded(other, groups) as theirs:
        for batch in torch.split(images, _BATCH):
            reference(batch)
            other(batch)
            for name in groups:
                if ours[name].shape != theirs[name].shape:
                    raise ValueError(
                        f"{GROUPS[name].layer} gives {tuple(ours[name].shape)} in the reference and"
                        f" {tuple(theirs[name].shape)} in the other network"
                    )
                sums.setdefault(name, _Sums()).add(ours[name], theirs[name])
    return {name: total.correlation().cpu() for name, total in sums.items()}


class _Sums:
    """Running first and second moments of two sets of channels."""

    def __init__(self) -> None:
        self.count = 0
        self.moments: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Count in a batch of activations, (B, C, H, W) each."""
        # Sums of squares minus squares of sums lose half of the digits: float64.
        first, second = (x.transpose(0, 1).flatten(1).double() for x in (ours, theirs))
        batch = [
            first.sum(1),
            second.sum(1),
            first.square().sum(1),
            second.square().sum(1),
            first @ second.T,
        ]
        self.count += first.shape[1]
        before = self.moments or [torch.zeros_like(moment) for moment in batch]
        self.moments = [a + b for a, b in zip(before, batch, strict=True)]

    def correlation(self) -> Tensor:
        first, second, first_squares, second_squares, products = (
            moment / self.count for moment in self.moments
        )
        covariance = products - first[:, None] * second
        variances = (first_squares - first**2)[:, None] * (second_squares - second**2)
        return covariance * (variances > _DEAD) / variances.clamp(min=_DEAD).sqrt()


@contextmanager
def _recorded(network: nn.Module, groups: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the latest activations of the groups' layers, by group, in evaluation mode."""
    kept: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(GROUPS[name].layer).register_forward_hook(
            lambda _module, _inputs, output, name=name: kept.update({name: output})
        )
        for name in groups
    ]
    try:
        with evaluating(network):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def average(
    states: Sequence[Mapping[str, Tensor]], bn: Literal["average", "pooled", "reset"] = "average"
) -> State:
    """Average networks entry by entry.

    Args:
        states: state dicts with the same entries.
        bn: running statistics of batch norm: averaged as they are; `pooled`, the variance of all
            inputs together, which counts the spread of the means too; or 0 and 1.

    Raises:
        ValueError: if the states differ in names or shapes.
    """
    same_entries(states)
    merged = {
        key: torch.stack([state[key] for state in states]).double().mean(0).to(first.dtype)
        for key, first in states[0].items()
    }
    for key in merged:
        if key.endswith("running_var") and bn == "pooled":
            means = torch.stack([state[f"{key[:-3]}mean"] for state in states])
            merged[key] += means.var(0, correction=0)
        elif bn == "reset" and key.endswith(("running_mean", "num_batches_tracked")):
            merged[key].zero_()
        elif bn == "reset" and key.endswith("running_var"):
            merged[key].fill_(1)
    return merged


def same_entries(states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless all states have the same names and shapes."""
    if not states:
        raise ValueError("there are no states to average")
    for number, state in enumerate(states[1:], start=2):
        for key in states[0].keys() | state.keys():
            shapes = [tuple(s[key].shape) if key in s else "absent" for s in (states[0], state)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{key} is {shapes[0]} in state 1 and {shapes[1]} in state {number}"
                )


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while; every module then returns to its own mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
