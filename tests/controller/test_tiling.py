import math

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.controller.plans import Tier
from moectl.controller.tiling import (
    MEAN,
    STD,
    TIERS,
    Geometry,
    Marks,
    choose,
    cut,
    overview,
    tilings,
    token_ids,
    windows,
)

TINY = Geometry(crop=32, patch=4, margin=2)
MARKS = Marks(start=1, end=2, part=3, row=4)
UP_TO_12 = [(r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= 12]
LOW, MEDIUM, HIGH = TIERS


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def raw(pixels: torch.Tensor) -> torch.Tensor:
    """Undo the standardisation; colours come first."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return pixels * std + mean


@pytest.mark.parametrize(
    ("size", "low", "medium", "high"),
    [
        ((500, 500), (1, 1), (2, 2), (3, 3)),
        ((1024, 768), (1, 1), (2, 3), (3, 4)),
        ((768, 1024), (1, 1), (3, 2), (4, 3)),
        ((1600, 800), (1, 2), (2, 4), (2, 5)),
        ((900, 300), (1, 3), (1, 4), (2, 6)),
        ((5000, 100), (1, 3), (1, 8), (1, 12)),
        ((100, 5000), (3, 1), (8, 1), (12, 1)),
    ],
)
def test_tilings_of_familiar_shapes(size, low, medium, high):
    assert [choose(*size, tier) for tier in TIERS] == [low, medium, high]


def test_a_tier_is_never_left_and_no_other_tiling_fits_better():
    random = np.random.default_rng(0)
    for width, height in random.integers(1, 3000, (200, 2)).tolist():
        for tier in TIERS:
            rows, columns = choose(width, height, tier)
            assert tier.fewest <= rows * columns <= tier.most

            def distortion(r, c, shape=width / height):
                return abs(math.log((c / r) / shape))

            best = min(distortion(r, c) for r, c in tilings(tier.fewest, tier.most))
            assert distortion(rows, columns) == pytest.approx(best)


def test_the_range_of_a_tier_holds_all_tilings_of_so_many_crops():
    assert sorted(tilings(1, 3)) == [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
    assert sorted(tilings(1, 12)) == UP_TO_12
    assert {r * c for r, c in tilings(9, 12)} == {9, 10, 11, 12}


def test_ties_go_to_the_preferred_number_then_to_fewer_crops():
    assert choose(700, 700, Tier("other", 1, 12, 12)) == (1, 1)
    assert choose(700, 700, Tier("high", 1, 12, 12)) == (3, 3)
    assert choose(800, 400, Tier("other", 1, 8, 6)) == (1, 2)
    assert choose(800, 400, Tier("medium", 1, 8, 6)) == (2, 4)


def test_a_square_between_two_tilings_takes_the_one_with_fewer_rows():
    assert choose(700, 700, Tier("other", 2, 3, 3)) == (1, 2)


@pytest.mark.parametrize("tiling", UP_TO_12)
def test_the_number_of_tokens_is_that_of_the_sequence(tiling):
    r, c = tiling
    ids = token_ids(tiling, Geometry(), MARKS)
    wanted = (144 + 12 + 2) + (8 * r + 4) * (8 * c + 4) + (8 * r + 4) + 2
    assert Geometry().tokens(tiling) == len(ids) == wanted
    assert ids.count(MARKS.part) == len(windows(tiling, Geometry()))
    assert ids.count(MARKS.row) == 12 + 8 * r + 4
    assert TINY.tokens(tiling) == len(token_ids(tiling, TINY, MARKS))


def test_the_sequence_is_two_views_with_marks_at_the_ends_of_rows():
    geometry = Geometry(crop=16, patch=4, margin=0)
    row = [3, 3, 4]
    assert token_ids((1, 1), geometry, MARKS) == [1, *row, *row, 2, 1, *row, *row, 2]
    wide = [3, 3, 3, 3, 4]
    assert token_ids((1, 2), geometry, MARKS) == [1, *row, *row, 2, 1, *wide, *wide, 2]


@pytest.mark.parametrize("tiling", UP_TO_12)
@pytest.mark.parametrize("geometry", [Geometry(), TINY], ids=["molmoe", "tiny"])
def test_windows_are_those_that_crops_keep_in_reading_order(tiling, geometry):
    """Crop by crop: margins that a neighbour has too are dropped, then all is put in order."""
    side, pooled, margin = geometry.side, geometry.side // 2, geometry.margin // 2
    kept = []
    for i in range(tiling[0]):
        for j in range(tiling[1]):
            crop = 1 + i * tiling[1] + j
            top, bottom = margin * (i > 0), pooled - margin * (i < tiling[0] - 1)
            left, right = margin * (j > 0), pooled - margin * (j < tiling[1] - 1)
            for y in range(top, bottom):
                for x in range(left, right):
                    first = crop * side**2 + 2 * y * side + 2 * x
                    kept.append(((i, y, j, x), [first, first + 1, first + side, first + side + 1]))
    cells = windows(tiling, geometry)
    assert cells[pooled**2 :].tolist() == [window for _, window in sorted(kept)]
    assert cells[: pooled**2].flatten().sort().values.tolist() == list(range(side**2))
    assert cells[0].tolist() == [0, 1, side, side + 1]
    assert cells[pooled].tolist()[0] == 2 * side


@pytest.mark.parametrize("tiling", [(1, 1), (2, 3), (3, 1)])
def test_windows_lead_to_the_pixels_of_the_enlarged_image(tiling):
    height, width = TINY.size(tiling)
    image = picture(width, height)
    pixels, cover = cut(image, tiling, TINY)
    assert (cover[:-1] == 1).all()
    # Patches of all crops in a row, as windows count them: (patch, colour, height, width).
    patches = raw(pixels).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    cells = windows(tiling, TINY)[16:]
    columns = width // 8
    for number, cell in enumerate(cells.tolist()):
        row, column = divmod(number, columns)
        wanted = whole[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        top, bottom = (
            torch.cat([patches[one] for one in half], -1) for half in (cell[:2], cell[2:])
        )
        torch.testing.assert_close(torch.cat([top, bottom], 1), wanted)


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (500, 31), (7, 9)])
def test_images_are_resized_and_centred_on_black_as_torchvision_would(size):
    from torchvision.transforms import InterpolationMode, Resize

    image = picture(*size)
    scale = np.float32(32) / np.float32(max(size))
    width, height = (int(np.float32(edge) * scale) for edge in size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    resized = Resize([height, width], InterpolationMode.BILINEAR, antialias=True)(pixels)
    frame = torch.zeros(3, 32, 32)
    top, left = (32 - height) // 2, (32 - width) // 2
    frame[:, top : top + height, left : left + width] = resized.clip(0, 1)
    torch.testing.assert_close(raw(overview(image, TINY)), frame, rtol=0, atol=1e-6)
    assert torch.equal(cut(image, (1, 2), TINY)[0][0], overview(image, TINY))


def test_crops_overlap_by_twice_the_margin():
    pixels, _ = cut(picture(300, 200), (2, 2), TINY)
    assert pixels.shape == (5, 3, 32, 32)
    torch.testing.assert_close(pixels[1, :, :, 16:], pixels[2, :, :, :16])
    torch.testing.assert_close(pixels[1, :, 16:], pixels[3, :, :16])
    assert not torch.equal(pixels[1], pixels[2])


def test_cover_is_the_share_of_image_in_a_patch_one_crop_too_early():
    # 32 x 48 pixels hold 18 x 48 of the image: 7 rows of black above, 7 below.
    _, cover = cut(picture(800, 300), (1, 2), TINY)
    rows = torch.tensor([0, 0.25, 1, 1, 1, 1, 0.25, 0])
    first = rows[:, None].expand(8, 8).flatten()
    assert torch.equal(cover, torch.stack([first, first, torch.full((64,), -1.0)]))


def test_the_thinnest_image_keeps_a_pixel():
    pixels, cover = cut(picture(1, 500), (3, 1), TINY)
    assert pixels.isfinite().all()
    assert cover[:-1].max() > 0


def test_colours_and_palettes_become_rgb():
    grey = picture(40, 40).convert("L")
    assert torch.equal(overview(grey, TINY), overview(grey.convert("RGB"), TINY))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"crop": 330}, "crop = 330"),
        ({"margin": 3}, "margin = 3"),
        ({"margin": 12}, "nothing is left"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        Geometry(**sizes)
