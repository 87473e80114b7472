"""Options made from fields."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args

import pytest

from moectl.engine import options
from moectl.engine.settings import Flag, Section


class Every(Section):
    rate: Annotated[float, Flag("--rate", "-r")] = 0.5
    """A number."""
    steps: Annotated[int, Flag()] = 0
    """A count."""
    fast_mode: Annotated[bool, Flag()] = True
    """A switch."""
    kind: Annotated[Literal["a", "b"], Flag()] = "a"
    """A choice."""
    folder: Annotated[Path | None, Flag()] = None
    """A path."""
    title: Annotated[str, Flag()] = ""
    """A text."""


def parts(name: str) -> tuple[Any, Any]:
    kind, option = get_args(
        options.field_option(f"every.{name}", Every.model_fields[name]).annotation
    )
    return kind, option


@pytest.mark.parametrize(
    ("name", "kind", "spelling"),
    [
        ("rate", float, ("--rate", "-r")),
        ("steps", int, ("--steps",)),
        ("fast_mode", bool, ("--fast-mode/--no-fast-mode",)),
        ("kind", Literal["a", "b"], ("--kind",)),
        ("folder", Path, ("--folder",)),
        ("title", str, ("--title",)),
    ],
)
def test_type_and_spelling_come_from_the_field(
    name: str, kind: Any, spelling: tuple[str, ...]
) -> None:
    found, option = parts(name)
    assert found == kind | None
    assert (option.default, *option.param_decls) == spelling


def test_help_is_the_docstring_and_the_default() -> None:
    assert parts("rate")[1].help == "A number. Default: 0.5."
    assert parts("fast_mode")[1].help == "A switch. Default: on."
    assert parts("title")[1].help == "A text."
    assert parts("rate")[1].rich_help_panel == "Every"


def test_an_option_that_was_not_given_is_none() -> None:
    option = options.field_option("every.rate", Every.model_fields["rate"])
    assert option.default is None
    assert option.name == "every__rate"
    assert option.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "on"), (False, "off"), (None, ""), ("", ""), (0, "0"), ((1, 2.5), "1, 2.5"), ((), "")],
)
def test_values_as_people_read_them(value: object, text: str) -> None:
    assert options.shown(value) == text


@pytest.mark.parametrize("train", [True, False])
def test_common_options_are_the_ones_that_are_taken_out_again(train: bool) -> None:
    names = {option.name for option in options.common_options("balpoe", train)}
    assert names <= set(options.COMMON)
    assert ("run" in names) != train
    assert ({"name", "out", "resume"} <= names) == train


def spellings(train: bool, alias: str) -> dict[str, tuple[str, ...]]:
    """Return how each common option may be written."""
    found = {
        option.name: get_args(option.annotation)[1]
        for option in options.common_options("balpoe", train, alias)
    }
    return {name: (option.default, *option.param_decls) for name, option in found.items()}


def test_the_run_to_read_may_have_another_name() -> None:
    plain, named = (spellings(False, alias) for alias in ("", "--experts-dir"))
    assert (plain["run"], named["run"]) == (("--run",), ("--run", "--experts-dir"))
    assert {**plain, "run": ()} == {**named, "run": ()}


def test_the_other_name_is_the_runs_to_read_or_the_one_to_make() -> None:
    plain, named = (spellings(True, alias) for alias in ("", "--model-name"))
    assert named["name"] == (*plain["name"], "--model-name")
    assert {**plain, "name": ()} == {**named, "name": ()}


def test_completion_offers_presets_and_runs(toy: ModuleType) -> None:
    folder = Path("runs/balpoe/digits-1")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    assert "digits_ir20" in options._complete_presets("balpoe")("digits")
    assert options._complete_presets("balpoe")("zzz") == []
    assert options._complete_runs("balpoe")("") == ["latest", "digits-1"], "auto is no run to read"
    assert options._complete_runs("balpoe", "auto")("") == ["latest", "auto", "digits-1"]
    assert options._complete_runs("balpoe")("dig") == ["digits-1"]
