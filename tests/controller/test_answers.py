"""Answers as people read them."""

from typing import Any

import pytest

from moectl.controller.answers import shown, shown_all, summary

TIMES = {"controller": 1.04, "vision": 5.0, "prefill": 7.26, "decode": 3.0, "new_tokens": 4}
FULL = {"tier": "high", "blocks": [0, 1, 2], "top_k": [8, 8, 8]}
PLAN = {"tier": "low", "blocks": [0, 2], "top_k": [8, 8, 5]}
ANSWER: dict[str, Any] = {
    "image": "a.png", "question": "Which colour?", "budget": 20.0, "unit": "ms",
    "answer": "green", "plan": PLAN, "latency": 16.3, "measured": TIMES, "predicted": None,
    "gflop": 0.5, "vision_tokens": 36, "text_tokens": 9, "within_budget": True, "prepare_ms": 1.0,
}  # fmt: skip


def guarded(**guard: Any) -> str:
    guard = {"limit": 18.04, "fits": True, "before": FULL} | guard
    return shown({**ANSWER, "guard": guard}).splitlines()[-1]


def test_the_answer_comes_first_then_plan_and_times() -> None:
    assert shown(ANSWER).splitlines() == [
        "green",
        "  plan      low; 2 blocks of 3; experts 5 to 8",
        "  latency   16.3 ms, within the budget of 20",
        "  measured  controller 1.0, vision 5.0, prefill 7.3, decode 3.0 ms; 4 tokens",
    ]


def test_predicted_times_stand_below_the_measured_ones() -> None:
    lines = shown({**ANSWER, "predicted": {**TIMES, "prefill": 9.0}}).splitlines()
    assert lines[3].index("prefill 7.3") == lines[4].index("prefill 9.0")
    assert lines[4].startswith("  predicted ")


def test_a_missed_budget_is_said() -> None:
    late = {**ANSWER, "latency": 0.75, "unit": "GFLOP", "budget": 0.5, "within_budget": False}
    assert "  latency   0.75 GFLOP, over the budget of 0.5" in shown(late).splitlines()


@pytest.mark.parametrize(
    ("top_k", "told"), [([8, 4, 8], "; experts 8"), ([0, 0, 0], ""), ([0, 4, 6], "; experts 6")]
)
def test_experts_are_those_of_blocks_that_run(top_k: list[int], told: str) -> None:
    text = shown({**ANSWER, "plan": {**PLAN, "top_k": top_k}})
    assert text.splitlines()[1] == f"  plan      low; 2 blocks of 3{told}"


def test_the_guard_says_what_it_did() -> None:
    made = "  guard     predicted to take at most 18.04 ms, unlike high; 3 blocks of 3; experts 8"
    assert guarded() == made
    kept = "  guard     the plan is predicted to take at most 18.04 ms"
    assert guarded(before=PLAN) == kept
    none = "  guard     no plan is predicted to take at most 18.04 ms: the cheapest ran"
    assert guarded(fits=False) == guarded(fits=False, before=PLAN) == none


def test_the_full_plan_stands_beside_this_one() -> None:
    full = {"answer": "red\n", "latency": 40.21, "gflop": 2.0, "vision_tokens": 200}
    assert shown({**ANSWER, "full": full}).splitlines()[-1] == (
        "  full plan 'red\\n': 40.21 ms, 2.00 GFLOP, 200 image tokens; this plan 0.50 GFLOP,"
        " 36 image tokens"
    )


def test_several_answers_are_told_apart_and_summed_up() -> None:
    late = {**ANSWER, "image": "b.png", "latency": 21.5, "within_budget": False}
    document = summary([ANSWER, late, ANSWER])
    assert document["answers"] == [ANSWER, late, ANSWER]
    assert document["within_budget"] == pytest.approx(2 / 3)
    assert document["latency"] == pytest.approx((2 * 16.3 + 21.5) / 3)
    parts = shown_all([ANSWER, late]).split("\n\n")
    assert parts[0] == f"a.png: Which colour?\n{shown(ANSWER)}"
    assert parts[1] == f"b.png: Which colour?\n{shown(late)}"
    assert parts[2] == "1 of 2 within their budgets; mean 18.9 ms"
