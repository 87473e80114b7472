"""CPU time until help is on the screen, beside other command lines that are installed.

Usage: python -m tests.benchmarks.startup
"""

import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.rows import Row, in_seconds

QUICK = {"rounds": 3}
COMMANDS = (
    ("moectl --help", 0.15),
    ("moectl balpoe --help", 0.25),
    ("moectl balpoe train --help", 0.45),
    ("moectl presets list", 0.45),
    ("accelerate --help", None),
    ("torchrun --help", None),
)


def cpu_seconds(command: list[str]) -> float:
    """CPU time of one process, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured(rounds: int = 7) -> list[Row]:
    """Print the median of some runs of each command."""
    medians = {}
    beside = Path(sys.executable).parent
    for text, budget in COMMANDS:
        name, *rest = text.split()
        program = shutil.which(name, path=str(beside)) or shutil.which(name)
        start = [sys.executable, "-m", "moectl"] if name == "moectl" else [program]
        if start == [None]:
            print(f"{text:<30} not installed")
            continue
        times = [cpu_seconds([*start, *rest]) for _ in range(rounds)]
        medians[text] = statistics.median(times)
        aim = f"  (aim {budget:.2f} s)" if budget else ""
        print(f"{text:<30} {medians[text]:.3f} s{aim}")
    return [
        in_seconds(f"{ours}, CPU time", theirs, medians[theirs], medians[ours], "≥ 5")
        for ours in ("moectl --help", "moectl presets list")
        for theirs in ("accelerate --help", "torchrun --help")
        if theirs in medians
    ]


def main() -> None:
    measured()


if __name__ == "__main__":
    main()
