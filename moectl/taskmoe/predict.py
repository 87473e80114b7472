"""Classifying images from files.

Legend: B images, H W pixels.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.common.images import Plain
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import is_file
from moectl.engine.inference import predict
from moectl.engine.sources import TensorSource
from moectl.taskmoe.build import image_files, square
from moectl.taskmoe.inference import Opened, for_task, open_mixture

log = logging.getLogger(__name__)


def run_predict(
    request: Request, images: Path, task: str, checkpoint: Path | None, temperature: float | None
) -> tuple[list[dict[str, Any]], int]:
    """Classify an image, or all those in a folder and the folders in it.

    Args:
        request: the run, its weights and settings.
        images: file or folder.
        task: whose newest training classifies instead.
        checkpoint: a file that classifies instead.
        temperature: of the gates; that of the weights if None.

    Returns:
        A row for every image, in the order of their paths: `image`, `label`, `class`,
        `probability` and the `gates`; and the number of images that could not be read.

    Raises:
        UserError: if there is no image.
    """
    paths = [images] if is_file(images) else image_files(images, deep=True)
    if not paths:
        raise UserError(f"{images}: no image there")
    opened = open_mixture(for_task(request, task), checkpoint, temperature)
    root = images.parent if is_file(images) else images
    facts, size, rows = opened.facts, opened.settings.eval.batch_size, []
    plain = Plain(facts["mean"], facts["std"]) if facts["mean"] else opened.data.test.plain
    for start in range(0, len(paths), size):
        read = _read(paths[start : start + size], facts["image_size"])
        rows += _classified(opened, read, root, plain) if read else []
    return rows, len(paths) - len(rows)


def _read(paths: Sequence[Path], side: int) -> dict[Path, Tensor]:
    """Read images; those that cannot be read are left out with a warning."""
    found = {}
    for path in paths:
        try:
            found[path] = square(path, side)
        except UserError as error:
            log.warning("%s", error.message)
    return found


def _classified(
    opened: Opened, images: dict[Path, Tensor], root: Path, plain: Callable[[Tensor], Tensor]
) -> list[dict[str, Any]]:
    pixels = torch.stack([*images.values()]).permute(0, 3, 1, 2).contiguous()
    source = TensorSource(pixels, torch.zeros(len(images), dtype=torch.int64), None, plain)
    size = len(opened.model.experts)

    def forward(batch: Tensor) -> Tensor:
        output = opened.model(batch)
        return torch.cat([output.logits.softmax(1), output.gates], 1)

    found, _ = predict(forward, source, opened.accelerator, opened.settings.eval.batch_size)
    sure, labels = found[:, :-size].max(1)
    columns = (images, labels.tolist(), sure.tolist(), found[:, -size:].tolist())
    return [
        {
            "image": str(path.relative_to(root)),
            "label": label,
            "class": opened.facts["class_names"][label],
            "probability": probability,
            "gates": gates,
        }
        for path, label, probability, gates in zip(*columns, strict=True)
    ]


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """Write a line of JSON for every row."""
    return "".join(json.dumps(row) + "\n" for row in rows)
