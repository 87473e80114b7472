import csv
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moectl.engine.errors import UserError
from moectl.tools.sweep_plan import Plan, read_plan
from moectl.tools.sweep_table import chosen, collect, report, tables, write

Write = Callable[..., Path]

GRID = "[grid]\noptim.lr = [0.1, 0.01]"


def done(plan: Plan, number: int, status: str = "finished", **scores: Any) -> None:
    folder = plan.folder / plan.cells[number].name
    folder.mkdir(parents=True)
    record = {"status": status, "wall_seconds": 1.5, "scores": {"last": scores}}
    (folder / "run.json").write_text(json.dumps(record))


def text(document: dict[str, Any], metrics: list[str]) -> str:
    from rich.console import Console

    console = Console(width=300)
    with console.capture() as capture:
        for one in tables(document, metrics):
            console.print(one)
    return capture.get()


@pytest.fixture
def plan(sweep_file: Write) -> Plan:
    """Two points and three seeds; a cell has failed and one has no loss."""
    plan = read_plan(sweep_file(GRID))
    for number, accuracy in enumerate((0.5, 0.6, 0.7)):
        done(plan, number, accuracy=accuracy, **({"loss": 2} if number else {}))
    done(plan, 3, accuracy=0.25, loss=3)
    done(plan, 4, "failed", accuracy=0.9)
    return plan


def test_means_and_deviations_are_those_of_the_textbook(plan: Plan) -> None:
    document = collect(plan, {"lr=0.01,seed=2": "broken"})
    first, second = document["points"]
    assert first["point"] == {"optim.lr": 0.1}
    assert (first["n"], first["failed"]) == (3, 0)
    # Of 0.5, 0.6, 0.7: the squares sum to 0.02, divided by n - 1 = 2, and the root.
    assert first["scores"]["last.accuracy"] == pytest.approx({"mean": 0.6, "std": 0.1, "n": 3})
    assert first["scores"]["last.loss"] == {"mean": 2, "std": 0, "n": 2}
    assert (second["n"], second["failed"]) == (1, 1)
    assert second["scores"]["last.accuracy"] == {"mean": 0.25, "std": None, "n": 1}


def test_every_cell_says_how_it_stands(plan: Plan) -> None:
    cells = collect(plan, {"lr=0.01,seed=2": "broken"})["cells"]
    assert [one["status"] for one in cells] == ["finished"] * 4 + ["failed", "new"]
    assert [one["reason"] for one in cells] == [""] * 4 + ["broken", ""]
    assert cells[4]["scores"] == {}
    assert cells[5]["seconds"] is None


def test_the_table_has_deviations_only_of_several(plan: Plan) -> None:
    shown = text(collect(plan, {"lr=0.01,seed=2": "broken"}), ["last.accuracy", "last.loss"])
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["lr", "n", "last.accuracy", "last.loss"] in rows
    assert ["0.1", "3", "0.6", "±", "0.1", "2", "±", "0", "(n", "=", "2)"] in rows
    assert ["0.01", "1", "(1", "failed)", "0.25", "3"] in rows
    assert ["lr=0.01,seed=2", "broken"] in rows


def test_a_cell_that_was_stopped_is_not_listed_as_failed(plan: Plan) -> None:
    folder = plan.folder / plan.cells[5].name
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "interrupted", "reason": "SIGTERM"}')
    document = collect(plan, {})
    assert document["cells"][5]["reason"] == "SIGTERM"
    assert "SIGTERM" not in text(document, ["last.loss"])


def test_many_scores_go_down_and_few_points_across(plan: Plan) -> None:
    names = ["last.accuracy", "last.loss", "c", "d", "e"]
    shown = text(collect(plan, {}), names)
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["lr=0.1", "lr=0.01"] in rows
    assert ["last.accuracy", "0.6", "±", "0.1", "0.25"] in rows
    assert ["c", "–", "–"] in rows
    assert ["n", "3", "1", "(1", "failed)"] in rows


def test_seeds_alone_have_one_column(sweep_file: Write) -> None:
    plan = read_plan(sweep_file(seeds=[1, 2]))
    done(plan, 0, accuracy=1)
    done(plan, 1, accuracy=3)
    rows = [line.split() for line in text(collect(plan, {}), ["last.accuracy"]).splitlines()]
    assert ["all"] in rows
    assert ["last.accuracy", "2", "±", "1.4"] in rows


def test_csv_and_json_have_every_cell(plan: Plan) -> None:
    document = collect(plan, {"lr=0.01,seed=2": "broken"})
    write(plan, document)
    assert json.loads((plan.folder / "sweep.json").read_text()) == document
    rows = list(csv.DictReader((plan.folder / "sweep.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "cell", "optim.lr", "seed", "status", "reason", "seconds", "last.accuracy", "last.loss",
    ]  # fmt: skip
    assert list(rows[1].values()) == [
        "lr=0.1,seed=2",
        "0.1",
        "2",
        "finished",
        "",
        "1.5",
        "0.6",
        "2",
    ]
    assert list(rows[4].values())[:5] == ["lr=0.01,seed=2", "0.01", "2", "failed", "broken"]


def test_scores_are_chosen_by_name_or_all_are_shown(plan: Plan) -> None:
    document = collect(plan, {})
    assert chosen(document, [], "") == ["last.accuracy", "last.loss"]
    assert chosen(document, ["last.loss"], "") == ["last.loss"]
    with pytest.raises(UserError, match=r"^--metric last\.los: no such score; did you mean"):
        chosen(document, ["last.los"], "--metric")


def test_before_any_score_is_known_none_is_refused(sweep_file: Write) -> None:
    assert chosen(collect(read_plan(sweep_file()), {}), ["x"], "") == ["x"]


@pytest.mark.parametrize(
    "grid", [GRID, "[grid]\noptim.name = ['sgd', 'adam']", "[grid]\noptim.nesterov = [false]", ""]
)
def test_the_report_has_the_table_and_a_picture(sweep_file: Write, grid: str) -> None:
    plan = read_plan(sweep_file(grid, seeds=[1, 2]))
    for number in range(len(plan.cells) - 1):
        done(plan, number, accuracy=number)
    document = collect(plan, {plan.cells[-1].name: "bro|ken"})
    report(plan, document, ["last.accuracy", "unknown"])
    lines = (plan.folder / "report.md").read_text().splitlines()
    assert "![scores](plots/scores.png)" in lines
    assert f"| {plan.cells[-1].name} | bro\\|ken |" in lines
    assert any(
        line.startswith(f"| [{plan.cells[0].name}]({plan.cells[0].name}/)") for line in lines
    )
    assert (plan.folder / "plots" / "scores.png").stat().st_size > 1000


def test_a_report_names_its_file_whatever_that_is_called(sweep_file: Write) -> None:
    plan = read_plan(sweep_file(seeds=[1]))
    plan.folder.mkdir(parents=True)
    odd = replace(plan, file=os.fsdecode(b"a \xff.toml"))
    report(odd, collect(odd, {}), [])
    assert "`moectl sweep 'a ?.toml'`" in (plan.folder / "report.md").read_text()


def test_no_scores_no_picture(sweep_file: Write) -> None:
    plan = read_plan(sweep_file(seeds=[1]))
    plan.folder.mkdir(parents=True)
    report(plan, collect(plan, {"seed=1": "broken"}), [])
    assert "plots" not in (plan.folder / "report.md").read_text()
    assert not (plan.folder / "plots").exists()


def drawn(monkeypatch: pytest.MonkeyPatch, plan: Plan, metrics: list[str]) -> dict[str, Any]:
    from moectl.engine import plot

    kept: dict[str, Any] = {}
    monkeypatch.setattr(
        plot, "spreads", lambda _, places, panels, **words: kept.update(
            places=places, panels=panels, **words)
    )  # fmt: skip
    report(plan, collect(plan, {}), metrics)
    return kept


def test_numbers_of_one_axis_make_a_line(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = drawn(monkeypatch, plan, ["last.accuracy"])
    assert kept["places"] == [0.1, 0.01]
    assert kept["x_label"] == "optim.lr"
    assert kept["panels"] == {"last.accuracy": [pytest.approx((0.6, 0.1)), (0.25, 0.0)]}


@pytest.mark.parametrize(
    ("grid", "places"),
    [
        ("optim.name = ['sgd', 'adam']", ["name=sgd", "name=adam"]),
        ("optim.clip_norm = [0, 1]\ntrain.epochs = [2]",
         ["clip_norm=0,epochs=2", "clip_norm=1,epochs=2"]),
        ("model.moe = [true, false]", ["moe=true", "moe=false"]),
    ],
)  # fmt: skip
def test_anything_else_makes_bars(
    sweep_file: Write, monkeypatch: pytest.MonkeyPatch, grid: str, places: list[str]
) -> None:
    command = "diffusion train" if "moe" in grid else "balpoe train"
    plan = read_plan(sweep_file(f"[grid]\n{grid}", command=command, seeds=[1]))
    done(plan, 0, accuracy=0.5)
    kept = drawn(monkeypatch, plan, ["last.accuracy"])
    assert kept["places"] == places
    assert kept["panels"] == {"last.accuracy": [(0.5, 0.0), None]}


def test_eight_scores_are_drawn(sweep_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(sweep_file(seeds=[1]))
    done(plan, 0, **{f"x{number}": 1 for number in range(9)})
    kept = drawn(monkeypatch, plan, [f"last.x{number}" for number in range(9)])
    assert list(kept["panels"]) == [f"last.x{number}" for number in range(8)]
    assert "Drawn are the first 8 scores." in (plan.folder / "report.md").read_text()
