"""How the process computes: CPU threads before torch starts, devices, processes, precision."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from moectl.engine.sections import TrainSection

log = logging.getLogger(__name__)

T = TypeVar("T")

_TWO_PROCESSES = "start CPU processes with: torchrun --standalone --nproc_per_node 2 -m moectl …"


def cores() -> int:
    """Return the CPU cores this process may use: affinity and container quota, at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no quota, or a system without cgroups
    return count


def choose_threads(threads: int) -> int:
    """Return the threads to use and tell OpenMP, which reads its environment as torch is imported.

    One core is left to the rest of the machine: a team of threads that must share a core waits
    for its slowest member at every operation. Measured on two cores beside a busy process, two
    threads took 2 to 7 times as long as one; on idle cores 0.54 to 0.82 of it.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Launchers set OMP_NUM_THREADS to 1 whatever the machine; only a user's own value counts.
    wanted = os.environ.get("OMP_NUM_THREADS", "") if "LOCAL_WORLD_SIZE" not in os.environ else ""
    count = threads or (
        int(wanted) if wanted.isdigit() and int(wanted) else max(1, (cores() - 1) // local)
    )
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
    return count


def choose_precision(wanted: str, cpu: bool) -> str:
    """Resolve `auto`: bf16 where the device computes it natively, else none."""
    if wanted != "auto":
        return wanted
    import torch

    if not cpu and torch.cuda.is_available():
        native = torch.cuda.get_device_capability()[0] >= 8
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "no"


def build_accelerator(train: "TrainSection", cpu: bool, precision: str = "") -> "Accelerator":
    """Create the accelerator and check that the processes asked for are the ones that came.

    Args:
        train: precision and determinism.
        cpu: stay on the CPU.
        precision: what `auto` meant when the run that is resumed began.

    Raises:
        UserError: if the launcher started fewer processes than asked for.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    # Limit: Apple's GPUs are left alone; they have no doubles, which sums and rotations need.
    cpu = cpu or not torch.cuda.is_available()
    _refuse_silent_single()
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision or choose_precision(train.precision, cpu),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=10)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} take part",
            _TWO_PROCESSES,
        )
    return accelerator


def _refuse_silent_single() -> None:
    environment = os.environ
    asked_by_accelerate = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if asked_by_accelerate and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "accelerate was asked for several CPU processes and started one", _TWO_PROCESSES
        )


def agree(accelerator: "Accelerator", decide: Callable[[], T]) -> T:
    """Let rank 0 decide and tell the others, its refusal included."""
    verdict: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            verdict = [decide()]
        except UserError as error:
            verdict = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(verdict)
    if isinstance(verdict[0], UserError):
        raise verdict[0]
    return cast("T", verdict[0])


def any_process(accelerator: "Accelerator", *flags: bool) -> list[bool]:
    """Return each flag as raised by any process, the same on all."""
    if accelerator.num_processes == 1:
        return list(flags)
    import torch

    here = torch.tensor(flags, dtype=torch.int64, device=accelerator.device)
    return [bool(flag) for flag in accelerator.reduce(here, "sum")]


def gather_objects(accelerator: "Accelerator", here: Any) -> list[Any]:
    """Return every process's object, by rank."""
    if accelerator.num_processes == 1:
        return [here]
    from accelerate.utils import gather_object

    return list(gather_object([here]))


def gather_rows(accelerator: "Accelerator", rows: "Tensor", total: int) -> "Tensor":
    """Collect the rows of an evaluation that was dealt out to all processes, in data-set order.

    Args:
        accelerator: devices and processes.
        rows: (n, …) of this process: samples rank, rank + world, …
        total: number of samples over all processes.

    Returns:
        (total, …) on every process.
    """
    world = accelerator.num_processes
    if world == 1:
        return rows
    padded = accelerator.pad_across_processes(rows, dim=0)
    dealt = accelerator.gather(padded).reshape(world, -1, *rows.shape[1:]).transpose(0, 1)
    return dealt.reshape(-1, *rows.shape[1:])[:total]


def leave(code: int = 0) -> NoReturn:
    """End the process; one of several at once, past the interpreter's own farewell.

    Threads of gloo may still hold tensors of the last exchange, and giving them back to an
    interpreter that is going down aborts a process that has done all its work.
    """
    torch = sys.modules.get("torch")
    group = torch.distributed if torch is not None else None
    if group is None or not (group.is_available() and group.is_initialized()):
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def offline() -> bool:
    """Whether MOECTL_OFFLINE forbids the network."""
    return os.environ.get("MOECTL_OFFLINE", "").lower() in ("1", "true", "yes", "on")
