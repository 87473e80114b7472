"""Optimisers and schedules."""

from typing import Any

import pytest
import torch

from moectl.engine.optim import build_optimizer, build_schedule
from moectl.engine.sections import OptimSection, ScheduleSection


def rates(schedule: Any, epochs: int) -> list[float]:
    return [0.4 * schedule(epoch + 0.5) for epoch in range(epochs)]


def reference(make: Any, epochs: int) -> list[float]:
    """What torch's own schedulers give, stepped once an epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedulers = make(optimizer)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def test_multistep_with_warmup_is_that_of_torch() -> None:
    section = ScheduleSection(name="multistep", warmup=4, step1=6, step2=8, gamma=0.1)
    own = rates(build_schedule(section, 0.4, 12), 12)

    def make(optimizer: Any) -> list[Any]:
        from torch.optim import lr_scheduler

        warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
        return [warm, lr_scheduler.MultiStepLR(optimizer, [6, 8], gamma=0.1)]

    assert own == pytest.approx(reference(make, 12))


def test_cosine_is_that_of_torch() -> None:
    section = ScheduleSection(name="cosine", eta_min=0.01)
    own = rates(build_schedule(section, 0.4, 10), 10)

    def make(optimizer: Any) -> list[Any]:
        return [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.01)]

    assert own == pytest.approx(reference(make, 10))
    longer = build_schedule(ScheduleSection(name="cosine", t_max=20), 0.4, 10)
    assert longer(10) == pytest.approx(0.5)


def test_constant_is_one_and_warmup_ends_at_one() -> None:
    assert build_schedule(ScheduleSection(), 0.1, 9)(5.5) == 1
    warm = build_schedule(ScheduleSection(warmup=2), 0.1, 9)
    assert [warm(0), warm(0.9), warm(1), warm(2), warm(8)] == [0.5, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("section", "kind", "expected"),
    [
        (
            OptimSection(lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.1),
            torch.optim.SGD,
            {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        ),
        (OptimSection(name="adam", weight_decay=0.1), torch.optim.Adam, {"weight_decay": 0.1}),
        (OptimSection(name="adamw", lr=1e-3), torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0}),
    ],
)
def test_optimizer_is_the_one_described(
    section: OptimSection, kind: type, expected: dict[str, Any]
) -> None:
    optimizer = build_optimizer(section, [torch.zeros(1, requires_grad=True)])
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in expected} == expected


def test_fused_adamw_takes_the_same_steps() -> None:
    section = OptimSection(name="adamw", lr=0.01, weight_decay=0.1)
    found = []
    for fused in (False, True):
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = build_optimizer(section, [weights], fused=fused)
        for _ in range(5):
            weights.grad = weights.detach() ** 3 + 1
            optimizer.step()
        found.append(weights.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
