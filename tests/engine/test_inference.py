from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.engine import inference
from moectl.engine.inference import predict
from moectl.engine.launch import build_accelerator
from moectl.engine.sections import TrainSection
from moectl.engine.sources import TensorSource


class Brightness(nn.Module):
    """Two experts for three classes, whose logits tell which image they belong to."""

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.stack([level, -level], 1)[:, :, None] * torch.tensor([1.0, 2.0, 3.0])


def bright(items: int) -> TensorSource:
    images = torch.arange(items, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return TensorSource(images, torch.arange(items) % 3, None, lambda chosen: chosen.float())


def accelerator(precision: str = "no") -> Any:
    return build_accelerator(TrainSection(), True, precision)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_predictions_come_in_the_order_of_the_data(batch_size: int) -> None:
    logits, labels = predict(Brightness(), bright(11), accelerator(), batch_size)
    assert logits.shape == (11, 2, 3)
    assert logits[:, 0, 0].tolist() == list(range(11))
    assert logits[:, 1, 2].tolist() == [-3 * level for level in range(11)]
    assert labels.tolist() == [item % 3 for item in range(11)]


def test_predicting_ends_after_the_batches_asked_for() -> None:
    logits, labels = predict(Brightness(), bright(11), accelerator(), 3, batches=2)
    assert logits[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_predictions_are_in_full_precision_and_without_gradient() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Unflatten(1, (2, 3)))
    assert linear(torch.ones(1, 3, 2, 2)).requires_grad
    logits, _ = predict(linear, bright(5), accelerator("bf16"), 2)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    # Rounded on the way, so the model did compute in the accelerator's precision.
    assert torch.equal(logits, logits.bfloat16().float())


def test_a_process_of_two_predicts_every_second_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "gather_rows", lambda _accelerator, rows, _total: rows)
    own = accelerator()
    second: Any = SimpleNamespace(
        process_index=1, num_processes=2, device=own.device, autocast=own.autocast
    )
    logits, labels = predict(Brightness(), bright(7), second, 2)
    assert logits[:, 0, 0].tolist() == [1, 3, 5]
    assert labels.tolist() == [1, 0, 2]
