"""What the controller needs of a vision-language network, and how one answers a question.

Letters: D width of a feature, V vocabulary.
"""

import abc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moectl.controller.execution import Timings
from moectl.controller.plans import Plan, Space
from moectl.controller.timing import Clock

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Inputs:
    """One question about one image, tiled for one tier; batch of 1."""

    tensors: dict[str, Tensor]
    """What the network takes, on its device."""
    tiling: tuple[int, int]
    """Rows and columns of the tiles; (0, 0) if there is the view of the whole image alone."""
    vision_tokens: int
    text_tokens: int

    @property
    def crops(self) -> int:
        """Tiles, without the view of the whole image."""
        return self.tiling[0] * self.tiling[1]

    @property
    def tokens(self) -> int:
        """Length of the sequence that the text network begins with."""
        return self.vision_tokens + self.text_tokens


@dataclass(frozen=True)
class View:
    """The whole image at low resolution, as the image tower sees it."""

    feature: Tensor
    """(D,) mean over the patches, before the projector."""
    hidden: Any
    """What `Backbone.encode` can go on from, so that this view is not computed twice."""


@dataclass(frozen=True)
class Answer:
    """An answer and what it took."""

    text: str
    tokens: tuple[int, ...]
    """Ids, the end mark included."""
    timings: Timings


class Backbone(abc.ABC):
    """A frozen vision-language network, one question at a time.

    One subclass per family of networks. Everything runs without gradients, in evaluation mode.
    """

    name: str
    """Under which the network was opened."""
    space: Space
    """The plans it can execute."""
    vision_dim: int
    """D of the image's feature."""
    text_dim: int
    """D of the question's feature."""
    device: torch.device
    layers: Sequence[nn.Module]
    """(L,) blocks of the text network."""
    end_tokens: frozenset[int]
    """Ids that end an answer."""

    @abc.abstractmethod
    def prepare(self, image: "Image", question: str, style: str, tier: str) -> Inputs:
        """Tile the image as a tier asks and tokenise the question.

        Args:
            image: RGB.
            question: bare, as the data set has it.
            style: name of the data set, which sets the prompt: `text_vqa`, `coco_2014_vqa`,
                `okvqa`, `coco_caption`, or `vqa` for all others.
            tier: name of one of `space.tiers`.
        """

    @abc.abstractmethod
    def overview(self, image: "Image") -> Any:
        """Return the pixels of the whole image at low resolution, as `glance` takes them.

        They are on the network's device; to make them is no part of a latency.
        """

    @abc.abstractmethod
    def glance(self, pixels: Any) -> View:
        """Encode what `overview` returned."""

    def look(self, image: "Image") -> View:
        """Encode the whole image at low resolution."""
        return self.glance(self.overview(image))

    def reuses_view(self, tier: str) -> bool:  # noqa: ARG002 - here all tiers do
        """Whether `encode` takes the view over in a tier.

        Only there is the time of the view a part of `Timings.vision`. Elsewhere an answer does
        without the view: its time belongs to the controller, if one looked at it.
        """
        return True

    @abc.abstractmethod
    def text_feature(self, question: str) -> Tensor:
        """Return the mean of the frozen input embeddings of the bare question, (D,)."""

    @abc.abstractmethod
    def encode(self, inputs: Inputs, view: View | None = None) -> Any:
        """Return what the text network sees of the image: tower and projector, all crops.

        Args:
            inputs: of `prepare`.
            view: the same image's `look`; its crop is then not encoded again.
        """

    @abc.abstractmethod
    def apply(self, plan: Plan) -> AbstractContextManager[None]:
        """Run the text network by a plan inside the context; afterwards it is as it was."""

    @abc.abstractmethod
    def prefill(self, inputs: Inputs, vision: Any) -> tuple[Tensor, Any]:
        """Return the logits of the first token of the answer, (V,), and a state for `step`."""

    @abc.abstractmethod
    def step(self, token: int, state: Any) -> Tensor:
        """Append a token to the answer and return the logits of the next, (V,)."""

    @abc.abstractmethod
    def gflop(self, plan: Plan, inputs: Inputs, new_tokens: int) -> float:
        """Return the 10⁹ floating-point operations of an answer of `new_tokens` tokens.

        A multiplication and an addition count as two. Vision, prefill, decoding and output head are
        in; embeddings, norms and activations are not.
        """

    @abc.abstractmethod
    def decode(self, tokens: tuple[int, ...]) -> str:
        """Return the text of ids, without special tokens."""


def generate(  # noqa: PLR0913 - what an answer is made of
    backbone: Backbone,
    inputs: Inputs,
    plan: Plan,
    *,
    max_new_tokens: int,
    clock: Clock,
    vision: Any = None,
    vision_ms: float = 0.0,
) -> Answer:
    """Answer greedily, with a cache, the whole answer by one plan.

    Args:
        backbone: the network.
        inputs: of the plan's tier.
        plan: how.
        max_new_tokens: the answer is cut after so many.
        clock: for the times.
        vision: what `Backbone.encode` gave for these inputs, which is then not computed again.
        vision_ms: what that took.
    """
    if vision is None:
        start = clock.now()
        vision = backbone.encode(inputs)
        vision_ms = clock.since(start)
    with backbone.apply(plan), torch.inference_mode():
        start = clock.now()
        logits, state = backbone.prefill(inputs, vision)
        tokens = [int(logits.argmax())]
        prefill_ms = clock.since(start)
        start = clock.now()
        tokens.extend(_rest(backbone, tokens[0], state, max_new_tokens - 1))
        decode_ms = clock.since(start) if len(tokens) > 1 else 0.0
    timings = Timings(vision_ms, prefill_ms, decode_ms, len(tokens))
    return Answer(backbone.decode(tuple(tokens)), tuple(tokens), timings)


def _rest(backbone: Backbone, token: int, state: Any, most: int) -> Iterator[int]:
    for _ in range(most):
        if token in backbone.end_tokens:
            return
        token = int(backbone.step(token, state).argmax())
        yield token
