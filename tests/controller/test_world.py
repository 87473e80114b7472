"""What a policy acts on: questions, tables, budgets, and what of them is written down."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.controller.importance import MOLMOE
from moectl.controller.latency import Estimator
from moectl.controller.plans import Space
from moectl.controller.simulator import Simulator
from moectl.controller.table import read_table
from moectl.controller.world import (
    Tables,
    World,
    full_latency,
    importance_of,
    open_world,
    pinned,
    read_tables,
    require_same,
    sources_of,
    warn_outside,
)
from moectl.engine.errors import UserError
from moectl.engine.files import sha256

CPU = torch.device("cpu")
Settings = Callable[..., Any]


@pytest.fixture
def world(simulated: Settings) -> Callable[..., World]:
    """The world of a training with these settings."""

    def call(known: dict[str, Any] | None = None, **values: Any) -> World:
        return open_world(simulated(**values), CPU, ("train", "val"), known)

    return call


def test_a_simulated_world_has_its_questions(world: Callable[..., World]) -> None:
    found = world()
    assert {name: len(split.ids) for name, split in found.splits.items()} == {"train": 6, "val": 4}
    assert found.facts == {
        "model": "sim",
        "questions": {"train": 6, "val": 4},
        "tables": "",
        "controller_ms": 0.0,
        "budgets": [100, 340],
        "unit": "ms",
        "importance": {str(block): score for block, score in MOLMOE.items()},
        "order": [0, 1, 5, 8, 9, 12, 14, 15, 7, 6, 11, 3, 2, 10, 13, 4],
        "plans": found.space.size,
    }
    assert json.loads(json.dumps(found.facts)) == found.facts


def test_a_network_answers_the_questions_of_the_data(world: Callable[..., World]) -> None:
    found = world(
        backbone__model="nano", data__dataset="synth_vqa", latency__warmup=1, data__val_samples=2
    )
    assert found.facts["model"] == "nano"
    assert found.facts["questions"] == {"train": 6, "val": 2}
    assert found.facts["data"]["dataset"] == ["synth_vqa"]
    assert found.splits["train"].ids[0].startswith("synth_vqa/")
    assert found.facts["importance"] == {}
    assert found.order == tuple(range(6))


def unasked(*_: Any) -> None:
    raise AssertionError("the questions were loaded first")


def test_a_network_that_cannot_be_is_refused_before_questions_are_loaded(
    simulated: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("moectl.controller.data.load", unasked)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for model, words in (("nowhere", "no such network"), (str(tmp_path), "of the family bert")):
        settings = simulated(backbone__model=model, data__dataset="synth_vqa")
        with pytest.raises(UserError, match=words):
            open_world(settings, torch.device("cpu"), ("val",))


def test_budgets_outside_of_the_training_are_named_once_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_outside([340.1, 500, 120, 50, 500, 99.5], (100, 340), "ms")
    assert [record.getMessage() for record in caplog.records] == [
        f"budget {budget} is outside of what the controller was trained for: 100 to 340 ms"
        for budget in (50, 500)
    ]


def test_a_clock_that_cannot_be_is_refused(
    simulated: Settings, monkeypatch: pytest.MonkeyPatch, nano: Any
) -> None:
    monkeypatch.setattr("moectl.controller.open.open_backbone", lambda *_, **__: nano)
    monkeypatch.setattr("moectl.controller.data.load", unasked)
    settings = simulated(
        backbone__model="nano", data__dataset="synth_vqa", latency__clock="cpu"
    )  # fmt: skip
    with pytest.raises(UserError, match=r"latency\.clock = cpu: processor time says nothing"):
        open_world(settings, torch.device("cuda"), ("val",))


# Who chooses the blocks


@pytest.mark.parametrize(
    ("blocks", "learned", "first"),
    [
        ("auto", True, ()),
        ("learned", True, ()),
        ("importance", False, (1, 5, 8)),
        ("prefix", False, (1, 2, 3)),
    ],
)
def test_blocks_are_fixed_unless_they_are_learned(
    world: Callable[..., World], blocks: str, learned: bool, first: tuple[int, ...]
) -> None:
    found = world(policy__blocks=blocks)
    assert found.learned == learned
    assert found.fixed[:3] == first
    assert len(found.fixed) == (0 if learned else 15)
    assert bool(found.facts["importance"]) == (blocks != "prefix")


def small(blocks: int) -> Space:
    from moectl.controller.plans import Tier

    tiers = (Tier("only", 1, 1, 1),)
    return Space(blocks, (True,) * blocks, 2, (1, 2), (0,), blocks - 1, blocks, tiers)


def test_scores_come_from_the_settings_then_the_tables_then_the_name(
    simulated: Settings, tmp_path: Path
) -> None:
    own, of_tables = tmp_path / "own.json", tmp_path / "tables.json"
    own.write_text('{"0": 1, "1": 0.1, "2": 0.2}')
    of_tables.write_text('{"0": 1, "1": 0.4, "2": 0.3}')
    tables, three = Tables(importance=of_tables), small(3)
    both = importance_of(simulated(policy__importance=own), three, tables, "x")
    assert both == ({0: 1, 1: 0.1, 2: 0.2}, (0, 2, 1))
    assert importance_of(simulated(), three, tables, "x")[1] == (0, 1, 2)
    assert importance_of(simulated(), three, Tables(), "allenai/MolmoE-1B") == ({}, (0, 1, 2))
    assert importance_of(simulated(), small(16), Tables(), "allenai/MolmoE-1B")[0] == MOLMOE
    assert importance_of(simulated(), small(16), Tables(), "other") == ({}, tuple(range(16)))
    with pytest.raises(UserError, match=r"policy\.blocks = importance: there are no scores"):
        importance_of(simulated(policy__blocks="importance"), three, Tables(), "x")


# Tables


def test_tables_are_found_by_folder_and_by_run(
    simulated: Settings, sim_tables: Path, isolated: Path
) -> None:
    section = simulated().latency
    assert read_tables("", section) == Tables()
    found = read_tables(str(sim_tables), section)
    assert found.folder == sim_tables
    assert found.lut == read_table(sim_tables / "lut.json")
    assert isinstance(found.estimator, Estimator)
    assert found.importance == sim_tables / "importance.json"
    assert found.controller_ms is None
    run = shutil.copytree(sim_tables, isolated / "runs/controller/mine-1")
    (run / "overhead.json").write_text('{"controller_ms": 2}')
    by_name = read_tables("mine", section)
    assert (by_name.folder, by_name.controller_ms) == (Path("runs/controller/mine-1"), 2.0)
    assert by_name.lut == found.lut
    (run / "lut.json").unlink()
    assert read_tables("mine-1", section).lut is None


def test_tables_and_a_taught_network_are_what_a_run_was_made_from(
    sim_tables: Path, tmp_path: Path
) -> None:
    (tmp_path / "vlm.safetensors").write_bytes(b"weights")
    found = sources_of(str(tmp_path), Tables(sim_tables))
    paths = [Path(one["path"]) for one in found]
    assert paths[0] == tmp_path / "vlm.safetensors"
    names = ["lut.json", "latency.json", "importance.json"]
    assert [path.name for path in paths[1:]] == names
    assert [one["sha256"] for one in found] == [sha256(path.read_bytes()) for path in paths]
    assert sources_of("sim", Tables()) == []


def test_tables_that_are_not_there_are_refused(simulated: Settings, tmp_path: Path) -> None:
    section = simulated().latency
    with pytest.raises(UserError, match="holds no tables") as refusal:
        read_tables(str(tmp_path), section)
    assert "moectl controller profile" in (refusal.value.hint or "")
    with pytest.raises(UserError, match="nowhere"):
        read_tables("nowhere", section)


def test_a_table_of_another_latency_is_refused(simulated: Settings, sim_tables: Path) -> None:
    for values in ({"latency__objective": "ttft"}, {"latency__source": "flops"}):
        with pytest.raises(UserError, match="the lookup table was made for the objective total"):
            read_tables(str(sim_tables), simulated(**values).latency)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency__source": "table"}, r"latency\.source = table: there is no fitted latency"),
        ({"budget__mode": "auto"}, r"budget\.mode = auto: there is no lookup table"),
    ],
)
def test_what_needs_a_table_says_so(
    world: Callable[..., World], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        world(**values)
    assert "--tables of a run of moectl controller profile --what" in (refusal.value.hint or "")


def test_tables_of_another_network_are_refused(
    world: Callable[..., World], sim_tables: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sim_tables, tmp_path / "tables")
    table = json.loads((folder / "lut.json").read_text())
    table["config_table"]["huge_8_16"] = table["config_table"]["high_8_16"]
    (folder / "lut.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"the lookup table is of another network \(tier huge"):
        world(latency__tables=str(folder))
    fitted = json.loads((folder / "latency.json").read_text())
    (folder / "latency.json").write_text(json.dumps({**fitted, "blocks": 6}))
    with pytest.raises(UserError, match=r"another network \(6 blocks: expected 16\)"):
        world(latency__tables=str(folder))


def test_what_the_controller_takes_comes_from_the_tables(
    world: Callable[..., World], sim_tables: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sim_tables, tmp_path / "tables")
    (folder / "overhead.json").write_text('{"controller_ms": 2.5}')
    found = world(latency__tables=str(folder))
    assert found.pricing.controller_ms == found.facts["controller_ms"] == 2.5
    plan = found.space.full
    execution = found.splits["val"].execute(0, plan)
    assert found.pricing.latency(plan, execution) == execution.timings.latency("total") + 2.5
    predicted = world(latency__tables=str(folder), latency__source="table")
    assert predicted.pricing.latency(plan, execution) != found.pricing.latency(plan, execution)


def test_work_is_no_time(world: Callable[..., World]) -> None:
    found = world({"controller_ms": 2.5}, latency__source="flops")
    assert (found.facts["unit"], found.pricing.controller_ms) == ("GFLOP", 0)
    execution = found.splits["val"].execute(0, found.space.full)
    assert full_latency(found.pricing, found.splits["val"]) == execution.gflop


# Budgets


def test_budgets_are_absolute_relative_or_of_the_table(
    world: Callable[..., World], sim_tables: Path
) -> None:
    assert world(budget__low=3, budget__high=4).budgets == (3, 4)
    relative = world(budget__mode="relative", budget__low=0.5, budget__high=0.75)
    alone = Simulator(4, 42, "val")
    times = sorted(
        alone.execute(row, alone.space.full).timings.latency("total") for row in range(4)
    )
    full = (times[1] + times[2]) / 2
    assert relative.budgets == pytest.approx((0.5 * full, 0.75 * full))
    assert relative.facts["budgets"] == list(relative.budgets)
    found = world(budget__mode="auto", latency__tables=str(sim_tables))
    table = read_table(sim_tables / "lut.json")
    assert found.budgets == table.budget_range()
    assert found.budgets[0] >= min(row.latency for row in table.rows)


def test_facts_of_a_first_opening_hold(
    world: Callable[..., World], sim_tables: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sim_tables, tmp_path / "tables")
    values = {"budget__mode": "auto", "latency__tables": str(folder)}
    first = world(**values)
    for path in folder.glob("*.json"):
        if path.name not in ("latency.json", "importance.json"):
            path.unlink()
    (folder / "overhead.json").write_text('{"controller_ms": 9}')
    again = world(first.facts, **values)
    assert again.budgets == first.budgets
    assert again.pricing.controller_ms == 0


# A run that goes on


def test_the_latest_network_stays_what_it_was(simulated: Settings) -> None:
    settings = simulated(backbone__model="latest")
    assert pinned(settings, {}) is settings
    assert pinned(settings, {"model": "runs/a"}).backbone.model == "runs/a"
    other = simulated(backbone__model="sim")
    assert pinned(other, {"model": "runs/a"}) is other


def test_other_questions_are_refused(simulated: Settings) -> None:
    def run(**record: Any) -> Any:
        return SimpleNamespace(record=record, folder=Path("here"), settings=simulated())

    require_same(run(), {"data": {"digest": "a"}})
    require_same(run(world={"data": {"digest": "a"}}), {"data": {"digest": "a"}})
    require_same(run(world={"model": "sim"}), {"model": "sim"})
    with pytest.raises(UserError, match="here: began with other questions of text_vqa"):
        require_same(run(world={"data": {"digest": "a"}}), {"data": {"digest": "b"}})
