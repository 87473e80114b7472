"""Cost of the engine per step: the same tiny training with the loop and as a bare loop, in one run.

Usage: python -m tests.benchmarks.engine_overhead
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tests.benchmarks.rows import Row

QUICK = {"rounds": 3}

_SPEC = importlib.util.spec_from_file_location(
    "toy", Path(__file__).parents[1] / "engine" / "toy.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
toy: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(toy)

SAMPLES, BATCH, EPOCHS = 3200, 16, 4


def bare() -> float:
    """Seconds of process time for a plain loop over the same number of batches."""
    data, model = toy.source(SAMPLES), toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    start = time.process_time()
    for _ in range(EPOCHS):
        for rows in torch.randperm(SAMPLES).split(BATCH):
            images = data.augment(data.images[rows], torch.rand(len(rows), 2))
            loss = F.cross_entropy(model(images), data.labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return time.process_time() - start


def engine() -> float:
    """Seconds of process time with the loop: seeds, metrics, checks and checkpoints included."""
    from moectl.engine.optim import build_optimizer, build_schedule

    options = toy.settings(train__epochs=EPOCHS, train__batch_size=BATCH, train__log_every=50)
    with tempfile.TemporaryDirectory() as folder, toy.open_run(Path(folder), options) as run:
        model = toy.model()
        schedule = build_schedule(options.schedule, options.optim.lr, EPOCHS)
        optimizer = build_optimizer(options.optim, model.parameters())
        loop = run.loop(model, toy.source(SAMPLES), optimizer, schedule)
        start = time.process_time()
        for step in loop:
            images, labels = step.batch
            step.update(F.cross_entropy(loop.model(images), labels))
        return time.process_time() - start


def measured(rounds: int = 5) -> list[Row]:
    """Interleave both and print the medians."""
    torch.set_num_threads(1)
    steps = EPOCHS * SAMPLES // BATCH
    pairs = [(bare(), engine()) for _ in range(rounds)]
    plain, ours = (statistics.median(values) / steps * 1000 for values in zip(*pairs, strict=True))
    print(
        f"bare loop {plain:.3f} ms/step, engine {ours:.3f} ms/step, overhead {ours - plain:.3f} ms"
    )
    return [Row("engine: a step of a tiny network, CPU time", "a bare loop", plain, ours)]


def main() -> None:
    measured()


if __name__ == "__main__":
    main()
