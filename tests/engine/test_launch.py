"""Threads, precision and processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moectl.engine import launch
from moectl.engine.errors import UserError
from moectl.engine.sections import TrainSection


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend to be a machine with so many cores and such a container quota."""

    def pretend(cores: int, quota: str | None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        real = Path.read_text

        def read(path: Path, *args: Any, **options: Any) -> str:
            if str(path) != "/sys/fs/cgroup/cpu.max":
                return real(path, *args, **options)
            if quota is None:
                raise FileNotFoundError(path)
            return quota

        monkeypatch.setattr(Path, "read_text", read)

    return pretend


@pytest.mark.parametrize(
    ("cores", "quota", "usable"),
    [
        (8, None, 8),
        (8, "max 100000\n", 8),
        (8, "250000 100000\n", 2),
        (2, "800000 100000\n", 2),
        (8, "50000 100000\n", 1),
    ],
)
def test_cores_are_what_affinity_and_quota_leave(
    machine: Callable[..., None], cores: int, quota: str | None, usable: int
) -> None:
    machine(cores, quota)
    assert launch.cores() == usable


@pytest.mark.parametrize(
    ("asked", "wanted", "local", "chosen"),
    [
        (3, "5", None, 3),
        (0, "5", None, 5),
        (0, None, None, 7),  # one core is left to others
        (0, "many", None, 7),
        (0, "0", None, 7),
        (0, "1", "2", 3),  # the launcher's own 1 does not count
        (3, "1", "2", 3),
        (0, None, "16", 1),
    ],
)
def test_threads(
    machine: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
    wanted: str | None,
    local: str | None,
    chosen: int,
) -> None:
    machine(8, None)
    for name, value in (("OMP_NUM_THREADS", wanted), ("LOCAL_WORLD_SIZE", local)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    import torch

    before = torch.get_num_threads()
    try:
        assert launch.choose_threads(asked) == chosen
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)
    assert os.environ["OMP_NUM_THREADS"] == str(chosen)


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_bf16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert launch.choose_precision("auto", cpu=True) == ("bf16" if native else "no")
    assert launch.choose_precision("fp16", cpu=True) == "fp16"


def test_several_cpu_processes_that_became_one_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="asked for several CPU processes") as refusal:
        launch.build_accelerator(TrainSection(precision="no"), cpu=True)
    assert "torchrun --standalone --nproc_per_node 2" in refusal.value.hint


def test_one_process_is_one_process(toy: ModuleType) -> None:
    accelerator = launch.build_accelerator(TrainSection(precision="no"), cpu=True)
    assert accelerator.num_processes == 1
    assert accelerator.device.type == "cpu"
    assert accelerator.mixed_precision == "no"


def test_fewer_processes_than_asked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.build_accelerator(TrainSection(precision="no"), cpu=True)
    monkeypatch.setenv(
        "WORLD_SIZE", "2"
    )  # after the first state exists: nothing waits for a partner
    with pytest.raises(UserError, match="2 processes were asked for, 1 take part"):
        launch.build_accelerator(TrainSection(precision="no"), cpu=True)


def test_a_resumed_run_keeps_the_precision_it_began_with() -> None:
    train = TrainSection(precision="auto")
    assert launch.build_accelerator(train, cpu=True, precision="bf16").mixed_precision == "bf16"


def test_deterministic_asks_torch() -> None:
    import torch

    try:
        launch.build_accelerator(TrainSection(deterministic=True, precision="no"), cpu=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_agreement_of_one_process_is_its_own_decision() -> None:
    alone: Any = SimpleNamespace(is_main_process=True, num_processes=1)
    assert launch.agree(alone, lambda: Path("x")) == Path("x")

    def refuse() -> Path:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        launch.agree(alone, refuse)


@pytest.mark.parametrize(("total", "world"), [(7, 2), (9, 2), (31, 4), (2, 3), (8, 2)])
def test_dealt_rows_come_back_in_order(total: int, world: int) -> None:
    import torch

    rows = torch.arange(total * 2).reshape(total, 2)
    hands = [rows[rank::world] for rank in range(world)]
    longest = max(map(len, hands))

    def pad(hand: Any, dim: int) -> Any:
        return torch.cat([hand, hand.new_full((longest - len(hand), 2), -1)])

    everything = torch.cat([pad(hand, 0) for hand in hands])
    fake: Any = SimpleNamespace(
        num_processes=world, pad_across_processes=pad, gather=lambda _: everything
    )
    for hand in hands:
        assert torch.equal(launch.gather_rows(fake, hand, total), rows)


@pytest.mark.parametrize(
    ("value", "off"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)]
)
def test_offline(monkeypatch: pytest.MonkeyPatch, value: str, off: bool) -> None:
    monkeypatch.setenv("MOECTL_OFFLINE", value)
    assert launch.offline() == off
    monkeypatch.delenv("MOECTL_OFFLINE")
    assert not launch.offline()


FAREWELL = """
import atexit, sys
import torch
from moectl.engine.launch import leave

atexit.register(lambda: print("farewell"))
if len(sys.argv) > 1:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1
    )
print("done", end=" ")
leave(3)
"""


def test_one_of_several_processes_ends_without_the_interpreters_farewell(tmp_path: Path) -> None:
    # Two gloo processes that ended the usual way aborted in one of a dozen ends on a busy machine.
    program = [sys.executable, "-c", FAREWELL]
    alone = subprocess.run(program, capture_output=True, text=True, check=False)
    among = subprocess.run(
        [*program, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert (alone.returncode, alone.stdout) == (3, "done farewell\n")
    assert (among.returncode, among.stdout) == (3, "done ")
