"""Plans that really run, and networks that come back from them unchanged."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.controller import tiny
from moectl.controller.apply import applied, routers
from moectl.controller.plans import Plan, Space, Tier, top_k_choices

SPACE = Space(
    blocks=6,
    mixtures=(True,) * 6,
    default_top_k=8,
    top_k_choices=top_k_choices(8),
    always_on=(0,),
    min_active=3,
    max_active=6,
    tiers=(Tier("low", 1, 3, 3),),
)
FULL = SPACE.full
SKIP = Plan("low", (True, True, False, True, False, True), (8,) * 6)
MIXED = Plan("low", (True, True, False, True, True, True), (8, 4, 5, 6, 7, 4))
IDS = torch.arange(10, 30)[None]


@pytest.fixture(scope="module")
def text() -> Any:
    model, _ = tiny.build("nano")
    network = model.model.language_model
    network.set_experts_implementation("eager")
    return network


@torch.no_grad()
def run(text: Any, ids: Tensor = IDS) -> Tensor:
    return text(input_ids=ids, use_cache=False).last_hidden_state


def state(text: Any) -> list[tuple[str, dict[str, Any]]]:
    """Everything that modules hold beside weights and children."""
    plain = (int, float, str, bool, type(None))
    return [
        (
            name,
            {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, plain) or key in ("forward", "_plan_applied")
            },
        )
        for name, module in text.named_modules()
    ]


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_a_network_comes_back_bit_equal_from_a_plan_that_changed_it(
    text: Any, experts: str
) -> None:
    text.set_experts_implementation(experts)
    before, facts = run(text), state(text)
    with applied(text.layers, MIXED, SPACE):
        assert not torch.equal(run(text), before)
    assert torch.equal(run(text), before)
    assert state(text) == facts
    text.set_experts_implementation("eager")


def test_a_network_comes_back_after_an_exception(text: Any) -> None:
    before, facts = run(text), state(text)
    with pytest.raises(ZeroDivisionError), applied(text.layers, MIXED, SPACE):
        raise ZeroDivisionError
    assert torch.equal(run(text), before)
    assert state(text) == facts


def test_the_full_plan_changes_nothing(text: Any) -> None:
    before = run(text)
    with applied(text.layers, FULL, SPACE):
        assert torch.equal(run(text), before)


def test_skipping_is_the_network_without_those_blocks(text: Any) -> None:
    model, _ = tiny.build("nano")
    shorter = model.model.language_model
    shorter.set_experts_implementation("eager")
    shorter.layers = nn.ModuleList(shorter.layers[block] for block in SKIP.blocks)
    shorter.config.num_hidden_layers = len(SKIP.blocks)
    with applied(text.layers, SKIP, SPACE):
        assert torch.equal(run(text), run(shorter))


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_every_token_is_routed_to_as_many_experts_as_the_plan_says(
    family: tiny.Text, experts: str
) -> None:
    model, _ = tiny.build("nano", family)
    network = model.model.language_model
    network.set_experts_implementation(experts)
    counts: dict[int, set[int]] = {}
    for block, layer in enumerate(network.layers):

        def count(_: Any, inputs: tuple[Tensor, ...], block: int = block) -> None:
            chosen = nn.functional.one_hot(inputs[1], 16).sum(1)  # (tokens, experts)
            assert chosen.max() == 1
            counts.setdefault(block, set()).update(chosen.sum(1).tolist())

        layer.mlp.experts.register_forward_pre_hook(count)
    with applied(network.layers, MIXED, SPACE):
        run(network)
    assert counts == {block: {MIXED.top_k[block]} for block in MIXED.blocks}


def test_the_configuration_is_left_alone(text: Any) -> None:
    with applied(text.layers, MIXED, SPACE):
        assert text.config.num_experts_per_tok == 8
        assert len(text.layers) == 6


def test_a_plan_inside_a_plan_is_refused_and_the_outer_one_stays(text: Any) -> None:
    before = run(text)
    with applied(text.layers, SKIP, SPACE):
        inside = run(text)
        with pytest.raises(RuntimeError, match="applied to this network already"):
            applied(text.layers, MIXED, SPACE).__enter__()
        assert torch.equal(run(text), inside)
    assert torch.equal(run(text), before)


def test_a_full_plan_inside_a_full_plan_is_refused_too(text: Any) -> None:
    with (
        applied(text.layers, FULL, SPACE),
        pytest.raises(RuntimeError, match="already"),
        applied(text.layers, FULL, SPACE),
    ):
        pass


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (replace(FULL, tier="huge"), "tier huge"),
        (replace(FULL, active=(False, *FULL.active[1:])), "block 0 always runs"),
        (replace(FULL, top_k=(8, 3, 8, 8, 8, 8)), "top_k = 3"),
    ],
)
def test_a_plan_of_another_space_changes_nothing(text: Any, plan: Plan, words: str) -> None:
    facts = state(text)
    with pytest.raises(ValueError, match=words):
        applied(text.layers, plan, SPACE).__enter__()
    assert state(text) == facts


def test_blocks_that_are_not_the_space_s_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="5 blocks in the network: expected 6"):
        applied(text.layers[:5], FULL, SPACE).__enter__()
    with pytest.raises(ValueError, match="block 0 has no number of experts"):
        applied([nn.Linear(2, 2) for _ in range(6)], FULL, SPACE).__enter__()


class Twofold(nn.Module):
    """A block that keeps its number of experts in two places, as some families do."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 8
        self.gate: Any = nn.Linear(2, 2)
        self.gate.top_k = 8
        self.act: Any = nn.Identity()
        self.act.top_k = True  # not a number of experts

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states + self.top_k * mask


def test_every_place_that_holds_the_number_is_set() -> None:
    layers = [Twofold() for _ in range(6)]
    with applied(layers, MIXED, SPACE):
        for block in MIXED.blocks:
            assert layers[block].top_k == layers[block].gate.top_k == MIXED.top_k[block]
            assert layers[block].act.top_k is True
    assert all(layer.top_k == layer.gate.top_k == 8 for layer in layers)
    assert len(routers(layers[0])) == 2


def test_a_skipped_block_hands_on_what_it_gets_by_place_or_by_name() -> None:
    layers: list[Any] = [Twofold() for _ in range(6)]
    layers[2].forward = lambda hidden_states, mask: hidden_states - mask  # of somebody else
    own, x = layers[2].forward, torch.ones(3)
    with applied(layers, SKIP, SPACE):
        assert layers[2](x, x) is x
        assert layers[2](hidden_states=x, mask=x) is x
        assert torch.equal(layers[0](x, mask=x), 9 * x)
    assert layers[2].forward is own
    assert "forward" not in vars(layers[4])


def test_blocks_without_experts_keep_what_they_have() -> None:
    space = replace(SPACE, mixtures=(False,) * 6, default_top_k=0, top_k_choices=())
    layers = [nn.Linear(2, 2) for _ in range(6)]
    x = torch.ones(2)
    plan = Plan("low", SKIP.active, (0,) * 6)
    with applied(layers, plan, space):
        assert layers[4](x) is x
        assert torch.equal(layers[1](x), nn.functional.linear(x, layers[1].weight, layers[1].bias))
