"""Latency of plans by formula, fitted to records: per stage, for any plan and any question.

The image tower costs per crop, and per crop squared where it sees all of an image at once, the
prefill per block and token, expert and token, and token squared, a step of the answer per block,
expert and token in the cache. Letters: N records, C columns of a formula, L blocks.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from moectl.controller.execution import Objective, Timings
from moectl.controller.plans import Plan
from moectl.controller.records import Record, latency_of
from moectl.engine.errors import UserError
from moectl.engine.files import read_json

log = logging.getLogger(__name__)

Array = NDArray[np.float64]

STAGES = {
    "vision": ("crops", "fixed", "crops squared"),
    "prefill": (
        "blocks x tokens",
        "experts x tokens",
        "fixed",
        "blocks",
        "blocks x tokens squared",
    ),
    "step": ("blocks", "experts", "fixed", "blocks x context"),
}
"""Columns of each formula; a column that those before it explain is left out."""

_MEASURED = {"vision": "T_vision_total", "prefill": "T_LLM_prefill", "step": "T_decode_per_token"}
_SAME = 0.01  # share of a column that the ones before it must leave over


@dataclass(frozen=True)
class Stage:
    """One fitted formula."""

    weights: dict[str, float]
    """Milliseconds by column."""
    method: str
    """The least squares that predicted better: plain or non-negative."""
    r2: float
    """Share of the variance explained, of plans that were left out of the fit."""
    mape: float
    """Mean relative error, likewise."""
    samples: int

    def predict(self, terms: Sequence[float]) -> float:
        """Return milliseconds from the columns of one record."""
        return float(sum(w * term for w, term in zip(self.weights.values(), terms, strict=True)))


@dataclass(frozen=True)
class Estimator:
    """Times of plans without running them."""

    blocks: int
    """L."""
    stages: dict[str, Stage]
    residuals: dict[str, list[float]]
    """By objective: share by which a latency lay above its prediction, of plans left out."""

    def timings(self, plan: Plan, crops: int, tokens: int, new_tokens: int) -> Timings:
        """Predict the times of an answer.

        Args:
            plan: how.
            crops: tiles, without the view of the whole image.
            tokens: with which the text network begins.
            new_tokens: of the answer.

        Raises:
            ValueError: if the plan is of another network.
        """
        if len(plan.active) != self.blocks:
            raise ValueError(f"a plan of {len(plan.active)} blocks: expected {self.blocks}")
        terms = _terms(plan.blocks, plan.top_k, crops, tokens, new_tokens)
        times = {name: max(0.0, self.stages[name].predict(terms[name])) for name in STAGES}
        decode = times["step"] * max(0, new_tokens - 1)
        return Timings(times["vision"], times["prefill"], decode, new_tokens)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"schema": "moectl.latency/1", **asdict(self)}


def estimator_from(values: Mapping[str, Any]) -> Estimator:
    """Read what `Estimator.plain` wrote.

    Raises:
        ValueError, KeyError, TypeError: if it is no estimator.
    """
    stages = {}
    for name, columns in STAGES.items():
        stage = Stage(**values["stages"][name])
        weights = {column: float(stage.weights[column]) for column in columns}
        if not np.isfinite(list(weights.values())).all():
            raise ValueError(f"{name} holds a number that is not finite")
        stages[name] = Stage(weights, stage.method, stage.r2, stage.mape, stage.samples)
    residuals = {}
    for objective in get_args(Objective):
        if not isinstance(found := values["residuals"].get(objective), list):
            raise ValueError(f"residuals hold no list of {objective}")
        if not np.isfinite(found).all():
            raise ValueError(f"residuals of {objective} hold a number that is not finite")
        residuals[objective] = found
    return Estimator(int(values["blocks"]), stages, residuals)


def read_estimator(path: Path) -> Estimator:
    """Read an estimator from a file.

    Raises:
        UserError: if it is none.
    """
    try:
        return estimator_from(read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not fitted latencies ({type(error).__name__}: {error})",
            "Write them with: moectl controller profile --what latency",
        ) from None


def fit(records: Sequence[Record], blocks: int) -> Estimator:
    """Fit the three formulas by least squares.

    Non-negative and plain least squares are both tried; the one that predicts plans better that
    were left out of its fit is taken. A column that does not vary by itself, such as experts where
    all plans have the same number, gets no weight: nothing is known about it.

    Args:
        records: of `records.record`; best of random plans with several tiers, numbers of blocks and
            experts.
        blocks: L.

    Raises:
        UserError: if the records are of another network, of one plan alone, or hold no answer of
            two tokens.
    """
    rows = _rows(records, blocks)
    fitted = {}
    for name, row in rows.items():
        keep = _independent(row.columns, STAGES[name], _one_number(records))
        if left_out := [column for i, column in enumerate(STAGES[name]) if i not in keep]:
            log.warning("%s: nothing learned about %s", name, ", ".join(left_out))
        found = _least_squares(row.columns[:, keep], row.times, row.plans)
        weights = np.zeros(len(STAGES[name]))
        weights[keep] = found.weights
        fitted[name] = found._replace(weights=weights)
    return _estimator(records, blocks, rows, fitted)


def margin(residuals: Sequence[float], target: float = 0.05) -> float:
    """Return the share of a budget to keep free, so that few plans miss it.

    Of plans predicted to take at most budget x (1 - margin), a share of at most `target` takes more
    than the budget, on average over sets of records like these.

    Limit: it speaks of plans like those of the residuals, not of the one plan of many that was
    predicted to be the fastest.

    Args:
        residuals: of an `Estimator`, by one objective.
        target: share of missed budgets.

    Raises:
        ValueError: if there are too few residuals for such a target, or it is no share.

    Source: Vovk et al. 2005 (split conformal prediction).
    """
    if not 0 < target < 1:
        raise ValueError(f"target = {target}: expected a share between 0 and 1")
    # Without the last bits, 0.95 x 20 would be above 19.
    rank = int(np.ceil((len(residuals) + 1) * (1 - target) - 1e-9))
    if rank > len(residuals):
        raise ValueError(
            f"{len(residuals)} residuals are too few for a target of {target}: expected at least"
            f" {int(np.ceil(1 / target - 1e-9)) - 1}"
        )
    return max(0.0, sorted(residuals)[rank - 1])


class _Rows(NamedTuple):
    """What one formula is fitted to."""

    places: list[int]
    """(N,) among all records."""
    columns: Array
    """(N, C)."""
    times: Array
    """(N,)."""
    plans: list[str]
    """(N,)."""


class _Fitted(NamedTuple):
    weights: Array
    """(C,)."""
    method: str
    held_out: Array
    """(N,) predictions of fits that had not seen the record's plan."""


def _terms(
    active: Sequence[int], top_k: Sequence[int], crops: int, tokens: int, new_tokens: int
) -> dict[str, tuple[float, ...]]:
    """Return the columns of each formula, as `STAGES` has them."""
    count, experts = len(active), sum(top_k[block] for block in active)
    # Steps see the prompt and 1 to new_tokens - 1 tokens of the answer.
    context = tokens + new_tokens / 2
    return {
        "vision": (crops, 1, crops**2),
        "prefill": (count * tokens, experts * tokens, 1, count, count * tokens**2),
        "step": (count, experts, 1, count * context),
    }


def _rows(records: Sequence[Record], blocks: int) -> dict[str, _Rows]:
    for values in records:
        if (found := len(values["plan"]["top_k"])) != blocks:
            raise UserError(f"a record of a network of {found} blocks: expected {blocks}")
    terms = [
        _terms(
            values["plan"]["blocks"],
            values["plan"]["top_k"],
            values["actual_num_crops"],
            values["actual_vision_tokens"] + values["actual_text_tokens"],
            values["output_tokens"],
        )
        for values in records
    ]
    plans = [str(values["plan"]) for values in records]
    rows = {}
    for name in STAGES:
        places = [
            place
            for place, values in enumerate(records)
            if name != "step" or values["output_tokens"] > 1
        ]
        if len({plans[place] for place in places}) < 2:
            what = "answers of two tokens or more" if name == "step" else "records"
            raise UserError(f"latency needs {what} of at least two plans: found fewer")
        rows[name] = _Rows(
            places,
            np.array([terms[place][name] for place in places], float),
            np.array([records[place][_MEASURED[name]] for place in places], float),
            [plans[place] for place in places],
        )
    return rows


def _one_number(records: Sequence[Record]) -> bool:
    """Whether all blocks but the first have the same number of experts in all records."""
    numbers = {
        values["plan"]["top_k"][block]
        for values in records
        for block in values["plan"]["blocks"]
        if block > 0
    }
    return len(numbers - {0}) < 2


def _independent(columns: Array, names: Sequence[str], one_number: bool) -> list[int]:
    """Return the places of columns that those before them do not explain."""
    keep: list[int] = []
    for place, name in enumerate(names):
        column = columns[:, place]
        before = columns[:, keep] / np.linalg.norm(columns[:, keep], axis=0)
        rest = column - before @ np.linalg.lstsq(before, column)[0]
        told = np.linalg.norm(rest) > _SAME * np.linalg.norm(column)
        if told and not (one_number and name.startswith("experts")):
            keep.append(place)
    return keep


def _least_squares(columns: Array, times: Array, plans: Sequence[str]) -> _Fitted:
    """Solve both ways, (C,), and keep what predicts left-out plans with smaller squares."""
    labels = np.unique(plans, return_inverse=True)[1]
    best, least = None, np.inf
    for method in ("non-negative", "plain"):
        held_out = np.zeros(len(times))
        for label in range(labels.max() + 1):
            out = labels == label
            held_out[out] = columns[out] @ _solve(columns[~out], times[~out], method)
        squares = float(np.square(times - held_out).sum())
        if squares < least:
            best, least = _Fitted(_solve(columns, times, method), method, held_out), squares
    assert best is not None, "times are finite"
    return best


def _solve(columns: Array, times: Array, method: str) -> Array:
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    if method == "plain":
        weights: Array = np.linalg.lstsq(columns / scale, times)[0]
    else:
        weights = nnls(columns / scale, times, maxiter=100 * len(scale))[0]
    return weights / scale


def _estimator(
    records: Sequence[Record], blocks: int, rows: dict[str, _Rows], fitted: dict[str, _Fitted]
) -> Estimator:
    stages, predicted = {}, {name: np.zeros(len(records)) for name in STAGES}
    for name, row in rows.items():
        found = fitted[name]
        errors = row.times - found.held_out
        spread = float(np.square(row.times - row.times.mean()).sum())
        timed = row.times > 0
        stages[name] = Stage(
            dict(zip(STAGES[name], found.weights.tolist(), strict=True)),
            found.method,
            1 - float(np.square(errors).sum()) / spread if spread > 0 else 0.0,
            float(np.abs(errors[timed] / row.times[timed]).mean()) if timed.any() else 0.0,
            len(row.times),
        )
        predicted[name][row.places] = found.held_out.clip(0)
    return Estimator(blocks, stages, _residuals(records, predicted))


def _residuals(records: Sequence[Record], predicted: dict[str, Array]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {objective: [] for objective in get_args(Objective)}
    for place, values in enumerate(records):
        vision, prefill, step = (float(predicted[name][place]) for name in STAGES)
        new = values["output_tokens"]
        # The controller's own time is no part of the formulas and taken as known.
        timings = Timings(vision, prefill, step * max(0, new - 1), new, values["T_controller"])
        for objective in get_args(Objective):
            measured = latency_of(values, objective, "measured")
            if measured > 0 and (objective != "per_token" or new > 1):
                found[objective].append(1 - timings.latency(objective) / measured)
    return found
