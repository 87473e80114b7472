import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.taskmoe.align import GROUPS, permute
from moectl.taskmoe.merge import Report, assemble, recalibrate, step_zero
from moectl.taskmoe.model import LAYERS, MergedMoE, Specialist

WIDTH = 4
FEATURES = 8 * WIDTH
IMAGES = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DISJOINT = [[0, 1], [2, 3], [4, 5]]
CHAIN = [[0, 1, 2], [2, 3, 4], [4, 5, 0]]  # classes 0, 2 and 4 have two owners
KEPT: dict[str, Any] = {"method": "average", "bn": "average"}


def noisy_norms(network: nn.Module) -> None:
    """Give batch norm statistics and weights that matter."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)


def make_specialist(seed: int, classes: int = 2, width: int = WIDTH) -> Specialist:
    """An untrained network without dead channels."""
    torch.manual_seed(seed)
    network = Specialist(classes, width=width)
    noisy_norms(network)
    nn.init.normal_(network.classifier[3].weight)
    nn.init.normal_(network.classifier[3].bias)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the statistics become those of one batch
    with torch.no_grad():
        network.train()(IMAGES)
    return network.eval()


def three(**more: int) -> list[Specialist]:
    return [make_specialist(seed, **more) for seed in range(3)]


def mixture(experts: int = 3, classes: int = 6, **more: Any) -> MergedMoE:
    torch.manual_seed(100)
    given = {"width": WIDTH, "gating_feature_dim": 8, "temperature": 2.0, **more}
    model = MergedMoE(classes=classes, num_experts=experts, **given)
    noisy_norms(model)
    return model.eval()


def owners_of(rows: list[list[int]]) -> Tensor:
    owners = torch.zeros(1 + max(map(max, rows)), len(rows))
    for expert, classes in enumerate(rows):
        owners[classes, expert] = 1
    return owners


def merge(
    model: MergedMoE, specialists: list[Specialist], rows: list[list[int]], **options: Any
) -> Report:
    return assemble(model, specialists, owners_of(rows), rows, **options)


def forced(expert: int, experts: int, images: int) -> Tensor:
    return torch.eye(experts)[expert].expand(images, -1)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def take_extractor(model: MergedMoE, specialist: Specialist, shared_until: str = "conv2") -> None:
    for layer in list(LAYERS)[: list(LAYERS).index(shared_until) + 1]:
        stage = model.feature_extractor[LAYERS[layer]]
        stage.load_state_dict(specialist.get_submodule(layer).state_dict())


@pytest.mark.parametrize("shared_until", LAYERS)
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_a_mixture_with_the_extractor_of_a_specialist_is_that_specialist(
    experts: int, shared_until: str
) -> None:
    rows = DISJOINT[:experts]
    specialists = [make_specialist(seed) for seed in range(experts)]
    model = mixture(experts, 2 * experts, shared_until=shared_until)
    merge(model, specialists, rows, method="none", bn="average")
    for number, specialist in enumerate(specialists):
        take_extractor(model, specialist, shared_until)
        with torch.no_grad():
            logits = model(IMAGES, gates=forced(number, experts, len(IMAGES))).logits
            expected = specialist(IMAGES)
        torch.testing.assert_close(logits[:, rows[number]], expected, rtol=1e-5, atol=1e-5)


def test_heads_of_a_logit_mixture_are_the_specialists_raised_by_2() -> None:
    rows = DISJOINT
    specialists = three()
    model = mixture(combine="logits")
    merge(model, specialists, rows, method="none", bn="average")
    take_extractor(model, specialists[1])
    with torch.no_grad():
        logits = model(IMAGES, gates=forced(1, 3, len(IMAGES))).logits
        expected = specialists[1](IMAGES)
    torch.testing.assert_close(logits[:, rows[1]], expected + 2, rtol=1e-5, atol=1e-5)
    foreign = logits[:, rows[0] + rows[2]]
    assert (foreign + 3).abs().max() < 1  # bias -3 and rows near zero
    assert (foreign + 3).abs().max() > 0


def test_rows_of_a_shared_class_are_the_mean_of_its_owners() -> None:
    specialists, model = three(classes=3), mixture()
    merge(model, specialists, CHAIN, **KEPT)
    weights = [specialist.classifier[3].weight for specialist in specialists]
    biases = [specialist.classifier[3].bias for specialist in specialists]
    weight, bias = model.classifier.weight, model.classifier.bias
    torch.testing.assert_close(weight[2, :FEATURES], (weights[0][2] + weights[1][0]) / 2)
    torch.testing.assert_close(weight[0, :FEATURES], (weights[0][0] + weights[2][2]) / 2)
    torch.testing.assert_close(weight[3, :FEATURES], weights[1][1])
    torch.testing.assert_close(bias[4], (biases[1][2] + biases[2][0]) / 2)
    torch.testing.assert_close(bias[5], biases[2][1])
    assert not weight[:, FEATURES:].any()
    assert weight.shape[1] == FEATURES + 8


def test_rows_follow_the_order_of_the_specialists_own_classes() -> None:
    rows = [[3, 0], [1, 2]]
    specialists = [make_specialist(seed) for seed in range(2)]
    model = mixture(2, 4)
    merge(model, specialists, rows, **KEPT)
    own = specialists[0].classifier[3].weight
    torch.testing.assert_close(model.classifier.weight[[3, 0], :FEATURES], own)


def shuffled_copies(base: Specialist) -> list[Specialist]:
    draws = torch.Generator().manual_seed(5)
    sizes = dict(zip(GROUPS, [WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH, 8 * WIDTH], strict=True))
    copies = [base]
    for _ in range(2):
        orders = {name: torch.randperm(size, generator=draws) for name, size in sizes.items()}
        copies.append(copy.deepcopy(base))
        copies[-1].load_state_dict(permute(base.state_dict(), orders))
    return copies


@pytest.mark.parametrize("shared_until", LAYERS)
def test_aligned_copies_of_one_network_merge_into_that_network(shared_until: str) -> None:
    specialists = shuffled_copies(make_specialist(3))
    model = mixture(shared_until=shared_until)
    report = merge(model, specialists, DISJOINT, method="align", bn="average", images=IMAGES)
    with torch.no_grad():
        for number, rows in enumerate(DISJOINT):
            logits = model(IMAGES, gates=forced(number, 3, len(IMAGES))).logits[:, rows]
            torch.testing.assert_close(logits, specialists[0](IMAGES), rtol=1e-5, atol=1e-5)
    groups = {"conv1": 1, "residual1": 2, "residual2": 4, "conv2": 5}[shared_until]
    assert [list(gains) for gains in report.correlations] == [list(GROUPS)[:groups]] * 2
    for gains in report.correlations:
        assert all(gain.after == pytest.approx(1, abs=1e-5) for gain in gains.values())
        assert all(gain.before < 0.9 for gain in gains.values())
    assert max(max(values) for values in report.distances.values()) < 1e-6


def test_plain_averages_of_shuffled_copies_are_another_network() -> None:
    specialists, model = shuffled_copies(make_specialist(3)), mixture()
    report = merge(model, specialists, DISJOINT, **KEPT)
    with torch.no_grad():
        logits = model(IMAGES, gates=forced(0, 3, len(IMAGES))).logits[:, :2]
        assert (logits - specialists[0](IMAGES)).abs().max() > 0.1
    assert report.correlations == []
    assert min(report.distances["conv2"]) > 0.1


def test_the_average_takes_parameters_and_buffers_of_all() -> None:
    specialists, model = three(), mixture()
    merge(model, specialists, DISJOINT, **KEPT)
    for key, value in model.feature_extractor[0].state_dict().items():
        if value.is_floating_point():
            each = torch.stack([s.conv1.state_dict()[key] for s in specialists])
            torch.testing.assert_close(value, each.mean(0))


def test_first_takes_the_shared_layers_of_the_first_specialist() -> None:
    specialists, model = three(), mixture()
    merge(model, specialists, DISJOINT, method="first", bn="average")
    for layer, place in LAYERS.items():
        own = specialists[0].get_submodule(layer).state_dict()
        assert same(model.feature_extractor[place], own)


def test_what_is_left_random_stays_as_initialised() -> None:
    specialists, model = three(), mixture()
    parts = (model.feature_extractor, model.classifier, model.gating_network)
    before = [snapshot(part) for part in parts]
    merge(model, specialists, DISJOINT, method="none", bn="average", classifier_init="random")
    assert all(same(part, state) for part, state in zip(parts, before, strict=True))
    inner = list(model.experts[2].state_dict().values())
    own = list(specialists[2].conv3.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(inner, own, strict=True))


def test_specialists_are_never_written_to() -> None:
    specialists = three()
    before = [snapshot(specialist) for specialist in specialists]
    merge(mixture(), specialists, DISJOINT, images=IMAGES)
    assert all(same(s, state) for s, state in zip(specialists, before, strict=True))


def test_reset_leaves_statistics_of_0_and_1_in_the_shared_layers() -> None:
    specialists, model = three(), mixture()
    merge(model, specialists, DISJOINT, method="average", bn="reset")
    norms = [m for m in model.feature_extractor.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 5
    assert not any(norm.running_mean.any() for norm in norms)
    assert all((norm.running_var == 1).all() for norm in norms)


def test_recalibration_is_the_mean_of_the_statistics_of_the_batches() -> None:
    model, batches = mixture(), IMAGES.split(12)
    reference = copy.deepcopy(model.feature_extractor).train()
    expected: dict[str, list[Tensor]] = {}
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the running statistics are those of the latest batch
    for batch in batches:
        reference(batch)
        for key, value in reference.state_dict().items():
            if "running" in key:
                expected.setdefault(key, []).append(value.clone())
    recalibrate(model, batches)
    found = model.feature_extractor.state_dict()
    assert len(expected) == 10
    for key, values in expected.items():
        torch.testing.assert_close(found[key], torch.stack(values).mean(0))


def test_recalibration_gives_normalised_channels() -> None:
    model = mixture()
    recalibrate(model, [IMAGES])
    seen = model.feature_extractor[0].conv(IMAGES)
    norm = model.feature_extractor[0].bn
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))


def test_recalibration_changes_nothing_but_the_shared_statistics() -> None:
    model = mixture().train()
    model.feature_extractor[0].eval()
    before = snapshot(model)
    recalibrate(model, IMAGES.split(16))
    for key, value in model.state_dict().items():
        measured = key.startswith("feature_extractor") and ("running" in key or "tracked" in key)
        assert torch.equal(value, before[key]) != measured, key
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)
    assert model.training
    assert model.feature_extractor[1].training
    assert not model.feature_extractor[0].bn.training


def test_recalibration_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="none were given"):
        recalibrate(mixture(), [])


def test_the_default_measures_the_statistics_on_the_images() -> None:
    model, again = mixture(), mixture()
    merge(model, three(), DISJOINT, method="average", images=IMAGES)
    merge(again, three(), DISJOINT, **KEPT)
    recalibrate(again, [IMAGES])
    assert same(model, again.state_dict())


def test_batches_of_sorted_images_are_alike() -> None:
    images = torch.linspace(-2, 2, 160)[:, None, None, None] + IMAGES[:1]
    specialists, model = three(), mixture()
    merge(model, specialists, DISJOINT, images=images)
    norm = model.feature_extractor[0].bn
    seen = model.feature_extractor[0].conv(images).detach()
    # Batches from one end each would have a quarter of the variance between the images.
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=0.01, atol=0)
    assert norm.num_batches_tracked == 2


def gate_inputs(model: MergedMoE, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.gating_network.gate_net[-1].register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("combine", ["features", "logits"])
def test_prototype_gates_prefer_the_nearest_mean_of_the_owners(combine: str) -> None:
    specialists = three(classes=3)
    labels, owners = torch.arange(len(IMAGES)) % 6, owners_of(CHAIN)
    model = mixture(combine=combine)
    images = IMAGES + torch.eye(3)[labels // 2][..., None, None]
    merge(model, specialists, CHAIN, gate_init="prototype", images=images, labels=labels)
    inputs = gate_inputs(model, images)
    means = torch.stack([inputs[owners[labels, j] > 0].mean(0) for j in range(3)])
    distances = torch.cdist(inputs, means).square()
    with torch.no_grad():
        gate_logits = model(images).gate_logits
    ratio = (gate_logits[:, 0] - gate_logits[:, 1]) / (distances[:, 1] - distances[:, 0])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-2, atol=1e-4)
    assert ratio[0] > 0
    assert torch.equal(gate_logits.argmax(1), distances.argmin(1))
    assert torch.equal(model.gating_network.gate_net[1].num_batches_tracked, torch.tensor(1))
    weight = model.gating_network.gate_net[-1].weight.detach()
    rises = means - inputs.mean(0)
    torch.testing.assert_close((weight * rises).sum(1).mean(), torch.tensor(4.0))
    torch.testing.assert_close(weight / weight.norm(), rises / rises.norm())


def test_one_specialist_can_have_a_prototype_gate() -> None:
    model, labels = mixture(1, 2), torch.arange(len(IMAGES)) % 2
    options = {"gate_init": "prototype", "images": IMAGES, "labels": labels}
    merge(model, [make_specialist(0)], [[0, 1]], **options)
    with torch.no_grad():
        assert torch.equal(model(IMAGES).gates, torch.ones(len(IMAGES), 1))


def test_the_parameter_table_adds_up() -> None:
    specialists, model = three(), mixture()
    report = merge(model, specialists, DISJOINT, **KEPT)
    table = dict(report.parameters)
    total, before = table.pop("total"), table.pop("specialists")
    assert total == sum(table.values()) == sum(p.numel() for p in model.parameters())
    assert before == 3 * sum(p.numel() for p in specialists[0].parameters())
    assert {"feature_extractor", "experts", "gating_network", "classifier"} <= table.keys()


def test_arguments_that_do_not_fit_are_refused() -> None:
    owners, rows = owners_of(DISJOINT), [[0, 1], [2, 3], [4, 3]]
    wider = torch.cat([owners, torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="2 specialists, 3 lists of rows"):
        assemble(mixture(), three()[:2], owners, DISJOINT, **KEPT)
    with pytest.raises(ValueError, match=r"specialist 3: .*\[4, 3\].*\[4, 5\]"):
        assemble(mixture(), three(), owners, rows, **KEPT)
    with pytest.raises(ValueError, match="classes without any specialist"):
        assemble(mixture(classes=7), three(), wider, DISJOINT, **KEPT)
    with pytest.raises(ValueError, match="images are needed"):
        merge(mixture(), three(), DISJOINT, method="average")
    with pytest.raises(ValueError, match="images and labels"):
        merge(mixture(), three(), DISJOINT, gate_init="prototype", images=IMAGES, **KEPT)


def test_other_widths_are_refused_with_the_layer_and_shapes() -> None:
    wide = three(width=5)
    with pytest.raises(ValueError, match=r"conv1\.conv\.weight of shape \(5, 3, 3, 3\).*\(4, 3,"):
        merge(mixture(), wide, DISJOINT, **KEPT)
    with pytest.raises(ValueError, match=r"\(.*\) in state 1 and \(.*\) in state 2"):
        merge(mixture(), [make_specialist(0), *wide[1:]], DISJOINT, **KEPT)


def test_step_zero_counts_what_a_loop_counts() -> None:
    specialists = three(classes=3)
    model, owners = mixture().train(), owners_of(CHAIN)
    labels = torch.arange(len(IMAGES)) % 6
    merge(model, specialists, CHAIN, images=IMAGES)
    found = step_zero(model, IMAGES, labels, owners)
    assert model.training
    model.eval()
    union, own = 0, [[], [], []]
    with torch.no_grad():
        for image, label in zip(IMAGES[:, None], labels, strict=True):
            union += int(model(image).logits.argmax() == label)
            for expert in range(3):
                if label in CHAIN[expert]:
                    logits = model(image, gates=forced(expert, 3, 1)).logits[0]
                    best = max(CHAIN[expert], key=lambda c, z=logits: float(z[c]))
                    own[expert].append(best == int(label))
    assert found["images"] == 48
    assert found["union_accuracy"] == pytest.approx(union / 48)
    assert found["own_accuracy"] == pytest.approx([sum(hits) / len(hits) for hits in own])
    assert found["union_chance"] == pytest.approx(1 / 6)
    assert found["own_chance"] == pytest.approx([1 / 3] * 3)
    assert step_zero(model, IMAGES.split(7), labels, owners) == found


def test_step_zero_finds_a_specialist_that_is_always_right() -> None:
    specialist, model = make_specialist(0, 3), mixture(2, 6)
    rows = [[0, 1, 2], [3, 4, 5]]
    merge(model, [specialist, make_specialist(1, 3)], rows, method="first", bn="average")
    with torch.no_grad():
        labels = specialist(IMAGES).argmax(1)
    found = step_zero(model, IMAGES, labels, owners_of(rows))
    assert found["own_accuracy"] == [1.0, None]
