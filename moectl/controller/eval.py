"""What a trained controller is worth: under every budget, beside policies that are no learners.

Letters: N questions.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator

from moectl.controller.history import Kept
from moectl.controller.plans import Plan
from moectl.controller.report import draw_evaluation, evaluation_text, report_again
from moectl.controller.results import (
    Outcome,
    Outcomes,
    comparisons,
    pareto_of,
    results_of,
    write_results,
)
from moectl.controller.rewards import Pricing
from moectl.controller.rivals import (
    CONTROLLER,
    STEERED,
    TABLED,
    Scene,
    grid,
    oracle,
    plans_of,
)
from moectl.controller.rollout import Player
from moectl.controller.samples import shuffled
from moectl.controller.settings import Policy
from moectl.controller.timing import Clock, median_ms, open_clock
from moectl.controller.weights import open_policy, require_space
from moectl.controller.world import World, full_latency, open_world, warn_outside
from moectl.engine import console
from moectl.engine.command import Request
from moectl.engine.environment import device_name
from moectl.engine.errors import UserError
from moectl.engine.opened import Trained, accelerator_for
from moectl.engine.references import exact, find_weights
from moectl.engine.run import read_record

log = logging.getLogger(__name__)

SPLIT = "test"
_BUDGETS = 8  # over the range that was trained for


@dataclass(frozen=True)
class Opened(Trained):
    """A trained controller, and the questions that it is measured on."""

    world: World
    kept: Kept
    """Answers."""
    player: Player
    scene: Scene
    free: Pricing
    """Prices of policies that do not run the controller."""


def run_eval(request: Request) -> tuple[dict[str, Any], str]:
    """Measure a trained controller and its rivals, and write `evals/test@TAG/`.

    Where an evaluation was stopped, the same one goes on with the answers that it has.

    Args:
        request: the run, its weights, budgets and policies.

    Returns:
        The document, and its text.

    Raises:
        UserError: if the weights are of another network, or a policy lacks its table.
    """
    opened = open_trained(request)
    named = request.names("eval.policies")
    policies = policies_of(opened, named=named)
    opened.kept.file.path.parent.mkdir(exist_ok=True)
    document, outcomes = evaluate(opened, policies, budgets_of(opened))
    folder = opened.folder / "evals" / f"{SPLIT}@{opened.tag}"
    write_results(folder, document, outcomes if opened.settings.eval.save_predictions else {})
    draw_evaluation(folder, document)
    report_again(opened.folder)
    opened.kept.file.path.unlink(missing_ok=True)
    log.info("%s", folder)
    return document, evaluation_text(document)


def open_trained(request: Request) -> Opened:
    """Open the weights that a request names, the best ones unless it says which.

    Raises:
        UserError: if they do not fit the network, or several processes were started.
    """
    settings: Any = request.settings
    path = find_weights(exact(request.run, request.folder), "controller")
    policy, facts = open_policy(path)
    record = read_record(path.parent)
    accelerator = accelerator_for(settings.train, request.cpu, path.parent)
    if accelerator.num_processes > 1:
        raise UserError(
            "controller eval runs in one process: several would disturb each other's times",
            "start it without a launcher",
        )
    known = dict(record["world"])
    if request.names("latency.tables"):
        known["tables"] = settings.latency.tables
        del known["controller_ms"]  # other tables, another overhead
    world = open_world(settings, accelerator.device, (SPLIT,), known)
    _check(path, facts, world, record["world"])
    trained = replace(world, order=tuple(known["order"]))  # tables may be others than in training
    policy = policy.to(accelerator.device)
    kept = Kept(world.splits[SPLIT].inner, _unfinished(path.parent, settings, world, accelerator))
    if kept.known:
        log.info("%d answers of an evaluation that was stopped are taken over", len(kept.known))
    player = Player(policy, kept, world.pricing, trained.fixed)
    return Opened(
        settings=settings,
        accelerator=accelerator,
        facts=facts,
        folder=path.parent,
        tag=path.stem,
        weights={"file": path.name, "sha256": facts["sha256"], "epoch": facts["epoch"]},
        world=world,
        kept=kept,
        player=player,
        scene=_scene(settings, world, player),
        free=Pricing(settings, world.space, world.pricing.estimator, 0.0),
    )


def _unfinished(folder: Path, settings: Any, world: World, accelerator: Accelerator) -> Path:
    """Return the file of the answers so far; its name tells what they depend on."""
    weights = sorted(Path(world.facts["model"]).glob("*.safetensors"))  # none of a hub's name
    split = world.splits[SPLIT]
    samples = getattr(split.inner, "samples", [])
    parts = [
        # Drawn questions have the same ids whatever the seed; those of a file may be mended.
        [settings.train.seed, split.ids, [[one.question, one.answers] for one in samples]],
        settings.backbone.model_dump(mode="json"),
        settings.latency.model_dump(mode="json"),
        [world.facts["model"], device_name(accelerator.device)],
        [[one.name, one.stat().st_mtime_ns] for one in weights],
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return folder / f"evals/unfinished-{digest}.jsonl"


def _check(path: Path, facts: Mapping[str, Any], world: World, known: Mapping[str, Any]) -> None:
    require_space(path, facts, world.space, world.facts["model"])
    if known["unit"] != world.pricing.unit:
        raise UserError(
            f"{path}: was trained for budgets in {known['unit']}, latencies are in"
            f" {world.pricing.unit} here: other settings of latency.source"
        )


def _scene(settings: Any, world: World, player: Player) -> Scene:
    count, table = len(player.environment.ids), world.tables.lut

    def decide(budget: float) -> list[Plan]:
        return player.decide(torch.arange(count), torch.full((count,), budget))

    ids, seed = player.environment.ids, settings.train.seed
    return Scene(world.space, world.order, table, ids, seed, decide)


def policies_of(opened: Opened, *, named: bool) -> list[Policy]:
    """Return the policies to compare, the controller first.

    Args:
        opened: the controller.
        named: whether this very command asked for them: then none is left out.

    Raises:
        UserError: if one needs a lookup table that is not there.
    """
    wanted = opened.settings.eval.policies
    found: list[Policy] = [name for name in get_args(Policy) if name in (CONTROLLER, *wanted)]
    lacking = [name for name in found if name in TABLED and opened.scene.table is None]
    if lacking and named:
        raise UserError(
            f"eval.policies = {lacking[0]}: there is no lookup table",
            "--tables of a run of moectl controller profile --what grid",
        )
    if lacking:
        log.warning("without --tables there is no lookup table: %s left out", ", ".join(lacking))
    return [name for name in found if name not in lacking]


def budgets_of(opened: Opened) -> list[float]:
    """Return the budgets to measure under, from the smallest up."""
    section, (low, high) = opened.settings.eval, opened.world.budgets
    found = list(section.budgets)
    if section.budget_frac:
        full = full_latency(opened.free, opened.player.environment)
        found += [float(f"{share * full:.4g}") for share in section.budget_frac]
    if not found:
        step = (high - low) / (_BUDGETS - 1)
        found = [float(f"{low + number * step:.3g}") for number in range(_BUDGETS)]
    warn_outside(found, (low, high), opened.world.pricing.unit)
    return sorted(set(found))


def evaluate(
    opened: Opened, policies: Sequence[Policy], budgets: Sequence[float]
) -> tuple[dict[str, Any], Outcomes]:
    """Let every policy answer all questions under every budget.

    Returns:
        Plain values, and what came of each question.
    """
    world, settings = opened.world, opened.settings
    clock = open_clock(opened.accelerator.device, settings.latency.clock)
    outcomes = _outcomes(opened, policies, budgets)
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(opened.scene.ids):
        groups.setdefault(name.partition("/")[0], []).append(row)
    full = full_latency(opened.free, opened.player.environment)
    document: dict[str, Any] = {
        "run": str(opened.folder),
        "weights": opened.weights,
        "model": world.facts["model"],
        "split": SPLIT,
        "unit": world.pricing.unit,
        "latency": settings.latency.model_dump(),
        "device": device_name(opened.accelerator.device),
        "tables": world.facts["tables"],
        "trained_for": list(world.budgets),
        "full_latency": full,
        "decide_ms": decide_ms(opened, clock, budgets[0]),
        "controller_ms": world.pricing.controller_ms,
        "policies": list(policies),
        "budgets": list(budgets),
        "top_k_choices": list(world.space.top_k_choices),
        "counts": list(world.space.counts),
        "datasets": {},
    }
    samples = getattr(world.splits[SPLIT].inner, "samples", None)
    # Rows of the table are means over all data sets.
    rows = opened.scene.table.rows if opened.scene.table and len(groups) == 1 else ()
    for name, places in groups.items():
        part = {
            policy: {budget: [found[row] for row in places] for budget, found in each.items()}
            for policy, each in outcomes.items()
        }
        own = [samples[row] for row in places] if samples else []
        results = results_of(part, world.space, own, settings.eval.bootstrap)
        document["datasets"][name] = {
            "num_samples": len(places),
            "results": [
                {"dataset": name, "split": SPLIT, "num_samples": len(places), **result}
                for result in results
            ],
            "comparisons": comparisons(part, CONTROLLER, settings.eval.bootstrap),
            "pareto": pareto_of(results, rows, full),
        }
    return document, outcomes


def decide_ms(opened: Opened, clock: Clock, budget: float) -> float:
    """Return how long it takes to choose one plan, features at hand."""
    row, budgets = torch.arange(1), torch.full((1,), budget)
    return median_ms(clock, lambda: opened.player.decide(row, budgets))


def _outcomes(opened: Opened, policies: Sequence[Policy], budgets: Sequence[float]) -> Outcomes:
    scene, rows = opened.scene, range(len(opened.scene.ids))
    chosen: dict[Policy, dict[float, list[Plan]]] = {
        policy: {budget: plans_of(policy, budget, scene) for budget in budgets}
        for policy in policies
        if policy != "oracle_table"
    }
    tried = grid(scene) if "oracle_table" in policies else []
    parts = [plans for each in chosen.values() for plans in each.values()]
    _answer(opened, [[*(plans[row] for plans in parts), *tried] for row in rows])
    if tried:
        chosen["oracle_table"] = _oracle(opened, tried, budgets)
    return {
        policy: {
            budget: [_outcome(opened, policy, budget, row, plan) for row, plan in enumerate(plans)]
            for budget, plans in chosen[policy].items()
        }
        for policy in policies
    }


def _answer(opened: Opened, wanted: Sequence[Sequence[Plan]]) -> None:
    """Answer each question by its plans, so that its image is opened once.

    The order of the plans is another for each question: what drifts on the machine must not favour
    a policy.
    """
    environment, ids = opened.player.environment, opened.scene.ids
    distinct = [list({plan.key(): plan for plan in plans}.values()) for plans in wanted]
    log.info("%d questions, %d answers", len(ids), sum(map(len, distinct)))
    with console.progress(len(ids)) as bar:
        for row, plans in enumerate(distinct):
            for plan in shuffled(plans, opened.scene.seed, "order of plans", ids[row]):
                environment.execute(row, plan)
            bar.update(row + 1, "questions")


def _oracle(
    opened: Opened, tried: Sequence[Plan], budgets: Sequence[float]
) -> dict[float, list[Plan]]:
    """Return for each question the best of some plans that it was answered by."""
    found: dict[float, list[Plan]] = {budget: [] for budget in budgets}
    for row in range(len(opened.scene.ids)):
        answers = [opened.player.environment.execute(row, plan) for plan in tried]
        accuracies = [answer.accuracy for answer in answers]
        pairs = zip(tried, answers, strict=True)
        latencies = [opened.free.latency(plan, answer) for plan, answer in pairs]
        for budget, plans in found.items():
            plans.append(tried[oracle(accuracies, latencies, budget)])
    return found


def _outcome(opened: Opened, policy: Policy, budget: float, row: int, plan: Plan) -> Outcome:
    pricing = opened.world.pricing if policy in STEERED else opened.free
    execution = opened.player.environment.execute(row, plan)
    times = execution.timings
    if pricing.source == "table" and pricing.estimator is not None:
        tokens = execution.vision_tokens + execution.text_tokens
        times = pricing.estimator.timings(plan, execution.crops, tokens, times.new_tokens)
    times = replace(times, controller=pricing.controller_ms)
    _, _, rewards = pricing.price([plan], [execution], torch.tensor([budget]))
    latency = pricing.latency(plan, execution)
    return Outcome(opened.scene.ids[row], plan, execution, times, latency, float(rewards))
