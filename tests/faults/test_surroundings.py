"""Locales that know no letters but a to z, and folders that have others."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.procedures import PROCEDURES

NAME = "läuft 日本 1"
TEXTS = {".csv", ".json", ".toml", ".txt"}
TRAIN = """
import sys
from moectl.cli import main
from tests.faults.procedures import without_pictures
with without_pictures():
    main(sys.argv[1:])
"""


def poor(encoding: str) -> dict[str, Any]:
    """An encoding of Python's own stands for a locale that this machine need not have."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = {**os.environ, **locale, "PYTHONIOENCODING": f"{encoding}:strict"}
    return {"env": {**given, "PYTHONPATH": os.pathsep.join(sys.path)}, "encoding": "latin-1"}


def test_a_run_and_its_tables_stand_any_locale(
    start: Callable[..., Any], finish: Callable[..., Any], isolated: Path
) -> None:
    specialist = next(one for one in PROCEDURES if one.name == "taskmoe-specialist")
    words = [*specialist.command(isolated), "--num-epochs", "1", "--out", NAME]
    words.remove("--quiet")
    program = (sys.executable, "-c", TRAIN)
    code, _, err = finish(start(*words, program=program, **poor("ascii")), 120)
    assert code == 0, err
    assert "Traceback" not in err
    texts = [path for path in Path(NAME).rglob("*") if path.suffix in TEXTS]
    assert all(path.read_text(encoding="utf-8") for path in texts)
    assert {path.suffix for path in texts} == TEXTS
    assert f" {NAME}: " in Path(NAME, "log.txt").read_text(encoding="utf-8")
    for encoding in ("ascii", "iso-8859-1"):
        code, out, err = finish(start("runs", "show", NAME, **poor(encoding)))
        assert (code, err) == (0, "")
        assert "specialist" in out
