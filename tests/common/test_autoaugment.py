import pytest
import torch
from torchvision import transforms
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, functional
from torchvision.transforms.autoaugment import _apply_op

from moectl.common import autoaugment
from moectl.common.autoaugment import (
    CIFAR10_POLICY,
    AutoAugment,
    RandAugment,
    TrivialAugment,
    magnitude_levels,
)
from moectl.common.image_ops import TWO_WAY, Op
from moectl.common.images import normalise

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BYTES = ((0.0,) * 3, (1 / 255,) * 3)
"""Mean and deviation that leave grey levels as they are."""


def smooth(count, side=32):
    rough = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(rough, size=(side, side), mode="bilinear")
    return (images * 255).round().to(torch.uint8)


def uniforms(count, draws, seed=1):
    return torch.rand(count, draws, generator=torch.Generator().manual_seed(seed))


def framed(image, row):
    """The crop and mirror that precede every policy."""
    image = functional.crop(functional.pad(image, 4), int(row[0] * 9), int(row[1] * 9), 32, 32)
    return functional.hflip(image) if row[2] < 0.5 else image


def test_policy_table_is_torchvisions():
    words = CIFAR10_POLICY.split()
    rows = zip(words[::3], words[1::3], words[2::3], strict=True)
    ours = [(name, float(chance), int(level)) for name, chance, level in rows]
    policies = transforms.AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert ours == [(name, chance, level or 0) for pair in policies for name, chance, level in pair]
    assert len(ours) == 50


@pytest.mark.parametrize(
    ("space", "bins", "reach"),
    [
        (
            transforms.AutoAugment()._augmentation_space(10, (32, 40)),
            10,
            {
                "shear": 0.3,
                "across": 150 / 331 * 40,
                "down": 150 / 331 * 32,
                "degrees": 30,
                "factor": 0.9,
                "bits": 4,
            },
        ),
        (
            transforms.TrivialAugmentWide()._augmentation_space(31),
            31,
            {"shear": 0.99, "across": 32, "down": 32, "degrees": 135, "factor": 0.99, "bits": 6},
        ),
    ],
    ids=["auto", "trivial"],
)
def test_levels_mean_what_they_mean_in_torchvision(space, bins, reach):
    levels = magnitude_levels(bins, **reach)
    for name, (expected, signed) in space.items():
        torch.testing.assert_close(
            levels[Op[name]], expected.double().expand(bins), atol=1e-6, rtol=0
        )
        assert (Op[name] in TWO_WAY) == signed


def test_trivial_chooses_among_torchvisions_operations():
    space = transforms.TrivialAugmentWide()._augmentation_space(31)
    assert {op.name for op in autoaugment.TRIVIAL_OPS} == set(space)


def test_autoaugment_equals_torchvisions_operations_for_the_same_draws():
    count = 200
    images, draws = smooth(count), uniforms(count, 10)
    draws[:, 3] = (torch.arange(count) % 25 + 0.5) / 25
    policies = transforms.AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    space = transforms.AutoAugment()._augmentation_space(10, (32, 32))
    gaps = []
    for row, result in zip(range(count), AutoAugment(*BYTES)(images, draws), strict=True):
        image = framed(images[row], draws[row])
        for turn, (name, chance, level) in enumerate(policies[int(draws[row, 3] * 25)]):
            if draws[row, 4 + turn] < chance:
                size = 0.0 if level is None else float(space[name][0][level])
                size = -size if space[name][1] and draws[row, 6 + turn] < 0.5 else size
                image = _apply_op(image, name, size, InterpolationMode.NEAREST, [128.0] * 3)
        gaps.append((result.round() != image).float().mean())
    assert torch.stack(gaps).median() == 0
    assert torch.stack(gaps).mean() < 0.005  # shears meet positions between two pixels


def test_trivial_equals_torchvisions_operations_for_the_same_draws():
    count = 200
    images, draws = smooth(count), uniforms(count, 8)
    draws[:, 3] = (torch.arange(count) % 14 + 0.5) / 14
    space = transforms.TrivialAugmentWide()._augmentation_space(31)
    for row, result in zip(range(count), TrivialAugment(*BYTES)(images, draws), strict=True):
        name = autoaugment.TRIVIAL_OPS[row % 14].name
        levels, signed = space[name]
        size = float(levels[int(draws[row, 4] * 31)]) if levels.ndim else 0.0
        size = -size if signed and draws[row, 5] < 0.5 else size
        image = framed(images[row], draws[row])
        image = _apply_op(image, name, size, InterpolationMode.BILINEAR, None)
        assert (result - image).abs().max() < 1.01


@pytest.mark.parametrize("policy", [AutoAugment, TrivialAugment])
def test_moments_agree_with_the_chain_of_torchvision(policy):
    torch.manual_seed(0)
    count = 1500
    image = smooth(1)[0]
    other = (
        transforms.AutoAugment(AutoAugmentPolicy.CIFAR10, fill=128)
        if policy is AutoAugment
        else transforms.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    )
    chain = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), other]
    )
    theirs = torch.stack([chain(image) for _ in range(count)]).float()
    augment = policy(*BYTES)
    ours = augment(image.expand(count, -1, -1, -1), uniforms(count, augment.draws))
    error = (theirs.var(0) + ours.var(0)).div(count).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < 6
    levels = ours.mean(dim=(1, 2, 3)), theirs.mean(dim=(1, 2, 3))
    assert levels[0].std().item() == pytest.approx(levels[1].std().item(), rel=0.1)


def test_autoaugment_uses_every_pair_equally_often(monkeypatch):
    seen = []

    def record(images, ops, magnitudes, **_):
        seen.append(ops)
        return images

    monkeypatch.setattr(autoaugment, "apply", record)
    count = 40000
    AutoAugment(MEAN, STD)(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), uniforms(count, 10))
    rates = torch.zeros(2, len(Op))
    for turn, pair in enumerate(zip(*[iter(CIFAR10_POLICY.split())] * 3, strict=True)):
        rates[turn % 2, Op[pair[0]]] += float(pair[1]) / 25
    for stage in range(2):
        shares = torch.bincount(seen[stage], minlength=len(Op)) / count
        torch.testing.assert_close(shares[1:], rates[stage, 1:], atol=0.01, rtol=0)


def test_random_augment_applies_about_half_of_its_two_operations(monkeypatch):
    seen = []

    def record(images, ops, magnitudes, **options):
        seen.append((ops, magnitudes))
        assert options == {"bilinear": True, "fill": 114}
        return images

    monkeypatch.setattr(autoaugment, "apply", record)
    count = 30000
    mean = (0.485, 0.456, 0.406)
    RandAugment(mean)(torch.zeros(count, 3, 4, 224, dtype=torch.uint8), uniforms(count, 8))
    assert len(seen) == 2
    for ops, sizes in seen:
        shares = torch.bincount(ops, minlength=len(Op)) / count
        assert shares[Op.Identity].item() == pytest.approx(0.5, abs=0.01)
        torch.testing.assert_close(shares[1:], torch.full((15,), 1 / 30), atol=0.005, rtol=0)
        across = sizes[ops == Op.TranslateX]
        assert across.abs().max().item() == pytest.approx(100.8)
        assert across.abs().median() > 97
        assert (across < 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
        assert sizes[ops == Op.Brightness].max().item() == pytest.approx(0.9)
        assert sizes[ops == Op.Brightness].min() > 0
        assert sizes[ops == Op.Posterize].max() == 4


def test_random_augment_survives_the_extreme_draws():
    images = smooth(4, side=8)
    for value in (0.0, 1 - 2.0**-24):
        result = RandAugment(MEAN)(images, torch.full((4, 8), value))
        assert (result.dtype, result.shape) == (torch.uint8, images.shape)


@pytest.mark.parametrize("policy", [AutoAugment, TrivialAugment])
def test_cutout_zeroes_part_of_the_normalised_image(policy):
    images = smooth(8)
    augment = policy(MEAN, STD)
    draws = uniforms(8, augment.draws)
    whole, holed = augment(images, draws), policy(MEAN, STD, cutout=16)(images, draws)
    assert ((holed == whole) | (holed == 0)).all()
    assert (holed == 0).all(dim=1).flatten(1).sum(1).min() >= 64


def test_neutral_draws_give_the_plain_image():
    images = smooth(4)
    draws = torch.full((4, 10), 0.5)
    draws[:, 4:6] = 0.999
    expected = normalise(images, MEAN, STD)
    assert torch.equal(AutoAugment(MEAN, STD)(images, draws), expected)
    assert torch.equal(AutoAugment(MEAN, STD, flip=False)(images, draws), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("policy", [AutoAugment, TrivialAugment])
def test_an_accelerator_gives_the_same_levels_without_waiting(policy):
    images, augment = smooth(256), policy(*BYTES)
    draws = uniforms(256, augment.draws)
    expected = augment(images, draws)
    images, draws = images.cuda(), draws.cuda()
    augment(images, draws)  # fills the caches of constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augment(images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gap = (result.cpu() - expected).abs()
    assert (gap > 1.01).float().mean() < 1e-4
