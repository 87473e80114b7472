import inspect
from pathlib import Path

import pytest

from moectl.balpoe import cli
from moectl.balpoe.model import BalpoeNet
from moectl.balpoe.settings import BalpoeSettings, PluginSection
from moectl.engine.errors import UserError
from moectl.engine.optim import build_schedule
from moectl.engine.settings import fields, flag_of, from_toml, resolve, to_toml

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


# The plug-in


def plugin(*assignments: str) -> PluginSection:
    return resolve(BalpoeSettings, {}, [f"plugin.{text}" for text in assignments], [])[0].plugin


def test_the_defaults_of_the_plugin_are_the_published_protocol():
    section = BalpoeSettings().plugin
    assert section.rates == tuple(number / 10 for number in range(9))
    assert section.costs == ()
    assert (section.groups, section.tail_threshold) == ("head_tail", 20)
    assert (section.label_prior, section.objective) == ("train", "balanced")
    assert (section.posterior, section.expert_weights) == ("poe", "equal")
    assert (section.mu_method, section.iterations, section.rounds) == ("fixed-point", 30, 25)


def test_the_flags_of_the_plugin_are_its_fields():
    flags = {
        option
        for key, field in fields(BalpoeSettings).items()
        if key.startswith("plugin.") and (flag := flag_of(field))
        for option in flag.names
    }
    wanted = "posterior expert-weights label-prior groups tail-threshold objective rates costs"
    assert flags == {f"--{name}" for name in (*wanted.split(), "mu-method")}


@pytest.mark.parametrize("text", ["0.1,0.2", "0.1;0.2", "0.1, 0.2", " 0.1 ; 0.2", "[0.1, 0.2]"])
@pytest.mark.parametrize("name", ["rates", "costs", "lambdas"])
def test_numbers_may_be_text_or_a_list(name, text):
    assert getattr(plugin(f"{name}={text}"), name) == (0.1, 0.2)


@pytest.mark.parametrize(("text", "value"), [("0.3", (0.3,)), ("[0.3]", (0.3,)), ("0", (0.0,))])
def test_one_number_is_a_list_of_one(text, value):
    assert plugin(f"rates={text}").rates == value


def test_lists_come_from_files_flags_and_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "own.toml"
    path.write_text("[plugin]\nrates = [0.1, 0]\nobjective = [1, 3]\nexpert_weights = [2, 1, 1]\n")
    monkeypatch.setenv("MOECTL_BALPOE__PLUGIN__COSTS", "[0.2]")
    found = resolve(BalpoeSettings, {"plugin.lambdas": "1;-6"}, [], [path])[0].plugin
    assert (found.rates, found.costs, found.lambdas) == ((0.1, 0.0), (0.2,), (1.0, -6.0))
    assert found.group_shares == (0.25, 0.75)
    assert found.expert_shares == (0.5, 0.25, 0.25)


def test_either_rates_or_costs_may_be_empty():
    assert plugin("rates=", "costs=0.1").rates == ()
    assert plugin("rates=[]", "costs=[0.1]").costs == (0.1,)


@pytest.mark.parametrize("text", ["1;3", "1,3", "[1, 3]", "0.25;0.75"])
@pytest.mark.parametrize("name", ["objective", "expert_weights"])
def test_weights_may_be_a_list_and_sum_to_1(name, text):
    section = plugin(f"{name}={text}")
    shares = section.group_shares if name == "objective" else section.expert_shares
    assert shares == (0.25, 0.75)


def test_words_are_no_lists():
    for objective in ("balanced", "worst"):
        assert plugin(f"objective={objective}").group_shares is None
    for weights in ("equal", "grid"):
        assert plugin(f"expert_weights={weights}").expert_shares is None


def test_a_plugin_section_survives_json_and_toml(tmp_path):
    texts = ["rates=0.1", "costs=0.2;0.3", "objective=1;3", "expert_weights=1;1;1"]
    texts = [f"plugin.{text}" for text in texts]
    settings, _ = resolve(BalpoeSettings, {}, texts, [])
    assert PluginSection(**settings.plugin.model_dump(mode="json")) == settings.plugin
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings))
    assert from_toml(BalpoeSettings, path).plugin == settings.plugin


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["rates=1"], ["plugin.rates", "less than 1"]),
        (["rates=-0.1"], ["plugin.rates"]),
        (["rates=0.1;half"], ["plugin.rates", "half"]),
        (["rates=0.1;"], ["plugin.rates", "number"]),
        (["rates=nan"], ["plugin.rates", "finite"]),
        (["costs=1.01"], ["plugin.costs", "1.01"]),
        (["costs=-1"], ["plugin.costs"]),
        (["lambdas=inf"], ["plugin.lambdas", "finite"]),
        (["rates="], ["plugin.rates", "plugin.costs", "empty"]),
        (["rates=[]", "costs=[]"], ["plugin.rates", "plugin.costs", "empty"]),
        (["objective=fair"], ["plugin.objective", "'fair'", "balanced or worst"]),
        (["objective=1;-2"], ["plugin.objective", "1;-2"]),
        (["objective=0;0"], ["plugin.objective", "0;0"]),
        (["objective="], ["plugin.objective"]),
        (["objective=[]"], ["plugin.objective"]),
        (["expert_weights=even"], ["plugin.expert_weights", "'even'", "equal or grid"]),
        (["expert_weights=1;nan"], ["plugin.expert_weights"]),
        (["expert_weights=1;inf"], ["plugin.expert_weights"]),
        (["posterior=single"], ["plugin.posterior", "single"]),
        (["posterior=single:-1"], ["plugin.posterior"]),
        (["mu_method=search"], ["plugin.mu_method", "fixed-point"]),
        (["iterations=0"], ["plugin.iterations"]),
        (["rounds=0"], ["plugin.rounds"]),
        (["step_size=0"], ["plugin.step_size"]),
        (["keep=first"], ["plugin.keep", "best"]),
        (["tail_threshold=-1"], ["plugin.tail_threshold"]),
    ],
)
def test_a_plugin_that_makes_no_sense_is_refused_by_name(assignments, words):
    with pytest.raises(UserError) as refusal:
        plugin(*assignments)
    for word in words:
        assert word in refusal.value.message
