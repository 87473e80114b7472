"""Who may import whom: the table of the architecture, checked against every import statement."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from moectl.cli import _TOOLS, CONTENTS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "moectl").rglob("*.py"))
ROOMS = frozenset(CONTENTS) - frozenset(_TOOLS)

ALLOWED = {
    # layer of the importer: layers it may import, at any depth of the code
    "": {"", "engine"},
    "engine": {"", "engine"},
    "common": {"common"},
    "tools": {"", "engine", "tools"},
    **{room: {"", "engine", "common", room} for room in ROOMS},
}
COMMON_LIBRARIES = {"torch", "numpy", "torchvision", "PIL", "scipy"}
LIGHT = {"moectl", "pydantic", "pydantic_settings", "typer", "tomli_w", "tomllib"}
LIGHT_ENGINE = ("settings", "sections", "options", "command", "presets", "toml", "references")
HEAVY = {
    "torch",
    "torchvision",
    "accelerate",
    "transformers",
    "datasets",
    "diffusers",
    "matplotlib",
    "sklearn",
    "scipy",
    "torchmetrics",
    "safetensors",
    "tensorboard",
    "numpy",
    "PIL",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else ""


def imports(path: Path, *, top: bool = False) -> Iterator[str]:
    """Every module that a file imports; with `top`, only those imported as it is loaded."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")).body, top)


def _imports(body: list[ast.stmt], top: bool) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse, top)
        else:
            children = [
                child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)
            ]
            handlers = [
                statement
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.ExceptHandler | ast.match_case)
                for statement in child.body
            ]
            yield from _imports(children + handlers, top)


def ids(path: Path) -> str:
    return module_name(path)


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_follow_the_table(path: Path) -> None:
    own = layer(module_name(path))
    for module in imports(path):
        if module.split(".")[0] == "moectl":
            assert layer(module) in ALLOWED[own], f"{module} from {module_name(path)}"


@pytest.mark.parametrize("path", sorted((ROOT / "moectl/common").glob("*.py")), ids=ids)
def test_common_needs_tensors_only(path: Path) -> None:
    import sys

    for module in imports(path):
        first = module.split(".")[0]
        assert first in COMMON_LIBRARIES | sys.stdlib_module_names | {"moectl"}, module


def room_files(*names: str) -> list[Path]:
    found = [ROOT / "moectl" / room / f"{name}.py" for room in sorted(ROOMS) for name in names]
    return [path for path in found if path.exists()]


PARTS = ("taus", "model", "projector", "blocks", "experts", "frequency")
"""Files of a room that its models and losses may build on, and that are as plain as these."""


@pytest.mark.parametrize("path", room_files("losses", *PARTS), ids=ids)
def test_models_and_losses_know_tensors_only(path: Path) -> None:
    import sys

    for module in imports(path):
        first = module.split(".")[0]
        assert first in {"torch", "numpy", "moectl"} | sys.stdlib_module_names, module
        if first == "moectl":
            own = module_name(path).rpartition(".")[0]
            parts = tuple(f"{own}.{part}." for part in PARTS)
            fine = f"{module}.".startswith(("moectl.common.", *parts))
            assert fine, f"{module}: models and losses take plain numbers"


@pytest.mark.parametrize(
    "path",
    room_files("settings", "cli") + [ROOT / f"moectl/engine/{name}.py" for name in LIGHT_ENGINE],
    ids=ids,
)
def test_what_help_needs_loads_nothing_heavy(path: Path) -> None:
    import sys

    for module in imports(path, top=True):
        first = module.split(".")[0]
        assert first in LIGHT | sys.stdlib_module_names, module


@pytest.mark.parametrize("path", room_files("report"), ids=ids)
def test_reports_are_made_without_torch(path: Path) -> None:
    todo, seen = [module_name(path)], set()
    while todo:  # through our own modules as well
        for module in imports(_file_of(todo.pop()), top=True):
            assert module.split(".")[0] not in HEAVY - {"numpy"}, f"{module} by {module_name(path)}"
            name = _own(module)
            if name and name not in seen:
                seen.add(name)
                todo.append(name)
    assert "torch" not in {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize(
    "path",
    [*room_files("settings", "cli"), ROOT / "moectl/cli.py", *ROOT.glob("moectl/tools/*.py")],
    ids=ids,
)
def test_commands_load_nothing_heavy_through_others(path: Path) -> None:
    todo, seen = [module_name(path)], set()
    while todo:
        for module in imports(_file_of(todo.pop()), top=True):
            assert module.split(".")[0] not in HEAVY, f"{module} by {module_name(path)}"
            name = _own(module)
            if name and name not in seen:
                seen.add(name)
                todo.append(name)


def _own(module: str) -> str:
    """The module of ours that an import loads: `moectl.engine.run.Run` is `moectl.engine.run`."""
    if module.split(".")[0] != "moectl":
        return ""
    return next(
        name for name in (module, module.rpartition(".")[0]) if _file_of(name, check=False).exists()
    )


def _file_of(module: str, *, check: bool = True) -> Path:
    path = ROOT.joinpath(*module.split("."))
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert found.exists() or not check, module
    return found


def test_the_table_knows_every_folder() -> None:
    folders = {path.parent.name for path in SOURCES} - {"moectl"}
    assert folders <= set(ALLOWED)


def test_the_reader_of_imports_sees_hidden_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import a\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "try:\n    import d\nexcept ImportError:\n    import e\ndef f():\n    import g\n"
        "class H:\n    import i\nwith x:\n    from j import k\n"
    )
    assert set(imports(path)) == {*"abcdegi", "typing.TYPE_CHECKING", "j.k"}
    assert set(imports(path, top=True)) == {*"acdei", "typing.TYPE_CHECKING", "j.k"}
