"""Pictures of samples and of losses."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moectl.diffusion import solvers
from moectl.diffusion.model import UNet
from moectl.diffusion.pictures import (
    enlarged,
    learning_curve,
    loss_by_step,
    losses,
    side_by_side,
    write_grid,
    write_png,
    write_samples,
    write_strip,
)
from moectl.diffusion.process import GaussianDiffusion
from moectl.engine import plot
from moectl.engine.launch import build_accelerator
from moectl.engine.sections import TrainSection

Lines = Callable[..., Any]


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def grey(*levels: float) -> Tensor:
    """Images of 8 x 8 pixels, each of one value."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be drawn: curves, and the words around them."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(
        plot, "lines", lambda _, series, **words: kept.update(series=series, **words)
    )
    return kept


# Images


def test_a_grid_holds_every_image_in_its_place(tmp_path: Path) -> None:
    write_grid(tmp_path / "new" / "grid.png", grey(-1, 0, 1, -0.5, 2), 3)
    picture = pixels(tmp_path / "new" / "grid.png")
    scale = 480 // 32
    assert picture.shape == (22 * scale, 32 * scale, 3)
    places = [(6 * scale, (6 + 10 * column) * scale) for column in range(3)]
    places += [(16 * scale, x) for _, x in places[:2]]
    assert [int(picture[place][0]) for place in places] == [0, 128, 255, 64, 255]
    assert (picture[:scale] == 255).all()


def test_a_grid_is_about_square_if_not_told(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", grey(*[0.0] * 5))
    assert pixels(tmp_path / "grid.png").shape[:2] == (22 * 15, 32 * 15)


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    image = torch.arange(3 * 4 * 240, dtype=torch.uint8).view(3, 4, 240)
    assert torch.equal(enlarged(image)[:, ::2, 1::2], image)
    assert enlarged(torch.zeros(3, 500, 9)).shape == (3, 500, 9)


def test_a_strip_is_the_first_sixteen_pixel_by_pixel(tmp_path: Path) -> None:
    write_strip(tmp_path / "strip.png", grey(*[place / 20 for place in range(20)]))
    picture = pixels(tmp_path / "strip.png")
    assert picture.shape == (10, 16 * 9 + 1, 3)
    assert [int(value) for value in picture[4, 4::9, 0][:2]] == [128, 134]


def test_strips_stand_below_each_other_with_their_names(tmp_path: Path) -> None:
    for name, level in (("a", -1.0), ("b", 1.0)):
        write_strip(tmp_path / f"{name}.png", grey(*[level] * 16))
    side_by_side(tmp_path / "all.png", {name: tmp_path / f"{name}.png" for name in "ab"})
    dark = (pixels(tmp_path / "all.png")[:, :, :3] < 9).all(2).sum(1) > 400
    assert dark[: len(dark) // 2].any()
    assert not dark[len(dark) // 2 :].any()


def test_a_picture_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.png"
    write_png(path, torch.zeros(3, 4, 4, dtype=torch.uint8))
    before = path.read_bytes()

    def torn(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        write_png(path, torch.ones(3, 4, 4, dtype=torch.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.glob("*.*")) == [path]


# Samples of a training


def network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    model = UNet(
        model_channels=8, channel_mults=(1,), time_dim=4, class_dim=4, num_classes=12, num_experts=2
    )
    head: Any = model.output_proj[2]
    torch.nn.init.normal_(head.weight, std=0.2)
    return model.eval()


def sampled(path: Path, classes: int = 3, steps: int = 1000, seed: int = 0) -> Path:
    accelerator = build_accelerator(TrainSection(precision="no"), cpu=True)
    settings: Any = SimpleNamespace(data=SimpleNamespace(image_size=4))
    process = GaussianDiffusion(steps=steps)
    write_samples(path, network(seed), process, accelerator, classes, settings)
    return path


def test_every_class_has_a_row_of_eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    own = solvers.guided

    def guided(model: UNet, labels: Tensor, scale: float) -> Any:
        assert scale == 1
        asked.append(labels)
        return own(model, labels, scale)

    monkeypatch.setattr(solvers, "guided", guided)
    for classes, shown in ((3, 3), (12, 10)):
        picture = pixels(sampled(tmp_path / f"{classes}.png", classes))
        scale = 480 // max(8 * 6 + 2, shown * 6 + 2)
        assert picture.shape == ((shown * 6 + 2) * scale, (8 * 6 + 2) * scale, 3)
        expected = [label for label in range(shown) for _ in range(8)]
        assert asked[-1].tolist() == expected


def test_the_noise_is_the_same_every_time(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = sampled(tmp_path / "one.png")
    torch.manual_seed(2)
    two, other = sampled(tmp_path / "two.png"), sampled(tmp_path / "other.png", seed=1)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    picture = pixels(one)
    assert len(np.unique(picture[1::9, 1::9].reshape(-1, 3), axis=0)) > 8, "not all alike"


def test_a_process_of_few_steps_is_sampled_in_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    own = solvers.denoise

    def denoise(*given: Any, steps: int, **named: Any) -> Tensor:
        taken.append(steps)
        return own(*given, steps=steps, **named)

    monkeypatch.setattr(solvers, "denoise", denoise)
    sampled(tmp_path / "few.png", steps=7)
    sampled(tmp_path / "many.png", steps=100)
    assert taken == [7, 20]


# Curves


def test_the_learning_curve_has_training_and_held_out_losses(figure: dict[str, Any]) -> None:
    rows = [
        {"epoch": str(epoch), "train/noise_loss": str(1 / epoch), "val/loss": str(2 / epoch)}
        for epoch in (1, 2)
    ]
    learning_curve(
        Path("unused.png"), [*rows, {"epoch": "3", "train/noise_loss": "", "val/loss": "7"}]
    )
    training, held_out = figure["series"].items()
    assert training == ("training", ([1, 2], [1, 0.5]))
    assert held_out == ("held out", ([1, 2, 3], [2, 1, 7]))
    assert (figure["x_label"], figure["scale"]) == ("epoch", "log")


def test_spans_of_steps_are_drawn_in_their_middles(figure: dict[str, Any]) -> None:
    loss_by_step(Path("unused.png"), {"a": [0.5, None], "b": [1.0, 2.0]}, 500)
    assert figure["series"] == {"a": ([125, 375], [0.5, None]), "b": ([125, 375], [1, 2])}
    assert figure["x_label"] == "step of the process"


def test_networks_are_compared_by_their_held_out_losses(figure: dict[str, Any]) -> None:
    losses(Path("unused.png"), {"a": [{"epoch": "2", "val/loss": "0.5"}], "b": []})
    assert figure["series"] == {"a": ([2], [0.5]), "b": ([], [])}


def test_curves_become_pictures(tmp_path: Path) -> None:
    row = {"epoch": "1", "train/noise_loss": "0.5", "val/loss": "0.6"}
    learning_curve(tmp_path / "one.png", [row])
    loss_by_step(tmp_path / "two.png", {"a": [0.5, None, 0.1]}, 1000)
    for name in ("one", "two"):
        assert pixels(tmp_path / f"{name}.png").std() > 1
