"""What plans save: tokens, work and milliseconds over the three knobs, and the controller's cost.

Usage: python -m tests.benchmarks.controller_plans [--model tiny] [--rounds 7] [--tokens 16]

Processor time, the least of the rounds, in which the plans take turns.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics

import torch

from moectl.controller.backbone import generate
from moectl.controller.environment import Features
from moectl.controller.importance import MOLMOE, order_of
from moectl.controller.model import build
from moectl.controller.open import open_backbone
from moectl.controller.plans import Plan
from moectl.controller.settings import ControllerSettings
from moectl.controller.start import arguments_of
from moectl.controller.synth import draw
from moectl.controller.timing import Clock

KNOBS = (
    *(("low", 1.0, 1.0), ("medium", 1.0, 1.0), ("high", 1.0, 1.0)),
    *(("medium", 0.75, 1.0), ("medium", 0.5, 1.0), ("medium", 1.0, 0.875), ("medium", 1.0, 0.75)),
    ("low", 0.5, 0.75),
)


def plan_of(space, tier, experts, blocks):
    count = max(space.min_active, round(blocks * space.blocks))
    scores = dict(MOLMOE) if space.blocks == len(MOLMOE) else dict.fromkeys(range(space.blocks), 0)
    runs = set(order_of(scores, space.always_on)[:count])
    active = tuple(block in runs for block in range(space.blocks))
    return Plan(tier, active, space.uniform(round(experts * space.default_top_k)))


def decision(backbone, rounds):
    """Milliseconds of the controller at the original's widths."""
    shapes = Features(torch.randn(1, backbone.vision_dim), torch.randn(1, backbone.text_dim))
    policy = build(arguments_of(ControllerSettings(), backbone.space, shapes)).eval()
    clock, times = Clock(torch.device("cpu"), "cpu"), []
    for _ in range(20 * rounds):
        start = clock.now()
        with torch.inference_mode():
            policy(*shapes, torch.tensor([200.0]))
        times.append(clock.since(start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    backbone = open_backbone(options.model, device="cpu")
    backbone.end_tokens = frozenset()  # a random network must not stop early
    image, question, *_ = draw(0, 0)
    clock = Clock(torch.device("cpu"), "cpu")
    plans = [plan_of(backbone.space, *knobs) for knobs in KNOBS]
    found = [[] for _ in plans]
    for _ in range(options.rounds):
        for plan, answers in zip(plans, found, strict=True):
            inputs = backbone.prepare(image, question, "vqa", plan.tier)
            answer = generate(backbone, inputs, plan, max_new_tokens=options.tokens, clock=clock)
            answers.append((answer.timings, inputs))
    print(f"{options.model}, {torch.get_num_threads()} thread, least of {options.rounds} rounds")
    print("tier    experts blocks tokens  vision prefill  ms/token   GFLOP")
    for plan, answers in zip(plans, found, strict=True):
        inputs = answers[0][1]
        vision, prefill, token = (
            min(getattr(times, name) for times, _ in answers)
            for name in ("vision", "prefill", "per_token")
        )
        work = backbone.gflop(plan, inputs, options.tokens)
        print(f"{plan.tier:<8}{plan.top_k[-1]:>6}{len(plan.blocks):>7}{inputs.tokens:>7}"
              f"{vision:>8.1f}{prefill:>8.1f}{token:>10.2f}{work:>8.2f}")  # fmt: skip
    print(f"the controller chooses in {decision(backbone, options.rounds):.2f} ms")


if __name__ == "__main__":
    main()
