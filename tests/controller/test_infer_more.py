"""Answers from the command line: the guard, and which run, network and tables are taken."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.controller import infer as module
from moectl.controller import weights
from moectl.controller.backbone import generate
from moectl.controller.llava import LlavaNext
from moectl.engine.errors import UserError

Call = Callable[..., tuple[int, str, str]]

ORDER = [0, 3, 1, 5, 2, 4]
"""Of the tables."""
QUESTION = "Which colour?"
FULL = {"tier": "high", "blocks": [0, 1, 2, 3, 4, 5], "top_k": [8] * 6}


@pytest.fixture
def own_run(nano_run: Path, tmp_path: Path) -> Path:
    """The same run, as a copy that may be changed."""
    return shutil.copytree(nano_run, tmp_path / "runs" / "controller" / "t")


@pytest.fixture
def own_tables(nano_tables: Path, tmp_path: Path) -> Path:
    """The same tables, likewise."""
    return shutil.copytree(nano_tables, tmp_path / "tables")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


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


def plan_file(tmp_path: Path, plan: Any) -> tuple[str, str, str, str]:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    return "--plan", str(path), "--model", "nano"


def test_the_guard_makes_a_plan_cheaper_until_it_fits(
    ask: Callable[..., Any], nano_tables: Path, tmp_path: Path
) -> None:
    words = (*plan_file(tmp_path, FULL), "--tables", str(nano_tables), "--guard")
    wide, tight, hopeless = ask(*words, budget="1000,42,3")["answers"]
    assert (wide["plan"], wide["guard"]["fits"]) == (FULL, True)
    assert wide["guard"]["limit"] == pytest.approx(1000 * (1 - 0.19))
    assert tight["guard"]["before"] == FULL != tight["plan"]
    expected = sum(tight["predicted"][stage] for stage in ("vision", "prefill", "decode"))
    assert expected <= tight["guard"]["limit"] == pytest.approx(42 * (1 - 0.19))
    # Blocks that matter least are given up first.
    assert set(range(6)) - set(tight["plan"]["blocks"]) <= {ORDER[-1]}
    assert hopeless["guard"]["fits"] is False
    least = {"tier": "low", "blocks": sorted(ORDER[:5]), "top_k": [8, 4, 4, 4, 4, 4]}
    assert hopeless["plan"] == least


def test_the_guard_says_when_nothing_fits(
    controller: Call, asked_image: Path, nano_tables: Path, tmp_path: Path
) -> None:
    given = ("infer", "--image", str(asked_image), "--prompt", QUESTION, "--budget", "3,42,1000")
    words = (*plan_file(tmp_path, FULL), "--tables", str(nano_tables), "--guard", "--cpu")
    _, out, _ = controller(*given, *words)
    hopeless, tight, wide = (line for line in out.splitlines() if line.startswith("  guard"))
    assert hopeless == "  guard     no plan is predicted to take at most 2.43 ms: the cheapest ran"
    assert tight.endswith("take at most 34.02 ms, unlike high; 6 blocks of 6; experts 8")
    assert wide == "  guard     the plan is predicted to take at most 810 ms"


def test_the_guard_counts_the_time_of_the_controller(
    ask: Callable[..., Any], nano_run: Path, own_tables: Path
) -> None:
    edit(own_tables / "overhead.json", lambda values: values.update(controller_ms=5000.0))
    found = ask("--run", str(nano_run), "--tables", str(own_tables), "--guard", budget="54")
    assert (found["guard"]["fits"], found["predicted"]["controller"]) == (False, 5000.0)
    # Before the first token no controller runs.
    words = (
        "--run",
        str(nano_run),
        "--tables",
        str(own_tables),
        "--guard",
        "--objective",
        "prefill",
    )
    edit(own_tables / "lut.json", lambda values: values["metadata"].update(objective="prefill"))
    found = ask(*words, budget="54")
    assert found["guard"]["fits"] is True
    assert found["latency"] == found["measured"]["prefill"]


def test_a_stricter_guard_keeps_more_free_as_far_as_its_residuals_reach(
    ask: Callable[..., Any], refused: Callable[..., str], nano_tables: Path, tmp_path: Path
) -> None:
    words = (
        *plan_file(tmp_path, FULL),
        "--tables",
        str(nano_tables),
        "--target-violation",
    )
    # It asks for the guard by itself.
    assert ask(*words, "0.3")["guard"]["limit"] == pytest.approx(40 * (1 - 0.14))
    err = refused(*words, "0.01")
    assert err.startswith(
        "error: --target-violation 0.01: 40 residuals are too few for a target of 0.01:"
        " expected at least 99"
    )


def test_the_guard_needs_tables(
    refused: Callable[..., str], own_tables: Path, tmp_path: Path
) -> None:
    words = (*plan_file(tmp_path, FULL), "--guard")
    told = "error: the guard needs a fitted latency and a lookup table"
    assert refused(*words).startswith(told)
    (own_tables / "latency.json").unlink()
    assert refused(*words, "--tables", str(own_tables)).startswith(told)


def test_an_image_is_prepared_once_for_each_tier_and_off_the_clock(
    ask: Callable[..., Any], nano_tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, prepared = LlavaNext.prepare, []

    def prepare(self: Any, image: Any, question: str, style: str, tier: str) -> Any:
        prepared.append((style, tier))
        time.sleep(0.2)
        return own(self, image, question, style, tier)

    monkeypatch.setattr(LlavaNext, "prepare", prepare)
    words = (*plan_file(tmp_path, FULL), "--tables", str(nano_tables), "--warmup", "0", "--compare")
    ask(*words)
    assert prepared == [("vqa", "high")]
    prepared.clear()
    found = ask(*words, "--guard", budget="3")
    assert sorted(prepared) == [("vqa", "high"), ("vqa", "low"), ("vqa", "medium")]
    assert found["prepare_ms"] > 600
    assert found["measured"]["controller"] < 200


def test_the_image_is_resized_off_the_clock_before_it_is_looked_at(
    ask: Callable[..., Any], nano_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlavaNext.overview

    def overview(self: Any, image: Any) -> Any:
        time.sleep(0.5)
        return own(self, image)

    monkeypatch.setattr(LlavaNext, "overview", overview)
    assert ask("--run", str(nano_run), "--clock", "wall")["latency"] < 500


def test_a_view_that_is_not_taken_over_is_the_controller_s(
    ask: Callable[..., Any], nano_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlavaNext.glance

    def glance(self: Any, pixels: Any) -> Any:
        time.sleep(0.5)
        return own(self, pixels)

    monkeypatch.setattr(LlavaNext, "glance", glance)
    steered = ("--run", str(nano_run), "--clock", "wall", "--compare")
    planned = (*plan_file(tmp_path, FULL), "--clock", "wall")
    for taken_over in (True, False):
        monkeypatch.setattr(LlavaNext, "reuses_view", lambda *_, found=taken_over: found)
        found, plain = ask(*steered), ask(*planned)
        answers = (found["measured"], found["full"]["measured"], plain["measured"])
        assert [times["vision"] > 500 for times in answers] == [taken_over] * 3
        charged = [times["controller"] > 500 for times in answers]
        assert charged == [not taken_over, False, False]


def test_first_answers_that_do_not_count_are_short(
    ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        asked.append(named["max_new_tokens"])
        return generate(*given, **named)

    monkeypatch.setattr(module, "generate", counted)
    found = ask(*plan_file(tmp_path, FULL), "--warmup", "2")
    assert asked == [2, 2, 16]
    assert found["measured"]["new_tokens"] > 2


def test_work_is_held_against_budgets_of_work(
    ask: Callable[..., Any], own_tables: Path, tmp_path: Path
) -> None:
    edit(own_tables / "lut.json", lambda values: values["metadata"].update(unit="GFLOP"))
    (own_tables / "latency.json").unlink()
    words = (*plan_file(tmp_path, FULL), "--latency-source", "flops", "--max-new-tokens", "3")
    found = ask(*words, "--tables", str(own_tables), "--guard", budget="0.4")
    assert found["unit"] == "GFLOP"
    assert found["latency"] == found["gflop"] <= 0.4 == found["guard"]["limit"]
    assert found["plan"] != FULL
    alone = ask(*words, budget="0.4")
    assert (alone["plan"], alone["within_budget"]) == (FULL, False)


def test_the_newest_controller_is_asked_however_new_a_profile_is(
    ask: Callable[..., Any], own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = own_run.with_name("profile")
    record = json.loads((own_run / "run.json").read_text())
    profile.mkdir()
    newer = {**record, "command": "profile", "name": "profile", "started": "2999"}
    (profile / "run.json").write_text(json.dumps(newer))
    monkeypatch.setenv("MOECTL_RUNS", str(own_run.parent.parent))
    assert ask()["plan"] == ask("--run", str(own_run))["plan"]


@pytest.mark.parametrize("ending", ["", "@best", "@1", "/best_model.pt", "/checkpoint_epoch_1.pt"])
def test_weights_are_named_by_run_or_by_file(
    ask: Callable[..., Any], own_run: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    opened: list[Path] = []

    def open_policy(path: Path) -> Any:
        opened.append(path)
        return weights.open_policy(path)

    monkeypatch.setattr(module, "open_policy", open_policy)
    ask("--checkpoint", f"{own_run}{ending}", "--warmup", "0")
    name = "checkpoint_epoch_1.pt" if "1" in ending else "best_model.pt"
    assert opened == [own_run / name]


def test_weights_and_tables_of_another_network_are_refused(
    refused: Callable[..., str], own_run: Path, own_tables: Path
) -> None:
    edit(own_tables / "latency.json", lambda values: values.update(blocks=7))
    err = refused("--run", str(own_run), "--tables", str(own_tables))
    assert "the fitted latency is of another network (7 blocks: expected 6)" in err
    edit(own_run / "best_model.pt.json", lambda values: values["space"].update(blocks=7))
    assert "best_model.pt: chooses plans with blocks = 7, but nano has 6" in refused(
        "--run", str(own_run)
    )


def test_without_its_tables_a_controller_predicts_nothing(
    controller: Call, asked_image: Path, own_run: Path, refused: Callable[..., str]
) -> None:
    gone = str(own_run / "gone")
    edit(own_run / "run.json", lambda values: values["world"].update(tables=gone))
    words = ("--image", str(asked_image), "--prompt", QUESTION, "--budget", "40", "--cpu")
    code, out, err = controller("infer", *words, "--run", str(own_run), "--json")
    assert (code, json.loads(out)["predicted"]) == (0, None)
    assert err.startswith("warning: ")
    assert f"{gone}: no such run folder" in err
    assert err.rstrip().endswith("no latency is predicted")
    assert "no such run" in refused("--run", str(own_run), "--policy", "lut")
    assert "the guard needs" in refused("--run", str(own_run), "--guard")


def test_a_network_that_moved_is_named(
    ask: Callable[..., Any], own_run: Path, refused: Callable[..., str]
) -> None:
    settings = own_run / "settings.toml"
    settings.write_text(settings.read_text().replace('model = "nano"', 'model = "moved"'))
    assert "moved: no such network" in refused("--run", str(own_run))
    assert ask("--run", str(own_run), "--model", "nano")["answer"]


@pytest.mark.parametrize(
    ("dataset", "style"),
    [("coco_caption", "coco_caption"), ("text_vqa", "text_vqa"), ("text_vqa,okvqa", "vqa")],
)
def test_questions_are_put_as_in_training(
    ask: Callable[..., Any],
    own_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    style: str,
) -> None:
    own, asked = LlavaNext.prepare, []

    def prepare(self: Any, image: Any, question: str, style: str, tier: str) -> Any:
        asked.append(style)
        return own(self, image, question, style, tier)

    monkeypatch.setattr(LlavaNext, "prepare", prepare)
    named = [f'"{name}"' for name in dataset.split(",")]
    settings = own_run / "settings.toml"
    text = settings.read_text().replace('"synth_vqa"', ", ".join(named))
    settings.write_text(text.replace("max_new_tokens = 3", "max_new_tokens = 0"))
    found = ask("--run", str(own_run), "--warmup", "0")
    assert set(asked) == {style}
    longest = 16 if style == "vqa" else 64
    assert 3 < found["measured"]["new_tokens"] <= longest


def test_a_budget_that_was_not_trained_for_is_told(
    controller: Call, asked_image: Path, nano_run: Path
) -> None:
    low, high = json.loads((nano_run / "run.json").read_text())["world"]["budgets"]
    words = ("--image", str(asked_image), "--prompt", QUESTION, "--run", str(nano_run), "--cpu")
    code, _, err = controller("infer", *words, "--budget", f"{low},{(low + high) / 2},{high}")
    assert (code, err) == (0, "")
    _, _, err = controller("infer", *words, "--budget", f"{low},{2 * high},5")
    said = f"is outside of what the controller was trained for: {low:.4g} to {high:.4g} ms\n"
    assert err == f"warning: budget 5 {said}warning: budget {2 * high:g} {said}"


def test_budgets_are_in_the_unit_of_the_training(
    refused: Callable[..., str], nano_run: Path, own_tables: Path
) -> None:
    edit(own_tables / "lut.json", lambda values: values["metadata"].update(unit="GFLOP"))
    words = ("--run", str(nano_run), "--latency-source", "flops", "--tables", str(own_tables))
    err = refused(*words)
    assert err.startswith(f"error: {nano_run}: was trained for budgets in ms, not GFLOP")


def test_a_run_that_failed_early_has_no_weights(refused: Callable[..., str], own_run: Path) -> None:
    def fail(values: Any) -> None:
        values.update(status="failed", weights=[])
        del values["world"]

    edit(own_run / "run.json", fail)
    assert "no weights @best" in refused("--run", str(own_run))


def test_a_table_and_a_plan_are_not_both_taken() -> None:
    with pytest.raises(UserError, match=r"--policy lut and --plan one.json: both choose the plan"):
        module.Choice("lut", Path("one.json"))


def test_the_simulation_answers_nothing(refused: Callable[..., str], sim_run: Path) -> None:
    assert refused("--run", str(sim_run)).startswith("error: the simulation answers no questions")


def test_what_is_missing_is_named(
    controller: Call, refused: Callable[..., str], nano_run: Path, tmp_path: Path
) -> None:
    code, out, err = controller("infer", "--run", str(nano_run), "--prompt", "What?")
    assert (code, out) == (2, "")
    assert "expected --image, --prompt and --budget, or --questions FILE" in err
    words = ("infer", "--run", str(nano_run), "--prompt", "What?", "--budget", "9")
    code, out, err = controller(*words, "--image", str(tmp_path / "none.png"))
    assert (code, out) == (2, "")
    assert err.endswith(f"error: {tmp_path / 'none.png'}: no such image\n")
    assert "no finished grpo run of controller" in refused()
    assert "no finished profile run of controller" in refused("--policy", "lut")
    assert "--policy" in refused("--policy", "foo")
    err = refused("--run", str(nano_run), "--budget", "much")
    assert err.startswith("error: --budget much: expected a number above 0")
