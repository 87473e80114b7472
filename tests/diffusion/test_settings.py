"""Defaults of the document, flags of the original, and settings that cannot be."""

from typing import Any, get_args

import pytest

from moectl.diffusion.settings import DiffusionSettings
from moectl.engine.errors import UserError
from moectl.engine.options import field_option
from moectl.engine.settings import fields, flag_of, flatten, resolve

# What the document of the original gives.
DOCUMENT = {
    "data.dataset": "cifar10",
    "data.image_size": 64,
    "model.channels": 128,
    "model.mults": (1, 2, 4, 8),
    "model.time_dim": 512,
    "model.class_dim": 512,
    "model.moe": True,
    "model.num_experts": 8,
    "model.k_active": 2,
    "model.freq": True,
    "model.dsconv": True,
    "process.steps": 1000,
    "process.schedule": "linear",
    "process.prediction": "epsilon",
    "loss.lambda_load": 0.01,
    "optim.name": "adamw",
    "optim.lr": 1e-4,
    "optim.weight_decay": 0.0,
    "train.epochs": 100,
    "train.batch_size": 16,
}

# What this project does otherwise.
OWN = {
    "model.compat": "none",
    "loss.balance": "switch",
    "loss.p_uncond": 0.1,
    "optim.clip_norm": 1.0,
    "train.ema_decay": 0.9999,
}


def settings(*assignments: str) -> DiffusionSettings:
    return resolve(DiffusionSettings, {}, assignments, [])[0]


def names_of(key: str) -> list[str]:
    """Names of a field's option on the command line."""
    option = get_args(field_option(key, fields(DiffusionSettings)[key]).annotation)[1]
    return [option.default, *option.param_decls]


@pytest.mark.parametrize("expected", [DOCUMENT, OWN], ids=["document", "own"])
def test_defaults_are_known(expected: dict[str, Any]) -> None:
    values: dict[str, Any] = flatten(settings().model_dump())
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    "assignment",
    [
        "data.dataset=imagenet",
        "data.image_size=2",
        "data.val_fraction=0",
        "data.val_fraction=1",
        "model.channels=4",
        "model.num_experts=0",
        "model.k_active=0",
        "model.compat=none-at-all",
        "process.steps=1",
        "process.schedule=sigmoid",
        "process.prediction=sample",
        "loss.gamma=0",
        "loss.lambda_load=-1",
        "loss.p_uncond=1",
        "train.ema_decay=1",
        "sample.eta=1.5",
        "sample.steps=0",
        "sample.guidance=-1",
    ],
)
def test_what_cannot_be_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match=assignment.split("=")[0].replace(".", r"\.")):
        settings(assignment)


def test_more_active_experts_than_there_are_is_refused() -> None:
    wanted = r"model\.k_active = 9 is more than model\.num_experts = 8"
    with pytest.raises(UserError, match=wanted):
        settings("model.k_active=9")
    assert settings("model.k_active=8").model.k_active == 8


def test_number_of_experts_does_not_matter_without_them() -> None:
    assert settings("model.k_active=9", "model.moe=false").model.k_active == 9


def test_size_that_the_levels_do_not_divide_is_refused() -> None:
    wanted = r"data\.image_size = 40: expected a multiple of 16 for 4 levels"
    with pytest.raises(UserError, match=wanted):
        settings("data.image_size=40")
    assert settings("data.image_size=40", "model.mults=[1, 2, 4]").data.image_size == 40
    assert settings("data.image_size=48").data.image_size == 48


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("model.moe", "--moe/--no-moe"),
        ("model.freq", "--freq/--no-freq"),
        ("model.dsconv", "--dsconv/--no-dsconv"),
        ("model.num_experts", "--num-experts"),
        ("model.k_active", "--k-active"),
        ("model.compat", "--compat"),
        ("data.dataset", "--data"),
        ("data.image_size", "--image-size"),
        ("loss.lambda_load", "--lambda-load"),
        ("optim.lr", "--lr"),
        ("train.epochs", "--epochs"),
        ("train.batch_size", "--batch-size"),
        ("train.seed", "--seed"),
        ("sample.sampler", "--sampler"),
        ("sample.steps", "--steps"),
        ("sample.guidance", "--cfg-scale"),
        ("sample.ema", "--ema/--no-ema"),
    ],
)
def test_document_names_this_flag(key: str, flag: str) -> None:
    assert flag in names_of(key)


def test_no_flag_has_two_meanings() -> None:
    """The commands that share tables would have it twice."""
    meanings: dict[str, str] = {}
    flagged = [key for key, info in fields(DiffusionSettings).items() if flag_of(info)]
    for key in flagged:
        for name in names_of(key):
            assert meanings.setdefault(name, key) == key, name
