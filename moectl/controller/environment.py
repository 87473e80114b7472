"""What a controller acts on: questions that can be answered by any plan.

Letters: N questions, D width of a feature.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moectl.controller.execution import Execution
from moectl.controller.plans import Plan, Space
from moectl.engine.sources import Chunk


class Features(NamedTuple):
    """What the controller sees of the questions."""

    vision: Tensor
    """(N, D)."""
    text: Tensor
    """(N, D), of another D."""


class Environment(Protocol):
    """Questions and a network, or a simulation of both."""

    space: Space
    ids: list[str]
    """One for each question."""

    def features(self) -> Features:
        """Return the features of all questions."""

    def execute(self, row: int, plan: Plan) -> Execution:
        """Answer question number `row` by a plan."""


class Remembered:
    """An environment that never answers a question twice by the same plan.

    Args:
        inner: answers what is new.
        known: answers by (id of the question, key of the plan).
    """

    def __init__(
        self, inner: Environment, known: Mapping[tuple[str, str], Execution] | None = None
    ) -> None:
        self.inner, self.space, self.ids = inner, inner.space, inner.ids
        self.known = dict(known or {})
        self.asked = self.answered = 0
        """Executions asked for, and those that were really made."""
        self._features: Features | None = None

    def features(self) -> Features:
        """Return the features of all questions, computed once."""
        if self._features is None:
            self._features = self.inner.features()
        return self._features

    def execute(self, row: int, plan: Plan) -> Execution:
        """Answer question number `row` by a plan, or recall how that went."""
        place = (self.ids[row], plan.key())
        self.asked += 1
        if place not in self.known:
            self.answered += 1
            self.known[place] = self.inner.execute(row, plan)
        return self.known[place]


class Rows:
    """Numbers of questions, for the training loop.

    Args:
        count: N.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batches(
        self,
        chunks: Iterator[Chunk],
        seed: int,  # noqa: ARG002 - of a source's transforms, of which there are none
        device: torch.device,  # noqa: ARG002
    ) -> Iterator[Tensor]:
        """Yield the questions of each chunk, (B,), on the CPU."""
        for chunk in chunks:
            yield chunk.rows

    def ordered(
        self, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers of questions in their order, twice."""
        for part in torch.split(torch.arange(self.count)[rank::world], batch_size):
            yield part.to(device), part.to(device)
