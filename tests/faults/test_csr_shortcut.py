"""A mark that comes with one concept: the atlas finds it, curation mends it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.csr.atlas import read_atlas
from moectl.csr.inference import open_network
from moectl.csr.localisation import pointing
from moectl.csr.settings import CsrSettings
from moectl.engine.command import Request
from moectl.engine.settings import from_toml

# Boxes do not help in training, and the mark stays in its corner.
WORDS = (
    *("--dataset", "synthetic", "--backbone-type", "tiny", "--no-pretrained"),
    *("--image-size", "64", "--set", "data.synthetic_images=600", "--val-fraction", "0.25"),
    *("--hflip", "0", "--set", "data.degrees=5", "--set", "data.jitter=0"),
    *("--set", "model.projection=16", "--proto-init", "kmeans", "--beta", "0"),
    *("--batch-size", "16", "--lr", "1e-3", "--lr-mult-stage1", "1"),
    *("--lr-mult-stage2", "0.1", "--lr-mult-stage3", "10"),
    *("--epochs-stage1", "8", "--epochs-stage2", "2", "--epochs-stage3", "1"),
    *("--normalize", "dataset", "--workers", "0", "--set", "train.precision=no"),
    *("--set", "train.tensorboard=false", "--cpu", "--quiet"),
)


def ring(root: Path, shortcut: str) -> Any:
    """Train, make the atlas, and return what it says about the prototypes of rings."""
    from moectl.cli import _run

    folder = root / (shortcut or "plain")
    words = ("--set", f"data.shortcut={shortcut}", "--out", str(folder))
    assert _run(["csr", "train", *WORDS, *words]) == 0
    assert _run(["csr", "atlas", "--run", str(folder), "--cpu", "--quiet"]) == 0
    atlas = read_atlas(folder)
    assert atlas is not None
    own = [one for one in atlas["prototypes"] if one["concept"] == "ring"]
    return SimpleNamespace(folder=folder, own=own)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nearly all images of rings have the mark, and few others."""
    return ring(tmp_path_factory.mktemp("marked"), "ring")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same without the mark."""
    return ring(tmp_path_factory.mktemp("clean"), "")


def outside(found: Any) -> float:
    """Out-of-box rate of the prototype that an image with a ring is nearest to, on average."""
    hits = sum(one["hits"] for one in found.own)
    return float(sum(one["hits"] * one["out_of_box"] for one in found.own) / hits)


def test_prototypes_look_outside_of_the_boxes_where_there_is_a_shortcut(
    marked: Any, clean: Any
) -> None:
    assert outside(marked) > 0.7
    # How far apart they are depends on the rounding of the processor.
    assert outside(clean) < outside(marked) - 0.1
    main = max(marked.own, key=lambda one: one["hits"])
    assert main["suspect"], "the one that most images are nearest to"


def test_exemplars_of_suspects_point_into_the_corner_of_the_mark(marked: Any) -> None:
    main = max(marked.own, key=lambda one: one["hits"])
    boxes = torch.tensor([one["box"] for one in main["exemplars"]])
    near = (boxes[:, 0] < 0.25) & (boxes[:, 3] > 0.75)
    assert near.float().mean() > 0.5


def test_without_suspects_the_maps_point_at_rings(marked: Any) -> None:
    settings = from_toml(CsrSettings, marked.folder / "settings.toml")
    words: Any = {"room": "csr", "command": "atlas", "origin": {}, "name": "a", "out": None}
    request = Request(
        **words,
        settings=settings,
        cpu=True,
        resume="",
        folder=marked.folder,
        run=str(marked.folder),
    )
    opened = open_network(request)
    part, place = opened.data.val, opened.concepts.index("ring")
    boxes = [[(0, *box[1:]) for box in own if box[0] == place] for own in part.boxes]
    maps = opened.outputs(part, ("similarity_maps",)).similarity_maps[:, place]

    def hits(kept: torch.Tensor) -> float:
        opened.model.kept[place] = kept
        highest = maps.masked_fill(~opened.model.kept[place, :, None, None], -1)
        return float(pointing(highest.amax(1, keepdim=True), boxes).nanmean())

    suspects = torch.tensor([one["suspect"] for one in marked.own])
    assert 0 < suspects.sum() < len(suspects)
    assert hits(~suspects) > hits(torch.ones_like(suspects)) + 0.05
