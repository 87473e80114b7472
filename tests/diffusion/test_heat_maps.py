"""Heat maps of the experts' use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.diffusion import heat_maps
from moectl.diffusion.heat_maps import expert_usage


def document(blocks: int = 2, experts: int = 3, classes: int = 4, **more: Any) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)

    def shares(groups: int) -> Any:
        return torch.rand(blocks, experts, groups, generator=draws).softmax(1).tolist()

    return {
        "blocks": [f"block {number}" for number in range(blocks)],
        "usage_by_step": shares(10),
        "usage_by_class": shares(classes),
        "steps": 1000,
        "class_names": [f"c{number}" for number in range(classes)],
        **more,
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draw without writing and return the figure."""
    kept: list[Any] = []

    def draw(given: dict[str, Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(heat_maps, "write_png", lambda figure, _: kept.append(figure))
            expert_usage(Path("unused.png"), given)
        return kept.pop()

    return draw


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


def test_every_block_has_its_shares_by_step_and_by_class(drawn: Any) -> None:
    given = document()
    found = panels(drawn(given))
    assert len(found) == 4
    largest = max(np.max(given[f"usage_by_{kind}"]) for kind in ("step", "class"))
    for number, axes in enumerate(found):
        kind = "usage_by_class" if number % 2 else "usage_by_step"
        (image,) = axes.images
        assert np.allclose(image.get_array(), given[kind][number // 2])
        assert image.get_clim() == (0, largest), "colours mean the same in all panels"
    assert [axes.get_title(loc="left") for axes in found] == ["block 0", "", "block 1", ""]


def test_axes_are_steps_classes_and_experts(drawn: Any) -> None:
    by_step, by_class = panels(drawn(document(blocks=1)))
    assert by_step.images[0].get_extent() == [0, 1000, 2.5, -0.5]
    assert by_class.images[0].get_extent() == [-0.5, 3.5, 2.5, -0.5]
    assert [by_step.get_xlabel(), by_class.get_xlabel()] == ["step of the process", "class"]
    assert [by_step.get_ylabel(), by_class.get_ylabel()] == ["expert", ""]
    assert by_step.get_yticks().tolist() == [0, 1, 2]


def test_classes_are_named_below_the_last_block(drawn: Any) -> None:
    found = panels(drawn(document(class_names=["_a", "$b$", "c", "d"])))
    assert labels(found[1]) == [""] * 4
    assert labels(found[3]) == ["_a", "$b$", "c", "d"]
    assert found[1].get_xlabel() == ""


def test_long_names_are_slanted(drawn: Any) -> None:
    short = panels(drawn(document()))[-1].get_xticklabels()
    long = panels(drawn(document(class_names=["aeroplane", "b", "c", "d"])))[-1].get_xticklabels()
    assert [text.get_rotation() for text in (short[0], long[0])] == [0, 40]


def test_many_classes_are_numbered(drawn: Any) -> None:
    assert "c1" not in labels(panels(drawn(document(classes=13)))[-1])
    assert "c1" in labels(panels(drawn(document(classes=12)))[-1])


def test_many_experts_are_numbered_here_and_there(drawn: Any) -> None:
    ticks = panels(drawn(document(experts=16)))[0].get_yticks()
    assert ticks.tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("blocks", [1, 3])
def test_it_becomes_a_picture(tmp_path: Path, blocks: int) -> None:
    given = document(blocks=blocks, class_names=["鹿", "$\\bad$", "c", "d"])
    for name in ("one", "two"):
        expert_usage(tmp_path / f"{name}.png", given)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
