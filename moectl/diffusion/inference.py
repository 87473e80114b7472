"""Opening a trained network, and making images with it.

Letters: N images, n of them in this process, S pixels of a side.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moectl.diffusion.data import Data, load
from moectl.diffusion.model import UNet, build
from moectl.diffusion.process import GaussianDiffusion
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.solvers import generate
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.opened import Trained, accelerator_for, summary
from moectl.engine.references import exact, find_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


log = logging.getLogger(__name__)

_FACTS = {"arguments", "process", "class_names", "image_size", "images", "digest", "epoch"}
"""What a sidecar holds."""


@dataclass(frozen=True)
class Opened(Trained):
    """A trained network and how it was trained; `weights` say whether they are the `ema`."""

    settings: DiffusionSettings
    model: UNet
    """In evaluation mode, on the accelerator's device."""
    diffusion: GaussianDiffusion

    @property
    def class_names(self) -> list[str]:
        """Of the classes, in the order of their labels."""
        return list(self.facts["class_names"])

    @property
    def image_size(self) -> int:
        """Side of the images it was trained on, in pixels."""
        return int(self.facts["image_size"])

    @property
    def guidable(self) -> bool:
        """Whether it knows the class "none"."""
        return bool(self.facts["arguments"]["null_class"])

    @cached_property
    def data(self) -> Data:
        """The images that it was trained on, and those held out.

        Raises:
            UserError: if they are not those of its training.
        """
        data = load(self.settings.data)
        if data.facts["digest"] != self.facts["digest"]:
            raise UserError(
                f"{self.folder}: was trained on other images than those of data.dataset ="
                f" {self.settings.data.dataset} in {self.settings.data.root}"
                f" ({self.facts['images']} then, {data.facts['images']} now, or other contents)"
            )
        return data


def make(
    opened: Opened, labels: Tensor, keep: Callable[[Sequence[int], Tensor], None] = lambda *_: None
) -> Tensor:
    """Make images of classes (N,) as the settings say, with seeds that follow each other.

    Args:
        opened: the network.
        labels: (N,) classes.
        keep: is given every batch as it is done, see `solvers.generate`.

    Returns:
        (n, 3, S, S) this process's share.

    Raises:
        RunFailed: if an image holds other than finite numbers.
    """
    section = opened.settings.sample
    seeds = range(section.seed, section.seed + len(labels))
    size = opened.image_size
    return generate(
        opened.model, opened.diffusion, opened.accelerator, labels, seeds, section, size, keep
    )


def open_network(request: Request) -> Opened:
    """Open the weights that a request names: averaged ones if `sample.ema` says so.

    Raises:
        UserError: if they are no network's of this room.
    """
    settings: Any = request.settings
    path = find_weights(exact(request.run, request.folder, "last"), "diffusion")
    accelerator = accelerator_for(settings.train, request.cpu, path.parent)
    return open_weights(path, settings, accelerator)


def open_weights(path: Path, settings: DiffusionSettings, accelerator: "Accelerator") -> Opened:
    """Open a weights file.

    Raises:
        UserError: as `open_network`.
    """
    weights = artefact.load(path)
    model, ema = rebuild(weights, ema=settings.sample.ema)
    if settings.sample.ema and not ema:
        log.warning("the training kept no averaged weights; these are those of the last update")
    return Opened(
        model=model.to(accelerator.device).eval(),
        diffusion=GaussianDiffusion(**weights.facts["process"]).to(accelerator.device),
        settings=settings,
        accelerator=accelerator,
        facts=weights.facts,
        weights={**summary(weights), "ema": ema},
        folder=path.parent,
        tag=f"{path.stem}{'' if ema else '_raw'}",
    )


def rebuild(weights: artefact.Artefact, *, ema: bool) -> tuple[UNet, bool]:
    """Build the network that a sidecar describes.

    Args:
        weights: of a training.
        ema: whether the averaged weights are wanted.

    Returns:
        The network, and whether it has the averaged weights: a training may have kept none.

    Raises:
        UserError: if there is no such sidecar.
    """
    facts, path = weights.facts, weights.path
    if facts.get("model") != "UNet" or (missing := _FACTS - set(facts)):
        without = f" with {', '.join(sorted(missing))}" if facts.get("model") == "UNet" else ""
        raise UserError(
            f"{path}: has no {path.name}.json of diffusion{without} beside it",
            "expected weights that moectl diffusion train wrote",
        )
    averaged = ema and "ema_state_dict" in weights.payload
    try:
        model = build(facts["arguments"])
        model.load_state_dict(weights.payload["ema_state_dict" if averaged else "model_state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: does not fit what {path.name}.json says ({words})") from None
    return model, averaged
