"""What a trained network's samples, loss and experts are worth.

Letters: N images, D features, S pixels of a side.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.diffusion import distances
from moectl.diffusion.features import extract_images
from moectl.diffusion.heat_maps import expert_usage
from moectl.diffusion.inference import Opened, make, open_network
from moectl.diffusion.measures import SPANS, by_step, dead, measure, usage
from moectl.diffusion.pictures import loss_by_step, write_grid
from moectl.diffusion.reference import NEIGHBOURS, Reference, labels_like, reference_of
from moectl.diffusion.report import evaluation_text, report_again
from moectl.diffusion.sample import check
from moectl.engine.command import Request
from moectl.engine.files import write_json, write_text
from moectl.engine.launch import gather_rows

log = logging.getLogger(__name__)

_ROUNDS = 4
_SHOWN = 100  # images in the grid
_MOST = 10_000  # images of each set whose neighbours are searched


def run_eval(request: Request) -> tuple[dict[str, Any], str]:
    """Measure a trained network, and write what comes out into the folder of its run.

    Args:
        request: the run, how samples are made and what is measured.

    Returns:
        The document, and its text.
    """
    opened = open_network(request)
    section, wanted = opened.settings.sample, opened.settings.eval
    reference = None
    if wanted.features != "none":
        check(section, opened.diffusion.steps, opened.guidable)
        reference = reference_of(wanted, opened.data, opened.accelerator, section.batch_size)
    document, images = evaluate(opened, reference)
    name = f"{opened.tag}_{wanted.features}"
    if images is not None:
        eta = f"_eta{section.eta:g}" if section.eta else ""
        name += f"_{section.sampler}{section.steps}{eta}_cfg{section.guidance:g}"
        name += f"_seed{section.seed}_n{wanted.num}"
    folder = opened.folder / "evals" / name
    if opened.accelerator.is_main_process:
        write_evaluation(folder, document, images)
        report_again(opened.folder)
    log.info("%s", folder)
    return document, evaluation_text(document)


def evaluate(opened: Opened, reference: Reference | None) -> tuple[dict[str, Any], Tensor | None]:
    """Measure loss, experts and samples.

    Args:
        opened: the network.
        reference: what samples are compared with; without it none are made.

    Returns:
        Plain values, and the samples (N, 3, S, S) if there are any.
    """
    section = opened.settings.sample
    held = measure(
        opened.model,
        opened.diffusion,
        opened.data.test,
        opened.accelerator,
        batch_size=section.batch_size,
        rounds=_ROUNDS,
    )
    steps, classes = opened.diffusion.steps, len(opened.class_names)
    document: dict[str, Any] = {
        "run": str(opened.folder),
        "weights": opened.weights,
        "class_names": opened.class_names,
        "steps": steps,
        "held_out": len(opened.data.test),
        "loss": float(held.errors.mean()),
        "loss_by_step": by_step(held, steps),
    }
    if opened.model.blocks:
        spans, experts = held.t * SPANS // steps, opened.model.num_experts
        document["usage_by_step"] = usage(held.chosen, spans, SPANS, experts)
        document["usage_by_class"] = usage(held.chosen, held.labels, classes, experts)
        document["blocks"] = opened.model.blocks
        document["dead_experts"] = dead(document["usage_by_step"])
    if reference is None:
        return document, None
    labels = labels_like(reference.labels, opened.settings.eval.num, classes)
    images, seconds = _samples(opened, labels)
    document["sampling"] = {
        **section.model_dump(exclude={"ema"}),
        "num": len(images),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
        "network_calls": section.steps * (1 if section.guidance in (0, 1) else 2),
    }
    document |= compare(reference, images, labels, section.batch_size, opened.accelerator.device)
    return document, images


def _samples(opened: Opened, labels: Tensor) -> tuple[Tensor, float]:
    """Make images of classes (N,), all of them on every process, and take the time."""
    accelerator, began = opened.accelerator, time.monotonic()
    own = make(opened, labels).to(accelerator.device)
    images = gather_rows(accelerator, own, len(labels)).cpu()
    return images, time.monotonic() - began


def compare(
    reference: Reference, images: Tensor, labels: Tensor, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Compare samples, and as many training images, with images that the network never saw.

    Args:
        reference: the real images.
        images: (N, 3, S, S).
        labels: (N,) classes that were asked for.
        batch_size: images at a time.
        device: of the reference's networks.
    """
    made = extract_images(reference.give, images, batch_size, device)
    sets = {"samples": made, "training images": reference.train[: len(images)]}
    rows = [
        {"set": name, "against": "held-out images", **_distances(reference.test, part)}
        for name, part in sets.items()
    ]
    rows.append(
        {"set": "samples", "against": "training images", **_distances(reference.train, made)}
    )
    warning = distances.too_few(
        min(len(images), len(reference.test)),
        made.shape[1],
        inception=reference.classify is None,
    )
    if warning:
        log.warning("%s", warning)
    found: dict[str, Any] = {"distance": reference.name, "distances": rows, "warning": warning}
    if reference.classify is not None:
        logits = extract_images(reference.classify, images, batch_size, device)
        right = (logits.argmax(1) == labels).double()
        found["sample_accuracy"] = float(right.mean())
        found["sample_accuracy_by_class"] = [
            float(right[labels == label].mean()) if bool((labels == label).any()) else None
            for label in range(logits.shape[1])
        ]
        found["held_out_accuracy"] = reference.held_out_accuracy
    return found


def _distances(real: Tensor, fake: Tensor) -> dict[str, Any]:
    kid, spread = distances.kernel(real, fake)
    near = distances.precision_recall(real[:_MOST], fake[:_MOST], NEIGHBOURS)
    return {
        "images": len(fake),
        "against_images": len(real),
        "frechet": distances.frechet(real, fake),
        "kid": kid,
        "kid_std": spread,
        "precision": near[0],
        "recall": near[1],
    }


def write_evaluation(folder: Path, document: dict[str, Any], images: Tensor | None) -> None:
    """Write the document, its text and its pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    loss_by_step(
        folder / "loss_by_step.png", {"weights": document["loss_by_step"]}, document["steps"]
    )
    if "usage_by_step" in document:
        expert_usage(folder / "expert_usage.png", document)
    if images is not None:
        classes = len(document["class_names"])  # in turn, where they are equally frequent
        write_grid(folder / "grid.png", images[:_SHOWN], classes if 4 <= classes <= 20 else 0)
    write_json(folder / "eval.json", document)
    write_text(folder / "eval.md", evaluation_text(document))
