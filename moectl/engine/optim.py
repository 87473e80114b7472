"""Optimisers and learning-rate schedules built from settings."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moectl.engine.sections import OptimSection, ScheduleSection

Schedule = Callable[[float], float]
"""Maps epochs done, with fraction, to the factor on the learning rate."""


def build_optimizer(
    section: OptimSection,
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimiser that `[optim]` describes, over parameters or groups of them.

    Args:
        section: which, and its rates.
        parameters: what it moves.
        fused: one kernel for all of adamw: on a network of 60 million weights a sixth of the time,
            with other last digits.
    """
    match section.name:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                lr=section.lr,
                momentum=section.momentum,
                weight_decay=section.weight_decay,
                nesterov=section.nesterov,
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=section.lr, weight_decay=section.weight_decay)
        case "adamw":
            return torch.optim.AdamW(
                parameters, lr=section.lr, weight_decay=section.weight_decay, fused=fused
            )


def build_schedule(section: ScheduleSection, lr: float, epochs: int) -> Schedule:
    """Return the factor on the learning rate, constant within an epoch.

    A function of the position instead of a stateful object: nothing to save, the same for any
    number of processes. Equals torch's LinearLR times MultiStepLR or CosineAnnealingLR stepped once
    an epoch.

    Args:
        section: shape, warm-up and drops.
        lr: the learning rate that the factor multiplies, for `eta_min`.
        epochs: length of the training.
    """

    def factor(position: float) -> float:
        epoch = math.floor(position)
        warm = min(1.0, (epoch + 1) / section.warmup) if section.warmup else 1.0
        match section.name:
            case "constant":
                return warm
            case "multistep":
                return warm * section.gamma ** ((epoch >= section.step1) + (epoch >= section.step2))
            case "cosine":
                low, period = section.eta_min / lr, section.t_max or epochs
                return warm * (low + (1 - low) * (1 + math.cos(math.pi * epoch / period)) / 2)

    return factor
