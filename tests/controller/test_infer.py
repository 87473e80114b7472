"""Answers from the command line: by a controller, by a table, and by a plan."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.controller.backbone import generate
from moectl.controller.latency import read_estimator
from moectl.controller.open import open_backbone
from moectl.controller.plans import Plan, plan_from
from moectl.controller.table import read_table
from moectl.controller.timing import Clock
from moectl.engine.images import read_image

Call = Callable[..., tuple[int, str, str]]

ORDER = [0, 3, 1, 5, 2, 4]
"""Of the tables."""
QUESTION = "Which colour?"
FULL = {"tier": "high", "blocks": [0, 1, 2, 3, 4, 5], "top_k": [8] * 6}
ODD = {"tier": "medium", "blocks": [0, 1, 3, 4, 5], "top_k": [8, 4, 7, 5, 8, 6]}


@pytest.fixture
def ask(controller: Call, asked_image: Path) -> Callable[..., Any]:
    """Ask about the image; return the JSON document."""

    def asked(*words: str, budget: str = "40") -> Any:
        given = ("--image", str(asked_image), "--prompt", QUESTION, "--budget", budget)
        code, out, err = controller("infer", *given, *words, "--json", "--cpu")
        assert code == 0, err
        return json.loads(out)

    return asked


@pytest.fixture
def refused(controller: Call, asked_image: Path) -> Callable[..., str]:
    """Ask about the image, in vain; return what stderr says."""

    def asked(*words: str) -> str:
        given = ("--image", str(asked_image), "--prompt", QUESTION, "--budget", "40", "--cpu")
        code, out, err = controller("infer", *given, *words)
        assert (code, out) == (2, ""), err
        assert err.startswith(("error: ", "warning: "))
        assert "Traceback" not in err
        return err

    return asked


@pytest.fixture(scope="session")
def plain(asked_image: Path) -> Callable[[Plan], Any]:
    """What a plain answer by a plan gives."""
    backbone = open_backbone("nano", device="cpu")

    def answer(plan: Plan) -> Any:
        inputs = backbone.prepare(read_image(asked_image), QUESTION, "vqa", plan.tier)
        clock = Clock(torch.device("cpu"))
        return generate(backbone, inputs, plan, max_new_tokens=3, clock=clock), inputs, backbone

    return answer


def plan_file(tmp_path: Path, plan: Any) -> tuple[str, str, str, str]:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    return "--plan", str(path), "--model", "nano"


def test_an_answer_comes_with_its_plan_and_the_latency_of_each_stage(
    ask: Callable[..., Any],
    nano_run: Path,
    plain: Callable[[Plan], Any],
    asked_image: Path,
    nano_tables: Path,
) -> None:
    found = ask("--run", str(nano_run))
    asked = {"image": str(asked_image), "question": QUESTION, "budget": 40.0, "unit": "ms"}
    assert {key: found[key] for key in asked} == asked
    plan = plan_from(found["plan"], open_backbone("nano", device="cpu").space)
    answer, inputs, backbone = plain(plan)
    assert found["answer"] == answer.text.strip()
    measured, predicted = found["measured"], found["predicted"]
    stages = ("controller", "vision", "prefill", "decode")
    assert found["latency"] == pytest.approx(sum(measured[stage] for stage in stages))
    assert all(measured[stage] > 0 for stage in stages)
    assert found["within_budget"] == (found["latency"] <= 40)
    assert measured["new_tokens"] == len(answer.tokens) == 3
    assert found["gflop"] == pytest.approx(backbone.gflop(plan, inputs, 3))
    counted = (inputs.vision_tokens, inputs.text_tokens)
    assert (found["vision_tokens"], found["text_tokens"]) == counted
    estimator = read_estimator(nano_tables / "latency.json")
    expected = estimator.timings(plan, inputs.crops, inputs.tokens, 3)
    assert predicted["vision"] == pytest.approx(expected.vision)
    assert predicted["prefill"] == pytest.approx(expected.prefill)
    assert predicted["decode"] == pytest.approx(expected.decode)
    assert (predicted["controller"], predicted["new_tokens"]) == (2.0, 3)
    assert found["prepare_ms"] > 0
    assert not {"full", "guard"} & set(found)


def test_people_read_the_answer_first(
    controller: Call, nano_run: Path, asked_image: Path, ask: Any
) -> None:
    words = (
        "--image",
        str(asked_image),
        "--prompt",
        QUESTION,
        "--budget",
        "40",
        "--run",
        str(nano_run),
    )
    code, out, _ = controller("infer", *words, "--compare", "--guard")
    lines = out.split("\n  ")
    assert code == 0
    assert lines[0] == ask("--run", str(nano_run), "--guard")["answer"]
    starts = ["plan", "latency", "measured", "predicted", "guard", "full plan"]
    assert all(line.startswith(start) for line, start in zip(lines[1:], starts, strict=True))
    assert "the budget of 40" in lines[2]


def test_a_comparison_runs_the_full_plan(
    ask: Callable[..., Any], tmp_path: Path, plain: Callable[[Plan], Any]
) -> None:
    words = (*plan_file(tmp_path, ODD), "--max-new-tokens", "3")
    found = ask(*words, "--compare")
    space = open_backbone("nano", device="cpu").space
    for part, wanted in ((found, plan_from(ODD, space)), (found["full"], space.full)):
        answer, inputs, backbone = plain(wanted)
        assert part["plan"] == wanted.plain()
        assert part["answer"] == answer.text.strip()
        assert part["gflop"] == pytest.approx(backbone.gflop(wanted, inputs, 3))
        assert part["vision_tokens"] == inputs.vision_tokens
    assert found["full"]["measured"]["controller"] == 0.0
    assert found["gflop"] < found["full"]["gflop"]
    assert found["predicted"] is None
    assert ask(*words)["answer"] == found["answer"]


@pytest.mark.parametrize("budget", [10.0, 17.0, 30.0, 44.5, 200.0])
def test_the_table_gives_its_best_row(
    ask: Callable[..., Any], nano_tables: Path, budget: float
) -> None:
    # The network is the table's, without a run.
    found = ask("--policy", "lut", "--tables", str(nano_tables), budget=str(budget))
    table = read_table(nano_tables / "lut.json")
    space = open_backbone("nano", device="cpu").space
    assert found["plan"] == table.plan(table.best(budget), space, ORDER).plain()
    assert found["predicted"]["controller"] == 0.0
    assert found["measured"]["controller"] < 20


def test_a_run_brings_its_tables(
    ask: Callable[..., Any], nano_run: Path, nano_tables: Path
) -> None:
    found = ask("--policy", "lut", "--run", str(nano_run), budget="1000")
    assert found["plan"] == FULL
    assert found["measured"]["new_tokens"] == 3


def test_several_budgets_are_several_answers(controller: Call, ask: Any, nano_tables: Path) -> None:
    found = ask("--policy", "lut", "--tables", str(nano_tables), budget="17,1000")
    first, second = found["answers"]
    assert (first["budget"], second["budget"], second["plan"]) == (17.0, 1000.0, FULL)
    assert first["plan"]["tier"] == "low"
    assert found["latency"] == pytest.approx((first["latency"] + second["latency"]) / 2)
    within = first["within_budget"] + second["within_budget"]
    assert found["within_budget"] == within / 2


def test_a_file_of_questions_is_answered_in_order(
    controller: Call, nano_run: Path, asked_image: Path, tmp_path: Path
) -> None:
    shutil.copy(asked_image, tmp_path / "here.png")
    lines: list[dict[str, Any]] = [
        {"image": "here.png", "question": QUESTION, "budget": 35},
        {"image": str(asked_image), "question": "How many?"},
    ]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    words = ("infer", "--questions", str(asked), "--budget", "50", "--run", str(nano_run))
    code, out, err = controller(*words, "--json")
    assert code == 0, err
    found = json.loads(out)["answers"]
    assert [(one["question"], one["budget"]) for one in found] == [
        (QUESTION, 35.0),
        ("How many?", 50.0),
    ]
    out = controller(*words)[1]
    assert f"{tmp_path / 'here.png'}: {QUESTION}\n" in out
    assert f"{asked_image}: How many?\n" in out
    assert out.count("the budget of") == 2
    assert "of 2 within their budgets; mean " in out.splitlines()[-1]
    lines[1]["image"] = "gone.png"
    asked.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = controller(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {asked}, line 2: {tmp_path / 'gone.png'}: no such image")


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ([1, 2], "plan.json: not a plan"),
        ({"tier": "low"}, "expected the keys tier, blocks and top_k"),
        ({**FULL, "tier": "huge"}, "tier huge: expected one of low, medium, high"),
        ({**FULL, "blocks": [0, 1, 2, 3, 9]}, "block 9: expected 0 to 5"),
        ({**FULL, "blocks": [1, 2, 3, 4, 5]}, "block 0 always runs"),
        ({**FULL, "blocks": [0, 1]}, "2 active blocks: expected 5 to 6"),
        ({**FULL, "top_k": [8, 8, 3, 8, 8, 8]}, "top_k = 3 in block 2"),
        ({**FULL, "top_k": [4, 8, 8, 8, 8, 8]}, "top_k = 4 in block 0"),
        ({**FULL, "blocks": "all"}, "expected the keys tier, blocks and top_k"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(
    refused: Callable[..., str], tmp_path: Path, plan: Any, told: str
) -> None:
    err = refused(*plan_file(tmp_path, plan))
    assert f"{tmp_path / 'plan.json'}: " in err
    assert told in err.splitlines()[0]


def test_a_plan_that_cannot_be_read_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    words = plan_file(tmp_path, FULL)
    (tmp_path / "plan.json").write_text("{")
    assert "plan.json" in refused(*words)
    (tmp_path / "plan.json").unlink()
    assert "plan.json: cannot be read" in refused(*words)
