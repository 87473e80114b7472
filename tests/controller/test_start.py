"""How a policy begins."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.controller import start
from moectl.controller.importance import MOLMOE
from moectl.controller.model import Policy
from moectl.controller.start import begin
from moectl.controller.table import read_table
from moectl.controller.world import open_world
from moectl.engine.errors import UserError

CPU = torch.device("cpu")
Settings = Callable[..., Any]


@pytest.fixture
def begun(simulated: Settings) -> Callable[..., Policy]:
    """The policy that a training with these settings begins with."""

    def call(**values: Any) -> Policy:
        settings = simulated(**values)
        return begin(settings, open_world(settings, CPU, ("train", "val")))[0]

    return call


def weights_of(policy: Policy, name: str = "one_stage_controller_state_dict") -> dict[str, Any]:
    return {
        name: policy.controller.state_dict(),
        "budget_encoder_state_dict": policy.budget_encoder.state_dict(),
    }


def test_a_seed_decides_the_first_weights(begun: Callable[..., Policy]) -> None:
    one, again, other = (begun(train__seed=seed) for seed in (1, 1, 2))
    name = "controller.tier_head.weight"
    assert torch.equal(one.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_settings_and_network_build_the_policy(simulated: Settings) -> None:
    settings = simulated(
        policy__hidden=7, policy__dropout=0.3, policy__budget_dim=6, policy__budget_low=10,
        policy__budget_high=900, policy__budget_scale=3, policy__sinusoidal=False,
    )  # fmt: skip
    world = open_world(settings, CPU, ("train", "val"))
    policy, arguments = begin(settings, world)
    assert arguments["controller"] == {
        "vision": 32, "language": 32, "budget": 6, "tiers": 3, "counts": 5, "optional": 15,
        "blocks": 16, "choices": 5, "hidden": 7, "dropout": 0.3,
    }  # fmt: skip
    assert arguments["budget_encoder"] == {
        "width": 6, "low": 10, "high": 900, "scale": 3, "sinusoidal": False
    }  # fmt: skip
    assert policy.controller.fusion[0].in_features == 21  # type: ignore[union-attr]
    shared = simulated(policy__top_k="shared")
    assert begin(shared, world)[1]["controller"]["blocks"] == 1


# Importance


def test_scores_of_importance_start_the_preference_among_blocks(
    begun: Callable[..., Policy], tmp_path: Path
) -> None:
    bias = begun().controller.block_head.bias
    scores = torch.tensor([MOLMOE[block] for block in range(1, 16)])
    assert torch.allclose(bias, (scores - scores.mean()) / scores.std(correction=0), atol=1e-6)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({str(block): 16 - block for block in range(16)}))
    bias = begun(policy__importance=path).controller.block_head.bias
    assert bias.argsort(descending=True).tolist() == list(range(15))


def test_equal_scores_prefer_no_block(begun: Callable[..., Policy], tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({str(block): 0.1 for block in range(16)}))
    bias = begun(policy__importance=path).controller.block_head.bias
    assert torch.allclose(bias, torch.zeros(15), atol=1e-4)


@pytest.mark.parametrize("blocks", ["importance", "prefix"])
def test_blocks_that_are_not_learned_have_no_preference(
    begun: Callable[..., Policy], blocks: str
) -> None:
    bias = begun(policy__blocks=blocks).controller.block_head.bias
    assert bias.abs().max().item() < 8**-0.5  # as new layers have it


# Weights of a file


@pytest.mark.parametrize("name", ["one_stage_controller_state_dict", "model_state_dict"])
def test_weights_of_a_file_are_taken(
    begun: Callable[..., Policy], tmp_path: Path, name: str
) -> None:
    given = begun(train__seed=9)
    torch.save(weights_of(given, name), tmp_path / "w.pt")
    found = begun(grpo__init_from=tmp_path / "w.pt")
    for key, value in given.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_parts_that_a_file_lacks_start_new(
    begun: Callable[..., Policy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = weights_of(begun(train__seed=9))
    del state["budget_encoder_state_dict"]
    for part in ("weight", "bias"):
        del state["one_stage_controller_state_dict"][f"count_head.{part}"]
    torch.save(state, tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        found, new = begun(grpo__init_from=tmp_path / "w.pt"), begun()
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "lacks 2 of the 30 weights of the controller, count_head.weight among them: these start"
        " new",
        "lacks 8 of the 8 weights of the budget_encoder, mlp.0.weight among them: these start new",
    ]
    given = state["one_stage_controller_state_dict"]
    for name, value in found.controller.state_dict().items():
        assert torch.equal(value, given.get(name, new.controller.state_dict()[name])), name
    for name, value in found.budget_encoder.state_dict().items():
        assert torch.equal(value, new.budget_encoder.state_dict()[name])


def test_weights_of_another_network_are_refused(
    begun: Callable[..., Policy], tmp_path: Path
) -> None:
    def refusal(state: Any) -> str:
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UserError) as error:
            begun(grpo__init_from=tmp_path / "w.pt")
        return str(error.value.message)

    wide = weights_of(begun(policy__hidden=9))
    assert "w.pt: vision_proj.0.weight is (9, 32), expected (8, 32)" in refusal(wide)
    own = weights_of(begun())
    own["one_stage_controller_state_dict"]["head.bias"] = torch.zeros(2)
    assert refusal(own).endswith("w.pt: head.bias: no such weight of the controller")
    own = weights_of(begun())
    own["one_stage_controller_state_dict"]["tier_head.bias"] = "none"
    assert "tier_head.bias is (), expected (3,)" in refusal(own)
    for nothing in ({"state_dict": {}}, {"model_state_dict": torch.ones(2)}):
        assert "holds weights under none of one_stage_controller_state_dict, " in refusal(nothing)
    with pytest.raises(UserError, match=r"gone\.pt: cannot be read"):
        begun(grpo__init_from=tmp_path / "gone.pt")


# The lookup table


@pytest.mark.parametrize(("objective", "once"), [("total", 7.5), ("prefill", 0)])
def test_a_warm_start_copies_the_table_with_what_choosing_takes(
    begun: Callable[..., Policy],
    profile_sim: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    once: float,
) -> None:
    values = {"latency__objective": objective, "policy__blocks": "importance"}
    tables = profile_sim(tmp_path / "tables", profile__what=("grid",), **values)
    (tables / "overhead.json").write_text('{"controller_ms": 7.5}')
    seen: dict[str, Any] = {}

    def clone(policy: Policy, table: Any, *given: Any, **named: Any) -> None:
        seen.update(named, table=table)
        policy.controller.tier_head.bias.data.fill_(5)

    monkeypatch.setattr(start, "clone", clone)
    policy = begun(grpo__warm_start="lut", latency__tables=str(tables), **values)
    assert set(policy.controller.tier_head.bias.tolist()) == {5}
    alone = read_table(tables / "lut.json")
    assert [row.latency for row in seen["table"].rows] == pytest.approx(
        [row.latency + once for row in alone.rows]
    )
    assert (seen["budgets"], seen["learned"], seen["steps"]) == ((100, 340), False, 2)
    assert seen["order"][:3] == (0, 1, 5)


def test_a_warm_start_without_a_table_is_refused(begun: Callable[..., Policy]) -> None:
    with pytest.raises(UserError, match="there is no lookup table") as refusal:
        begun(grpo__warm_start="lut")
    assert "--tables" in (refusal.value.hint or "")


# Budgets


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, False),
        ({"budget__low": 49.0}, True),
        ({"budget__high": 501.0}, True),
        ({"budget__low": 4.0, "budget__high": 9.0, "policy__budget_low": 3.0}, False),
    ],
    ids=str,
)
def test_budgets_beyond_the_code_are_warned_about(
    begun: Callable[..., Policy],
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    warned: bool,
) -> None:
    with caplog.at_level(logging.WARNING):
        begun(**values)
    assert ("the controller tells apart those from policy.budget_low" in caplog.text) == warned
