"""Two processes train csr as one does."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TRAIN = """
import json, sys
from pathlib import Path
import torch
from moectl.csr import losses, train as module
from moectl.csr.settings import CsrSettings
from moectl.csr.stages import STAGES, Training
from moectl.engine.launch import build_accelerator, gather_objects, leave
from moectl.engine.run import create
from moectl.engine.settings import resolve
from moectl.engine.sources import Stream

root, batch = Path(sys.argv[1]), int(sys.argv[2])
given = {
    "data.dataset": "synthetic", "data.image_size": 64, "data.synthetic_images": 62,
    "data.val_fraction": 0.13,
    "data.workers": 0, "data.normalize": "dataset", "model.backbone_type": "tiny",
    "model.pretrained": False, "model.projection": 8, "train.precision": "no",
    "train.tensorboard": False, "train.batch_size": batch, "optim.name": "sgd", "optim.lr": 0.05,
    "concept.backbone_lr": 1.0, "train.epochs_stage1": 1, "train.epochs_stage2": 1,
    "train.epochs_stage3": 2, "eval.batch_size": 5,
}
own = Training.__init__
seen = {}

def begun(training, settings, run):
    own(training, settings, run)
    train = training.data.train
    # None of the images that the second of two processes sees has any concept.
    for chunk in Stream(len(train.concepts), 16, settings.train.seed, 1, 2, smallest=2).epoch(0):
        train.concepts[chunk.rows] = 0
    truth = train.concepts
    seen.update(weights=losses.pos_weights(truth.sum(0), len(truth)).tolist())
    seen.update(train=train.image_ids, val=training.data.val.image_ids)
    for part in training.model.modules():  # statistics of a process's own batch would differ
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval().train = lambda mode=True, part=part: part

Training.__init__ = begun
for mode in ("images", "features"):
    settings = resolve(CsrSettings, {**given, "data.augment_heads": mode == "images"}, [], [])[0]
    accelerator = build_accelerator(settings.train, cpu=True)
    named = {"room": "csr", "command": "train", "name": "t", "out": root / mode, "origin": {}}
    with create(settings, accelerator, **named) as run:
        module.train(settings, run, STAGES)
    everyone = gather_objects(accelerator, seen)
    if accelerator.is_main_process:
        (root / mode / "seen.json").write_text(json.dumps(everyone))
leave()
"""
SIZES = {"one": ("16", 1), "two": ("8", 2)}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., subprocess.Popen[str]],
    finish: Callable[..., tuple[int, str, str]],
) -> Path:
    """Train with one process, and with two, of which one never sees a concept in stage 2."""
    root = tmp_path_factory.mktemp("processes")
    (root / "train.py").write_text(TRAIN)
    for name, (batch, processes) in SIZES.items():
        words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
        launcher = words if processes > 1 else ()
        program = (sys.executable, *launcher, f"{root}/train.py", f"{root}/{name}", batch)
        code, _, err = finish(start(program=program), 120)
        assert code == 0, err
    return root


@pytest.fixture(params=["images", "features"])
def both(request: pytest.FixtureRequest, trained: Path) -> dict[str, Path]:
    """The runs with images that move in every stage, or with features that are kept."""
    return {name: trained / name / request.param for name in SIZES}


def test_every_process_weighs_and_divides_alike(both: dict[str, Path]) -> None:
    first, second = json.loads((both["two"] / "seen.json").read_text())
    (alone,) = json.loads((both["one"] / "seen.json").read_text())
    assert first == second == alone
    assert len(set(first["weights"])) > 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("best_model_stage1.pth", ("backbone.features.0.weight", "concept_head.weight")),
        ("model_stage2_epoch1.pth", ("projector.0.weight", "prototypes")),
        ("final_model.pth", ("task_head.weight", "task_mean")),
    ],
)
def test_the_weights_are_those_of_one_process(
    both: dict[str, Path], name: str, parts: tuple[str, ...]
) -> None:
    one, two = (torch.load(both[size] / name, weights_only=True) for size in SIZES)
    for part in parts:
        assert torch.allclose(one[part], two[part], atol=1e-4), part
    if "stage2" in name:
        before = torch.load(both["two"] / "best_model_stage1.pth", weights_only=True)
        assert (two["prototypes"] - before["prototypes"]).abs().max() > 0.1


def test_metrics_are_those_of_one_process(both: dict[str, Path]) -> None:
    def rows(folder: Path, stage: str) -> list[dict[str, str]]:
        with (folder / f"metrics_{stage}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    for stage in ("concept", "prototype", "task"):
        for one, two in zip(*(rows(both[name], stage) for name in SIZES), strict=True):
            for name in one.keys() - {"elapsed_seconds"}:
                assert float(one[name]) == pytest.approx(float(two[name]), abs=1e-4), name
