"""CPU time until help is on the screen, beside other command lines that are installed.

Usage: python tests/benchmarks/startup.py
"""

import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    """Print the median of seven runs of each command."""
    beside = Path(sys.executable).parent
    for text, budget in COMMANDS:
        name, *rest = text.split()
        program = shutil.which(name, path=str(beside)) or shutil.which(name)
        if program is None:
            print(f"{text:<30} not installed")
            continue
        times = [cpu_seconds([program, *rest]) for _ in range(7)]
        aim = f"  (aim {budget:.2f} s)" if budget else ""
        print(f"{text:<30} {statistics.median(times):.3f} s{aim}")


if __name__ == "__main__":
    main()
