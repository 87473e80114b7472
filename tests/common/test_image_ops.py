import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms.autoaugment import _apply_op

from moectl.common import image_ops
from moectl.common.image_ops import BLENDS, EQUALISE, MOVES, TABLES, Op, apply

COUNT = 48
EXACT = [Op.Identity, *(op for op in (*TABLES, *EQUALISE, *BLENDS) if op != Op.SolarizeAdd)]
REACH = {
    Op.ShearX: 0.99,
    Op.ShearY: 0.99,
    Op.TranslateX: 32.0,
    Op.TranslateY: 32.0,
    Op.Rotate: 135.0,
    **dict.fromkeys((Op.Brightness, Op.Contrast, *BLENDS), 0.99),
}


def pictures():
    """Smooth images, one of a single colour, one of noise, one of two levels, one with a gap."""
    draws = torch.Generator().manual_seed(0)
    rough = torch.rand(COUNT, 3, 7, 7, generator=draws)
    images = F.interpolate(rough, size=(32, 32), mode="bilinear") * 255
    images[0] = 77
    images[1] = torch.randint(0, 256, (3, 32, 32), generator=draws)
    images[2] = (images[2] > 128) * 255
    images[3] = images[3] / 4 + 90
    return images.round().to(torch.uint8)


def magnitudes(op, seed=1):
    uniforms = torch.rand(COUNT, generator=torch.Generator().manual_seed(seed)).double()
    match op:
        case Op.Posterize:
            return (uniforms * 9).trunc()
        case Op.Solarize:
            return uniforms * 255
        case _:
            return (uniforms * 2 - 1) * REACH.get(op, 0.0)


def ours(op, sizes, **options):
    return apply(pictures(), torch.full((COUNT,), op), sizes, **options)


def theirs(op, sizes, mode, fill):
    return torch.stack(
        [
            _apply_op(image, op.name, size, mode, fill)
            for image, size in zip(pictures(), sizes.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("op", EXACT, ids=lambda op: op.name)
def test_colour_operations_equal_torchvisions_on_tensors(op):
    sizes = magnitudes(op)
    expected = theirs(op, sizes, InterpolationMode.NEAREST, None)
    assert torch.equal(ours(op, sizes), expected)
    if op != Op.Identity:
        assert not torch.equal(expected, pictures())


@pytest.mark.parametrize("op", MOVES, ids=lambda op: op.name)
def test_bilinear_moves_are_within_one_level_of_torchvisions_on_tensors(op):
    sizes = magnitudes(op)
    expected = theirs(op, sizes, InterpolationMode.BILINEAR, None)
    gap = (ours(op, sizes, bilinear=True).int() - expected.int()).abs()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 0.001


def test_bilinear_moves_see_the_fill_as_an_endless_surround():
    angles = magnitudes(Op.Rotate)
    expected = torch.stack(
        [
            functional.rotate(
                functional.pad(image, 20, fill=116), angle, InterpolationMode.BILINEAR
            )
            for image, angle in zip(pictures(), angles.tolist(), strict=True)
        ]
    )[..., 20:-20, 20:-20]
    gap = (ours(Op.Rotate, angles, bilinear=True, fill=116).int() - expected.int()).abs()
    assert gap.max() <= 1


@pytest.mark.parametrize("op", MOVES, ids=lambda op: op.name)
def test_nearest_moves_equal_torchvisions_on_pillow_images(op):
    sizes = magnitudes(op)
    expected = torch.stack(
        [
            functional.pil_to_tensor(
                _apply_op(
                    functional.to_pil_image(image),
                    op.name,
                    size,
                    InterpolationMode.NEAREST,
                    [128] * 3,
                )
            )
            for image, size in zip(pictures(), sizes.tolist(), strict=True)
        ]
    )
    assert torch.equal(ours(op, sizes, fill=128), expected)


@pytest.mark.parametrize("op", MOVES, ids=lambda op: op.name)
def test_nearest_moves_of_tensors_differ_where_a_position_is_between_two_pixels(op):
    sizes = magnitudes(op)
    expected = theirs(op, sizes, InterpolationMode.NEAREST, [128.0])
    assert (ours(op, sizes, fill=128) != expected).float().mean() < 0.02


def test_solarize_add_brightens_the_darker_half():
    sizes = torch.linspace(0, 110, COUNT, dtype=torch.float64)
    levels = pictures().int()
    added = (levels + sizes.int()[:, None, None, None]).clamp(max=255)
    assert torch.equal(ours(Op.SolarizeAdd, sizes).int(), torch.where(levels < 128, added, levels))


@pytest.mark.parametrize("bilinear", [False, True])
def test_a_mixed_batch_equals_one_operation_at_a_time(bilinear):
    ops = torch.arange(COUNT) % len(Op)
    sizes = torch.stack([magnitudes(op)[row] for row, op in enumerate(map(Op, ops.tolist()))])
    together = apply(pictures(), ops, sizes, bilinear=bilinear, fill=9)
    for row in range(COUNT):
        alone = apply(
            pictures()[row : row + 1], ops[row, None], sizes[row, None], bilinear=bilinear, fill=9
        )
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("bilinear", [False, True])
def test_computing_every_sample_as_on_accelerators_changes_nothing(monkeypatch, bilinear):
    ops = torch.arange(COUNT) % len(Op)
    sizes = torch.stack([magnitudes(op)[row] for row, op in enumerate(map(Op, ops.tolist()))])
    some = apply(pictures(), ops, sizes, bilinear=bilinear)
    monkeypatch.setattr(image_ops, "_rows", lambda _: None)
    assert torch.equal(apply(pictures(), ops, sizes, bilinear=bilinear), some)


def test_the_input_is_left_alone():
    images = pictures()
    ops = torch.arange(COUNT) % len(Op)
    apply(images, ops, torch.ones(COUNT, dtype=torch.float64))
    assert torch.equal(images, pictures())


def test_grey_images_are_refused():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 channels, expected 3"):
        apply(images, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.float64))
