"""The size of a training, without doing it."""

from typing import Any

from moectl.csr.backbones import build_backbone
from moectl.csr.data import ANY, load
from moectl.csr.model import CSRNet
from moectl.csr.settings import CsrSettings
from moectl.csr.stages import STAGES


def size(settings: CsrSettings) -> dict[str, Any]:
    """Return images, names, parameters and updates of all stages, for one process.

    A backbone of a hub model is taken to be of the usual form of its type.
    """
    model, side = settings.model, settings.data.image_size
    backbone = build_backbone(model.backbone_type, "", pretrained=False, image_size=side)
    data = load(settings.data, settings.train.seed, backbone.grid(side), ANY)
    network = CSRNet(
        backbone,
        concepts=len(data.concepts),
        prototypes=model.num_prototypes,
        classes=len(data.targets),
        projection=model.projection,
        projector=model.projector,
        task_input=model.task_input,
    )
    whole, rest = divmod(len(data.train.image_ids), settings.train.batch_size)
    updates = whole + (rest > 1)  # batch norm has no variance of one image
    train = settings.train
    epochs = (train.epochs_stage1, train.epochs_stage2, train.epochs_stage3)
    trained = {
        f"parameters of stage {stage}": sum(
            one.numel() for part in network.stage_parameters(stage).values() for one in part
        )
        for stage in STAGES
    }
    return {
        "training images": len(data.train.image_ids),
        "validation images": len(data.val.image_ids),
        "test images": len(data.test.image_ids),
        "concepts": len(data.concepts),
        "targets": len(data.targets),
        "boxes": data.has_boxes,
        "feature grid": "x".join(map(str, backbone.grid(side))),
        **trained,
        "updates per epoch": updates,
        "updates": updates * sum(epochs),
    }
