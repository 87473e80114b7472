"""What the analysis of a mixture writes, and that its numbers agree."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli import _run
from moectl.engine import plot
from moectl.taskmoe import eval as evaluation
from moectl.taskmoe import heat_maps, pictures
from moectl.taskmoe.analyze import TEMPERATURES

Call = Callable[..., tuple[int, str, str]]

AT_HALF = ("--temperature", "0.5", "--quiet", "--set", "train.precision=no")
KINDS = ("contribution", "routing_share", "forced_accuracy", "forced_accuracy_own", "knock_out")
FILES = {
    *("expert_analysis.json", "expert_analysis.csv", "expert_analysis.png"),
    *(f"{kind}.png" for kind in KINDS),
    *("temperature_sweep.png", "gates.png"),
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Leave pictures empty: what they show has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (heat_maps, pictures, plot):
            patch.setattr(module, "write_png", lambda _, path: path.write_bytes(b""))
        patch.setattr(evaluation, "sample_predictions", lambda path, _: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def own(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished runs that may be written to."""
    return shutil.copytree(finished_runs, tmp_path_factory.mktemp("own") / "runs") / "taskmoe"


@pytest.fixture(scope="module")
def weights(own: Path) -> Path:
    """Weights with gates that are far from equal and decide much, alone in a file."""
    payload = torch.load(own / "t" / "best_model.pth", weights_only=True)
    state = payload["model_state_dict"]
    state["gating_network.gate_net.4.weight"] *= 300
    state["classifier.weight"][:, : 3 * 32] *= 30
    torch.save(payload, own.parent / "sharp.pth")
    return own.parent / "sharp.pth"


@pytest.fixture(scope="module")
def folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their analysis at temperature 0.5."""
    out = tmp_path_factory.mktemp("analysis")
    assert (
        _run(["taskmoe", "analyze", *AT_HALF, "--checkpoint", str(weights), "--out", str(out)]) == 0
    )
    return out


@pytest.fixture(scope="module")
def document(folder: Path) -> Any:
    return json.loads((folder / "expert_analysis.json").read_text())


@pytest.fixture(scope="module")
def results(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The evaluation of the same weights at the same temperature."""
    out = tmp_path_factory.mktemp("results")
    assert _run(["taskmoe", "eval", *AT_HALF, "--checkpoint", str(weights), "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text())


def test_an_analysis_leaves_its_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES


def test_every_class_divides_its_gates_among_the_experts(document: Any) -> None:
    for kind in ("contribution", "routing_share"):
        columns = zip(*document[kind], strict=True)
        assert [sum(column) for column in columns] == pytest.approx([1] * 9)


def test_the_table_has_a_row_for_every_expert_and_class(folder: Path, document: Any) -> None:
    with (folder / "expert_analysis.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    for row in rows:
        expert, label = int(row["expert"]), document["class_names"].index(row["class"])
        assert int(row["owner"]) == document["owners"][label][expert]
        for kind in KINDS:
            value = document[kind][expert][label]
            assert (float(row[kind]) if row[kind] else None) == value
        assert float(row["logit"]) == document["attribution"]["experts"][label][expert]


def test_experts_have_no_accuracy_of_their_own_on_classes_of_others(document: Any) -> None:
    for expert, accuracies in enumerate(document["forced_accuracy_own"]):
        owned = [row[expert] for row in document["owners"]]
        assert [value is not None for value in accuracies] == [one == 1 for one in owned]
        forced = document["forced_accuracy"][expert]
        pairs = zip(accuracies, forced, strict=True)
        assert all(own >= among_all for own, among_all in pairs if own is not None)


def test_the_parts_of_a_logit_add_up(document: Any) -> None:
    found = document["attribution"]
    for label, logit in enumerate(found["logit"]):
        parts = [*found["experts"][label], found["by_pass"][label], found["bias"][label]]
        assert sum(parts) == pytest.approx(logit, abs=1e-5)


def test_the_analysis_agrees_with_the_evaluation(document: Any, results: Any) -> None:
    assert document["images"] == results["n"]
    assert document["usage"] == pytest.approx(results["usage"])
    shares = {name: 100 * share for name, share in document["ablations"].items()}
    assert shares == pytest.approx(results["ablations"])
    assert results["ablations"]["full"] == pytest.approx(results["overall_accuracy"])


def test_the_sweep_passes_through_the_evaluation(document: Any, results: Any) -> None:
    sweep = document["temperature_sweep"]
    assert list(sweep) == [str(one) for one in TEMPERATURES]
    assert len(set(sweep.values())) > 4
    assert sweep["0.5"] == pytest.approx(results["overall_accuracy"] / 100)
    assert document["temperature"] == 0.5


def test_experts_are_matched_to_different_specialists(document: Any) -> None:
    assert sorted(document["matching"]) == [0, 1, 2]
    classes = [
        sum(row[document["owners"][label].index(1)] for label, row in enumerate(columns)) / 9
        for columns in [list(zip(*document["contribution"], strict=True))]
    ]
    assert document["owner_alignment"] == pytest.approx(classes[0])


def test_results_go_where_they_are_asked_for(taskmoe: Call, own: Path, isolated: Path) -> None:
    before = sorted((own / "m").rglob("*"))
    code, out, _ = taskmoe("analyze", "--run", f"{own}/m", "--out", "here", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["folder"] == "here"
    assert found["weights"]["file"].endswith("m/merged_model.pth")
    assert {path.name for path in Path("here").iterdir()} == FILES
    assert [path.name for path in isolated.iterdir()] == ["here"]
    assert [path for path in sorted((own / "m").rglob("*")) if "plots" not in path.parts] == [
        path for path in before if "plots" not in path.parts
    ]


def test_a_file_alone_is_analysed_beside_itself(
    taskmoe: Call, weights: Path, isolated: Path
) -> None:
    shutil.copy(weights, "alone.pth")
    code, out, err = taskmoe("analyze", "--checkpoint", "alone.pth", "--task", "digits")
    assert code == 0, err
    assert {path.name for path in Path("evals/analysis@alone").iterdir()} == FILES
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["0", "1", "2"]


def test_plot_is_another_name_and_draws_into_the_run(
    taskmoe: Call, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_RUNS", str(own.parent))
    code, out, _ = taskmoe("plot", "--task", "digits", "--json")
    assert code == 0
    place = own / "t" / "evals" / "analysis@best"
    written = json.loads((place / "expert_analysis.json").read_text())
    assert json.loads(out) == {"folder": str(place), **written}
    assert written["weights"]["file"] == f"{own}/t/best_model.pth"
