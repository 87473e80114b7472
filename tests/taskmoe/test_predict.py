"""Classifying images from files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.settings import resolve
from moectl.taskmoe.data import load
from moectl.taskmoe.inference import open_mixture
from moectl.taskmoe.predict import lines, run_predict
from moectl.taskmoe.settings import DataSection, TaskmoeSettings
from tests.faults import odd_images

Call = Callable[..., tuple[int, str, str]]

NAMES = ["b.png", "deep/er/a.png", "deep/z.png", "e.PNG", "f.png", "g.bmp", "y.png"]


def request(folder: Path | None, **changes: Any) -> Request:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    files = [folder / "settings.toml"] if folder else []
    settings, origin = resolve(TaskmoeSettings, named, [], files)
    return Request(
        room="taskmoe",
        command="predict",
        settings=settings,
        origin=origin,
        name="predict",
        cpu=True,
        out=None,
        resume="",
        folder=folder,
        run=str(folder or ""),
    )


def predicted(runs: Path, images: Path, **changes: Any) -> list[dict[str, Any]]:
    return run_predict(request(runs / "t", **changes), images, "", None, None)[0]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Test images of various digits, (7, 3, 16, 16)."""
    return load(DataSection(task="digits")).test.images[40::90][: len(NAMES)]


@pytest.fixture
def folder(tmp_path: Path, pixels: Tensor) -> Path:
    """The same images as files, in the order of their names."""
    for name, image in zip(NAMES, pixels, strict=True):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_files_get_the_answer_that_the_model_gives_to_their_pixels(
    runs: Path, folder: Path, pixels: Tensor
) -> None:
    opened = open_mixture(request(runs / "t"), None, None)
    with torch.no_grad():
        logits, gates, _ = opened.model(opened.data.test.plain(pixels))
    rows = predicted(runs, folder)
    sure, labels = logits.softmax(1).max(1)
    assert [row["label"] for row in rows] == labels.tolist()
    assert [row["class"] for row in rows] == [str(label) for label in labels.tolist()]
    found = torch.tensor([row["probability"] for row in rows])
    torch.testing.assert_close(found, sure, rtol=0, atol=1e-5)
    found = torch.tensor([row["gates"] for row in rows])
    torch.testing.assert_close(found, gates, rtol=0, atol=1e-5)
    assert len(set(sure.tolist())) == len(NAMES)


def test_rows_are_in_the_order_of_the_paths_with_folders_in_them(runs: Path, folder: Path) -> None:
    assert [row["image"] for row in predicted(runs, folder)] == NAMES


def test_gates_sum_to_1(runs: Path, folder: Path) -> None:
    for row in predicted(runs, folder):
        assert len(row["gates"]) == 3
        assert sum(row["gates"]) == pytest.approx(1, abs=1e-6)


def test_a_single_file_is_called_by_its_name(runs: Path, folder: Path) -> None:
    (row,) = predicted(runs, folder / "deep" / "z.png")
    expected = predicted(runs, folder)[2]
    assert row["image"] == "z.png"
    assert row["label"] == expected["label"]
    assert row["probability"] == pytest.approx(expected["probability"], abs=1e-5)


def test_small_batches_change_nothing(runs: Path, folder: Path) -> None:
    found, expected = (predicted(runs, folder, eval__batch_size=size) for size in (3, 256))
    assert [row["image"] for row in found] == NAMES
    for one, other in zip(found, expected, strict=True):
        assert one["gates"] == pytest.approx(other["gates"], abs=1e-5)
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_images_of_any_size_and_mode_are_taken(runs: Path, tmp_path: Path) -> None:
    for mode, size in {"L": (40, 16), "RGBA": (16, 90), "P": (3, 5), "RGB": (16, 16)}.items():
        Image.new(mode, size).save(tmp_path / f"{mode}.png")
    rows = predicted(runs, tmp_path)
    assert [row["image"] for row in rows] == ["L.png", "P.png", "RGB.png", "RGBA.png"]
    assert all(row["gates"] == pytest.approx(rows[0]["gates"], abs=1e-5) for row in rows)


def test_a_high_temperature_makes_the_gates_equal(runs: Path, folder: Path) -> None:
    for row in run_predict(request(runs / "t"), folder, "", None, 1e6)[0]:
        assert row["gates"] == pytest.approx([1 / 3] * 3, abs=1e-4)


def test_the_task_chooses_the_run(runs: Path, folder: Path) -> None:
    latest = request(runs / "t")
    with pytest.raises(UserError, match=r"t: is of task digits, not A$"):
        run_predict(latest, folder, "A", None, None)
    assert run_predict(latest, folder, "digits", None, None)[0] == predicted(runs, folder)


def test_no_data_is_needed_beside_the_images(runs: Path, folder: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copy(runs / "t" / "best_model.pth", tmp_path))
    facts = json.loads((runs / "t" / "best_model.pth.json").read_text())
    moved = {**facts, "task": "gone/manifest.toml"}
    weights.with_name("best_model.pth.json").write_text(json.dumps(moved))
    anywhere = request(None, train__precision="no")
    assert run_predict(anywhere, folder, "", weights, None)[0] == predicted(runs, folder)


def test_weights_without_statistics_take_those_of_the_task(
    runs: Path, folder: Path, tmp_path: Path
) -> None:
    state = artefact.load(runs / "t" / "best_model.pth").payload["model_state_dict"]
    torch.save({"model_state_dict": state}, tmp_path / "public.pth")
    public = request(None, data__task="digits", train__precision="no")
    rows, _ = run_predict(public, folder, "", tmp_path / "public.pth", None)
    assert rows == predicted(runs, folder)


def test_what_is_no_image_is_named_and_left_out(taskmoe: Call, runs: Path, folder: Path) -> None:
    expected = predicted(runs, folder)
    for name in odd_images.BROKEN:
        odd_images.write(folder / "deep", name)
    code, out, err = taskmoe("predict", str(folder), "--run", f"{runs}/t", "--cpu", "--json")
    assert (code, json.loads(out)) == (1, expected)
    said = [f"warning: {folder}/deep/{name}: {text}" for name, text in odd_images.BROKEN.items()]
    total = len(NAMES) + len(odd_images.BROKEN)
    assert sorted(err.splitlines()[:-1]) == sorted(said)
    assert f"{len(odd_images.BROKEN)} of {total} images could not be read" in err


def test_16_bit_images_are_scaled_not_cut_off(runs: Path, tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "8.png")
    Image.fromarray(levels.astype(np.uint16) * 256).save(tmp_path / "16.png")
    sixteen, eight = predicted(runs, tmp_path)
    assert sixteen["probability"] == pytest.approx(eight["probability"], abs=1e-6)


@pytest.mark.parametrize("place", ["gone", "empty"])
def test_no_image_at_all_is_an_error(runs: Path, place: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=rf"^{place}: no image there$"):
        predicted(runs, Path(place))


def test_every_row_is_a_line_of_json() -> None:
    rows = [{"image": "a\nb.png", "gates": [0.5, 0.5]}, {"image": "ä.png", "gates": [1.0]}]
    text = lines(rows)
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_the_command_prints_the_rows(taskmoe: Call, runs: Path, folder: Path) -> None:
    expected = predicted(runs, folder)
    code, out, _ = taskmoe("predict", str(folder), "--run", f"{runs}/t", "--cpu")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == expected
    code, out, _ = taskmoe("predict", str(folder), "--cpu", "--json")
    assert (code, json.loads(out)) == (0, expected)


def test_a_checkpoint_needs_no_run(taskmoe: Call, runs: Path, folder: Path) -> None:
    shutil.copy(runs / "t" / "best_model.pth", "alone.pth")
    words = ("--checkpoint", "alone.pth", "--cpu", "--set", "train.precision=no")
    code, out, _ = taskmoe("predict", str(folder), *words, "--json")
    assert (code, json.loads(out)) == (0, predicted(runs, folder))
