"""What an evaluation finds, and what it writes."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from moectl.cli import _run
from moectl.diffusion import eval as evaluation
from moectl.diffusion import inference, solvers
from moectl.diffusion import reference as references
from moectl.diffusion.eval import compare
from moectl.diffusion.measures import measure
from moectl.diffusion.reference import reference_of

Call = Callable[..., tuple[int, str, str]]

FEW = ("--num", "60", "--steps", "4", "--quiet")
NAME = "checkpoint_epoch_2_classifier_dpmpp4_cfg1_seed0_n60"


@pytest.fixture(scope="module")
def evaluated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation; not to be written to."""
    root = tmp_path_factory.mktemp("evaluated")
    folder = shutil.copytree(finished_run, root / "diffusion" / "t")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setenv("MOECTL_RUNS", str(root))
        assert _run(["diffusion", "eval", *FEW, "--json"]) == 0
    (folder / "stdout.json").write_text(out.getvalue())
    return folder


@pytest.fixture
def own(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same run with the classifier, as a copy that may be changed."""
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    shutil.copytree(evaluated.parent, tmp_path / "runs" / "diffusion")
    return tmp_path / "runs" / "diffusion" / "t"


@pytest.fixture
def opened(own: Path) -> Any:
    """The network of that run."""
    from moectl.diffusion.inference import open_weights
    from moectl.diffusion.settings import DiffusionSettings
    from moectl.engine.launch import build_accelerator
    from moectl.engine.settings import resolve

    settings, _ = resolve(DiffusionSettings, {}, [], [own / "settings.toml"])
    accelerator = build_accelerator(settings.train, cpu=True)
    return open_weights(own / "checkpoint_epoch_2.pth", settings, accelerator)


def read(folder: Path, name: str = NAME) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "evals" / name / "eval.json").read_text())
    return document


# The document


def test_json_is_what_is_written(evaluated: Path) -> None:
    assert json.loads((evaluated / "stdout.json").read_text()) == read(evaluated)


def test_an_evaluation_says_what_was_measured_and_how(evaluated: Path) -> None:
    found = read(evaluated)
    sidecar = json.loads((evaluated / "checkpoint_epoch_2.pth.json").read_text())
    assert found["weights"] == {
        "file": "checkpoint_epoch_2.pth",
        "sha256": sidecar["sha256"],
        "epoch": 2,
        "ema": True,
    }
    assert (found["held_out"], found["steps"]) == (180, 1000)
    made = found["sampling"]
    expected = {"sampler": "dpmpp", "steps": 4, "eta": 0.0, "guidance": 1.0, "seed": 0, "num": 60}
    assert expected.items() <= made.items()
    assert made["network_calls"] == 4
    assert made["images_per_second"] == pytest.approx(60 / made["seconds"], rel=0.01)


def test_the_loss_is_that_of_four_rounds_over_the_held_out_images(
    evaluated: Path, opened: Any
) -> None:
    held = measure(
        opened.model,
        opened.diffusion,
        opened.data.test,
        opened.accelerator,
        batch_size=33,
        rounds=4,
    )
    found = read(evaluated)
    assert found["loss"] == pytest.approx(float(held.errors.mean()), rel=1e-5)
    assert len(found["loss_by_step"]) == 10
    low = held.errors[held.t < 100].mean()
    assert found["loss_by_step"][0] == pytest.approx(float(low), rel=1e-5)
    for name, groups, group in (("step", held.t // 100, 7), ("class", held.labels, 3)):
        shares = torch.tensor(found[f"usage_by_{name}"])
        assert shares.shape == (3, 3, 10)
        assert torch.allclose(shares.sum(1), torch.ones(3, 10), atol=1e-6)
        for block in range(3):
            chosen = held.chosen[groups == group, block].flatten()
            counts = torch.bincount(chosen, minlength=3) / len(chosen)
            assert torch.allclose(shares[block, :, group], counts, atol=1e-6)
    assert found["blocks"] == ["encoder 0", "decoder 0", "decoder 1"]
    assert found["dead_experts"] == 0


def test_three_pairs_are_compared_and_never_called_fid(evaluated: Path) -> None:
    found = read(evaluated)
    (kept,) = (evaluated.parent / "classifiers").glob("*.pth.json")
    assert found["distance"] == f"FD[classifier:{json.loads(kept.read_text())['sha256'][:8]}]"
    assert "FID" not in json.dumps(found)
    assert "FID" not in (evaluated / "evals" / NAME / "eval.md").read_text()
    pairs = [(row["set"], row["against"]) for row in found["distances"]]
    assert pairs == [
        ("samples", "held-out images"),
        ("training images", "held-out images"),
        ("samples", "training images"),
    ]
    counts = [(row["images"], row["against_images"]) for row in found["distances"]]
    assert counts == [(60, 180), (60, 180), (60, 1617)]
    bad, good, _ = found["distances"]
    assert good["frechet"] < bad["frechet"] / 5
    assert abs(good["kid"]) < 0.2 < bad["kid"]
    assert good["precision"] > 0.8 > bad["precision"]
    assert found["held_out_accuracy"] > 0.95


def test_too_few_images_are_said_to_be_too_few(evaluated: Path) -> None:
    warning = read(evaluated)["warning"]
    assert warning.startswith("60 images are too few for 128 features")
    assert warning in (evaluated / "evals" / NAME / "eval.md").read_text()


def test_files_are_pictures_and_the_report_names_the_evaluation(evaluated: Path) -> None:
    folder = evaluated / "evals" / NAME
    names = {path.name for path in folder.iterdir()}
    pictures = {"grid.png", "loss_by_step.png", "expert_usage.png"}
    assert names == {"eval.json", "eval.md", *pictures}
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert picture.width > 100
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > grid.height, "ten columns, a class each, in six rows"
    report = (evaluated / "report.md").read_text()
    assert f"## `{NAME}`" in report
    assert f"(evals/{NAME}/grid.png)" in report


# Other evaluations


def test_the_same_command_gives_the_same_numbers(own: Path, diffusion: Call) -> None:
    before = read(own)
    shutil.rmtree(own / "evals")
    code, out, err = diffusion("eval", *FEW)
    assert (code, err.count("too few")) == (0, 1)
    assert out == (own / "evals" / NAME / "eval.md").read_text()
    after = read(own)
    for document in (before, after):
        for name in ("seconds", "images_per_second"):
            del document["sampling"][name]
        del document["run"]
    assert after == before


def test_without_features_nothing_is_sampled(own: Path, diffusion: Call) -> None:
    code, out, _ = diffusion("eval", "--features", "none", "--quiet", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["loss"] == read(own)["loss"]
    assert not {"sampling", "distances", "distance", "sample_accuracy", "warning"} & set(found)
    folder = own / "evals" / "checkpoint_epoch_2_none"
    assert {path.name for path in folder.iterdir()} == {
        *("eval.json", "eval.md", "loss_by_step.png", "expert_usage.png")
    }


def test_raw_weights_have_a_folder_of_their_own(own: Path, diffusion: Call) -> None:
    words = ("--features", "none", "--no-ema", "--quiet", "--json")
    code, out, _ = diffusion("eval", *words)
    assert code == 0
    found = json.loads(out)
    assert found["weights"]["ema"] is False
    assert found["loss"] != read(own)["loss"]
    assert (own / "evals" / "checkpoint_epoch_2_raw_none").is_dir()
    assert "weights of the last update" in (own / "report.md").read_text()


def test_other_ways_to_sample_have_folders_of_their_own(
    own: Path, diffusion: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: ({}, torch.zeros(1)))
    monkeypatch.setattr(evaluation, "reference_of", lambda *_: None)
    monkeypatch.setattr(evaluation, "evaluation_text", lambda _: "")
    made: list[str] = []
    monkeypatch.setattr(evaluation, "write_evaluation", lambda path, *_: made.append(path.name))
    for words in ("", "--eta 0.5", "--cfg-scale 2", "--sample-seed 7", "--num 20", "--steps 5"):
        assert diffusion("eval", "--sampler", "ddim", *words.split())[0] == 0
    assert made == [
        "checkpoint_epoch_2_classifier_ddim50_cfg1_seed0_n10000",
        "checkpoint_epoch_2_classifier_ddim50_eta0.5_cfg1_seed0_n10000",
        "checkpoint_epoch_2_classifier_ddim50_cfg2_seed0_n10000",
        "checkpoint_epoch_2_classifier_ddim50_cfg1_seed7_n10000",
        "checkpoint_epoch_2_classifier_ddim50_cfg1_seed0_n20",
        "checkpoint_epoch_2_classifier_ddim5_cfg1_seed0_n10000",
    ]


def test_a_network_without_experts_has_no_usage(opened: Any, tmp_path: Path) -> None:
    from moectl.diffusion.model import build

    plain = build(opened.facts["arguments"] | {"moe": False}).eval()
    document, images = evaluation.evaluate(
        SimpleNamespace(  # type: ignore[arg-type]
            model=plain,
            diffusion=opened.diffusion,
            data=opened.data,
            accelerator=opened.accelerator,
            settings=opened.settings,
            class_names=opened.class_names,
            folder=opened.folder,
            weights=opened.weights,
        ),
        None,
    )
    assert images is None
    assert not [name for name in document if "usage" in name or "expert" in name]
    evaluation.write_evaluation(tmp_path / "e", document, images)
    assert not (tmp_path / "e" / "expert_usage.png").exists()
    assert "experts" not in (tmp_path / "e" / "eval.md").read_text()


def test_inception_alone_gives_fid(
    own: Path, diffusion: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.dtype == torch.uint8
            return images.float().mean(1).flatten(1)[:, ::7] / 255

    seeds: list[int] = []

    def generate(*given: Any) -> Tensor:
        seeds.extend(given[4])
        return solvers.generate(*given)

    monkeypatch.setattr(inference, "generate", generate)
    monkeypatch.setattr(references, "inception", lambda _: Stub())
    words = ("--features", "inception", "--num", "20", "--steps", "2", "--cfg-scale", "2")
    code, out, _ = diffusion("eval", *words, "--sample-seed", "7", "--quiet", "--json")
    assert code == 0
    found = json.loads(out)
    assert seeds == list(range(7, 27))
    assert found["distance"] == "FID"
    assert "sample_accuracy" not in found
    assert found["warning"].startswith("20 images, fewer than 10000")
    assert found["sampling"]["network_calls"] == 4
    (folder,) = (own / "evals").glob("*inception_dpmpp2_cfg2_seed7_n20")
    text = (folder / "eval.md").read_text()
    assert "| FID |" in text
    assert "guidance scale 2" in text
    assert "classifier" not in text


# Comparisons


def real(opened: Any, count: int) -> tuple[Tensor, Tensor]:
    """Training images and their classes."""
    ((images, labels),) = opened.data.train.ordered(10_000, torch.device("cpu"))
    return images[:count], labels[:count]


def test_real_images_are_read_as_the_classes_that_were_asked_for(own: Path, opened: Any) -> None:
    known = reference_of(opened.settings.eval, opened.data, opened.accelerator, 64)
    images, labels = real(opened, 95)
    right = compare(known, images, labels, 64, torch.device("cpu"))
    assert right["sample_accuracy"] > 0.95
    assert len(right["sample_accuracy_by_class"]) == 10
    assert min(right["sample_accuracy_by_class"]) > 0.7
    assert right["distances"][2]["precision"] == 1
    assert right["held_out_accuracy"] == known.held_out_accuracy
    wrong = compare(known, images, (labels + 1) % 10, 64, torch.device("cpu"))
    assert wrong["sample_accuracy"] < 0.05


def test_a_class_that_no_sample_shows_has_no_accuracy(own: Path, opened: Any) -> None:
    known = reference_of(opened.settings.eval, opened.data, opened.accelerator, 64)
    images, labels = real(opened, 60)
    rows = labels != 3
    found = compare(known, images[rows], labels[rows], 64, torch.device("cpu"))
    assert found["sample_accuracy_by_class"][3] is None


def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, own: Path, diffusion: Call
) -> None:
    monkeypatch.setattr(references, "NEIGHBOURS", 180)
    monkeypatch.setattr(evaluation, "measure", None)
    code, out, err = diffusion("eval", "--quiet")
    assert (code, out) == (2, "")
    assert "180 held-out images are too few to compare samples with, 181 at least" in err
