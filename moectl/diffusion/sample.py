"""Making images with a trained network.

Letters: N images, S pixels of a side.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.diffusion.features import to_bytes
from moectl.diffusion.inference import Opened, make, open_network
from moectl.diffusion.pictures import write_grid, write_png
from moectl.diffusion.settings import SampleSection
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import write_bytes, write_json
from moectl.engine.launch import agree, gather_objects, gather_rows

_SHOWN = 100  # images in the grid


def run_sample(
    request: Request, num: int, classes: str, save_dir: Path | None, npz: bool
) -> tuple[dict[str, Any], str]:
    """Make images and write them as PNG files, with a grid and a record of how.

    Args:
        request: the run and how images are made.
        num: N.
        classes: what they show, see `labels_of`.
        save_dir: folder for them; beside the weights if not given.
        npz: whether `samples.npz` (arr_0 uint8 NHWC, arr_1 labels) is written too.

    Raises:
        UserError: if the network knows no such class, or the folder holds files.
    """
    opened = open_network(request)
    section = opened.settings.sample
    labels = labels_of(classes, num, opened.class_names, opened.guidable)
    check(section, opened.diffusion.steps, opened.guidable)
    accelerator = opened.accelerator
    folder = agree(accelerator, lambda: _folder(opened, section, save_dir))
    names = [_name(opened.class_names, label) for label in labels.tolist()]

    def keep(places: Sequence[int], images: Tensor) -> None:
        for place, image in zip(places, to_bytes(images), strict=True):
            write_png(folder / f"{place:05d}_{names[place]}.png", image)

    own = make(opened, labels, keep)
    wanted = num if npz else min(num, _SHOWN)
    first = own[: -(-wanted // accelerator.num_processes)]
    gathered = gather_rows(accelerator, first.to(accelerator.device), wanted).cpu()
    gather_objects(accelerator, None)  # all files are there before the first process says so
    document = {
        "weights": opened.weights,
        "run": str(opened.folder),
        **section.model_dump(exclude={"batch_size"}),
        "num": num,
        "classes": classes,
        "folder": str(folder),
        "grid": str(folder / "grid.png"),
    }
    if accelerator.is_main_process:
        write_grid(folder / "grid.png", gathered[:_SHOWN], columns_of(labels[:_SHOWN]))
        if npz:
            _write_npz(folder / "samples.npz", gathered, labels)
        write_json(folder / "samples.json", document)
    return document, str(folder / "grid.png")


def labels_of(classes: str, num: int, names: list[str], guidable: bool) -> Tensor:
    """Return the class of each image, (N,): the chosen ones in turn.

    Args:
        classes: names or numbers with commas, "all", or "none".
        num: N.
        names: of the classes that the network knows.
        guidable: whether it knows "none", whose number is that of the classes.

    Raises:
        UserError: naming what it does not know.
    """
    if classes == "none":
        if not guidable:
            raise UserError(
                "--classes none: the network was trained with loss.p_uncond = 0, so it always needs"
                " a class"
            )
        return torch.full((num,), len(names))
    words = names if classes == "all" else [word.strip() for word in classes.split(",")]
    known = {str(number): number for number in range(len(names))}
    known |= {name: number for number, name in enumerate(names)}
    for word in words:
        if word not in known:
            raise UserError(
                f"--classes {word}: no such class",
                f"there are: {', '.join(names[:20])}, their numbers from 0 on, all and none",
            )
    chosen = torch.tensor([known[word] for word in words])
    return chosen.repeat(-(-num // len(chosen)))[:num]


def check(section: SampleSection, steps: int, guidable: bool) -> None:
    """Refuse what a network or its process cannot do.

    Args:
        section: how images are to be made.
        steps: of the process.
        guidable: whether the network knows the class "none".

    Raises:
        UserError: saying what.
    """
    if section.guidance != 1 and not guidable:
        raise UserError(
            f"sample.guidance = {section.guidance:g}: the network was trained with loss.p_uncond ="
            " 0, so it knows nothing to guide away from",
            "leave --cfg-scale at 1",
        )
    if section.steps > steps:
        raise UserError(f"sample.steps = {section.steps}: the process has {steps} steps")
    if section.eta and section.sampler != "ddim":
        raise UserError(f"sample.eta = {section.eta:g} is for ddim, not {section.sampler}")


def _folder(opened: Opened, section: SampleSection, wanted: Path | None) -> Path:
    """Return a new or empty folder."""
    folder = wanted or opened.folder / "samples" / (
        f"{opened.tag}_{section.sampler}{section.steps}_cfg{section.guidance:g}_seed{section.seed}"
    )
    if wanted is None:
        number, first = 1, folder
        while folder.exists():
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--save-dir {folder}: exists and is not an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror})") from None
    return folder


def _name(names: list[str], label: int) -> str:
    """Return a class's name as a part of a file's."""
    name = names[label] if label < len(names) else "none"
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name)


def columns_of(labels: Tensor) -> int:
    """Return columns such that every row begins with the first class; 0 if that does not fit."""
    again = (labels[1:] == labels[0]).nonzero()
    period = int(again[0]) + 1 if len(again) else 0
    return period if 4 <= period <= 20 else 0


def _write_npz(path: Path, images: Tensor, labels: Tensor) -> None:
    buffer = io.BytesIO()
    pixels = to_bytes(images).permute(0, 2, 3, 1).numpy()
    np.savez(buffer, arr_0=pixels, arr_1=labels.numpy())
    write_bytes(path, buffer.getvalue())
