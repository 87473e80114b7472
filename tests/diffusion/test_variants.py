"""Variants change what their names say, and presets hold the networks that their headers name."""

import re
from typing import Any

import pytest
import torch

from moectl.diffusion.model import build
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.variants import VARIANTS, arguments_of, changes, variant
from moectl.engine.errors import UserError
from moectl.engine.presets import available, find
from moectl.engine.settings import flatten, from_toml, resolve

PRESETS = sorted(preset.name for preset in available("diffusion"))
TINY = ("model.channels=8", "model.mults=[1, 2]", "model.time_dim=8", "model.class_dim=4")


def settings(*assignments: str) -> DiffusionSettings:
    return resolve(DiffusionSettings, {}, assignments, [])[0]


def preset(name: str) -> DiffusionSettings:
    return from_toml(DiffusionSettings, find("diffusion", name).path)


def changed(before: DiffusionSettings, after: DiffusionSettings) -> dict[str, Any]:
    old, new = flatten(before.model_dump()), flatten(after.model_dump())
    return {key: value for key, value in new.items() if value != old[key]}


OFF = {"model.moe": False, "model.freq": False, "model.dsconv": False}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", {}),
        ("no_moe", {"model.moe": False}),
        ("no_freq", {"model.freq": False}),
        ("no_dsconv", {"model.dsconv": False}),
        ("minimal", OFF),
        ("moe_variants", {"model.num_experts": 16, "model.k_active": 4}),
        ("dense_matched", {"model.num_experts": 2}),
    ],
)
def test_variant_changes_this_and_nothing_else(name: str, expected: dict[str, Any]) -> None:
    base = settings("optim.lr=0.5", "data.image_size=32")
    assert changed(base, variant(base, name)) == expected


def test_these_are_all_variants() -> None:
    assert list(VARIANTS) == [
        *("full", "no_moe", "no_freq", "no_dsconv", "minimal", "moe_variants", "dense_matched")
    ]


def test_variants_of_a_small_mixture_follow_its_numbers() -> None:
    base = settings("model.num_experts=6", "model.k_active=3")
    assert changes(base.model, "moe_variants") == {"num_experts": 12, "k_active": 6}
    assert changes(base.model, "dense_matched") == {"num_experts": 3}
    assert variant(base, "dense_matched").model.k_active == 3


def test_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no_mo: no such variant; did you mean no_moe") as caught:
        variant(settings(), "no_mo")
    assert all(name in caught.value.hint for name in VARIANTS)


def test_arguments_are_plain_and_carry_every_setting() -> None:
    lines = [*TINY, "model.num_experts=5", "model.k_active=3", "model.dsconv=false"]
    lines += ["model.compat=seed", "model.dispatch=stacked", "model.checkpointing=true"]
    found = arguments_of(settings(*lines, "loss.p_uncond=0"), 7)
    assert found == {
        "model_channels": 8,
        "channel_mults": [1, 2],
        "time_dim": 8,
        "class_dim": 4,
        "num_classes": 7,
        "null_class": False,
        "moe": True,
        "num_experts": 5,
        "k_active": 3,
        "freq": True,
        "dsconv": False,
        "compat": "seed",
        "dispatch": "stacked",
        "checkpointing": True,
    }
    assert build(found).class_embed.weight.shape == (7, 4)


def test_hidden_labels_need_a_class_of_their_own() -> None:
    found = build(arguments_of(settings(*TINY, "loss.p_uncond=0.1"), 7))
    assert found.class_embed.weight.shape == (8, 4)


def test_there_is_a_preset_of_every_ablation() -> None:
    base = preset("default")
    for name in ("no_moe", "no_freq", "no_dsconv", "minimal", "moe_variants"):
        assert preset(name) == variant(base, name)
    assert preset("large_moe") == preset("moe_variants")
    assert base == settings()


def test_the_layer_of_the_original_turns_off_what_it_lacked() -> None:
    layered = resolve(
        DiffusionSettings, {}, [], [find("diffusion", name).path for name in ("debug", "seed")]
    )[0]
    assert changed(preset("debug"), layered) == {
        "model.compat": "seed",
        "loss.balance": "variance",
        "loss.p_uncond": 0.0,
        "train.ema_decay": 0.0,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_header_names_the_parameters_of_the_network(name: str) -> None:
    stated = find("diffusion", name).header()["expected"]
    with torch.device("meta"):
        model = build(arguments_of(preset(name), 10))
    count = sum(parameter.numel() for parameter in model.parameters())
    for number in re.findall(r"([\d,]+) parameters", stated):
        assert int(number.replace(",", "")) == count
    if name not in ("digits", "debug"):
        assert f"{count:,} parameters" in stated


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("default", 60_443_771),
        ("no_moe", 47_089_027),
        ("no_freq", 80_304_003),
        ("no_dsconv", 160_307_835),
        ("minimal", 114_523_779),
        ("large_moe", 72_090_291),
    ],
)
def test_presets_hold_the_known_networks(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build(arguments_of(preset(name), 10))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
