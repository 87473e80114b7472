import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.taskmoe.align import GROUPS, average, evaluating, match, permute, renormalise
from moectl.taskmoe.model import Specialist

CHANNELS = {"P1": 6, "P2": 12, "P3": 24, "P4": 24, "P5": 48}
IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def specialist(seed: int = 0, width: int = 6) -> Specialist:
    """An untrained network without dead channels, in which every entry of batch norm matters."""
    torch.manual_seed(seed)
    network = Specialist(3, width=width)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0  # the statistics become those of one batch
    with torch.no_grad():
        network.train()(IMAGES)
    return network.eval()


def orders(seed: int = 1) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(size, generator=draws) for name, size in CHANNELS.items()}


def with_state(state: dict[str, Tensor]) -> Specialist:
    network = Specialist(3, width=6)
    network.load_state_dict(state)
    return network.eval()


@pytest.mark.parametrize("groups", [*[[name] for name in GROUPS], list(GROUPS)])
def test_a_permuted_network_gives_the_same_outputs(groups: list[str]) -> None:
    network, permutations = specialist(), orders()
    state = permute(network.state_dict(), {name: permutations[name] for name in groups})
    with torch.no_grad():
        torch.testing.assert_close(with_state(state)(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(GROUPS))
def test_every_group_moves_the_channels_of_its_layer(name: str) -> None:
    network, order = specialist(), orders()[name]
    moved = with_state(permute(network.state_dict(), {name: order}))
    seen: list[Tensor] = []
    for either in (network, moved):
        layer = either.get_submodule(GROUPS[name].layer)
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.no_grad():
            either(IMAGES[:4])
    torch.testing.assert_close(seen[1], seen[0][:, order], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen[1], seen[0])


def test_permuting_back_restores_every_entry_and_writes_to_none() -> None:
    state = specialist().state_dict()
    before = copy.deepcopy(state)
    permutations = orders()
    back = {name: order.argsort() for name, order in permutations.items()}
    restored = permute(permute(state, permutations), back)
    assert restored.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(restored[key], value), key
        assert torch.equal(state[key], value), key


def test_indices_that_are_no_permutation_are_refused_with_the_layer() -> None:
    state = specialist().state_dict()
    with pytest.raises(ValueError, match=r"conv1\.conv\.weight of shape \(6, 3, 3, 3\)"):
        permute(state, {"P1": torch.tensor([0, 1, 2, 3, 4, 4])})
    with pytest.raises(ValueError, match="24 channels"):
        permute(state, {"P3": torch.arange(6)})
    with pytest.raises(ValueError, match="no channel group 'P6'"):
        permute(state, {"P6": torch.arange(6)})


FACTOR, ADDEND = torch.tensor([0.5, 1.5, -2.0]), torch.tensor([0.3, -0.7, 1.1])


def as_before(images: Tensor) -> Tensor:
    return images * FACTOR.view(3, 1, 1) + ADDEND.view(3, 1, 1)


def test_a_factor_alone_is_taken_over_exactly() -> None:
    network = specialist()
    changed = with_state(renormalise(network.state_dict(), FACTOR, torch.zeros(3)))
    with torch.no_grad():
        expected = network(IMAGES * FACTOR.view(3, 1, 1))
        assert not torch.allclose(network(IMAGES), expected, atol=1e-3)
        torch.testing.assert_close(changed(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_an_addend_is_taken_over_everywhere_but_at_the_border() -> None:
    network = specialist()
    changed = with_state(renormalise(network.state_dict(), FACTOR, ADDEND))
    with torch.no_grad():
        found, expected = changed.conv1(IMAGES), network.conv1(as_before(IMAGES))
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, expected, atol=1e-2)


def test_at_the_border_the_zeros_around_an_image_stay_zeros() -> None:
    network = specialist()
    changed = with_state(renormalise(network.state_dict(), FACTOR, ADDEND))
    framed = as_before(F.pad(IMAGES, (1, 1, 1, 1)))
    block = network.conv1
    with torch.no_grad():
        expected = F.relu(block.bn(F.conv2d(framed, block.conv.weight)))
        torch.testing.assert_close(changed.conv1(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_renormalising_back_restores_the_network_and_writes_to_none() -> None:
    state = specialist().state_dict()
    before = copy.deepcopy(state)
    there = renormalise(state, FACTOR, ADDEND)
    back = renormalise(there, 1 / FACTOR, -ADDEND / FACTOR)
    assert all(torch.equal(state[key], value) for key, value in before.items())
    changed = {key for key, value in there.items() if not torch.equal(value, before[key])}
    assert changed == {"conv1.conv.weight", "conv1.bn.running_mean"}
    torch.testing.assert_close(back, before)


def test_matching_a_permuted_copy_recovers_the_permutation() -> None:
    network, permutations = specialist(), orders()
    shuffled = with_state(permute(network.state_dict(), permutations))
    found, correlations = match(network, shuffled, IMAGES)
    assert found.keys() == CHANNELS.keys()
    for name, order in permutations.items():
        assert torch.equal(order[found[name]], torch.arange(CHANNELS[name])), name
        assert correlations[name].after == pytest.approx(1, abs=1e-5)
        assert correlations[name].before < 0.9
    restored = permute(shuffled.state_dict(), found)
    assert all(torch.equal(restored[key], value) for key, value in network.state_dict().items())


def test_matching_gains_on_networks_of_other_seeds_what_the_correlations_say() -> None:
    first, second = specialist(0), specialist(1)
    found, correlations = match(first, second, IMAGES, ["P2"])
    with torch.no_grad():
        a, b = (net.residual1(net.conv1(IMAGES)) for net in (first, second))
    a, b = (x.transpose(0, 1).flatten(1) for x in (a, b))
    matrix = torch.corrcoef(torch.cat([a, b]))[:12, 12:].nan_to_num(0.0)
    assert correlations["P2"].before == pytest.approx(float(matrix.diagonal().mean()), abs=1e-4)
    chosen = matrix[torch.arange(12), found["P2"]]
    assert correlations["P2"].after == pytest.approx(float(chosen.mean()), abs=1e-4)
    assert correlations["P2"].after > correlations["P2"].before


def test_a_dead_channel_correlates_with_nothing() -> None:
    network = specialist()
    nn.init.constant_(network.conv1.bn.bias[:1].detach(), -100.0)
    _, correlations = match(network, network, IMAGES, ["P1"])
    assert correlations["P1"].after == pytest.approx(5 / 6, abs=1e-5)


def test_matching_leaves_mode_and_weights_as_they_were() -> None:
    first, second = specialist(0).train(), specialist(1)
    before = copy.deepcopy(first.state_dict())
    match(first, second, IMAGES[:8])
    assert first.training
    assert first.conv1.training
    assert not second.training
    assert all(torch.equal(first.state_dict()[key], value) for key, value in before.items())
    assert not first.conv1._forward_hooks


def test_networks_of_unequal_width_are_refused_with_layer_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"conv1 gives \(8, 6, 16, 16\).*\(8, 4, 16, 16\)"):
        match(specialist(), specialist(width=4), IMAGES[:8])
    with pytest.raises(ValueError, match="none were given"):
        match(specialist(), specialist(), IMAGES[:0])


def test_the_average_of_two_networks_is_the_mean_of_every_entry() -> None:
    first, second = specialist(0).state_dict(), specialist(1).state_dict()
    second["conv1.bn.num_batches_tracked"] = torch.tensor(4)
    merged = average([first, second])
    assert merged["conv1.bn.num_batches_tracked"] == 2
    assert merged["conv1.bn.num_batches_tracked"].dtype == torch.int64
    for key, value in merged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[key] + second[key]) / 2)


def test_the_average_of_one_network_is_itself() -> None:
    state = specialist().state_dict()
    for bn in ("average", "pooled"):
        merged = average([state], bn)
        assert all(torch.equal(merged[key], value) for key, value in state.items())
        assert merged["conv1.conv.weight"] is not state["conv1.conv.weight"]


def test_pooled_statistics_are_those_of_all_inputs_together() -> None:
    inputs = [torch.randn(500, 3) * scale + shift for scale, shift in ((1, 0), (2, 3), (0.5, -4))]
    states = [
        {"bn.running_mean": x.mean(0), "bn.running_var": x.var(0, correction=0)} for x in inputs
    ]
    merged, together = average(states, "pooled"), torch.cat(inputs)
    torch.testing.assert_close(merged["bn.running_mean"], together.mean(0))
    torch.testing.assert_close(merged["bn.running_var"], together.var(0, correction=0))
    assert (average(states)["bn.running_var"] < merged["bn.running_var"]).all()


def test_reset_statistics_are_0_and_1() -> None:
    merged = average([specialist(0).state_dict(), specialist(1).state_dict()], "reset")
    fresh = Specialist(3, width=6).state_dict()
    for key, value in merged.items():
        if "running" in key or "tracked" in key:
            assert torch.equal(value, fresh[key])


def test_states_that_differ_are_refused_with_the_entry_and_shapes() -> None:
    wide, narrow = specialist().state_dict(), specialist(width=4).state_dict()
    with pytest.raises(ValueError, match=r"is \(.*\) in state 1 and \(.*\) in state 2"):
        average([wide, narrow])
    short = {key: value for key, value in wide.items() if key != "conv1.bn.bias"}
    with pytest.raises(ValueError, match=r"conv1\.bn\.bias is \(6,\) in state 1 and absent"):
        average([wide, short])
    with pytest.raises(ValueError, match="no states"):
        average([])


def test_every_module_returns_to_its_own_mode() -> None:
    network = specialist().train()
    network.conv1.eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert network.training
    assert not network.conv1.bn.training
    assert network.conv2.bn.training
