"""A question about an image, and the order in which questions are taken."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from moectl.controller.scores import Metric
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

Role = Literal["val", "train", "test"]
"""What questions are for."""

CAPTION = "Describe the image."
"""What is asked where a caption is wanted."""


@dataclass(frozen=True)
class Sample:
    """A question about an image, with the answers that people gave."""

    id: str
    """Unique, with the name of the data set: text_vqa/34602."""
    image_id: str
    """The same for every question about an image, in all data sets that hold it."""
    question: str
    answers: tuple[str, ...]
    """Or captions; never empty."""
    dataset: str
    """Which sets the prompt: text_vqa, coco_2014_vqa, okvqa, coco_caption, or vqa."""
    metric: Metric
    open: Callable[[], "Image"]
    """Read the image, as RGB."""


Pool = Callable[[Role], Iterator[Sample]]
"""Gives the questions that may play a role, from the first, in an order that never changes."""


def shuffled(items: Sequence[T], *coordinates: int | str) -> list[T]:
    """Return items in an order that is random, and the same for the same coordinates."""
    generator = torch.Generator().manual_seed(key(*coordinates))
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]
