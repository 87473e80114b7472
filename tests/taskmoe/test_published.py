"""The published figures agree with each other and with the classes of the tasks."""

import pytest

from moectl.taskmoe.manifest import TASK_A, TASK_B, Manifest
from moectl.taskmoe.published import PUBLISHED


@pytest.mark.parametrize("manifest", [TASK_A, TASK_B], ids=["A", "B"])
def test_every_class_of_a_task_has_a_figure(manifest: Manifest) -> None:
    names = {entry.name for one in manifest.specialists for entry in one.classes}
    assert set(PUBLISHED[manifest.task].classes) == names


def test_the_overall_figure_of_task_a_is_the_mean_of_its_classes() -> None:
    classes = PUBLISHED["A"].classes
    assert PUBLISHED["A"].overall == pytest.approx(sum(classes.values()) / len(classes), abs=0.005)


def test_the_overall_figure_of_task_b_counts_shared_classes_twice() -> None:
    classes = dict(PUBLISHED["B"].classes)
    shared = [classes[name] for name in ("hyena", "Chihuahua", "African_hunting_dog")]
    assert PUBLISHED["B"].overall == pytest.approx(
        (sum(classes.values()) + sum(shared)) / 15, abs=0.005
    )
    assert sum(classes.values()) / 12 == pytest.approx(74.67, abs=0.005)
