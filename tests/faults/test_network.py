"""Without a network: what is missing is named, and how to get it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.cli import _run
from tests.faults.procedures import without_network

WANTING = {
    "balpoe train --dataset cifar100 --cpu": "train, test, meta not found",
    "taskmoe data build --task A": "the files of CIFAR-100 are not there",
    "csr train --dataset synthetic --backbone-type resnet18 --cpu": "resnet18-f37072fd.pth",
    "csr train --dataset synthetic --backbone-type medmae --cpu": "facebook/vit-mae-base",
    "controller toy --dataset text_vqa --cpu": "text_vqa",
    "diffusion train --data cifar10 --cpu": "data_batch_1",
    "diffusion train --data hub --hub-name nobody/nothing --cpu": "nobody/nothing",
}
"""What commands lack on a machine that has fetched nothing."""
NETWORK = "controller profile --model nobody/nothing --dataset synth_vqa --cpu"
PROGRAM = """
import sys
from moectl.cli import main
from tests.faults.procedures import without_network
with without_network() as tried:
    try:
        main(sys.argv[1:])
    finally:
        sys.stdout.write(f"{tried}")
"""


@pytest.mark.parametrize("words", WANTING)
def test_what_would_have_to_be_fetched_is_named(
    words: str,
    isolated: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(isolated / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as by `main`
    with without_network() as tried:
        assert _run(words.split()) == 2
    out, err = capsys.readouterr()
    said, hint = err.splitlines()
    assert (out, tried) == ("", [])
    assert said.startswith("error: ")
    assert WANTING[words] in said
    assert hint.startswith("hint: ")


def test_libraries_do_not_ask_the_hub_for_anything_of_their_own(
    start: Callable[..., Any], finish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read what forbids it while they are imported, so it takes a process of its own."""
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "kept")
    code, out, err = finish(start(*NETWORK.split(), program=(sys.executable, "-c", PROGRAM)))
    assert (code, out) == (2, "[]"), err
    assert "nobody/nothing: no network of a known family (MOECTL_OFFLINE forbids to fetch it" in err
