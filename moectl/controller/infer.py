"""Answers questions within a budget: plan, answer, predicted and measured latency."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moectl.controller.backbone import Backbone, View, generate
from moectl.controller.environment import Features
from moectl.controller.execution import Timings
from moectl.controller.guard import expected_accuracy, fit_budget
from moectl.controller.latency import margin
from moectl.controller.open import open_backbone
from moectl.controller.plans import Plan, plan_from
from moectl.controller.policy import decide, plans
from moectl.controller.timing import Clock
from moectl.controller.weights import open_policy
from moectl.controller.world import Tables, find_model, read_tables
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.files import read_json
from moectl.engine.images import read_image
from moectl.engine.references import find_weights, split_reference
from moectl.engine.run import read_record

log = logging.getLogger(__name__)

_LONGEST = 128  # tokens of an answer


@dataclass(frozen=True)
class Question:
    """What is asked, within which budget."""

    image: Path
    question: str
    budget: float


class Answerer:
    """A network with what chooses its plans: a trained controller, a lookup table, or one plan.

    Args:
        request: the command line.
        chooser: `controller`, `lut`, or a file with a plan.
        target: share of budgets that the guard may miss; 0 for no guard.

    Raises:
        UserError: if something that this needs is missing.
    """

    def __init__(self, request: Request, chooser: str, target: float) -> None:
        settings: Any = request.settings
        self.settings = settings
        world = read_record(request.folder).get("world", {}) if request.folder else {}
        device = torch.device("cpu" if request.cpu or not torch.cuda.is_available() else "cuda")
        model = world.get("model") or find_model(settings.backbone.model)
        if model == "sim":
            raise UserError(
                "the simulation answers no questions", "--run of a controller of a network"
            )
        section = settings.backbone
        self.backbone: Backbone = open_backbone(
            model, device=device, dtype=section.dtype, experts=section.experts
        )
        self.clock = Clock(device, settings.latency.clock)
        reference = settings.latency.tables or world.get("tables", "")
        self.tables: Tables = read_tables(reference, settings.latency)
        self.order = tuple(world.get("order", range(self.backbone.space.blocks)))
        self.chooser, self.target = chooser, target
        self.policy = None
        if chooser == "controller":
            name, tag = split_reference(request.run)
            weights = find_weights(f"{name}@{tag or 'best'}", request.room)
            self.policy = open_policy(weights)[0]
        elif chooser == "lut" and self.tables.lut is None:
            raise UserError(
                "there is no lookup table", "--tables of a run of moectl controller profile"
            )
        if target and (self.tables.estimator is None or self.tables.lut is None):
            raise UserError(
                "the guard needs a fitted latency and a lookup table",
                "--tables of a run of moectl controller profile",
            )

    def answer(self, asked: Question, *, compare: bool) -> dict[str, Any]:
        """Answer one question.

        Args:
            asked: the question.
            compare: answer by the full plan as well.
        """
        image = read_image(asked.image)
        start = self.clock.now()
        view = self.backbone.look(image)
        view_ms = self.clock.since(start)
        start = self.clock.now()
        plan = self._choose(asked, view)
        guarded = self._guard(plan, image, asked) if self.target else plan
        controller_ms = self.clock.since(start)
        found = {
            "image": str(asked.image), "question": asked.question, "budget": asked.budget,
            **self._run(guarded, image, asked, view, view_ms, controller_ms),
        }  # fmt: skip
        found["within_budget"] = found["latency"] <= asked.budget
        if guarded != plan:
            found["before_guard"] = plan.plain()
        if compare:
            full = self.backbone.space.full
            found["full"] = self._run(full, image, asked, view, view_ms, 0.0)
        return found

    def _choose(self, asked: Question, view: View) -> Plan:
        space = self.backbone.space
        if self.policy is not None:
            text = self.backbone.text_feature(asked.question).float().cpu()
            features = Features(view.feature.float().cpu()[None], text[None])
            with torch.inference_mode():
                scores = self.policy(*features, torch.tensor([asked.budget]))
            world = self.settings.policy.blocks in ("auto", "learned")
            optional = [block for block in self.order if block in space.optional]
            return plans(decide(scores), space, () if world else optional)[0]
        if self.chooser == "lut":
            table = self.tables.lut
            assert table is not None, "checked when this was opened"
            return table.plan(table.best(asked.budget), space, self.order)
        return read_plan(Path(self.chooser), self.backbone)

    def predict(self, plan: Plan, image: Any, asked: Question) -> Timings | None:
        """Return the times that the tables let expect; None without any."""
        if self.tables.estimator is None:
            return None
        inputs = self.backbone.prepare(image, asked.question, "vqa", plan.tier)
        known = self.tables.lut.metadata.get("new_tokens", 1) if self.tables.lut else 1
        return self.tables.estimator.timings(plan, inputs.crops, inputs.tokens, round(known))

    def _guard(self, plan: Plan, image: Any, asked: Question) -> Plan:
        assert self.tables.lut is not None, "checked when this was opened"
        assert self.tables.estimator is not None, "checked when this was opened"
        objective = self.settings.latency.objective
        try:
            kept = margin(self.tables.estimator.residuals[objective], self.target)
        except ValueError as error:
            raise UserError(f"--target-violation {self.target}: {error}") from None

        def predicted(plan: Plan) -> float:
            times = self.predict(plan, image, asked)
            assert times is not None, "there is an estimator"
            return times.latency(objective) + (self.tables.controller_ms or 0.0)

        space = self.backbone.space
        value = expected_accuracy(self.tables.lut, space)
        limit = asked.budget * (1 - kept)
        found = fit_budget(plan, limit, predicted, value, space, self.order)
        if predicted(found) > limit:
            log.warning(
                "no plan is predicted to stay within %g ms: the cheapest is run", asked.budget
            )
        return found

    def _run(
        self,
        plan: Plan,
        image: Any,
        asked: Question,
        view: View,
        view_ms: float,
        controller_ms: float,
    ) -> dict[str, Any]:
        inputs = self.backbone.prepare(image, asked.question, "vqa", plan.tier)
        start = self.clock.now()
        vision = self.backbone.encode(inputs, view)
        vision_ms = view_ms + self.clock.since(start)
        answer = generate(
            self.backbone, inputs, plan, clock=self.clock, vision=vision, vision_ms=vision_ms,
            max_new_tokens=self.settings.backbone.max_new_tokens or _LONGEST,
        )  # fmt: skip
        times = Timings(**{**asdict(answer.timings), "controller": controller_ms})
        expected = self.predict(plan, image, asked)
        objective = self.settings.latency.objective
        return {
            "answer": answer.text.strip(),
            "plan": plan.plain(),
            "latency": times.latency(objective),
            "measured": asdict(times),
            "predicted": asdict(expected) if expected else None,
            "gflop": self.backbone.gflop(plan, inputs, len(answer.tokens)),
            "vision_tokens": inputs.vision_tokens,
            "text_tokens": inputs.text_tokens,
        }


def read_plan(path: Path, backbone: Backbone) -> Plan:
    """Read a plan from a JSON file: `tier`, `blocks` and `top_k`.

    Raises:
        UserError: if it is none of this network.
    """
    values = read_json(path)
    try:
        return plan_from(values, backbone.space)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a plan ({type(error).__name__}: {error})",
            'expected {"tier": …, "blocks": […], "top_k": […]}',
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_questions(path: Path, budget: float | None) -> Iterator[Question]:
    """Read questions from a file of JSON lines: `image`, `question`, and perhaps `budget`.

    Raises:
        UserError: naming the line that is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            allowed = values.get("budget", budget)
            image = path.parent / values["image"]
            question = str(values["question"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: expected image and question ({error})"
            ) from None
        if not isinstance(allowed, int | float) or not allowed > 0:
            raise UserError(
                f"{path}, line {number}: no budget above 0", "--budget sets one for all"
            )
        yield Question(image, question, float(allowed))


def asked(
    image: Path | None, prompt: str, budget: float | None, questions: Path | None
) -> list[Question]:
    """Return what the command line asks.

    Raises:
        UserError: if it does not say what.
    """
    if questions is not None:
        if image is not None or prompt:
            raise UserError("--questions excludes --image and --prompt")
        found = list(read_questions(questions, budget))
        if not found:
            raise UserError(f"{questions}: holds no question")
        return found
    if image is None or not prompt or budget is None:
        raise UserError("expected --image, --prompt and --budget, or --questions FILE")
    return [Question(image, prompt, budget)]


def run_infer(
    request: Request, questions: Sequence[Question], chooser: str, target: float, *, compare: bool
) -> list[dict[str, Any]]:
    """Answer questions, one after another.

    Args:
        request: the command line.
        questions: what is asked.
        chooser: `controller`, `lut`, or a file with a plan.
        target: share of budgets that the guard may miss; 0 for no guard.
        compare: answer by the full plan as well.
    """
    answerer = Answerer(request, chooser, target)
    for _ in range(request.settings.latency.warmup):  # type: ignore[attr-defined]
        answerer.answer(questions[0], compare=compare)
    return [answerer.answer(asked, compare=compare) for asked in questions]


def shown(found: dict[str, Any]) -> str:
    """Return an answer as text for people: answer, plan, latency by stage."""
    plan = found["plan"]
    state = "within" if found["within_budget"] else "over"
    lines = [
        found["answer"],
        f"  plan      {plan['tier']}; {len(plan['blocks'])} blocks of {len(plan['top_k'])};"
        f" experts {_experts(plan)}",
        f"  latency   {found['latency']:.1f} ms, {state} the budget of {found['budget']:g} ms",
        _stages("measured", found["measured"]),
    ]
    if found["predicted"]:
        lines.append(_stages("predicted", found["predicted"]))
    if "before_guard" in found:
        before = found["before_guard"]
        lines.append(
            f"  guard     had to give up {before['tier']}; {len(before['blocks'])} blocks; experts"
            f" {_experts(before)}"
        )
    if full := found.get("full"):
        lines.append(
            f"  full plan {full['answer']!r} in {full['latency']:.1f} ms,"
            f" {full['gflop']:.2f} GFLOP, {full['vision_tokens']} image tokens; this plan"
            f" {found['gflop']:.2f} GFLOP, {found['vision_tokens']} image tokens"
        )
    return "\n".join(lines)


def _experts(plan: dict[str, Any]) -> str:
    used = sorted({plan["top_k"][block] for block in plan["blocks"]} - {0})
    return "none" if not used else str(used[0]) if len(used) == 1 else f"{used[0]} to {used[-1]}"


def _stages(name: str, times: dict[str, float]) -> str:
    parts = ", ".join(
        f"{stage} {times[stage]:.1f}" for stage in ("controller", "vision", "prefill", "decode")
    )
    return f"  {name:<9} {parts} ms; {times['new_tokens']} tokens"
