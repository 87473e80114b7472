"""Panels: names of files, numbers that add up, and pictures that are whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.csr.inference import Opened
from moectl.csr.panel import (
    bars_of,
    draw_panel,
    enlarged,
    panel_path,
    shortened,
    target_shown,
    thumbnail,
)
from moectl.engine.errors import UserError

Call = Callable[..., tuple[int, str, str]]

GREY = np.full((8, 12, 3), 90, np.uint8)


def row(count: int = 3, **changes: Any) -> dict[str, Any]:
    """Explain an image with so many concepts."""
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator).tolist()
    names = [f"concept {number}" for number in range(count)]
    exemplar = {"image_id": "t0", "similarity": 0.9, "box": [0, 0, 0.5, 0.5]}
    return {
        "image": "p/1",
        "prediction": ["A"],
        "probabilities": {"A": 0.7, "B": 0.8},
        "logits": {"A": 0.25 + sum(values), "B": 1.0},
        "bias": {"A": 0.25, "B": 1.0},
        "contributions": {
            "A": dict(zip(names, values, strict=True)),
            "B": dict.fromkeys(names, 0.0),
        },
        "margin": 0.1,
        "needs_review": True,
        "concepts": [
            {
                "name": name,
                "probability": 0.5,
                "present": False,
                "similarity": 0.4,
                "prototype": 1,
                "peak": [0.5, 0.5, 1, 1],
                "contributions": {"A": value, "B": 0.0},
                "exemplar": exemplar,
            }
            for name, value in zip(names[:5], values, strict=False)
        ],
    } | changes


def drawn(path: Path, explained: dict[str, Any], find: Any = None) -> Any:
    maps = [torch.rand(4, 4) for _ in explained["concepts"]]
    draw_panel(path, explained, GREY, maps, find)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).copy()


def test_names_of_files_are_safe_and_all_different() -> None:
    names = ["a", "b/a", "c/a", "c_a", "../a", "..", "", "a.png", "x" * 300, "é/a", "\udcff", "/a"]
    paths = [panel_path(Path("f"), name) for name in names]
    assert len(set(paths)) == len(names)
    assert paths[0] == Path("f/a.png")
    for path in paths:
        assert path.parent == Path("f")
        assert path.name.isascii()
        assert path.suffix == ".png"
        assert not path.name.startswith(".")
        assert len(path.name) < 120


def test_an_image_has_the_same_file_every_time() -> None:
    assert panel_path(Path("f"), "b/a.jpg") == panel_path(Path("f"), "b/a.jpg")


@pytest.mark.parametrize("count", [1, 4, 15, 16, 40])
def test_bars_add_up_to_the_logit(count: int) -> None:
    bars = bars_of(row(count), "A")
    assert sum(value for _, value in bars[:-1]) == pytest.approx(bars[-1][1])
    assert [name for name, _ in bars[-2:]] == ["bias", "logit"]
    assert len(bars) <= 18
    sizes = [abs(value) for name, value in bars[:-2] if "other" not in name]
    assert sizes == sorted(sizes, reverse=True)


def test_the_most_probable_of_the_predicted_targets_is_taken_apart() -> None:
    assert target_shown(row()) == "A"
    assert target_shown(row(prediction=["A", "B"])) == "B"
    assert target_shown(row(prediction=[])) == "B"
    assert target_shown(row(prediction="A")) == "A"


def test_maps_are_cut_off_and_not_stretched() -> None:
    found = enlarged(torch.tensor([[-1.0, 0.25], [0.25, 0.5]]), 40, 60)
    assert found.shape == (40, 60)
    assert (found.min(), found.max()) == (0, 0.5)
    assert enlarged(torch.full((2, 2), 0.3), 5, 5) == pytest.approx(np.full((5, 5), 0.3))
    # Cell (0, 0) of two by two has its centre at a quarter.
    assert enlarged(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 4, 4)[0, 0] == 1


def test_large_images_shrink_in_shape_and_grey_becomes_three_channels() -> None:
    small = thumbnail(torch.full((1, 900, 1800), 0.2))
    assert (small.shape, str(small.dtype)) == ((224, 448, 3), "uint8")
    assert (small == 51).all()
    assert thumbnail(np.ones((3, 5, 7), np.float32)).shape == (5, 7, 3)
    colour = thumbnail(torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 4, 4))
    assert colour[0, 0].tolist() == [255, 128, 0]


def test_a_grey_image_is_drawn_in_grey(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "a.png", row(concepts=[]))
    inside = picture[400:600, 200:500]
    assert set(inside.reshape(-1)) == {90}


def test_exemplars_widen_the_panel_and_a_missing_one_is_said(tmp_path: Path) -> None:
    asked: list[str] = []

    def find(name: str) -> Any:
        asked.append(name)
        return GREY if len(asked) == 1 else None

    plain = drawn(tmp_path / "a.png", row())
    wide = drawn(tmp_path / "b.png", row(), find)
    assert wide.shape[0] == plain.shape[0]
    assert wide.shape[1] > plain.shape[1] + 200
    assert asked == ["t0"] * 3


def test_a_panel_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "here" / "a.png"
    path.parent.mkdir()
    path.write_text("old")
    first = drawn(path, row())
    assert not np.array_equal(first[:100], drawn(path, row(prediction="B"))[:100])
    assert [*path.parent.iterdir()] == [path]


def test_names_are_never_formulas(tmp_path: Path) -> None:
    odd = "$\\frac{a$ {%s} _^ \n<b>"
    found = row(
        image=odd,
        prediction=[odd],
        probabilities={odd: 0.7},
        logits={odd: 1.0},
        bias={odd: 0.0},
        contributions={odd: {odd: 1.0}},
    )
    for one in found["concepts"]:
        one["name"], one["contributions"] = odd, {odd: 1.0}
    drawn(tmp_path / "a.png", found)


def test_concepts_without_a_kept_prototype_have_no_picture(tmp_path: Path) -> None:
    found = row(2)
    shown = drawn(tmp_path / "a.png", found)
    for one in found["concepts"]:
        one |= {"similarity": None, "prototype": None, "peak": None, "exemplar": None}
    draw_panel(tmp_path / "b.png", found, GREY, [])
    with Image.open(tmp_path / "b.png") as image:
        assert not np.array_equal(np.asarray(image.convert("RGB")), shown)


def test_long_texts_are_cut_where_they_say_least() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened("abcdefg", 6, head=False) == "…cdefg"
    assert shortened("a\n  b", 9) == "a b"


def test_panels_have_a_column_of_exemplars_with_an_atlas_alone(
    csr: Call, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "runs" / "csr" / "t")
    file = tmp_path / "x y.png"
    Image.fromarray(np.full((70, 50, 3), 40, np.uint8)).save(file)
    folder = tmp_path / "panels" / "here"
    words = ("explain", str(file), "--run", str(run), "--cpu", "--panel", str(folder))
    sizes: dict[str, set[tuple[int, int]]] = {}

    def see(kind: str, *more: str) -> str:
        code, out, err = csr(*words, *more)
        paths = [json.loads(line)["panel"] for line in out.splitlines()]
        assert code == 0, err
        assert len(set(paths)) == 1 + len(more) // 2
        assert set(map(Path, paths)) <= set(folder.iterdir())
        for path in paths:
            with Image.open(path) as image:
                image.load()
                sizes.setdefault(kind, set()).add(image.size)
        return err

    see("plain", "--id", "glyph_000001")
    assert csr("atlas", "--run", str(run), "--cpu")[0] == 0
    see("atlas", "--id", "glyph_000001")
    monkeypatch.setattr(Opened, "part", _gone)
    assert see("gone").count("without training images: train: gone") == 1
    assert sizes["plain"] == sizes["gone"]
    assert len(sizes["plain"]) == len(sizes["atlas"]) == 1
    assert sizes["atlas"].pop()[0] > sizes["plain"].pop()[0] + 200


def _gone(_: Opened, split: str) -> None:
    raise UserError(f"{split}: gone")
