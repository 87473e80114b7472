"""Everything that a policy is trained or measured in: questions, network, tables, prices."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moectl.controller.environment import Environment, Remembered
from moectl.controller.importance import MOLMOE, order_of, read_importance
from moectl.controller.latency import Estimator, read_estimator
from moectl.controller.plans import Space
from moectl.controller.rewards import Pricing
from moectl.controller.table import Table, read_table
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, is_folder, read_json, sha256
from moectl.engine.run import Run

log = logging.getLogger(__name__)

SIMULATED = "sim"
_FILES = ("lut.json", "latency.json", "importance.json", "overhead.json")
_FULL_SAMPLES = 16  # questions that the full plan's latency is the median of


class Tables(NamedTuple):
    """What a profile left: parts that were not made are None."""

    folder: Path | None = None
    lut: Table | None = None
    estimator: Estimator | None = None
    importance: Path | None = None
    controller_ms: float | None = None


@dataclass(frozen=True)
class World:
    """Where a policy acts."""

    splits: dict[str, Remembered]
    """Questions by split; all answered by the same network."""
    pricing: Pricing
    budgets: tuple[float, float]
    """Smallest and largest."""
    order: tuple[int, ...]
    """All blocks, the most important first."""
    learned: bool
    """Whether the policy chooses the blocks."""
    tables: Tables
    facts: dict[str, Any]
    """Plain values that tell what all this was."""

    @property
    def space(self) -> Space:
        """The plans of the network."""
        return self.pricing.space

    @property
    def fixed(self) -> tuple[int, ...]:
        """Optional blocks in the order in which they are taken; empty if the policy chooses."""
        if self.learned:
            return ()
        optional = self.space.optional
        return tuple(block for block in self.order if block in optional)


def open_environments(
    settings: Any, device: torch.device, splits: Sequence[str]
) -> tuple[dict[str, Environment], dict[str, Any]]:
    """Return the questions of some splits with what answers them, and what that is.

    Raises:
        UserError: if the network or a data set cannot be opened.
    """
    if settings.backbone.model == SIMULATED:
        from moectl.controller.simulator import Simulator

        counts = {name: getattr(settings.data, f"{name}_samples") for name in splits}
        seed = settings.train.seed
        found: dict[str, Environment] = {
            name: Simulator(count, seed, name) for name, count in counts.items()
        }
        return found, {"model": SIMULATED, "questions": counts}
    return _open_real(settings, device, splits)


def _open_real(
    settings: Any, device: torch.device, splits: Sequence[str]
) -> tuple[dict[str, Environment], dict[str, Any]]:
    from moectl.controller.data import load, load_test
    from moectl.controller.executor import Executor
    from moectl.controller.open import check_network, open_backbone
    from moectl.controller.timing import open_clock

    clock = open_clock(device, settings.latency.clock)
    model = find_model(settings.backbone.model)
    check_network(model)
    seed = settings.train.seed
    samples, facts = {}, {}
    if set(splits) & {"train", "val"}:
        data = load(settings.data, seed, [name for name in ("train", "val") if name in splits])
        samples, facts = {"train": data.train, "val": data.val}, data.facts
    if "test" in splits:
        samples["test"] = load_test(settings.data, seed)
    backbone = open_backbone(
        model,
        device=device,
        dtype=settings.backbone.dtype,
        experts=settings.backbone.experts,
    )
    options = {
        "max_new_tokens": settings.backbone.max_new_tokens,
        "repeats": settings.latency.repeats,
    }
    executors = {name: Executor(backbone, samples[name], clock, **options) for name in splits}
    if settings.latency.source == "measured":
        next(iter(executors.values())).warm_up(settings.latency.warmup)
    questions = {name: len(samples[name]) for name in splits}
    return dict(executors), {"model": model, "questions": questions, "data": facts}


def find_model(name: str) -> str:
    """Return the folder of the newest run of toy for `latest`, else the name as it is."""
    if name != "latest":
        return name
    from moectl.engine.references import find_run

    return str(find_run("latest", "controller", "finished", ["toy"]))


def read_tables(reference: str, section: Any) -> Tables:
    """Read what a profile left.

    Args:
        reference: a run of profile, or a folder with such files; nothing for no tables.
        section: the table `latency`, whose objective and unit the lookup table must have.

    Raises:
        UserError: if there is neither, or a file is not as it should be.
    """
    if not reference:
        return Tables()
    folder = Path(reference)
    if not is_folder(folder):
        from moectl.engine.references import find_run

        folder = find_run(reference, "controller", "finished", ["profile"])
    lut, fitted, scores, overhead = (folder / name for name in _FILES)
    if not any(path.is_file() for path in (lut, fitted, scores)):
        raise UserError(
            f"{folder}: holds no tables (lut.json, latency.json or importance.json)",
            "moectl controller profile makes them",
        )
    return Tables(
        folder,
        _table(lut, section) if lut.is_file() else None,
        read_estimator(fitted) if fitted.is_file() else None,
        scores if scores.is_file() else None,
        _controller_ms(overhead) if overhead.is_file() else None,
    )


def sources_of(model: str, tables: Tables) -> list[dict[str, str]]:
    """Return the files that a taught network and tables were read from, with their checksums.

    Args:
        model: a run of toy; of other networks nothing is said.
        tables: of a profile.
    """
    paths = [Path(model) / "vlm.safetensors"]
    paths += [tables.folder / name for name in _FILES] if tables.folder else []
    return [
        {"path": str(path.resolve()), "sha256": sha256(path.read_bytes())}
        for path in paths
        if is_file(path)
    ]


def _controller_ms(path: Path) -> float:
    values = read_json(path)
    found = values.get("controller_ms") if isinstance(values, dict) else None
    if not isinstance(found, int | float) or not 0 <= found < float("inf"):
        raise UserError(f"{path}: expected controller_ms, milliseconds from 0 up")
    return float(found)


def _table(path: Path, section: Any) -> Table:
    table = read_table(path)
    table.require(section.objective, section.source)
    return table


def importance_of(
    settings: Any, space: Space, tables: Tables, model: str
) -> tuple[dict[int, float], tuple[int, ...]]:
    """Return scores of the blocks, none if there are none, and all blocks, those to keep first.

    The scores are those of the settings, of the tables, or of MolmoE for that network. Without any
    the first blocks come first.

    Raises:
        UserError: if blocks are to be chosen by scores that are not there.
    """
    path = settings.policy.importance or tables.importance
    scores: dict[int, float] = {}
    if settings.policy.blocks == "prefix":
        return scores, tuple(range(space.blocks))
    if path is not None:
        scores = read_importance(path, space.blocks)
    elif "molmo" in model.lower() or model == SIMULATED:
        scores = dict(MOLMOE) if space.blocks == len(MOLMOE) else {}
    if not scores and settings.policy.blocks == "importance":
        raise UserError(
            "policy.blocks = importance: there are no scores",
            "--importance FILE, or --tables of moectl controller profile --what importance",
        )
    if not scores:
        return scores, tuple(range(space.blocks))
    return scores, tuple(order_of(scores, space.always_on))


def open_world(
    settings: Any,
    device: torch.device,
    splits: Sequence[str],
    known: dict[str, Any] | None = None,
) -> World:
    """Open all that a policy acts on.

    Args:
        settings: of the run.
        device: that the network answers on.
        splits: among train, val and test.
        known: `facts` of the same world when it was first opened, which then hold.

    Raises:
        UserError: if something is missing.
    """
    known = known or {}
    settings = pinned(settings, known)
    tables = read_tables(known.get("tables", settings.latency.tables), settings.latency)
    if settings.latency.source == "table" and tables.estimator is None:
        raise UserError(
            "latency.source = table: there is no fitted latency",
            "--tables of a run of moectl controller profile --what latency",
        )
    inner, facts = open_environments(settings, device, splits)
    environments = {name: Remembered(environment) for name, environment in inner.items()}
    space = next(iter(environments.values())).space
    model = str(facts["model"])
    scores, order = importance_of(settings, space, tables, model)
    check_tables(tables, space, order)
    controller_ms = _counted_ms(settings, tables, inner[splits[0]], known)
    pricing = Pricing(settings, space, tables.estimator, controller_ms)
    budgets = known.get("budgets") or budget_range(
        settings.budget, pricing, environments[splits[-1]], tables.lut
    )
    facts = {
        **facts,
        "tables": str(tables.folder.resolve()) if tables.folder else "",
        "controller_ms": controller_ms,
        "budgets": list(budgets),
        "unit": pricing.unit,
        "importance": {str(block): score for block, score in scores.items()},
        "order": list(order),
        "plans": space.size,
    }
    learned = settings.policy.blocks in ("auto", "learned")
    low, high = budgets
    return World(environments, pricing, (low, high), order, learned, tables, facts)


def _counted_ms(
    settings: Any, tables: Tables, environment: Environment, known: Mapping[str, Any]
) -> float:
    """Return what choosing a plan takes: as known, from tables, or timed if answers are.

    Where work is counted it is nothing.
    """
    if settings.latency.source == "flops":
        return 0.0
    if "controller_ms" in known:
        return float(known["controller_ms"])
    if tables.controller_ms is None and settings.latency.source == "measured":
        from moectl.controller.executor import Executor
        from moectl.controller.overhead import overhead

        if isinstance(environment, Executor):
            return overhead(environment, settings)["controller_ms"]
    return tables.controller_ms or 0.0


def pinned(settings: Any, known: Mapping[str, Any]) -> Any:
    """Return settings with the network that `latest` was when a run began.

    Args:
        settings: of the run.
        known: facts of its beginning; empty if it begins now.
    """
    if not known or settings.backbone.model != "latest":
        return settings
    backbone = settings.backbone.model_copy(update={"model": known["model"]})
    return settings.model_copy(update={"backbone": backbone})


def require_same(run: Run[Any], facts: Mapping[str, Any]) -> None:
    """Refuse to go on with other questions than a run began with.

    Args:
        run: new or resumed.
        facts: of the questions now.

    Raises:
        UserError: if they are others.
    """
    if run.record.get("world", facts).get("data") != facts.get("data"):
        names = ", ".join(run.settings.data.dataset)
        raise UserError(
            f"{run.folder}: began with other questions of {names}", "start a new run for these"
        )


def check_tables(tables: Tables, space: Space, order: Sequence[int]) -> None:
    """Refuse tables of another network.

    Raises:
        UserError: if they are.
    """
    if tables.estimator is not None and tables.estimator.blocks != space.blocks:
        raise UserError(
            f"{tables.folder}: the fitted latency is of another network"
            f" ({tables.estimator.blocks} blocks: expected {space.blocks})"
        )
    if tables.lut is None:
        return
    try:
        for row in tables.lut.rows:
            tables.lut.plan(row, space, order)
    except ValueError as error:
        raise UserError(
            f"{tables.folder}: the lookup table is of another network ({error})"
        ) from None


def budget_range(
    section: Any, pricing: Pricing, environment: Environment, lut: Table | None
) -> tuple[float, float]:
    """Return the smallest and the largest budget.

    Raises:
        UserError: if they are to come from a lookup table that is not there.
    """
    if section.mode == "absolute":
        return section.low, section.high
    if section.mode == "auto":
        if lut is None:
            raise UserError(
                "budget.mode = auto: there is no lookup table",
                "--tables of a run of moectl controller profile --what grid",
            )
        return pricing.charged(lut).budget_range()
    full = full_latency(pricing, environment)
    return section.low * full, section.high * full


def full_latency(pricing: Pricing, environment: Environment) -> float:
    """Return the median latency of the full plan over some questions."""
    plan = environment.space.full
    rows = range(min(_FULL_SAMPLES, len(environment.ids)))
    return statistics.median(pricing.latency(plan, environment.execute(row, plan)) for row in rows)


def warn_outside(budgets: Sequence[float], limits: tuple[float, float], unit: str) -> None:
    """Warn of each budget that a controller knows nothing about.

    Args:
        budgets: in any order.
        limits: smallest and largest that it was trained for.
        unit: of all of them.
    """
    low, high = limits
    for budget in sorted(set(budgets)):
        if not low * 0.99 <= budget <= high * 1.01:
            log.warning(
                "budget %g is outside of what the controller was trained for: %.4g to %.4g %s",
                budget, low, high, unit,
            )  # fmt: skip
