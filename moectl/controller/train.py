"""Training of the controller: group-relative policy optimisation on answers of a frozen network.

Letters: B questions of a step on this process, G plans of each, P = B x G.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moectl.controller.environment import Rows
from moectl.controller.history import (
    EXECUTIONS,
    TRAINING,
    VALIDATION,
    Executions,
    keep_until,
)
from moectl.controller.ledger import Ledger
from moectl.controller.model import Policy
from moectl.controller.objective import Objective
from moectl.controller.report import report
from moectl.controller.rollout import Player, Rollout
from moectl.controller.schedule import Plateau
from moectl.controller.settings import ControllerSettings
from moectl.controller.start import begin
from moectl.controller.weights import FIRST, open_policy, save_policy
from moectl.controller.world import World, open_world, require_same, sources_of
from moectl.engine.launch import agree
from moectl.engine.loop import Loop, Step
from moectl.engine.optim import build_optimizer
from moectl.engine.run import Run
from moectl.engine.seeding import key, seed_all

log = logging.getLogger(__name__)


def train(settings: ControllerSettings, run: Run[ControllerSettings]) -> None:
    """Train the controller, validate it after every epoch, and write weights and the report.

    Args:
        settings: of the run.
        run: the run.
    """
    world = _open(run)
    seed, section = settings.train.seed, settings.grpo
    policy, arguments = _begin(run, world)
    optimizer = build_optimizer(settings.optim, policy.parameters())
    plateau = Plateau(section.plateau_factor, section.plateau_patience)
    questions = Rows(len(world.splits["train"].ids))
    loop = run.loop(policy, questions, optimizer, plateau.factor, "val/reward_mean")
    val_ids = world.splits["val"].ids
    budgets = draw_budgets(seed, 0, val_ids, world.budgets, "validation")
    player, judge = (
        Player(policy, world.splits[split], world.pricing, world.fixed)
        for split in ("train", "val")
    )
    ledger = Ledger(loop, judge, budgets, plateau, arguments)
    loop.track(plateau=plateau, tally=ledger.tally)
    reference = _reference(run) if section.kl_coef else None
    _recall(loop, world)
    _introduce(run, world, policy)
    loop.rehearse(lambda: judge.decide(torch.arange(1), budgets[:1]))

    for step in loop:
        rollout = _roll_out(loop, step, player, world)
        objective = Objective(section, player, rollout, reference)
        for _ in range(section.inner_iterations - 1):
            _move(loop, step, objective)
        _seed_dropout(loop, step)
        loss, entropy = objective(loop.model.train())
        step.update(loss, **entropy)
        ledger.record(step, objective)
        if step.ends_epoch:
            ledger.end_epoch(step)

    _finish(loop)


def _open(run: Run[ControllerSettings]) -> World:
    """Open the world, and write down what it is; a resumed run goes on in that of its beginning."""
    known = run.record.get("world")
    world = open_world(run.settings, run.device, ("train", "val"), known)
    require_same(run, world.facts)
    # Each process may have timed the network by itself: the first one's budgets are those of all.
    facts = agree(run.accelerator, lambda: known or world.facts)
    run.note(world=facts)
    if not known:
        run.note(parents=sources_of(str(facts["model"]), world.tables))
    low, high = facts["budgets"]
    return replace(world, facts=facts, budgets=(low, high), order=tuple(facts["order"]))


def _begin(run: Run[ControllerSettings], world: World) -> tuple[Policy, dict[str, Any]]:
    """Return the policy that training begins with, and what builds it; write it at first."""
    path = run.folder / FIRST
    if agree(run.accelerator, path.with_name(f"{FIRST}.json").exists):  # written after the weights
        policy, facts = open_policy(path)
        return policy, facts["arguments"]
    policy, arguments = begin(run.settings, world)
    save_policy(run, FIRST, policy, arguments, world.space, epoch=0)
    return policy, arguments


def _reference(run: Run[ControllerSettings]) -> Policy:
    """Return the policy that training began with: after resume the trained one has moved on."""
    return open_policy(run.folder / FIRST)[0].to(run.device).requires_grad_(requires_grad=False)


def draw_budgets(
    seed: int, epoch: int, ids: Sequence[str], limits: tuple[float, float], purpose: str
) -> Tensor:
    """Draw the budget of each question in an epoch, a function of the arguments alone.

    Args:
        seed: of the run.
        epoch: counted from 1 in training, 0 for validation.
        ids: of B questions; neither their order nor their company matters.
        limits: lowest and highest budget, between which all are equally probable.
        purpose: keeps draws for different ends apart.

    Returns:
        (B,) float32.
    """
    low, high = limits
    drawn = []
    for name in ids:
        generator = torch.Generator().manual_seed(key(seed, purpose, epoch, name))
        drawn.append(low + (high - low) * torch.rand((), generator=generator))
    return torch.stack(drawn)


def _roll_out(loop: Loop, step: Step, player: Player, world: World) -> Rollout:
    """Draw plans for the questions of a step, and answer by them."""
    settings, ids = loop.run.settings, world.splits["train"].ids
    rows, seed = step.batch, settings.train.seed
    names = [ids[row] for row in rows.tolist()]
    return player.roll_out(
        rows,
        draw_budgets(seed, step.epoch + 1, names, world.budgets, "training"),
        settings.grpo.group_size,
        [key(seed, "plans", step.epoch, name) for name in names],
        settings.grpo.scale_rewards,
    )


def _seed_dropout(loop: Loop, step: Step) -> None:
    """The same dropout in every inner iteration: ratios then compare weights alone."""
    seed_all(loop.settings.seed, "dropout", step.index, int(step.slots[0]))


def _move(loop: Loop, step: Step, objective: Objective) -> None:
    """Make one more update from the same answers."""
    _seed_dropout(loop, step)
    loss, _ = objective(loop.model.train())
    loop.accelerator.backward(loss * (step.share * loop.accelerator.num_processes))
    if limit := loop.run.settings.optim.clip_norm:
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), limit)
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def _recall(loop: Loop, world: World) -> None:
    """Take up the executions of an earlier sitting: what was answered is not asked again.

    What it wrote after its last checkpoint is recalled as well, and written again in its place.
    """
    folder = loop.run.folder
    executions = Executions(folder / EXECUTIONS)
    known = executions.known()
    for environment in world.splits.values():
        environment.known.update(known)
    loop.accelerator.wait_for_everyone()
    if loop.run.is_main:
        executions.keep_until(loop.update)
        for name in (TRAINING, VALIDATION):
            keep_until(folder / name, loop.epoch)


def _introduce(run: Run[Any], world: World, policy: Policy) -> None:
    sizes = [
        sum(weights.numel() for weights in part.parameters()) / 1e6
        for part in (policy.controller, policy.budget_encoder)
    ]
    low, high = world.budgets
    log.info(
        "%s: %s; %s; controller %.2fM, budget encoder %.2fM parameters; %.3g plans; budgets %.4g to"
        " %.4g %s; %d questions, %d to validate",
        run.folder, world.facts["model"], run.device, *sizes, world.space.size, low, high,
        world.pricing.unit, *(len(world.splits[split].ids) for split in ("train", "val")),
    )  # fmt: skip
    log.info(
        "the loss is near 0 by construction: watch reward, entropy and the norm of the gradient"
    )


def _finish(loop: Loop) -> None:
    run = loop.run
    rows = [row for row in loop.metrics.rows() if row.get("val/reward_mean")]
    names = ("reward_mean", "accuracy_mean", "latency_mean", "budget_violation_rate")
    best = max(rows, key=lambda row: float(row["val/reward_mean"]))
    scores = {
        kind: {"epoch": int(row["epoch"]), **{name: float(row[f"val/{name}"]) for name in names}}
        for kind, row in (("last", rows[-1]), ("best", best))
    }
    run.note(scores=scores, wall_seconds=round(run.elapsed_seconds, 3))
    if run.is_main:
        report(run.folder)
    log.info(
        "best validation reward %.4f at epoch %d", scores["best"]["reward_mean"],
        scores["best"]["epoch"],
    )  # fmt: skip
