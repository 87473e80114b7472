import inspect
from pathlib import Path

import pytest

from moectl.balpoe import cli
from moectl.balpoe.model import BalpoeNet
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine.errors import UserError
from moectl.engine.optim import build_schedule
from moectl.engine.options import flag_of
from moectl.engine.settings import fields, resolve

ORIGINAL_FLAGS = [
    "config", "resume", "device", "log-config", "seed", "val", "validate", "use-wandb", "n-gpu",
    "lr", "wd", "bs", "data-dir", "name", "epochs", "step1", "step2", "warmup", "gamma",
    "t-max", "eta-min", "save-period", "save-dir", "reduce-dimension", "layer2-dimension",
    "layer3-dimension", "layer4-dimension", "num-experts", "use-norm", "norm-scale", "tau-list",
    "tau-max", "tau-min", "combiner-type", "mixup-alpha", "cutmix-alpha", "target-mix-strategy",
    "randaugm", "cutout", "trivialaugm", "finetuning-start", "track-expert-losses",
    "share-layer2", "share-layer3",
]  # fmt: skip
COMMON = {"--resume", "--name"}


def test_the_defaults_are_the_published_recipe():
    settings = BalpoeSettings()
    assert settings.taus == (0.0, 1.0, 2.0)
    assert (settings.data.dataset, settings.data.imbalance_ratio) == ("cifar100", 100)
    assert (settings.optim.name, settings.optim.lr, settings.optim.momentum) == ("sgd", 0.1, 0.9)
    assert settings.optim.nesterov
    assert settings.optim.weight_decay == 5e-4
    assert (settings.train.epochs, settings.train.batch_size) == (200, 128)
    schedule = settings.schedule
    assert (schedule.warmup, schedule.step1, schedule.step2, schedule.gamma) == (5, 160, 180, 0.1)
    assert (settings.loss.mix, settings.loss.mixup_alpha) == ("mixup", 0.4)
    assert settings.train.save_period == 50


@pytest.mark.parametrize("name", ORIGINAL_FLAGS)
def test_every_flag_of_the_original_is_typed_or_names_its_successor(name):
    typed = {
        option
        for field in fields(BalpoeSettings).values()
        if (flag := flag_of(field))
        for option in flag.names
    }
    assert f"--{name}" in typed | COMMON | set(cli._DROPPED)


def test_the_model_section_is_the_constructor_of_the_model():
    arguments = set(inspect.signature(BalpoeNet.__init__).parameters) - {"self", "classes"}
    assert set(type(BalpoeSettings().model).model_fields) == arguments


@pytest.mark.parametrize("value", ["[0, 1.25, 2.5]", "0;1.25;2.5"])
def test_taus_may_be_a_list_or_text(value):
    settings, _ = resolve(BalpoeSettings, {}, [f"loss.tau_list={value}"], [])
    assert settings.taus == (0.0, 1.25, 2.5)


def test_taus_may_be_spread_between_limits():
    settings, _ = resolve(BalpoeSettings, {"model.experts": 7, "loss.tau_list": "limits"}, [], [])
    assert settings.taus == pytest.approx([index / 3 for index in range(7)])


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["model.experts=2"], ["tau_list", "3 values", "2 experts"]),
        (["model.share_layer3=true"], ["share_layer3", "share_layer2"]),
        (["data.imbalance_ratio=0.5"], ["data.imbalance_ratio", "0.5"]),
        (["loss.mix=blend"], ["loss.mix", "mixup", "cutmix"]),
        (["schedule.step1=190"], ["schedule.step1", "schedule.step2"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(assignments, words):
    with pytest.raises(UserError) as refusal:
        resolve(BalpoeSettings, {}, assignments, [])
    for word in words:
        assert word in refusal.value.message


def test_the_root_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MOECTL_BALPOE__DATA__ROOT", "/sets")
    settings, origin = resolve(BalpoeSettings, {}, [], [])
    assert settings.data.root == Path("/sets")
    assert origin["data.root"] == "MOECTL_BALPOE__DATA__ROOT"


def test_the_learning_rate_follows_the_published_table():
    settings = BalpoeSettings()
    factor = build_schedule(settings.schedule, settings.optim.lr, settings.train.epochs)
    rates = {epoch: settings.optim.lr * factor(epoch - 1 + 0.99) for epoch in range(1, 201)}
    start = [rates[epoch] for epoch in range(1, 8)]
    assert start == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    table = {160: 0.1, 161: 0.01, 180: 0.01, 181: 0.001, 200: 0.001}
    assert {epoch: rates[epoch] for epoch in table} == pytest.approx(table)
