"""The size of a training, without doing it."""

from typing import Any

from moectl.diffusion.data import load
from moectl.diffusion.model import build
from moectl.diffusion.profile import macs, parameters
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.variants import arguments_of

_CIFAR10 = (50_000, 10_000, 10)


def size(settings: DiffusionSettings) -> dict[str, Any]:
    """Return images, parameters, multiply-adds and updates.

    Raises:
        UserError: if the files of the images are missing; those of CIFAR-10 need not be there.
    """
    if settings.data.dataset == "cifar10":
        train, test, classes = _CIFAR10
    else:
        data = load(settings.data.model_copy(update={"download": False}))
        train, test, classes = len(data.train), len(data.test), len(data.class_names)
    model = build(arguments_of(settings, classes))
    total, used = parameters(model)
    updates = -(-train // settings.train.batch_size)
    return {
        "training images": train,
        "held-out images": test,
        "classes": classes,
        "parameters": total,
        "parameters used per image": used,
        "multiply-adds per image": macs(model, settings.data.image_size),
        "updates per epoch": updates,
        "updates": updates * settings.train.epochs,
    }
