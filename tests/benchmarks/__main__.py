"""All ratios in one table, as Markdown.

Usage: python -m tests.benchmarks [--only NAME] [--quick] [--json]

Each benchmark runs in a process of its own, one after the other; what it says while it measures
goes to standard error. `python -m tests.benchmarks.NAME --help` lists what one of them can vary.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = (
    "input_pipeline", "train_step", "rejection", "taskmoe_step", "taskmoe_analysis", "csr_losses",
    "csr_cache", "diffusion_block", "diffusion_network", "diffusion_sampling",
    "controller_executions", "checkpoints", "startup", "engine_overhead",
)  # fmt: skip


def measure(name: str, quick: bool) -> list[dict[str, Any]]:
    """Run one benchmark here and return its rows."""
    module = importlib.import_module(f"tests.benchmarks.{name}")
    with contextlib.redirect_stdout(sys.stderr):
        found = module.measured(**(module.QUICK if quick else {}))
    return [{"benchmark": name, **row.document()} for row in found]


def measure_apart(name: str, quick: bool) -> list[dict[str, Any]]:
    """Run one benchmark in a fresh process: threads and memory are those of no other."""
    sys.stderr.write(f"{name}\n")
    words = ["--only", name, "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *words],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name}: failed with {done.returncode}")
    return list(json.loads(done.stdout)["rows"])


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    import torch

    processor = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def brief(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(document: dict[str, Any]) -> str:
    """Return the table as it stands in the README."""
    facts = document["machine"]
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, threads {facts['threads']}, GPU"
        f" {facts['gpu']}; Python {facts['python']}, torch {facts['torch']}; load"
        f" {facts['load']}. Medians in ms.",
        "",
        "| benchmark | work | against | theirs | ours | ratio | aim |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in document["rows"]:
        cells = (
            row["benchmark"], row["what"], row["against"],
            *(brief(row[name]) for name in ("before_ms", "after_ms", "ratio")), row["aim"],
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NAMES, help="this one alone, in this process")
    parser.add_argument("--quick", action="store_true", help="small and with few rounds")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    asked = parser.parse_args()
    facts = machine()
    if asked.only:
        rows = measure(asked.only, asked.quick)
    else:
        rows = [row for name in NAMES for row in measure_apart(name, asked.quick)]
    document = {"machine": facts, "quick": asked.quick, "rows": rows}
    print(json.dumps(document, indent=2) if asked.json else markdown(document))


if __name__ == "__main__":
    main()
