import math

import pytest
import torch
import torch.nn.functional as F

from moectl.csr.localisation import covered, localise, out_of_box_rates, overlap, pointing


def peak_at(y: int, x: int, grid: int = 4) -> torch.Tensor:
    """A map (H, W) that is highest in one cell."""
    found = torch.linspace(-1, 0, grid * grid).view(grid, grid)
    found[y, x] = 1
    return found


def test_a_peak_hits_any_box_of_its_concept_in_its_image():
    maps = torch.stack([peak_at(0, 3), peak_at(2, 1)])[None].repeat(2, 1, 1, 1)
    boxes = [
        [(0, 0.0, 0.0, 0.3, 0.3), (0, 0.8, 0.0, 1.0, 0.3), (1, 0.8, 0.0, 1.0, 0.3)],
        [(0, 0.3, 0.6, 0.4, 0.7)],  # where the peak of concept 1 is
    ]
    hits = pointing(maps, boxes)
    assert hits[0].tolist() == [1, 0]
    assert hits[1, 0] == 0
    assert hits[1, 1].isnan()


def test_a_peak_is_the_centre_of_its_cell():
    maps = peak_at(1, 2)[None, None]  # centre at x 0.625, y 0.375
    assert pointing(maps, [[(0, 0.6, 0.3, 0.65, 0.4)]]) == 1
    assert pointing(maps, [[(0, 0.5, 0.25, 0.6, 0.5)]]) == 0  # the cell, but not its centre
    assert pointing(maps, [[(0, 0.625, 0.375, 0.7, 0.4)]]) == 1
    assert pointing(maps, [[(0, 0.6, 0.3, 0.625, 0.4)]]) == 0  # right and lower edges are outside


def test_inner_peaks_are_where_enlarged_maps_are_highest():
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        cells = torch.rand(1, 1, 6, 6, generator=draws)
        y, x = divmod(int(cells[:, :, 1:-1, 1:-1].argmax()), 4)
        cells[0, 0, y + 1, x + 1] = 1.5
        large = F.interpolate(cells, scale_factor=65, mode="bilinear", align_corners=False)
        row, column = divmod(int(large.argmax()), 6 * 65)
        assert ((row + 0.5) / 390, (column + 0.5) / 390) == pytest.approx(
            ((y + 1.5) / 6, (x + 1.5) / 6)
        )


def test_equal_peaks_share_the_hit():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 0] = maps[0, 0, 0, 1] = maps[0, 0, 3, 3] = 1
    assert pointing(maps, [[(0, 0.0, 0.0, 0.25, 0.25)]]).item() == pytest.approx(1 / 3)
    assert pointing(maps, [[(0, 0.0, 0.0, 0.5, 0.25)]]).item() == pytest.approx(2 / 3)


def test_an_empty_map_scores_what_chance_scores():
    side = 16 / 64
    boxes = [[(0, n / 64, n / 128, n / 64 + side, n / 128 + side)] for n in range(0, 48, 2)]
    found = localise(torch.zeros(24, 1, 8, 8), boxes, ["a"])
    assert found["rate_micro"] == pytest.approx(0.0625)
    assert found["chance_micro"] == pytest.approx(0.0625)


def test_the_area_of_a_union_counts_nothing_twice():
    boxes = [(0, 0.0, 0.0, 0.5, 0.5), (0, 0.25, 0.25, 0.75, 0.75), (0, 0.5, 0.0, 0.75, 0.5)]
    found = covered([boxes, []], 2)
    assert found[0].tolist() == pytest.approx([0.25 + 0.25 + 0.125 - 0.0625 - 0.0625, 0])
    assert found[1].tolist() == [0, 0]
    draws = torch.Generator().manual_seed(1)
    corners = torch.rand(5, 2, 2, generator=draws).sort(dim=1).values
    drawn = [(0, *corner.flatten().tolist()) for corner in corners]
    points = torch.rand(20000, 2, generator=draws)
    inside = ((points >= corners[:, None, 0]) & (points < corners[:, None, 1])).all(2).any(0)
    assert covered([drawn], 1).item() == pytest.approx(inside.double().mean().item(), abs=0.02)


def test_overlap_counts_cells_of_the_union():
    cams = torch.full((1, 2, 4, 4), -1.0)
    cams[0, 0, :2, :2] = 1  # four cells, two of them in the boxes, which have four as well
    boxes = [[(0, 0.0, 0.0, 0.25, 0.5), (0, 0.0, 0.25, 0.2, 1.0)]]
    found = overlap(cams, boxes)
    assert found[0, 0].item() == pytest.approx(2 / 6)
    assert found[0, 1].isnan()
    assert overlap(-cams, boxes)[0, 0].item() == pytest.approx(2 / 14)


def test_summaries_are_means_over_pairs_and_over_concepts():
    maps = torch.stack([peak_at(0, 0), peak_at(0, 0), peak_at(0, 0)])[None].repeat(3, 1, 1, 1)
    hit, miss = (0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 1.0, 1.0)
    boxes = [[(0, *hit), (1, *hit)], [(0, *miss)], [(0, *miss)]]
    found = localise(maps, boxes, ["a", "b", "c"], logits=True)
    assert found["pairs"] == 4
    assert found["columns"]["a"]["pairs"] == 3
    assert found["columns"]["a"]["hits"] == 1
    assert found["columns"]["a"]["rate"] == pytest.approx(1 / 3)
    assert found["columns"]["c"] == {
        "pairs": 0,
        "hits": 0,
        "rate": None,
        "chance": None,
        "iou": None,
    }
    assert found["rate_micro"] == pytest.approx(2 / 4)
    assert found["rate_macro"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["chance_micro"] == pytest.approx((2 * 0.0625 + 2 * 0.25) / 4)
    assert found["chance_macro"] == pytest.approx(((0.0625 + 0.5) / 3 + 0.0625) / 2)
    assert found["iou_micro"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert found["iou_macro"] == pytest.approx((1 / 3 + 1) / 2)


def test_without_any_box_nothing_is_said():
    found = localise(torch.zeros(1, 1, 2, 2), [[]], ["a"])
    assert found["rate_micro"] is found["rate_macro"] is found["chance_micro"] is None


def test_peaks_outside_of_boxes_are_counted_for_each_prototype():
    maps = torch.stack(
        [
            torch.stack([peak_at(0, 0), peak_at(3, 3), peak_at(3, 3)]),
            torch.stack([peak_at(3, 0)] * 3),
            torch.stack([peak_at(0, 0)] * 3),
        ]
    )
    own = [[(0, 0.0, 0.0, 0.3, 0.3)], [(0, 0.0, 0.0, 0.3, 0.3)], []]
    corner = [[(1, 0.0, 0.0, 0.3, 0.3), (0, 0.0, 0.7, 0.3, 1.0)]] * 3
    rates = out_of_box_rates(maps, torch.tensor([0, 1, 2]), [own, corner, corner])
    assert rates == [pytest.approx(0.5), 1.0, None]


def test_wrong_maps_are_refused():
    with pytest.raises(ValueError, match="boxes of 2 images"):
        pointing(torch.zeros(1, 1, 2, 2), [[], []])
    with pytest.raises(ValueError, match="without nan"):
        pointing(torch.full((1, 1, 2, 2), math.nan), [[]])
    with pytest.raises(ValueError, match="2 names"):
        localise(torch.zeros(1, 1, 2, 2), [[]], ["a", "b"])
