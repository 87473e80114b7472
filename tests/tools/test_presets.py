import json
import tomllib
from pathlib import Path

import pytest

from moectl import cli
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine import presets as files
from moectl.engine.settings import from_toml, to_annotated_toml
from moectl.tools import presets

GOOD = """\
# command: moectl balpoe train --preset tiny
# expected: 50 % accuracy
# cost: a minute
# source: made up

[data]
dataset = "digits"

[train]
epochs = 3
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Path:
    """One preset in ./presets, and none that are shipped."""
    monkeypatch.setattr(files, "roots", lambda: [Path("presets")])
    path = Path("presets/balpoe/tiny.toml")
    path.parent.mkdir(parents=True)
    path.write_text(GOOD)
    return path


def run(*arguments: str) -> int:
    return cli._run(["presets", *arguments])


def test_first_lines_are_those_of_the_table_of_contents() -> None:
    for name, line in cli.CONTENTS["presets"][1].items():
        function = getattr(presets, name, None) or getattr(presets, f"{name}_")
        assert (function.__doc__ or "").splitlines()[0] == line


def test_list_shows_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry == {
        "room": "balpoe",
        "name": "tiny",
        "path": "presets/balpoe/tiny.toml",
        "command": "moectl balpoe train --preset tiny",
        "expected": "50 % accuracy",
        "cost": "a minute",
        "source": "made up",
    }
    assert run("list", "balpoe") == 0
    assert "50 % accuracy" in capsys.readouterr().out


def test_list_of_an_unknown_system_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "nothing") == 2
    assert "balpoe" in capsys.readouterr().err


def test_list_shows_an_unreadable_preset_too(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.with_name("broken.toml").write_bytes(b"\xff\xfe")
    assert run("list", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_show_can_be_saved_and_gives_the_same_settings(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "tiny") == 0
    shown = Path("presets/balpoe/shown.toml")
    shown.write_text(capsys.readouterr().out.replace("--preset tiny", "--preset shown"))
    assert from_toml(BalpoeSettings, shown) == from_toml(BalpoeSettings, tiny)
    assert presets.check(shown) == []
    assert "# Passes over the training data." in shown.read_text()


def test_diff_has_only_what_differs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "balpoe/tiny", "--diff") == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out) == {"data": {"dataset": "digits"}, "train": {"epochs": 3}}
    tiny.with_name("short.toml").write_text(out.replace("--preset tiny", "--preset short"))
    assert presets.check(tiny.with_name("short.toml")) == []


def test_show_of_a_system_has_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "balpoe") == 0
    assert capsys.readouterr().out == to_annotated_toml(BalpoeSettings())
    assert run("show", "balpoe", "--diff") == 0
    assert capsys.readouterr().out == "\n"


def test_show_as_json_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "tiny", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == set(BalpoeSettings.model_fields)
    assert document["train"]["epochs"] == 3


def test_all_good_presets_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate") == 0
    assert capsys.readouterr().out == "1 preset checked, all good\n"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("epochs = 3", "epochs = -3", "train.epochs = -3"),
        ("epochs = 3", "epoch = 3", "did you mean train.epochs?"),
        ("epochs = 3", "epochs = ", "not valid TOML"),
        (GOOD, "epochs = ", "not valid TOML"),
        ("# source: made up", "# source: made up\neval = 3", "eval = 3"),
        ("# cost: a minute\n", "", "has no line `# cost: …`"),
        ("# source: made up", "# source:", "has no line `# source: …`"),
        ("--preset tiny", "--preset other", "does not name tiny"),
        ("--preset tiny", "--preset 'tiny", "does not name tiny"),
    ],
)
def test_a_bad_preset_is_explained(
    tiny: Path, old: str, new: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert GOOD.count(old) == 1
    tiny.write_text(GOOD.replace(old, new))
    assert run("validate") == 2
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("tiny.toml: ") == 1


def test_every_problem_of_every_file_is_listed(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_text(GOOD.replace("epochs = 3", "epochs = 0\nlr = 1").replace("# cost", "# price"))
    tiny.with_name("other.toml").write_text("[data]\nshape = 1\n")
    tiny.with_name("good.toml").write_text(GOOD.replace("--preset tiny", "--preset good"))
    assert run("validate", "presets", "--json") == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert len(document["checked"]) == 3
    counts = {Path(name).stem: len(lines) for name, lines in document["problems"].items()}
    assert counts == {"tiny": 3, "other": 5}
    assert "2 of 3 presets are wrong" in err
    assert len(err.splitlines()) == 9


def test_paths_are_searched_and_missing_ones_are_problems(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("validate", "presets", str(tiny), str(tiny.resolve())) == 0
    assert capsys.readouterr().out.startswith("1 preset ")
    assert run("validate", "nothing.toml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["nothing.toml: cannot be read (No such file or directory)"]


def test_a_file_of_ones_own_needs_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("[train]\nepochs = 3\n")
    assert run("validate", "mine.toml") == 2
    err = capsys.readouterr().err
    assert "mine.toml: cannot tell which system this is for" in err
    assert "hint: --room ROOM" in err
    assert run("validate", "mine.toml", "--room", "balpoe") == 0
    assert run("validate", "mine.toml", "--room", "nothing") == 2
    Path("mine.toml").write_text("[train]\nepochs = 0\n")
    capsys.readouterr()
    assert run("validate", "mine.toml", "--room", "balpoe") == 2
    assert "mine.toml: train.epochs = 0" in capsys.readouterr().err


def test_no_preset_at_all_is_not_a_success(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("validate", str(empty)) == 2


@pytest.mark.parametrize("dest", [None, "mine.toml", "a/b/mine.toml", "presets/balpoe/mine.toml"])
def test_a_copy_is_valid_as_it_is(
    tiny: Path, dest: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("copy", "tiny", *([dest] if dest else [])) == 0
    copy = Path(capsys.readouterr().out.strip())
    assert copy == Path(dest or "tiny.toml")
    assert run("validate", str(copy)) == 0
    assert from_toml(BalpoeSettings, copy) == from_toml(BalpoeSettings, tiny)
    assert run("copy", str(copy), "again.toml") == 0


def test_the_command_of_a_copy_names_the_copy() -> None:
    run("copy", "tiny", "my folder/a.toml")
    run("copy", "tiny", "presets/balpoe/b.toml")
    first = Path("my folder/a.toml").read_text()
    assert first.startswith("# command: moectl balpoe train --preset 'my folder/a.toml'\n")
    assert first.splitlines()[1:] == GOOD.splitlines()[1:]
    second = Path("presets/balpoe/b.toml").read_text()
    assert second.startswith("# command: moectl balpoe train --preset b\n")


def test_a_copy_replaces_nothing_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("precious")
    assert run("copy", "tiny", "mine.toml") == 2
    assert "--force" in capsys.readouterr().err
    assert Path("mine.toml").read_text() == "precious"
    assert run("copy", "tiny", "mine.toml", "--force") == 0
    assert "epochs = 3" in Path("mine.toml").read_text()


@pytest.mark.parametrize("dest", ["mine", "mine.yaml", "a b.toml", "/proc/none/mine.toml"])
def test_a_copy_must_become_a_usable_preset(dest: str) -> None:
    assert run("copy", "tiny", dest) == 2


def test_a_preset_of_no_known_system_says_how_to_mend_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("odd.toml").write_text("[train]\nepochs = 1\n")
    assert run("show", "odd.toml") == 2
    assert "balpoe" in capsys.readouterr().err


def test_schema_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema", "balpoe") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["properties"]) == set(BalpoeSettings.model_fields)
    epochs = document["$defs"]["BalpoeTrain"]["properties"]["epochs"]
    assert (epochs["minimum"], epochs["default"]) == (1, 200)
    assert run("schema", "nothing") == 2


def test_shipped_presets_are_valid(root: Path) -> None:
    problems = {path.name: presets.check(path) for path in (root / "presets").rglob("*.toml")}
    assert problems
    assert {name: lines for name, lines in problems.items() if lines} == {}
