"""One CPU thread against all, idle and beside a busy process, with several waiting policies.

Each row is a process of its own, since OpenMP reads its environment once.

Usage: python -m tests.benchmarks.threads
"""

import os
import subprocess
import sys
import time

STEP = """
import statistics, sys, time
import torch
from moectl.balpoe.model import BalpoeNet
side, batch = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = BalpoeNet(classes=100).to(memory_format=torch.channels_last)
images = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
times = []
for _ in range(10):
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).logsumexp(2).mean()
    loss.backward()
    times.append(time.perf_counter() - start)
print(statistics.median(times[2:]))
"""
POLICIES = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
}


def seconds(threads: int, policy: dict[str, str], side: int, batch: int) -> float:
    """Median seconds of a training step in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **policy}
    command = [sys.executable, "-c", STEP, str(side), str(batch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def table(side: int, batch: int) -> None:
    """Print the rows of one image size."""
    every = len(os.sched_getaffinity(0))
    one = seconds(1, {}, side, batch)
    print(f"  {side}x{side}, batch {batch}: one thread {one * 1000:.0f} ms")
    for name, policy in POLICIES.items():
        found = seconds(every, policy, side, batch)
        print(f"    {every} threads, {name:<10} {found * 1000:6.0f} ms  {found / one:.2f} x one")


def main() -> None:
    """Measure idle, then with one core taken by a process of our own."""
    print(f"idle (load {os.getloadavg()[0]:.1f})")
    table(16, 32)
    table(32, 128)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1)
        print("one core taken")
        table(16, 32)
        table(32, 128)
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    main()
