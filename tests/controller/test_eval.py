"""An evaluation from the command line: policies, budgets, files, and what is refused."""

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.controller import eval as evaluation
from moectl.controller.execution import Objective
from moectl.controller.latency import fit, read_estimator
from moectl.controller.plans import plan_from
from moectl.controller.profile import grid_plans, random_plans
from moectl.controller.records import record
from moectl.controller.rivals import oracle
from moectl.controller.settings import ControllerSettings
from moectl.controller.simulator import Simulator
from moectl.controller.table import Table, build
from moectl.controller.timing import Clock
from moectl.engine.files import write_json

Call = Callable[..., tuple[int, str, str]]

ORDER = (0, 1, 5, 8, 9, 12, 14, 15, 7, 6, 11, 3, 2, 10, 13, 4)
QUESTIONS = 12
EVERY = (
    "static_full,static_medium,static_min,random,lut,importance,token_only,depth_only,width_only,"
    "oracle_table"
)
TINY = (
    "--model", "sim", "--train-samples", "16", "--val-samples", "8", "--num-samples",
    str(QUESTIONS), "--epochs", "2", "--batch-size", "8", "--group-size", "2", "--hidden", "16",
    "--set", "policy.budget_dim=16", "--budget-min", "100", "--budget-max", "340",
    "--set", "train.tensorboard=false", "--quiet",
)  # fmt: skip


@pytest.fixture
def controller(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command of controller in this process; return exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        code = _run(["controller", *words])
        return code, *capsys.readouterr()

    return call


def table(objective: Objective = "total") -> Table:
    """What a profile of the simulation finds."""
    inner = Simulator(8, 42, "val")
    records = []
    for plan in grid_plans(inner.space, ORDER):
        for row in range(8):
            records.append(record(inner.ids[row], plan, inner.execute(row, plan)))
    return build(records, objective)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two epochs, and tables of a profile beside it; not to be written to."""
    root = tmp_path_factory.mktemp("controller")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_RUNS", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert _run(["controller", "grpo", *TINY, "--out", str(root / "controller" / "t")]) == 0
    tables = root / "tables"
    tables.mkdir()
    write_json(tables / "lut.json", table().plain())
    write_json(tables / "overhead.json", {"controller_ms": 2.0})
    inner = Simulator(1, 42, "val")
    plans = random_plans(inner.space, 30, 0)
    fitted = fit([record("a", plan, inner.execute(0, plan)) for plan in plans], 16)
    write_json(tables / "latency.json", fitted.plain())
    return root


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of all policies; not to be written to."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained, root, dirs_exist_ok=True)
    words = ("--baseline", EVERY, "--budget", "120,200,330", "--tables", str(root / "tables"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setenv("MOECTL_RUNS", str(root))
        assert _run(["controller", "eval", *words, "--quiet", "--json"]) == 0
    folder = root / "controller" / "t" / "evals" / "test@best_model"
    (folder / "stdout.json").write_text(out.getvalue())
    return folder


@pytest.fixture
def own(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The training, as a copy that may be changed."""
    monkeypatch.setenv("MOECTL_RUNS", str(tmp_path / "runs"))
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs" / "controller" / "t"


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return document


def metrics(document: dict[str, Any], policy: str) -> dict[float, dict[str, Any]]:
    results = document["datasets"]["sim"]["results"]
    return {one["latency_budget"]: one["metrics"] for one in results if one["policy"] == policy}


def knobs(document: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    results = document["datasets"]["sim"]["results"]
    return [one["knob_distribution"] for one in results if one["policy"] == policy]


def predictions(folder: Path, budget: str, policy: str) -> list[dict[str, Any]]:
    lines = (folder / f"sim_test_budget_{budget}_predictions.jsonl").read_text().splitlines()
    return [one for line in lines if (one := json.loads(line))["policy"] == policy]


# What is measured


def test_stdout_is_what_is_written(evaluated: Path) -> None:
    assert json.loads((evaluated / "stdout.json").read_text()) == read(evaluated)


def test_an_evaluation_says_what_was_measured(evaluated: Path) -> None:
    found = read(evaluated)
    sidecar = json.loads((evaluated.parents[1] / "best_model.pt.json").read_text())
    assert found["weights"] == {
        "file": "best_model.pt", "sha256": sidecar["sha256"], "epoch": sidecar["epoch"],
    }  # fmt: skip
    assert found["policies"] == ["controller", *EVERY.split(",")]
    assert (found["budgets"], found["unit"], found["model"]) == ([120, 200, 330], "ms", "sim")
    assert found["trained_for"] == [100, 340]
    assert found["decide_ms"] > 0
    part = found["datasets"]["sim"]
    assert part["num_samples"] == QUESTIONS
    assert len(part["results"]) == 11 * 3
    assert all(one["num_samples"] == QUESTIONS for one in part["results"])


def test_every_policy_takes_its_plans(evaluated: Path) -> None:
    found = read(evaluated)
    for policy in ("static_full", "static_medium", "static_min", "lut", "depth_only"):
        assert [one["distinct_plans"] for one in knobs(found, policy)] == [1, 1, 1]
    assert knobs(found, "static_full")[0]["block_usage"] == [1] * 16
    assert knobs(found, "static_min")[0]["tier"]["low"] == 1
    assert knobs(found, "random")[0]["distinct_plans"] == QUESTIONS
    best = [table().best(budget) for budget in (120, 200, 330)]
    assert [one["mean_top_k"] for one in knobs(found, "lut")] == [row.top_k for row in best]
    assert [one["mean_active_blocks"] for one in knobs(found, "lut")] == [row.count for row in best]
    pairs = zip(knobs(found, "controller"), knobs(found, "importance"), strict=True)
    for ours, ranked in pairs:
        for name in ("tier", "num_active_blocks"):
            assert ours[name] == ranked[name]
        assert ranked["block_usage"] != ours["block_usage"]
        by_rank = [ranked["block_usage"][block] for block in ORDER]
        assert by_rank == sorted(by_rank, reverse=True)


def test_only_those_who_run_the_controller_pay_for_it(evaluated: Path) -> None:
    found = read(evaluated)
    assert found["controller_ms"] == 2
    for policy in found["policies"]:
        paid = 2 if policy in ("controller", "importance") else 0
        for one in metrics(found, policy).values():
            assert one["controller_overhead_ms"] == paid
            assert one["avg_latency_ms"] == pytest.approx(sum(one["stages_ms"].values()))


def test_the_oracle_answers_by_every_plan_of_the_table(evaluated: Path) -> None:
    inner, budget = Simulator(QUESTIONS, 42, "test"), 200.0
    grid = sorted(grid_plans(inner.space, ORDER), key=lambda plan: plan.key())
    chosen = predictions(evaluated, "200", "oracle_table")
    for row, line in enumerate(chosen):
        answers = [inner.execute(row, plan) for plan in grid]
        times = [answer.timings.latency("total") for answer in answers]
        place = oracle([answer.accuracy for answer in answers], times, budget)
        assert line["plan"] == grid[place].plain()
    found = read(evaluated)
    assert metrics(found, "oracle_table")[200]["budget_violations"] == 0
    late = "accuracy_in_time"
    assert metrics(found, "oracle_table")[200][late] >= metrics(found, "lut")[200][late]


def test_predictions_hold_every_answer(evaluated: Path) -> None:
    found = read(evaluated)
    for policy in ("controller", "lut", "random"):
        lines = predictions(evaluated, "120", policy)
        assert [line["sample_id"] for line in lines] == [
            f"sim/test/{row}" for row in range(QUESTIONS)
        ]
        mean = sum(line["accuracy"] for line in lines) / QUESTIONS
        assert mean == pytest.approx(metrics(found, policy)[120]["accuracy"])
        late = sum(line["latency"] > 120 for line in lines)
        assert late == metrics(found, policy)[120]["budget_violations"]


def test_the_controller_is_compared_with_everyone(evaluated: Path) -> None:
    found = read(evaluated)["datasets"]["sim"]["comparisons"]
    assert len(found) == 10 * 4
    lut = next(one for one in found if one["against"] == "lut" and one["latency_budget"] == 200)
    ours, theirs = (
        [line["accuracy"] for line in predictions(evaluated, "200", policy)]
        for policy in ("controller", "lut")
    )
    gain = sum(ours) / QUESTIONS - sum(theirs) / QUESTIONS
    assert lut["accuracy"]["difference"] == pytest.approx(gain)


def test_fronts_hold_the_rows_of_the_table(evaluated: Path) -> None:
    found = json.loads((evaluated / "pareto_data.json").read_text())
    grid = [one for one in found["all_points"]["sim"] if one["policy"] == "grid"]
    assert len(grid) == 3 * 3 * 5
    without = {row.name: row.latency for row in table().rows}
    assert all(one["latency"] == pytest.approx(without[one["plan"]]) for one in grid)
    full = metrics(read(evaluated), "static_full")[120]["avg_latency_ms"]
    assert found["summary"]["sim"]["corner"] == pytest.approx(full, rel=0.05)


def test_pictures_and_reports_are_written(evaluated: Path) -> None:
    names = {path.name for path in evaluated.glob("*.png")}
    kinds = ("accuracy_latency", "over_budgets", "knobs", "block_usage", "stages")
    assert names == {f"sim_{kind}.png" for kind in kinds}
    assert len(list(evaluated.glob("*_results.json"))) == 3
    report = (evaluated.parents[1] / "report.md").read_text()
    assert "## `test@best_model`" in report
    assert (evaluated / "eval.md").read_text().split("\n\n")[0] in report
    assert "Against the lookup table the controller is" in report


# What is asked for


def test_by_default_the_best_weights_and_eight_budgets(own: Path, controller: Call) -> None:
    code, out, err = controller("eval")
    assert code == 0
    assert "lut left out" in err
    found = read(own / "evals" / "test@best_model")
    assert found["budgets"] == [100, 134, 169, 203, 237, 271, 306, 340]
    assert found["policies"] == [
        "controller", "static_full", "static_medium", "static_min", "random",
    ]  # fmt: skip
    assert found["controller_ms"] == 0
    assert out == (own / "evals" / "test@best_model" / "eval.md").read_text()
    assert "lookup table the controller" not in out


def test_weights_of_an_epoch_have_their_own_folder(own: Path, controller: Call) -> None:
    words = ("--budget", "150", "--baseline", "random", "--no-save-predictions", "--quiet")
    code, _, err = controller("eval", "--run", f"{own}@1", *words)
    assert (code, err) == (0, "")
    folder = own / "evals" / "test@checkpoint_epoch_1"
    assert read(folder)["weights"]["file"] == "checkpoint_epoch_1.pt"
    assert read(folder)["policies"] == ["controller", "random"], "the controller always is"
    assert not list(folder.glob("*_predictions.jsonl"))
    assert controller("eval", "--checkpoint", str(own / "best_model.pt"), *words)[0] == 0
    assert read(own / "evals" / "test@best_model")["budgets"] == [150]


def test_shares_of_the_full_plan_are_budgets(own: Path, controller: Call) -> None:
    words = ("--baseline", "static_full", "--budget-frac", "0.5,1.0", "--quiet")
    code, out, _ = controller("eval", *words, "--budget", "330,100,100", "--json")
    assert code == 0
    found = json.loads(out)
    full = found["full_latency"]
    shares = [float(f"{share * full:.4g}") for share in (0.5, 1.0)]
    assert found["budgets"] == sorted([100, 330, *shares])


def test_times_of_tables_are_those_of_the_estimator(own: Path, controller: Call) -> None:
    tables = own.parents[1] / "tables"
    words = ("--latency-source", "table", "--tables", str(tables), "--baseline", "random")
    assert controller("eval", *words, "--budget", "150", "--quiet")[0] == 0
    folder = own / "evals" / "test@best_model"
    estimator, inner = read_estimator(tables / "latency.json"), Simulator(1, 42, "test")
    for line in predictions(folder, "150", "random"):
        done, plan = line["execution"], plan_from(line["plan"], inner.space)
        tokens = done["vision_tokens"] + done["text_tokens"]
        times = estimator.timings(plan, done["crops"], tokens, done["timings"]["new_tokens"])
        assert line["latency"] == pytest.approx(times.latency("total"))
        assert line["latency"] != pytest.approx(
            sum(done["timings"][stage] for stage in ("vision", "prefill", "decode"))
        )
    for policy in ("random", "controller"):
        (found,) = metrics(read(folder), policy).values()
        assert found["avg_latency_ms"] == pytest.approx(sum(found["stages_ms"].values()))


def test_the_same_command_finds_the_same(own: Path, controller: Call) -> None:
    words = ("--budget", "150,250", "--num-samples", "5", "--quiet", "--json")
    first, second = (json.loads(controller("eval", *words)[1]) for _ in range(2))
    for found in (first, second):
        del found["decide_ms"]
    assert first == second
    assert first["datasets"]["sim"]["num_samples"] == 5


def test_budgets_that_were_not_trained_for_are_warned_of(own: Path, controller: Call) -> None:
    err = controller("eval", "--budget", "99.5,90,200")[2]
    assert "budget 90 is outside of what the controller was trained for: 100 to 340 ms" in err


def test_equal_plans_are_answered_once(
    own: Path, controller: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, str]] = []
    answer = Simulator.execute

    def execute(self: Simulator, row: int, plan: Any) -> Any:
        made.append((row, plan.key()))
        return answer(self, row, plan)

    monkeypatch.setattr(Simulator, "execute", execute)
    words = ("--baseline", "static_full,static_min", "--num-samples", "8", "--quiet")
    assert controller("eval", *words, "--budget", "150")[0] == 0
    assert len(made) == len(set(made)) == 8 * 3
    assert [row for row, _ in made] == sorted(row for row, _ in made), "an image is opened once"
    space = Simulator(1, 42, "test").space
    full, least = (
        [
            place
            for place, (_, key) in enumerate(made)
            if key == plan_from(line["plan"], space).key()
        ]
        for policy in ("static_full", "static_min")
        for line in predictions(own / "evals" / "test@best_model", "150", policy)[:1]
    )
    assert len({first < second for first, second in zip(full, least, strict=True)}) == 2
    made.clear()
    assert controller("eval", *words, "--budget", "150,250,350")[0] == 0
    assert len(made) == len(set(made))


def test_an_evaluation_that_was_stopped_goes_on(
    own: Path, controller: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, str]] = []
    answer, stop_after = Simulator.execute, 10

    def execute(self: Simulator, row: int, plan: Any) -> Any:
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append((row, plan.key()))
        return answer(self, row, plan)

    def document(text: str) -> dict[str, Any]:
        return {key: value for key, value in json.loads(text).items() if key != "decide_ms"}

    words = ("--baseline", "static_full,static_min", "--num-samples", "8", "--budget", "150")
    expected = document(controller("eval", *words, "--json")[1])
    monkeypatch.setattr(Simulator, "execute", execute)
    assert controller("eval", *words)[0] == 130
    [kept] = (own / "evals").glob("unfinished-*")
    kept.write_text(kept.read_text() + '{"sample_id": "torn')

    stop_after = 1000
    assert controller("eval", *words, "--num-samples", "4")[0] == 0  # others than those
    assert kept.exists()
    code, _, err = controller("eval", *words, "--set", "train.seed=5")  # so are these
    assert (code, "taken over" in err, kept.exists()) == (0, False, True)
    made[10:] = []
    code, out, err = controller("eval", *words, "--json")
    assert code == 0
    assert "10 answers of an evaluation that was stopped are taken over" in err
    assert document(out) == expected
    assert set(made[:10]).isdisjoint(made[10:])
    assert len(set(made)) == 8 * 3
    assert not kept.exists()


def test_answers_of_weights_or_questions_that_were_replaced_are_not_taken_over(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "vlm.safetensors"
    weights.write_bytes(b"")
    sample = SimpleNamespace(question="which?", answers=("this",))
    split = SimpleNamespace(ids=["a"], inner=SimpleNamespace(samples=[sample]))
    world: Any = SimpleNamespace(facts={"model": str(tmp_path)}, splits={evaluation.SPLIT: split})
    device: Any = SimpleNamespace(device=torch.device("cpu"))

    def place() -> Path:
        return evaluation._unfinished(tmp_path, ControllerSettings(), world, device)

    before = place()
    assert place() == before
    os.utime(weights, (1, 1))
    replaced = place()
    sample.answers = ("that",)
    assert len({before, replaced, place()}) == 3


# What is refused


def test_a_policy_without_its_table_is_refused_by_name(own: Path, controller: Call) -> None:
    code, out, err = controller("eval", "--baseline", "lut")
    assert (code, out) == (2, "")
    assert "eval.policies = lut: there is no lookup table" in err
    assert not (own / "evals").exists()


def test_a_controller_of_another_network_is_refused(own: Path, controller: Call) -> None:
    path = own / "best_model.pt.json"
    facts = json.loads(path.read_text())
    facts["space"]["min_active"] = 10
    path.write_text(json.dumps(facts))
    code, _, err = controller("eval", "--quiet")
    assert code == 2
    assert "chooses plans with min_active = 10, but sim has 12" in err


def test_budgets_of_another_unit_are_refused(own: Path, controller: Call) -> None:
    code, _, err = controller("eval", "--latency-source", "flops", "--quiet")
    assert code == 2
    assert "was trained for budgets in ms, latencies are in GFLOP here" in err


def test_several_processes_are_refused(
    own: Path, controller: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(evaluation, "accelerator_for", lambda *_: several)
    code, _, err = controller("eval", "--quiet")
    assert code == 2
    assert "controller eval runs in one process" in err


def test_other_runs_are_refused(own: Path, controller: Call) -> None:
    path = own / "run.json"
    path.write_text(path.read_text().replace('"command": "grpo"', '"command": "profile"'))
    assert "expected a run of grpo" in controller("eval", "--run", str(own))[2]


def test_choosing_is_timed_by_the_clock_of_the_settings(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    def opened(device: torch.device, kind: Any) -> Clock:
        kinds.append(kind)
        return Clock(device, kind)

    monkeypatch.setattr(evaluation, "open_clock", opened)
    words = ("--baseline", "static_full", "--budget", "200", "--set", "latency.clock=cpu")
    assert _run(["controller", "eval", *words, "--quiet"]) == 0
    assert kinds == ["cpu"]


@pytest.mark.parametrize("saved", [True, False])
def test_predictions_are_kept_if_they_are_asked_for(own: Path, saved: bool) -> None:
    flag = "--save-predictions" if saved else "--no-save-predictions"
    words = ("--baseline", "static_full", "--budget", "200", flag)
    assert _run(["controller", "eval", *words, "--quiet"]) == 0
    folder = own / "evals" / "test@best_model"
    assert bool(list(folder.glob("*_predictions.jsonl"))) is saved
    assert read(folder)["budgets"] == [200]
