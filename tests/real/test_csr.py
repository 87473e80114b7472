"""Real images through csr: radiographs with 14 findings, and blood cells with 22 concepts.

They are in no folder of a source file, for they go through all of them.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moectl.cli import _run
from moectl.csr.backbones import build_backbone
from moectl.csr.data import load
from moectl.csr.model import CSRNet
from moectl.csr.settings import CsrSettings
from moectl.engine.settings import resolve
from moectl.engine.sources import Chunk


class Case(NamedTuple):
    """A data set and what is known about it."""

    name: str
    test: str
    """What its second part is called."""
    sizes: tuple[int, int]
    """Training images with those that validate, and test images."""
    concepts: int
    targets: list[str]
    settings: dict[str, Any]


CHEST = Case(
    "chest",
    "test",
    (697, 303),
    14,
    ["No finding", "Abnormal"],
    {"data.image_size": 64, "data.patient_pattern": r"\d{8}"},
)
WBC = Case(
    "wbc",
    "val",
    (1800, 300),
    22,
    ["Basophil", "Eosinophil", "Lymphocyte", "Monocyte", "Neutrophil"],
    {
        "data.image_size": 128,
        "data.channels": "rgb",
        "data.task_mode": "multiclass",
        "task.loss": "ce",
    },
)
CASES = pytest.mark.parametrize("case", [CHEST, WBC], ids=lambda case: case.name)


@pytest.fixture(scope="session")
def real(root: Path) -> Callable[[str], Path]:
    """Find a real data set, or skip."""
    place = Path(os.environ.get("MOECTL_TEST_DATA") or root.parent / "shared" / "data")

    def folder(name: str) -> Path:
        found = place / name
        if not (found / "labels_train.csv").is_file():
            pytest.skip(f"{found} is missing; MOECTL_TEST_DATA names the folder of data sets")
        return found

    return folder


def files(folder: Path, case: Case) -> dict[str, str]:
    return {
        "data.train_csv": str(folder / "labels_train.csv"),
        "data.test_csv": str(folder / f"labels_{case.test}.csv"),
        "data.train_dir": str(folder / "images" / "train"),
        "data.test_dir": str(folder / "images" / case.test),
    }


@CASES
def test_tables_and_images_become_a_batch_that_a_network_takes(
    case: Case, real: Callable[[str], Path]
) -> None:
    values = {**files(real(case.name), case), **case.settings, "data.workers": 0}
    section = resolve(CsrSettings, values, [], [])[0].data
    side = section.image_size
    backbone = build_backbone("tiny", image_size=side)
    grid = backbone.grid(side)
    data = load(section, 42, grid)
    train, val, test = (len(part.image_ids) for part in (data.train, data.val, data.test))
    assert (train + val, test) == case.sizes
    assert 0.08 <= val / (train + val) <= 0.1
    assert (len(data.concepts), data.targets) == (case.concepts, case.targets)
    assert not data.has_boxes
    rows = torch.arange(0, train, train // 8)[:8]
    chunk = Chunk(0, 0, rows, torch.arange(8), 8, True)
    batches = data.train.source.batches(iter([chunk]), 0, torch.device("cpu"))
    (images, masks), found = next(iter(batches))
    assert torch.equal(found, rows)
    assert images.shape == (8, 3, side, side)
    assert masks.shape == (8, case.concepts, *grid)
    assert images.flatten(1).std(1).min() > 0.1, "every image shows something"
    pixels = data.train.pixels(0)
    grey = bool((pixels[0] == pixels[1]).all())
    assert grey == (case.name == "chest")
    torch.manual_seed(0)
    net = CSRNet(
        backbone,
        concepts=case.concepts,
        prototypes=2,
        classes=len(case.targets),
        projection=8,
    ).eval()
    with torch.no_grad():
        output = net(images, needs=("concept_logits", "similarity_scores", "logits"))
    assert output.logits.shape == (8, len(case.targets))
    assert output.concept_logits.isfinite().all()
    assert output.similarity_scores.abs().max() <= 1 + 1e-5
    assert output.logits.std(0).min() > 0, "images differ"


@CASES
def test_patients_of_radiographs_are_not_divided_and_cells_are_of_one_class(
    case: Case, real: Callable[[str], Path]
) -> None:
    values = {**files(real(case.name), case), **case.settings}
    data = load(resolve(CsrSettings, values, [], [])[0].data, 42, (8, 8))
    if case is CHEST:
        patients = [{name[:8] for name in part.image_ids} for part in (data.train, data.val)]
        assert not patients[0] & patients[1]
        assert torch.equal(data.train.targets.sum(1), torch.ones(len(data.train.targets)))
    else:
        counts = torch.cat([data.train.targets, data.val.targets]).bincount()
        assert counts.tolist() == [360] * 5


@CASES
def test_a_few_real_images_train_through_the_command(
    case: Case,
    real: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two steps of every stage: 20 images, of which 4 validate, in batches of 8."""
    folder = real(case.name)
    words = []
    for key, value in {**files(folder, case), **case.settings}.items():
        if key.endswith("_csv"):
            header, *lines = Path(value).read_text(encoding="utf-8").splitlines()
            few = [header, *lines[:: len(lines) // 20][:20]]
            value = str(tmp_path / Path(value).name)
            Path(value).write_text("\n".join(few) + "\n", encoding="utf-8")
        words += ["--set", f"{key}={value}"]
    columns = (folder / "columns.json").read_text(encoding="utf-8")
    (tmp_path / "columns.json").write_text(columns, encoding="utf-8")
    words += ["--backbone-type", "tiny", "--no-pretrained", "--val-fraction", "0.2"]
    words += ["--batch-size", "8", "--workers", "0", "--cpu", "--quiet", "--json"]
    words += [f"--epochs-stage{stage}=1" for stage in (1, 2, 3)]
    for key, value in {"projection": 8, "num_prototypes": 2}.items():
        words += ["--set", f"model.{key}={value}"]
    words += ["--set", "train.tensorboard=false", "--set", "train.precision=no", "--out", "run"]
    assert _run(["csr", "train", *words]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished"
    sidecar = json.loads(Path("run/best_model_stage3.pth.json").read_text(encoding="utf-8"))
    assert (len(sidecar["concepts"]), sidecar["targets"]) == (case.concepts, case.targets)
    code = _run(["csr", "eval", "--run", "run", "--bootstrap", "0", "--cpu", "--quiet", "--json"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20
