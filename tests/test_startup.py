"""Help and listings come at once: nothing heavy is imported, and the table of contents is true."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from moectl.cli import _TOOLS, CONTENTS, leaf

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    *("torch", "torchvision", "accelerate", "transformers", "datasets", "diffusers", "matplotlib"),
    *("sklearn", "scipy", "torchmetrics", "tensorboard", "numpy", "PIL"),
}
SLACK = float(os.environ.get("STARTUP_SLACK", "1"))
LEAVES = [
    (room, command) for room, (_, commands) in CONTENTS.items() for command in commands or [room]
]
ROOMS = [room for room in CONTENTS if room not in _TOOLS]

PROBE = """
import json, os, sys
from moectl.cli import main
words = sys.argv[1:]
try:
    main(words)
except SystemExit as end:
    code = end.code
times = os.times()
loaded = sorted({name.partition('.')[0] for name in sys.modules})
sys.stderr.write(json.dumps([code, times.user + times.system, loaded]))
"""


def probe(*words: str, **env: str) -> tuple[int, float, set[str], str]:
    """Return exit code, CPU seconds, top-level modules and stdout of a command."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )
    code, seconds, modules = json.loads(done.stderr.splitlines()[-1])
    return code, seconds, set(modules), done.stdout


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("--help", 0.15 * 3),
        ("balpoe --help", 0.25 * 3),
        ("balpoe train --help", 0.45 * 2),
        ("presets list", 0.45 * 2),
        ("runs list", 0.45 * 2),
    ],
)
def test_nothing_heavy_is_loaded_and_little_time_is_spent(words: str, seconds: float) -> None:
    code, spent, modules, out = probe(*words.split())
    assert code == 0
    assert out.strip()
    assert not modules & HEAVY
    assert spent < seconds * SLACK


def test_dry_run_settings_come_before_torch(tmp_path: Path) -> None:
    """A wrong setting is refused before anything heavy is loaded."""
    code, _, modules, out = probe("balpoe", "train", "--set", "optim.lrr=1")
    assert code == 2
    assert out == ""
    assert not modules & HEAVY


@pytest.mark.parametrize(
    "words",
    [
        "balpoe import missing.pth",
        "controller convert missing out",
        "controller infer --policy lut --prompt x",
        "diffusion ablate",
    ],
)
def test_wrong_words_are_refused_before_torch(words: str) -> None:
    code, _, modules, out = probe(*words.split())
    assert (code, out) == (2, "")
    assert not modules & {"torch", "transformers", "diffusers"}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_lists_presets_without_torch(shell: str) -> None:
    words = "moectl balpoe train --preset digits"
    variables = {
        "_MOECTL_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": "4",
        "_TYPER_COMPLETE_ARGS": words,
    }
    _, _, modules, out = probe(**variables)
    assert "digits_ir20" in out
    assert "torch" not in modules


def test_completion_knows_the_commands() -> None:
    variables = {
        "_MOECTL_COMPLETE": "complete_bash",
        "COMP_WORDS": "moectl balpoe ",
        "COMP_CWORD": "2",
    }
    out = probe(**variables)[3]
    assert set(CONTENTS["balpoe"][1]) <= set(out.split())


def function_of(room: str, command: str) -> Any:
    module = importlib.import_module(
        f"moectl.tools.{room}" if room in _TOOLS else f"moectl.{room}.cli"
    )
    plain = command.replace("-", "_")
    return getattr(module, plain, None) or getattr(module, f"{plain}_")


@pytest.mark.parametrize(("room", "command"), LEAVES)
def test_the_table_says_what_the_docstring_says(room: str, command: str) -> None:
    line, commands = CONTENTS[room]
    expected = commands.get(command, line)
    text = inspect.getdoc(function_of(room, command))
    assert text
    assert text.splitlines()[0] == expected


@pytest.mark.parametrize(("room", "command"), LEAVES)
def test_option_names_are_unique_and_explained(room: str, command: str) -> None:
    names: list[str] = []
    for parameter in leaf(room, command).params:
        if parameter.param_type_name == "option":
            names += [*parameter.opts, *parameter.secondary_opts]
            assert parameter.help, parameter.name
    assert len(names) == len(set(names)), sorted(names)
    assert not [name for name in names if "_" in name]


@pytest.mark.parametrize("room", ROOMS)
def test_a_dropped_option_is_not_one_that_exists(room: str) -> None:
    for command in CONTENTS[room][1]:
        dropped = getattr(function_of(room, command), "dropped", {})
        existing = {name for item in leaf(room, command).params for name in item.opts}
        assert not set(dropped) & existing


def test_every_flag_is_declared_once_per_system() -> None:
    from moectl.engine.settings import fields, flag_of
    from moectl.tools.rooms import settings_class

    alone = ("eval", "toy", "profile")  # in no command with others
    for room in ROOMS:
        names = [
            name
            for key, info in fields(settings_class(room)).items()
            if (flag := flag_of(info)) and key.split(".")[0] not in alone
            for name in flag.names or (f"--{key.split('.')[1].replace('_', '-')}",)
        ]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("room", ROOMS)
def test_every_setting_is_described(room: str) -> None:
    from moectl.engine.settings import fields
    from moectl.tools.rooms import settings_class

    for key, info in fields(settings_class(room)).items():
        assert info.description, key
        assert info.description.endswith("."), key


def test_typer_is_the_version_that_was_tested() -> None:
    assert typer.__version__.startswith("0.29.")
