"""Answers questions for real: a network, images, scores.

Letters: N questions, D width of a feature.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from moectl.controller.backbone import Answer, Backbone, Inputs, View, generate
from moectl.controller.captions import Corpus
from moectl.controller.data import Sample
from moectl.controller.environment import Features
from moectl.controller.execution import Execution, Timings
from moectl.controller.plans import Plan
from moectl.controller.scores import score
from moectl.controller.timing import Clock
from moectl.engine.errors import UserError

log = logging.getLogger(__name__)

_LONG = {"text_vqa": 64, "coco_caption": 64}
_SHORT = 16


class _Open(NamedTuple):
    """A question whose image was encoded, as far as it was needed."""

    row: int
    image: Any
    view: View
    view_ms: float
    encoded: dict[str, tuple[Inputs, Any, float]]
    """By tier: inputs, what the text network sees of the image, milliseconds."""


class Executor:
    """Questions about images, answered by a network.

    An image is encoded once for each tier, however many plans answer about it; the view of the
    whole image once for all tiers. The time that this takes counts in every answer that needs it:
    that of the view in those tiers alone whose `encode` takes it over (`Backbone.reuses_view`).
    To read, tile and resize an image is not timed.

    Args:
        backbone: answers.
        samples: the questions, N.
        clock: for the times.
        max_new_tokens: longest answer; 0 for what suits the data set.
        repeats: times that every stage of an answer is timed; the median counts.
    """

    def __init__(
        self,
        backbone: Backbone,
        samples: Sequence[Sample],
        clock: Clock,
        *,
        max_new_tokens: int = 0,
        repeats: int = 1,
    ) -> None:
        self.backbone, self.samples, self.clock = backbone, samples, clock
        self.max_new_tokens, self.repeats = max_new_tokens, repeats
        self.space = backbone.space
        self.ids = [sample.id for sample in samples]
        self._corpus = _corpus(samples)
        self._opened: _Open | None = None

    def features(self) -> Features:
        """Return the features of all questions, (N, D) each, on the CPU."""
        vision, text = [], []
        for sample in self.samples:
            vision.append(self.backbone.look(sample.open()).feature.float().cpu())
            text.append(self.backbone.text_feature(sample.question).float().cpu())
        return Features(torch.stack(vision), torch.stack(text))

    def execute(self, row: int, plan: Plan) -> Execution:
        """Answer question number `row` by a plan."""
        sample = self.samples[row]
        inputs, vision, vision_ms = self.encode(row, plan.tier)
        most = self.max_new_tokens or longest(sample.dataset)
        answers = [
            generate(
                self.backbone,
                inputs,
                plan,
                max_new_tokens=most,
                clock=self.clock,
                vision=vision,
                vision_ms=vision_ms,
            )
            for _ in range(self.repeats)
        ]
        answer = answers[0]
        return Execution(
            answer.text,
            score(sample.metric, answer.text, sample.answers, self._corpus),
            _median(answers),
            self.backbone.gflop(plan, inputs, len(answer.tokens)),
            inputs.crops,
            inputs.vision_tokens,
            inputs.text_tokens,
        )

    def forget(self) -> None:
        """Drop the encoded image that is kept for the next answer."""
        self._opened = None

    def warm_up(self, times: int) -> None:
        """Answer the first question in every tier, for nothing: first calls are slow."""
        for tier in self.space.tiers:
            plan = replace(self.space.full, tier=tier.name)
            for _ in range(times):
                self.forget()
                self.execute(0, plan)
        self.forget()

    def encode(self, row: int, tier: str) -> tuple[Inputs, Any, float]:
        """Return inputs, what the text network sees of the image, and the milliseconds of that."""
        if self._opened is None or self._opened.row != row:
            image = self.samples[row].open()
            pixels = self.backbone.overview(image)
            view, view_ms = self._timed(lambda: self.backbone.glance(pixels))
            self._opened = _Open(row, image, view, view_ms, {})
        opened, sample = self._opened, self.samples[row]
        if tier not in opened.encoded:
            inputs = self.backbone.prepare(opened.image, sample.question, sample.dataset, tier)
            vision, vision_ms = self._timed(lambda: self.backbone.encode(inputs, opened.view))
            if self.backbone.reuses_view(tier):
                vision_ms += opened.view_ms
            opened.encoded[tier] = (inputs, vision, vision_ms)
        return opened.encoded[tier]

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Work as often as answers are timed; return the last result and the median time."""
        times = []
        for _ in range(self.repeats):
            start = self.clock.now()
            done = work()
            times.append(self.clock.since(start))
        return done, statistics.median(times)


def longest(dataset: str) -> int:
    """Return the tokens of the longest answer that suits a data set."""
    return _LONG.get(dataset, _SHORT)


def _corpus(samples: Sequence[Sample]) -> Corpus | None:
    """Return the captions that captions are compared with, by image; None if there are none."""
    captions: dict[str, list[str]] = {}
    for sample in samples:
        if sample.metric == "caption":
            captions.setdefault(sample.image_id, []).extend(sample.answers)
    if len(captions) == 1:
        raise UserError(
            "captions of 1 image: words are weighed by how many images have them",
            "ask for more samples",
        )
    return Corpus(captions) if captions else None


def _median(answers: Sequence[Answer]) -> Timings:
    times = [answer.timings for answer in answers]
    prefill = statistics.median(time.prefill for time in times)
    decode = statistics.median(time.decode for time in times)
    return replace(times[0], prefill=prefill, decode=decode)
