import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from moectl.balpoe.data import load
from moectl.balpoe.fitted import FILE, read_plugin
from moectl.balpoe.inference import LOGITS
from moectl.balpoe.logits import read_outputs
from moectl.balpoe.settings import BalpoeSettings
from moectl.cli import _run
from moectl.common.scores import prior_weights
from moectl.engine import plot
from moectl.engine.settings import from_toml
from tests.faults import odd_images

COUNTS = [400, 150, 60, 15, 8]
NAMES = ["ant", "bee", "cat", "dog", "eel"]
TAUS = [0.0, 2.0]
COLUMNS = ["item", "label", "class", "reject", "score"]

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]


def classify(labels: np.ndarray, seed: int, scale: float = 1.4) -> np.ndarray:
    """Return logits (N, 2, 5) of experts that know the five Gaussian classes."""
    means = scale * np.random.default_rng(0).normal(size=(5, 4))
    points = means[labels] + np.random.default_rng(seed).normal(size=(len(labels), 4))
    known = -0.5 * ((points[:, None] - means) ** 2).sum(2)
    prior = np.log(np.array(COUNTS) / sum(COUNTS))
    return np.stack([known + (1 - tau) * prior for tau in TAUS], 1).astype(np.float32)


LABELS = np.arange(400) % 5
HELD: dict[str, Any] = {"logits": classify(LABELS, 1), "labels": LABELS}
HELD |= {"class_counts": COUNTS, "taus": TAUS}
NEW = classify(np.arange(60) % 5, 2)
POINTS = ("--rates", "0.1;0.3", "--costs", "0.2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `theirs`, a run of logits with one plug-in, and `new.npz`."""
    folder = tmp_path_factory.mktemp("reject")
    np.savez(folder / "held.npz", **HELD, class_names=np.array(NAMES))
    np.savez(folder / "new.npz", logits=NEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)
        words = ["--logits", "held.npz", "--set", "data.val_fraction=0.5", "--out", "theirs"]
        assert _run(["balpoe", "plugin", *words, *POINTS, "--name", "moe", "--quiet"]) == 0
    return folder


@pytest.fixture
def theirs(home: Path, isolated: Path) -> Path:
    """A copy of the run of logits, in the working folder."""
    shutil.copy(home / "new.npz", "new.npz")
    return Path(shutil.copytree(home / "theirs", "theirs"))


def judged(balpoe: Call, *words: str) -> list[dict[str, Any]]:
    code, out, err = balpoe("reject", *words, "--quiet")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def refused(outcome: Outcome) -> str:
    """Return the one sentence of a refusal."""
    code, out, err = outcome
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines[0]


ALONE = ("--run", "theirs", "--costs=", "--quiet", "--rates")
"""A fit to rates alone: the run remembers the costs it was made with."""


def plugin_of(run: Path, name: str = "moe") -> Path:
    return run / "plugins" / name / FILE


# What is printed


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("words", "point"),
    [
        (("--target-rate", "0.1"), {"rate": 0.1}),
        (("--target_rate", "0.3"), {"rate": 0.3}),
        (("--cost", "0.2"), {"cost": 0.2}),
    ],
)
def test_rows_are_what_the_rule_says(
    balpoe: Call, theirs: Path, kind: str, words: tuple[str, ...], point: dict[str, float]
) -> None:
    save_file({"logits": NEW}, "new.safetensors")
    rows = judged(balpoe, "--run", "theirs", "--logits", f"new.{kind}", *words)
    fitted = read_plugin(plugin_of(theirs))
    expected = fitted.plugin.predict(fitted.posteriors(torch.from_numpy(NEW)), **point)
    assert [list(row) for row in rows] == [COLUMNS] * 60
    assert [row["item"] for row in rows] == [str(number) for number in range(60)]
    assert [row["label"] for row in rows] == expected.labels.tolist()
    assert [row["class"] for row in rows] == [NAMES[label] for label in expected.labels.tolist()]
    assert [row["reject"] for row in rows] == expected.rejected.tolist()
    assert [row["score"] for row in rows] == expected.scores.tolist()
    assert 0 < sum(row["reject"] for row in rows) < 60


def test_without_items_the_test_items_of_the_run_are_judged(balpoe: Call, theirs: Path) -> None:
    rows = judged(balpoe, "--run", "theirs", "--target-rate", "0.3")
    outputs = read_outputs(theirs / LOGITS, 0.5, 0)
    assert [row["item"] for row in rows] == [str(index) for index in outputs.test_indices]
    truth = outputs.test_labels.tolist()
    wrong = [row["label"] != label for row, label in zip(rows, truth, strict=True)]
    refusals = [miss for miss, row in zip(wrong, rows, strict=True) if row["reject"]]
    assert np.mean(refusals) > 1.2 * np.mean(wrong), "what is wrong is rejected sooner"


def test_csv_and_json_are_the_same_rows(balpoe: Call, theirs: Path) -> None:
    words = ("reject", "--run", "theirs", "--logits", "new.npz", "--cost", "0.2", "--quiet")
    lines = [json.loads(line) for line in balpoe(*words)[1].splitlines()]
    assert json.loads(balpoe(*words, "--json")[1]) == lines
    table = list(csv.DictReader(balpoe(*words, "--format", "csv")[1].splitlines()))
    assert table == [{name: str(value) for name, value in row.items()} for row in lines]


def test_names_with_commas_survive_csv(balpoe: Call) -> None:
    names = np.array(['a, "b"', "c\nd", "ü", "", "=1"])
    np.savez("held.npz", **HELD, class_names=names)
    balpoe("plugin", "--logits", "held.npz", "--out", "odd", "--rates", "0.2", "--quiet")
    _, out, _ = balpoe("reject", "--run", "odd", "--format", "csv", "--quiet")
    found = {row["class"] for row in csv.DictReader(out.splitlines(keepends=True))}
    assert found == set(names.tolist())


# Operating points


def test_the_only_point_needs_no_name(balpoe: Call, theirs: Path) -> None:
    balpoe("plugin", *ALONE, "0.3", "--name", "one")
    one = judged(balpoe, "--run", "theirs", "--plugin", "one")
    assert one == judged(balpoe, "--run", "theirs", "--plugin", "moe", "--target-rate", "0.3")


@pytest.mark.parametrize("prior", ["train", "uniform"])
def test_the_rejected_share_of_the_fitting_items_is_the_target(
    balpoe: Call, theirs: Path, prior: str
) -> None:
    words = ("--rates", "0.1;0.35", "--label-prior", prior, "--name", "own", "--quiet")
    balpoe("plugin", "--run", "theirs", *words)
    outputs = read_outputs(theirs / LOGITS, 0.5, 0)
    np.savez("fitting.npz", logits=outputs.val_logits.numpy())
    own = read_plugin(plugin_of(theirs, "own"))
    weights = prior_weights(outputs.val_labels, own.prior)
    weights /= weights.sum()
    for rate in (0.1, 0.35):
        chosen = ("--plugin", "own", "--target-rate", str(rate))
        rows = judged(balpoe, "--run", "theirs", "--logits", "fitting.npz", *chosen)
        share = float(weights @ torch.tensor([row["reject"] for row in rows]).double())
        assert rate - float(weights.max()) < share <= rate + 1e-9


# Which plug-in, which items


def test_the_newest_plugin_is_applied(balpoe: Call, theirs: Path) -> None:
    balpoe("plugin", *ALONE, "0.25", "--name", "newer")
    rows = judged(balpoe, "--run", "theirs", "--target-rate", "0.25")
    assert rows == judged(balpoe, "--run", "theirs", "--plugin", "newer")


def test_a_name_is_looked_for_in_the_newest_run(balpoe: Call) -> None:
    np.savez("held.npz", **HELD)
    balpoe("plugin", "--logits", "held.npz", "--name", "moe", "--rates", "0.2", "--quiet")
    assert judged(balpoe, "--plugin", "moe") == judged(balpoe, "--run", "latest")


def test_a_plugin_outside_a_run_judges_logits(balpoe: Call, theirs: Path) -> None:
    words = ("--logits", "new.npz", "--cost", "0.2")
    inside = judged(balpoe, "--run", "theirs", *words)
    shutil.copy(plugin_of(theirs), "alone.json")
    shutil.rmtree("theirs")
    assert judged(balpoe, "--plugin", "alone.json", *words) == inside


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--images", "."),
        ("--logits", "new.npz", "--test-prior", "uniform"),
        ("--logits", "new.npz", "--test-prior", "em"),
    ],
)
def test_a_plugin_outside_a_run_needs_logits_and_its_prior(
    balpoe: Call, theirs: Path, words: tuple[str, ...]
) -> None:
    shutil.copy(plugin_of(theirs), "alone.json")
    outcome = balpoe("reject", "--plugin", "alone.json", "--cost", "0.2", *words)
    assert "alone.json: lies outside a run folder" in refused(outcome)
    assert "--logits" in outcome[2]


def test_logits_of_the_same_or_unknown_weights_are_judged(balpoe: Call, theirs: Path) -> None:
    own = read_plugin(plugin_of(theirs)).weights["sha256"]
    np.savez("own.npz", logits=NEW, weights=np.array(own))
    words = ("--run", "theirs", "--cost", "0.2", "--logits")
    assert judged(balpoe, *words, "own.npz") == judged(balpoe, *words, "new.npz")


# Other label priors


@pytest.mark.parametrize("prior", ["uniform", "train", "shares.txt", "shares.json"])
@pytest.mark.parametrize("objective", ["balanced", "worst"])
def test_a_test_prior_is_a_fit_with_that_prior(
    balpoe: Call, theirs: Path, prior: str, objective: str
) -> None:
    Path("shares.txt").write_text("1\n1\n2\n4\n8\n")
    Path("shares.json").write_text("[3, 1, 1, 1, 3]")
    start = "shares.txt" if prior == "train" else "train"
    few = ("--set", "plugin.rounds=3")
    words = ("--run", "theirs", *POINTS, "--objective", objective, *few, "--quiet")
    for name, kind in (("one", start), ("two", prior)):
        assert balpoe("plugin", *words, "--name", name, "--label-prior", kind)[0] == 0
    for point in (("--target-rate", "0.3"), ("--cost", "0.2")):
        chosen = ("--run", "theirs", "--logits", "new.npz", *point)
        one = judged(balpoe, *chosen, "--plugin", "one", "--test-prior", prior)
        assert one == judged(balpoe, *chosen, "--plugin", "two")
        assert one != judged(balpoe, *chosen, "--plugin", "one")


def test_a_test_prior_keeps_groups_and_weights_of_the_fit(balpoe: Call, theirs: Path) -> None:
    Path("groups.json").write_text('{"one": ["ant", "eel"], "two": ["bee", "cat", "dog"]}')
    words = (*ALONE, "0.2", "--expert-weights", "1;4", "--groups", "groups.json")
    balpoe("plugin", *words, "--name", "one")
    balpoe("plugin", *words, "--name", "two", "--label-prior", "uniform")
    Path("groups.json").unlink()
    one = judged(balpoe, "--run", "theirs", "--plugin", "one", "--test-prior", "uniform")
    assert one == judged(balpoe, "--run", "theirs", "--plugin", "two")


def test_an_estimated_prior_is_closer_to_the_truth_than_the_training_prior(
    balpoe: Call, theirs: Path
) -> None:
    truth = np.array(COUNTS[::-1]) / sum(COUNTS)
    labels = np.repeat(np.arange(5), COUNTS[::-1])
    np.savez("shifted.npz", logits=classify(labels, 3))
    words = ("--run", "theirs", "--logits", "shifted.npz", "--target-rate", "0.1")
    code, out, err = balpoe("reject", *words, "--test-prior", "em")
    assert code == 0
    line = next(line for line in err.splitlines() if line.startswith("estimated label prior"))
    told = dict(re.findall(r"(\w+) (\d\.\d+)", line))
    estimate = np.array([float(told[name]) for name in NAMES])
    train = np.array(COUNTS) / sum(COUNTS)
    assert np.abs(estimate - truth).sum() < 0.5 * np.abs(train - truth).sum()
    adapted = [json.loads(row)["label"] for row in out.splitlines()]
    plain = [row["label"] for row in judged(balpoe, *words)]
    assert (np.array(adapted) == labels).mean() >= (np.array(plain) == labels).mean()


# Images, judged by a trained run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run with a plug-in."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = [
        "--dataset", "synthetic", "--imbalance-ratio", "20", "--set", "data.image_size=8",
        "--layer2-dimension", "16", "--layer3-dimension", "16", "--experts", "2",
        "--tau-list", "0;2", "--workers", "0", "--epochs", "1", "--bs", "64", "--warmup", "0",
        "--set", "train.precision=no", "--set", "train.tensorboard=false", "--quiet",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(plot, "write_png", lambda _, path: path.write_bytes(b""))
        assert _run(["balpoe", "train", *words, "--out", str(folder)]) == 0
        fit = ["--run", str(folder), "--rates", "0.3", "--quiet"]
        assert _run(["balpoe", "plugin", *fit]) == 0
    return folder


@pytest.fixture
def pictures(trained: Path) -> Path:
    """The test images of the run as PNG files, in two folders."""
    settings = from_toml(BalpoeSettings, trained / "settings.toml")
    source: Any = load(settings.data, settings.train.seed).test
    for number, image in enumerate(source.images):
        place = Path("pictures", "early" if number < 100 else "late")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:03}.png")
    return Path("pictures")


def test_images_get_what_their_stored_logits_get(
    balpoe: Call, trained: Path, pictures: Path
) -> None:
    shown = judged(balpoe, "--run", str(trained), "--images", "pictures")
    stored = judged(balpoe, "--run", str(trained))
    assert [row["item"] for row in shown[:2]] == ["early/000.png", "early/001.png"]
    assert shown[-1]["item"] == "late/319.png"
    for name in ("label", "class", "reject"):
        assert [row[name] for row in shown] == [row[name] for row in stored]
    scores = [[row["score"] for row in rows] for rows in (shown, stored)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert 0 < sum(row["reject"] for row in shown) < 320


def test_images_may_be_of_any_size_and_kind(balpoe: Call, trained: Path) -> None:
    Path("mixed").mkdir()
    Image.new("L", (30, 20), 99).save("mixed/a.PNG")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save("mixed/b.webp")
    Image.new("RGB", (64, 64), (200, 0, 0)).save("mixed/c.jpeg")
    Path("mixed/readme.txt").write_text("no image")
    rows = judged(balpoe, "--plugin", str(plugin_of(trained, "plugin")), "--images", "mixed")
    assert [row["item"] for row in rows] == ["a.PNG", "b.webp", "c.jpeg"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none", "none: no such folder of images"),
        ("empty", "empty: no image in it"),
        ("file.png", "file.png: no such folder of images"),
        *((name, f"{name}: {said}") for name, said in odd_images.BROKEN.items()),
    ],
)
def test_images_that_cannot_be_read_are_named(
    balpoe: Call, trained: Path, place: str, message: str
) -> None:
    Path("empty").mkdir()
    Path("empty/readme.txt").write_text("no image")
    Image.new("RGB", (8, 8)).save("file.png")
    if place in odd_images.BROKEN:
        odd_images.write(Path("empty"), place)
        place = "empty"
    assert message in refused(balpoe("reject", "--run", str(trained), "--images", place, "--quiet"))


def test_weights_and_plugin_must_fit(balpoe: Call, trained: Path) -> None:
    other = Path(shutil.copytree(trained, "other"))
    path = plugin_of(other, "plugin")
    document = json.loads(path.read_text())
    document["checkpoint"]["sha256"] = "b" * 64
    path.write_text(json.dumps(document))
    Image.new("RGB", (8, 8)).save("other/a.png")
    message = refused(balpoe("reject", "--run", "other", "--images", "other", "--quiet"))
    assert "the plug-in was fitted to bbbbbbbbbbbb" in message
    assert "not there" in refused(balpoe("reject", "--run", "other", "--quiet"))


@pytest.mark.parametrize("reference", ["best", "1"])
def test_a_plugin_knows_the_weights_it_was_fitted_to(
    balpoe: Call, trained: Path, reference: str
) -> None:
    run = Path(shutil.copytree(trained, "run"))
    shutil.rmtree(run / "plugins")
    _, out, _ = balpoe("plugin", "--run", f"run@{reference}", "--rates", "0.2", "--quiet")
    weights = read_plugin(Path(out.strip())).weights
    wanted = "model_best.pth" if reference == "best" else "checkpoint-epoch1.pth"
    assert weights["file"] == wanted
    record = json.loads((run / "run.json").read_text())
    entry = next(entry for entry in record["weights"] if entry["file"] == wanted)
    assert weights["sha256"] == entry["sha256"]
    assert len(judged(balpoe, "--run", "run")) == 320


def test_other_logits_of_a_trained_run_are_refused(balpoe: Call, trained: Path) -> None:
    np.savez("held.npz", **HELD, weights=np.array("b" * 64))
    words = ("plugin", "--run", str(trained), "--logits", "held.npz", "--quiet")
    assert "the logits are of the weights bbbbbbbbbbbb" in refused(balpoe(*words))
