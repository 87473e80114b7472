"""What a trained network's samples, loss and experts are worth.

Letters: N images, D features, S pixels of a side.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.diffusion import distances
from moectl.diffusion.features import (
    extract,
    extract_images,
    inception,
    to_bytes,
    trained_classifier,
)
from moectl.diffusion.heat_maps import expert_usage
from moectl.diffusion.inference import Opened, open_network
from moectl.diffusion.measures import SPANS, by_step, dead, measure, usage
from moectl.diffusion.pictures import loss_by_step, write_grid
from moectl.diffusion.report import evaluation_text, report_again
from moectl.diffusion.sample import check, columns_of, labels_of
from moectl.diffusion.solvers import generate
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import write_json, write_text
from moectl.engine.launch import gather_rows
from moectl.engine.run import runs_root
from moectl.engine.seeding import key

log = logging.getLogger(__name__)

_ROUNDS = 4
_SHOWN = 100  # images in the grid
_K = 3  # neighbours of precision and recall
_MOST_NEIGHBOURS = 10_000  # images of each set there


@dataclass(frozen=True)
class Features:
    """What images are compared by."""

    name: str
    """Of the Fréchet distance: FID, or FD with the mark of the classifier."""
    give: Callable[[Tensor], Tensor]
    """From images (B, 3, S, S) in -1 to 1 to (B, D)."""
    classify: Callable[[Tensor], Tensor] | None = None
    """To logits; None where there is no classifier."""


def run_eval(request: Request) -> tuple[dict[str, Any], str]:
    """Measure a trained network, and write what comes out into the folder of its run.

    Args:
        request: the run, how samples are made and what is measured.

    Returns:
        The document, and its text.
    """
    opened = open_network(request)
    if opened.settings.eval.features != "none":
        check(opened, opened.settings.sample)
    document, images = evaluate(opened)
    section, wanted = opened.settings.sample, opened.settings.eval
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


def evaluate(opened: Opened) -> tuple[dict[str, Any], Tensor | None]:
    """Measure loss, experts and samples.

    Returns:
        Plain values, and the samples (N, 3, S, S); None if none were wanted.

    Raises:
        UserError: if there is nothing to compare samples by, or too little to compare them with.
    """
    section = opened.settings.sample
    features = None if opened.settings.eval.features == "none" else features_of(opened)
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
    if features is None:
        return document, None
    images, seconds = _samples(opened)
    document["sampling"] = {
        **section.model_dump(exclude={"ema"}),
        "num": len(images),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 3),
        "network_calls": section.steps * (1 if section.guidance in (0, 1) else 2),
    }
    document |= compare(opened, features, images)
    return document, images


def features_of(opened: Opened) -> Features:
    """Return what the settings want images compared by.

    Raises:
        UserError: if it cannot be had, or there are too few held-out images.
    """
    wanted, accelerator, held = opened.settings.eval, opened.accelerator, len(opened.data.test)
    if held <= _K:
        raise UserError(
            f"{held} held-out images are too few to compare samples with, {_K + 1} at least",
            "--features none measures loss and experts alone",
        )
    if wanted.features == "inception":
        network = inception(wanted.inception_weights).to(accelerator.device)
        return Features("FID", lambda images: network(to_bytes(images)))
    cache = runs_root() / "diffusion" / "classifiers"
    classifier, mark = trained_classifier(opened.data, accelerator, cache)
    return Features(f"FD[classifier:{mark}]", classifier.features, classifier)


def _samples(opened: Opened) -> tuple[Tensor, float]:
    """Make the images, all of them on every process, and take the time."""
    section, num = opened.settings.sample, opened.settings.eval.num
    accelerator = opened.accelerator
    labels = labels_of("all", num, opened.class_names, opened.guidable)
    began = time.monotonic()
    own = generate(
        opened.model,
        opened.diffusion,
        accelerator,
        labels,
        range(section.seed, section.seed + num),
        section,
        opened.image_size,
    )
    images = gather_rows(accelerator, own.to(accelerator.device), num).cpu()
    return images, time.monotonic() - began


def compare(opened: Opened, features: Features, images: Tensor) -> dict[str, Any]:
    """Compare samples, and as many training images, with images that the network never saw.

    Args:
        opened: the network and its data.
        features: what they are compared by.
        images: (N, 3, S, S).
    """
    data, accelerator = opened.data, opened.accelerator
    size = opened.settings.sample.batch_size
    made = extract_images(features.give, images, size, accelerator.device)
    held, whole = (
        _shuffled(extract(features.give, part, accelerator, batch_size=size)[0])
        for part in (data.test, data.train)
    )
    sets = {"samples": made, "training images": whole[: len(images)]}
    rows = [
        {"set": name, "against": "held-out images", **_distances(held, part)}
        for name, part in sets.items()
    ]
    rows.append({"set": "samples", "against": "training images", **_distances(whole, made)})
    warning = distances.too_few(
        min(len(images), len(held)), made.shape[1], inception=features.classify is None
    )
    if warning:
        log.warning("%s", warning)
    found: dict[str, Any] = {"distance": features.name, "distances": rows, "warning": warning}
    if features.classify is not None:
        labels = labels_of("all", len(images), opened.class_names, opened.guidable)
        logits = extract_images(features.classify, images, size, accelerator.device)
        real, truth = extract(features.classify, data.test, accelerator, batch_size=size)
        right = logits.argmax(1) == labels
        found["sample_accuracy"] = float(right.double().mean())
        found["sample_accuracy_by_class"] = [
            float(right[labels == label].double().mean())
            for label in range(min(len(opened.class_names), len(images)))
        ]
        found["held_out_accuracy"] = float((real.argmax(1) == truth).double().mean())
    return found


def _shuffled(rows: Tensor) -> Tensor:
    """Mix rows whose classes may come one after the other: the first of them are of all then."""
    generator = torch.Generator().manual_seed(key("shuffled", len(rows)))
    return rows[torch.randperm(len(rows), generator=generator)]


def _distances(real: Tensor, fake: Tensor) -> dict[str, Any]:
    kid, spread = distances.kernel(real, fake)
    near = distances.precision_recall(real[:_MOST_NEIGHBOURS], fake[:_MOST_NEIGHBOURS], _K)
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
        labels = torch.arange(len(images)) % len(document["class_names"])
        write_grid(folder / "grid.png", images[:_SHOWN], columns_of(labels[:_SHOWN]))
    write_json(folder / "eval.json", document)
    write_text(folder / "eval.md", evaluation_text(document))
