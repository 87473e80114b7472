from typing import Any

import pytest

from moectl.engine.errors import UserError
from moectl.engine.settings import flatten, resolve
from moectl.taskmoe.settings import TaskmoeSettings

# What the document of the original gives.
DOCUMENT = {
    "train.epochs": 100,
    "optim.name": "adam",
    "optim.lr": 1e-3,
    "optim.weight_decay": 1e-4,
    "train.patience": 20,
    "train.batch_size": 32,
    "train.seed": 100,
    "train.expert_analysis_interval": 10,
    "loss.diversity_weight": 0.1,
    "loss.balance_weight": 0.5,
    "gate.initial_temperature": 2.0,
    "gate.final_temperature": 0.5,
    "data.task": "A",
    "model.num_experts": 3,
    "schedule.name": "constant",
}


def settings(*assignments: str) -> TaskmoeSettings:
    return resolve(TaskmoeSettings, {}, assignments, [])[0]


def test_defaults_are_those_of_the_document() -> None:
    values: dict[str, Any] = flatten(settings().model_dump())
    assert {name: values[name] for name in DOCUMENT} == DOCUMENT


@pytest.mark.parametrize(
    "assignment",
    [
        "model.top_k=4",
        "gate.final_temperature=0",
        "train.batch_size=1",
        "data.val_fraction=0",
        "merge.method=zip",
        "loss.balance=cv",
    ],
)
def test_what_cannot_be_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match=assignment.split("=")[0].replace(".", r"\.")):
        settings(assignment)


def test_as_many_experts_as_are_kept_will_do() -> None:
    assert settings("model.top_k=4", "model.num_experts=4").model.top_k == 4
