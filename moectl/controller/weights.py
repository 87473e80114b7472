"""Weights files of a controller: written, read back, and the old ones removed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl import __version__
from moectl.controller.model import Policy, build
from moectl.controller.plans import Space
from moectl.engine.artefact import load
from moectl.engine.errors import UserError
from moectl.engine.run import Run

FIRST = "checkpoint_epoch_0.pt"
"""The policy as training began with it."""
BEST = "best_model.pt"

CONTROLLER, BUDGET = "one_stage_controller_state_dict", "budget_encoder_state_dict"


def save_policy(  # noqa: PLR0913 - what a file is made of
    run: Run[Any],
    name: str,
    policy: Policy,
    arguments: Mapping[str, Any],
    space: Space,
    *,
    epoch: int,
    best: bool = False,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a policy with what rebuilds it.

    Args:
        run: whose folder takes the file.
        name: of the file.
        policy: the weights.
        arguments: that built it.
        space: the plans that it chooses from.
        epoch: epochs done.
        best: whether `@best` means this file.
        more: further tensors and plain values of the file.
    """
    payload = {
        CONTROLLER: policy.controller.state_dict(),
        BUDGET: policy.budget_encoder.state_dict(),
        "schema": 1,
        "epoch": epoch,
        "backbone_spec": space.plain(),
        **(more or {}),
    }
    facts = {
        "model": "Policy",
        "arguments": arguments,
        "space": space.plain(),
        "world": run.record.get("world", {}),
        "moectl": __version__,
    }
    run.save_weights(name, payload, facts, epoch=epoch, best=best)


def open_policy(path: Path) -> tuple[Policy, dict[str, Any]]:
    """Read a policy, on the CPU and in evaluation mode, and the sidecar that describes it.

    Raises:
        UserError: if the file cannot be read, or has nothing beside it that says how to build it.
    """
    read = load(path)
    if read.facts.get("model") != "Policy":
        raise UserError(
            f"{path}: {path.name}.json beside it does not say how to build the controller",
            "weights of another program serve as a start: moectl controller grpo --init-from",
        )
    policy = build(read.facts["arguments"])
    policy.controller.load_state_dict(read.payload[CONTROLLER])
    policy.budget_encoder.load_state_dict(read.payload[BUDGET])
    return policy.eval(), read.facts


def require_space(path: Path, facts: Mapping[str, Any], space: Space, model: str) -> None:
    """Refuse to choose plans of another network.

    Args:
        path: of the weights.
        facts: of their sidecar.
        space: of the network that is there.
        model: its name.

    Raises:
        UserError: saying how it differs from the one that they were trained for.
    """
    here = json.loads(json.dumps(space.plain()))
    if different := [name for name in here if facts["space"].get(name) != here[name]]:
        name = different[0]
        raise UserError(
            f"{path}: chooses plans with {name} = {facts['space'].get(name)}, but {model} has"
            f" {here[name]}",
            "take the network that it was trained for",
        )


def prune(run: Run[Any], keep: int) -> None:
    """Remove the weights files of old epochs, but never the best nor the first."""
    entries = run.record.get("weights", [])
    numbered = [entry for entry in entries if not entry["best"] and entry["epoch"]]
    gone = sorted(numbered, key=lambda entry: entry["epoch"])[:-keep]
    if not run.is_main or not gone:
        return
    run.note(weights=[entry for entry in entries if entry not in gone])
    for entry in gone:
        for name in (entry["file"], f"{entry['file']}.json"):
            (run.folder / name).unlink(missing_ok=True)
