"""Contact sheets: names of files, small images, and what is drawn where."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.csr.contact_sheets import draw, file_names, thumbnail

IMAGES = {0: np.zeros((8, 8, 3), np.uint8), 1: np.full((8, 8, 3), 255, np.uint8)}


def prototype(index: int, rows: Sequence[int] = (0, 1), **more: Any) -> dict[str, Any]:
    box = [0.25, 0.5, 0.5, 0.75]
    exemplars = [{"row": row, "similarity": 0.5, "box": box} for row in rows]
    known = {"hits": 3, "reliance": 0.01, "out_of_box": 0.5, "suspect": False}
    return {"concept": "$ring$", "index": index, "exemplars": exemplars, **known, **more}


def drawn(tmp_path: Path, rows: Sequence[dict[str, Any]], kept: Sequence[bool]) -> Any:
    (path,) = draw(tmp_path / "sheet", rows, kept, IMAGES)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def height(path: Path) -> int:
    with Image.open(path) as image:
        return image.size[1]


def test_names_of_files_are_plain_and_all_different() -> None:
    concepts = [
        "Nodule/Mass",
        "Größe (links)",
        "nodule mass",
        "胸水",
        "気胸",
        "../x",
        "nodule_mass_2",
    ]
    names = file_names(concepts)
    assert names[:3] == ["nodule_mass", "groe_links", "nodule_mass_2"]
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in names)
    assert len(set(names)) == len(concepts)


def test_long_names_are_cut_and_still_differ() -> None:
    first, second = file_names(["a" * 300, "a" * 300 + "b"])
    assert len(first) == 60
    assert first != second


@pytest.mark.parametrize(("side", "small"), [(16, 16), (128, 128), (500, 128)])
def test_small_images_are_bytes_of_limited_size(side: int, small: int) -> None:
    found = thumbnail(torch.full((3, side, side), 0.2))
    assert found.shape == (small, small, 3)
    assert found.dtype == np.uint8
    assert np.unique(found).tolist() == [51]


def test_the_box_is_drawn_where_the_prototype_looks(tmp_path: Path) -> None:
    pixels = drawn(tmp_path, [prototype(0, (1,))], [True]).astype(int)
    orange = (pixels[..., 0] - pixels[..., 2] > 150).nonzero()
    # The white image has a side of 0.96 tiles, a tile 1.35 inches of 144 pixels.
    side = 0.96 * 1.35 * 144
    tall, wide = (np.ptp(places) for places in orange)
    assert tall == pytest.approx(side / 4, abs=0.04 * side)
    assert wide == pytest.approx(side / 4, abs=0.04 * side)


def test_prototypes_that_are_not_kept_are_grey(tmp_path: Path) -> None:
    def colours(keep: bool) -> int:
        pixels = drawn(tmp_path, [prototype(0, suspect=True)], [keep]).astype(int)
        return int((np.ptp(pixels, axis=2) > 60).sum())

    assert colours(keep=False) == 0
    assert colours(keep=True) > 100


def test_black_images_fade_where_they_are_not_kept(tmp_path: Path) -> None:
    rows = [prototype(0, (0, 0)), prototype(1, (0, 0))]
    both, one = (drawn(tmp_path, rows, [True, keep]) for keep in (True, False))
    assert (both.max(2) == 0).sum() > 1.9 * (one.max(2) == 0).sum()


def test_many_prototypes_fill_several_sheets(tmp_path: Path) -> None:
    rows = [prototype(index) for index in range(60)]
    paths = draw(tmp_path / "atlas_ring", rows, [True] * 60, IMAGES)
    assert [path.name for path in paths] == [
        "atlas_ring.png",
        "atlas_ring-2.png",
        "atlas_ring-3.png",
    ]
    heights = [height(path) for path in paths]
    assert heights[0] == heights[1] > 2 * heights[2]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    rows = [prototype(0, (), out_of_box=None, reliance=None, hits=0)]
    assert drawn(tmp_path, rows, [True]).min() < 100, "there is still text"
