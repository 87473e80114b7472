"""The size of a training, without doing it."""

from typing import Any

from torch import nn

from moectl.taskmoe import specialist, train
from moectl.taskmoe.data import Data, load
from moectl.taskmoe.model import multiply_adds
from moectl.taskmoe.settings import TaskmoeSettings


def mixture(settings: TaskmoeSettings) -> dict[str, Any]:
    """Return images, parameters, multiply-adds and updates of `train`."""
    data = load(settings.data)
    return _size(settings, data, train.build(settings, data))


def member(settings: TaskmoeSettings) -> dict[str, Any]:
    """Return the same of `specialist`."""
    data = specialist.load_classes(settings)
    return _size(settings, data, specialist.build(settings, data))


def _size(settings: TaskmoeSettings, data: Data, model: nn.Module) -> dict[str, Any]:
    whole, rest = divmod(len(data.train), settings.train.batch_size)
    updates = whole + (rest > 1)  # batch norm has no variance of one image
    return {
        "training images": len(data.train),
        "validation images": len(data.val),
        "test images": len(data.test),
        "classes": len(data.class_names),
        "parameters": sum(part.numel() for part in model.parameters()),
        "multiply-adds per image": sum(multiply_adds(model, data.image_size).values()),
        "updates per epoch": updates,
        "updates": updates * settings.train.epochs,
    }
