"""What a result may depend on besides its settings."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.engine.environment import device_name, environment


@pytest.fixture
def accelerator() -> Any:
    return SimpleNamespace(device=torch.device("cpu"), num_processes=2, mixed_precision="no")


def test_versions_and_machine_are_plain_types(accelerator: Any) -> None:
    found = environment(accelerator)
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert all(found["versions"].values())
    assert (found["processes"], found["precision"]) == (2, "no")
    assert found["threads"] == torch.get_num_threads()


def test_secrets_stay_out(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    assert "hush" not in json.dumps(environment(accelerator))


def test_git_state_is_recorded_where_there_is_one(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch, isolated: Path
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(isolated.parent))
    assert environment(accelerator)["git"] is None
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], check=True)
    git = environment(accelerator)["git"]
    assert len(git["commit"]) == 40
    assert git["dirty"] is False
    Path("new").touch()
    assert environment(accelerator)["git"]["dirty"] is True


def test_a_machine_without_git_is_fine(accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment(accelerator)["git"] is None


def test_devices_have_the_names_that_people_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert device_name(torch.device("cpu")) == "x86_64"
    assert device_name(torch.device("cuda", 1)) == "card 1"
