"""Measuring a network: blocks, plans, latency; what is never done twice."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moectl.controller import profile as module
from moectl.controller.executor import Executor
from moectl.controller.importance import MOLMOE, read_importance
from moectl.controller.influence import block_influence, divergences
from moectl.controller.latency import read_estimator
from moectl.controller.profile import grid_plans, random_plans, without
from moectl.controller.samples import Sample
from moectl.controller.simulator import Simulator, space
from moectl.controller.table import build, read_table
from moectl.controller.timing import Clock
from moectl.engine.errors import Interrupted, UserError

if TYPE_CHECKING:
    from moectl.controller.llava import LlavaNext

Profile = Callable[..., Path]

FILES = ("importance.json", "importance_flat.json", "latency.json", "grid.jsonl", "lut.json")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def executions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "executions.jsonl").read_text().splitlines()]


# What is measured


def test_importance_has_the_order_of_the_simulation(sim_tables: Path) -> None:
    found = read_importance(sim_tables / "importance.json", 16)
    truth = {block: score for block, score in MOLMOE.items() if block}
    assert found[0] == 1
    for one in truth:
        for other in truth:
            if truth[one] > truth[other]:
                assert found[one] > found[other]
    document = read(sim_tables, "importance.json")
    assert document["meta"] == {
        "model": "sim", "samples": 3, "split": "val", "method": "drop", "not_measured": [0],
        "spearman_of_halves": pytest.approx(1),
    }  # fmt: skip
    assert document["beam"] == []


def test_a_score_is_what_is_lost_without_the_block(sim_tables: Path) -> None:
    alone = Simulator(4, 42, "val")
    found = read_importance(sim_tables / "importance.json", 16)
    for block in (1, 4, 15):
        active = tuple(other != block for other in range(16))
        less = replace(alone.space.full, active=active)
        lost = [
            alone.accuracy(row, alone.space.full) - alone.accuracy(row, less) for row in range(3)
        ]
        assert found[block] == pytest.approx(sum(lost) / 3)


def test_the_search_finds_the_blocks_that_matter_least(
    profile_sim: Profile, tmp_path: Path
) -> None:
    folder = profile_sim(
        tmp_path / "run", profile__what=("importance",), profile__max_remove=9, profile__beam=2,
        profile__samples=1,
    )  # fmt: skip
    document = read(folder, "importance.json")
    assert document["meta"]["spearman_of_halves"] is None
    removed = [found["removed"] for found in document["beam"]]
    # At most 4 of 16 blocks may be skipped.
    assert [len(blocks) for blocks in removed] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [removed[place] for place in (0, 2, 4, 6)] == [[4], [4, 13], [4, 10, 13], [2, 4, 10, 13]]


def test_the_table_is_that_of_the_records(sim_tables: Path) -> None:
    text = (sim_tables / "grid.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) == 3 * 3 * 3 * 5
    table = read_table(sim_tables / "lut.json")
    assert table.rows == build(records, "total").rows
    assert len(table.rows) == 45
    alone = Simulator(4, 42, "val")
    order = read(sim_tables, "profile.json")["importance"]["order"]
    for row in table.rows[::11]:
        plan = table.plan(row, space(), order)
        answers = [alone.execute(question, plan) for question in range(3)]
        assert row.accuracy == pytest.approx(sum(one.accuracy for one in answers) / 3)
        times = [one.timings.latency("total") for one in answers]
        assert row.latency == pytest.approx(sum(times) / 3)
    assert table.metadata["model"] == "sim"
    assert table.metadata["order"] == order
    assert table.metadata["new_tokens"] == 4
    document = read(sim_tables, "profile.json")
    assert document["grid"] == {
        "plans": 45, "questions": 3, "budgets": list(table.budget_range())
    }  # fmt: skip


def test_the_fitted_latency_predicts_other_plans(profile_sim: Profile, tmp_path: Path) -> None:
    folder = profile_sim(tmp_path / "run", profile__what=("latency",), profile__plans=40)
    estimator = read_estimator(folder / "latency.json")
    alone = Simulator(50, 7, "test")
    errors = []
    for row, plan in enumerate(random_plans(space(), 50, 7)):
        execution = alone.execute(row, plan)
        tokens = execution.vision_tokens + execution.text_tokens
        predicted = estimator.timings(plan, execution.crops, tokens, 4).latency("total")
        errors.append(abs(predicted / execution.timings.latency("total") - 1))
    assert sum(errors) / 50 < 0.04  # the simulation's own noise is 2 %
    found = read(folder, "profile.json")["latency"]
    assert found["prefill"]["samples"] == 40
    assert found["prefill"]["r2"] > 0.95


def test_a_table_may_hold_predicted_latencies(profile_sim: Profile, tmp_path: Path) -> None:
    folder = profile_sim(
        tmp_path / "run", profile__what=("latency", "grid"), latency__source="table",
        profile__samples=2,
    )  # fmt: skip
    estimator, table = read_estimator(folder / "latency.json"), read_table(folder / "lut.json")
    row = table.rows[0]
    plan = table.plan(row, space(), table.metadata["order"])
    execution = Simulator(1, 42, "val").execute(0, plan)
    tokens = execution.vision_tokens + execution.text_tokens
    times = estimator.timings(plan, execution.crops, tokens, 4)
    assert row.latency == pytest.approx(times.latency("total"))
    assert row.latency_std == pytest.approx(0)


def test_a_table_of_work_holds_work(profile_sim: Profile, tmp_path: Path) -> None:
    folder = profile_sim(
        tmp_path / "run", profile__what=("grid",), latency__source="flops", profile__samples=1,
        profile__top_ks=(5,),
    )  # fmt: skip
    table = read_table(folder / "lut.json")
    assert (table.unit, len(table.rows)) == ("GFLOP", 15)
    plan = table.plan(table.rows[3], space(), table.metadata["order"])
    assert table.rows[3].latency == Simulator(1, 42, "val").execute(0, plan).gflop


# Nothing twice


def test_nothing_is_answered_twice(sim_tables: Path) -> None:
    lines = executions(sim_tables)
    places = [(line["sample_id"], line["plan_key"]) for line in lines]
    assert len(set(places)) == len(places)
    # The full plan, 15 with a block less, and the grid have some in common.
    assert len(places) < 3 * (1 + 15 + 45) + 12


@pytest.mark.parametrize("after", [1, 30, 50, 150])
def test_a_profile_goes_on_where_it_was_killed(
    profile_sim: Profile,
    sim_tables: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    own, counts = Simulator.execute, [0]

    def execute(simulator: Simulator, row: int, plan: Any) -> Any:
        counts[0] += 1
        if counts[0] == after:
            raise KeyboardInterrupt
        return own(simulator, row, plan)

    monkeypatch.setattr(Simulator, "execute", execute)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        profile_sim(folder)
    with (folder / "executions.jsonl").open("a") as file:
        file.write('{"sample_id": "sim/val/0", "pla')  # torn
    profile_sim(folder)
    total = len(executions(sim_tables))
    assert counts[0] == total + 1, "the one that was interrupted was asked again"
    for name in (*FILES, "executions.jsonl"):
        assert (folder / name).read_bytes() == (sim_tables / name).read_bytes(), name
    profile_sim(folder)
    assert counts[0] == total + 1


def test_a_profile_that_is_asked_to_stop_keeps_its_answers(
    open_sim: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Simulator.execute
    run = open_sim(tmp_path / "run", "profile")

    def execute(simulator: Simulator, row: int, plan: Any) -> Any:
        run.stop.reason = "SIGTERM"
        return own(simulator, row, plan)

    monkeypatch.setattr(Simulator, "execute", execute)
    with pytest.raises(Interrupted, match="SIGTERM") as stop, run:
        module.run_profile(run)
    assert stop.value.hint == f"--resume {tmp_path / 'run'} goes on from here"
    assert len(executions(tmp_path / "run")) == 1
    assert read(tmp_path / "run", "run.json")["status"] == "interrupted"


def test_the_overhead_is_measured_once(
    profile_sim: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"profile__what": ("overhead",)}
    folder = profile_sim(tmp_path / "run", **values)
    first = read(folder, "overhead.json")
    assert read(folder, "profile.json")["overhead"] == first
    monkeypatch.setattr(module, "overhead", lambda *_: {"controller_ms": 1e9})
    profile_sim(folder, **values)
    assert read(folder, "overhead.json") == first


def test_a_profile_that_goes_on_refuses_other_questions(
    profile_sim: Profile, sim_tables: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sim_tables, tmp_path / "run")
    record = read(folder, "run.json")
    record["world"]["data"] = {"digest": "other"}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="began with other questions"):
        profile_sim(folder)


# Plans


def test_random_plans_are_even(sim_tables: Path) -> None:
    found = random_plans(space(), 2000, 3)
    for plan in found[:50]:
        plan.check(space())
    for values, choices in (
        ([plan.tier for plan in found], 3),
        ([len(plan.blocks) for plan in found], 5),
        ([plan.top_k[7] for plan in found], 5),
    ):
        counts = [values.count(value) for value in set(values)]  # type: ignore[attr-defined]
        assert len(counts) == choices
        expected = 2000 / choices
        assert max(abs(count - expected) for count in counts) < 5 * math.sqrt(expected)
    assert [plan.key() for plan in random_plans(space(), 5, 3)] == [
        plan.key() for plan in random_plans(space(), 5, 3)
    ]
    assert found[:5] != random_plans(space(), 5, 4)


def test_a_grid_has_every_tier_number_and_count() -> None:
    order = [0, 15, *range(1, 15)]
    found = grid_plans(space(), order)
    assert len({plan.key() for plan in found}) == len(found) == 3 * 3 * 5
    assert {plan.top_k[3] for plan in found} == {4, 6, 8}
    assert {plan.top_k[0] for plan in found} == {8}
    for plan in found:
        plan.check(space())
        assert set(plan.blocks) == set(order[: len(plan.blocks)])
    assert {plan.top_k[3] for plan in grid_plans(space(), order, (5, 7))} == {5, 7}
    dense = replace(space(), mixtures=(False,) * 16, default_top_k=0, top_k_choices=())
    assert len(grid_plans(dense, order)) == 15
    with pytest.raises(UserError, match=r"profile\.top_ks: 3: expected some of \(4, 5, 6, 7, 8\)"):
        grid_plans(space(), order, (4, 3))


def test_a_plan_without_blocks_is_otherwise_full() -> None:
    plan = without(space(), frozenset({3, 9}))
    assert plan.blocks == tuple(block for block in range(16) if block not in (3, 9))
    assert (plan.tier, plan.top_k) == ("high", (8,) * 16)


# Refusals come before the work


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profile__method": "bi"}, r"profile\.method = bi needs a network"),
        ({"profile__method": "kl"}, r"profile\.method = kl needs a network"),
        ({"profile__top_ks": (9,)}, r"profile\.top_ks: 9: expected some of"),
        (
            {"latency__source": "table", "profile__what": ("importance", "grid")},
            r"latency\.source = table: the grid needs fitted latencies",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    profile_sim: Profile, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        profile_sim(tmp_path / "run", **values)
    assert not (tmp_path / "run" / "executions.jsonl").exists()


def test_several_processes_are_refused(
    open_sim: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_sim(tmp_path / "run", "profile")
    with run:
        monkeypatch.setattr(run, "accelerator", SimpleNamespace(num_processes=2, is_main_process=1))
        with pytest.raises(UserError, match="controller profile runs in one process"):
            module.run_profile(run)


# A network


@pytest.fixture
def network(nano: "LlavaNext", picture: Any, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """Three questions about a picture, which profiles then ask."""
    samples = [
        Sample(f"vqa/{row}", "one", words, ("yes",), "vqa", "vqa", lambda: picture)
        for row, words in enumerate(("How many?", "Is it red?", "What is this?"))
    ]
    executor = Executor(nano, samples, Clock(torch.device("cpu")), max_new_tokens=2)
    monkeypatch.setattr(
        module, "open_environments", lambda *_: ({"val": executor}, {"model": "nano"})
    )
    return executor


@pytest.mark.parametrize("method", ["bi", "kl"])
def test_importance_without_labels_is_that_of_the_network(
    profile_sim: Profile, network: Executor, tmp_path: Path, method: str
) -> None:
    folder = profile_sim(tmp_path / "run", profile__what=("importance",), profile__method=method)
    found = read_importance(folder / "importance.json", 6)
    backbone, full = network.backbone, network.space.full
    expected: list[list[float]] = []
    for sample in network.samples:
        inputs = backbone.prepare(sample.open(), sample.question, "vqa", full.tier)
        vision = backbone.encode(inputs)
        if method == "bi":
            expected.append(block_influence(backbone, inputs, vision)[1:])
        else:
            less = [without(network.space, frozenset({block})) for block in range(1, 6)]
            expected.append(divergences(backbone, inputs, vision, less))
    # The three count alike, however they are halved.
    means = [sum(values) / 3 for values in zip(*expected, strict=True)]
    assert [found[block] for block in range(1, 6)] == pytest.approx(means, rel=1e-4)
    assert found[0] >= max(means)
    assert not (folder / "executions.jsonl").exists()


def test_an_image_is_encoded_once_for_all_blocks(
    profile_sim: Profile, network: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, own = [0], network.backbone.glance

    def glance(pixels: Any) -> Any:
        looks[0] += 1
        return own(pixels)

    monkeypatch.setattr(network.backbone, "glance", glance)
    folder = profile_sim(tmp_path / "run", profile__what=("importance",))
    assert looks[0] == 3
    assert len(executions(folder)) == 3 * 6
