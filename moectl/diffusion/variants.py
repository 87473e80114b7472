"""The named changes of a network that are compared."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from pydantic import ValidationError

from moectl.diffusion.settings import DiffusionSettings, ModelSection
from moectl.engine.errors import UserError
from moectl.engine.settings import explain, nearest

Changes = dict[str, Any]
"""Values of the table `model`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_moe": {"moe": False},
    "no_freq": {"freq": False},
    "no_dsconv": {"dsconv": False},
    "minimal": {"moe": False, "freq": False, "dsconv": False},
    "moe_variants": {
        "num_experts": lambda model: 2 * model.num_experts,
        "k_active": lambda model: 2 * model.k_active,
    },
    "dense_matched": {"num_experts": lambda model: model.k_active},
}
"""Changes of the table `model`, or functions from that table to a change.

"dense_matched" is the control: all of its experts are always on, at the cost of the full network.
"""


def changes(model: ModelSection, name: str) -> Changes:
    """Return the values of the table `model` that a variant sets.

    Raises:
        UserError: if there is no such variant.
    """
    if name not in VARIANTS:
        raise UserError(
            f"{name}: no such variant{nearest(name, VARIANTS)}", f"one of {', '.join(VARIANTS)}"
        )
    return {
        key: value(model) if callable(value) else value for key, value in VARIANTS[name].items()
    }


def plan(
    model: ModelSection, switched_off: Sequence[str], experts: str, active: str, *, every: bool
) -> dict[str, Changes]:
    """Return the variants by name, the network as it is first.

    Args:
        model: of the settings.
        switched_off: fields of it that are off in every variant: moe, freq, dsconv.
        experts: values of num_experts with commas; empty for that of the settings.
        active: likewise values of k_active.
        every: the named variants instead.

    Raises:
        UserError: if nothing is wanted, or a number is none.
    """
    if every:
        if switched_off or experts or active:
            raise UserError("--all goes with no other choice of variants")
        return {name: changes(model, name) for name in VARIANTS}
    off = dict.fromkeys(switched_off, False)
    found: dict[str, Changes] = {"full": {}}
    for count, chosen in product(_numbers(experts), _numbers(active)):
        numbers = {"num_experts": count, "k_active": chosen}
        own = off | {key: value for key, value in numbers.items() if value}
        words = [f"no_{name}" for name in switched_off]
        words += [f"experts{count}"] * bool(count) + [f"active{chosen}"] * bool(chosen)
        if own:
            found["+".join(words)] = own
    if len(found) == 1:
        raise UserError(
            "nothing to compare with: no variant was named",
            "--no-moe, --no-freq, --no-dsconv, --num-experts N, --k-active K, or --all",
        )
    return found


def _numbers(text: str) -> list[int]:
    """Read numbers with commas; 0 stands for none given."""
    words = [word.strip() for word in text.split(",")] if text else ["0"]
    if text and not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"{text!r}: expected whole numbers from 1 on, with commas")
    return [int(word) for word in words]


def variant(settings: DiffusionSettings, name: str) -> DiffusionSettings:
    """Return the settings of a variant of a network.

    Raises:
        UserError: if there is no such variant.
    """
    return changed(settings, changes(settings.model, name))


def changed(settings: DiffusionSettings, own: Changes) -> DiffusionSettings:
    """Return settings with other values in the table `model`.

    Raises:
        UserError: if they do not go together.
    """
    tables = {name: getattr(settings, name).model_dump() for name in type(settings).model_fields}
    tables["model"] |= own
    try:
        return DiffusionSettings(**tables)
    except ValidationError as error:
        origin = {f"model.{key}": "variant" for key in own}
        raise UserError(explain(DiffusionSettings, error, origin)) from None


def arguments_of(settings: DiffusionSettings, num_classes: int) -> dict[str, Any]:
    """Return the constructor arguments of `model.UNet` as plain values."""
    model = settings.model
    return {
        "model_channels": model.channels,
        "channel_mults": list(model.mults),
        "time_dim": model.time_dim,
        "class_dim": model.class_dim,
        "num_classes": num_classes,
        "null_class": settings.loss.p_uncond > 0,
        "moe": model.moe,
        "num_experts": model.num_experts,
        "k_active": model.k_active,
        "freq": model.freq,
        "dsconv": model.dsconv,
        "compat": model.compat,
        "dispatch": model.dispatch,
        "checkpointing": model.checkpointing,
    }
