"""Features on disk are those of the backbone, and are computed once."""

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.csr import cache
from moectl.csr.backbones import build_backbone
from moectl.csr.cache import cache_key, features_of
from moectl.csr.data import Part, load
from moectl.csr.model import Backbone
from moectl.csr.settings import DataSection
from moectl.engine.errors import Interrupted, RunFailed
from moectl.engine.sources import Stream

SECTION = DataSection(dataset="synthetic", image_size=32, synthetic_images=40, workers=0)


@pytest.fixture(scope="module")
def part() -> Part:
    return load(SECTION, 0, (4, 4)).train  # 36 images


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("tiny", "", pretrained=False, image_size=32).eval()


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def calls(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images of each call of the backbone."""
    seen: list[int] = []
    own = backbone.forward

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return own(images)

    monkeypatch.setattr(backbone, "forward", counted)
    return seen


def compute(root: Path, part: Part, backbone: Backbone, accelerator: Any, **more: Any) -> Any:
    return features_of(root, part, backbone, ["plain"], accelerator, 8, **more)


def test_features_are_those_of_the_backbone(tmp_path, part, backbone, accelerator):
    source = compute(tmp_path, part, backbone, accelerator)
    wanted = [
        backbone(images) for (images, _), _ in part.still.ordered(8, torch.device("cpu"), 0, 1)
    ]
    assert np.array_equal(source.features, torch.cat(wanted).detach().numpy())
    stream = Stream(len(source), 10, seed=3)
    first = next(iter(stream.epoch(0)))
    (found,), rows = next(source.batches(iter([first]), 0, torch.device("cpu")))
    assert torch.equal(rows, first.rows)
    assert np.array_equal(found.numpy(), source.features[first.rows.numpy()])
    dealt = [rows.tolist() for _, rows in source.ordered(5, torch.device("cpu"), 1, 3)]
    assert [row for rows in dealt for row in rows] == list(range(1, 36, 3))


def test_nothing_is_computed_twice(tmp_path, part, backbone, accelerator, calls):
    compute(tmp_path, part, backbone, accelerator)
    assert sum(calls) == 36 + 1  # one to learn the shape
    calls.clear()
    compute(tmp_path, part, backbone, accelerator)
    assert not calls


def test_an_interrupted_build_goes_on(tmp_path, part, backbone, accelerator, calls, monkeypatch):
    whole = compute(tmp_path / "whole", part, backbone, accelerator).features
    monkeypatch.setattr(cache, "_SYNC_EVERY", 1)
    own, images = backbone.forward, []

    def killed(batch: Tensor) -> Tensor:
        images.append(len(batch))
        if sum(images) > 1 + 16:  # in its third batch
            raise KeyboardInterrupt
        return own(batch)

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            compute(tmp_path / "killed", part, backbone, accelerator)
    calls.clear()
    found = compute(tmp_path / "killed", part, backbone, accelerator).features
    assert calls == [8, 8, 4]
    assert np.array_equal(found, whole)


def test_a_request_to_stop_ends_a_build(tmp_path, part, backbone, accelerator, monkeypatch):
    monkeypatch.setattr(cache, "_SYNC_EVERY", 2)
    asked = SimpleNamespace(reason="SIGTERM")
    with pytest.raises(Interrupted, match="SIGTERM while features"):
        compute(tmp_path, part, backbone, accelerator, stop=asked)
    (done,) = tmp_path.glob("*/done.npy")
    assert np.load(done).sum() == 16


def test_the_key_follows_weights_transform_and_images(part, backbone):
    torch.manual_seed(1)
    other = build_backbone("tiny", "", pretrained=False, image_size=32)
    changed = replace(part, identities=[*part.identities[:-1], "another"])
    keys = [
        cache_key(part, backbone, [32]),
        cache_key(part, backbone, [64]),
        cache_key(part, other, [32]),
        cache_key(changed, backbone, [32]),
    ]
    assert len(set(keys)) == 4
    assert keys[0] == cache_key(part, backbone, [32])


def test_an_image_file_is_known_by_its_time_and_size(tmp_path):
    from PIL import Image

    tables = {}
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (8, 8), 40 * number).save(tmp_path / name / f"{number}.png")
        rows = [f"{number},{number % 2},{number // 2},1" for number in range(4)]
        tables[f"{name}_csv"] = tmp_path / f"{name}.csv"
        tables[f"{name}_csv"].write_text("\n".join(["image_id,Edema,Nodule,COPD", *rows]) + "\n")
        tables[f"{name}_dir"] = tmp_path / name
    section = DataSection(**tables, val_fraction=0.5, workers=0)
    before = load(section, 0, (4, 4)).test.identities
    Image.new("L", (9, 9), 7).save(tmp_path / "test" / "2.png")
    after = load(section, 0, (4, 4)).test.identities
    assert [one == other for one, other in zip(before, after, strict=True)] == [
        True, True, False, True,
    ]  # fmt: skip


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path, part, backbone, accelerator, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunFailed, match=r"take 0\.0 GB, 0\.0 GB are free; --feature-cache"):
        compute(tmp_path, part, backbone, accelerator)


def test_a_full_disk_ends_the_build_with_a_sentence(
    tmp_path, part, backbone, accelerator, monkeypatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", full)
        with pytest.raises(RunFailed, match=r"cannot be written \(No space left"):
            compute(tmp_path, part, backbone, accelerator)
    (done,) = tmp_path.glob("*/done.npy")
    assert not np.load(done).any()


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_training_from_features_is_training_from_images(
    new_run: Callable[..., Any], pool: str
) -> None:
    from moectl.csr.stages import STAGES
    from moectl.csr.train import train

    found = {}
    changes = {"data__augment_heads": False, "model__concept_pool": pool}
    for kept in ("auto", "off"):
        with new_run(train__feature_cache=kept, **changes) as run:
            train(run.settings, run, STAGES)
        assert not (run.folder / "cache").exists()
        found[kept] = torch.load(run.folder / "final_model.pth", weights_only=True)
    for name, value in found["auto"].items():
        assert torch.allclose(value.float(), found["off"][name].float(), atol=1e-5), name


def test_features_in_a_folder_are_shared(
    new_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moectl.csr import stages
    from moectl.csr.train import train

    with new_run() as first:
        train(first.settings, first, ["concept"])
    changes = {"data__augment_heads": False, "train__feature_cache": str(tmp_path / "shared")}
    sources = []
    own = features_of

    def watched(*words: Any) -> Any:
        sources.append(len(list((tmp_path / "shared").glob("*"))))
        return own(*words)

    monkeypatch.setattr(stages, "features_of", watched)
    for _ in range(2):
        with new_run(**changes) as run:
            train(run.settings, run, ["prototype"], str(first.folder))
    assert sources == [0, 1, 2, 2]
