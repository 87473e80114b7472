"""The U-Net: published sizes, wiring by a plain reference, what reaches the features, gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.diffusion.blocks import Router
from moectl.diffusion.experts import ExpertNorm
from moectl.diffusion.model import UNet, build

TINY = {"model_channels": 8, "channel_mults": (1, 2, 3), "time_dim": 8, "class_dim": 4}
SWITCHES = [
    {"moe": moe, "freq": freq, "dsconv": dsconv}
    for moe, freq, dsconv in itertools.product([True, False], repeat=3)
]
PLAIN = {"moe": False, "freq": False, "dsconv": False}
SMALL = {"model_channels": 64, "channel_mults": (1, 2, 4)}
LARGE = {"model_channels": 256, "channel_mults": (1, 2, 4, 8, 16)}


def few(experts: int, active: int) -> dict[str, int]:
    return {"num_experts": experts, "k_active": active}


def made(seed: int = 0, **options) -> UNet:
    """A tiny network in float64 whose start of zeros is broken."""
    torch.manual_seed(seed)
    model = UNet(**{**TINY, **few(4, 2), **options}).double()
    for parameter in model.parameters():
        if not parameter.any() or (parameter == 1).all():
            nn.init.normal_(parameter, std=0.3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d | ExpertNorm) and hasattr(part, "running_var"):
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return model


def inputs(count: int = 3, sides: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, *sides, generator=generator, dtype=torch.float64)
    return x, torch.tensor([3, 500, 999])[:count], torch.tensor([0, 7, 9])[:count]


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def size(**options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**options).parameters())


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 53_752_571),
        ({"moe": False}, 40_397_827),
        ({"freq": False}, 71_250_691),
        ({"dsconv": False}, 153_616_635),
        (PLAIN, 105_470_467),
        (few(16, 4), 65_399_091),
        (few(4, 1), 47_929_311),
        (few(2, 2), 45_017_681),
        (few(9, 2), 53_752_571 + 1_455_815),
        (SMALL, 8_244_491),
        (SMALL | few(4, 1), 7_833_463),
        (SMALL | few(16, 4), 9_066_547),
        (LARGE, 740_008_395),
        (LARGE | few(4, 1), 649_622_439),
        (LARGE | few(16, 4), 920_780_307),
    ],
)
def test_original_form_has_the_known_sizes(options, parameters):
    assert size(compat="seed", null_class=False, **options) == parameters
    assert size(compat="seed", **options) == parameters + 512


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 60_443_771),
        ({"moe": False}, 47_089_027),
        ({"freq": False}, 80_304_003),
        ({"dsconv": False}, 160_307_835),
        (PLAIN, 114_523_779),
        (few(16, 4), 72_090_291),
    ],
)
def test_corrected_form_has_the_known_sizes(options, parameters):
    assert size(**options) == parameters
    assert size(null_class=False, **options) == parameters - 512


def test_original_form_keeps_running_averages_of_every_expert():
    with torch.device("meta"):
        model = UNet(compat="seed")
    assert sum(b.numel() for b in model.buffers()) == 61_552 - 7 * 8 * 2  # less its counters
    with torch.device("meta"):
        assert list(UNet().buffers()) == []


@pytest.mark.parametrize("compat", ["none", "seed"])
@pytest.mark.parametrize(("freq", "count"), [(True, 7), (False, 8)])
def test_logits_are_those_of_every_block_of_experts_in_order(freq, count, compat):
    model = made(channel_mults=(1, 2, 4, 8), freq=freq, compat=compat)
    said = {}
    for name, part in model.named_modules():
        if isinstance(part, Router):
            part.register_forward_hook(lambda _m, _i, found, name=name: said.update({name: found}))
    _, logits = model(*inputs(sides=(32, 32)))
    stages = [f"encoder.{i}.conv_block" for i in range(3)] + ["bottleneck"] * (not freq)
    stages += [f"decoder.{i}.conv_block" for i in range(4)]
    assert len(logits) == count
    for stage, one in zip(stages, logits, strict=True):
        assert one is said[f"{stage}.router"]
        assert one.shape == (3, 4)
    without = made(channel_mults=(1, 2, 4, 8), freq=freq, compat=compat, moe=False)
    assert without(*inputs(sides=(32, 32)))[1] == []


def test_stages_have_the_known_shapes():
    model = made(channel_mults=(1, 2, 4, 8))
    known = {"input_proj": (8, 64), "bottleneck_proj": (64, 4), "bottleneck": (64, 4)}
    for stage, (channels, side) in enumerate([(8, 64), (16, 32), (32, 16)]):
        known[f"encoder.{stage}.conv_block.proj"] = (channels, side)
        known[f"encoder.{stage}.downsample"] = (channels, side // 2)
    stages = [(64, 8, 32), (32, 16, 16), (16, 32, 8), (8, 64, 8)]
    for stage, (before, side, after) in enumerate(stages):
        known[f"decoder.{stage}.upsample"] = (before, side)
        known[f"decoder.{stage}.conv_block.proj"] = (after, side)
    found = {}
    for name in known:
        part = model.get_submodule(name)
        part.register_forward_hook(lambda _m, _i, x, name=name: found.update({name: x.shape}))
    model(*inputs(1, (64, 64)))
    assert found == {name: (1, channels, side, side) for name, (channels, side) in known.items()}
    widths = [stage.conv_block.proj[0].in_channels for stage in model.decoder]
    assert widths == [96, 48, 24, 16]


@pytest.mark.parametrize("mults", [(1,), (2,), (1, 2), (3, 1, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("compat", ["none", "seed"])
@pytest.mark.parametrize("moe", [True, False])
def test_noise_has_the_size_of_the_images(mults, compat, moe):
    model = made(channel_mults=mults, compat=compat, moe=moe).eval()
    least = 2 ** len(mults)
    for sides in [(least, least), (3 * least, 2 * least)]:
        found, logits = model(*inputs(sides=sides))
        assert found.shape == (3, 3, *sides)
        assert len(logits) == (2 * len(mults) - 1 if moe else 0)


@pytest.mark.parametrize("sides", [(20, 16), (16, 12), (4, 4)])
def test_sizes_that_do_not_halve_are_refused(sides):
    wanted = f"images of {sides[0]} x {sides[1]} pixels: expected multiples of 8"
    with pytest.raises(ValueError, match=wanted):
        made()(*inputs(sides=sides))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (few(4, 5), "k_active = 5: expected 1 to num_experts = 4"),
        (few(4, 0), "k_active = 0"),
        (few(0, 0), "num_experts = 0"),
        ({"channel_mults": ()}, "one level at least"),
        ({"model_channels": 12}, "a multiple of 8"),
        ({"time_dim": 7}, "an even number"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **options})


def floats() -> tuple[Tensor, Tensor, Tensor]:
    x, t, c = inputs()
    return x.float(), t, c


def test_label_after_the_last_is_no_class():
    x, t, _ = inputs()
    none = torch.full((3,), 10)
    assert not torch.equal(made()(x, t, none)[0], made()(*inputs())[0])
    with pytest.raises(IndexError):
        made(null_class=False)(x, t, none)
    assert made(num_classes=3).class_embed.weight.shape == (4, 4)


@pytest.mark.parametrize("switches", SWITCHES)
def test_corrected_form_predicts_0_at_the_start(switches):
    torch.manual_seed(0)
    model = UNet(**TINY, **switches)
    assert not model(*floats())[0].any()
    assert UNet(**TINY, **switches, compat="seed")(*floats())[0].any()


@pytest.mark.parametrize("dispatch", ["grouped", "stacked"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_parameter_of_the_corrected_form_gets_a_gradient(switches, dispatch):
    model = made(**switches, dispatch=dispatch)
    model(*inputs())[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("switches", SWITCHES)
def test_image_alone_equals_the_image_among_others(switches, training):
    model = made(**switches).train(training)
    together, together_logits = model(*inputs())
    for image in range(3):
        part = slice(image, image + 1)
        alone, alone_logits = model(*(value[part] for value in inputs()))
        same(alone, together[part])
        for one, all_of_them in zip(alone_logits, together_logits, strict=True):
            same(one, all_of_them[part])


@pytest.mark.parametrize("switches", SWITCHES)
def test_training_and_evaluation_of_the_corrected_form_agree(switches):
    model = made(**switches)
    same(model.train()(*inputs())[0], model.eval()(*inputs())[0])


@pytest.mark.parametrize("freq", [True, False])
@pytest.mark.parametrize("moe", [True, False])
def test_time_and_class_reach_the_corrected_form(moe, freq):
    model = made(moe=moe, freq=freq).eval()
    x, t, c = inputs()
    found = model(x, t, c)[0]
    assert (model(x, t - 3, c)[0] - found).abs().amax((1, 2, 3)).min() > 1e-3
    assert (model(x, t, (c + 1) % 10)[0] - found).abs().amax((1, 2, 3)).min() > 1e-3


def test_original_form_without_experts_ignores_time_and_class():
    model = made(**PLAIN, compat="seed").eval()
    x, t, c = inputs()
    assert torch.equal(model(x, t - 3, (c + 1) % 10)[0], model(x, t, c)[0])


class Reference:
    """The original's forward pass by names of weights, image by image, experts one by one."""

    def __init__(self, model: UNet, training: bool, k_active: int = 2) -> None:
        self.p, self.training, self.k = model.state_dict(), training, k_active

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def dense(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], **options)

    def conv(self, name: str, x: Tensor, dilation: int = 1) -> Tensor:
        pads = {"padding": dilation, "dilation": dilation}
        if f"{name}.bias" in self.p:
            return self.dense(name, x, **pads)
        x = F.conv2d(x, self.p[f"{name}.0.weight"], **pads, groups=x.shape[1])
        return F.conv2d(x, self.p[f"{name}.1.weight"])

    def norm(self, name: str, x: Tensor, pick=lambda value: value) -> Tensor:
        mean, var = (pick(self.p[f"{name}.running_{k}"]).clone() for k in ("mean", "var"))
        weight, bias = pick(self.p[f"{name}.weight"]), pick(self.p[f"{name}.bias"])
        return F.batch_norm(x, mean, var, weight, bias, self.training)

    def expert(self, name: str, e: int, x: Tensor) -> Tensor:
        def conv(part: str, x: Tensor) -> Tensor:
            if f"{part}.bias" in self.p:
                return F.conv2d(
                    x, self.p[f"{part}.weight"][e], self.p[f"{part}.bias"][e], padding=1
                )
            x = F.conv2d(x, self.p[f"{part}.depthwise"][e], padding=1, groups=x.shape[1])
            return F.conv2d(x, self.p[f"{part}.pointwise"][e][..., None, None])

        own = f"{name}.experts"
        hidden = F.gelu(self.norm(f"{own}.norm1", conv(f"{own}.conv1", x), lambda v: v[e]))
        return F.gelu(self.norm(f"{own}.norm2", conv(f"{own}.conv2", hidden), lambda v: v[e]) + x)

    def block(self, name: str, x: Tensor) -> Tensor:
        x = self.conv(f"{name}.proj", x)
        if f"{name}.fuse.weight" in self.p:
            branches = [self.conv(f"{name}.branches.{i}", x, 2**i) for i in range(3)]
            fused = self.dense(f"{name}.fuse", torch.cat(branches, 1))
            return F.gelu(self.norm(f"{name}.norm", fused + x))
        mean = torch.cat([x.mean((2, 3)), self.time, self.label], 1)
        hidden = F.gelu(self.linear(f"{name}.router.mlp.0", mean))
        logits = self.linear(f"{name}.router.mlp.2", hidden)
        self.logits.append(logits)
        images = []
        for image, row in zip(x.split(1), logits, strict=True):
            values, chosen = row.topk(self.k)
            said = [self.expert(name, e, image) for e in chosen.tolist()]
            images.append(sum(w * one for w, one in zip(values.softmax(0), said, strict=True)))
        return torch.cat(images)

    def bottleneck(self, x: Tensor) -> Tensor:
        if "bottleneck.modulation_mlp.0.weight" not in self.p:
            return self.block("bottleneck", x)
        mean = torch.cat([x.mean((2, 3)), self.time], 1)
        hidden = F.gelu(self.linear("bottleneck.modulation_mlp.0", mean))
        gain = self.linear("bottleneck.modulation_mlp.2", hidden).sigmoid()
        return torch.fft.ifft2(torch.fft.fft2(x) * gain[:, :, None, None]).real + x

    def __call__(self, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.logits: list[Tensor] = []
        angles = t[:, None].float() * 10_000 ** (-torch.arange(4).float() / 4)
        steps = torch.cat([angles.cos(), angles.sin()], 1).double()
        hidden = F.gelu(self.linear("time_embed.mlp.0", steps))
        self.time = self.linear("time_embed.mlp.2", hidden)
        self.label = self.p["class_embed.weight"][c]
        inside = self.dense("input_proj", x, padding=1)
        first = self.dense(
            "encoder.0.downsample", self.block("encoder.0.conv_block", inside), **HALF
        )
        second = self.dense(
            "encoder.1.downsample", self.block("encoder.1.conv_block", first), **HALF
        )
        x = self.bottleneck(self.dense("bottleneck_proj", second, **HALF))
        for stage, skip in enumerate([second, first, inside]):
            name = f"decoder.{stage}.upsample"
            weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
            x = F.conv_transpose2d(x, weight, bias, **HALF)
            x = self.block(f"decoder.{stage}.conv_block", torch.cat([x, skip], 1))
        x = F.group_norm(x, 8, self.p["output_proj.0.weight"], self.p["output_proj.0.bias"])
        return self.dense("output_proj.2", F.gelu(x), padding=1), self.logits


HALF = {"stride": 2, "padding": 1}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("switches", SWITCHES)
def test_original_form_equals_a_plain_reference(switches, training):
    model = made(**switches, compat="seed").train(training)
    expected, expected_logits = Reference(model, training)(*inputs())
    found, logits = model(*inputs())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len(logits) == len(expected_logits)
    for one, other in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compat", ["none", "seed"])
@pytest.mark.parametrize("moe", [True, False])
def test_checkpointing_changes_no_number(moe, compat):
    models = [made(moe=moe, freq=False, compat=compat, checkpointing=on) for on in (False, True)]
    numbers = []
    for model in models:
        found, logits = model(*inputs())
        (found.square().sum() + sum(one.square().sum() for one in logits)).backward()
        grads = {f"{name}'": p.grad for name, p in model.named_parameters() if p.grad is not None}
        numbers.append({"noise": found, **dict(enumerate(logits)), **grads, **model.state_dict()})
    assert numbers[0].keys() == numbers[1].keys()
    for name, one in numbers[0].items():
        assert torch.equal(one, numbers[1][name]), name
    for model in models:  # and the averages move again
        before = [b.clone() for b in model.buffers()]
        model(*inputs())
        assert all(not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_checkpointing_computes_blocks_again_in_training_alone():
    model = made(checkpointing=True)
    calls = []
    for stage in [*model.encoder, *model.decoder]:
        stage.conv_block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(*inputs())[0].sum().backward()
    assert len(calls) == 10
    model.eval()(*inputs())[0].sum().backward()
    assert len(calls) == 15


@pytest.mark.parametrize("compat", ["none", "seed"])
def test_both_dispatches_say_the_same(compat):
    grouped, stacked = (made(compat=compat, dispatch=how) for how in ("grouped", "stacked"))
    same(grouped(*inputs())[0], stacked(*inputs())[0])
    assert stacked.encoder[0].conv_block.dispatch == "stacked"


@pytest.mark.parametrize("compat", ["none", "seed"])
@pytest.mark.parametrize("options", [{}, PLAIN, {"dsconv": False}, {"checkpointing": True}])
def test_autocast_runs_and_learns(options, compat):
    model = made(compat=compat, **options).float()
    expected, _ = model(*floats())
    with torch.autocast("cpu", torch.bfloat16):
        found, logits = model(*floats())
    assert all(one.dtype == torch.float32 for one in logits)
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    found.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


def test_network_is_built_from_plain_values():
    assert build({**TINY, "channel_mults": [1, 2], "moe": False}).levels == 2
