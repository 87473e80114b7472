"""Frequency modules: no change at the start, bands that are bands, the transform spared."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.diffusion.frequency import BANDS, BandModule, ChannelGain, hats

TIME, LABEL = 6, 4
SIZES = [(8, 8), (16, 16), (7, 9), (5, 8), (8, 5), (1, 1), (2, 3), (1, 6), (33, 20)]


def inputs(channels: int, sides: tuple[int, int], count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(count, channels, *sides), (count, TIME), (count, LABEL)]
    x, time, label = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, time, label


def bands(channels: int = 8) -> BandModule:
    """Gains that differ between images, channels and bands."""
    torch.manual_seed(0)
    module = BandModule(channels, TIME, LABEL).double()
    nn.init.normal_(module.gains.weight)
    nn.init.normal_(module.gains.bias)
    return module


def fixed(gain: Tensor, shared: Tensor) -> BandModule:
    """Gains (C,) of channels, and (G, J) of bands, whatever the image."""
    module = BandModule(len(gain), TIME, LABEL).double()
    with torch.no_grad():
        module.gains.bias.copy_(torch.cat([gain, shared.flatten()]))
    return module


def wave(sides: tuple[int, int], up: int, along: int) -> Tensor:
    """A plane wave of that many periods, (1, 1, H, W)."""
    rows = torch.arange(sides[0], dtype=torch.float64)[:, None] * up / sides[0]
    columns = torch.arange(sides[1], dtype=torch.float64) * along / sides[1]
    return (2 * math.pi * (rows + columns) + 0.3).cos()[None, None]


@pytest.mark.parametrize("sides", SIZES)
def test_hats_sum_to_1_and_are_none_below_0(sides):
    found = hats(*sides, torch.device("cpu"))
    assert found.shape == (BANDS, sides[0], sides[1] // 2 + 1)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(0), torch.ones_like(found[0]), rtol=0, atol=1e-5)
    assert found[0, 0, 0] == 1  # the mean belongs to the lowest band alone
    assert (found > 1e-5).sum(0).max() <= 2


def test_hats_peak_at_sevenths_of_the_corner():
    found = hats(28, 28, torch.device("cpu"))
    for row in range(15):  # along the diagonal the radius is the row over 14
        place = row / 2
        for band in range(BANDS):
            expected = max(0.0, 1 - abs(place - band))
            assert found[band, row, row].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("sides", SIZES)
def test_bands_change_nothing_at_the_start(sides):
    x, time, label = inputs(8, sides)
    assert torch.equal(BandModule(8, TIME, LABEL).double()(x, time, label), x)


@pytest.mark.parametrize("sides", SIZES)
def test_gains_of_channels_alone_scale_them(sides):
    x, time, label = inputs(8, sides)
    gain = torch.linspace(-2, 2, 8, dtype=torch.float64)
    found = fixed(gain, torch.zeros(8, BANDS))(x, time, label)
    torch.testing.assert_close(found, x * (1 + gain[:, None, None]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sides", SIZES)
def test_bands_equal_a_full_transform_that_stays_real(sides):
    module = bands()
    x, time, label = inputs(8, sides)
    found = module(x, time, label)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)

    hidden = F.gelu(module.hidden(torch.cat([x.mean((2, 3)), time, label], 1)))
    numbers = module.gains(hidden)
    own, shared = numbers[:, :8], numbers[:, 8:].view(3, 8, BANDS)
    up = torch.fft.fftfreq(sides[0], dtype=torch.float64)[:, None]
    along = torch.fft.fftfreq(sides[1], dtype=torch.float64)[None]
    place = 7 * (up**2 + along**2).sqrt() * math.sqrt(2)
    gain = own[:, :, None, None].expand(3, 8, *sides).clone()
    for band in range(BANDS):
        gain += shared[:, :, band, None, None] * (1 - (place - band).abs()).clamp(min=0)
    expected = torch.fft.ifft2(torch.fft.fft2(x) * gain)
    assert expected.imag.abs().max() < 1e-12
    torch.testing.assert_close(found, x + expected.real, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("flipped", [False, True])
def test_gain_of_a_band_amplifies_its_waves_and_no_others(flipped):
    sides = (28, 28)
    shared = torch.zeros(1, BANDS)
    shared[0, 2] = 3
    module = fixed(torch.zeros(1), shared)
    _, time, label = inputs(1, sides, 1)
    own = wave(sides, 4, -4 if flipped else 4)  # 7 r = 2
    torch.testing.assert_close(module(own, time, label), 4 * own, rtol=1e-5, atol=1e-5)
    between = wave(sides, 5, -5 if flipped else 5)  # 7 r = 2.5
    torch.testing.assert_close(module(between, time, label), 2.5 * between, rtol=1e-5, atol=1e-5)
    for periods in (0, 1, 2, 6, 8, 14):
        other = wave(sides, periods, periods)
        torch.testing.assert_close(module(other, time, label), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (32, 32), (64, 32), (24, 24), (40, 8)])
def test_neighbouring_channels_share_bands(channels, groups):
    shared = torch.zeros(groups, BANDS)
    shared[1] = 1  # all bands: a plain factor of 2
    module = fixed(torch.zeros(channels), shared)
    x, time, label = inputs(channels, (6, 6))
    width = channels // groups
    factor = torch.ones(channels, 1, 1, dtype=torch.float64)
    factor[width : 2 * width] = 2
    torch.testing.assert_close(module(x, time, label), x * factor, rtol=1e-5, atol=1e-5)


def test_bands_hear_image_time_and_class():
    module = bands()
    x, time, label = inputs(8, (6, 6))
    found = module(x, time, label)
    assert not torch.allclose(module(x, time + 1, label), found)
    assert not torch.allclose(module(x, time, label + 1), found)
    assert not torch.allclose(module(2 * x, time, label), 2 * found)


def test_image_alone_equals_the_image_among_others():
    module = bands()
    values = inputs(8, (6, 5))
    together = module(*values)
    for image in range(3):
        alone = module(*(value[image : image + 1] for value in values))
        torch.testing.assert_close(alone, together[image : image + 1], rtol=1e-10, atol=1e-10)


def test_bands_transform_in_float32_under_autocast():
    module = bands().float()
    x, time, label = (value.float() for value in inputs(8, (6, 5)))
    expected = module(x, time, label)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x, time, label), expected)
        half = module(x.bfloat16(), time.bfloat16(), label.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.3)


def test_bands_learn_after_sampling_in_inference_mode():
    module = bands().float()
    x, time, label = (value.float() for value in inputs(8, (10, 14)))
    with torch.inference_mode():
        module(x, time, label)
    module(x, time, label).sum().backward()
    assert module.gains.weight.grad.any()


@pytest.mark.parametrize("sides", SIZES)
def test_channel_gain_equals_the_transform_that_it_spares(sides):
    torch.manual_seed(0)
    module = ChannelGain(8, TIME).double()
    x, time, label = inputs(8, sides)
    first, _, second = module.modulation_mlp
    hidden = F.gelu(torch.cat([x.mean((2, 3)), time], 1) @ first.weight.T + first.bias)
    gain = torch.sigmoid(hidden @ second.weight.T + second.bias)[:, :, None, None]
    expected = torch.fft.ifft2(torch.fft.fft2(x) * gain).real + x
    torch.testing.assert_close(module(x, time, label), expected, rtol=1e-10, atol=1e-10)


def test_channel_gain_adds_a_half_when_its_last_layer_is_0():
    module = ChannelGain(8, TIME).double()
    nn.init.zeros_(module.modulation_mlp[2].weight)
    nn.init.zeros_(module.modulation_mlp[2].bias)
    x, time, label = inputs(8, (4, 4))
    torch.testing.assert_close(module(x, time, label), 1.5 * x)


def test_sizes_of_1024_channels():
    with torch.device("meta"):
        modules = BandModule(1024, 512, 512), ChannelGain(1024, 512)
    sizes = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert sizes == [3_410_176, 2_623_488]
