"""Outputs and rules that belong to other weights, other images or the wrong part of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.balpoe.fitted import FILE, read_plugin
from moectl.balpoe.logits import read_outputs, write_outputs
from moectl.balpoe.settings import BalpoeSettings
from moectl.balpoe.train import build
from moectl.cli import _run
from moectl.common.scores import prior_weights
from moectl.engine.settings import resolve

Call = Callable[..., tuple[int, str, str]]

COUNTS = (24, 12, 8, 4)
"""Training images per class; there are 10 of each to test on."""
SETTINGS = {
    "data.dataset": "list",
    "data.root": "images",
    "data.image_size": "8",
    "data.train_list": "train.txt",
    "data.test_list": "test.txt",
    "data.val_fraction": "0.5",
    "data.workers": "0",
    "model.arch": "resnet32",
    "model.experts": "2",
    "model.layer2_dimension": "16",
    "model.layer3_dimension": "16",
    "loss.tau_list": "0;2",
    "plugin.tail_threshold": "8",
    "train.precision": "no",
    "train.tensorboard": "false",
}
FIT = ("--rates", "0.2", "--quiet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with listed images and `run`, imported weights that were never trained."""
    folder = tmp_path_factory.mktemp("leaks")
    words = [f"{name}={value}" for name, value in SETTINGS.items()]
    options = [word for line in words for word in ("--set", line)]
    draws = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)
        Path("images").mkdir()
        for part, sizes in (("train", COUNTS), ("test", (10,) * 4)):
            lines = []
            for label, size in enumerate(sizes):
                for number in range(size):
                    name = f"{part}-{label}-{number}.png"
                    pixels = draws.integers(0, 255, (8, 8, 3)).astype(np.uint8)
                    Image.fromarray(pixels).save(Path("images", name))
                    lines.append(f"{name} {label}\n")
            Path(f"{part}.txt").write_text("".join(lines))
        state = build(resolve(BalpoeSettings, {}, words, [])[0], 4).state_dict()
        torch.save({"state_dict": state, "epoch": 3}, "public.pth")
        assert _run(["balpoe", "import", "public.pth", *options, "-q", "--out", "run"]) == 0
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run in a working folder of its own."""
    shutil.copytree(home, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Path("run")


def kept(run: Path) -> Path:
    return next(run.glob("logits/*.safetensors"))


def test_lists_edited_in_place_are_not_answered_from_kept_outputs(balpoe: Call, run: Path) -> None:
    assert balpoe("plugin", "--run", "run", *FIT)[0] == 0
    lines = Path("test.txt").read_text().splitlines()
    rotated = [f"{line.split()[0]} {(int(line.split()[1]) + 1) % 4}\n" for line in lines]
    Path("test.txt").write_text("".join(rotated))
    code, _, error = balpoe("plugin", "--run", "run", *FIT)
    assert code == 2
    assert "the data is split otherwise now" in error


def test_images_of_another_folder_are_looked_at(balpoe: Call, run: Path) -> None:
    assert balpoe("plugin", "--run", "run", *FIT)[0] == 0
    before = read_outputs(kept(run)).test_logits
    shutil.copytree("images", "others")
    for path in Path("others").glob("test-*.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    assert balpoe("plugin", "--run", "run", "--set", "data.root=others", *FIT)[0] == 0
    assert not torch.equal(read_outputs(kept(run)).test_logits, before)


def test_another_division_of_kept_outputs_is_refused(balpoe: Call, run: Path) -> None:
    assert balpoe("plugin", "--run", "run", *FIT)[0] == 0
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps({"val": split["test"], "test": split["val"]}))
    code, _, error = balpoe("plugin", "--run", "run", *FIT)
    assert (code, "the data is split otherwise now" in error) == (2, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"weights": "b" * 64}, "are of the weights bbbbbbbbbbbb"),
        ({"class_counts": [24, 12, 8, 5]}, "its class_counts are not those of"),
        ({"taus": [0.0, 1.0]}, "its taus are not those of"),
        ("swap", "the data is split otherwise now"),
    ],
)
def test_given_outputs_must_be_those_of_the_run(
    balpoe: Call, run: Path, change: Any, words: str
) -> None:
    assert balpoe("plugin", "--run", "run", *FIT)[0] == 0
    own = read_outputs(kept(run))
    parts = ("logits", "labels", "indices")
    if change == "swap":
        change = {f"val_{part}": getattr(own, f"test_{part}") for part in parts}
        change |= {f"test_{part}": getattr(own, f"val_{part}") for part in parts}
    write_outputs(Path("given.safetensors"), type(own)(**{**vars(own), **change}))
    given = ("--run", "run", "--logits", "given.safetensors", "--name", "given")
    code, _, error = balpoe("plugin", *given, *FIT)
    assert code == (2 if words else 0)
    assert words in error


def test_given_outputs_need_neither_images_nor_a_forward_pass(balpoe: Call, run: Path) -> None:
    assert balpoe("plugin", "--run", "run", *FIT)[0] == 0
    shutil.copy(kept(run), "given.safetensors")
    shutil.rmtree(run / "logits")
    shutil.rmtree("images")
    given = ("--run", "run", "--logits", "given.safetensors", "--name", "given")
    assert balpoe("plugin", *given, *FIT)[0] == 0


def test_a_plugin_of_other_weights_of_the_run_is_not_taken(balpoe: Call, run: Path) -> None:
    assert balpoe("plugin", "--run", "run@3", *FIT)[0] == 0
    assert balpoe("reject", "--run", "run@3", "-q")[0] == 0
    path = run / "plugins" / "plugin" / FILE
    document = json.loads(path.read_text())
    document["checkpoint"]["file"] = "model_best.pth"
    path.write_text(json.dumps(document))
    code, _, error = balpoe("reject", "--run", "run@3", "-q")
    assert (code, "no plug-in fitted to checkpoint-epoch3.pth" in error) == (2, True)
    code, _, error = balpoe("reject", "--run", "run@3", "--plugin", "plugin", "-q")
    assert (code, "not fitted to checkpoint-epoch3.pth" in error) == (2, True)


@pytest.mark.parametrize("shares", ["equal", ".15;.85", "1;2", "3;4"])
def test_what_was_fitted_is_what_is_applied(balpoe: Call, run: Path, shares: str) -> None:
    """To the last digit: a threshold is the score of a validation item."""
    rates = ",".join(str(step / 20) for step in range(1, 12))
    words = ("--rates", rates, "--expert-weights", shares, "--quiet")
    _, out, _ = balpoe("plugin", "--run", "run", *words)
    fitted = read_plugin(Path(out.strip()))
    outputs = read_outputs(kept(run))
    scores, _ = fitted.plugin.judge(fitted.posteriors(outputs.val_logits))
    rejected = (scores < fitted.plugin.thresholds[:, None]).double()
    weights = prior_weights(outputs.val_labels, fitted.prior)
    again = rejected @ weights / weights.sum()
    torch.testing.assert_close(again, fitted.plugin.rejection, rtol=0, atol=1e-12)


def test_test_labels_play_no_part_in_rules_and_scores(balpoe: Call, run: Path) -> None:
    assert balpoe("plugin", "--run", "run", *FIT)[0] == 0
    path = run / "plugins" / "plugin" / FILE
    before, judged = path.read_bytes(), balpoe("reject", "--run", "run", "-q")[1]
    own = read_outputs(kept(run))
    labels = own.test_labels[torch.randperm(len(own.test_labels))]
    permuted = type(own)(**{**vars(own), "test_labels": labels})
    write_outputs(Path("given.safetensors"), permuted)
    assert balpoe("plugin", "--run", "run", "--logits", "given.safetensors", *FIT)[0] == 0
    assert path.read_bytes() == before
    shutil.copy("given.safetensors", kept(run))
    assert balpoe("reject", "--run", "run", "-q")[1] == judged


def test_a_plugin_to_be_measured_wants_a_measurement(balpoe: Call, run: Path) -> None:
    code, _, error = balpoe("eval", "--run", "run", "--plugin", "x", "--no-rejection")
    assert (code, "exclude each other" in error) == (2, True)


def test_a_grid_without_candidates_is_refused(balpoe: Call, run: Path) -> None:
    words = ("--mu-method", "grid", "--set", "plugin.lambdas=[]")
    code, _, error = balpoe("plugin", "--run", "run", *words)
    assert (code, "plugin.lambdas" in error) == (2, True)
