"""Figures of one policy under one budget: accuracy, latency, missed budgets, plans taken.

Letters: N questions, L blocks.
"""

import json
import logging
import shutil
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moectl.controller.captions import Corpus
from moectl.controller.execution import Execution, Timings
from moectl.controller.pareto import (
    Point,
    budget_area,
    compare,
    front,
    hypervolume,
    mean_interval,
)
from moectl.controller.plans import Plan, Space
from moectl.controller.records import deviation
from moectl.controller.scores import clean, vqa_official
from moectl.engine.files import write_json, write_text
from moectl.engine.tracking import loads_or_none

if TYPE_CHECKING:
    from moectl.controller.samples import Sample
    from moectl.controller.table import Row

log = logging.getLogger(__name__)

_NEAR = 1.05  # times the budget: beyond it a budget is missed by more than noise
GRID = "grid"
"""Name of the rows of the lookup table among the points."""
STAGES = ("controller", "vision", "prefill", "decode")


class Outcome(NamedTuple):
    """What came of one question under a budget."""

    id: str
    plan: Plan
    execution: Execution
    timings: Timings
    """Of the stages, with that of the controller where the policy runs it."""
    latency: float
    """Held against the budget, in its unit."""
    reward: float

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "sample_id": self.id,
            "answer": self.execution.answer,
            "accuracy": self.execution.accuracy,
            "latency": self.latency,
            "reward": self.reward,
            "plan": self.plan.plain(),
            "execution": self.execution.plain(),
        }


Outcomes = Mapping[str, Mapping[float, Sequence[Outcome]]]
"""By policy and budget, each of the same questions in the same order."""


def metrics_of(outcomes: Sequence[Outcome], budget: float, draws: int) -> dict[str, Any]:
    """Return what a policy reached.

    Args:
        outcomes: of its questions, N of them, at least one.
        budget: that they were answered under.
        draws: resamples of the interval.

    Returns:
        Names end in `_ms` after the usual unit of a budget; where budgets are GFLOP, latencies are
        too. `accuracy_in_time` counts an answer that came late as wrong. `throughput` is answers a
        second, one after another.
    """
    accuracy = [outcome.execution.accuracy for outcome in outcomes]
    latency = [outcome.latency for outcome in outcomes]
    ratios = [time / budget for time in latency]
    late = [ratio > 1 for ratio in ratios]
    stages = {
        name: statistics.fmean(getattr(outcome.timings, name) for outcome in outcomes)
        for name in STAGES
    }
    total = sum(stages.values())
    p50, p95, p99 = np.quantile(latency, [0.5, 0.95, 0.99]).tolist()
    return {
        "accuracy": statistics.fmean(accuracy),
        "accuracy_std": deviation(accuracy),
        "ci95": list(mean_interval(accuracy, draws)),
        "accuracy_in_time": statistics.fmean(in_time(outcome, budget) for outcome in outcomes),
        "avg_latency_ms": statistics.fmean(latency),
        "latency_std_ms": deviation(latency),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "budget_violations": sum(late),
        "budget_violation_rate": statistics.fmean(late),
        "violation_rate_5pct": statistics.fmean(ratio > _NEAR for ratio in ratios),
        "mean_overshoot": statistics.fmean(max(0.0, ratio - 1) for ratio in ratios),
        "utilisation": statistics.fmean(ratios),
        "throughput": 1000 / total if total else None,
        "gflop": statistics.fmean(outcome.execution.gflop for outcome in outcomes),
        "controller_overhead_ms": stages["controller"],
        "stages_ms": stages,
        "reward": statistics.fmean(outcome.reward for outcome in outcomes),
    }


def in_time(outcome: Outcome, budget: float) -> float:
    """Return the accuracy of an answer, 0 if it came late."""
    return outcome.execution.accuracy if outcome.latency <= budget else 0.0


def knobs_of(plans: Sequence[Plan], space: Space) -> dict[str, Any]:
    """Return how often each setting of each knob was taken, N plans of one space.

    Returns:
        Shares of the plans by `tier` and by `num_active_blocks`; for each block its share in
        `block_usage`, and in `top_k` the shares of the plans that run it by number of experts,
        nothing where that is not free; means, and how many plans differ.
    """
    count = len(plans)
    running = [[plan for plan in plans if plan.active[block]] for block in range(space.blocks)]
    experts = [
        Counter(plan.top_k[block] for plan in running[block]) if space.free[block] else Counter()
        for block in range(space.blocks)
    ]
    taken = [k for counter in experts for k in counter.elements()]
    tiers = Counter(plan.tier for plan in plans)
    return {
        "tier": {tier.name: tiers[tier.name] / count for tier in space.tiers},
        "top_k": [_shares(counter) for counter in experts],
        "num_active_blocks": _shares(Counter(len(plan.blocks) for plan in plans)),
        "block_usage": [len(part) / count for part in running],
        "mean_top_k": statistics.fmean(taken) if taken else None,
        "mean_active_blocks": statistics.fmean(len(plan.blocks) for plan in plans),
        "distinct_plans": len({plan.key() for plan in plans}),
    }


def _shares(counter: "Counter[int]") -> dict[str, float]:
    return {str(value): counter[value] / counter.total() for value in sorted(counter)}


def official(outcomes: Sequence[Outcome], samples: Sequence["Sample"]) -> dict[str, float]:
    """Return the figures that others publish of these answers: VQA's own, or of captions.

    Args:
        outcomes: of the questions, N.
        samples: the questions, in the same order.

    Returns:
        `vqa_official`, or `cider_d`, `bleu4` and `rouge_l` of the whole corpus; nothing for other
        or mixed metrics.
    """
    answers = [clean(outcome.execution.answer) for outcome in outcomes]
    metrics = {sample.metric for sample in samples}
    if metrics == {"vqa"}:
        pairs = zip(answers, samples, strict=True)
        scores = [vqa_official(answer, sample.answers) for answer, sample in pairs]
        return {"vqa_official": statistics.fmean(scores)}
    if metrics == {"caption"} and len(samples) > 1:
        ids = [sample.id for sample in samples]
        corpus = Corpus({sample.id: sample.answers for sample in samples})
        return corpus.measure(dict(zip(ids, answers, strict=True)))
    return {}


def results_of(
    outcomes: Outcomes,
    space: Space,
    samples: Sequence["Sample"],
    draws: int,
) -> list[dict[str, Any]]:
    """Return the figures of every policy under every budget.

    Args:
        outcomes: by policy and budget, each of the same N questions.
        space: of the plans.
        samples: the questions; none of a simulation.
        draws: resamples of intervals.
    """
    return [
        {
            "policy": policy,
            "latency_budget": budget,
            "metrics": {
                **metrics_of(part, budget, draws),
                **(official(part, samples) if samples else {}),
            },
            "knob_distribution": knobs_of([outcome.plan for outcome in part], space),
        }
        for policy, each in outcomes.items()
        for budget, part in each.items()
    ]


def pareto_of(
    results: Sequence[Mapping[str, Any]], rows: Sequence["Row"], corner: float
) -> dict[str, Any]:
    """Return what the policies reached, the fronts of each and of all, and areas.

    Args:
        results: of `results_of`.
        rows: of the lookup table, whose accuracies are those of its own questions.
        corner: latency that areas are measured to, that of the full plan.
    """
    points: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        metrics, budget = one["metrics"], one["latency_budget"]
        point = {"accuracy": metrics["accuracy"], "latency": metrics["avg_latency_ms"]}
        points.setdefault(one["policy"], []).append({**point, "latency_budget": budget})
    measured = [{"policy": name, **point} for name, each in points.items() for point in each]
    summary = {
        name: {
            "hypervolume": hypervolume([_point(point) for point in each], corner),
            "budget_area": budget_area(
                [point["latency_budget"] for point in each], [point["accuracy"] for point in each]
            ),
        }
        for name, each in points.items()
    }
    if rows:
        points[GRID] = [
            {"accuracy": row.accuracy, "latency": row.latency, "plan": row.name} for row in rows
        ]
    fronts = {
        name: [each[at] for at in front(list(map(_point, each)))] for name, each in points.items()
    }
    return {
        "all_points": [
            {"policy": name, **point} for name, each in points.items() for point in each
        ],
        "pareto_frontiers": {
            "all": [measured[at] for at in front(list(map(_point, measured)))],
            **fronts,
        },
        "summary": {"corner": corner, **summary},
    }


def _point(values: Mapping[str, Any]) -> Point:
    return Point(values["accuracy"], values["latency"])


def comparisons(outcomes: Outcomes, first: str, draws: int) -> list[dict[str, Any]]:
    """Compare a policy with all others on the same questions, budget by budget and over all.

    Over all budgets a question counts with its mean over them: questions are what is resampled.

    Args:
        outcomes: by policy and budget, each of the same N questions.
        first: the policy.
        draws: resamples.

    Returns:
        For each other policy and budget, None for all budgets: the `accuracy` and the
        `accuracy_in_time` that the first has more, with interval and p-value.
    """
    found = []
    for name in outcomes:
        if name == first:
            continue
        for budget in (None, *outcomes[first]):
            budgets = list(outcomes[first]) if budget is None else [budget]
            pairs = (_by_question(outcomes[policy], budgets) for policy in (first, name))
            gains = {
                kind: compare(own, other, draws)._asdict()
                for kind, own, other in zip(("accuracy", "accuracy_in_time"), *pairs, strict=True)
            }
            found.append({"against": name, "latency_budget": budget, **gains})
    return found


def _by_question(
    outcomes: Mapping[float, Sequence[Outcome]], budgets: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the mean over budgets of each question's accuracy, and of that in time."""
    every = [[outcome.execution.accuracy for outcome in outcomes[budget]] for budget in budgets]
    timely = [[in_time(outcome, budget) for outcome in outcomes[budget]] for budget in budgets]
    means = [
        [statistics.fmean(values) for values in zip(*part, strict=True)] for part in (every, timely)
    ]
    return means[0], means[1]


def write_results(folder: Path, document: Mapping[str, Any], outcomes: Outcomes) -> None:
    """Write an evaluation in place of an earlier one of the same weights and data sets.

    One of other data sets is kept: its folder is renamed, to one that ends in their names.

    Args:
        folder: for the files.
        document: of `eval.evaluate`.
        outcomes: every answer, to be written too; none if they are not wanted.
    """
    _make_room(folder, document)
    for name, part in document["datasets"].items():
        for budget in document["budgets"]:
            # All digits: no two budgets share a file.
            start = f"{name}_{document['split']}_budget_{str(budget).removesuffix('.0')}"
            results = [one for one in part["results"] if one["latency_budget"] == budget]
            write_json(folder / f"{start}_results.json", _under(results, document["unit"]))
            if outcomes:
                lines = _lines(name, budget, outcomes)
                write_text(folder / f"{start}_predictions.jsonl", "".join(lines))
    fronts = {name: part["pareto"] for name, part in document["datasets"].items()}
    kinds = ("all_points", "pareto_frontiers", "summary")
    write_json(
        folder / "pareto_data.json",
        {kind: {name: found[kind] for name, found in fronts.items()} for kind in kinds},
    )
    write_json(folder / "eval.json", document)


def _make_room(folder: Path, document: Mapping[str, Any]) -> None:
    """Make the folder, without files of the data sets of a new evaluation."""
    earlier, names = loads_or_none(folder / "eval.json"), document["datasets"]
    if earlier and set(earlier["datasets"]) != set(names):
        aside = _aside(folder, earlier["datasets"])
        shutil.rmtree(aside, ignore_errors=True)  # there only if an evaluation was cut off
        folder.rename(aside)
        log.info("%s: an earlier evaluation, of other data sets", aside)
    known = _aside(folder, names)
    if known.exists() and not folder.exists():
        known.rename(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = tuple(f"{name}_{document['split']}_budget_" for name in names)
    pictures = tuple(f"{name}_" for name in names)
    for path in list(folder.iterdir()):
        if path.name.startswith(pictures if path.suffix == ".png" else results):
            path.unlink()


def _aside(folder: Path, names: Collection[str]) -> Path:
    return folder.with_name(f"{folder.name}@{'+'.join(sorted(names))}")


def _under(results: Sequence[Mapping[str, Any]], unit: str) -> dict[str, Any]:
    """Return the results under one budget as one document."""
    shared = ("dataset", "split", "num_samples", "latency_budget")
    return {
        **{name: results[0][name] for name in shared},
        "unit": unit,
        "policies": {
            one["policy"]: {name: one[name] for name in ("metrics", "knob_distribution")}
            for one in results
        },
    }


def _lines(dataset: str, budget: float, outcomes: Outcomes) -> Iterator[str]:
    for policy, each in outcomes.items():
        for outcome in each[budget]:
            if outcome.id.partition("/")[0] == dataset:
                line = {"policy": policy, "latency_budget": budget, **outcome.plain()}
                yield json.dumps(line, allow_nan=False) + "\n"
