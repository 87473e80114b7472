"""From tables and images to what a training iterates over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moectl.csr.data import Data, Part, load
from moectl.csr.settings import CsrSettings
from moectl.csr.synthetic import GLYPHS, glyphs
from moectl.csr.transforms import STATISTICS
from moectl.engine.errors import UserError
from moectl.engine.settings import resolve
from moectl.engine.sources import Chunk

GRID = (8, 8)
SIZE = (40, 80)  # height and width of the images of the mini folder
FINDINGS = ("Nodule/Mass", "Cardiomegaly", "ILD")
DIAGNOSES = ("Pneumonia", "No finding")


def section(**changes: Any) -> Any:
    named = {f"data.{name}": value for name, value in changes.items()}
    return resolve(CsrSettings, {"data.workers": 0, "data.image_size": 32, **named}, [], [])[0].data


def batch(part: Part, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return images and masks of some rows, as they are in a training."""
    chunk = Chunk(0, 0, torch.tensor(rows), torch.arange(len(rows)), len(rows), True)
    ((images, masks), found) = next(
        iter(part.source.batches(iter([chunk]), 0, torch.device("cpu")))
    )
    assert found.tolist() == rows
    return images, masks


def drawn(seed: int = 7, **changes: Any) -> Data:
    wanted = section(dataset="synthetic", synthetic_images=90, image_size=64, **changes)
    return load(wanted, seed, GRID)


# Glyphs


def test_the_parts_share_no_image() -> None:
    data = drawn()
    train, val = set(data.train.image_ids), set(data.val.image_ids)
    assert (len(train), len(val), len(data.test.image_ids)) == (81, 9, 30)
    assert train | val == set(glyphs(90, 7).labels.image_ids)
    assert not train & val


def test_the_seed_alone_decides_the_division() -> None:
    wanted = section(dataset="synthetic", synthetic_images=90)
    ids = [load(wanted, seed, GRID).val.image_ids for seed in (7, 7, 8)]
    assert ids[0] == ids[1] != ids[2]


def test_labels_follow_their_images() -> None:
    data, whole = drawn(), glyphs(90, 7).labels
    for part in (data.train, data.val):
        rows = [whole.image_ids.index(name) for name in part.image_ids]
        assert part.concepts.numpy() == pytest.approx(whole.concept_values[rows])
        assert part.targets.numpy() == pytest.approx(whole.target_values[rows])
        assert part.concepts.dtype == part.targets.dtype == torch.float32


def test_masks_lie_where_the_boxes_are() -> None:
    part = drawn(hflip=0.0, degrees=0.0).train
    images, masks = batch(part, list(range(12)))
    assert images.shape == (12, 3, 64, 64)
    assert masks.shape == (12, len(GLYPHS), *GRID)
    assert masks.dtype == torch.bool
    wanted = torch.zeros_like(masks)
    for image, boxes in enumerate(part.boxes[:12]):
        for concept, *corners in boxes:
            left, top, right, bottom = (corner * 8 for corner in corners)
            columns = slice(int(left), int(np.ceil(right)))
            wanted[image, concept, int(top) : int(np.ceil(bottom)), columns] = True
    assert wanted.any()
    assert torch.equal(masks, wanted)
    assert torch.equal(masks.flatten(2).any(2), part.concepts[:12] == 1)


def test_masks_are_mirrored_with_their_images() -> None:
    still, mirrored = (
        batch(drawn(hflip=share, degrees=0.0, jitter=0.0).train, [0, 1, 2, 3])
        for share in (0.0, 1.0)
    )
    assert torch.equal(mirrored[0], still[0].flip(3))
    assert torch.equal(mirrored[1], still[1].flip(3))
    assert not torch.equal(still[1], still[1].flip(3))


def test_only_training_images_move() -> None:
    data = drawn(hflip=1.0)
    plain = drawn(hflip=0.0, degrees=0.0, jitter=0.0)
    rows = [0, 1, 2]
    assert not torch.equal(batch(data.train, rows)[0], batch(plain.train, rows)[0])
    for name in ("val", "test"):
        moved, still = (batch(getattr(one, name), rows) for one in (data, plain))
        assert torch.equal(moved[0], still[0])
        assert torch.equal(moved[1], still[1])


def test_rare_columns_are_left_out_of_every_part_and_boxes_are_renumbered() -> None:
    whole = drawn(4)
    counts = whole.train.concepts.sum(0)
    bound = int(counts.min()) + 1
    data = drawn(4, min_positives=bound)
    kept = [name for name, count in zip(GLYPHS, counts.tolist(), strict=True) if count >= bound]
    rows = [GLYPHS.index(name) for name in kept]
    assert data.concepts == kept
    assert 2 <= len(kept) < len(GLYPHS)
    assert rows != list(range(len(rows))), "some box has another number than before"
    assert set(GLYPHS) - set(kept) <= set(data.notes["dropped"])
    targets = [whole.targets.index(name) for name in data.targets]
    for name in ("train", "val", "test"):
        part, before = getattr(data, name), getattr(whole, name)
        assert part.image_ids == before.image_ids
        assert torch.equal(part.concepts, before.concepts[:, rows])
        assert torch.equal(part.targets, before.targets[:, targets])
        wanted = [
            [(rows.index(box[0]), *box[1:]) for box in boxes if box[0] in rows]
            for boxes in before.boxes
        ]
        assert part.boxes == wanted
        masks = batch(part, [0, 1, 2])[1]
        assert masks.shape == (3, len(kept), *GRID)
        assert torch.equal(masks.flatten(2).any(2), part.concepts[:3] == 1)


def test_statistics_of_the_data_set_are_those_of_its_training_images() -> None:
    data, whole = drawn(normalize="dataset"), glyphs(90, 7)
    rows = [whole.labels.image_ids.index(name) for name in data.train.image_ids]
    pixels = whole.images[rows].astype(np.float64)
    mean, std = data.statistics
    assert mean == pytest.approx([pixels.mean()] * 3)
    assert std == pytest.approx([pixels.std()] * 3)
    assert pixels.mean() != pytest.approx(whole.images.mean(), abs=1e-7)
    images, _ = batch(data.val, list(range(9)))
    assert images.mean().item() == pytest.approx(0, abs=0.05)
    assert images.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["imagenet", "medmae"])
def test_statistics_have_names(name: str) -> None:
    assert drawn(normalize=name).statistics == STATISTICS[name]  # type: ignore[index]


# Tables


def picture(number: int) -> np.ndarray[Any, Any]:
    """Grey, with one bright rectangle: columns 20 to 39, rows 10 to 19 of 80 by 40."""
    values = np.full(SIZE, 10 * number, np.uint8)
    values[10:20, 20:40] = 255
    return values


@pytest.fixture
def vindr(tmp_path: Path) -> Path:
    """Ten training and four test images of two readers each; odd ones have a nodule in a box."""
    from PIL import Image

    for part, count in (("train", 10), ("test", 4)):
        (tmp_path / part).mkdir()
        lines = [",".join(("image_id", "rad_id", *FINDINGS, *DIAGNOSES))]
        boxes = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
        for number in range(count):
            name, odd = f"{part}{number}", number % 2
            Image.fromarray(picture(number)).save(tmp_path / part / f"{name}.png")
            lines.append(f"{name},R1,{odd},{number % 3 == 0:d},0,{odd},{1 - odd}")
            lines.append(f"{name},R2,0,0,0,0,{1 - odd}")
            boxes.append(
                f"{name},R1,Nodule/Mass,20,10,40,20" if odd else f"{name},R1,No finding,,,,"
            )
        (tmp_path / f"labels_{part}.csv").write_text("\n".join(lines) + "\n")
        (tmp_path / f"boxes_{part}.csv").write_text("\n".join(boxes) + "\n")
    return tmp_path


@pytest.fixture
def tables(vindr: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        files = {
            f"{part}_{name}": vindr / place
            for part in ("train", "test")
            for name, place in (
                ("csv", f"labels_{part}.csv"),
                ("dir", part),
                ("bbox_csv", f"boxes_{part}.csv"),
            )
        }
        return section(**{**files, "hflip": 0.0, "degrees": 0.0, "jitter": 0.0, **changes})

    return make


def test_tables_images_and_boxes_are_read(tables: Callable[..., Any]) -> None:
    data = load(tables(), 3, GRID)
    assert (data.concepts, data.targets) == (list(FINDINGS), list(DIAGNOSES))
    assert data.has_boxes
    assert {len(data.train.image_ids), len(data.val.image_ids)} == {9, 1}
    assert data.test.image_ids == ["test0", "test1", "test2", "test3"]
    assert data.test.concepts.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert data.test.targets.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert data.test.boxes == [[], [(0, 0.25, 0.25, 0.5, 0.5)], [], [(0, 0.25, 0.25, 0.5, 0.5)]]
    mean, std = (torch.tensor(values)[:, None, None] for values in data.statistics)
    images, masks = batch(data.test, [1, 2])
    pixels = images * std + mean
    assert pixels[0, :, 10:14, 10:14].flatten() == pytest.approx(1, abs=1e-5)
    assert pixels[1, :, 20:, 20:].flatten() == pytest.approx(20 / 255, abs=1e-5)
    nodule = torch.zeros(GRID, dtype=torch.bool)
    nodule[2:4, 2:4] = True
    assert torch.equal(masks[0, 0], nodule)
    assert not masks[0, 1:].any()
    assert not masks[1].any()


def test_images_of_a_patient_stay_together(tables: Callable[..., Any], vindr: Path) -> None:
    path = vindr / "labels_train.csv"
    first, *lines = path.read_text().splitlines()
    owned = [f"{line},{'abcde'[int(line[5]) // 2]}" for line in lines]
    path.write_text("\n".join([f"{first},patient_id", *owned]) + "\n")
    for seed in range(5):
        data = load(tables(val_fraction=0.4), seed, GRID)
        train, val = (
            {int(name[5:]) // 2 for name in part.image_ids} for part in (data.train, data.val)
        )
        assert val
        assert not train & val


def test_a_rare_finding_takes_its_boxes_with_it(tables: Callable[..., Any]) -> None:
    data = load(tables(concept_columns="ILD,Nodule/Mass,Cardiomegaly", min_positives=1), 3, GRID)
    assert data.concepts == ["Nodule/Mass", "Cardiomegaly"]
    assert data.notes["dropped"] == {"ILD": 0}
    assert [box[0] for boxes in data.test.boxes for box in boxes] == [0, 0]
    assert data.test.concepts.shape == (4, 2)


def test_without_box_tables_there_are_none(tables: Callable[..., Any]) -> None:
    data = load(tables(train_bbox_csv=None, test_bbox_csv=None), 3, GRID)
    assert not data.has_boxes
    assert not batch(data.test, [0, 1, 2, 3])[1].any()


def test_normal_images_can_be_thinned_out_of_the_training_images_alone(
    tables: Callable[..., Any],
) -> None:
    whole, thin = (load(tables(balance_no_finding=share), 3, GRID) for share in (0.0, 0.2))
    assert thin.train.targets[:, 1].mean() <= 0.2 < whole.train.targets[:, 1].mean()
    assert thin.val.image_ids == whole.val.image_ids
    assert thin.test.image_ids == whole.test.image_ids


def test_a_class_of_each_image_is_a_number(tables: Callable[..., Any], vindr: Path) -> None:
    for part, count in (("train", 10), ("test", 4)):
        lines = [
            f"{part}{n},{n % 2},{n % 3 == 0:d},{'yes' if n % 2 else 'no'}" for n in range(count)
        ]
        text = "\n".join(["image_id,Nodule/Mass,Cardiomegaly,Pneumonia", *lines]) + "\n"
        (vindr / f"labels_{part}.csv").write_text(text)
    by_class = resolve(CsrSettings, {"data.task_mode": "multiclass", "task.loss": "ce"}, [], [])[
        0
    ].data
    wanted = tables().model_copy(update={"task_mode": by_class.task_mode})
    data = load(wanted, 3, GRID)
    assert data.targets == ["no", "yes"]
    assert data.test.targets.dtype == torch.int64
    assert data.test.targets.tolist() == [0, 1, 0, 1]


def test_a_missing_image_is_named_before_training(tables: Callable[..., Any], vindr: Path) -> None:
    (vindr / "test" / "test2.png").unlink()
    with pytest.raises(UserError, match="no image 'test2'"):
        load(tables(), 3, GRID)


def test_a_missing_table_is_named(tables: Callable[..., Any], vindr: Path) -> None:
    (vindr / "labels_test.csv").unlink()
    with pytest.raises(UserError, match=r"labels_test\.csv"):
        load(tables(), 3, GRID)
