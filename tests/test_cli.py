"""The command line as a user meets it: exit codes, standard output, messages."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl import cli
from moectl.engine.errors import Interrupted, RunFailed, UserError

TINY = (
    *("--dataset", "synthetic", "--cpu", "--threads", "1", "--precision", "no"),
    *("--experts", "2", "--tau-list", "0;2", "--set", "train.tensorboard=false"),
)

Outcome = tuple[int, str, str]
Start = Callable[..., subprocess.Popen[str]]
Finish = Callable[..., Outcome]


@pytest.fixture
def moectl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process; return exit code, stdout and stderr."""

    def call(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


# Options


def options_of(leaf: str) -> set[str]:
    return {name for parameter in cli.leaf(*leaf.split()).params for name in parameter.opts}


@pytest.mark.parametrize(
    ("leaf", "dead"),
    [
        ("balpoe import", "--resume --augment --cutout --mix --mixup-alpha --cutmix-alpha"),
        ("balpoe import", "--finetuning-start"),
        ("taskmoe merge", "--resume --epochs"),
        ("taskmoe analyze", "--num-samples --seed"),
        ("taskmoe predict", "--num-samples --seed"),
        ("taskmoe compare", "--num-samples"),
        ("csr convert", "--resume --hflip"),
        ("diffusion test-model", "--hub-name --data-dir --hflip --val-fraction --workers"),
        ("controller convert", "--preset --set --cpu --dry-run"),
        ("controller toy", "--precision"),
    ],
)
def test_no_command_takes_options_that_it_has_no_use_for(leaf: str, dead: str) -> None:
    assert options_of(leaf).isdisjoint(dead.split())


@pytest.mark.parametrize(
    ("leaf", "names"),
    [
        ("balpoe import", "--arch --tau-list --imbalance-ratio --out"),
        ("taskmoe merge", "--seed --width --out"),
        ("taskmoe compare", "--seed"),
        ("taskmoe train", "--resume --allow-pickle --trust-pickle"),
        ("csr train", "--resume --allow-pickle --trust-pickle"),
        ("csr atlas", "--run --checkpoint"),
        ("diffusion test-model", "--model-channels --data"),
        ("controller convert", "--json --quiet"),
        ("controller toy", "--seed --resume"),
        ("controller profile", "--seed --resume"),
    ],
)
def test_what_a_command_makes_use_of_is_an_option(leaf: str, names: str) -> None:
    assert options_of(leaf) >= set(names.split())


# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("lr = -1", "use more"), 2, "error: lr = -1\nhint: use more"),
        (RunFailed("broken"), 1, "error: broken"),
        (Interrupted("SIGTERM after update 3"), 75, "stopped: SIGTERM after update 3"),
        (KeyboardInterrupt(), 130, "stopped: Ctrl-C"),
        (ValueError("odd"), 1, "error: ValueError: odd"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "error: out of memory\nhint: a smaller --batch-size"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 80 bytes."),
            1,
            "error: out of memory (DefaultCPUAllocator: can't allocate memory: 80 bytes.)",
        ),
        (
            type("OutOfMemoryError", (RuntimeError,), {})(
                "CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has 3 KiB free. And so on."
            ),
            1,
            "error: out of memory (CUDA out of memory. Tried to allocate 20 MiB)",
        ),
    ],
)
def test_errors_become_exit_codes(
    moectl: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*words: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    found, out, err = moectl("anything")
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*words: object, **options: object) -> None:
        raise UserError("lr = -1")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main(["x", "--debug"])
    assert "Traceback" in capsys.readouterr().err


# Wrong use


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Usage: moectl"),
        ("balpo", "balpo"),
        ("balpoe", "Usage: moectl balpoe"),
        ("balpoe trian", "Did you mean 'train'"),
        ("balpoe train --lrr 1", "--lr"),
        ("balpoe train --lr fast", "--lr"),
        ("balpoe train --lr -1", "--lr = -1.0: input should be greater than 0"),
        ("balpoe train --lr nan", "--lr = nan"),
        ("balpoe train --epochs 0", "--epochs = 0"),
        ("balpoe train --dataset cats", "--dataset"),
        ("balpoe train --set optim.lrr=1", "did you mean optim.lr?"),
        ("balpoe train --set optim.lr=1 --lr 1", "set twice"),
        ("balpoe train --set optim.lr", "expected key=value"),
        ("balpoe train --preset none", "none: no such preset for balpoe"),
        ("balpoe train --preset digits_ir2", "did you mean digits_ir20?"),
        ("balpoe train --experts 4", "experts"),
        ("balpoe train --share-layer3", "model.share_layer3 needs model.share_layer2"),
        ("balpoe train --max-time 3d", "'3d' is not a duration"),
        ("balpoe train --name ../../x", "is not a usable name"),
        ("balpoe train --name a/b", "is not a usable name"),
        ("balpoe train --name CON", "is not a usable name"),
        (f"balpoe train --name {'n' * 300}", "is not a usable name"),
        (f"balpoe train --resume {'n' * 300}", "no such run"),
        (f"balpoe train --preset {'n' * 300}.toml", "no such preset file"),
        (f"balpoe eval --run {'n' * 300}", "no such run"),
        ("balpoe train --resume none", "none: no such run"),
        ("balpoe eval", "no finished run of balpoe"),
        ("balpoe train extra", "extra"),
        ("presets show none", "none: no such preset"),
        ("runs show none", "none: no such run"),
    ],
)
def test_wrong_use_is_explained_with_code_2(
    moectl: Callable[..., Outcome], isolated: Path, words: str, message: str
) -> None:
    code, out, err = moectl(*words.split())
    assert code == 2
    assert message in out + err if not words.strip() or words == "balpoe" else message in err
    assert "Traceback" not in err
    assert list(isolated.iterdir()) == [], "nothing was created"


def test_a_newline_in_a_name_is_refused(moectl: Callable[..., Outcome], isolated: Path) -> None:
    code, _, err = moectl("balpoe", "train", "--name", "a\nb")
    assert (code, list(isolated.iterdir())) == (2, [])
    assert "is not a usable name" in err


@pytest.mark.parametrize(
    ("option", "successor"),
    [
        ("--config x", "--preset NAME"),
        ("-c x", "--preset NAME"),
        ("--save-dir x", "--out DIR"),
        ("--save_dir x", "--out DIR"),
        ("--n_gpu 2", "torchrun"),
        ("--randaugm", "--augment"),
    ],
)
def test_dropped_options_name_their_successors(
    moectl: Callable[..., Outcome], option: str, successor: str
) -> None:
    code, out, err = moectl("balpoe", "train", *option.split())
    assert (code, out) == (2, "")
    assert "is not an option of moectl balpoe train" in err
    assert successor in err


def bomb(kind: str) -> bytes:
    return {
        "dots": b".".join([b"a"] * 16_000) + b" = 1",
        "brackets": b"x = " + b"[" * 30_000,
        "integer": b"x = " + b"9" * 5000,
        "huge": b"#" * 5_000_000,
        "nul": b"x = '\x00'",
        "twice": b"[optim]\nlr = 1\nlr = 2",
        "nan": b"[optim]\nlr = nan",
        "bytes": b"x = '\xff'",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["dots", "brackets", "integer", "huge", "nul", "twice", "nan", "bytes"]
)
def test_bombs_as_presets_are_refused_quickly(moectl: Callable[..., Outcome], kind: str) -> None:
    Path("bomb.toml").write_bytes(bomb(kind))
    before = time.process_time()
    code, out, err = moectl("balpoe", "train", "--preset", "bomb.toml", "--dry-run")
    assert (code, out) == (2, "")
    assert "bomb.toml" in err
    assert time.process_time() - before < 1


def test_a_wrong_variable_is_refused(
    moectl: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_BALPOE__OPTIM__LRR", "1")
    code, _, err = moectl("balpoe", "train", "--dry-run")
    assert code == 2
    assert "MOECTL_BALPOE__OPTIM__LRR" in err


def test_a_variable_that_sets_nothing_does_not_pass_in_silence(
    moectl: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_BALPOE__OPTIMM__LR", "1")
    err = moectl("balpoe", "train", "--dry-run", *TINY)[2]
    assert "MOECTL_BALPOE__OPTIMM__LR" in err


# Spelling and settings


def dry(moectl: Callable[..., Outcome], *words: str) -> dict[str, Any]:
    code, out, err = moectl("balpoe", "train", "--dry-run", "--json", *TINY, *words)
    assert code == 0, err
    return {key: entry["value"] for key, entry in json.loads(out)["settings"].items()}


def test_underscores_are_accepted(moectl: Callable[..., Outcome]) -> None:
    values = dry(moectl, "--batch_size", "64", "--imbalance_ratio=10", "--no_use_norm")
    assert values["train.batch_size"] == 64
    assert values["data.imbalance_ratio"] == 10
    assert values["model.use_norm"] is False


def test_short_and_alternative_spellings(moectl: Callable[..., Outcome]) -> None:
    values = dry(moectl, "--bs", "64", "--wd", "0.1", "-s", "3", "--combiner-type", "cutmix")
    assert values["train.batch_size"] == 64
    assert values["optim.weight_decay"] == 0.1
    assert values["train.seed"] == 3
    assert values["loss.mix"] == "cutmix"


def test_layers_and_their_names(
    moectl: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECTL_BALPOE__DATA__WORKERS", "3")
    words = "--preset digits_ir20 --dataset digits --lr 0.3 --set train.keep=4 --cpu -n --json"
    code, out, _ = moectl("balpoe", "train", *words.split())
    assert code == 0
    document = json.loads(out)
    origin = {key: entry["from"] for key, entry in document["settings"].items()}
    assert origin["optim.lr"] == "flag"
    assert origin["train.keep"] == "--set"
    assert origin["data.workers"] == "MOECTL_BALPOE__DATA__WORKERS"
    assert origin["data.imbalance_ratio"] == "digits_ir20.toml"
    assert origin["model.arch"] == "default"
    assert document["size"]["parameters"] > 100_000


def test_dry_run_makes_no_run(moectl: Callable[..., Outcome], isolated: Path) -> None:
    dry(moectl)
    assert list(isolated.iterdir()) == []


# Training, in real processes


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, start: Start, finish: Finish
) -> tuple[Path, Outcome]:
    """A folder in which a tiny training ran to its end."""
    folder = tmp_path_factory.mktemp("trained")
    words = ("balpoe", "train", *TINY, "--epochs", "1", "--name", "tiny")
    return folder, finish(start(*words, cwd=folder), 120)


def test_training_prints_its_folder_and_nothing_else(trained: tuple[Path, Outcome]) -> None:
    folder, (code, out, err) = trained
    assert code == 0, err
    assert len(out.splitlines()) == 1
    run = folder / out.strip()
    assert run.parent == folder / "runs" / "balpoe"
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert "epoch 1/1" in err
    for name in ("settings.toml", "metrics.csv", "log.txt", "summary.json", "report.md"):
        assert (run / name).is_file(), name
    for entry in record["weights"]:
        assert (run / entry["file"]).is_file()
        assert (run / f"{entry['file']}.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-size 64", "train.batch_size = 64 (the run has 128)"),
        ("--arch resnet50", "model.arch = 'resnet50'"),
        ("--dataset digits", "data.dataset = 'digits'"),
        ("--lr 0.3 --seed 9", "optim.lr = 0.3 (the run has 0.1), train.seed = 9"),
    ],
)
def test_resume_with_other_settings_is_refused(
    moectl: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    trained: tuple[Path, Outcome],
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(trained[0])
    code, out, err = moectl("balpoe", "train", "--resume", "latest", *words.split())
    assert (code, out) == (2, "")
    assert "cannot resume with other settings" in err
    assert message in err


def test_out_refuses_a_folder_that_is_not_empty(
    moectl: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, Outcome]
) -> None:
    monkeypatch.chdir(trained[0])
    run = trained[1][1].strip()
    code, out, err = moectl("balpoe", "train", *TINY, "--epochs", "1", "--out", run)
    assert (code, out) == (2, "")
    assert "exists and is not an empty folder" in err


class Payload:
    """Something that acts when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_code_in_an_imported_file_never_runs(
    moectl: Callable[..., Outcome], isolated: Path
) -> None:
    import torch

    torch.save({"state_dict": Payload(isolated / "ran")}, "evil.pth")
    words = "balpoe import evil.pth --dataset synthetic --cpu --set train.precision=no"
    code, out, err = moectl(*words.split())
    assert (code, out) == (2, "")
    assert "evil.pth: holds more than tensors and plain types" in err
    assert not (isolated / "ran").exists()


def test_interrupt_resume_interrupt_twice(start: Start, finish: Finish, tmp_path: Path) -> None:
    """Ctrl-C saves and can be resumed; a second one leaves at once."""
    words = ("balpoe", "train", *TINY, "--epochs", "40", "--name", "long")
    save = ("--set", "train.save_minutes=0", "--set", "train.log_every=1")

    program = start(*words, *save, cwd=tmp_path)
    run = _metrics_of(tmp_path)
    program.send_signal(signal.SIGINT)
    code, out, err = finish(program)
    assert (code, out) == (75, ""), err
    assert "--resume" in err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"

    rows = (run / "metrics.csv").read_text().count("\n")
    program = start(*words, *save, "--resume", "auto", cwd=tmp_path)
    _wait(lambda: (run / "metrics.csv").read_text().count("\n") > rows)
    program.send_signal(signal.SIGINT)
    program.send_signal(signal.SIGINT)
    before = time.monotonic()
    code, out, err = finish(program)
    assert time.monotonic() - before < 30  # at once, on a machine with ten programs for two cores
    # Two signals in a row may arrive as one.
    assert (code, out) in ((130, ""), (75, "")), err
    assert "Traceback" not in err

    from moectl.engine import checkpoint

    assert checkpoint.choose(run / "checkpoints", fall_back=False).name


def _metrics_of(folder: Path) -> Path:
    _wait(lambda: list(folder.glob("runs/balpoe/*/metrics.csv")))
    return next(folder.glob("runs/balpoe/*/metrics.csv")).parent


def _wait(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_version_is_printed_alone(moectl: Callable[..., Outcome]) -> None:
    from moectl import __version__

    assert moectl("--version") == (0, f"moectl {__version__}\n", "")


def test_root_help_lists_the_options_there_are(moectl: Callable[..., Outcome]) -> None:
    _, out, _ = moectl("--help")
    for option in ("--version", "--install-completion", "--help"):
        assert option in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("word", ["--version", "--help"])
def test_what_cannot_be_written_is_said_in_a_sentence(
    start: Start, tmp_path: Path, word: str
) -> None:
    with Path("/dev/full").open("w") as full:
        program = start(word, cwd=tmp_path, stdout=full)
        err = program.communicate()[1]
    assert program.returncode == 1
    text = err if isinstance(err, str) else err.decode()
    assert text == "error: output could not be written: No space left on device\n"
