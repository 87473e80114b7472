import pytest
import torch
from torch import Tensor

from moectl.taskmoe.measures import counted_twice, measure

TASK_A = [62, 80, 88, 67, 54, 90, 79, 73, 95, 69, 91, 93, 91, 79, 72]
TASK_B = {
    "elephant": 84, "hyena": 72, "zebra": 92, "collie": 86, "golden_retriever": 68, "boxer": 62,
    "patas": 60, "baboon": 62, "Arctic_fox": 84, "Chihuahua": 60, "lynx": 82,
    "African_hunting_dog": 84,
}  # fmt: skip
SHARED = {"hyena": (0, 1), "Chihuahua": (0, 2), "African_hunting_dog": (1, 2)}


def judged(percent: list[int], per_class: int) -> tuple[Tensor, Tensor]:
    """Logits and labels of which the given percent of every class are right."""
    classes = len(percent)
    labels = torch.arange(classes).repeat_interleave(per_class)
    guesses = labels.clone()
    for label, share in enumerate(percent):
        wrong = round(per_class * (100 - share) / 100)
        start = label * per_class
        guesses[start : start + wrong] = (label + 1) % classes
    return torch.nn.functional.one_hot(guesses, classes).float() * 4, labels


def test_the_published_task_a_figures() -> None:
    logits, labels = judged(TASK_A, 100)
    owners = torch.zeros(15, 3)
    owners[torch.arange(15), torch.arange(15) // 5] = 1
    names = [f"class {number}" for number in range(15)]
    found = measure(logits, labels, names, owners)
    assert round(found["overall_accuracy"], 2) == 78.87
    assert found["macro_accuracy"] == pytest.approx(found["overall_accuracy"])
    assert list(found["class_accuracies"].values()) == pytest.approx(TASK_A)
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(2.1, abs=0.05)
    groups = found["group_accuracy"] * found["within_group_accuracy"] / 100
    assert groups == pytest.approx(found["overall_accuracy"])  # disjoint: joint = group x within


def test_the_published_task_b_figures_and_what_counting_twice_does() -> None:
    logits, labels = judged(list(TASK_B.values()), 50)
    owners = torch.zeros(12, 3)
    for number, name in enumerate(TASK_B):
        for specialist in SHARED.get(name, (number % 3,)):
            owners[number, specialist] = 1
    found = measure(logits, labels, list(TASK_B), owners)
    assert round(found["overall_accuracy"], 2) == 74.67
    assert found["n"] == 600
    counts = owners.sum(1)[labels]
    assert counts.sum() == 750
    assert round(counted_twice(logits.argmax(1) == labels, counts), 2) == 74.13


def test_small_table_by_hand() -> None:
    """Four classes, two specialists of two each; one image crosses the border."""
    owners = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    logits = torch.tensor(
        [[9.0, 0, 0, 0], [0, 0, 9, 1], [1, 9, 0, 0], [0, 0, 9, 0], [0, 0, 9, 1], [0, 9, 0, 1]]
    )
    labels = torch.tensor([0, 0, 0, 2, 3, 3])
    found = measure(logits, labels, ["a", "b", "c", "d"], owners)
    assert found["overall_accuracy"] == pytest.approx(100 * 2 / 6)
    assert found["class_accuracies"] == pytest.approx({"a": 100 / 3, "b": None, "c": 100, "d": 0})
    assert found["group_accuracy"] == pytest.approx(100 * 4 / 6)
    assert found["within_group_accuracy"] == pytest.approx(50)
    assert found["per_task_accuracy"] == pytest.approx([200 / 3, 200 / 3])
    assert found["top_confusions"][0] == {"true": "a", "predicted": "b", "n": 1}
    assert found["classes"]["b"] == {
        "n": 0, "correct": 0, "wilson_low": None, "wilson_high": None,
    }  # fmt: skip
