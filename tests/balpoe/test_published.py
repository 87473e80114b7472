from typing import Any

import pytest

from moectl.balpoe import published
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine.settings import dump, flatten, from_toml

STANDARD = flatten(dump(BalpoeSettings()))


@pytest.mark.parametrize(
    ("changes", "accuracy"),
    [
        ({}, 0.520),
        ({"data.imbalance_ratio": 10.0}, 0.648),
        ({"data.augment": "autoaugment"}, 0.547),
        ({"data.augment": "autoaugment", "train.epochs": 400}, 0.559),
        ({"data.dataset": "imagenet_lt", "model.arch": "resnext50"}, 0.598),
        ({"data.dataset": "inat18", "model.arch": "resnet50"}, 0.750),
        ({"data.imbalance_ratio": 20.0}, None),
        ({"data.profile": "step"}, None),
        ({"data.dataset": "digits"}, None),
    ],
)
def test_a_run_is_compared_with_its_own_configuration(
    changes: dict[str, Any], accuracy: float | None
) -> None:
    found = published.PUBLISHED.get(published.configuration({**STANDARD, **changes}))
    assert (found.accuracy if found else None) == accuracy


def test_the_uniform_test_set_is_the_balanced_one() -> None:
    for key, rows in published.PUBLISHED_SHIFTS.items():
        unknown, known = rows["uniform", 1]
        assert unknown == known == published.PUBLISHED[key].accuracy


def test_a_known_prior_never_hurts() -> None:
    rows = [row for rows in published.PUBLISHED_SHIFTS.values() for row in rows.values()]
    assert all(known >= unknown for unknown, known in rows)


def test_departures_name_what_is_different() -> None:
    figure = published.PUBLISHED["cifar100", 100, "resnet32", "standard"]
    same = published.departures(STANDARD, figure)
    assert "3 experts and 200 epochs" in same
    assert "this run has" not in same
    other = published.departures({**STANDARD, "train.epochs": 2}, figure)
    assert "this run has 3 experts and 2 epochs" in other


def test_presets_of_the_paper_find_their_figures(root: Any) -> None:
    found = {}
    for path in (root / "presets" / "balpoe").glob("*.toml"):
        settings = flatten(dump(from_toml(BalpoeSettings, path)))
        figure = published.PUBLISHED.get(published.configuration(settings))
        if figure:
            found[path.stem] = figure.accuracy
            assert "this run has" not in published.departures(settings, figure), path.name
    assert found["cifar100_ir100"] == 0.520
    assert found["cifar100_ir100_long"] == 0.559
    assert found["imagenet_lt_r50_long"] == 0.608


@pytest.mark.parametrize(
    ("changes", "worst"),
    [
        ({}, 0.883),
        ({"model.arch": "resnet50", "data.augment": "autoaugment"}, 0.883),
        ({"data.dataset": "imagenet_lt"}, 0.685),
        ({"data.dataset": "inat18"}, 0.162),
        ({"data.imbalance_ratio": 10.0}, None),
        ({"data.profile": "step"}, None),
        ({"data.dataset": "cifar10"}, None),
    ],
)
def test_areas_are_those_of_the_same_data(changes: dict[str, Any], worst: float | None) -> None:
    found = published.published_areas({**STANDARD, **changes})
    assert (found["Chow"].worst if found else None) == worst


def test_the_worst_group_is_never_better_than_the_mean() -> None:
    for methods in published.PUBLISHED_AREAS.values():
        assert len(methods) == 6
        assert all(area.balanced < area.worst for area in methods.values())


def test_plug_in_rules_are_fairer_than_chow() -> None:
    for methods in published.PUBLISHED_AREAS.values():
        chow, plug_in = methods["Chow"], methods["Plug-in [Worst]"]
        assert plug_in.balanced + plug_in.balanced_half_width < chow.balanced
        assert plug_in.worst + plug_in.worst_half_width < chow.worst


def test_every_published_area_says_what_it_is_of() -> None:
    for dataset, ratio in published.PUBLISHED_AREAS:
        settings = {**STANDARD, "data.dataset": dataset, "data.imbalance_ratio": float(ratio)}
        assert published.REJECTION_PAPER in published.area_departures(settings)
