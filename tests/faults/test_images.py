"""Commands on image files: a broken one is named in a sentence, an odd one is read in silence."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moectl.cli import _run
from tests.faults import odd_images, procedures

QUIET = ("--cpu", "--quiet", "--set", "train.precision=no", "--set", "train.tensorboard=false")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with procedures.without_pictures():
        yield


def save(path: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def balpoe(images: Path, odd: Sequence[str]) -> list[str]:
    """Write lists of two classes, the odd images at the end of the training images."""
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        save(images / name, number)
    lines = [f"{name} {number % 2}\n" for number, name in enumerate(names)]
    Path("train.txt").write_text("".join(lines[:8] + [f"{name} 1\n" for name in odd]))
    Path("test.txt").write_text("".join(lines[8:]))
    return [
        *("balpoe", "train", "--dataset", "list", "--set", f"data.images={images}"),
        *("--set", "data.train_list=train.txt", "--set", "data.test_list=test.txt"),
        *("--set", "data.image_size=14", "--set", "data.workers=0", "--experts", "2"),
        *("--tau-list", "0;2", "--layer2-dimension", "16", "--layer3-dimension", "16"),
        *("--epochs", "1", "--bs", "4", "--warmup", "0", *QUIET),
    ]


def csr(images: Path, odd: Sequence[str]) -> list[str]:
    """Write tables of two concepts and one target, the odd images among the training images."""
    for part in ("train", "test"):
        names = [f"{part}{number}" for number in range(8)]
        for number, name in enumerate(names):
            save(images / f"{name}.png", number)
        names += odd if part == "train" else []
        rows = [
            f"{name},{number % 2},{number // 2 % 2},{number % 3 == 0:d}\n"
            for number, name in enumerate(names)
        ]
        Path(f"{part}.csv").write_text("image_id,spots,rims,illness\n" + "".join(rows))
    return [
        *("csr", "train", "--train-csv", "train.csv", "--test-csv", "test.csv"),
        *("--train-dir", str(images), "--test-dir", str(images)),
        *("--concept-columns", "spots,rims", "--target-columns", "illness", "--min-positives", "1"),
        *("--backbone-type", "tiny", "--no-pretrained", "--image-size", "32", "--workers", "0"),
        *("--set", "model.projection=8", "--batch-size", "4", "--epochs-stage1", "1"),
        *("--epochs-stage2", "1", "--epochs-stage3", "1", "--val-fraction", "0.3"),
        *("--normalize", "imagenet", *QUIET),
    ]


def diffusion(images: Path, odd: Sequence[str]) -> list[str]:
    """Images of one class, the odd ones among them."""
    for number in range(12):
        save(images / f"{number:02}.png", number)
    return [
        *("diffusion", "train", "--data", "folder", "--data-dir", str(images)),
        *("--image-size", "8", "--model-channels", "8", "--channel-mults", "1,2"),
        *("--set", "model.num_experts=3", "--set", "model.time_dim=8"),
        *("--set", "model.class_dim=8", "--set", "data.val_fraction=0.2"),
        *("--set", "data.workers=0", "--epochs", "1", "--sample-every", "0", "--batch-size", "4"),
        *QUIET,
    ]


def controller(images: Path, odd: Sequence[str]) -> list[str]:
    """A file of questions, about the odd images at last."""
    save(images / "0.png", 0)
    lines = [{"image": f"images/{name}", "question": "What?"} for name in ("0.png", *odd)]
    Path("asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plan = {"tier": "low", "blocks": [0, 1, 2, 3, 4], "top_k": [8] * 6}
    Path("plan.json").write_text(json.dumps(plan))
    return [
        *("controller", "infer", "--questions", "asked.jsonl", "--plan", "plan.json"),
        *("--model", "nano", "--budget", "40", "--set", "backbone.max_new_tokens=1"),
        *("--cpu", "--quiet"),
    ]


EACH = pytest.mark.parametrize("room", [balpoe, csr, diffusion, controller])
Room = Callable[[Path, Sequence[str]], list[str]]


@pytest.mark.parametrize("name", [*odd_images.BROKEN, "gone.png"])
@EACH
def test_a_broken_image_ends_a_command_with_its_name(
    isolated: Path, capsys: pytest.CaptureFixture[str], room: Room, name: str
) -> None:
    images = isolated / "images"
    images.mkdir()
    odd_images.write(images, name)
    assert _run(room(images, [name])) == 2
    out, err = capsys.readouterr()
    said, *hints = err.splitlines()
    assert out == ""
    assert said.startswith("error: ")
    assert name in said
    assert name == "gone.png" or said.endswith(f"images/{name}: {odd_images.BROKEN[name]}")
    assert all(line.startswith("hint: ") for line in hints)


@EACH
def test_odd_images_are_read_in_silence(
    isolated: Path, capsys: pytest.CaptureFixture[str], room: Room
) -> None:
    images = isolated / "images"
    images.mkdir()
    for name in odd_images.UNUSUAL:
        odd_images.write(images, name)
    assert _run(room(images, odd_images.UNUSUAL)) == 0
    assert capsys.readouterr().err == ""
