"""The size of a training, before it begins."""

import json

import pytest

from moectl.diffusion import size as module
from moectl.diffusion.model import build
from moectl.diffusion.profile import macs, parameters
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.size import size
from moectl.diffusion.variants import arguments_of
from moectl.engine.errors import UserError
from moectl.engine.settings import resolve

SMALL = {
    "data.dataset": "digits", "data.image_size": 8, "data.val_fraction": 0.1, "model.channels": 8,
    "model.mults": "1,2", "model.num_experts": 3, "model.time_dim": 8, "model.class_dim": 8,
}  # fmt: skip


def settings(**values):
    given = SMALL | {key.replace("__", "."): value for key, value in values.items()}
    return resolve(DiffusionSettings, given, [], [])[0]


def test_size_of_digits_is_counted():
    found = size(settings(train__batch_size=100, train__epochs=3))
    model = build(arguments_of(settings(), 10))
    total, used = parameters(model)
    assert found == {
        "training images": 1617,
        "held-out images": 180,
        "classes": 10,
        "parameters": total,
        "parameters used per image": used,
        "multiply-adds per image": macs(model, 8),
        "updates per epoch": 17,
        "updates": 51,
    }
    assert total > used > 0


def test_size_of_cifar10_needs_no_files(tmp_path):
    found = size(settings(data__dataset="cifar10", data__root=tmp_path))
    assert (found["training images"], found["held-out images"]) == (50_000, 10_000)
    assert (found["updates per epoch"], found["updates"]) == (3125, 312_500)
    assert found["classes"] == 10


def test_cost_goes_with_the_side_and_parameters_do_not():
    small, large = size(settings()), size(settings(data__image_size=16))
    assert small["parameters"] == large["parameters"]
    assert 3 < large["multiply-adds per image"] / small["multiply-adds per image"] < 4.01


def test_nothing_is_fetched_to_know_the_size(monkeypatch):
    asked, real = [], module.load

    def watch(section):
        asked.append(section.download)
        return real(section)

    monkeypatch.setattr(module, "load", watch)
    size(settings(data__download=True))
    assert asked == [False]


def test_missing_images_are_said_and_settings_shown(tmp_path, diffusion):
    with pytest.raises(UserError, match="no such folder"):
        size(settings(data__dataset="folder", data__root=tmp_path / "gone"))
    code, out, _ = diffusion(
        "train", "--data", "folder", "--data-dir", "gone", "--dry-run", "--json"
    )
    assert code == 2
    assert json.loads(out)["size"] == {"size unknown": "gone: no such folder"}
