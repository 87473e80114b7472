"""The table of contents of `moectl`, and how errors become exit codes."""

import codecs
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

CONTENTS: dict[str, tuple[str, dict[str, str]]] = {
    "balpoe": (
        "Long-tailed classification with calibrated experts.",
        {
            "train": "Train the experts.",
            "plugin": "Fit the rule that says when to reject.",
            "eval": "Measure accuracy, calibration and rejection of a trained run.",
            "reject": "Classify new items or abstain, by a fitted rule.",
            "import": "Bring a public .pth of the original code into a run folder.",
        },
    ),
    "taskmoe": (
        "Specialist classifiers merged into one gated mixture.",
        {
            "data": "Write the data files of task A or B, or check those of any task.",
            "specialist": "Train one of the specialists.",
            "merge": "Merge the specialists into one gated mixture.",
            "train": "Train the mixture.",
            "eval": "Measure a trained mixture on the test images.",
            "analyze": "Show what every expert and the gates do.",
            "plot": "Show what every expert and the gates do.",
            "compare": "Compare the mixture with routing, merging and training baselines.",
            "predict": "Classify images: class, probability and gates of each.",
        },
    ),
    "csr": (
        "Concepts on medical images, prototypes of each, and a verdict that adds up.",
        {
            "train": "Train concepts, prototypes and the verdict.",
            "eval": "Measure concepts, verdict and where the network looks.",
            "explain": "Say why: concepts, exemplars and what each adds to the verdict.",
            "infer": "Say why: concepts, exemplars and what each adds to the verdict.",
            "intervene": "Correct concepts or places, and see what becomes of the verdict.",
            "atlas": "Show what each prototype looks like, for curation.",
            "baselines": "Train a linear head and a concept bottleneck on the same backbone.",
            "preprocess": "Turn a folder of images into small PNG files.",
            "check-data": "Check tables, images and boxes before training.",
            "convert": "Bring a .pth of the original code into a run folder.",
        },
    ),
    "controller": (
        "A policy that answers about images within a latency budget.",
        {
            "toy": "Teach a small network to answer, so that plans have something to trade.",
            "profile": "Measure blocks, plans and latency of a network.",
            "grpo": "Train the controller on answers of a frozen network.",
            "eval": "Measure a controller beside fixed plans, chance and the lookup table.",
            "infer": "Answer a question within a budget.",
            "convert": "Bring a checkpoint of MolmoE into a folder of safetensors.",
        },
    ),
    "diffusion": (
        "Images from noise by convolutional experts and bands of frequency.",
        {
            "train": "Train the network that predicts noise.",
            "sample": "Make images.",
            "eval": "Measure samples, loss and the use of the experts.",
            "ablate": "Train variants of the network on equals, and compare them.",
            "test-model": "Check that the network and its variants compute, and what they cost.",
        },
    ),
    "presets": (
        "Ready-made settings.",
        {
            "list": "List the presets.",
            "show": "Print a preset with every setting explained.",
            "validate": "Check preset files.",
            "copy": "Copy a preset to a file of your own.",
            "schema": "Print the JSON schema of a system's settings.",
        },
    ),
    "runs": (
        "What was run, and what came out.",
        {
            "list": "List the runs.",
            "show": "Print one run.",
            "compare": "Compare the settings and scores of runs.",
            "report": "Draw the plots and the report of a run again.",
            "export": "Write the weights of a run as safetensors.",
        },
    ),
    "sweep": ("Train every cell of a grid with every seed, and compare them.", {}),
    "doctor": ("Check this machine and this installation.", {}),
}
_TOOLS = ("presets", "runs", "sweep", "doctor")


def leaf(room: str, name: str) -> Any:
    """Import the one module that has the command and build it."""
    path = f"moectl.tools.{room}" if room in _TOOLS else f"moectl.{room}.cli"
    module = importlib.import_module(path)
    plain = name.replace("-", "_")
    function = getattr(module, plain, None) or getattr(module, f"{plain}_")
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(name)(function)
    return typer.main.get_command(app)


class _Contents(TyperGroup):
    """A group that knows its commands from the table and imports one only when it runs."""

    def _lines(self) -> dict[str, str]:
        raise NotImplementedError

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(self._lines())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        names: Any = dict.fromkeys(self._lines())  # the base class suggests from these
        self.commands = names
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Two plain columns: the rich listing would double the time to show it."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl(list(self._lines().items()))
        records = (parameter.get_help_record(ctx) for parameter in self.get_params(ctx))
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])


class _Room(_Contents):
    def _lines(self) -> dict[str, str]:
        return CONTENTS[self.name or ""][1]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        lines = self._lines()
        if cmd_name not in lines:
            return None
        return leaf(self.name or "", cmd_name)


class _Root(_Contents):
    def _lines(self) -> dict[str, str]:
        return {name: line for name, (line, _) in CONTENTS.items()}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in CONTENTS:
            return None
        line, commands = CONTENTS[cmd_name]
        if not commands:
            return leaf(cmd_name, cmd_name)
        return _Room(name=cmd_name, help=line, no_args_is_help=True, short_help=line)


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def _version(asked: bool) -> None:
    if asked:
        from moectl import __version__

        sys.stdout.write(f"moectl {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Train, resume, measure and compare mixture-of-experts systems."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 usage, 75 resumable, 130 second Ctrl-C."""
    from moectl.engine.launch import leave, offline

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    code = 0
    if offline():  # else the hub's library asks for lists of its own, whatever it is told to fetch
        os.environ["HF_HUB_OFFLINE"] = "1"
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    _take_any_character()
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        code = 1
    except OSError as error:  # what no command writes itself, as --version
        _say(f"output could not be written: {error.strerror or error}")
        code = 1
    if code:
        _drop_stdout()
    leave(code)


def _take_any_character() -> None:
    """Let no result fail on a locale: a table has dashes, a folder may have any name."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    if codecs.lookup(sys.stdout.encoding).name in ("ascii", "utf-8"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    else:
        sys.stdout.reconfigure(errors="replace")


def _drop_stdout() -> None:
    """Keep the interpreter from failing once more on what it could not write."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    from moectl.engine.errors import Interrupted, RunFailed, UserError

    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        return _call(arguments, debug)
    except UserError as error:
        _say(error.message, error.hint)
        code = 2
    except RunFailed as error:
        _say(str(error))
        code = 1
    except Interrupted as error:
        _say(str(error), error.hint, "stopped")
        code = 75
    except (KeyboardInterrupt, typer.Abort):
        _say("Ctrl-C", label="stopped")
        code = 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own complaint
            return _usage(error)
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        _say(*_unexpected(error))
        code = 1
    return code


def _unexpected(error: Exception) -> tuple[str, str]:
    """Return the sentence and the hint for an error that nobody foresaw."""
    kind, text = type(error).__name__, str(error)
    if kind in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in text:
        reason = ". ".join(text.partition("\n")[0].split(". ")[:2])  # not the state of the device
        less = "a smaller --batch-size needs less; --set train.accumulate=2 keeps the update"
        return f"out of memory ({reason})" if reason else "out of memory", less
    return f"{kind}: {text}", "--debug shows where; a run's log.txt has it too"


def _call(arguments: list[str], debug: bool) -> int:
    try:
        return int(app(arguments, prog_name="moectl", standalone_mode=False) or 0)
    except BaseException:
        if debug:
            import traceback

            traceback.print_exc()
        raise


def _usage(error: Any) -> int:
    """Explain a wrong command line; a dropped option of an original program names its successor."""
    callback = getattr(getattr(error.ctx, "command", None), "callback", None)
    successor = getattr(callback, "dropped", {}).get(getattr(error, "option_name", None))
    where = error.ctx.command_path if error.ctx else "moectl"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    elif successor:
        _say(f"{error.option_name} is not an option of {where}: {successor}")
    else:
        _say(error.format_message(), f"{where} --help")
    return int(error.exit_code)


def _say(message: str, hint: str = "", label: str = "error") -> None:
    from moectl.engine import console

    console.error(message, hint, label)
