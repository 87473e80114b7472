"""Checkpoints on disk from the first measurement to an answer, as a user would go."""

import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from moectl.controller import profile as profile_module
from moectl.controller import tiny
from moectl.controller import train as train_module
from moectl.controller.open import open_backbone
from moectl.controller.plans import plan_from
from moectl.controller.smolvlm import SmolVlm

Call = Callable[..., tuple[int, str, str]]

MEASURED = ("--dataset", "synth_vqa", "--max-new-tokens", "3", "--clock", "cpu", "--cpu", "-q")
SMALL = (
    *("--train-samples", "2", "--val-samples", "1", "--epochs", "1", "--group-size", "2"),
    *("--hidden", "8", "--set", "policy.budget_dim=8", "--set", "train.tensorboard=false"),
    *("--latency-source", "table", "--budget-mode", "auto", "--warmup", "0"),
)


@pytest.fixture
def walk(
    controller: Call, asked_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, str], dict[str, Any]]:
    """Profile a network, train a controller for it, and ask both; return all documents."""
    for module in (profile_module, train_module):
        monkeypatch.setattr(module, "report", lambda _: None)

    def done(*words: str) -> Any:
        code, out, err = controller(*words, *MEASURED, "--json")
        assert code == 0, err
        return json.loads(out)

    def ask(*words: str) -> Any:
        given = ("--image", str(asked_image), "--prompt", "Which colour?", "--json", "--cpu")
        code, out, err = controller("infer", *given, *words)
        assert code == 0, err
        return json.loads(out)

    def walked(network: Path, method: str) -> dict[str, Any]:
        tables, run, model = tmp_path / "tables", tmp_path / "run", ("--model", str(network))
        few = ("--samples", "1", "--plans", "8", "--warmup", "1", "--set", "profile.repeats=1")
        profile = done("profile", *model, *few, "--method", method, "--out", str(tables))
        done("grpo", *model, *SMALL, "--tables", str(tables), "--out", str(run))
        budget = ("--budget", str(profile["grid"]["budgets"][1]))
        return {
            "profile": profile,
            "steered": ask("--run", str(run), *budget, "--compare"),
            "table": ask("--policy", "lut", "--tables", str(tables), *budget),
        }

    return walked


def check(found: dict[str, Any], network: Path) -> None:
    """Both answers are by plans of the network, and every stage was timed and predicted."""
    space = open_backbone(str(network), device="cpu").space
    for answer in (found["steered"], found["table"]):
        plan_from(answer["plan"], space)
        for times in (answer["measured"], answer["predicted"]):
            assert times["vision"] > 0
            assert times["prefill"] > 0
    assert found["steered"]["full"]["plan"] == space.full.plain()
    assert found["profile"]["model"] == str(network)


def save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_network_without_experts(
    walk: Callable[..., Any], tmp_path: Path, enliven: Callable[[Any], Any]
) -> None:
    model, processor = tiny.build("nano", "dense")
    network = save(tmp_path / "dense", enliven(model), processor)
    found = walk(network, "kl")
    check(found, network)
    assert found["profile"]["grid"]["plans"] == 3 * 2
    assert found["steered"]["plan"]["top_k"] == [0] * 6
    scores = found["profile"]["importance"]["scores"]
    assert all(scores[str(block)] > 0 for block in range(6))


def test_a_network_that_takes_images_at_any_size(
    walk: Callable[..., Any], tmp_path: Path, smol: SmolVlm
) -> None:
    network = save(tmp_path / "smol", smol.model, smol.processor)
    found = walk(network, "bi")
    check(found, network)
    scores = found["profile"]["importance"]["scores"]
    assert all(scores[str(block)] > 0 for block in range(6))


def test_a_converted_network(walk: Callable[..., Any], controller: Call, tmp_path: Path) -> None:
    spec = spec_from_file_location(
        "molmo_reference", Path(__file__).with_name("molmo_reference.py")
    )
    assert spec is not None
    assert spec.loader is not None
    reference: Any = module_from_spec(spec)
    sys.modules["molmo_reference"] = reference
    spec.loader.exec_module(reference)
    sizes = reference.Sizes()
    reference.write_original(tmp_path / "original", sizes, sizes.weights())
    network = tmp_path / "molmo"
    code, out, _ = controller("convert", str(tmp_path / "original"), str(network))
    assert (code, out) == (0, f"{network}\n")
    found = walk(network, "drop")
    check(found, network)
    assert found["profile"]["grid"]["plans"] == 3 * 3 * 2
