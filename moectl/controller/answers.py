"""What came of questions, for people to read and as one document."""

import statistics
from collections.abc import Sequence
from typing import Any


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return all answers as one document."""
    return {
        "answers": list(found),
        "within_budget": statistics.fmean(one["within_budget"] for one in found),
        "latency": statistics.fmean(one["latency"] for one in found),
    }


def shown(found: dict[str, Any]) -> str:
    """Return an answer as text for people: answer, plan, latency by stage."""
    state, unit = "within" if found["within_budget"] else "over", found["unit"]
    lines = [
        found["answer"],
        f"  plan      {_words(found['plan'])}",
        f"  latency   {found['latency']:.4g} {unit}, {state} the budget of {found['budget']:g}",
        _stages("measured", found["measured"]),
    ]
    if found["predicted"]:
        lines.append(_stages("predicted", found["predicted"]))
    if guard := found.get("guard"):
        lines.append(f"  guard     {_guarded(guard, found['plan'], unit)}")
    if full := found.get("full"):
        lines.append(
            f"  full plan {full['answer']!r}: {full['latency']:.4g} {unit}, {full['gflop']:.2f}"
            f" GFLOP, {full['vision_tokens']} image tokens; this plan {found['gflop']:.2f} GFLOP,"
            f" {found['vision_tokens']} image tokens"
        )
    return "\n".join(lines)


def shown_all(found: Sequence[dict[str, Any]]) -> str:
    """Return several answers as text for people, each with what was asked."""
    parts = [f"{one['image']}: {one['question']}\n{shown(one)}" for one in found]
    within = sum(one["within_budget"] for one in found)
    mean = f"{summary(found)['latency']:.4g} {found[0]['unit']}"
    return "\n\n".join([*parts, f"{within} of {len(found)} within their budgets; mean {mean}"])


def _words(plan: dict[str, Any]) -> str:
    used = sorted({plan["top_k"][block] for block in plan["blocks"]} - {0})
    experts = f"; experts {used[0]}" if used else ""
    if len(used) > 1:
        experts += f" to {used[-1]}"
    return f"{plan['tier']}; {len(plan['blocks'])} blocks of {len(plan['top_k'])}{experts}"


def _guarded(guard: dict[str, Any], plan: dict[str, Any], unit: str) -> str:
    limit = f"{guard['limit']:.4g} {unit}"
    if not guard["fits"]:
        return f"no plan is predicted to take at most {limit}: the cheapest ran"
    if guard["before"] == plan:
        return f"the plan is predicted to take at most {limit}"
    return f"predicted to take at most {limit}, unlike {_words(guard['before'])}"


def _stages(name: str, times: dict[str, float]) -> str:
    parts = ", ".join(
        f"{stage} {times[stage]:.1f}" for stage in ("controller", "vision", "prefill", "decode")
    )
    return f"  {name:<9} {parts} ms; {times['new_tokens']} tokens"
