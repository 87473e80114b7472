"""Learned and random policies of image operations, a whole batch at a time.

Legend: b images, C channels, H W pixels.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moectl.common.image_ops import ENHANCE, MOVES, TWO_WAY, Op, among, apply
from moectl.common.images import Framed, pick

# Operation, its probability, its level 0..9; two in a row. Source: Cubuk et al. 2019, CIFAR-10.
CIFAR10_POLICY = """
    Invert .1 0        Contrast .2 6
    Rotate .7 2        TranslateX .3 9
    Sharpness .8 1     Sharpness .9 3
    ShearY .5 8        TranslateY .7 9
    AutoContrast .5 0  Equalize .9 0
    ShearY .2 7        Posterize .3 7
    Color .4 3         Brightness .6 7
    Sharpness .3 9     Brightness .7 9
    Equalize .6 0      Equalize .5 0
    Contrast .6 7      Sharpness .6 5
    Color .7 7         TranslateX .5 8
    Equalize .3 0      AutoContrast .4 0
    TranslateY .4 3    Sharpness .2 6
    Brightness .9 6    Color .2 8
    Solarize .5 2      Invert 0 0
    Equalize .2 0      AutoContrast .6 0
    Equalize .2 0      Equalize .6 0
    Color .9 9         Equalize .6 0
    AutoContrast .8 0  Solarize .2 8
    Brightness .1 3    Color .7 0
    Solarize .4 5      AutoContrast .9 0
    TranslateY .9 9    TranslateY .7 9
    AutoContrast .9 0  Solarize .8 3
    Equalize .8 0      Invert .1 0
    TranslateY .7 9    AutoContrast .9 0
"""
TRIVIAL_OPS = tuple(op for op in Op if op not in (Op.Invert, Op.SolarizeAdd))
RANDOM_OPS = tuple(op for op in Op if op != Op.Identity)


def magnitude_levels(  # noqa: PLR0913
    bins: int, *, shear: float, across: float, down: float, degrees: float, factor: float, bits: int
) -> Tensor:
    """Return what each level means for each operation, (operations, bins) float64.

    Args:
        bins: number of levels; the lowest changes nothing, the highest reaches the values below.
        shear: columns per row, or rows per column.
        across: shift to the side in pixels.
        down: shift downwards in pixels.
        degrees: turn.
        factor: change of brightness, contrast, colour and sharpness.
        bits: grey level bits taken away by posterising.
    """
    reach = dict.fromkeys(ENHANCE, factor)
    reach |= {Op.ShearX: shear, Op.ShearY: shear, Op.Rotate: degrees}
    reach |= {Op.TranslateX: across, Op.TranslateY: down}
    levels = torch.stack([torch.linspace(0, reach.get(op, 0.0), bins) for op in Op])
    levels[Op.Posterize] = 8 - (torch.arange(bins) / ((bins - 1) / bits)).round()
    levels[Op.Solarize] = torch.linspace(255, 0, bins)
    return levels.double()


def _signed(ops: Tensor, magnitudes: Tensor, uniforms: Tensor, family: tuple[Op, ...]) -> Tensor:
    """Turn round every second magnitude of a family of operations with two directions."""
    return torch.where(among(ops, family) & (uniforms < 0.5), -magnitudes, magnitudes)


@lru_cache(maxsize=16)
def _auto_tables(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return operations and probabilities (25, 2) and magnitudes (25, 2) of the sub-policies."""
    words = CIFAR10_POLICY.split()
    ops = torch.tensor([Op[word] for word in words[::3]]).view(-1, 2)
    chances = torch.tensor([float(word) for word in words[1::3]]).view(-1, 2)
    levels = torch.tensor([int(word) for word in words[2::3]]).view(-1, 2)
    meanings = magnitude_levels(
        10,
        shear=0.3,
        across=150 / 331 * width,
        down=150 / 331 * height,
        degrees=30,
        factor=0.9,
        bits=4,
    )
    return ops.to(device), chances.to(device), meanings[ops, levels].to(device)


@lru_cache(maxsize=16)
def _trivial_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the operations (14,) and the meaning of the levels (operations, 31)."""
    meanings = magnitude_levels(
        31, shear=0.99, across=32, down=32, degrees=135, factor=0.99, bits=6
    )
    return torch.tensor(TRIVIAL_OPS, device=device), meanings.to(device)


@lru_cache(maxsize=16)
def _random_tables(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the operations (15,) and slope and offset (operations,) of magnitude over strength."""
    slope, offset = torch.zeros(2, len(Op), dtype=torch.float64)
    for op in ENHANCE:
        slope[op], offset[op] = 1.8, -0.9
    for op, reach in (
        (Op.ShearX, 0.3),
        (Op.ShearY, 0.3),
        (Op.TranslateX, 0.45 * width),
        (Op.TranslateY, 0.45 * height),
        (Op.Rotate, 30.0),
        (Op.Posterize, 4.0),
        (Op.Solarize, 256.0),
        (Op.SolarizeAdd, 110.0),
    ):
        slope[op] = reach
    return torch.tensor(RANDOM_OPS, device=device), slope.to(device), offset.to(device)


class AutoAugment(Framed):
    """Shifted crop and mirror, one of 25 learned pairs of operations, then normalised.

    Source: Cubuk et al. 2019, the policy found on CIFAR-10.
    """

    draws = 10

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Map uint8 (b, 3, H, W) and uniforms (b, draws) to float32 (b, 3, H, W)."""
        images = self.framed(images, uniforms[:, :3])
        all_ops, chances, meanings = _auto_tables(*images.shape[-2:], images.device)
        policy = pick(uniforms[:, 3], len(all_ops))
        for turn in range(2):
            happens = uniforms[:, 4 + turn] < chances[policy, turn]
            ops = all_ops[policy, turn] * happens
            magnitudes = _signed(ops, meanings[policy, turn], uniforms[:, 6 + turn], TWO_WAY)
            images = apply(images, ops, magnitudes, fill=128)
        return self.finished(images, uniforms[:, 8:])


class TrivialAugment(Framed):
    """Shifted crop and mirror, one operation of random strength, then normalised.

    Source: Müller and Hutter 2021, the wide space.
    """

    draws = 8

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Map uint8 (b, 3, H, W) and uniforms (b, draws) to float32 (b, 3, H, W)."""
        images = self.framed(images, uniforms[:, :3])
        all_ops, meanings = _trivial_tables(images.device)
        ops = all_ops[pick(uniforms[:, 3], len(all_ops))]
        magnitudes = meanings[ops, pick(uniforms[:, 4], meanings.shape[1])]
        images = apply(
            images, ops, _signed(ops, magnitudes, uniforms[:, 5], TWO_WAY), bilinear=True
        )
        return self.finished(images, uniforms[:, 6:])


class RandAugment:
    """Two operations of near full strength, each happening every second time.

    Strength is drawn from a normal distribution about 10 with deviation 0.5 and held in 0..10;
    10 shears by 0.3, shifts by 45 % of the side (100 of 224 pixels) and turns by 30 degrees.

    Args:
        mean: per channel, of values in 0..1; moves bring in this colour's grey level.

    Source: Cubuk et al. 2020, with the noise and the ranges of long-tail work (Cui et al. 2021).
    """

    def __init__(self, mean: Sequence[float]) -> None:
        self.draws = 8
        self.fill = round(255 * sum(mean) / len(mean))

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Map uint8 (b, 3, H, W) and uniforms (b, draws) to uint8 (b, 3, H, W)."""
        all_ops, slope, offset = _random_tables(*images.shape[-2:], images.device)
        for which, happens, strength, side in uniforms.view(-1, 2, 4).permute(1, 2, 0):
            ops = all_ops[pick(which, len(all_ops))] * (happens < 0.5)
            level = (10 + 0.5 * torch.special.ndtri(strength.double())).clamp(0, 10) / 10
            magnitudes = _signed(ops, slope[ops] * level + offset[ops], side, MOVES)
            images = apply(images, ops, magnitudes, bilinear=True, fill=self.fill)
        return images
