"""The commands of taskmoe, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path

Call = Callable[..., tuple[int, str, str]]


def test_eval_prints_one_json_document(taskmoe: Call, runs: Path) -> None:
    code, out, _ = taskmoe("eval", "--run", f"{runs}/t", "--json", "--out", "here")
    assert code == 0
    assert json.loads(out)["n"] == 647
    assert Path("here/sample_predictions.png").is_file()
