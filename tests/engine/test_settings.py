"""Layers, provenance, typos and round trips of settings."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from moectl.engine import settings as engine
from moectl.engine.errors import UserError
from moectl.engine.settings import Flag, Section, Settings, resolve


class Optim(Section):
    lr: Annotated[float, Flag("--lr"), Field(gt=0)] = 0.001
    """Learning rate."""
    momentum: float = 0.0
    """Momentum."""
    name: Literal["sgd", "adam"] = "sgd"
    """Optimiser."""

    @model_validator(mode="after")
    def _momentum_of_sgd(self) -> "Optim":
        if self.name == "adam" and self.momentum > 1:
            raise ValueError("optim.momentum with adam")
        return self


class Data(Section):
    root: Path = Path("data")
    """Folder."""
    images: Path | None = None
    """Another folder."""
    steps: tuple[int, ...] = (1, 2)
    """Numbers."""
    title: str = ""
    """Text."""
    cutout: Annotated[bool, Flag()] = False
    """Switch."""
    few: Annotated[tuple[Literal["a", "b"], ...], Flag("--some-few"), Field(min_length=1)] = ("a",)
    """Some of them."""
    even: Annotated[int, Flag()] = 2
    """A rule of its own."""

    @field_validator("even")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


class Small(Settings):
    model_config = SettingsConfigDict(env_prefix="MOECTL_SMALL__")

    optim: Optim = Optim(lr=0.1, momentum=0.9)
    data: Data = Data()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Small":
        if self.data.even > 99:
            raise ValueError("optim.lr is too low for data.even")
        return self


def file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_layer_wins_over_the_ones_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = file(tmp_path / "one.toml", "[optim]\nlr = 0.2\nmomentum = 0.2\n[data]\ntitle = 'one'")
    two = file(tmp_path / "two.toml", "[optim]\nmomentum = 0.3\n[data]\ntitle = 'two'")
    monkeypatch.setenv("MOECTL_SMALL__DATA__TITLE", "three")
    monkeypatch.setenv("MOECTL_SMALL__DATA__STEPS", "[7, 8]")
    made, origin = resolve(Small, {"optim.name": "adam"}, ["data.cutout=on"], [one, two])
    assert made.optim == Optim(lr=0.2, momentum=0.3, name="adam")
    assert made.data == Data(title="three", steps=(7, 8), cutout=True)
    assert origin == {
        "optim.lr": "one.toml",
        "optim.momentum": "two.toml",
        "optim.name": "flag",
        "data.root": "default",
        "data.images": "default",
        "data.steps": "MOECTL_SMALL__DATA__STEPS",
        "data.title": "MOECTL_SMALL__DATA__TITLE",
        "data.cutout": "--set",
        "data.few": "default",
        "data.even": "default",
    }


def test_command_line_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_SMALL__OPTIM__LR", "0.5")
    made, origin = resolve(Small, {"optim.lr": 0.7}, [], [])
    assert (made.optim.lr, origin["optim.lr"]) == (0.7, "flag")
    made, origin = resolve(Small, {}, ["optim.lr=0.8"], [])
    assert (made.optim.lr, origin["optim.lr"]) == (0.8, "--set")


def test_setting_one_field_keeps_the_defaults_of_its_neighbours(tmp_path: Path) -> None:
    made, _ = resolve(Small, {}, ["optim.name=adam"], [])
    assert (made.optim.lr, made.optim.momentum) == (0.1, 0.9)
    path = file(tmp_path / "a.toml", "[optim]\nname = 'adam'")
    assert engine.from_toml(Small, path).optim.lr == 0.1


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optim.lr=1e-4", "lr", 1e-4),
        ("optim.lr = 3", "lr", 3.0),
        ("data.cutout=off", "cutout", False),
        ("data.cutout=true", "cutout", True),
        ("data.title=007", "title", "007"),
        ("data.title='a=b'", "title", "a=b"),
        ("data.title=", "title", ""),
        ("data.steps=[3, 4]", "steps", (3, 4)),
        ("data.root=some where", "root", Path("some where")),
        ("data.images=x", "images", Path("x")),
    ],
)
def test_set_leaves_the_meaning_to_the_field(text: str, key: str, value: object) -> None:
    made, _ = resolve(Small, {}, [text], [])
    section = made.optim if key in Optim.model_fields else made.data
    assert getattr(section, key) == value


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["optim.lrr=1"], r"--set optim.lrr: no such setting; did you mean optim.lr\?"),
        (["lr=1"], r"--set lr: no such setting; did you mean optim.lr\?"),
        (["optim=1"], "--set optim: no such setting"),
        (["optim.lr"], "expected key=value"),
        (["optim.lr=1", "optim.lr=2"], "--set optim.lr: set twice"),
        (["optim.lr=fast"], "--set: optim.lr = 'fast': input should be a valid number"),
        (["optim.lr=-3"], "--set: optim.lr = '-3': input should be greater than 0"),
        (["optim.lr=nan"], "optim.lr = .*finite"),
        (["optim.name=sdg"], "optim.name = 'sdg': input should be 'sgd' or 'adam'"),
        (["data.steps=[1"], "--set data.steps: not valid TOML"),
        (["data.steps=[1, 'x']"], "--set: data.steps = 'x': input should be a valid integer"),
    ],
)
def test_wrong_assignment_is_refused_with_place_and_value(
    assignments: list[str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        resolve(Small, {}, assignments, [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optim.lr": -3.0}, "--lr = -3.0: input should be greater than 0"),
        ({"data.cutout": "maybe"}, "--cutout = 'maybe': input should be a valid boolean.*"),
        ({"data.few": ("bogus",)}, "--some-few = 'bogus': input should be 'a' or 'b'"),
        ({"data.few": ()}, "--some-few = .*: tuple should have at least 1 item.*"),
        ({"data.even": 3}, "--even: 3 is odd"),
        ({"data.even": 100}, "optim.lr is too low for data.even"),
        ({"optim.name": "adam", "optim.momentum": 2.0}, "optim.momentum with adam"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_written(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(Small, flags, [], [])
    assert re.fullmatch(message, refusal.value.message), "one line"
    assert refusal.value.hint == "moectl presets show small lists every key"


def test_a_flag_and_a_set_of_the_same_key_are_refused() -> None:
    with pytest.raises(UserError, match=r"--set optim\.lr: set twice"):
        resolve(Small, {"optim.lr": 0.2}, ["optim.lr=0.3"], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[optim]\nlrr = 1", r"a.toml: optim.lrr: no such setting; did you mean optim.lr\?"),
        ("[optimm]\nlr = 1", r"a.toml: optimm: no such setting; did you mean optim\?"),
        ("lr = 1", "a.toml: lr: no such setting"),
        ("optim = 3", "a.toml: optim = 3"),
        ("[optim]\nlr = -1", "a.toml: optim.lr = -1: input should be greater than 0"),
        ("[optim]\nlr = inf", "a.toml: optim.lr"),
        ("[optim.lr]\nx = 1", "a.toml: optim.lr"),
    ],
)
def test_wrong_file_is_refused_with_place_and_value(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = file(tmp_path / "a.toml", text)
    for read in (lambda: resolve(Small, {}, [], [path]), lambda: engine.from_toml(Small, path)):
        with pytest.raises(UserError, match=expected):
            read()


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    path = file(tmp_path / "a.toml", "[optim]\nlr = -1\nmomentun = 2\n[data]\nroot = 3")
    with pytest.raises(UserError) as refusal:
        resolve(Small, {}, [], [path])
    assert [
        line.split(" = ")[0].split(": no")[0] for line in refusal.value.message.split("\n")
    ] == [
        "a.toml: optim.lr",
        "a.toml: optim.momentun",
        "a.toml: data.root",
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("MOECTL_SMALL__OPTIM__LRR", "1", "OPTIM__LRR: optim.lrr: no such setting"),
        ("MOECTL_SMALL__OPTIM__LR", "fast", "OPTIM__LR: optim.lr = 'fast'"),
        ("MOECTL_SMALL__OPTIM", "fast", "MOECTL_SMALL__OPTIM"),
        ("MOECTL_SMALL__DATA__STEPS", "1;2", "(?i)steps"),
    ],
)
def test_wrong_variable_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        resolve(Small, {}, [], [])


def test_variables_that_set_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPTIMM__LR", "OPTIM__LRR", "OPTIM__LR", "OPTIM"):
        monkeypatch.setenv(f"MOECTL_SMALL__{name}", "1")
    monkeypatch.setenv("MOECTL_RUNS", "x")
    monkeypatch.setenv("MOECTL_RUN", "x")
    assert engine.unknown_variables([Small]) == [
        "MOECTL_RUN",
        "MOECTL_SMALL__OPTIMM__LR",
        "MOECTL_SMALL__OPTIM__LRR",
    ]


@pytest.mark.parametrize(
    "changes",
    [{}, {"optim.lr": 1e-30, "data.title": 'quote " and \\ and\nline'}, {"data.images": Path("ü")}],
)
def test_toml_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    made, _ = resolve(Small, changes, [], [])
    for write in (engine.to_toml, engine.to_annotated_toml):
        path = file(tmp_path / "a.toml", write(made))
        assert engine.from_toml(Small, path) == made


def test_annotated_toml_explains_every_field() -> None:
    text = engine.to_annotated_toml(Small())
    for field in engine.fields(Small).values():
        assert f"# {field.description}\n" in text
    assert "# images =" in text, "unset fields are shown, commented out"
    assert tomllib.loads(text)["optim"]["lr"] == 0.1


def test_from_toml_ignores_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_SMALL__OPTIM__LR", "0.5")
    assert engine.from_toml(Small, file(tmp_path / "a.toml", "")).optim.lr == 0.1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Small().optim.lr = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        Small().optim = Optim()  # type: ignore[misc]


def test_nest_is_the_inverse_of_flatten() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [1, {"x": 2}]}, "e": 0}
    assert engine.nest(engine.flatten(tree)) == tree
    assert engine.flatten(tree) == {"a.b.c": 1, "a.d": [1, {"x": 2}], "e": 0}


def test_merge_leaves_both_trees_alone() -> None:
    below, above = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 5}, "c": {"z": 1}}
    assert engine.merge(below, above) == {"a": {"x": 1, "y": 5}, "b": 3, "c": {"z": 1}}
    assert below == {"a": {"x": 1, "y": 2}, "b": 3}
    assert above == {"a": {"y": 5}, "c": {"z": 1}}


def test_nearest_says_nothing_about_strangers() -> None:
    assert engine.nearest("zebra", ["optim.lr", "data.root"]) == ""
    assert engine.nearest("optim.lrs", ["optim.lr", "data.root"]) == "; did you mean optim.lr?"
    assert engine.nearest("model.roof", ["optim.lr", "data.root"]) == "; did you mean data.root?"


def test_keys_that_are_none_are_left_out_of_the_dump() -> None:
    assert "images" not in engine.dump(Small())["data"]
