"""Figures of a policy: each against a hand-made case."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moectl.controller.execution import Execution, Timings
from moectl.controller.pareto import compare
from moectl.controller.plans import Plan
from moectl.controller.results import (
    Outcome,
    comparisons,
    in_time,
    knobs_of,
    metrics_of,
    official,
    pareto_of,
    results_of,
    write_results,
)
from moectl.controller.simulator import space
from moectl.controller.table import Row

FULL = space().full


def outcome(
    accuracy: float, latency: float, *, plan: Plan = FULL, answer: str = "", id: str = "a/1"
) -> Outcome:
    times = Timings(vision=10.0, prefill=20.0, decode=30.0, new_tokens=4, controller=2.0)
    execution = Execution(answer, accuracy, times, latency / 100, 12, 99, 9)
    return Outcome(id, plan, execution, times, latency, accuracy - 0.5)


def without(*blocks: int, tier: str = "high", top_k: int = 8) -> Plan:
    active = tuple(block not in blocks for block in range(16))
    return Plan(tier, active, space().uniform(top_k))


# Metrics


def test_metrics_of_four_answers() -> None:
    answers = [outcome(1, 80), outcome(0, 100), outcome(1, 104), outcome(1, 120)]
    found = metrics_of(answers, 100, 500)
    assert found["accuracy"] == 0.75
    assert found["accuracy_std"] == 0.5
    assert found["ci95"][0] < 0.75 < found["ci95"][1] == 1
    assert found["accuracy_in_time"] == 0.25
    assert found["avg_latency_ms"] == 101
    assert found["latency_std_ms"] == pytest.approx(16.452, abs=1e-3)
    assert (found["p50"], found["p95"]) == (102, pytest.approx(117.6))
    assert found["p99"] == pytest.approx(119.52)
    assert found["budget_violations"] == 2, "what takes the whole budget is in time"
    assert found["budget_violation_rate"] == 0.5
    assert found["violation_rate_5pct"] == 0.25
    assert found["mean_overshoot"] == pytest.approx((0.04 + 0.2) / 4)
    assert found["utilisation"] == pytest.approx(1.01)
    assert found["throughput"] == pytest.approx(1000 / 62)
    assert found["gflop"] == pytest.approx(1.01)
    assert found["controller_overhead_ms"] == 2
    assert found["stages_ms"] == {"controller": 2, "vision": 10, "prefill": 20, "decode": 30}
    assert found["reward"] == 0.25


def test_one_answer_has_no_deviation() -> None:
    found = metrics_of([outcome(0.5, 80)], 100, 100)
    assert (found["accuracy_std"], found["latency_std_ms"]) == (0, 0)
    assert found["ci95"] == [0.5, 0.5]


def test_late_answers_are_wrong() -> None:
    assert in_time(outcome(0.9, 100), 100) == 0.9
    assert in_time(outcome(0.9, 100.1), 100) == 0


# Knobs


def test_knobs_are_counted_where_blocks_run() -> None:
    uneven = replace(without(2, tier="low", top_k=4), top_k=(8, 5, *[4] * 14))
    found = knobs_of([uneven, without(2, 4, top_k=6), FULL, FULL], space())
    assert found["tier"] == {"low": 0.25, "medium": 0, "high": 0.75}
    assert found["num_active_blocks"] == {"14": 0.25, "15": 0.25, "16": 0.5}
    usage = [1.0] * 16
    usage[2], usage[4] = 0.5, 0.75
    assert found["block_usage"] == usage
    assert found["top_k"][0] == {}, "the first block has no choice"
    assert found["top_k"][1] == {"5": 0.25, "6": 0.25, "8": 0.5}
    assert found["top_k"][2] == {"8": 1.0}
    assert found["top_k"][4] == pytest.approx({"4": 1 / 3, "8": 2 / 3})
    total = (5 + 13 * 4) + 13 * 6 + 2 * 15 * 8
    assert found["mean_top_k"] == pytest.approx(total / (14 + 13 + 30))
    assert found["mean_active_blocks"] == 15.25
    assert found["distinct_plans"] == 3


def test_networks_without_experts_have_no_mean_of_them() -> None:
    dense = replace(space(), mixtures=(False,) * 16, default_top_k=0, top_k_choices=())
    found = knobs_of([dense.full], dense)
    assert found["mean_top_k"] is None
    assert found["top_k"] == [{}] * 16


# Scores that others publish


def sample(metric: str, *answers: str, id: str = "a/1") -> Any:
    return SimpleNamespace(id=id, metric=metric, answers=answers)


def test_vqa_is_scored_as_others_do() -> None:
    samples = [sample("vqa", *["two"] * 2, *["three"] * 8), sample("vqa", "yes")]
    answers = [outcome(0, 1, answer="Answer: Two"), outcome(0, 1, answer="no")]
    assert official(answers, samples) == {"vqa_official": pytest.approx(0.3)}


def test_captions_are_scored_over_the_corpus() -> None:
    words = ["a red bus stands in the road", "two cats sleep on a blue sofa"]
    samples = [sample("caption", text, id=f"c/{number}") for number, text in enumerate(words)]
    right = [outcome(0, 1, answer=text) for text in words]
    found = official(right, samples)
    assert found["cider_d"] == pytest.approx(10)
    assert found["bleu4"] == pytest.approx(1)
    assert found["rouge_l"] == pytest.approx(1)
    wrong = official(right[::-1], samples)
    assert wrong["cider_d"] < 1
    assert official(right[:1], samples[:1]) == {}, "one image is no corpus"


def test_mixed_metrics_have_no_such_score() -> None:
    samples = [sample("vqa", "yes"), sample("exact", "yes")]
    assert official([outcome(1, 1), outcome(1, 1)], samples) == {}


# Comparisons


def outcomes(**by_policy: Any) -> dict[str, dict[float, list[Outcome]]]:
    """Take lists of (accuracy, latency) by budget."""
    return {
        policy: {
            budget: [outcome(*pair, id=f"a/{row}") for row, pair in enumerate(pairs)]
            for budget, pairs in each.items()
        }
        for policy, each in by_policy.items()
    }


def test_questions_are_paired_within_and_over_budgets() -> None:
    given = outcomes(
        controller={10.0: [(1, 9), (0, 9), (1, 11)], 20.0: [(1, 9), (1, 9), (1, 9)]},
        lut={10.0: [(0, 9), (0, 9), (1, 9)], 20.0: [(1, 9), (0, 9), (0, 9)]},
    )
    overall, first, second = comparisons(given, "controller", 200)
    assert [one["against"] for one in (overall, first, second)] == ["lut"] * 3
    assert [one["latency_budget"] for one in (overall, first, second)] == [None, 10, 20]
    assert overall["accuracy"] == compare([1, 0.5, 1], [0.5, 0, 0.5], 200)._asdict()
    assert overall["accuracy_in_time"] == compare([1, 0.5, 0.5], [0.5, 0, 0.5], 200)._asdict()
    assert first["accuracy"] == compare([1, 0, 1], [0, 0, 1], 200)._asdict()
    assert first["accuracy_in_time"]["difference"] == 0
    assert second["accuracy"]["difference"] == pytest.approx(2 / 3)


def test_a_policy_alone_is_compared_with_nothing() -> None:
    assert comparisons(outcomes(controller={10.0: [(1, 9)]}), "controller", 100) == []


# Fronts


def test_points_fronts_and_areas() -> None:
    given = outcomes(
        controller={10.0: [(0.4, 10)], 20.0: [(0.8, 20)], 30.0: [(0.7, 30)]},
        static_full={10.0: [(0.9, 40)], 20.0: [(0.9, 40)], 30.0: [(0.9, 40)]},
    )
    rows = [Row("low", 4, 12, 0.5, 15.0, 9, 0.1, 1.0), Row("low", 6, 12, 0.4, 16.0, 9, 0.1, 1.0)]
    found = pareto_of(results_of(given, space(), [], 100), rows, 40.0)
    assert len(found["all_points"]) == 8
    assert found["all_points"][1] == {
        "policy": "controller", "accuracy": 0.8, "latency": 20, "latency_budget": 20,
    }  # fmt: skip
    fronts = found["pareto_frontiers"]
    assert [point["latency"] for point in fronts["controller"]] == [10, 20]
    assert [point["plan"] for point in fronts["grid"]] == ["low_4_12"]
    assert {point["policy"] for point in fronts["all"]} == {"controller", "static_full"}
    assert found["summary"]["controller"] == {
        "hypervolume": pytest.approx(0.4 * 30 + 0.4 * 20),
        "budget_area": pytest.approx((0.6 + 0.75) / 2),
    }
    assert found["summary"]["static_full"]["hypervolume"] == 0
    assert found["summary"]["corner"] == 40
    assert "grid" not in found["summary"], "its questions are others"
    assert "grid" not in pareto_of(results_of(given, space(), [], 100), [], 40.0)


def test_results_know_policy_budget_and_published_scores() -> None:
    given = outcomes(lut={10.0: [(0.4, 10)]}, random={10.0: [(0.8, 20)]})
    found = results_of(given, space(), [sample("vqa", "yes")], 100)
    assert [(one["policy"], one["latency_budget"]) for one in found] == [
        ("lut", 10), ("random", 10),
    ]  # fmt: skip
    assert found[0]["metrics"]["vqa_official"] == 0
    assert found[0]["knob_distribution"]["distinct_plans"] == 1
    assert "vqa_official" not in results_of(given, space(), [], 100)[0]["metrics"]


# Files


def document(given: Any, name: str = "a") -> dict[str, Any]:
    results = [
        {"dataset": name, "split": "test", "num_samples": 1, **one}
        for one in results_of(given, space(), [], 100)
    ]
    part = {"results": results, "pareto": pareto_of(results, [], 40.0)}
    budgets = list(given["controller"])
    return {"split": "test", "unit": "ms", "budgets": budgets, "datasets": {name: part}}


def test_files_hold_all_policies_of_a_budget(tmp_path: Path) -> None:
    given = outcomes(
        controller={10.0: [(0.4, 10)], 20.5: [(0.8, 20)]},
        lut={10.0: [(0.5, 9)], 20.5: [(0.6, 9)]},
    )
    other = given["lut"][10.0][0]._replace(id="b/1")
    found, folder = document(given), tmp_path / "evals" / "x"
    write_results(folder, found, {**given, "lut": {**given["lut"], 10.0: [other]}})
    assert {path.name for path in folder.iterdir()} == {
        "eval.json", "pareto_data.json",
        "a_test_budget_10_results.json", "a_test_budget_20.5_results.json",
        "a_test_budget_10_predictions.jsonl", "a_test_budget_20.5_predictions.jsonl",
    }  # fmt: skip
    assert json.loads((folder / "eval.json").read_text()) == found
    under = json.loads((folder / "a_test_budget_20.5_results.json").read_text())
    assert under["policies"]["lut"]["metrics"]["accuracy"] == 0.6
    assert (under["dataset"], under["latency_budget"], under["unit"]) == ("a", 20.5, "ms")
    pareto = json.loads((folder / "pareto_data.json").read_text())
    assert set(pareto) == {"all_points", "pareto_frontiers", "summary"}
    assert pareto["summary"]["a"] == found["datasets"]["a"]["pareto"]["summary"]
    lines = (folder / "a_test_budget_20.5_predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["policy"], first["sample_id"], first["latency"]) == ("controller", "a/0", 20)
    assert first["plan"] == FULL.plain()
    (only,) = (folder / "a_test_budget_10_predictions.jsonl").read_text().splitlines()
    assert json.loads(only)["policy"] == "controller", "b/1 is of another data set"


def test_an_earlier_evaluation_makes_room(tmp_path: Path) -> None:
    for name in (
        "a_test_budget_7_results.json",
        "a_test_budget_7_predictions.jsonl",
        "a_knobs.png",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    given = outcomes(controller={10.0: [(0.4, 10)], 20.5: [(0.8, 20)]})
    write_results(tmp_path, document(given), {})
    assert not [path for path in tmp_path.iterdir() if "_7_" in path.name or path.suffix == ".png"]
    assert not list(tmp_path.glob("*.jsonl"))
    assert (tmp_path / "notes.txt").exists()


def test_an_evaluation_of_other_data_sets_is_kept(tmp_path: Path) -> None:
    folder, kept = tmp_path / "test@best", tmp_path / "test@best@synth"
    given = outcomes(controller={10.0: [(0.4, 10)]})
    first = document(given, "synth")
    write_results(folder, first, given)
    (folder / "synth_knobs.png").write_text("drawn")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_results(folder, document(outcomes(controller={30.0: [(0.4, 10)]}), "real"), {})
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert {path.name for path in folder.iterdir()} == {
        "eval.json", "pareto_data.json", "real_test_budget_30_results.json",
    }  # fmt: skip
    write_results(folder, first, {})
    assert json.loads((folder / "eval.json").read_text()) == first
    assert (tmp_path / "test@best@real" / "real_test_budget_30_results.json").exists()
    assert not kept.exists(), "written anew"


def test_a_torn_evaluation_loses_only_files_of_the_data_sets_written(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "eval.json").write_text("{")
    for name in ("a_test_budget_7_results.json", "b_test_budget_7_results.json", "b_knobs.png"):
        (folder / name).write_text("")
    write_results(folder, document(outcomes(controller={10.0: [(0.4, 10)]})), {})
    assert {path.name for path in folder.iterdir()} == {
        "eval.json", "pareto_data.json", "a_test_budget_10_results.json",
        "b_test_budget_7_results.json", "b_knobs.png",
    }  # fmt: skip


def test_budgets_that_print_alike_have_files_of_their_own(tmp_path: Path) -> None:
    budgets = [150.0, 1234567.1, 1234567.2]
    given = outcomes(controller={budget: [(0.4, 10)] for budget in budgets})
    write_results(tmp_path, document(given), given)
    for end in ("results.json", "predictions.jsonl"):
        names = {path.name for path in tmp_path.glob(f"*_{end}")}
        assert names == {
            f"a_test_budget_{text}_{end}" for text in ("150", "1234567.1", "1234567.2")
        }
