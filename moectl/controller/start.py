"""How a policy begins: new weights, those of a file, scores of importance, or the lookup table."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.controller.clone import clone
from moectl.controller.environment import Features
from moectl.controller.model import Policy, build
from moectl.controller.plans import Space
from moectl.controller.world import World
from moectl.engine.artefact import load
from moectl.engine.errors import UserError
from moectl.engine.seeding import seed_all

log = logging.getLogger(__name__)

KEYS = {
    "controller": ("one_stage_controller_state_dict", "model_state_dict"),
    "budget_encoder": ("budget_encoder_state_dict",),
}
"""Names under which weights files hold the parts of a policy."""


def arguments_of(settings: Any, space: Space, features: Features) -> dict[str, Any]:
    """Return what builds the policy of these settings and of this network."""
    section = settings.policy
    return {
        "budget_encoder": {
            "width": section.budget_dim,
            "low": section.budget_low,
            "high": section.budget_high,
            "scale": section.budget_scale,
            "sinusoidal": section.sinusoidal,
        },
        "controller": {
            "vision": features.vision.shape[1],
            "language": features.text.shape[1],
            "budget": section.budget_dim,
            "tiers": len(space.tiers),
            "counts": len(space.counts),
            "optional": len(space.optional),
            "blocks": 1 if section.top_k == "shared" else space.blocks,
            "choices": max(1, len(space.top_k_choices)),
            "hidden": section.hidden,
            "dropout": section.dropout,
        },
    }


def begin(settings: Any, world: World) -> tuple[Policy, dict[str, Any]]:
    """Return a policy as training begins with it, on the CPU, and what builds it.

    Raises:
        UserError: if a file of weights is of another network, or there is no table to copy.
    """
    features = world.splits["train"].features()
    arguments = arguments_of(settings, world.space, features)
    _warn(settings.policy, world)
    seed_all(settings.train.seed, "init")
    policy = build(arguments)
    policy.controller.standardise(*features)
    if world.learned and world.facts["importance"]:
        _prefer(policy, world)
    if settings.grpo.init_from is not None:
        _load(policy, settings.grpo.init_from)
    if settings.grpo.warm_start == "lut":
        if world.tables.lut is None:
            raise UserError(
                "grpo.warm_start = lut: there is no lookup table",
                "--tables of a run of moectl controller profile --what grid",
            )
        clone(
            policy, world.pricing.charged(world.tables.lut), features, world.space,
            budgets=world.budgets, order=world.order, learned=world.learned,
            steps=settings.grpo.clone_steps, seed=settings.train.seed,
        )  # fmt: skip
    return policy, arguments


def _warn(section: Any, world: World) -> None:
    """Say so if the controller cannot tell some budgets apart."""
    low, high = world.budgets
    if low < section.budget_low or high > section.budget_high:
        log.warning(
            "budgets %.4g to %.4g %s: the controller tells apart those from policy.budget_low = %g"
            " to policy.budget_high = %g alone",
            low, high, world.pricing.unit, section.budget_low, section.budget_high,
        )  # fmt: skip


def _prefer(policy: Policy, world: World) -> None:
    """Let the scores of importance be the first preference among blocks, standardised."""
    scores = world.facts["importance"]
    values = torch.tensor([scores[str(block)] for block in world.space.optional]).double()
    values = values - values.mean()
    spread = values.std(correction=0).clamp(min=1e-9)  # equal scores prefer no block
    with torch.no_grad():
        policy.controller.block_head.bias.copy_(values / spread)


def _load(policy: Policy, path: Path) -> None:
    """Take weights from a file; parts that it lacks stay new.

    Weights without a standardisation of the features learned from features as they are.
    """
    payload = load(path).payload
    known = [name for names in KEYS.values() for name in names]
    held = {name: payload[name] for name in known if isinstance(payload.get(name), dict)}
    if not held:
        raise UserError(f"{path}: holds weights under none of {', '.join(known)}")
    for part, names in KEYS.items():
        module = getattr(policy, part)
        state: dict[str, Any] = next((held[name] for name in names if name in held), {})
        own = module.state_dict()
        if state:
            state = {**_plain(own), **state}
        if missing := [name for name in own if name not in state]:
            log.warning(
                "%s: lacks %d of the %d weights of the %s, %s among them: these start new",
                path, len(missing), len(own), part, missing[0],
            )  # fmt: skip
        for name, value in state.items():
            if name not in own:
                raise UserError(f"{path}: {name}: no such weight of the {part}")
            found, expected = tuple(getattr(value, "shape", ())), tuple(own[name].shape)
            if found != expected:
                raise UserError(
                    f"{path}: {name} is {found}, expected {expected}: of another network, or of"
                    " other widths (policy.*)"
                )
        module.load_state_dict({**own, **state})


def _plain(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a standardisation that changes nothing, for a module that has one."""
    means = {name: torch.zeros_like(own[name]) for name in own if name.endswith("_mean")}
    return {**means, **{name: torch.ones_like(own[name]) for name in own if name.endswith("_std")}}
