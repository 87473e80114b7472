"""Weights files of a controller."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.controller import weights as module
from moectl.controller.model import Policy, build
from moectl.controller.simulator import space
from moectl.controller.weights import open_policy, prune, require_space, save_policy
from moectl.engine.errors import UserError

ARGUMENTS: dict[str, Any] = {
    "budget_encoder": {"width": 4, "low": 50, "high": 500},
    "controller": {
        "vision": 3, "language": 2, "budget": 4, "tiers": 3, "counts": 5, "optional": 15,
        "blocks": 16, "choices": 5, "hidden": 4,
    },
}  # fmt: skip


class Here:
    """Stands in for a run that writes files and remembers them."""

    is_main = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {"world": {"model": "sim"}, "weights": []}

    def note(self, **values: Any) -> None:
        self.record.update(values)

    def save_weights(
        self, name: str, payload: Any, facts: Any, *, epoch: int, best: bool = False
    ) -> None:
        from moectl.engine import artefact

        artefact.save(self.folder / name, payload, {**facts, "epoch": epoch})
        self.record["weights"].append({"file": name, "epoch": epoch, "best": best})


@pytest.fixture
def here(tmp_path: Path) -> Any:
    return Here(tmp_path)


def policy() -> Policy:
    torch.manual_seed(3)
    return build(ARGUMENTS)


def test_a_policy_comes_back_as_it_was(here: Any) -> None:
    own = policy()
    save_policy(here, "a.pt", own, ARGUMENTS, space(), epoch=7, more={"budgets": torch.ones(2)})
    found, facts = open_policy(here.folder / "a.pt")
    assert not found.training
    for name, value in own.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    assert (facts["epoch"], facts["model"]) == (7, "Policy")
    assert facts["world"] == {"model": "sim"}
    assert facts["arguments"] == ARGUMENTS
    assert facts["space"] == json.loads(json.dumps(space().plain()))


def test_a_file_holds_plain_values_under_the_names_of_the_original(here: Any) -> None:
    save_policy(here, "a.pt", policy(), ARGUMENTS, space(), epoch=7, more={"budgets": [1.5]})
    found = torch.load(here.folder / "a.pt", weights_only=True)
    assert set(found) == {
        *("one_stage_controller_state_dict", "budget_encoder_state_dict", "schema", "epoch"),
        *("backbone_spec", "budgets"),
    }
    assert "tier_head.weight" in found["one_stage_controller_state_dict"]
    assert found["backbone_spec"]["default_top_k"] == 8


def test_a_file_of_another_system_is_refused(here: Any, sim_run: Path) -> None:
    alone = shutil.copy(sim_run / "best_model.pt", here.folder / "alone.pt")
    with pytest.raises(UserError, match=r"alone\.pt\.json beside it does not say how"):
        open_policy(Path(alone))
    here.save_weights("b.pt", {"state_dict": {}}, {"model": "UNet", "arguments": {}}, epoch=1)
    with pytest.raises(UserError, match=r"b\.pt\.json beside it does not say how") as refusal:
        open_policy(here.folder / "b.pt")
    assert "--init-from" in (refusal.value.hint or "")


def files(here: Any) -> set[str]:
    return {path.name for path in here.folder.iterdir() if path.is_file()}


def test_old_files_go_with_their_sidecars(here: Any) -> None:
    for epoch in range(5):
        save_policy(here, f"c{epoch}.pt", policy(), ARGUMENTS, space(), epoch=epoch)
    save_policy(here, module.BEST, policy(), ARGUMENTS, space(), epoch=1, best=True)
    (here.folder / "c2.pt.json").unlink()  # by somebody else
    before = files(here)
    prune(here, 4)
    assert files(here) == before
    prune(here, 1)
    kept = ("c0.pt", "c4.pt", "best_model.pt")
    assert files(here) == {*kept, *(f"{name}.json" for name in kept)}
    assert [entry["file"] for entry in here.record["weights"]] == list(kept)


def test_only_the_first_process_removes_files(here: Any) -> None:
    for epoch in (1, 2):
        save_policy(here, f"c{epoch}.pt", policy(), ARGUMENTS, space(), epoch=epoch)
    here.is_main = False
    prune(here, 1)
    assert "c1.pt" in files(here)


def test_references_find_the_files_of_a_run(sim_run: Path) -> None:
    from moectl.engine.references import find_weights

    best = json.loads((sim_run / "run.json").read_text())["scores"]["best"]["epoch"]
    assert find_weights(f"{sim_run}@best", "controller") == sim_run / "best_model.pt"
    for epoch in (0, 1, 2):
        path = find_weights(f"{sim_run}@{epoch}", "controller")
        assert path.name in (f"checkpoint_epoch_{epoch}.pt", "best_model.pt")
        assert (path.name != "best_model.pt") or epoch == best
        assert open_policy(path)[1]["epoch"] == epoch


def test_weights_for_another_network_are_refused(here: Any) -> None:
    save_policy(here, "a.pt", policy(), ARGUMENTS, space(), epoch=1)
    facts = open_policy(here.folder / "a.pt")[1]
    require_space(here.folder / "a.pt", facts, space(), "sim")
    with pytest.raises(UserError, match=r"a\.pt: .* min_active = 12, but other has 13"):
        require_space(here.folder / "a.pt", facts, replace(space(), min_active=13), "other")
