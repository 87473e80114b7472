"""What the pages promise exists: commands, options, settings, presets, files and links."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from moectl.cli import CONTENTS, leaf
from moectl.engine.settings import MACHINE_NAMES, defaults, flatten
from moectl.tools.rooms import rooms, settings_class
from moectl.tools.sweep_plan import read_plan

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "moectl").glob("*/README.md"))]
ENDS = {"|", "||", "&", "&&", ";", ">", ")"}
OTHERS = {"--help", "--install-completion"}  # options of no command alone

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: "front" if page.parent == ROOT else page.parent.name
)


def rooms_of(page: Path) -> list[str]:
    return rooms() if page.parent == ROOT else [page.parent.name]


@cache
def command(room: str, name: str) -> Any:
    assert name in (CONTENTS[room][1] or [room]), f"moectl {room} {name}"
    return leaf(room, name)


@cache
def options(room: str) -> set[str]:
    leaves = [command(room, name) for name in CONTENTS[room][1] or [room]]
    parameters = chain.from_iterable(one.params for one in leaves)
    return set(chain.from_iterable((*one.opts, *one.secondary_opts) for one in parameters))


def blocks(page: Path, kind: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def calls(shell: str) -> Iterator[list[str]]:
    """The words behind each `moectl` of a shell script."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words = list(lexer)
        for start in (n for n, word in enumerate(words) if word == "moectl"):
            rest = words[start + 1 :]
            end = next((n for n, word in enumerate(rest) if word in ENDS), len(rest))
            yield rest[:end]


def parse(words: list[str]) -> None:
    room, rest = words[0], ["1" if word == "$n" else word for word in words[1:]]
    name = rest.pop(0) if CONTENTS[room][1] else room
    dashed = {"token_normalize_func": lambda token: token.replace("_", "-")}
    context = command(room, name).make_context(name, rest, **dashed)
    for preset in context.params.get("preset") or ():
        there = (ROOT / "presets" / room / f"{preset}.toml").is_file()
        assert there or preset.endswith(".toml"), words


@each_page
def test_commands_are_such_as_the_parser_takes(page: Path) -> None:
    found = list(calls("".join(blocks(page, "sh"))))
    assert len(found) >= 5
    for words in found:
        parse(words)


@each_page
def test_every_option_that_is_named_is_one(page: Path) -> None:
    ours, _, tables = page.read_text(encoding="utf-8").partition("## What the original got wrong")
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    told = [left if "the same" in right else right for left, right in rows]
    known = {*chain.from_iterable(map(options, rooms_of(page) if rows else CONTENTS)), *OTHERS}
    ours = re.sub(r"^```.*?^```", "", ours, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`((?!python |accelerate )[^`]+)`", "\n".join((ours, *told))):
        for name, digits, end in re.findall(r"(?<!\S)(--[a-z][\w-]*)(?:{([\d,]+)}(\w*))?", code):
            for digit in digits.split(","):
                assert (name + digit + end).replace("_", "-") in known, code


@each_page
def test_every_setting_that_is_named_is_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = {room: flatten(defaults(settings_class(room))) for room in rooms_of(page)}
    for key in re.findall(r"--set ([a-z]\w*\.\w+)=", text):
        assert any(key in keys for keys in known.values()), key
    for name in re.findall(r"\bMOECTL_\w+(?==)", text):
        room, _, key = name.removeprefix("MOECTL_").lower().partition("__")
        assert name in MACHINE_NAMES or key.replace("__", ".") in known[room], name


def test_the_sweep_file_can_be_planned() -> None:
    for number, block in enumerate(blocks(PAGES[0], "toml")):
        Path(f"sweep{number}.toml").write_text(block, encoding="utf-8")
    assert len(read_plan(Path("sweep0.toml")).cells) == 6


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "sweeps").iterdir()), ids=lambda f: f.stem)
def test_the_sweeps_of_the_results_can_be_planned(file: Path) -> None:
    plan = read_plan(file)
    assert len(plan.cells) == 3 * max(1, len(next(iter(plan.axes.values()), [])))
    assert plan.metrics


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [one or two for one, two in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            file = page.parent / path if path else page
            assert file.is_file(), target
            assert not anchor or anchor in headings(file), target


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@each_page
def test_source_files_that_are_named_are_there(page: Path) -> None:
    ours = page.read_text(encoding="utf-8").partition("## What the original got wrong")[0]
    for name in re.findall(r"`(\w+\.py)`", ours):
        assert (page.parent / name).is_file(), name
