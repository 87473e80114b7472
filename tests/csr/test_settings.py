from typing import Any

import pytest

from moectl.csr.settings import CsrSettings
from moectl.engine.errors import UserError
from moectl.engine.settings import flatten, resolve

# What the program of the original does without flags.
ORIGINAL = {
    "train.epochs_stage1": 10,
    "train.epochs_stage2": 10,
    "train.epochs_stage3": 10,
    "train.batch_size": 16,
    "train.seed": 42,
    "optim.lr": 1e-4,
    "model.backbone_type": "medmae",
    "model.num_prototypes": 5,
    "model.projection": 128,
    "model.projector": "mlp",
    "data.image_size": 224,
}


def settings(*assignments: str) -> CsrSettings:
    return resolve(CsrSettings, {}, assignments, [])[0]


def test_defaults_are_those_of_the_original() -> None:
    values: dict[str, Any] = flatten(settings().model_dump())
    assert {name: values[name] for name in ORIGINAL} == ORIGINAL


@pytest.mark.parametrize(
    "assignment",
    [
        "data.dataset=mnist",
        "data.image_size=8",
        "data.hflip=1.5",
        "data.val_fraction=0",
        "data.val_fraction=1",
        "data.min_positives=-1",
        "data.balance_no_finding=1",
        "data.box_units=inches",
        "model.backbone_type=alexnet",
        "model.num_prototypes=0",
        "model.projection=1",
        "model.task_norm=batch",
        "concept.loss=mse",
        "concept.pos_weight_cap=-1",
        "concept.loc_loss=l1",
        "prototype.loss=triplet",
        "prototype.margin_mode=divide",
        "prototype.temperature=0",
        "prototype.init=zeros",
        "prototype.revive_every=-1",
        "task.loss=hinge",
        "task.label_smoothing=1",
        "optim.lr=0",
        "train.batch_size=1",
        "train.epochs_stage2=-1",
    ],
)
def test_what_cannot_be_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match=assignment.split("=")[0].replace(".", r"\.")):
        settings(assignment)


@pytest.mark.parametrize(
    ("loss", "mode"),
    [
        ("ce", "multilabel"),
        ("bce", "multiclass"),
        ("bce_pos_weight", "multiclass"),
        ("focal", "multiclass"),
        ("asymmetric", "multiclass"),
        ("class_balanced", "multiclass"),
    ],
)
def test_a_loss_that_does_not_fit_the_task_is_refused(loss: str, mode: str) -> None:
    message = f"task.loss is {loss}, but data.task_mode is {mode}"
    with pytest.raises(UserError, match=message):
        settings(f"task.loss={loss}", f"data.task_mode={mode}")


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_glyphs_have_several_targets(loss: str) -> None:
    words = ("data.dataset=synthetic", "data.task_mode=multiclass", f"task.loss={loss}")
    with pytest.raises(
        UserError, match=r"data\.dataset is synthetic.*data\.task_mode is multiclass"
    ):
        settings(*words)


def test_isic_has_one_class_per_image() -> None:
    with pytest.raises(UserError, match=r"isic.* data\.task_mode = multiclass and task\.loss = ce"):
        settings("data.dataset=isic")
    data = settings("data.dataset=isic", "data.task_mode=multiclass", "task.loss=ce").data
    assert data.dataset == "isic"


def test_one_class_per_image_takes_cross_entropy() -> None:
    both = settings("task.loss=ce", "data.task_mode=multiclass")
    assert (both.task.loss, both.data.task_mode) == ("ce", "multiclass")


@pytest.mark.parametrize("part", ["train", "test"])
def test_boxes_of_one_part_alone_are_refused(part: str) -> None:
    with pytest.raises(UserError, match=r"train_bbox_csv and data\.test_bbox_csv belong together"):
        settings(f"data.{part}_bbox_csv=boxes.csv")


def test_boxes_of_both_parts_are_taken() -> None:
    data = settings("data.train_bbox_csv=a.csv", "data.test_bbox_csv=b.csv").data
    assert (str(data.train_bbox_csv), str(data.test_bbox_csv)) == ("a.csv", "b.csv")
