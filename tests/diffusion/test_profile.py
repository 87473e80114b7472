"""What is counted agrees with known figures, and what is measured is plausible."""

import re

import pytest
import torch
from torch import nn

from moectl.diffusion.blocks import MixtureBlock
from moectl.diffusion.model import UNet, build
from moectl.diffusion.profile import Times, check, macs, parameters, shapes, times
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.variants import arguments_of
from moectl.engine.presets import available, find
from moectl.engine.settings import from_toml

TINY = {"model_channels": 8, "channel_mults": (1, 2), "time_dim": 8, "class_dim": 4}
PLAIN = {"moe": False, "freq": False, "dsconv": False}
SMALL = {"model_channels": 64, "channel_mults": (1, 2, 4)}
COUNTED = [preset.name for preset in available("diffusion") if "GMAC" in preset.header()["cost"]]


def few(experts: int, active: int) -> dict[str, int]:
    return {"num_experts": experts, "k_active": active}


def tiny(**options) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**TINY, **few(4, 2), **options})


def zeros(**options) -> UNet:
    """A network of zeros, which is built faster than a random one."""
    with torch.device("meta"):
        model = build(options)
    model.to_empty(device="cpu")
    for value in [*model.parameters(), *model.buffers()]:
        nn.init.zeros_(value)
    return model


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, 45_044_987),
        ({"moe": False}, 40_397_827),
        ({"freq": False}, 49_825_027),
        ({"dsconv": False}, 77_460_219),
        (PLAIN, 105_470_467),
        (few(16, 4), 47_983_923),
        (few(4, 1), 43_575_519),
        (few(2, 2), 45_017_681),
        (SMALL, 7_644_683),
        ({"model_channels": 256, "channel_mults": (1, 2, 4, 8, 16)}, 604_480_971),
    ],
)
def test_an_image_meets_the_known_number_of_parameters(options, used):
    with torch.device("meta"):
        model = UNet(compat="seed", null_class=False, **options)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert parameters(model) == (total, used)


def weighted_sums(model: UNet, size: int) -> int:
    """Multiply-adds of the sums over K experts; with one there is nothing to add."""
    count = []

    def note(part: nn.Module, _inputs: object, output: tuple[torch.Tensor, object]) -> None:
        assert isinstance(part, MixtureBlock)
        count.append(part.k_active * output[0].numel() if part.k_active > 1 else 0)

    for part in model.modules():
        if isinstance(part, MixtureBlock):
            part.register_forward_hook(note)
    macs(model, size)
    return sum(count)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, 3.4181),
        ({"moe": False}, 4.0345),
        ({"freq": False}, 3.5022),
        ({"dsconv": False}, 16.8918),
        (PLAIN, 15.6248),
        (few(16, 4), 4.7533),
        (few(4, 1), 2.7504),
        (few(2, 2), 3.4180),
        (SMALL, 0.6716),
        (SMALL | few(4, 1), 0.5405),
        (SMALL | few(16, 4), 0.9336),
    ],
)
def test_multiply_adds_are_the_known_ones_and_the_weighted_sums(options, known):
    """Of 64 pixels, from 16: convolutions grow with the area, linear layers do not."""
    model = zeros(compat="seed", **options)
    linear = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    counted = macs(model, 16) - weighted_sums(model, 16)
    assert (16 * (counted - linear) + linear) / 1e9 == pytest.approx(known, abs=6e-5)


def test_scale_shift_gate_and_bands_add_little():
    original, corrected = (macs(zeros(compat=compat), 64) for compat in ("seed", "none"))
    film = 3 * 1920 * (512 + 512)
    bands = 1024 * (512 + 256) + 32 * 8 * 4 * 3  # its linear layers; its table of 4 x 3 frequencies
    assert corrected - original == film + bands == 6_687_744
    assert corrected / original < 1.002


@pytest.mark.parametrize("name", COUNTED)
def test_headers_of_presets_name_the_multiply_adds(name):
    preset = find("diffusion", name)
    settings = from_toml(DiffusionSettings, preset.path)
    found = macs(zeros(**arguments_of(settings, 10)), settings.data.image_size) / 1e9
    (stated,) = re.findall(r"([\d.]+) GMAC", preset.header()["cost"])
    assert f"{found:.4g}" == stated
    (work,) = re.findall(r"([\d.]+) PFLOP", preset.header()["cost"])
    images = 50_000 * settings.train.epochs
    assert float(work) == pytest.approx(images * 3 * 2 * found / 1e6, abs=0.5)


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_dispatch_and_mode_change_no_count(options):
    grouped, stacked = (tiny(**options, dispatch=how) for how in ("grouped", "stacked"))
    assert macs(grouped, 16) == macs(stacked.eval(), 16)
    assert grouped.training
    assert not stacked.training


def test_stages_have_the_known_shapes():
    assert shapes(zeros(compat="seed"), 64, 2) == [
        ("input_proj", "2 x 128 x 64 x 64"),
        ("encoder 0", "2 x 128 x 32 x 32"),
        ("encoder 1", "2 x 256 x 16 x 16"),
        ("encoder 2", "2 x 512 x 8 x 8"),
        ("bottleneck", "2 x 1024 x 4 x 4"),
        ("decoder 0", "2 x 512 x 8 x 8"),
        ("decoder 1", "2 x 256 x 16 x 16"),
        ("decoder 2", "2 x 128 x 32 x 32"),
        ("decoder 3", "2 x 128 x 64 x 64"),
        ("output_proj", "2 x 3 x 64 x 64"),
    ]


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_shapes_leave_no_hooks_behind(options):
    model = tiny(**options)
    assert dict(shapes(model, 8, 3))["bottleneck"] == "3 x 16 x 2 x 2"
    assert not any(part._forward_hooks for part in model.modules())
    assert model.training


def test_times_are_positive_and_leave_the_model_as_it_was():
    model = tiny().eval()
    found = times(model, 16, 2, repeats=1)
    assert isinstance(found, Times)
    assert min(found) > 0
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_times_run_a_warm_up_and_the_repeats():
    model = tiny()
    modes = []
    model.register_forward_pre_hook(lambda part, _: modes.append(part.training))
    times(model, 8, 1, repeats=2)
    assert modes == [False] * 3 + [True] * 3


def test_check_of_the_corrected_form_finds_no_fault():
    model = tiny()
    found = check(model, 8, 6)
    hit = found.pop("experts_hit")
    assert found == {
        "output": [6, 3, 8, 8],
        "router_logits": 3,
        "router_shapes": [[6, 4]],
        "without_gradient": [],
        "finite": True,
    }
    assert len(hit) == 3
    assert all(2 <= count <= 4 for count in hit)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_check_counts_the_distinct_experts():
    model = tiny(**few(4, 1))
    for part in model.modules():
        if isinstance(part, MixtureBlock):
            last = part.router.mlp[2]
            nn.init.zeros_(last.weight)
            last.bias.data = torch.tensor([0.0, 0.0, 9.0, 0.0])
    assert check(model, 8, 6)["experts_hit"] == [1, 1, 1]
    assert check(tiny(**few(4, 4)), 8, 6)["experts_hit"] == [4, 4, 4]
    assert check(tiny(**PLAIN), 8, 6)["experts_hit"] == []


def test_check_names_what_gets_no_gradient_in_the_original_form():
    names = check(tiny(**PLAIN, compat="seed"), 8, 2)["without_gradient"]
    parts = [f"time_embed.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    assert names == [*parts, "class_embed.weight"]
    assert check(tiny(moe=False, compat="seed"), 8, 2)["without_gradient"] == ["class_embed.weight"]
    assert check(tiny(compat="seed"), 8, 2)["without_gradient"] == []


def test_check_sees_numbers_that_are_not_finite():
    model = tiny()
    nn.init.constant_(model.input_proj.bias, float("nan"))
    assert check(model, 8, 2)["finite"] is False
