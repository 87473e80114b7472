"""A fitted plug-in as a file, and how it is applied to the outputs of experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from moectl import __version__
from moectl.balpoe.groups import Groups
from moectl.balpoe.losses import log_posterior, log_prior
from moectl.balpoe.rule import Plugin
from moectl.balpoe.settings import POSTERIOR, PluginSection
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_json
from moectl.engine.presets import NAME
from moectl.engine.settings import nearest

FILE = "optimized_parameters.json"
_CHUNK = 8192


@dataclass(frozen=True)
class Fitted:
    """A plug-in and what it takes to apply it to expert logits."""

    plugin: Plugin
    posterior: str
    """`poe`, `mixture` or `single:E`."""
    expert_weights: list[float]
    prior: Tensor
    """(C,) label prior it was fitted for."""
    class_counts: list[int]
    class_names: list[str]
    taus: list[float]
    weights: dict[str, Any]
    """`file`, `sha256` and `epoch` of the classifier."""
    config: dict[str, Any]
    """The settings of the fit, and the seed of its halves."""

    def posteriors(self, logits: Tensor) -> Tensor:
        """Return the posteriors (N, C), float64, that the rule wants, for logits (N, E, C)."""
        shares = torch.tensor(self.expert_weights, dtype=torch.float64)
        return posteriors(logits, self.class_counts, self.taus, self.prior, self.posterior, shares)


def posteriors(
    logits: Tensor,
    class_counts: Sequence[int],
    taus: Sequence[float],
    prior: Tensor,
    kind: str = "poe",
    weights: Tensor | None = None,
) -> Tensor:
    """Combine expert logits (N, E, C) into posteriors (N, C), float64, under a label prior (C,)."""
    known, strengths = log_prior(class_counts).double(), torch.tensor(taus, dtype=torch.float64)
    weights = None if weights is None else weights.double()
    parts = (
        log_posterior(part.double(), known, strengths, prior.log(), kind, weights).exp()
        for part in torch.split(logits, _CHUNK)
    )
    return torch.cat(list(parts))


def to_document(fitted: Fitted) -> dict[str, Any]:
    """Write a fitted plug-in as plain types, for JSON."""
    plugin = fitted.plugin
    return {
        "format": 1,
        "moectl": __version__,
        "checkpoint": fitted.weights,
        "groups": {"names": list(plugin.groups.names), "of_class": list(plugin.groups.of_class)},
        "objective": fitted.config["objective"],
        "mu_method": fitted.config["mu_method"],
        "posterior": fitted.posterior,
        "expert_weights": fitted.expert_weights,
        "tau_list": fitted.taus,
        "label_prior": fitted.prior.tolist(),
        "class_counts": fitted.class_counts,
        "class_names": fitted.class_names,
        "config": fitted.config,
        "points": [_point(plugin, number) for number in range(len(plugin.rates))],
    }


def _point(plugin: Plugin, number: int) -> dict[str, Any]:
    mu, errors = plugin.mu[number].tolist(), plugin.errors[number]
    threshold = float(plugin.thresholds[number])
    return {
        "rate": plugin.rates[number],
        "cost": plugin.costs[number],
        "lambda_0": mu[1] - mu[0] if len(mu) == 2 else None,
        "alpha": plugin.alpha[number].tolist(),
        "mu": mu,
        "group_weights": plugin.beta[number].tolist(),
        "rejection_threshold": None if threshold == float("-inf") else threshold,
        "rejection": float(plugin.rejection[number]),
        "balanced_error": float(errors.mean()),
        "worst_group_error": float(errors.max()),
        "group_errors": errors.tolist(),
        "trace": {name: values[:, number].tolist() for name, values in plugin.trace.items()},
    }


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class _Groups(_Strict):
    names: list[str]
    of_class: list[int]


class _Checkpoint(_Strict):
    file: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    sha256: str
    epoch: int


class _Rule(_Strict):
    rate: float | None
    cost: float | None
    alpha: list[Annotated[float, Field(gt=0)]]
    mu: list[float]
    rejection_threshold: float | None
    group_weights: list[float]
    rejection: float
    group_errors: list[float]


class _Document(_Strict):
    """What the file of a plug-in must hold; more may stand in it."""

    checkpoint: _Checkpoint
    groups: _Groups
    posterior: Annotated[str, Field(pattern=POSTERIOR)]
    expert_weights: list[Annotated[float, Field(ge=0)]]
    tau_list: list[float]
    label_prior: list[Annotated[float, Field(ge=0)]]
    class_counts: list[int]
    class_names: list[str]
    config: dict[str, Any]
    points: Annotated[list[_Rule], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "_Document":
        groups, classes, experts = (
            len(self.groups.names),
            len(self.class_counts),
            len(self.tau_list),
        )
        if set(self.groups.of_class) != set(range(groups)):
            raise ValueError("groups.of_class does not name every group")
        single = self.posterior.partition(":")[2]
        if single and int(single) >= experts:
            raise ValueError(f"posterior is {self.posterior}, for {experts} experts")
        _check_length("groups.of_class", self.groups.of_class, classes)
        _check_length("class_names", self.class_names, classes)
        _check_length("label_prior", self.label_prior, classes)
        _check_length("expert_weights", self.expert_weights, experts)
        if abs(sum(self.expert_weights) - 1) > 1e-4:
            raise ValueError("expert_weights do not sum to 1")
        for rule in self.points:
            for name in ("alpha", "mu", "group_weights", "group_errors"):
                _check_length(name, getattr(rule, name), groups)
        PluginSection(**{name: value for name, value in self.config.items() if name != "seed"})
        if not isinstance(self.config.get("seed"), int):
            raise ValueError("config has no seed")
        return self


def _check_length(name: str, values: Sequence[Any], wanted: int) -> None:
    if len(values) != wanted:
        raise ValueError(f"{name} has {len(values)} entries, expected {wanted}")


def read_plugin(path: Path) -> Fitted:
    """Read a plug-in that `moectl balpoe plugin` wrote.

    Raises:
        UserError: if the file is missing, damaged or something else.
    """
    try:
        return _from_document(_Document.model_validate(read_json(path)))
    except ValidationError as error:
        first = error.errors()[0]
        reason = ".".join(map(str, first["loc"])) + f": {first['msg']}"
        if first["type"] == "missing":
            reason = f"no {str(first['loc'][-1])!r}"
        reason = reason.lstrip(": ").replace("Value error, ", "").partition(" or instance")[0]
        reason = " ".join(reason.split())
        raise UserError(f"{path}: not a plug-in of moectl balpoe plugin ({reason})") from None


def _from_document(document: _Document) -> Fitted:
    points = document.points

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(point, name) for point in points], dtype=torch.float64)

    thresholds = [point.rejection_threshold for point in points]
    plugin = Plugin(
        groups=Groups(tuple(document.groups.names), tuple(document.groups.of_class)),
        rates=tuple(point.rate for point in points),
        costs=tuple(point.cost for point in points),
        alpha=column("alpha"),
        mu=column("mu"),
        thresholds=torch.tensor(
            [float("-inf") if value is None else value for value in thresholds],
            dtype=torch.float64,
        ),
        beta=column("group_weights"),
        rejection=column("rejection"),
        errors=column("group_errors"),
        trace={},
    )
    return Fitted(
        plugin=plugin,
        posterior=document.posterior,
        expert_weights=document.expert_weights,
        prior=torch.tensor(document.label_prior, dtype=torch.float64),
        class_counts=document.class_counts,
        class_names=document.class_names,
        taus=document.tau_list,
        weights=document.checkpoint.model_dump(),
        config=document.config,
    )


def find_plugin(folder: Path | None, name: str, weights: str = "") -> Path:
    """Return the file of a saved plug-in: a path, a name in the run, or the newest of the run.

    Args:
        folder: the run.
        name: the path or name; nothing for the newest.
        weights: name of the weights file that it must have been fitted to.

    Raises:
        UserError: if there is none.
    """
    path = Path(name)
    if not (name and is_file(path)):
        path = _in_run(folder, name, weights)
    if weights and read_plugin(path).weights["file"] != weights:
        raise UserError(
            f"{path}: not fitted to {weights}", "moectl balpoe plugin --run REF fits one"
        )
    return path


def _in_run(folder: Path | None, name: str, weights: str) -> Path:
    files = {path.parent.name: path for path in folder.glob(f"plugins/*/{FILE}")} if folder else {}
    if name in files:
        return files[name]
    where = f"{folder}: " if folder else ""
    what = f"no plug-in {name}{nearest(name, list(files))}" if name else "no plug-in yet"
    newest = sorted(files.values(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if weights and newest and not name:
        newest = [path for path in newest if read_plugin(path).weights["file"] == weights]
        what = f"no plug-in fitted to {weights}"
    if name or not newest:
        raise UserError(f"{where}{what}", "moectl balpoe plugin --run REF fits one")
    return newest[0]
