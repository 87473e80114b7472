"""The named changes of a network that are compared."""

from typing import Any

from moectl.diffusion.settings import DiffusionSettings, ModelSection
from moectl.engine.errors import UserError
from moectl.engine.settings import nearest

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


def changes(model: ModelSection, name: str) -> dict[str, Any]:
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


def variant(settings: DiffusionSettings, name: str) -> DiffusionSettings:
    """Return the settings of a variant of a network.

    Raises:
        UserError: if there is no such variant.
    """
    values = {**settings.model.model_dump(), **changes(settings.model, name)}
    tables = {key: getattr(settings, key) for key in type(settings).model_fields}
    return type(settings)(**{**tables, "model": ModelSection(**values)})


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
