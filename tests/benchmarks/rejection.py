"""Fitting the plug-in: all operating points at once against plain loops over items, equal rules.

Usage: python -m tests.benchmarks.rejection [--items 10000] [--classes 100]
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from moectl.balpoe.longtail import class_sizes
from moectl.balpoe.rejection import fit_plugin
from moectl.common.scores import prior_weights
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"items": 2000, "classes": 20}

_SPEC = importlib.util.spec_from_file_location(
    "slow_plugin", Path(__file__).parents[1] / "balpoe" / "slow_plugin.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
slow: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(slow)

RATES = [step / 10 for step in range(9)]


def measured(items: int = 10_000, classes: int = 100) -> list[Row]:
    counts = torch.tensor(class_sizes(500, classes, 0.01, "exp"))
    prior = counts.double() / counts.sum()
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(items) % classes
    noise = torch.randn(items, classes, generator=draws, dtype=torch.float64)
    hit = 3.0 * torch.nn.functional.one_hot(labels, classes)
    posteriors = torch.softmax(noise + hit + prior.log(), dim=1)
    groups = (counts <= 20).long().tolist()
    weights = prior_weights(labels, prior)

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        plugin = fit_plugin(posteriors, labels, groups, rates=RATES, weights=weights)
        seconds.append(time.perf_counter() - start)
    fast = sorted(seconds)[1]
    print(f"{items} x {classes}, {len(RATES)} rates: {fast:.2f} s")

    # One rate and two iterations of the loops are enough to know what all of them take.
    rows = posteriors.tolist(), labels.tolist(), weights.tolist()
    start = time.perf_counter()
    slow.fit(*rows, groups, RATES[4], iterations=2)
    loop = (time.perf_counter() - start) * len(RATES) * 30 / 2
    print(f"loops: {loop:.0f} s by extrapolation from 2 of 30 iterations at 1 of 9 rates")
    print(f"ratio {loop / fast:.0f}")
    small = [part[:400] for part in rows]
    alpha, mu, threshold, error = slow.fit(*small, groups, RATES[4])
    plugin = fit_plugin(*small[:2], groups, rates=[RATES[4]], weights=small[2])
    found = torch.cat([plugin.alpha[0], plugin.mu[0], plugin.thresholds])
    difference = (found - torch.tensor([*alpha, *mu, threshold], dtype=found.dtype)).abs().max()
    print(f"largest difference of the rules on 400 items: {float(difference):.1e}")
    print(f"balanced errors {float(plugin.errors.mean()):.6f} and {error:.6f}")
    work = f"balpoe: rejection rules at {len(RATES)} rates, {items:,} items of {classes} classes"
    return [in_seconds(work, "loops over items", loop, fast, "≥ 50")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=100)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
