"""What a controller costs itself, beside the answers that it steers."""

from typing import Any

import torch

from moectl.controller.environment import Environment
from moectl.controller.executor import Executor
from moectl.controller.model import build
from moectl.controller.policy import decide, plans
from moectl.controller.start import arguments_of
from moectl.controller.timing import Clock, median_ms


def overhead(environment: Environment, settings: Any) -> dict[str, float]:
    """Return milliseconds of the controller and of applying a plan, and their share of an answer.

    The image's feature is not counted: it is a part of the answer's own encoding.

    Args:
        environment: questions, at least one.
        settings: of the controller's network, which is built new: its weights do not matter.

    Returns:
        `controller_ms`: feature of the question, scores and choice; `apply_ms`: to set a plan and
        take it back; `full_ms`: the answer by the full plan; `share` of it; `break_even`: share
        of the answer that a plan must save to pay.
    """
    features = environment.features()
    policy = build(arguments_of(settings, environment.space, features)).eval()
    clock = Clock(torch.device("cpu"), settings.latency.clock)
    budgets = torch.tensor([settings.budget.low])

    def choose() -> None:
        with torch.inference_mode():
            scores = policy(features.vision[:1], features.text[:1], budgets)
            plans(decide(scores), environment.space)

    chosen = median_ms(clock, choose)
    full = environment.execute(0, environment.space.full).timings
    applied = 0.0
    if isinstance(environment, Executor):
        backbone, question = environment.backbone, environment.samples[0].question
        own = Clock(backbone.device, settings.latency.clock)
        chosen += median_ms(own, lambda: backbone.text_feature(question))

        def apply() -> None:
            with backbone.apply(environment.space.full):
                pass

        applied = median_ms(own, apply)
    total = full.latency("total")
    share = (chosen + applied) / (chosen + applied + total)
    return {
        "controller_ms": chosen, "apply_ms": applied, "full_ms": total, "share": share,
        "break_even": (chosen + applied) / total,
    }  # fmt: skip
