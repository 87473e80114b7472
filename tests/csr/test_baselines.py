"""Baselines see the same images, and are what they are called."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from moectl.csr.baselines import BOTTLENECK, CSR, LINEAR, fit, run_baselines
from moectl.csr.inference import Opened, open_network
from moectl.csr.metrics import ranking
from moectl.csr.settings import CsrSettings
from moectl.engine.command import Request
from moectl.engine.settings import from_toml


def request(folder: Path, **changes: Any) -> Request:
    settings = from_toml(CsrSettings, folder / "settings.toml")
    sections: dict[str, dict[str, Any]] = {"eval": {"bootstrap": 0}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    updated = {
        name: getattr(settings, name).model_copy(update=fields) for name, fields in sections.items()
    }
    return Request(
        room="csr",
        command="baselines",
        settings=settings.model_copy(update=updated),
        origin={},
        name="t",
        cpu=True,
        out=None,
        resume="",
        folder=folder,
        run=str(folder),
    )


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


@pytest.fixture
def opened(finished_run: Path) -> Opened:
    return open_network(request(finished_run, optim__lr=0.02, train__epochs_stage3=30))


def test_rows_stand_beside_the_network_itself(copied: Path) -> None:
    document, _ = run_baselines(request(copied), "test")
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == [CSR, LINEAR, BOTTLENECK]
    assert [row["inputs"] for row in rows.values()] == [20, 64, 4]
    assert [row["parameters"] for row in rows.values()] == [21 * 3, 65 * 3, 5 * 3]
    assert rows[CSR]["p_value"] is None
    assert all(0 <= rows[name]["p_value"] <= 1 for name in (LINEAR, BOTTLENECK))
    part = (network := open_network(request(copied))).data.test
    own = ranking(network.answers(part).logits, part.targets, network.targets)
    assert rows[CSR]["task"]["auroc_macro"] == pytest.approx(own["auroc_macro"])
    written = json.loads((copied / "evals/test@best_model_stage3/baselines.json").read_text())
    assert written["rows"] == document["rows"]


def test_the_same_command_says_the_same(csr: Callable[..., Any], copied: Path) -> None:
    words = ("baselines", "--run", str(copied), "--bootstrap", "0", "--cpu", "--split", "val")
    documents = [json.loads(csr(*words, "--json", "--quiet")[1]) for _ in range(2)]
    assert documents[0] == documents[1]
    assert documents[0]["split"] == "val"
    assert documents[0]["rows"][0]["task"]["n"] == 12


def test_a_head_learns_what_a_library_learns(opened: Opened) -> None:
    """On inputs that tell one target apart, against scikit-learn on the same inputs."""
    data, draws = opened.data, torch.Generator().manual_seed(0)

    def inputs(targets: Tensor) -> Tensor:
        noise = torch.randn(len(targets), 6, generator=draws)
        noise[:, 0] += 2 * targets[:, 1]
        return noise

    seen = {name: inputs(getattr(data, name).targets) for name in ("train", "val", "test")}
    head = fit(opened, seen)
    with torch.no_grad():
        found = ranking(head(seen["test"]), data.test.targets, data.targets)
    library = LogisticRegression().fit(seen["train"], data.train.targets[:, 1])
    scores = library.decision_function(seen["test"].numpy())
    wanted = ranking(scores[:, None], data.test.targets[:, 1:2], ["x"])["auroc_macro"]
    assert wanted > 0.8
    assert found["columns"][data.targets[1]]["auroc"] == pytest.approx(wanted, abs=0.1)


def test_the_best_epoch_counts(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    from moectl.csr import baselines as module

    seen = {
        name: torch.randn(len(getattr(opened.data, name).targets), 3) for name in ("train", "val")
    }
    outputs: list[Tensor] = []

    def falling(logits: Tensor, *_: Any) -> dict[str, float | None]:
        outputs.append(logits.clone())
        return {"val/task_auroc": -len(outputs)}

    monkeypatch.setattr(module, "task_scores", falling)
    head = fit(opened, seen)
    assert len(outputs) == 30
    with torch.no_grad():
        assert torch.equal(head(seen["val"]), outputs[0])
    assert not torch.equal(outputs[0], outputs[-1])
