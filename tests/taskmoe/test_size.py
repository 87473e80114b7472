"""The size of a training, without doing it."""

import json
from collections.abc import Callable

import pytest

from moectl.taskmoe import size
from moectl.taskmoe.settings import TaskmoeSettings

Call = Callable[..., tuple[int, str, str]]


def settings(**model: object) -> TaskmoeSettings:
    return TaskmoeSettings(data={"task": "digits"}, model=model, train={"epochs": 3})  # type: ignore[arg-type]


def test_a_mixture_is_as_large_as_its_network() -> None:
    found = size.mixture(settings())
    assert found["parameters"] == 2_280_274 - 6 * 769  # six classes fewer than task A
    assert (found["classes"], found["test images"]) == (9, 647)
    assert found["updates"] == 3 * found["updates per epoch"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_dense_network_is_as_large_as_the_mixture(number: int) -> None:
    one = TaskmoeSettings(
        data={"task": "digits"},  # type: ignore[arg-type]
        model={"width": 16},  # type: ignore[arg-type]
        specialist={"number": number},  # type: ignore[arg-type]
    )
    ratio = size.member(one)["parameters"] / size.mixture(one)["parameters"]
    assert (0.95 < ratio < 1.05) is (number == 0)


def test_a_dry_run_shows_it_and_does_nothing(taskmoe: Call) -> None:
    code, out, _ = taskmoe("train", "--task", "digits", "--width", "4", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["size"]["updates per epoch"] == 28
