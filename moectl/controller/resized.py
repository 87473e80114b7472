"""Networks of transformers whose image processor is told a size, from which its crops follow.

Letters: C channels, D width of the tower's patches, H W pixels.
"""

import abc
from typing import TYPE_CHECKING, Any

import torch

from moectl.controller.backbone import Inputs, View
from moectl.controller.native import Native
from moectl.controller.plans import Tier

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Resized(Native):
    """A network that sees an image at a resolution which a tier sets.

    What it looks at first is the image as the coarsest tier has it. A plan of that tier takes it
    over; finer tiers share no pixels with it and are encoded as a whole.
    """

    _takes: tuple[str, ...]
    """Names of what the image tower takes."""

    @abc.abstractmethod
    def _size(self, tier: Tier) -> dict[str, int]:
        """Return the size that the image processor is told."""

    @abc.abstractmethod
    def _tiling(self, image: "Image", tier: Tier) -> tuple[int, int]:
        """Return rows and columns of an image's crops."""

    @abc.abstractmethod
    def _positions(self, read: "dict[str, Tensor]") -> "Tensor":
        """Return where each token stands."""

    def prepare(self, image: "Image", question: str, style: str, tier: str) -> Inputs:
        """Resize the image as a tier asks and tokenise the question."""
        chosen = next(known for known in self.space.tiers if known.name == tier)
        read = self._read(image, question, style, size=self._size(chosen))
        return self._inputs(read, self._positions(read), self._tiling(image, chosen))

    def overview(self, image: "Image") -> "dict[str, Tensor]":
        """Return what the image tower takes of the image as the coarsest tier has it."""
        size = self._size(self.space.tiers[0])
        read = self.processor.image_processor(image, size=size, return_tensors="pt")
        return {name: read[name].to(self.device) for name in self._takes}

    def glance(self, pixels: "dict[str, Tensor]") -> View:
        """Encode what `overview` returned."""
        seen = self._see(pixels)
        patches = seen.last_hidden_state
        feature = patches.reshape(-1, patches.shape[-1]).float().mean(0)
        return View(feature, (pixels["pixel_values"], seen))

    def reuses_view(self, tier: str) -> bool:
        """Whether `encode` takes the view over in a tier: in the coarsest alone."""
        return tier == self.space.tiers[0].name

    def encode(self, inputs: Inputs, view: View | None = None) -> Any:
        """Return what the text network sees of the image: tower and projector, all crops."""
        if view is not None and torch.equal(view.hidden[0], inputs.tensors["pixel_values"]):
            return view.hidden[1]
        return self._see(inputs.tensors)

    @torch.no_grad()
    def _see(self, tensors: "dict[str, Tensor]") -> Any:
        taken = {name: tensors[name] for name in self._takes}
        return self.model.model.get_image_features(**taken, return_dict=True)
