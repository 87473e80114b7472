"""A comparison of variants that is killed in the middle of one of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.cli import _run

WORDS = (
    "ablate", "--no-freq", "--data", "digits", "--image-size", "8", "--model-channels", "8",
    "--channel-mults", "1,2", "--set", "model.num_experts=3", "--set", "model.time_dim=8",
    "--set", "model.class_dim=8", "--precision", "no", "--batch-size", "512", "--epochs", "2",
    "--sample-every", "0", "--features", "none", "--set", "train.save_minutes=0", "--threads", "1",
    "--set", "train.tensorboard=false", "--cpu", "--quiet",
)  # fmt: skip

KILLER = """
import os, signal, sys
from moectl.cli import _run
from moectl.engine.loop import Step
where, own, words = sys.argv[1], Step.update, sys.argv[2:]
trained = []

def update(step, *loss, **parts):
    trained.append(1)
    if len(trained) == int(where):
        os.kill(os.getpid(), signal.SIGKILL)
    own(step, *loss, **parts)

Step.update = update
_run(["diffusion", *words])
"""
UPDATES = 8  # of a variant: 4 batches, twice


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "a"
    assert _run(["diffusion", *WORDS, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("update", [3, UPDATES + 6])
def test_a_killed_comparison_goes_on_to_the_same_weights(whole, tmp_path, root, update):
    folder = tmp_path / "a"
    words = (*WORDS, "--out", str(folder))
    program = (sys.executable, "-c", KILLER, str(update))
    assert subprocess.run([*program, *words], cwd=root, check=False).returncode == -9
    done = [path.parent.name for path in folder.glob("variants/*/result.json")]
    assert done == (["full"] if update > UPDATES else [])
    assert _run(["diffusion", "ablate", "--resume", str(folder), "--cpu", "--quiet"]) == 0
    for name in ("full", "no_freq"):
        assert weights(folder, name) == weights(whole, name), name
    assert losses(folder) == losses(whole)


def weights(folder: Path, name: str) -> dict[str, bytes]:
    import torch

    path = folder / "variants" / name / "checkpoint_epoch_2.pth"
    payload = torch.load(path, weights_only=True)
    return {
        f"{part}.{key}": value.numpy().tobytes()
        for part in ("model_state_dict", "ema_state_dict")
        for key, value in payload[part].items()
    }


def losses(folder: Path) -> dict[str, float]:
    document = json.loads((folder / "ablation.json").read_text())
    return {row["name"]: row["loss"] for row in document["variants"]}
