"""Commands made from settings: what reaches the function, and what is refused."""

import inspect
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from moectl.engine import console
from moectl.engine.command import Request, command, show_run
from moectl.engine.errors import UserError
from moectl.engine.settings import fields, free, to_toml
from moectl.tools.rooms import settings_class


@pytest.fixture
def received() -> dict[str, Any]:
    """The values of its own parameters that `toy apply` was called with."""
    return {}


@pytest.fixture
def run(toy: ModuleType, received: dict[str, Any]) -> Any:
    """Call `toy train|look|apply WORDS…` and return the request."""
    requests: list[Request] = []

    @command(toy.ToySettings, ("optim", "train"), train=True, size=lambda _: {"updates": 16})
    def train(request: Request, extra: str = "no") -> None:
        """Train."""
        requests.append(request)

    @command(toy.ToySettings, ("optim",), train=False)
    def look(request: Request) -> None:
        """Look."""
        requests.append(request)

    @command(
        toy.ToySettings,
        (),
        train=False,
        alias="--experts-dir",
        standalone=("file", "other", "other=none"),
    )
    def apply(
        request: Request,
        file: Annotated[Path | None, typer.Option("--file")] = None,
        other: Annotated[str, typer.Option("--other")] = "",
        name: Annotated[str | None, typer.Option("--name")] = None,
        out: Annotated[Path | None, typer.Option("--out")] = None,
    ) -> None:
        """Apply."""
        requests.append(request)
        received.update(file=file, other=other, name=name, out=out)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("train")(train)
    app.command("look")(look)
    app.command("apply")(apply)

    def call(*words: str) -> Any:
        requests.clear()
        result = CliRunner().invoke(app, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return requests[0] if requests else result

    return call


def stored(toy: ModuleType, name: str, status: str = "interrupted", **changes: Any) -> Path:
    folder = Path("runs/toy") / name
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text(to_toml(toy.settings(**changes)))
    record = {"name": name.rpartition("-")[0], "status": status, "started": name, "room": "toy"}
    record |= {
        "command": "train",
        "threads": 1,
        "precision": "no",
        "checkpoint": {"latest": "update-00000001"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_flags_reach_the_settings_with_their_origin(run: Any) -> None:
    request = run("train", "--lr", "0.3", "--set", "train.keep=3", "-s", "5", "--extra", "yes")
    assert request.settings.optim.lr == 0.3
    assert (request.settings.train.keep, request.settings.train.seed) == (3, 5)
    assert request.settings.optim.momentum == 0.9, "the default of the room, not of the section"
    assert request.origin["optim.lr"] == "flag"
    assert request.origin["train.keep"] == "--set"
    assert (request.room, request.command, request.name) == ("toy", "train", "train")


def test_switches_go_both_ways(run: Any) -> None:
    assert run("train", "--deterministic").settings.train.deterministic is True
    request = run("train", "--no-deterministic")
    assert request.settings.train.deterministic is False
    assert request.origin["train.deterministic"] == "flag"


def test_presets_are_layered_and_name_the_run(run: Any) -> None:
    for name, text in (("a", "[optim]\nlr = 0.2"), ("b", "[optim]\nlr = 0.3\n[train]\nseed = 2")):
        path = Path(f"presets/toy/{name}.toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    request = run("train", "-p", "a", "--preset", "presets/toy/b.toml", "--seed", "3")
    assert (request.settings.optim.lr, request.settings.train.seed) == (0.3, 3)
    assert request.name == "a-b"
    assert request.origin["optim.lr"] == "b.toml"
    with pytest.raises(UserError, match="c: no such preset for toy"):
        run("train", "-p", "c")


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "CON", "n" * 300, "a\nb", "..", ""])
def test_run_names_that_are_not_file_names_are_refused(run: Any, name: str, isolated: Path) -> None:
    if name == "":
        assert run("train", "--name", name).name == "train"
        return
    with pytest.raises(UserError, match=r"run name .* is not a usable name"):
        run("train", "--name", name)
    assert list(isolated.iterdir()) == []


def test_dry_run_shows_every_setting_and_does_nothing(run: Any, toy: ModuleType) -> None:
    result = run("train", "--dry-run", "--json", "--lr", "0.3")
    document = json.loads(result.stdout)
    assert set(document["settings"]) == set(fields(toy.ToySettings))
    assert document["settings"]["optim.lr"] == {"value": 0.3, "from": "flag"}
    assert document["settings"]["optim.momentum"] == {"value": 0.9, "from": "default"}
    assert document["size"] == {"updates": 16}
    table = run("train", "-n").stdout
    assert all(key in table for key in fields(toy.ToySettings))


def test_a_dry_run_without_the_data_shows_the_settings_and_is_an_error(
    toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def size(_: Any) -> dict[str, Any]:
        raise UserError("data: no such folder")

    @command(toy.ToySettings, ("optim",), train=True, size=size)
    def train(request: Request) -> None:
        """Train."""

    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, ["--dry-run", "--json"])
    assert isinstance(result.exception, UserError)
    document = json.loads(result.stdout)
    assert document["settings"]["optim.lr"]["value"] == 0.05
    assert document["size"] == {"size unknown": "data: no such folder"}


def options_of(function: Any) -> dict[str, Any]:
    return {
        name: get_args(parameter.annotation)[-1]
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_a_single_field_may_be_an_option(toy: ModuleType) -> None:
    @command(toy.ToySettings, ("optim", "train.seed"), train=True, resumes=False)
    def make(request: Request) -> None:
        """Make."""

    options = options_of(make)
    assert {name for name in options if name.startswith("train__")} == {"train__seed"}
    assert {"optim__lr", "name", "out"} <= set(options)
    assert "resume" not in options


def test_the_default_of_a_command_that_reads_a_run_is_the_runs(toy: ModuleType) -> None:
    def nothing(request: Request) -> None:
        """Nothing."""

    for train, default in ((False, "the run's."), (True, "0.1.")):
        options = options_of(command(toy.ToySettings, ("optim",), train=train)(nothing))
        assert options["optim__lr"].help.endswith(f"Default: {default}")


def test_resume_takes_the_settings_of_the_run(run: Any, toy: ModuleType) -> None:
    folder = stored(toy, "x-1", optim__lr=0.7)
    request = run("train", "--resume", "x-1")
    assert request.settings.optim.lr == 0.7
    assert request.folder == folder
    assert request.origin["optim.lr"] == "run"
    assert not request.names("optim.lr")
    assert run("train", "--resume", "x-1", "--lr", "0.7").names("optim.lr")


def test_a_file_named_as_a_runs_settings_counts_as_asked_for(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1", "finished", optim__lr=0.7)
    other = stored(toy, "y-1", "finished", optim__lr=0.6) / "settings.toml"
    request = run("look", "--run", "x-1", "-p", str(other))
    assert (request.settings.optim.lr, request.names("optim.lr")) == (0.6, True)


def test_resume_latest_is_the_newest_run_of_the_command(run: Any, toy: ModuleType) -> None:
    folder = stored(toy, "x-1")
    other = stored(toy, "y-2")
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "command": "import"}))
    assert run("train", "--resume", "latest").folder == folder


@pytest.mark.parametrize("reference", ["runs/other/q-1", "other/q-1", "other/latest"])
@pytest.mark.parametrize("words", [("train", "--resume"), ("look", "--run")])
def test_a_run_of_another_system_is_refused_in_one_line(
    run: Any, toy: ModuleType, words: tuple[str, str], reference: str
) -> None:
    folder = Path("runs/other/q-1")
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text("[nothing]\nx = 1\n")
    record = {"status": "finished", "started": "1", "room": "other", "command": "train"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "w.pth").touch()
    refused = r"^runs/other/q-1: a run of other, expected one of toy$"
    with pytest.raises(UserError, match=refused):
        run(*words, reference)
    with pytest.raises(UserError, match=refused):
        run("look", "--run", str(folder / "w.pth"))


def test_a_spoilt_settings_file_of_a_run_is_named(run: Any, toy: ModuleType) -> None:
    path = stored(toy, "x-1", "finished") / "settings.toml"
    path.write_text("[optim]\nlr = -1\n")
    with pytest.raises(UserError, match=r"^runs/toy/x-1/settings\.toml: optim\.lr = -1: "):
        run("look", "--run", "x-1")


def test_resume_refuses_other_settings_and_lists_them(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1")
    with pytest.raises(UserError) as refusal:
        run("train", "-r", "x-1", "--lr", "0.3", "--batch-size", "4", "--threads", "2")
    assert "optim.lr = 0.3 (the run has 0.05)" in refusal.value.message
    assert "train.batch_size = 4 (the run has 8)" in refusal.value.message
    assert "train.threads" not in refusal.value.message


def test_resume_may_not_stretch_a_cosine_over_all_epochs(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1", schedule__name="cosine")
    with pytest.raises(UserError, match=r"train\.epochs = 9"):
        run("train", "-r", "x-1", "--epochs", "9")
    stored(toy, "y-1", schedule__name="cosine", schedule__t_max=9)
    assert run("train", "-r", "y-1", "--epochs", "9").settings.train.epochs == 9


def test_a_time_limit_belongs_to_one_sitting(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1", train__max_time="3s")
    assert run("train", "-r", "x-1").settings.train.max_time == ""
    assert run("train", "-r", "x-1", "--max-time", "9s").settings.train.max_time == "9s"


def test_only_a_training_is_gone_on_with(run: Any, toy: ModuleType) -> None:
    folder = stored(toy, "x-1")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "command": "import"}))
    with pytest.raises(UserError, match="made by import"):
        run("train", "-r", "x-1")


def test_resume_auto_passes_over_what_failed_at_once(run: Any, toy: ModuleType) -> None:
    folder = stored(toy, "x-1", "failed")
    record = json.loads((folder / "run.json").read_text())
    del record["checkpoint"]
    (folder / "run.json").write_text(json.dumps(record))
    assert run("train", "--name", "x", "--resume", "auto").folder is None


def test_resume_may_add_epochs_but_not_take_them_away(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1")
    assert run("train", "-r", "x-1", "--epochs", "9").settings.train.epochs == 9
    with pytest.raises(UserError, match=r"train\.epochs = 3 \(the run has 4\)"):
        run("train", "-r", "x-1", "--epochs", "3")


def test_repeating_the_settings_of_the_run_is_no_change(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1", optim__lr=0.3)
    assert run("train", "-r", "x-1", "--lr", "0.3").settings.optim.lr == 0.3


def test_resume_auto_takes_the_newest_unfinished_run_of_the_name(run: Any, toy: ModuleType) -> None:
    assert run("train", "--name", "x", "--resume", "auto").folder is None
    stored(toy, "x-1")
    newest = stored(toy, "x-2", status="failed")
    stored(toy, "x-3", status="finished")
    stored(toy, "y-4")
    request = run("train", "--name", "x", "--resume", "auto")
    assert (request.folder, request.resume) == (newest, "auto")


def test_resume_and_out_exclude_each_other(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1")
    with pytest.raises(UserError, match="--resume and --out exclude each other"):
        run("train", "--resume", "x-1", "--out", "y")


def test_resume_of_nothing_is_refused(run: Any) -> None:
    for reference in ("none", "latest", "n" * 300, "toy/none", "../../x"):
        with pytest.raises(UserError, match=r"no such run|no train run of"):
            run("train", "--resume", reference)


def test_a_reading_command_takes_the_settings_of_the_run(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1", "finished", optim__lr=0.7)
    stored(toy, "x-2", "failed")
    request = run("look", "--run", "x-1@best", "--lr", "0.2")
    assert (request.settings.optim.lr, request.run) == (0.2, "x-1@best")
    assert request.folder == Path("runs/toy/x-1")
    assert run("look").folder == Path("runs/toy/x-1"), "latest finished"


@pytest.mark.parametrize("option", ["--run", "--experts-dir"])
def test_the_run_may_have_the_name_of_an_original_program(
    run: Any, toy: ModuleType, option: str
) -> None:
    folder = stored(toy, "x-1", "finished", optim__lr=0.7)
    request = run("apply", option, "x-1")
    assert (request.folder, request.run) == (folder, "x-1")
    assert request.settings.optim.lr == 0.7


def test_a_command_without_an_alias_has_no_such_option(run: Any, toy: ModuleType) -> None:
    stored(toy, "x-1", "finished")
    result = run("look", "--experts-dir", "x-1")
    assert result.exit_code == 2
    assert "--experts-dir" in result.output


@pytest.mark.parametrize(
    "words", [("--file", "none.npz"), ("--other", "there.json"), ("--other", "none")]
)
def test_input_that_stands_alone_needs_no_run(run: Any, toy: ModuleType, words: Any) -> None:
    Path("there.json").touch()
    request = run("apply", *words)
    assert (request.folder, request.run) == (None, "")
    stored(toy, "x-1", "finished", optim__lr=0.7)
    request = run("apply", *words)
    assert request.folder is None, "a finished run does not come into it"
    assert request.settings == toy.settings()


def test_input_that_stands_alone_may_have_a_run_all_the_same(run: Any, toy: ModuleType) -> None:
    folder = stored(toy, "x-1", "finished", optim__lr=0.7)
    request = run("apply", "--file", "x.npz", "--run", "x-1")
    assert (request.folder, request.settings.optim.lr) == (folder, 0.7)


def test_without_input_the_newest_finished_run_is_read(run: Any, toy: ModuleType) -> None:
    with pytest.raises(UserError, match="no finished run of toy"):
        run("apply")
    folder = stored(toy, "x-1", "finished")
    stored(toy, "x-2", "failed")
    for words in ((), ("--other", ""), ("--other", "name"), ("--other", "n" * 300)):
        assert run("apply", *words).folder == folder, "a text that names no file may be in the run"


def test_own_parameters_may_be_named_like_common_ones(run: Any, received: dict[str, Any]) -> None:
    request = run("apply", "--file", "x", "--name", "mine", "--out", "place")
    assert (request.name, request.out) == ("mine", Path("place"))
    assert received == {"file": Path("x"), "other": "", "name": "mine", "out": Path("place")}


def test_own_names_are_checked_like_those_of_runs(run: Any, toy: ModuleType) -> None:
    assert run("apply", "--file", "x").name == "apply"
    Path("own.toml").write_text("[optim]\nlr = 0.2\n")
    assert run("apply", "--file", "x", "-p", "own.toml").name == "own"
    with pytest.raises(UserError, match=r"run name .* is not a usable name"):
        run("apply", "--file", "x", "--name", "a/b")


def test_a_reading_command_has_neither_name_nor_folder_of_its_own(
    run: Any, toy: ModuleType
) -> None:
    stored(toy, "x-1", "finished")
    for option in ("--name", "--out", "--resume"):
        assert run("look", option, "x").exit_code == 2
    request = run("look")
    assert (request.name, request.out, request.resume) == ("look", None, "")


def test_how_often_files_are_written_may_change_on_resume() -> None:
    from moectl.balpoe.settings import BalpoeSettings
    from moectl.diffusion.settings import DiffusionSettings

    marks = free(DiffusionSettings)
    assert {"train.save_every", "train.sample_every", "train.log_every"} <= set(marks)
    assert "train.save_period" in free(BalpoeSettings)
    assert [key for key, mark in marks.items() if mark.grows] == ["train.epochs"]


@pytest.mark.parametrize("room", ["balpoe", "csr", "controller", "taskmoe", "diffusion"])
def test_what_shapes_a_result_may_not_change_on_resume(room: str) -> None:
    settings = settings_class(room)
    learnt = ("optim", "model", "loss", "schedule", "process", "policy", "reward", "grpo", "gate")
    marks = free(settings)
    assert set(marks) <= set(fields(settings))
    assert not [key for key in marks if key.startswith(learnt)]
    assert {"train.seed", "train.batch_size", "train.precision"}.isdisjoint(marks)
    assert {"train.epochs", "train.threads", "train.keep"} <= set(marks)


def test_the_wrapped_function_keeps_its_name_and_text(toy: ModuleType) -> None:
    @command(toy.ToySettings, ("optim",), train=True)
    def eval_(request: Request) -> None:
        """Measure."""

    assert (eval_.__name__, inspect.getdoc(eval_)) == ("eval_", "Measure.")


def test_a_run_that_is_done_is_its_folder_and_as_json_its_record(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = SimpleNamespace(folder=Path("runs/a/x"), record={"name": "x", "status": "finished"})
    console.setup()
    show_run(done)
    assert capsys.readouterr().out == "runs/a/x\n"
    console.setup(as_json=True)
    show_run(done, status="imported", scale=2)
    assert json.loads(capsys.readouterr().out) == {
        "name": "x", "status": "imported", "scale": 2, "folder": "runs/a/x",
    }  # fmt: skip
