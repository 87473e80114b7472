"""The network: sizes and names, what experts share, shortcuts, heads, precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moectl.balpoe.model import (
    BalpoeNet,
    Bottleneck,
    CosineLinear,
    PaddedShortcut,
    load_public,
    multiply_adds,
)


def meta_net(**options) -> BalpoeNet:
    with torch.device("meta"):
        return BalpoeNet(**options)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def shrunk(**options) -> BalpoeNet:
    """The smallest network of three experts that still has every part."""
    torch.manual_seed(0)
    return BalpoeNet(classes=10, layer2_dimension=16, layer3_dimension=20, **options)


SIZES = [
    (469_904, {"experts": 1}),
    (915_984, {"experts": 2}),
    (1_362_064, {"experts": 3}),
    (1_808_144, {"experts": 4}),
    (2_254_224, {"experts": 5}),
    (2_700_304, {"experts": 6}),
    (3_146_384, {"experts": 7}),
    (783_856, {"reduce_dimension": True}),
    (1_362_364, {"use_norm": False}),
    (1_185_680, {"share_layer2": True}),
    (482_704, {"share_layer2": True, "share_layer3": True}),
    (464_144, {"classes": 10, "experts": 1}),
    (1_344_784, {"classes": 10}),
    (770_896, {"classes": 10, "reduce_dimension": True}),
    (3_106_064, {"classes": 10, "experts": 7}),
    (73_778_240, {"arch": "resnet50", "classes": 1000}),
    (72_258_880, {"arch": "resnext50", "classes": 1000}),
    (117_658_688, {"arch": "resnet50", "classes": 8142}),
]


@pytest.mark.parametrize(("expected", "options"), SIZES, ids=lambda v: str(v).replace(" ", ""))
def test_number_of_parameters(expected, options):
    assert parameters(meta_net(**{"classes": 100, **options})) == expected


def test_number_of_parameters_per_part():
    backbone = meta_net(classes=100).backbone
    assert parameters(backbone.conv1) + parameters(backbone.bn1) == 464
    assert parameters(backbone.layer1) == 23_360
    assert parameters(backbone.layer2s[0]) == 88_192
    assert parameters(backbone.layer3s[0]) == 351_488
    assert parameters(backbone.linears[0]) == 6_400


WORK = [
    (32, (68_861_952, 6_400), {"experts": 1}),
    (32, (158_515_200, 19_200), {"experts": 3}),
    (32, (337_821_696, 44_800), {"experts": 7}),
    (32, (100_343_808, 14_400), {"reduce_dimension": True}),
    (224, (8_634_286_080, 6_144_000), {"arch": "resnet50", "classes": 1000}),
    (224, (9_010_003_968, 6_144_000), {"arch": "resnext50", "classes": 1000}),
]


@pytest.mark.parametrize(("size", "expected", "options"), WORK)
def test_multiply_adds(size, expected, options):
    assert multiply_adds(meta_net(**{"classes": 100, **options}), size) == expected


def test_counting_multiply_adds_leaves_the_model_alone():
    model = shrunk()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    multiply_adds(model, 32)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_shared_stages_are_counted_once():
    both = meta_net(classes=100, share_layer2=True, share_layer3=True)
    assert multiply_adds(both, 32) == (68_861_952, 19_200)


def test_state_dict_names_of_three_experts():
    names = set(meta_net(classes=100).state_dict())
    assert len(names) == 429
    block = [f"{part}.weight" for part in ("conv1", "bn1", "conv2", "bn2")]
    stages = ["layer1", *(f"layer{s}s.{e}" for s in (2, 3) for e in range(3))]
    expected = {
        f"backbone.{stage}.{b}.{part}" for stage in stages for b in range(5) for part in block
    }
    expected |= {f"backbone.linears.{e}.weight" for e in range(3)}
    expected |= {"backbone.conv1.weight", "backbone.bn1.weight"}
    assert {name for name in names if name.endswith("weight")} == expected
    assert {name.rsplit(".", 1)[1] for name in names} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert meta_net(classes=100).state_dict()["backbone.linears.0.weight"].shape == (64, 100)


def test_state_dict_names_of_one_expert_are_plain():
    names = set(meta_net(classes=10, experts=1).state_dict())
    assert {"backbone.layer2.0.conv1.weight", "backbone.layer3.4.bn2.bias"} <= names
    assert "backbone.linear.weight" in names
    assert not any("s." in name for name in names)


def test_state_dict_names_of_shared_stages_repeat_per_expert():
    apart, shared = meta_net(classes=10), meta_net(classes=10, share_layer2=True)
    assert set(shared.state_dict()) == set(apart.state_dict())
    assert shared.backbone.layer2s[0] is shared.backbone.layer2s[2]
    assert shared.backbone.layer3s[0] is not shared.backbone.layer3s[2]


def test_state_dict_names_of_the_bottleneck_family():
    state = meta_net(arch="resnet50", classes=1000).state_dict()
    assert state["backbone.layer1.0.conv1.weight"].shape == (64, 64, 1, 1)
    assert state["backbone.layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["backbone.layer3s.2.5.conv2.weight"].shape == (256, 256, 3, 3)
    assert state["backbone.layer4s.1.2.bn3.running_var"].shape == (2048,)
    assert state["backbone.linears.0.weight"].shape == (2048, 1000)
    grouped = meta_net(arch="resnext50", classes=1000).state_dict()
    assert grouped["backbone.layer3s.0.0.conv2.weight"].shape == (512, 16, 3, 3)
    single = meta_net(arch="resnet50", classes=10, experts=1).state_dict()
    assert {"backbone.layer4.0.conv1.weight", "backbone.linear.weight"} <= set(single)


def test_reduced_and_chosen_widths_of_the_bottleneck_family():
    reduced = meta_net(arch="resnet50", classes=10, reduce_dimension=True)
    assert reduced.backbone.linears[0].weight.shape == (4 * 384, 10)
    assert reduced.backbone.layer3s[0][0].conv2.out_channels == 192
    chosen = meta_net(arch="resnext50", classes=10, layer4_dimension=128)
    assert chosen.backbone.linears[0].weight.shape == (4 * 128, 10)


def test_public_names_of_a_parallel_checkpoint_load():
    source, target = shrunk(), BalpoeNet(classes=10, layer2_dimension=16, layer3_dimension=20)
    public = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    target.load_state_dict(load_public(public))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(target.eval()(images), source.eval()(images))
    assert load_public(source.state_dict()).keys() == source.state_dict().keys()


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_output_has_one_row_of_logits_per_expert(experts):
    assert shrunk(experts=experts)(torch.randn(4, 3, 32, 32)).shape == (4, experts, 10)


def test_output_shape_of_the_bottleneck_family():
    model = meta_net(arch="resnext50", classes=12, experts=2).eval()
    assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 2, 12)


def test_expert_equals_the_plain_network_with_its_weights():
    several = shrunk(experts=2).eval()
    plain = shrunk(experts=1).eval()
    picked = {
        name.replace("s.1.", "."): tensor
        for name, tensor in several.state_dict().items()
        if "s.0." not in name
    }
    plain.load_state_dict(picked)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(plain(images)[:, 0], several(images)[:, 1])


def test_sharing_equals_equal_weights_in_every_place():
    shared, apart = shrunk(share_layer2=True), shrunk()
    apart.load_state_dict(shared.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(shared(images), apart(images))


@pytest.mark.parametrize("share_layer3", [False, True])
def test_shared_batch_norm_is_updated_once_per_forward(share_layer3):
    model = shrunk(share_layer2=True, share_layer3=share_layer3)
    model(torch.randn(4, 3, 32, 32))
    counts = [v for name, v in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {1}


def test_shared_parameters_are_listed_once():
    model = shrunk(share_layer2=True, share_layer3=True)
    ids = [id(p) for p in model.parameters()]
    assert len(ids) == len(set(ids))
    assert parameters(model.backbone.layer2s) == parameters(model.backbone.layer2s[0])


@pytest.mark.parametrize(("outputs", "before"), [(32, 8), (24, 4), (17, 0), (16, 0)])
def test_padded_shortcut_subsamples_and_pads_on_both_sides(outputs, before):
    x = torch.randn(2, 16, 6, 6)
    expected = torch.zeros(2, outputs, 3, 3)
    expected[:, before : before + 16] = x[:, :, ::2, ::2]
    torch.testing.assert_close(PaddedShortcut(16, outputs, 2)(x), expected, rtol=0, atol=0)


def test_projected_shortcut_has_the_public_names():
    state = meta_net(classes=10, shortcut="B").state_dict()
    assert state["backbone.layer2s.0.0.shortcut.0.weight"].shape == (32, 16, 1, 1)
    assert state["backbone.layer3s.2.0.shortcut.1.weight"].shape == (64,)
    assert not any(".1.shortcut" in name for name in state)


def test_basic_block_equals_the_written_out_formula():
    model = shrunk(experts=1).double()
    block = model.backbone.layer3[0]
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64, requires_grad=True)

    def normalised(y, norm):
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=0, keepdim=True)
        return (y - mean) / (var + norm.eps).sqrt()

    inner = normalised(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).relu()
    out = normalised(F.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
    expected = (out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()
    actual = block(x)
    torch.testing.assert_close(actual, expected)
    weights = [x, *(block.conv1.weight, block.conv2.weight)]
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
    )


def test_bottleneck_strides_in_its_middle_convolution():
    block = Bottleneck(64, 16, 2)
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [
        (1, 1),
        (2, 2),
        (1, 1),
    ]
    assert block(torch.randn(2, 64, 8, 8)).shape == (2, 64, 4, 4)


def test_cosine_head_equals_scaled_cosines():
    head = CosineLinear(6, 4, scale=30.0)
    with torch.no_grad():
        head.weight.mul_(torch.rand(4) + 0.5)  # lengths must not matter
    x = torch.randn(5, 6)
    expected = 30 * F.cosine_similarity(x[:, :, None], head.weight[None], dim=1)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(7 * x), expected)


def test_cosine_head_starts_with_unit_columns():
    torch.testing.assert_close(CosineLinear(64, 100, 30.0).weight.norm(dim=0), torch.ones(100))


def test_scale_multiplies_the_logits():
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(shrunk(norm_scale=15.0)(images), shrunk(norm_scale=30.0)(images) / 2)


def test_plain_head_has_a_bias_and_no_scale():
    head = shrunk(use_norm=False, norm_scale=99.0).backbone.linears[0]
    assert isinstance(head, nn.Linear)
    assert head.bias.shape == (10,)


def test_small_images_start_with_kaiming_weights():
    torch.manual_seed(0)
    model = BalpoeNet(classes=10, use_norm=False)
    conv = model.backbone.layer3s[1][2].conv1.weight
    assert conv.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    linear = model.backbone.linears[0].weight
    assert linear.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


@pytest.mark.parametrize("arch", ["resnet50", "resnext50"])
def test_large_images_start_with_fan_out_weights(arch):
    torch.manual_seed(0)
    model = BalpoeNet(arch=arch, classes=10, experts=1, layer3_dimension=32, layer4_dimension=32)
    for block, name in ((model.backbone.layer1[0], "conv2"), (model.backbone.layer2[1], "conv3")):
        conv = getattr(block, name)
        expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_logits_stay_float32_and_fine_under_autocast():
    model = shrunk().eval()
    features = []
    hook = model.backbone.linears[0].register_forward_pre_hook(
        lambda _module, inputs: features.append(inputs[0])
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 3, 32, 32))
    hook.remove()
    assert logits.dtype == torch.float32
    assert torch.equal(logits[:, 0], model.backbone.linears[0](features[0]))


def test_layout_does_not_change_the_numbers():
    model = shrunk().double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.to(memory_format=torch.channels_last)
    actual = model(images.contiguous(memory_format=torch.channels_last))
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_every_parameter_of_every_expert_learns():
    model = shrunk()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_forward_is_one_graph():
    model = shrunk(experts=2, share_layer2=True)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(images), model(images))


REFUSED = [
    ({"share_layer3": True}, "share_layer3 needs share_layer2"),
    ({"experts": 0}, "experts = 0"),
    ({"classes": 0}, "classes = 0"),
    ({"arch": "resnet18"}, "resnet18"),
    ({"arch": "resnet50", "shortcut": "B"}, "shortcut = 'B'"),
    ({"arch": "resnet50", "share_layer2": True}, "share_layer2"),
    ({"layer4_dimension": 64}, "layer4_dimension = 64"),
    ({"arch": "resnet50", "layer2_dimension": 64}, "layer2_dimension = 64"),
    ({"layer3_dimension": -1}, "layer3_dimension = -1"),
    ({"layer2_dimension": 8}, "shortcut A"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        meta_net(**{"classes": 10, **options})


def test_projected_shortcut_may_narrow():
    assert shrunk(experts=1, shortcut="B").backbone.layer3[0].shortcut[0].out_channels == 20
    narrowed = meta_net(classes=10, layer2_dimension=8, shortcut="B")
    assert narrowed.backbone.layer2s[0][0].shortcut[0].out_channels == 8
