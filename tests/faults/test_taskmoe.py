"""A mixture that is killed before its first checkpoint, and balance over several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.engine.loop import Loop
from moectl.taskmoe.losses import balance_loss, top_shares
from tests.faults import procedures

TINY = (
    *("--task", "digits", "--width", "4", "--batch-size", "67", "--precision", "no", "--quiet"),
    *("--cpu", "--num-epochs", "2", "--set", "train.save_minutes=0", "--threads", "1"),
    *("--set", "train.log_every=3", "--set", "train.tensorboard=false"),
)
MIXTURE = ("train", *TINY, "--freeze-extractor-epochs", "1", "--expert-analysis-interval", "0")


def test_before_the_first_checkpoint_it_starts_again_from_its_own_merged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    procedures.prepare(tmp_path)
    gone = tmp_path / "submodels"
    words = ("taskmoe", *MIXTURE, "--submodels-dir", str(gone))

    def doomed() -> int:
        monkeypatch.setattr(Loop, "rehearse", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return _run([*words, "--out", str(tmp_path / "run")])

    with procedures.without_pictures():
        assert _run([*words, "--out", str(tmp_path / "whole")]) == 0
        assert procedures.exit_code(doomed) == -signal.SIGKILL
        assert not (tmp_path / "run" / "checkpoints").exists()
        shutil.rmtree(gone)  # the weights can come from nowhere else
        assert _run([*words, "--resume", str(tmp_path / "run")]) == 0
    for name in ("best_model.pth", "last.pth"):
        same = (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert same, name


# Two processes

SHARES = """
import json, sys
from types import SimpleNamespace
import torch
from moectl.engine.launch import leave
from moectl.taskmoe.losses import balance_loss
from moectl.taskmoe.train import over_processes

torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=world))
given = torch.load(sys.argv[1], weights_only=True)
found = []
for sizes in ([3, 2], [4, 1], [2, 3]):
    for kind in ("l2", "switch"):
        weight = given["weight"].clone().requires_grad_()
        gates = (given["inputs"].split(sizes)[rank] @ weight).softmax(1)
        hot = torch.nn.functional.one_hot(gates.argmax(1), 3).float()
        usage, shares = over_processes(gates, run), over_processes(hot, run)
        loss = balance_loss(usage, kind, shares)
        share = len(gates) / 5
        (loss * (share * world)).backward()  # as the loop weighs it
        torch.distributed.all_reduce(weight.grad)
        found.append({
            "kind": kind, "usage": usage.tolist(), "loss": loss.item(),
            "gradient": (weight.grad / world).tolist(),
        })
if rank == 0:
    print(json.dumps(found))
leave()
"""


def test_two_processes_balance_the_whole_batch(
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    finish: Callable[..., tuple[int, str, str]],
) -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 3, generator=draws) for rows in (5, 3))
    torch.save({"inputs": inputs, "weight": weight}, tmp_path / "given.pth")
    (tmp_path / "shares.py").write_text(SHARES)
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    program = (sys.executable, *words, f"{tmp_path}/shares.py", f"{tmp_path}/given.pth")
    code, out, err = finish(start(program=program), 120)
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
    assert len(found) == 6
    for case in found:
        weight.grad = None
        gates = (inputs @ weight.requires_grad_()).softmax(1)
        loss = balance_loss(gates.mean(0), case["kind"], top_shares(gates))
        loss.backward()
        assert weight.grad is not None
        assert case["usage"] == pytest.approx(gates.mean(0).tolist(), abs=1e-6)
        assert case["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert torch.allclose(torch.tensor(case["gradient"]), weight.grad, atol=1e-6)
        assert weight.grad.abs().max() > 1e-3
