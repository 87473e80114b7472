"""Answers questions within a budget: plan, answer, predicted and measured latency.

To read, tile and resize an image is no part of a latency, here as in training. The view of the
whole image is a part of `vision` where the network takes it over, and else of `controller`, if that
looked at it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moectl.controller.backbone import Backbone, Inputs, generate
from moectl.controller.execution import Timings
from moectl.controller.executor import longest
from moectl.controller.guard import expected_accuracy, fit_budget
from moectl.controller.latency import margin
from moectl.controller.open import open_backbone
from moectl.controller.plans import Plan, plan_from
from moectl.controller.policy import decide, plans
from moectl.controller.questions import Choice, Question
from moectl.controller.records import unit_of
from moectl.controller.timing import Clock, open_clock
from moectl.controller.weights import open_policy, require_space
from moectl.controller.world import (
    SIMULATED,
    Tables,
    check_tables,
    find_model,
    importance_of,
    pinned,
    read_tables,
    warn_outside,
)
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import read_json
from moectl.engine.images import read_image
from moectl.engine.references import exact, find_weights
from moectl.engine.run import read_record

log = logging.getLogger(__name__)

_PROFILE = "--tables of a run of moectl controller profile"


class _Asked:
    """A question whose image is open, and what is known of it so far."""

    def __init__(self, backbone: Backbone, clock: Clock, question: Question, style: str) -> None:
        self.question, self._backbone, self._clock, self._style = question, backbone, clock, style
        self._image = read_image(question.image)
        pixels = backbone.overview(self._image)
        start = clock.now()
        self.view = backbone.glance(pixels)
        self.view_ms = clock.since(start)
        self.prepare_ms = 0.0
        self._inputs: dict[str, Inputs] = {}

    def inputs(self, tier: str) -> Inputs:
        """Return the question and the image as a tier has them."""
        if tier not in self._inputs:
            start = self._clock.now()
            self._inputs[tier] = self._backbone.prepare(
                self._image, self.question.question, self._style, tier
            )
            self.prepare_ms += self._clock.since(start)
        return self._inputs[tier]


class Answerer:
    """A network with what chooses its plans: a trained controller, a lookup table, or one plan.

    Limit: predictions, and so the guard, take every answer to be as long as those of the tables
    are on average.

    Args:
        request: the command line.
        choice: what chooses the plans.

    Raises:
        UserError: if something that this needs is missing, or is of another network.
    """

    def __init__(self, request: Request, choice: Choice) -> None:
        world = read_record(request.folder).get("world", {}) if request.folder else {}
        self.settings: Any = pinned(request.settings, world)
        self.latency = self.settings.latency
        if self.settings.backbone.model == SIMULATED:
            raise UserError(
                "the simulation answers no questions", "--run of a controller of a network"
            )
        self.tables = _tables(request, choice, world)
        self._kept = self._margin(choice.target) if choice.target else None
        model = self._model(request)
        self.clock, self.backbone = self._open(model, request)
        space = self.backbone.space
        self.order: tuple[int, ...] = ()
        if self.tables.lut is not None:
            self.order = importance_of(self.settings, space, self.tables, model)[1]
        check_tables(self.tables, space, self.order)
        self.limits: list[float] = world.get("budgets", []) if choice.by == "controller" else []
        self._looks = choice.by == "controller"
        self.choose = self._chooser(request, choice, world)
        self.controller_ms = (self.tables.controller_ms or 0.0) if self._looks else 0.0
        data: tuple[str, ...] = self.settings.data.dataset if request.folder else ()
        self.style = data[0] if len(data) == 1 else "vqa"
        self.most = self.settings.backbone.max_new_tokens or longest(self.style)
        known = self.tables.lut.metadata if self.tables.lut else {}
        self.typical = round(known.get("new_tokens", self.most))

    @property
    def unit(self) -> str:
        """Of latencies and budgets."""
        return unit_of(self.latency.source)

    @property
    def _counts_work(self) -> bool:
        return self.unit != "ms"

    def _model(self, request: Request) -> str:
        """Return the network of the settings; without a run, that of the table."""
        table = self.tables.lut
        if request.folder is None and table is not None and not request.names("backbone.model"):
            return str(table.metadata.get("model", self.settings.backbone.model))
        return find_model(self.settings.backbone.model)

    def _open(self, model: str, request: Request) -> tuple[Clock, Backbone]:
        device = torch.device("cpu" if request.cpu or not torch.cuda.is_available() else "cuda")
        clock = open_clock(device, self.latency.clock)
        section = self.settings.backbone
        return clock, open_backbone(
            model, device=device, dtype=section.dtype, experts=section.experts
        )

    def _margin(self, target: float) -> float:
        """Return the share of a budget that the guard keeps free."""
        estimator = self.tables.estimator
        if self.tables.lut is None or (estimator is None and not self._counts_work):
            raise UserError("the guard needs a fitted latency and a lookup table", _PROFILE)
        if estimator is None or self._counts_work:
            return 0.0
        try:
            return margin(estimator.residuals[self.latency.objective], target)
        except ValueError as error:
            raise UserError(f"--target-violation {target}: {error}") from None

    def _chooser(
        self, request: Request, choice: Choice, world: dict[str, Any]
    ) -> Callable[[_Asked], Plan]:
        space, table = self.backbone.space, self.tables.lut
        if choice.plan is not None:
            plan = read_plan(choice.plan, self.backbone)
            return lambda _: plan
        if choice.by == "lut":
            assert table is not None, "checked when tables were read"
            return lambda asked: table.plan(table.best(asked.question.budget), space, self.order)
        # Before the unit: a run that failed early has neither weights nor that.
        path = find_weights(exact(request.run, request.folder), request.room)
        if (unit := world["unit"]) != self.unit:
            raise UserError(
                f"{request.folder}: was trained for budgets in {unit}, not {self.unit}: another"
                " setting of latency.source"
            )
        policy, facts = open_policy(path)
        require_space(path, facts, space, self.backbone.name)
        learned = self.settings.policy.blocks in ("auto", "learned")
        fixed = () if learned else [block for block in world["order"] if block in space.optional]

        def chosen(asked: _Asked) -> Plan:
            text = self.backbone.text_feature(asked.question.question).float().cpu()
            vision = asked.view.feature.float().cpu()
            with torch.inference_mode():
                scores = policy(vision[None], text[None], torch.tensor([asked.question.budget]))
            return plans(decide(scores), space, fixed)[0]

        return chosen

    def answer(self, question: Question, *, compare: bool = False, most: int = 0) -> dict[str, Any]:
        """Answer one question.

        Args:
            question: with its budget.
            compare: answer by the full plan as well.
            most: tokens after which answers are cut; 0 for those of the settings.
        """
        most = most or self.most
        asked = _Asked(self.backbone, self.clock, question, self.style)
        start = self.clock.now()
        plan = self.choose(asked)
        guarded = plan if self._kept is None else self._guard(plan, asked, self._kept)
        taken = self.clock.since(start) - asked.prepare_ms
        if self._looks and not self.backbone.reuses_view(guarded.tier):
            taken += asked.view_ms
        found: dict[str, Any] = {
            "image": str(question.image), "question": question.question,
            "budget": question.budget, "unit": self.unit,
            **self._run(guarded, asked, most, taken, self.controller_ms),
        }  # fmt: skip
        found["within_budget"] = found["latency"] <= question.budget
        if self._kept is not None:
            limit = question.budget * (1 - self._kept)
            fits = self._predicted(guarded, asked) <= limit
            found["guard"] = {"limit": limit, "fits": fits, "before": plan.plain()}
        if compare:
            found["full"] = self._run(self.backbone.space.full, asked, most, 0.0, 0.0)
        found["prepare_ms"] = asked.prepare_ms
        return found

    def predict(self, plan: Plan, asked: _Asked, controller_ms: float) -> Timings | None:
        """Return the times that the tables let expect; None without any."""
        if self.tables.estimator is None:
            return None
        inputs = asked.inputs(plan.tier)
        times = self.tables.estimator.timings(plan, inputs.crops, inputs.tokens, self.typical)
        return replace(times, controller=controller_ms)

    def _predicted(self, plan: Plan, asked: _Asked) -> float:
        """Return what is expected to be held against the budget."""
        if self._counts_work:
            return self.backbone.gflop(plan, asked.inputs(plan.tier), self.typical)
        times = self.predict(plan, asked, self.controller_ms)
        assert times is not None, "checked with the margin"
        return times.latency(self.latency.objective)

    def _guard(self, plan: Plan, asked: _Asked, kept: float) -> Plan:
        assert self.tables.lut is not None, "checked with the margin"
        space, limit = self.backbone.space, asked.question.budget * (1 - kept)
        value = expected_accuracy(self.tables.lut, space)
        return fit_budget(
            plan, limit, lambda one: self._predicted(one, asked), value, space, self.order
        )

    def _run(
        self, plan: Plan, asked: _Asked, most: int, controller_ms: float, expected_ms: float
    ) -> dict[str, Any]:
        inputs = asked.inputs(plan.tier)
        start = self.clock.now()
        vision = self.backbone.encode(inputs, asked.view)
        vision_ms = self.clock.since(start)
        if self.backbone.reuses_view(plan.tier):
            vision_ms += asked.view_ms
        answer = generate(
            self.backbone, inputs, plan, max_new_tokens=most, clock=self.clock, vision=vision,
            vision_ms=vision_ms,
        )  # fmt: skip
        times = replace(answer.timings, controller=controller_ms)
        expected = self.predict(plan, asked, expected_ms)
        gflop = self.backbone.gflop(plan, inputs, len(answer.tokens))
        return {
            "answer": answer.text.strip(),
            "plan": plan.plain(),
            "latency": gflop if self._counts_work else times.latency(self.latency.objective),
            "measured": asdict(times),
            "predicted": asdict(expected) if expected else None,
            "gflop": gflop,
            "vision_tokens": inputs.vision_tokens,
            "text_tokens": inputs.text_tokens,
        }


def _tables(request: Request, choice: Choice, world: dict[str, Any]) -> Tables:
    """Read the tables of the command line, else those of the training.

    Where these are gone, the controller does without. A lookup table is needed: without tables of
    either kind it is that of the newest profile.
    """
    latency: Any = request.settings.latency  # type: ignore[attr-defined]
    given = request.names("latency.tables")
    if given or choice.by == "lut":
        known = "" if given else world.get("tables", "")
        tables = read_tables(known or latency.tables or "latest", latency)
        if choice.by == "lut" and tables.lut is None:
            raise UserError("there is no lookup table", f"{_PROFILE} --what grid")
        return tables
    try:
        return read_tables(world.get("tables", ""), latency)
    except UserError as error:
        log.warning("%s: no latency is predicted", error.message)
        return Tables()


def read_plan(path: Path, backbone: Backbone) -> Plan:
    """Read a plan from a JSON file: `tier`, `blocks` and `top_k`.

    Raises:
        UserError: if it is none of this network.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a plan", 'expected {"tier": …, "blocks": […], "top_k": […]}')
    try:
        return plan_from(values, backbone.space)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def run_infer(
    request: Request, questions: Sequence[Question], choice: Choice, *, compare: bool = False
) -> list[dict[str, Any]]:
    """Answer questions, one after another.

    Args:
        request: the command line.
        questions: what is asked.
        choice: what chooses the plans.
        compare: answer by the full plan as well.
    """
    answerer = Answerer(request, choice)
    if limits := answerer.limits:
        budgets = [question.budget for question in questions]
        warn_outside(budgets, (limits[0], limits[1]), answerer.unit)
    for _ in range(answerer.latency.warmup):
        answerer.answer(questions[0], compare=compare, most=2)  # first calls are slow
    found = []
    with console.progress(len(questions)) as bar:
        for number, question in enumerate(questions, 1):
            found.append(answerer.answer(question, compare=compare))
            bar.update(number, "")
    return found
