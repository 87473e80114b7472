"""The networks: sizes and names, gates, parts of the logits, equality with plain forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.taskmoe.model import (
    LAYERS,
    MergedMoE,
    ReluDropoutMean,
    Specialist,
    load_original,
    multiply_adds,
)

OPTIONS = [{}, {"combine": "logits"}, {"gating_feature_dim": 0}, {"shared_until": "residual1"}]


def on_meta(make, *values, **options):
    with torch.device("meta"):
        return make(*values, **options)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(**options) -> MergedMoE:
    """Untrained, but with gates and running statistics that differ between experts."""
    torch.manual_seed(0)
    model = MergedMoE(**{"classes": 6, "width": 4, "gating_feature_dim": 8, **options})
    nn.init.normal_(model.gating_network.gate_net[-1].weight)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def pictures(count: int = 6, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


NORM = [f".{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def norms(*names: str) -> set[str]:
    return {name + entry for name in names for entry in NORM}


def test_specialist_has_the_published_sizes_and_names():
    model = on_meta(Specialist, 5)
    parts = [1_856, 82_176, 918_528, 132_096, 267_776, 2_565]
    assert [size(child) for child in model.children()] == parts
    buffers = sum(b.numel() for b in model.buffers())
    assert (size(model), buffers) == (1_404_997, 3_462)
    paths = [f"residual{path}" for path in ("1.main_path.0", "2.main_path.0", "2.main_path.1")]
    blocks = ["conv1", "conv2", *paths]
    others = ["residual1.shortcut", "residual2.shortcut", "classifier.3"]
    others += ["conv3.0.depthwise", "conv3.0.pointwise", *(f"{block}.conv" for block in blocks)]
    expected = {f"{name}.weight" for name in others} | {"classifier.3.bias"}
    expected |= norms("conv3.0.bn", *(f"{block}.bn" for block in blocks))
    assert set(model.state_dict()) == expected
    assert len(expected) == 41


@pytest.mark.parametrize(("classes", "total"), [(15, 2_280_274), (12, 2_277_967)])
def test_mixture_has_the_published_size(classes, total):
    model = on_meta(MergedMoE, classes=classes)
    assert size(model) == total
    assert size(model.feature_extractor) == 1_134_656
    assert [size(expert) for expert in model.experts] == [267_776] * 3
    assert size(model.gating_network.feature_net) == 198_144
    assert size(model.gating_network.gate_net) == 132_611
    assert size(model.classifier) == 769 * classes
    assert sum(b.numel() for b in model.buffers()) == 7_051 + 1  # the temperature


def test_mixture_of_logits_has_the_published_size():
    model = on_meta(MergedMoE, classes=15, combine="logits")
    assert size(model) == 2_093_680
    assert [size(head) for head in model.heads] == [513 * 15] * 3


def test_mixture_has_the_published_names_and_a_temperature():
    expected = {"temperature", "classifier.weight", "classifier.bias"}
    for name in on_meta(Specialist, 5).state_dict():
        layer, rest = name.split(".", 1)
        if layer in LAYERS:
            expected.add(f"feature_extractor.{LAYERS[layer]}.{rest}")
    for expert in range(3):
        expected |= {f"experts.{expert}.{n}.weight" for n in (0, 1)} | norms(f"experts.{expert}.2")
    for net, places in (("feature_net", (1, 5)), ("gate_net", (1,))):
        stem = f"gating_network.{net}"
        expected |= {f"{stem}.{n}.{kind}" for n in (0, 4) for kind in ("weight", "bias")}
        expected |= norms(*(f"{stem}.{place}" for place in places))
    assert set(on_meta(MergedMoE, classes=15).state_dict()) == expected
    assert len(expected) == 78 + 1


@pytest.mark.parametrize("shared_until", LAYERS)
def test_experts_own_what_the_trunk_does_not_have(shared_until):
    model = on_meta(MergedMoE, classes=15, shared_until=shared_until)
    specialist = on_meta(Specialist, 5)
    depth = [*LAYERS].index(shared_until) + 1
    layers = [size(child) for child in specialist.children()][:-1]  # without the classifier
    assert size(model.feature_extractor) == sum(layers[:depth])
    assert {size(expert) for expert in model.experts} == {sum(layers[depth:])}
    assert model.gating_network.gate_net[0].in_features == 32 * 2**depth


@pytest.mark.parametrize(
    ("side", "total", "extractor"),
    [(32, 380_481_536, 328_925_184), (64, 1_520_906_240, 1_315_700_736)],
)
def test_multiply_adds(side, total, extractor):
    counts = multiply_adds(on_meta(MergedMoE, classes=15), side)
    assert counts["feature_extractor"] == extractor
    assert sum(counts.values()) == total
    assert counts["experts"] == 3 * 512 * (9 + 512) * (side // 4) ** 2


def test_all_experts_and_heads_are_counted_and_the_model_left_alone():
    counts = multiply_adds(model := tiny(top_k=1, combine="logits"), 8)
    assert counts["heads"] == 3 * 32 * 6
    assert counts["experts"] == 3 * 32 * (9 + 32) * 4
    assert (model.training, model.top_k) == (True, 1)
    assert not any(module._forward_hooks for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_initial_weights():
    torch.manual_seed(0)
    model = MergedMoE(classes=15, width=16)
    conv = model.feature_extractor[3].main_path[1].conv.weight
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    gate = model.gating_network.gate_net[-1]
    assert gate.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert not gate.bias.any()
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


def plain_block(block: nn.Module, x: Tensor) -> Tensor:
    return F.relu(block.bn(block.conv(x)))


def plain_trunk(layers: list[nn.Module], x: Tensor) -> Tensor:
    x = plain_block(layers[0], x)
    for residual in layers[1:3]:
        main = x
        for block in residual.main_path:
            main = plain_block(block, main)
        x = F.max_pool2d(F.relu(main + residual.shortcut(x)), 2)
    return plain_block(layers[3], x)


def plain_expert(depthwise: nn.Module, pointwise: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return F.relu(norm(pointwise(depthwise(x)))).mean((2, 3))


def loop(model: MergedMoE, images: Tensor) -> Tensor:
    """The mixture written out: a loop over experts, without noise and dropout."""
    trunk = plain_trunk([model.feature_extractor[n] for n in LAYERS.values()], images)
    pooled = trunk.mean((2, 3))
    gates = (model.gating_network.gate_net(pooled) / model.temperature).softmax(1)
    features = [plain_expert(*expert[:3], trunk) for expert in model.experts]
    if model.combine == "logits":
        return sum(gates[:, j, None] * model.heads[j](e) for j, e in enumerate(features))
    mixed = sum(gates[:, j, None] * e for j, e in enumerate(features))
    return model.classifier(torch.cat([mixed, model.gating_network.feature_net(pooled)], 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("combine", ["features", "logits"])
def test_mixture_equals_a_plain_loop_over_experts(combine, training):
    quiet = {"dropout_expert": 0.0, "dropout_gate": 0.0, "gate_noise_std": 0.0}
    ours, plain = (tiny(combine=combine, **quiet).train(training).double() for _ in range(2))
    images = pictures().double()
    actual, expected = ours(images).logits, loop(plain, images)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for logits in (actual, expected):
        logits.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-5)
    assert ours.experts[2][2].num_batches_tracked == training


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_relu_dropout_mean_keeps_the_right_share_and_scale(layout):
    torch.manual_seed(0)
    x = torch.randn(4, 50, 40, 25).contiguous(memory_format=layout).requires_grad_()
    module = ReluDropoutMean(0.25)
    y = module(x)
    y.sum().backward()
    kept = x.grad[x > 0]
    assert (kept != 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert not x.grad[x < 0].any()
    torch.testing.assert_close(kept[kept != 0].unique(), torch.tensor([1 / (1000 * 0.75)]))
    assert y.mean().item() == pytest.approx(F.relu(x).mean().item(), rel=0.01)
    torch.testing.assert_close(y, (x * x.grad).sum((2, 3)))
    assert not torch.equal(module(x), y)
    # Neighbours in memory share a random number, but not their luck.
    row = (x.grad != 0)[:, :, 0].float()
    assert torch.corrcoef(row.flatten(0, 1).T).fill_diagonal_(0).abs().max() < 0.4


def test_relu_dropout_mean_in_evaluation_is_the_mean_of_relu():
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(ReluDropoutMean(0.5).eval()(x), F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [*OPTIONS, {"top_k": 2}, {"num_experts": 1}])
def test_shapes_and_sums(options, training):
    model = tiny(**options).train(training)
    output = model(pictures())
    experts = options.get("num_experts", 3)
    assert output.logits.shape == (6, 6)
    assert output.gates.shape == output.gate_logits.shape == (6, experts)
    torch.testing.assert_close(output.gates.sum(1), torch.ones(6))


@pytest.mark.parametrize(
    ("temperature", "expected"), [(2.0, [0.5065, 0.3072, 0.1863]), (0.5, [0.8668, 0.1173, 0.0159])]
)
def test_gates_known_answers(temperature, expected):
    gates = tiny(temperature=temperature).eval().route(torch.tensor([[2.0, 1.0, 0.0]]))
    torch.testing.assert_close(gates, torch.tensor([expected]), rtol=0, atol=5e-5)


def test_noise_comes_in_training_only_after_the_temperature():
    model = tiny(temperature=4.0, gate_noise_std=0.1)
    logits = torch.zeros(20_000, 3)
    logs = model.train().route(logits).log()
    difference = logs[:, 0] - logs[:, 1]  # of two independent draws
    assert difference.std().item() == pytest.approx(0.1 * 2**0.5, rel=0.03)
    for quiet in (model.eval(), tiny(gate_noise_std=0.0).train()):
        torch.testing.assert_close(quiet.route(logits), torch.full_like(logits, 1 / 3))


def test_top_k_is_a_softmax_over_the_largest():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 4.0, 6.0]])
    gates = tiny(top_k=2).eval().route(logits)
    first, second = (torch.tensor(v).softmax(0).tolist() for v in ([1.0, 0.5], [2.0, 3.0]))
    torch.testing.assert_close(gates, torch.tensor([[*first, 0.0], [0.0, *second]]))
    torch.testing.assert_close(*(tiny(top_k=k).eval().route(logits) for k in (0, 3)))


def calls_of(model: MergedMoE) -> list[int]:
    calls: list[int] = []
    for number, expert in enumerate(model.experts):
        expert.register_forward_hook(lambda _m, _x, _y, number=number: calls.append(number))
    return calls


@pytest.mark.parametrize("combine", ["features", "logits"])
def test_experts_without_gate_are_skipped_in_evaluation(combine):
    model, images = tiny(combine=combine).eval(), pictures()
    gates = torch.tensor([[0.5, 0.0, 0.5]]).expand(6, -1)
    expected = model.combine_parts(model.parts(images), gates)
    calls = calls_of(model)
    torch.testing.assert_close(model(images, gates).logits, expected)
    assert calls == [0, 2]
    model.train()(images, gates)
    assert calls == [0, 2, 0, 1, 2]


def test_identical_experts_make_the_gates_irrelevant():
    model, images = tiny().eval(), pictures()
    for expert in model.experts[1:]:
        expert.load_state_dict(model.experts[0].state_dict())
    first, other = (model(images, torch.tensor(g)).logits for g in ([1.0, 0, 0], [0.1, 0.2, 0.7]))
    torch.testing.assert_close(first, other)


@pytest.mark.parametrize("options", [*OPTIONS, {"top_k": 1}])
def test_forward_is_its_parts_combined(options):
    model, images = tiny(**options).eval(), pictures()
    parts, output = model.parts(images), model(images)
    gates = model.route(parts.gate_logits)
    assert torch.equal(output.gates, gates)
    torch.testing.assert_close(model.combine_parts(parts, gates), output.logits, rtol=0, atol=1e-7)
    assert parts.expert_features.shape == (6, 3, 32)


@pytest.mark.parametrize("shape", [(3,), (6, 3)])
def test_forced_gates_take_the_place_of_the_models(shape):
    model, images = tiny().eval(), pictures()
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    output = model(images, gates)
    assert torch.equal(output.gates, gates.expand(6, 3))
    expected = model.combine_parts(model.parts(images), gates)
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_the_sum_of_their_split(options):
    model, images = tiny(**options).eval(), pictures()
    parts, output = model.parts(images), model(images)
    experts, by_pass, bias = model.split_logits(parts)
    total = (output.gates[..., None] * experts).sum(1) + by_pass + bias
    torch.testing.assert_close(total, output.logits, rtol=1e-5, atol=1e-5)


def test_parts_can_be_replaced_by_zeros():
    model, images = tiny().eval(), pictures()
    parts, gates = model.parts(images), torch.full((3,), 1 / 3)
    experts, by_pass, bias = model.split_logits(parts)
    no_by_pass = parts._replace(gating_features=torch.zeros_like(parts.gating_features))
    torch.testing.assert_close(model.combine_parts(no_by_pass, gates), experts.mean(1) + bias)
    no_experts = parts._replace(expert_features=torch.zeros_like(parts.expert_features))
    torch.testing.assert_close(model.combine_parts(no_experts, gates), by_pass + bias)


def test_gating_features_are_dropped_for_whole_images_in_training():
    model = tiny(gating_feature_dropout=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        features = model.parts(pictures(200)).gating_features
    silent = (features == 0).all(1)
    assert 60 < silent.sum() < 140
    whole = model.eval().parts(pictures(200)).gating_features
    assert not (whole == 0).all(1).any()


def test_temperature_is_saved_and_decides():
    source, target = (tiny(temperature=value).eval() for value in (0.7, 2.0))
    target.load_state_dict(source.state_dict())
    assert float(target.temperature) == pytest.approx(0.7)
    assert torch.equal(target(pictures()).logits, source(pictures()).logits)


@pytest.mark.parametrize("combine", ["features", "logits"])
def test_original_checkpoints_load_with_temperature_2(combine):
    source, target = tiny(combine=combine), tiny(combine=combine, temperature=0.5)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    del state["module.temperature"]
    if combine == "logits":
        state = {
            name.replace("heads.", "classifiers.").replace("gate_net.", "net."): value
            for name, value in state.items()
        }
        assert "module.classifiers.2.weight" in state
    target.load_state_dict(load_original(state))
    assert float(target.temperature) == 2.0
    assert torch.equal(target.eval()(pictures()).logits, source.eval()(pictures()).logits)
    assert load_original({"temperature": torch.tensor(0.5)})["temperature"] == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gates_stay_float32_under_autocast(training):
    model = tiny().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pictures())
        specialist = Specialist(3, width=4).train(training)(pictures())
    assert {value.dtype for value in (*output, specialist)} == {torch.float32}


def test_training_step_is_one_graph():
    model, images = tiny(), pictures()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = model(images).logits
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(images).logits, expected)


def test_mixture_overfits_a_batch():
    torch.manual_seed(0)
    model = MergedMoE(classes=4, width=4, gating_feature_dim=8, dropout_expert=0.1)
    images, labels = pictures(16), torch.arange(16) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images).logits, labels).backward()
        optimizer.step()
    assert (model(images).logits.argmax(1) == labels).float().mean() > 0.9


REFUSED = [
    ({"classes": 0}, "classes = 0"),
    ({"num_experts": 0}, "num_experts = 0"),
    ({"top_k": 4}, "top_k = 4"),
    ({"top_k": -1}, "top_k = -1"),
    ({"temperature": 0.0}, "temperature = 0.0"),
    ({"combine": "sum"}, "combine = 'sum'"),
    ({"shared_until": "conv3"}, "shared_until = 'conv3'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        on_meta(MergedMoE, **{"classes": 10, **options})
