"""Measures a network before a controller is trained on it: blocks, plans, latency, overhead."""

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moectl.controller.execution import Execution
from moectl.controller.executor import Executor
from moectl.controller.history import EXECUTIONS, Kept
from moectl.controller.importance import (
    Removal,
    beam_search,
    order_of,
    spearman,
    write_importance,
)
from moectl.controller.influence import block_influence, divergences
from moectl.controller.latency import Estimator, fit
from moectl.controller.model import Scores
from moectl.controller.overhead import overhead
from moectl.controller.plans import Plan, Space
from moectl.controller.policy import draw, plans
from moectl.controller.records import record
from moectl.controller.report import report
from moectl.controller.table import build
from moectl.controller.world import (
    Tables,
    importance_of,
    open_environments,
    pinned,
    require_same,
    sources_of,
)
from moectl.engine.errors import Interrupted, UserError
from moectl.engine.files import read_json, write_json, write_text
from moectl.engine.run import Run
from moectl.engine.seeding import key

log = logging.getLogger(__name__)


class Profiler:
    """Answers of one network to some questions; each is written down at once, and never repeated.

    Args:
        run: whose folder takes the files.
    """

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings = run, run.settings
        settings = pinned(run.settings, run.record.get("world", {})).model_copy(
            update={
                "latency": self.settings.latency.model_copy(
                    update={"repeats": self.settings.profile.repeats}
                ),
            }
        )
        opened, self.facts = open_environments(settings, run.device, ("val",))
        require_same(run, self.facts)
        self.inner = opened["val"]
        self.environment = Kept(self.inner, run.folder / EXECUTIONS)
        self.space: Space = self.inner.space
        # More of them would be questions that a training evaluates on.
        self.rows = range(min(run.settings.profile.samples, len(self.inner.ids)))
        if len(self.rows) < run.settings.profile.samples:
            log.warning("%d questions, as many as there are to validate on", len(self.rows))

    def answer(self, row: int, plan: Plan) -> Execution:
        """Answer question number `row` by a plan, unless the run was asked to stop."""
        self.pause()
        return self.environment.execute(row, plan)

    def pause(self) -> None:
        """Stop if the run was asked to.

        Raises:
            Interrupted: with all answers so far kept.
        """
        if self.run.stop:
            raise Interrupted(self.run.stop.reason, f"--resume {self.run.folder} goes on from here")

    def accuracy(self, plan: Plan, rows: Sequence[int]) -> float:
        """Return the mean accuracy of a plan over some questions."""
        return statistics.fmean(self.answer(row, plan).accuracy for row in rows)


def run_profile(run: Run[Any]) -> dict[str, Any]:
    """Measure what the settings ask for, and write the tables into the run's folder.

    Returns:
        The document of all parts.

    Raises:
        UserError: if a part cannot be measured on this network.
    """
    if run.accelerator.num_processes > 1:
        raise UserError(
            "controller profile runs in one process: several would disturb each other's times",
            "start it without a launcher",
        )
    profiler, settings = Profiler(run), run.settings
    _check(profiler)
    run.note(world=profiler.facts, parents=sources_of(str(profiler.facts["model"]), Tables()))
    wanted = settings.profile.what
    document: dict[str, Any] = {"folder": str(run.folder), **profiler.facts}
    if "overhead" in wanted:
        document["overhead"] = _overhead(profiler)
    order = _importance(profiler, document) if "importance" in wanted else _known_order(profiler)
    estimator = None
    if "latency" in wanted:
        estimator = _latency(profiler, document)
    if "grid" in wanted:
        _grid(profiler, order, estimator, document)
    write_json(run.folder / "profile.json", document)
    report(run.folder)
    return document


def _check(profiler: Profiler) -> None:
    """Refuse now what would fail after hours."""
    section, space = profiler.settings.profile, profiler.space
    if "grid" in section.what:
        grid_plans(space, range(space.blocks), section.top_ks)
        if profiler.settings.latency.source == "table" and "latency" not in section.what:
            raise UserError(
                "latency.source = table: the grid needs fitted latencies", "--what latency,grid"
            )
    simulated = not isinstance(profiler.inner, Executor)
    if "importance" in section.what and section.method != "drop" and simulated:
        raise UserError(
            f"profile.method = {section.method} needs a network, and the simulation has none"
        )


def _overhead(profiler: Profiler) -> dict[str, float]:
    """Return what the controller takes, as it was first measured."""
    path = profiler.run.folder / "overhead.json"
    if not path.is_file():
        write_json(path, overhead(profiler.inner, profiler.settings))
    found: dict[str, float] = read_json(path)
    return found


def _known_order(profiler: Profiler) -> tuple[int, ...]:
    settings = profiler.settings
    model = str(profiler.facts["model"])
    return importance_of(settings, profiler.space, Tables(), model)[1]


def without(space: Space, removed: frozenset[int]) -> Plan:
    """Return the full plan without some blocks."""
    active = tuple(block not in removed for block in range(space.blocks))
    return replace(space.full, active=active)


def _importance(profiler: Profiler, document: dict[str, Any]) -> tuple[int, ...]:
    """Score the blocks, search sets of them, and return all blocks, those to keep first."""
    space, section = profiler.space, profiler.settings.profile
    halves = [rows for rows in (profiler.rows[::2], profiler.rows[1::2]) if rows]
    by_half, sizes = [_scores(profiler, rows) for rows in halves], list(map(len, halves))
    scores = {
        block: statistics.fmean([part[block] for part in by_half], sizes) for block in by_half[0]
    }
    # A block that always runs is never left out: it counts as if all were lost without it.
    highest = max(scores.values(), default=0.0)
    scores.update(dict.fromkeys(space.always_on, max(highest, 1.0)))
    most = min(section.max_remove, space.blocks - space.min_active)
    beam: list[Removal] = []
    if most:
        beam = beam_search(
            lambda removed: profiler.accuracy(without(space, removed), profiler.rows),
            space.optional,
            beam=section.beam,
            max_remove=most,
        )
    agreement = spearman(*by_half) if len(by_half) > 1 else None
    meta = {
        "model": profiler.facts["model"], "samples": len(profiler.rows), "split": "val",
        "method": section.method, "not_measured": list(space.always_on),
        "spearman_of_halves": agreement,
    }  # fmt: skip
    write_importance(profiler.run.folder / "importance.json", scores, meta, beam)
    order = tuple(order_of(scores, space.always_on))
    document["importance"] = {
        "scores": {str(block): score for block, score in sorted(scores.items())},
        "order": list(order),
        "beam": [removal._asdict() for removal in beam],
        **meta,
    }
    return order


def _scores(profiler: Profiler, rows: Sequence[int]) -> dict[int, float]:
    """Return the score of every block that may be skipped, over some questions."""
    # One question after the other: its image is then encoded once.
    found = [_question_scores(profiler, row) for row in rows]
    means = [statistics.fmean(values) for values in zip(*found, strict=True)]
    return dict(zip(profiler.space.optional, means, strict=True))


def _question_scores(profiler: Profiler, row: int) -> list[float]:
    """Return the score of every block that may be skipped, by one question."""
    space, method = profiler.space, profiler.settings.profile.method
    plans = [without(space, frozenset({block})) for block in space.optional]
    if method == "drop":
        full = profiler.answer(row, space.full).accuracy
        return [full - profiler.answer(row, plan).accuracy for plan in plans]
    profiler.pause()
    assert isinstance(profiler.inner, Executor), "checked"
    inputs, vision, _ = profiler.inner.encode(row, space.full.tier)
    if method == "kl":
        return divergences(profiler.inner.backbone, inputs, vision, plans)
    turned = block_influence(profiler.inner.backbone, inputs, vision)
    return [turned[block] for block in space.optional]


def _latency(profiler: Profiler, document: dict[str, Any]) -> Estimator:
    """Fit latency to random plans."""
    space, count = profiler.space, profiler.settings.profile.plans
    seed = profiler.settings.train.seed
    records = []
    for number, plan in enumerate(random_plans(space, count, seed)):
        row = number % len(profiler.rows)
        records.append(record(profiler.inner.ids[row], plan, profiler.answer(row, plan)))
    estimator = fit(records, space.blocks)
    write_json(profiler.run.folder / "latency.json", estimator.plain())
    document["latency"] = {
        name: {"r2": stage.r2, "mape": stage.mape, "samples": stage.samples}
        for name, stage in estimator.stages.items()
    }
    return estimator


def random_plans(space: Space, count: int, seed: int) -> list[Plan]:
    """Return plans with every part drawn evenly: tier, number of blocks, blocks, experts."""
    even = Scores(
        torch.zeros(count, len(space.tiers)),
        torch.zeros(count, len(space.counts)),
        torch.zeros(count, len(space.optional)),
        torch.zeros(count, space.blocks, max(1, len(space.top_k_choices))),
    )
    generator = torch.Generator().manual_seed(key(seed, "random plans"))
    return plans(draw(even, generator), space)


def _grid(
    profiler: Profiler,
    order: Sequence[int],
    estimator: Estimator | None,
    document: dict[str, Any],
) -> None:
    """Answer all questions by every plan of the grid, and write records and lookup table."""
    space, latency = profiler.space, profiler.settings.latency
    grid = grid_plans(space, order, profiler.settings.profile.top_ks)
    found = []
    for row in profiler.rows:
        # Another order for each question: what drifts on the machine must not favour a plan.
        shuffle = torch.Generator().manual_seed(key(profiler.settings.train.seed, "grid", row))
        for place in torch.randperm(len(grid), generator=shuffle).tolist():
            execution = profiler.answer(row, grid[place])
            times = execution.timings
            if latency.source == "table" and estimator is not None:
                tokens = execution.vision_tokens + execution.text_tokens
                times = estimator.timings(grid[place], execution.crops, tokens, times.new_tokens)
            found.append(
                record(profiler.inner.ids[row], grid[place], replace(execution, timings=times))
            )
    lines = "".join(f"{json.dumps(values, allow_nan=False)}\n" for values in found)
    write_text(profiler.run.folder / "grid.jsonl", lines)
    table = build(found, latency.objective, latency.source)
    typical = statistics.fmean(values["output_tokens"] for values in found)
    table.metadata.update(model=profiler.facts["model"], order=list(order), new_tokens=typical)
    write_json(profiler.run.folder / "lut.json", table.plain())
    document["grid"] = {
        "plans": len(grid), "questions": len(profiler.rows), "budgets": list(table.budget_range()),
    }  # fmt: skip


def grid_plans(space: Space, order: Sequence[int], top_ks: Sequence[int] = ()) -> list[Plan]:
    """Return all plans with one number of experts, and the blocks that matter most.

    Args:
        space: of the network.
        order: all blocks, those to keep first.
        top_ks: numbers of experts; smallest, middle and largest if not given.

    Raises:
        UserError: if the network does not have one of them.
    """
    choices = space.top_k_choices
    if strange := [number for number in top_ks if number not in choices]:
        raise UserError(f"profile.top_ks: {strange[0]}: expected some of {choices}")
    if not top_ks:
        top_ks = sorted({choices[0], choices[len(choices) // 2], choices[-1]}) if choices else (0,)
    found = []
    for tier in space.tiers:
        for top_k in top_ks:
            for count in space.counts:
                runs = set(order[:count])
                active = tuple(block in runs for block in range(space.blocks))
                found.append(Plan(tier.name, active, space.uniform(top_k)))
    return found
