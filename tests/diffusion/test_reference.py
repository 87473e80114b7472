"""What samples are compared with: real images of all classes, in their own shares."""

from types import SimpleNamespace

import pytest
import torch

from moectl.diffusion import reference
from moectl.diffusion.data import load
from moectl.diffusion.reference import check_reference, labels_like, reference_of
from moectl.diffusion.settings import DataSection, EvalSection
from moectl.engine.errors import UserError
from moectl.engine.sources import TensorSource


class TestLabels:
    def test_equal_classes_come_in_turn(self):
        labels = torch.arange(10).repeat_interleave(7)
        assert labels_like(labels, 30, 10).tolist() == list(range(10)) * 3

    def test_shares_are_those_of_the_images(self):
        labels = torch.tensor([0] * 90 + [1] * 10)
        found = labels_like(labels, 50, 2)
        assert found.bincount().tolist() == [45, 5]

    def test_a_rare_class_comes_now_and_then(self):
        labels = torch.tensor([0] * 90 + [1] * 10)
        places = (labels_like(labels, 100, 2) == 1).nonzero()[:, 0].tolist()
        assert places == pytest.approx(range(5, 100, 10), abs=1)

    @pytest.mark.parametrize("count", [1, 9, 10, 11, 23, 1000])
    def test_there_are_as_many_as_wanted_and_none_of_a_class_without_images(self, count):
        labels = torch.tensor([0] * 5 + [2] * 3 + [3] * 3)
        found = labels_like(labels, count, 5)
        assert len(found) == count
        exact = torch.tensor([5, 0, 3, 3, 0]) * count / 11
        assert (found.bincount(minlength=5) - exact).abs().max() < 1
        assert not set(found.tolist()) & {1, 4}


def raw(accelerator, monkeypatch, data):
    """A reference whose features are pixels."""
    monkeypatch.setattr(reference, "inception", lambda _: Pixels())
    return reference_of(EvalSection(features="inception"), data, accelerator, 64)


class Pixels(torch.nn.Module):
    def forward(self, images):
        return images[:, 0].flatten(1).double()


def test_sorted_classes_are_mixed(monkeypatch):
    from moectl.engine.launch import build_accelerator
    from moectl.engine.sections import TrainSection

    data = load(DataSection(dataset="digits", image_size=8, val_fraction=0.2))
    order = data.train.labels.argsort(stable=True)
    train = TensorSource(data.train.images[order], data.train.labels[order], None, data.train.plain)
    pixels = train.images[:, 0].flatten(1).double()
    other = SimpleNamespace(
        train=train, test=data.test, class_names=data.class_names, facts=data.facts
    )
    accelerator = build_accelerator(TrainSection(precision="no"), cpu=True)
    found = raw(accelerator, monkeypatch, other)
    assert found.name == "FID"
    assert torch.equal(found.labels, train.labels)
    assert found.held_out_accuracy is None
    assert sorted(found.train.tolist()) == sorted(pixels.tolist())
    known = {
        tuple(row): int(label) for row, label in zip(pixels.tolist(), train.labels, strict=True)
    }
    first = [known[tuple(row)] for row in found.train[:100].tolist()]
    assert set(first) == set(range(10))


def data_of(train=100, test=100, classes=2):
    return SimpleNamespace(
        train=range(train),
        test=range(test),
        class_names=[str(number) for number in range(classes)],
        facts={"dataset": "folder"},
    )


@pytest.mark.parametrize("counts", [{"train": 3}, {"test": 3}])
def test_too_few_images_are_refused(counts):
    (name,) = counts
    words = {"train": "training", "test": "held-out"}[name]
    with pytest.raises(UserError, match=f"3 {words} images are too few"):
        check_reference(EvalSection(), data_of(**counts))


def test_one_class_has_no_classifier():
    with pytest.raises(UserError, match="one class") as caught:
        check_reference(EvalSection(), data_of(classes=1))
    assert "--features inception, or none" in caught.value.hint


def test_without_features_nothing_is_refused():
    check_reference(EvalSection(features="none"), data_of(1, 1, 1))


def test_inception_is_asked_for_early(monkeypatch):
    def refuse(_):
        raise UserError("not installed")

    monkeypatch.setattr(reference, "inception", refuse)
    with pytest.raises(UserError, match="not installed"):
        check_reference(EvalSection(features="inception"), data_of())


def test_the_weights_of_inception_are_those_that_were_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(reference, "inception", asked.append)
    for path in (None, tmp_path / "own.pth"):
        check_reference(EvalSection(features="inception", inception_weights=path), data_of())
    assert asked == [None, tmp_path / "own.pth"]
