"""Fitted latencies: known formulas are found again, unknown plans predicted, budgets kept."""

import json
import logging
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.controller.execution import Execution, Timings
from moectl.controller.latency import (
    STAGES,
    Estimator,
    estimator_from,
    fit,
    margin,
    read_estimator,
)
from moectl.controller.plans import Plan
from moectl.controller.records import Record, record
from moectl.engine.errors import UserError
from moectl.engine.files import write_json

BLOCKS = 16
CROPS = {"low": 3, "medium": 6, "high": 12}
TOKENS = {"low": 450, "medium": 780, "high": 1300}
PREFILL = {"fixed": 5.0, "block": 0.4, "token": 2e-3, "expert": 6e-4, "square": 5e-7}
STEP = {"fixed": 1.5, "block": 0.3, "expert": 0.05, "context": 1e-4}


def truth(plan: Plan, crops: int, tokens: int, new_tokens: int) -> Timings:
    """The formulas, written as sums over blocks and steps."""
    prefill = PREFILL["fixed"]
    for block in plan.blocks:
        prefill += PREFILL["block"] + PREFILL["token"] * tokens
        prefill += PREFILL["expert"] * tokens * plan.top_k[block] + PREFILL["square"] * tokens**2
    decode = 0.0
    for step in range(1, new_tokens):
        decode += STEP["fixed"]
        for block in plan.blocks:
            decode += STEP["block"] + STEP["expert"] * plan.top_k[block]
            decode += STEP["context"] * (tokens + step)
    return Timings(8 + 4 * crops, prefill, decode, new_tokens)


def executed(plan: Plan, tokens: int, new_tokens: int, noise: Any, factor: float = 1.0) -> Record:
    crops = CROPS[plan.tier]
    exact = truth(plan, crops, tokens, new_tokens)
    vision, prefill, decode = (
        factor * time * (1 + noise()) for time in (exact.vision, exact.prefill, exact.decode)
    )
    timings = Timings(vision, prefill, decode, new_tokens)
    return record("q", plan, Execution("", 0.5, timings, 1.0, crops, tokens - 20, 20))


def random_plan(draws: np.random.Generator, tiers: tuple[str, ...], ks: tuple[int, ...]) -> Plan:
    count = int(draws.integers(12, 17))
    skipped = set(1 + draws.permutation(15)[: 16 - count])
    active = tuple(block not in skipped for block in range(BLOCKS))
    numbers = tuple(int(draws.choice(ks)) for _ in range(15))
    return Plan(str(draws.choice(tiers)), active, (8, *numbers))


def records(
    count: int = 40,
    *,
    spread: float = 0.0,
    seed: int = 0,
    tiers: tuple[str, ...] = tuple(CROPS),
    ks: tuple[int, ...] = (4, 5, 6, 7, 8),
    factor: float = 1.0,
) -> list[Record]:
    draws = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        plan = random_plan(draws, tiers, ks)
        tokens = TOKENS[plan.tier] + int(draws.integers(0, 40))
        new_tokens = int(draws.integers(2, 12))
        found.append(
            executed(plan, tokens, new_tokens, lambda: spread * draws.standard_normal(), factor)
        )
    return found


def plan_of(tier: str, top_k: int, count: int) -> Plan:
    return Plan(tier, (True,) * count + (False,) * (16 - count), (8,) + (top_k,) * 15)


def compare(estimator: Estimator, plan: Plan, factor: float = 1.0) -> list[float]:
    """Predicted over true times of the stages."""
    crops, tokens = CROPS[plan.tier], TOKENS[plan.tier] + 20
    found = estimator.timings(plan, crops, tokens, 6)
    exact = truth(plan, crops, tokens, 6)
    assert found.new_tokens == 6
    pairs = zip(astuple(found)[:3], astuple(exact)[:3], strict=True)
    return [predicted / time / factor for predicted, time in pairs]


def test_exact_times_give_the_formulas_back() -> None:
    stages = fit(records(), BLOCKS).stages
    assert [*stages["vision"].weights.values()] == pytest.approx([4, 8, 0], abs=1e-9)
    prefill, step = (list(stages[name].weights.values()) for name in ("prefill", "step"))
    known = [PREFILL[name] for name in ("token", "expert", "fixed", "block", "square")]
    assert prefill == pytest.approx(known, rel=1e-4)
    known = [STEP[name] for name in ("block", "expert", "fixed", "context")]
    assert step == pytest.approx(known, rel=1e-4)
    for stage in stages.values():
        assert stage.r2 == pytest.approx(1)
        assert stage.mape < 1e-6
        assert stage.samples == 40


def test_a_tower_that_sees_all_crops_at_once_costs_by_their_square() -> None:
    curved = records()
    for values in curved:
        values["T_vision_total"] = np.polyval([0.5, 3, 2], values["actual_num_crops"])
    weights = fit(curved, BLOCKS).stages["vision"].weights
    assert weights == pytest.approx({"crops": 3, "fixed": 2, "crops squared": 0.5})


@pytest.mark.parametrize("tier", CROPS)
@pytest.mark.parametrize(("top_k", "count"), [(4, 12), (8, 16), (4, 16), (6, 14)])
def test_plans_that_were_never_run_are_predicted(tier: str, top_k: int, count: int) -> None:
    assert compare(fit(records(), BLOCKS), plan_of(tier, top_k, count)) == pytest.approx([1] * 3)
    noisy = fit(records(60, spread=0.03), BLOCKS)
    assert compare(noisy, plan_of(tier, top_k, count)) == pytest.approx([1] * 3, abs=0.05)


def test_scores_are_those_of_plans_left_out_one_by_one() -> None:
    noisy = records(12, spread=0.05)
    for values in noisy:
        values["T_vision_total"] += values["actual_num_crops"] ** 2
    times = np.array([values["T_vision_total"] for values in noisy])
    crops = np.array([values["actual_num_crops"] for values in noisy])
    found = np.zeros(12)
    for out in range(12):
        seen = np.arange(12) != out
        found[out] = np.polyval(np.polyfit(crops[seen], times[seen], 2), crops[out])
    stage = fit(noisy, BLOCKS).stages["vision"]
    squares = np.square(times - found).sum() / np.square(times - times.mean()).sum()
    assert stage.r2 == pytest.approx(1 - squares)
    assert stage.mape == pytest.approx(np.abs(found / times - 1).mean())


def test_repeats_of_a_plan_are_left_out_together() -> None:
    # A repeat that stays in the fit would give its own plan's time away.
    once = records(8, spread=0.2, seed=5)
    twice = fit([values for values in once for _ in range(2)], BLOCKS)
    assert twice.stages["prefill"].mape == pytest.approx(fit(once, BLOCKS).stages["prefill"].mape)


def test_the_method_is_the_one_that_predicts_better() -> None:
    # Negative weights of the truth need plain least squares.
    falling = records()
    for values in falling:
        values["T_vision_total"] = 100.0 - 2 * values["actual_num_crops"]
    stage = fit(falling, BLOCKS).stages["vision"]
    assert stage.method == "plain"
    assert [*stage.weights.values()] == pytest.approx([-2, 100, 0], abs=1e-9)
    # Noise on nothing but tokens: plain least squares fits it with weights of either sign.
    methods = [
        fit(records(12, spread=0.1, seed=seed), BLOCKS).stages["prefill"].method
        for seed in range(8)
    ]
    assert methods.count("non-negative") >= 6


@pytest.mark.parametrize("seed", range(6))
def test_one_number_of_experts_says_nothing_about_others(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = fit(records(ks=(4,), spread=0.02, seed=seed), BLOCKS)
    assert "step: nothing learned about experts" in caplog.text
    assert found.stages["prefill"].weights["experts x tokens"] == 0
    assert found.stages["step"].weights["experts"] == 0
    assert compare(found, plan_of("medium", 4, 13)) == pytest.approx([1] * 3, abs=0.05)
    assert compare(found, plan_of("high", 8, 16))[1] == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_blocks_own_experts_do_not_stand_for_all_in_a_small_network(seed: int) -> None:
    # In few blocks the first one's share is large enough to look like a column of its own.
    draws = np.random.default_rng(seed)
    small = []
    for _ in range(40):
        active = (True,) * 5 + (bool(draws.integers(2)),)
        plan = Plan(str(draws.choice(tuple(CROPS))), active, (8,) + (4,) * 5)
        tokens = TOKENS[plan.tier] + int(draws.integers(40))
        small.append(executed(plan, tokens, 6, lambda: 0.02 * draws.standard_normal()))
    assert fit(small, 6).stages["prefill"].weights["experts x tokens"] == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ks", [(4,), (4, 6, 8)], ids=str)
def test_one_tier_predicts_others_within_reason(seed: int, ks: tuple[int, ...]) -> None:
    found = fit(records(tiers=("medium",), ks=ks, spread=0.02, seed=seed), BLOCKS)
    assert found.stages["vision"].weights["fixed"] == 0
    assert compare(found, plan_of("medium", 4, 13)) == pytest.approx([1] * 3, abs=0.1)
    for tier in ("low", "high"):
        assert all(0.5 < ratio < 2 for ratio in compare(found, plan_of(tier, 4, 14)))


def test_identical_questions_and_full_plans_still_scale_with_tokens() -> None:
    draws = np.random.default_rng(0)
    same = [
        executed(plan_of("low", top_k, 16), 470, 6, lambda: 0.01 * draws.standard_normal())
        for top_k in (4, 6, 8)
        for _ in range(4)
    ]
    found = fit(same, BLOCKS)
    assert compare(found, plan_of("low", 5, 16)) == pytest.approx([1] * 3, abs=0.05)
    assert 0.5 < compare(found, plan_of("high", 8, 16))[1] < 1.5


@pytest.mark.parametrize("seed", range(4))
def test_blocks_without_experts_are_fitted(seed: int) -> None:
    dense = records(seed=seed)
    for values in dense:
        values["plan"] = {**values["plan"], "top_k": [0] * 16}
        values["T_LLM_prefill"] = 3.0 * values["num_active_blocks"]
        values["T_decode_per_token"] = 0.5 * values["num_active_blocks"]
    found = fit(dense, BLOCKS)
    times = found.timings(Plan("low", (True,) * 16, (0,) * 16), 3, 460, 3)
    assert (times.prefill, times.decode) == pytest.approx((48, 16), rel=1e-3)


def test_answers_of_one_token_count_for_all_but_the_step() -> None:
    short = records(10, seed=3)
    for values in short:
        values.update(output_tokens=1, T_LLM_decode=0.0, T_decode_per_token=0.0)
    found = fit([*records(), *short], BLOCKS)
    assert [found.stages[name].samples for name in STAGES] == [50, 50, 40]
    assert found.stages["step"].r2 == pytest.approx(1)
    assert [len(values) for values in found.residuals.values()] == [50, 50, 50, 40]
    for tokens in (0, 1):
        assert found.timings(plan_of("low", 4, 12), 3, 460, tokens).decode == 0
    with pytest.raises(UserError, match="answers of two tokens or more"):
        fit(short, BLOCKS)


def test_records_of_one_plan_or_another_network_are_refused() -> None:
    for few in (records(1) * 5, []):
        with pytest.raises(UserError, match="at least two plans"):
            fit(few, BLOCKS)
    with pytest.raises(UserError, match="a network of 16 blocks: expected 6"):
        fit(records(), 6)
    with pytest.raises(ValueError, match="a plan of 2 blocks: expected 16"):
        fit(records(), BLOCKS).timings(Plan("low", (True,) * 2, (8,) * 2), 3, 460, 2)


def test_times_are_never_negative() -> None:
    rising = records()
    for values in rising:
        values["T_vision_total"] = 10.0 * values["actual_num_crops"] - 25
    found = fit(rising, BLOCKS)
    assert [*found.stages["vision"].weights.values()] == pytest.approx([10, -25, 0], abs=1e-9)
    assert found.timings(plan_of("low", 4, 12), 1, 460, 2).vision == 0


def test_stages_without_time_are_predicted_as_nothing() -> None:
    still = [{**values, "T_vision_total": 0.0} for values in records()]
    stage = fit(still, BLOCKS).stages["vision"]
    assert ([*stage.weights.values()], stage.r2, stage.mape) == ([0, 0, 0], 0.0, 0.0)


def test_residuals_are_shares_of_the_measured_latency() -> None:
    exact = records(30)
    assert fit(exact, BLOCKS).residuals["total"] == pytest.approx([0] * 30, abs=1e-6)
    one_slow = records(30)
    one_slow[4]["T_total"] *= 2
    assert fit(one_slow, BLOCKS).residuals["total"][4] == pytest.approx(0.5)
    watched = records(30)
    for values in watched:
        values.update(T_controller=7.0, T_total=values["T_total"] + 7)
    for objective in ("total", "ttft"):
        assert fit(watched, BLOCKS).residuals[objective] == pytest.approx([0] * 30, abs=1e-6)


@pytest.mark.parametrize("objective", ["total", "ttft", "prefill"])
def test_a_margin_keeps_the_share_of_missed_budgets(objective: Any) -> None:
    missed = []
    for seed in range(12):
        found = fit(records(60, spread=0.06, seed=seed), BLOCKS)
        kept = margin(found.residuals[objective], 0.1)
        for values in records(60, spread=0.06, seed=100 + seed):
            plan = values["plan"]
            active = tuple(block in plan["blocks"] for block in range(BLOCKS))
            timings = found.timings(
                Plan(plan["tier"], active, tuple(plan["top_k"])),
                values["actual_num_crops"],
                values["actual_vision_tokens"] + values["actual_text_tokens"],
                values["output_tokens"],
            )
            # The smallest budget at which this plan would have been let pass.
            budget = timings.latency(objective) / (1 - kept)
            actual = {
                "total": values["T_total"],
                "ttft": values["T_vision_total"] + values["T_LLM_prefill"],
                "prefill": values["T_LLM_prefill"],
            }[objective]
            missed.append(actual > budget)
    assert 0.06 < np.mean(missed) < 0.14


def test_known_margins() -> None:
    residuals = [rank / 100 for rank in range(19, 0, -1)]
    assert margin(residuals) == 0.19
    assert margin(residuals, 0.1) == 0.18
    assert margin(residuals, 0.5) == 0.10
    assert margin([-1.0] * 18 + [0.3], 0.1) == 0.0


def test_margins_need_enough_residuals() -> None:
    with pytest.raises(ValueError, match=r"18 residuals are too few .* at least 19"):
        margin([0.1] * 18)
    with pytest.raises(ValueError, match="at least 99"):
        margin([0.1] * 98, 0.01)
    assert margin([0.1] * 99, 0.01) == 0.1


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 5])
def test_targets_are_shares(target: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        margin([0.1] * 50, target)


def test_estimators_survive_a_file(tmp_path: Path) -> None:
    found = fit(records(30, spread=0.05), BLOCKS)
    write_json(tmp_path / "latency.json", found.plain())
    assert read_estimator(tmp_path / "latency.json") == found
    assert found.plain()["schema"] == "moectl.latency/1"


def without(*keys: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(fit(records(20), BLOCKS).plain()))
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return document


@pytest.mark.parametrize(
    "keys",
    [
        ("blocks",),
        ("residuals",),
        ("stages", "step"),
        ("stages", "step", "r2"),
        ("stages", "prefill", "weights", "blocks"),
    ],
    ids="/".join,
)
def test_what_is_no_estimator_is_refused(tmp_path: Path, keys: tuple[str, ...]) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(without(*keys)))
    with pytest.raises(UserError, match=rf"{path}: not fitted latencies"):
        read_estimator(path)


def test_weights_that_are_no_numbers_are_refused() -> None:
    document = fit(records(20), BLOCKS).plain()
    document["stages"]["vision"]["weights"]["crops"] = float("nan")
    with pytest.raises(ValueError, match="vision holds a number that is not finite"):
        estimator_from(document)


@pytest.mark.parametrize("objective", ["total", "ttft", "prefill", "per_token"])
@pytest.mark.parametrize("spoilt", [[0.1, float("nan")], [float("-inf")], ["x"], None, 3])
def test_residuals_of_every_objective_are_finite(
    tmp_path: Path, objective: str, spoilt: Any
) -> None:
    path, document = tmp_path / "latency.json", fit(records(20), BLOCKS).plain()
    for values in ({}, {objective: spoilt}):
        del document["residuals"][objective]
        document["residuals"].update(values)
        path.write_text(json.dumps(document))
        with pytest.raises(UserError, match=rf"{path}: not fitted latencies"):
            read_estimator(path)
        document["residuals"][objective] = []
