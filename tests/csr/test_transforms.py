"""Images and boxes on their way to the network."""

import numpy as np
import pytest
import torch

from moectl.csr.transforms import STATISTICS, Transform, evaluation, measured, training
from moectl.engine.sources import Keyed

AS_IS = ((0.0,) * 3, (1.0,) * 3)
BOX = (3, 0.25, 0.125, 0.5, 0.375)


def scene(height=96, width=64, channels=3):
    """Black but for what is in the box."""
    image = torch.zeros(channels, height, width)
    left, top, right, bottom = BOX[1:]
    image[:, int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    return image


def pixels(box, size):
    left, top, right, bottom = (round(share * size) for share in box[1:])
    return slice(top, bottom), slice(left, right)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_resizing_keeps_box_and_image_together():
    image, boxes = evaluation(32, AS_IS)(scene(), [BOX])
    assert image.shape == (3, 32, 32)
    assert boxes == [pytest.approx(BOX)]
    rows, columns = pixels(boxes[0], 32)
    assert image[:, rows, columns].min() > 0.5
    assert image.sum() == pytest.approx(3 * 8 * 8, rel=0.02)


def test_mirroring_moves_both():
    image, boxes = Transform(64, AS_IS, hflip=1.0)(scene(64, 64), [BOX])
    assert boxes == [pytest.approx((3, 0.5, 0.125, 0.75, 0.375))]
    rows, columns = pixels(boxes[0], 64)
    assert image[:, rows, columns].min() > 0.5
    image[:, rows, columns] = 0
    assert image.sum() == 0


@pytest.mark.parametrize("trial", range(5))
def test_random_moves_keep_the_bright_square_in_its_box(trial):
    torch.manual_seed(trial)
    transform = Transform(64, AS_IS, hflip=0.5, degrees=20)
    image, boxes = transform(scene(), [BOX])
    (box,) = boxes
    assert box[0] == 3
    rows, columns = pixels(box, 64)
    light = image[0].clone()
    total = light.sum()
    assert total == pytest.approx(256, rel=0.05)
    # A turned square fills only part of the upright box around it, and all of that box's middle.
    middle = (rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2
    assert light[middle] > 0.9
    light[max(rows.start - 1, 0) : rows.stop + 1, max(columns.start - 1, 0) : columns.stop + 1] = 0
    assert light.sum() < 0.01 * total
    assert (rows.stop - rows.start) * (columns.stop - columns.start) < 2.2 * total


def test_moves_really_happen():
    transform = Transform(64, AS_IS, hflip=0.5, degrees=20)
    places = {transform(scene(), [BOX])[1][0][1:] for _ in range(6)}
    assert len(places) == 6


def test_box_that_leaves_the_image_is_dropped():
    corner, centre = (0, 0.0, 0.0, 0.02, 0.02), (1, 0.4, 0.4, 0.6, 0.6)
    transform = Transform(64, AS_IS, degrees=45)
    found = [transform(scene(64, 64), [corner, centre])[1] for _ in range(20)]
    assert {1} in [{box[0] for box in boxes} for boxes in found]
    for boxes in found:
        assert boxes[-1][0] == 1
        assert all(0 <= share <= 1 for box in boxes for share in box[1:])


def test_brightness_varies_without_moving():
    transform = Transform(64, AS_IS, brightness=0.2, contrast=0.2)
    image = torch.full((3, 64, 64), 0.5)
    means = [transform(image, [BOX])[0].mean().item() for _ in range(8)]
    assert len(set(means)) == 8
    assert all(0.4 <= mean <= 0.6 for mean in means)
    assert transform(image, [BOX])[1] == [pytest.approx(BOX)]


def test_evaluation_draws_nothing():
    before = torch.get_rng_state()
    transform = evaluation(32, STATISTICS["imagenet"])
    first, second = transform(scene())[0], transform(scene())[0]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_come_from_torch_alone_and_boxes_change_nothing():
    transform = training(32, STATISTICS["imagenet"])
    image = torch.rand(3, 48, 40)
    items = [(image, [BOX]), (image, [])]
    loads = Keyed(items, lambda item: transform(*item), seed=1)
    first = loads[0, 0]
    np.random.default_rng().random()
    torch.rand(7)
    again = loads[0, 0]
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], loads[1, 0][0])
    torch.manual_seed(5)
    with_box = transform(image, [BOX])[0]
    torch.manual_seed(5)
    assert torch.equal(with_box, transform(image)[0])


def test_result_is_a_plain_tensor_and_the_input_stays():
    image = scene()
    moved, _ = training(32, STATISTICS["imagenet"])(image, [BOX])
    assert type(moved) is torch.Tensor
    assert moved.dtype == torch.float32
    assert torch.equal(image, scene())


def test_arrays_of_one_channel_become_three():
    array = scene(channels=1).numpy()
    image, _ = evaluation(32, STATISTICS["imagenet"])(array)
    assert torch.equal(image, evaluation(32, STATISTICS["imagenet"])(scene())[0])


def test_normalisation():
    grey = torch.full((3, 8, 8), 0.5056)
    image, _ = evaluation(8, STATISTICS["medmae"])(grey)
    torch.testing.assert_close(image, torch.zeros(3, 8, 8))
    white, _ = evaluation(8, STATISTICS["imagenet"])(torch.ones(3, 8, 8))
    expected = [(1 - mean) / std for mean, std in zip(*STATISTICS["imagenet"], strict=True)]
    torch.testing.assert_close(white[:, 0, 0], torch.tensor(expected))


def test_measured_statistics_normalise_the_data_set():
    images = [torch.rand(3, 5, 7), torch.rand(3, 4, 4).numpy() * 0.5]
    mean, std = measured(images)
    every = torch.cat([torch.as_tensor(image).flatten(1) for image in images], 1)
    torch.testing.assert_close(torch.tensor(mean), every.mean(1))
    torch.testing.assert_close(torch.tensor(std), every.std(1, correction=0))
    grey_mean, _ = measured([torch.rand(1, 4, 4)])
    assert len(set(grey_mean)) == 1
    assert len(grey_mean) == 3


@pytest.mark.parametrize("images", [[], [torch.ones(3, 2, 2)]])
def test_nothing_to_measure_is_an_error(images):
    with pytest.raises(ValueError, match="without any variation"):
        measured(images)
