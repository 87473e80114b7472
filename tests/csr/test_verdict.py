"""The loss and the scores of a verdict."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.csr import losses
from moectl.csr.metrics import multiclass, ranking
from moectl.csr.settings import TaskSection
from moectl.csr.verdict import monitor_of, task_loss, task_scores

NAMES = ["a", "b", "c"]
COUNTS, IMAGES = torch.tensor([10.0, 100.0, 0.0]), 1000


def section(loss: str, smoothing: float = 0.0) -> TaskSection:
    return TaskSection.model_validate({"loss": loss, "label_smoothing": smoothing})


def draw(seed: int = 0, images: int = 12) -> tuple[Tensor, Tensor]:
    """Logits (N, 3), and targets (N, 3) with both answers in each column."""
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 3, generator=draws)
    targets = (torch.rand(images, 3, generator=draws) < 0.5).float()
    targets[0], targets[1] = 0, 1
    return logits, targets


def by_hand(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    plain = nn.functional.binary_cross_entropy_with_logits
    match name:
        case "bce":
            return plain(logits, targets)
        case "bce_pos_weight":  # 99 to 1 is capped at 20; a column without positives as well
            return plain(logits, targets, pos_weight=torch.tensor([20.0, 9.0, 20.0]))
        case "focal":
            return losses.focal(logits, targets, 0.25, 2.0)
        case "asymmetric":
            return losses.asymmetric(logits, targets, 4.0, 1.0, 0.05)
        case _:
            weights = losses.class_balanced_weights(torch.tensor([10.0, 100.0, 1.0]), 0.9999)
            return losses.focal(logits, targets, None, 2.0, weights)


@pytest.mark.parametrize("name", ["bce", "bce_pos_weight", "focal", "asymmetric", "class_balanced"])
def test_a_loss_of_several_targets_is_what_it_is_called(name: str) -> None:
    logits, targets = draw()
    found = task_loss(section(name), logits, targets, COUNTS, IMAGES)
    assert found.item() == pytest.approx(by_hand(name, logits, targets).item(), rel=1e-6)


def test_losses_differ_from_each_other() -> None:
    logits, targets = draw()
    names = ("bce", "bce_pos_weight", "focal", "asymmetric", "class_balanced")
    found = [task_loss(section(name), logits, targets, COUNTS, IMAGES).item() for name in names]
    assert len({round(value, 6) for value in found}) == len(names)


def test_one_class_per_image_has_a_smoothed_cross_entropy() -> None:
    logits, classes = draw()[0], torch.arange(12) % 3
    logs = logits.log_softmax(1)
    own = -logs[torch.arange(12), classes].mean()
    plain = task_loss(section("ce"), logits, classes, COUNTS, IMAGES)
    smooth = task_loss(section("ce", 0.3), logits, classes, COUNTS, IMAGES)
    assert plain.item() == pytest.approx(own.item())
    assert smooth.item() == pytest.approx((0.7 * own - 0.3 * logs.mean()).item())


def part(targets: Tensor) -> Any:
    return SimpleNamespace(targets=targets)


def test_several_targets_are_scored_by_their_order() -> None:
    logits, targets = draw()
    found = task_scores(logits, part(targets), NAMES)
    expected = ranking(logits.numpy(), targets.numpy(), NAMES)
    assert set(found) == {"val/loss", "val/task_auroc", "val/task_map"}
    assert found["val/task_auroc"] == expected["auroc_macro"]
    assert found["val/task_map"] == expected["map"]
    plain = nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert found["val/loss"] == pytest.approx(plain.item())
    assert monitor_of(several=True) in found


def test_classes_are_scored_by_their_decisions() -> None:
    logits, classes = draw()[0], torch.arange(12) % 3
    found = task_scores(logits, part(classes), NAMES)
    assert set(found) == {"val/loss", "val/accuracy", "val/macro_f1"}
    right = (logits.argmax(1) == classes).double().mean().item()
    assert found["val/accuracy"] == pytest.approx(right)
    expected = multiclass(logits.numpy(), classes.numpy(), NAMES)
    assert found["val/macro_f1"] == expected["f1_macro"]
    loss = nn.functional.cross_entropy(logits, classes)
    assert found["val/loss"] == pytest.approx(loss.item())
    assert monitor_of(several=False) in found


def test_a_score_that_cannot_be_said_is_none() -> None:
    logits, targets = draw()
    found = task_scores(logits, part(torch.zeros_like(targets)), NAMES)
    assert found["val/task_auroc"] is None
