"""What all trained weights have in common once they are opened."""

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.engine import opened
from moectl.engine.artefact import Artefact
from moectl.engine.errors import UserError
from moectl.engine.opened import accelerator_for, summary
from moectl.engine.sections import TrainSection


def test_the_precision_is_that_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(opened, "build_accelerator", lambda *given: asked.append(given))
    section = TrainSection()
    with pytest.raises(UserError, match="not a run folder"):
        accelerator_for(section, True, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"room": "a", "precision": "bf16"}))
    accelerator_for(section, False, tmp_path)
    assert asked == [(section, False, "bf16")]


def test_results_name_file_checksum_and_epoch() -> None:
    weights = Artefact(Path("a/b/best.pth"), {}, {"epoch": 3, "more": 1}, "abc")
    assert summary(weights) == {"file": "best.pth", "sha256": "abc", "epoch": 3}
    foreign = Artefact(Path("x.pth"), {}, {}, "d")
    assert summary(foreign)["epoch"] == 0
