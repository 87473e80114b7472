"""What a result may depend on besides its settings."""

import platform
import socket
import subprocess
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def environment(accelerator: "Accelerator") -> dict[str, Any]:
    """Return what a result may depend on: versions, devices, precision, threads, git state."""
    import accelerate
    import numpy
    import torch

    from moectl import __version__

    return {
        "versions": {
            "moectl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),  # importing it would cost seconds
            "accelerate": accelerate.__version__,
            "numpy": numpy.__version__,
        },
        "host": socket.gethostname(),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "git": _git(),
    }


def device_name(device: "torch.device") -> str:
    """Return what a GPU, or the processor of this machine, is called."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
