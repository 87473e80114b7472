import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional

from moectl.common.images import Plain, Standard, crop, cut_out, normalise, pick

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BYTES = ((0.0,) * 3, (1 / 255,) * 3)
"""Mean and deviation that leave grey levels as they are."""


def noise(count, side=32, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draws)


def uniforms(count, draws, seed=1):
    return torch.rand(count, draws, generator=torch.Generator().manual_seed(seed))


def one_by_one(image, row, padding, flip, degrees):
    """What torchvision does to a Pillow image for the same draws."""
    shifts = 2 * padding + 1
    top, left = int(row[0] * shifts), int(row[1] * shifts)
    side = image.shape[-1]
    image = functional.pad(functional.to_pil_image(image), padding)
    image = functional.crop(image, top, left, side, side)
    if flip and row[2] < 0.5:
        image = functional.hflip(image)
    return functional.rotate(image, (float(row[3].double()) * 2 - 1) * degrees)


@pytest.mark.parametrize(
    ("side", "padding", "flip", "degrees"),
    [(32, 4, True, 15.0), (32, 4, False, 180.0), (9, 0, True, 40.0), (8, 1, False, 0.0)],
)
def test_standard_gives_the_pixels_of_torchvision_on_pillow_images(side, padding, flip, degrees):
    images, draws = noise(64, side), uniforms(64, 6)
    standard = Standard(*BYTES, padding=padding, flip=flip, degrees=degrees)
    expected = torch.stack(
        [
            functional.pil_to_tensor(one_by_one(image, row, padding, flip, degrees))
            for image, row in zip(images, draws, strict=True)
        ]
    )
    assert torch.equal(standard(images, draws).round(), expected.float())


def test_rotation_of_tensors_differs_in_rare_pixels_only():
    images = noise(64)
    angles = uniforms(64, 1)[:, 0].double() * 30 - 15
    still = torch.zeros(64, 2, dtype=torch.long)
    ours = crop(images, still, torch.zeros(64, dtype=torch.bool), 0, angles)
    theirs = torch.stack(
        [functional.rotate(i, a) for i, a in zip(images, angles.tolist(), strict=True)]
    )
    assert (ours != theirs).float().mean() < 0.001


def test_plain_is_torchvisions_normalisation():
    images = noise(8)
    expected = functional.normalize(images / 255, MEAN, STD)
    torch.testing.assert_close(Plain(MEAN, STD)(images), expected, atol=2e-6, rtol=0)


def test_draws_that_change_nothing_give_the_plain_image():
    images = noise(4)
    draws = torch.full((4, 6), 0.5)
    assert torch.equal(Standard(MEAN, STD)(images, draws), normalise(images, MEAN, STD))


def test_shifts_are_uniform_over_all_eighty_one_positions():
    count = 20000
    images = torch.zeros(count, 1, 12, 12, dtype=torch.uint8)
    images[:, :, 6, 6] = 1
    standard = Standard([0.0], [1 / 255], padding=4, flip=False, degrees=0)
    place = standard(images, uniforms(count, 6)).round().flatten(1).argmax(1)
    rows, columns = 6 + 4 - place // 12, 6 + 4 - place % 12
    counts = torch.bincount(rows * 9 + columns, minlength=81)
    assert len(counts) == 81
    chi_square = ((counts - count / 81) ** 2 / (count / 81)).sum()
    assert chi_square < 125  # the 0.1 % quantile for 80 degrees of freedom


def test_half_of_the_images_are_mirrored():
    images = torch.zeros(10000, 1, 4, 4, dtype=torch.uint8)
    images[..., 3] = 1
    standard = Standard([0.0], [1 / 255], padding=0, degrees=0)
    mirrored = standard(images, uniforms(10000, 6))[:, 0, 0, 0].round()
    assert mirrored.mean().item() == pytest.approx(0.5, abs=0.02)


def test_digits_are_never_mirrored():
    images = noise(500)
    draws = uniforms(500, 6)
    draws[:, :2] = 0.5
    assert torch.equal(
        Standard(*BYTES, flip=False, degrees=0)(images, draws).round(), images.float()
    )


def test_angles_are_distributed_as_in_torchvision():
    torch.manual_seed(0)
    side, count = 33, 2000
    image = torch.zeros(1, side, side, dtype=torch.uint8)
    image[:, 16, 28:31] = 255
    y, x = torch.meshgrid(torch.arange(side) - 16, torch.arange(side) - 16, indexing="ij")

    def angles(turned):
        angle = torch.rad2deg(torch.atan2(-(turned * y).sum((1, 2)), (turned * x).sum((1, 2))))
        return angle, torch.histc(angle, bins=7, min=-15, max=15) / count

    rotate = transforms.RandomRotation(15)
    _, theirs = angles(torch.stack([rotate(image)[0] for _ in range(count)]).float())
    standard = Standard([0.0], [1 / 255], padding=0, flip=False)
    ours, shares = angles(standard(image.expand(count, 1, -1, -1), uniforms(count, 6))[:, 0])
    assert ours.min() < -13
    assert ours.max() > 13
    torch.testing.assert_close(shares, theirs, atol=0.045, rtol=0)


def test_moments_of_pixels_agree_with_the_chain_of_torchvision():
    torch.manual_seed(0)
    side, count = 16, 3000
    image = (torch.arange(side * side).view(1, side, side) % 251).to(torch.uint8).expand(3, -1, -1)
    chain = transforms.Compose(
        [
            transforms.RandomCrop(side, padding=2),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(15),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    picture = functional.to_pil_image(image)
    theirs = torch.stack([chain(picture)[0] for _ in range(count)])
    ours = Standard(MEAN, STD, padding=2)(image.expand(count, -1, -1, -1), uniforms(count, 6))[:, 0]
    error = theirs.std(0) / count**0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() / (error + 1e-3)).max() < 6.5
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.1, rtol=0)


def test_samples_do_not_depend_on_their_batch():
    images, draws = noise(10), uniforms(10, 6)
    standard = Standard(MEAN, STD, cutout=16)
    assert torch.equal(standard(images, draws)[3:5], standard(images[3:5], draws[3:5]))


def test_the_largest_uniform_picks_the_last_choice():
    last = torch.tensor([1 - 2.0**-24])
    assert [pick(last, n).item() for n in (2, 9, 25, 1000)] == [1, 8, 24, 999]


def test_cutout_zeroes_one_clipped_square_of_the_normalised_image():
    count = 5000
    draws = uniforms(count, 2)
    cut = cut_out(torch.ones(count, 1, 32, 32), draws, 16)[:, 0]
    zeros = (cut == 0).sum(dim=(1, 2))
    rows, columns = (draws * 32).long().T
    height = (rows + 8).clamp(max=32) - (rows - 8).clamp(min=0)
    width = (columns + 8).clamp(max=32) - (columns - 8).clamp(min=0)
    assert torch.equal(zeros, height * width)
    assert zeros.max() == 256
    assert zeros.min() == 64
    assert cut[0, rows[0], columns[0]] == 0


def test_cutout_of_standard_leaves_the_rest_as_it_is():
    images, draws = noise(16), uniforms(16, 6)
    whole = Standard(MEAN, STD)(images, draws)
    holed = Standard(MEAN, STD, cutout=16)(images, draws)
    assert ((holed == whole) | (holed == 0)).all()
    assert (holed != whole).any(dim=1).flatten(1).sum(1).min() > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_finds_the_same_pixels_without_waiting():
    images, draws = noise(64), uniforms(64, 6)
    standard = Standard(MEAN, STD, cutout=16)
    expected = standard(images, draws)
    images, draws = images.cuda(), draws.cuda()
    standard(images, draws)  # fills the caches of constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = standard(images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, atol=1e-6, rtol=0)
