"""Every source file has its tests where one looks for them."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from moectl.tools.rooms import rooms

ROOT = Path(__file__).resolve().parent.parent

EXEMPT = {
    "__main__": "seven lines that only start a process; tests/test_cli.py starts them",
}


def sources() -> list[Path]:
    files = sorted((ROOT / "moectl").rglob("*.py"))
    return [path for path in files if path.name != "__init__.py" and path.stem not in EXEMPT]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT / "moectl")))
def test_every_source_file_has_a_test_file(path: Path) -> None:
    mirrored = ROOT / "tests" / path.relative_to(ROOT / "moectl").with_name(f"test_{path.name}")
    assert mirrored.is_file(), f"{mirrored.relative_to(ROOT)} is missing"
    assert "def test_" in mirrored.read_text(encoding="utf-8")


def test_packages_hold_no_code_of_their_own() -> None:
    for path in (ROOT / "moectl").rglob("__init__.py"):
        code = ast.unparse(ast.parse(path.read_text(encoding="utf-8")).body[1:])
        assert re.fullmatch(r"(__version__ = .*)?", code), f"{path} is not tested by the mirror"


@pytest.mark.parametrize("room", rooms())
def test_the_reading_order_of_a_room_names_every_file(room: str) -> None:
    text = importlib.import_module(f"moectl.{room}").__doc__ or ""
    order = text.partition("Reading order")[2]
    lines = re.findall(r"^- (.*(?:\n  .*)*)", order, re.MULTILINE)
    named = {name for line in lines for name in re.findall(r"`(\w+)`", line)}
    files = {path.stem for path in (ROOT / "moectl" / room).glob("*.py")} - {"__init__"}
    assert files - named == set()
    assert 8 <= len(lines) <= 12


def test_no_test_file_outlives_its_source() -> None:
    for path in (ROOT / "tests").glob("*/test_*.py"):
        folder = ROOT / "moectl" / path.parent.name
        if folder.is_dir():
            words = path.stem.removeprefix("test_").split("_")
            # test_solvers_seeds.py may go on where test_solvers.py is full.
            names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
            found = any((folder / f"{name}.py").is_file() for name in names)
            assert found, f"{path.relative_to(ROOT)} tests nothing"
