"""Saving the training state: ours, flushed and with checksums, against accelerate's `save_state`.

Usage: python -m tests.benchmarks.checkpoints [--millions 100] [--rounds 5]

Both hold the same network and the same two moments of AdamW, and write to the same disk in turn,
beside the checkpoint before, which they then delete. `save_state` neither flushes nor renames, so a
kill can leave half of a file behind; ours cannot.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from moectl.engine import checkpoint, state
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"millions": 10, "rounds": 3}
WIDTH = 1000


def seconds(save: Callable[[], object]) -> float:
    os.sync()  # what the other has left to be written
    began = time.perf_counter()
    save()
    return time.perf_counter() - began


def measured(millions: int = 100, rounds: int = 5) -> list[Row]:
    accelerator = Accelerator(cpu=True)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(millions)]
    model = torch.nn.Sequential(*layers)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.randn(1, WIDTH)).sum().backward()
    optimizer.step()
    times = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def theirs(number: int) -> None:
            accelerator.save_state(str(root / "theirs" / str(number)))
            shutil.rmtree(root / "theirs" / str(number - 1), ignore_errors=True)

        def ours(number: int) -> None:
            files = state.pack(model, optimizer, None, {}, {"update": number})
            checkpoint.save(root / "ours", number, files, {})
            checkpoint.prune(root / "ours", 1, None)

        for number in range(rounds + 1):
            times.append((seconds(partial(theirs, number)), seconds(partial(ours, number))))
        checkpoint.read(root / "ours" / f"update-{rounds:08d}")
    plain, own = (statistics.median(column[1:]) for column in zip(*times, strict=True))
    print(f"{millions} million weights: save_state {plain:.2f} s, ours {own:.2f} s")
    work = f"engine: a checkpoint of {millions} million weights under AdamW"
    return [in_seconds(work, "accelerate save_state", plain, own, "≥ 0.67")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
