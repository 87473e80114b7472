"""Defaults of the document, flags of the original, and settings that cannot be."""

from typing import Any, get_args

import pytest

from moectl.controller.settings import ControllerSettings
from moectl.engine.errors import UserError
from moectl.engine.options import field_option
from moectl.engine.settings import fields, flag_of, flatten, resolve

# What the document of the original gives.
DOCUMENT = {
    "data.train_samples": 200,
    "data.val_samples": 50,
    "data.test_samples": 100,
    "policy.hidden": 256,
    "policy.dropout": 0.1,
    "policy.budget_dim": 2048,
    "policy.budget_low": 50.0,
    "policy.budget_high": 500.0,
    "budget.mode": "absolute",
    "budget.low": 170.0,
    "budget.high": 380.0,
    "reward.kind": "composite",
    "reward.accuracy": 1.0,
    "reward.latency": 0.5,
    "reward.over": 10.0,
    "reward.cost": 0.05,
    "reward.under": 0.1,
    "latency.source": "measured",
    "latency.objective": "total",
    "grpo.group_size": 5,
    "grpo.scale_rewards": "group",
    "grpo.inner_iterations": 1,
    "grpo.clip": 0.2,
    "grpo.kl_coef": 0.0,
    "grpo.plateau_factor": 0.5,
    "grpo.plateau_patience": 5,
    "optim.name": "adam",
    "optim.lr": 1e-4,
    "optim.weight_decay": 1e-5,
    "optim.clip_norm": 1.0,
    "train.epochs": 100,
    "train.batch_size": 1,
    "train.seed": 42,
    "train.wandb_project": "molmo-controller",
    "train.wandb_entity": "",
    "train.wandb_name": "",
}

# What this project does otherwise.
OWN = {
    "policy.budget_scale": 1000.0,
    "policy.blocks": "auto",
    "reward.margin": 0.03,
    "reward.violation": 0.1,
    "grpo.entropy_coef": 0.003,
    "grpo.warm_start": "none",
    "grpo.clone_steps": 300,
    "grpo.keep_last": 3,
    "latency.warmup": 3,
    "latency.repeats": 1,
    "profile.repeats": 5,
    "train.precision": "no",
}


def settings(*assignments: str) -> ControllerSettings:
    return resolve(ControllerSettings, {}, assignments, [])[0]


def names_of(key: str) -> list[str]:
    """Names of a field's option on the command line."""
    option = get_args(field_option(key, fields(ControllerSettings)[key]).annotation)[1]
    return [option.default, *option.param_decls]


@pytest.mark.parametrize("expected", [DOCUMENT, OWN], ids=["document", "own"])
def test_defaults_are_known(expected: dict[str, Any]) -> None:
    values: dict[str, Any] = flatten(settings().model_dump())
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    "assignment",
    [
        "data.dataset=imagenet",
        "data.dataset=",
        "data.train_samples=0",
        "data.val_samples=0",
        "data.sources=text_vqa",
        "data.sources=imagenet=a/b",
        "backbone.dtype=float8",
        "backbone.max_new_tokens=-1",
        "policy.hidden=0",
        "policy.dropout=1",
        "policy.budget_low=500",
        "policy.blocks=random",
        "budget.low=0",
        "budget.low=381",
        "budget.mode=any",
        "reward.kind=sum",
        "reward.margin=1",
        "reward.over=-1",
        "latency.source=guess",
        "latency.objective=decode",
        "latency.clock=sun",
        "latency.repeats=0",
        "grpo.group_size=1",
        "grpo.inner_iterations=0",
        "grpo.clip=0",
        "grpo.clip=1",
        "grpo.kl_coef=-1",
        "grpo.plateau_factor=0",
        "grpo.plateau_factor=1",
        "grpo.plateau_patience=-1",
        "grpo.keep_last=0",
        "optim.lr=0",
        "train.epochs=0",
        "profile.plans=7",
        "profile.what=all",
        "profile.what=",
        "profile.top_ks=4,0",
        "profile.method=ablate",
        "eval.policies=best",
        "eval.budgets=0",
        "eval.bootstrap=99",
        "toy.depth_drop=1",
    ],
)
def test_what_cannot_be_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match=assignment.split("=")[0].replace(".", r"\.")):
        settings(assignment)


def test_ends_of_what_can_be_are_taken() -> None:
    found = settings("budget.low=380", "grpo.group_size=2")
    assert (found.budget.low, found.budget.high) == (380, 380)
    assert settings("policy.budget_low=499").policy.budget_low == 499


def test_inner_iterations_need_the_whole_batch() -> None:
    both = ("grpo.inner_iterations=2", "train.accumulate=2")
    with pytest.raises(UserError, match=r"grpo\.inner_iterations > 1 needs train\.accumulate = 1"):
        settings(*both)
    for one in both:
        settings(one)


def test_work_is_counted_of_whole_answers() -> None:
    with pytest.raises(UserError, match=r"latency\.objective = ttft must be total"):
        settings("latency.source=flops", "latency.objective=ttft")
    assert settings("latency.source=flops").latency.objective == "total"


def test_lists_are_written_with_commas() -> None:
    found = settings(
        "data.dataset=text_vqa, okvqa", "data.sources=text_vqa=a/b,okvqa=c/d",
        "profile.what=grid,latency", "profile.top_ks=4,8", "eval.policies=lut,random",
        "eval.budgets=200,300.5", "eval.budget_frac=0.5",
    )  # fmt: skip
    assert found.data.dataset == ("text_vqa", "okvqa")
    assert found.data.sources == ("text_vqa=a/b", "okvqa=c/d")
    assert (found.profile.what, found.profile.top_ks) == (("grid", "latency"), (4, 8))
    assert found.eval.policies == ("lut", "random")
    assert (found.eval.budgets, found.eval.budget_frac) == ((200, 300.5), (0.5,))


# What the original's commands are given, and where it goes here.
ORIGINAL = {
    "--dataset-names": "data.dataset",
    "--model-path": "backbone.model",
    "--num-epochs": "train.epochs",
    "--batch-size": "train.batch_size",
    "--lr": "optim.lr",
    "--group-size": "grpo.group_size",
    "--seed": "train.seed",
    "--importance-scores-file": "policy.importance",
    "--load-stage1-checkpoint": "grpo.init_from",
    "--use-wandb": "train.wandb",
    "--wandb-project": "train.wandb_project",
    "--wandb-entity": "train.wandb_entity",
    "--wandb-name": "train.wandb_name",
}


@pytest.mark.parametrize("flag", ORIGINAL)
def test_flags_of_the_original_are_known(flag: str) -> None:
    assert any(name.partition("/")[0] == flag for name in names_of(ORIGINAL[flag]))


@pytest.mark.parametrize(
    "sections",
    [
        ("data", "backbone", "latency", "policy", "budget", "reward", "grpo", "optim", "train"),
        ("data", "backbone", "latency", "profile"),
        ("data", "backbone", "latency", "eval"),
        ("backbone", "latency"),
        ("toy", "train"),
    ],
    ids="-".join,
)
def test_no_flag_of_a_command_has_two_meanings(sections: tuple[str, ...]) -> None:
    meanings: dict[str, str] = {}
    overridden = sections == ("toy", "train")  # toy has epochs and batch size of its own
    for key, info in fields(ControllerSettings).items():
        section = key.split(".")[0]
        if section not in sections or not flag_of(info) or (overridden and section == "train"):
            continue
        for name in names_of(key):
            assert meanings.setdefault(name, key) == key, name
