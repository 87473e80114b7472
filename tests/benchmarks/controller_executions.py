"""Answers that a training needs, and their time: each one made anew, against ours.

Usage: python -m tests.benchmarks.controller_executions [--model nano] [--epochs 100]
           [--questions 100] [--timed 40]

Anew means: for every plan of a group the image is tiled, encoded and answered about. Ours encodes
an image once for each tier that its group asks for, and never answers a question twice by the same
plan. The rewards are the same, and are compared. All answers of ours are really made; the time of
those made anew is that of `--timed` of them, times their number.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
from pathlib import Path

import torch

from moectl.controller.execution import execution_from
from moectl.controller.executor import Executor
from moectl.controller.history import Executions
from moectl.controller.plans import plan_from
from moectl.controller.settings import ControllerSettings
from moectl.controller.train import train
from moectl.controller.world import open_environments
from moectl.engine.launch import build_accelerator
from moectl.engine.run import create
from moectl.engine.settings import resolve
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"epochs": 5, "questions": 12, "timed": 10}


def measured(
    model: str = "nano", epochs: int = 100, questions: int = 100, timed: int = 40
) -> list[Row]:
    given = {
        "backbone.model": model, "data.dataset": "synth_vqa",
        "data.train_samples": questions, "data.val_samples": 20,
        "policy.hidden": 64, "policy.budget_dim": 64, "policy.top_k": "shared",
        "policy.blocks": "prefix", "latency.source": "flops", "budget.mode": "relative",
        "budget.low": 0.3, "budget.high": 1.0, "train.epochs": epochs,
        "train.batch_size": 4, "train.tensorboard": False, "optim.lr": 1e-3, "reward.kind": "hinge",
    }  # fmt: skip
    settings = resolve(ControllerSettings, given, [], [])[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        named = {"room": "controller", "command": "grpo", "name": "bench", "origin": {}}
        accelerator = build_accelerator(settings.train, cpu=True)
        began = time.perf_counter()
        with create(settings, accelerator, out=out, **named) as run:
            train(run.settings, run)
        ours = time.perf_counter() - began
        lines = Executions(out / "executions.jsonl").lines()
    asked = [line for line in lines if line["split"] == "train"]
    made = {(line["sample_id"], line["plan_key"]) for line in asked}
    environment = open_environments(settings, torch.device("cpu"), ("train",))[0]["train"]
    assert isinstance(environment, Executor)
    picked = asked[:: max(1, len(asked) // timed)][:timed]
    began = time.perf_counter()
    for line in picked:
        environment.forget()
        plan = plan_from(line["plan"], environment.space)
        answer = environment.execute(environment.ids.index(line["sample_id"]), plan)
        kept = execution_from(line["execution"])
        assert (answer.answer, answer.accuracy, answer.gflop) == (
            kept.answer, kept.accuracy, kept.gflop
        )  # fmt: skip
    anew = (time.perf_counter() - began) / len(picked) * len(asked)
    print(f"{model}, {torch.get_num_threads()} thread, {epochs} epochs of"
          f" {questions} questions, {settings.grpo.group_size} plans each")  # fmt: skip
    print(f"answers  anew {len(asked)}  ours {len(made)}  {len(asked) / len(made):.1f} times fewer")
    print(f"seconds  anew {anew:.0f}  ours {ours:.0f} (training included)"
          f"  {anew / ours:.1f} times as fast")  # fmt: skip
    work = f"controller: {epochs} epochs of {questions} questions, {len(made)} different answers"
    return [in_seconds(work, "each answer made anew", anew, ours, "≥ 10 (100 epochs)")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano")
    for name, value in (("epochs", 100), ("questions", 100), ("timed", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
