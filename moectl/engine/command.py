"""Typer commands made from a settings class: flagged fields and the common options."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.engine import console, presets
from moectl.engine.errors import UserError
from moectl.engine.files import is_file
from moectl.engine.options import COMMON, common_options, field_option, python_name, shown
from moectl.engine.settings import (
    RUN,
    Settings,
    dump,
    fields,
    flag_of,
    flatten,
    free,
    from_toml,
    resolve,
    room_of,
    unknown_variables,
)


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    room: str
    command: str
    settings: Settings
    origin: dict[str, str]
    name: str
    cpu: bool
    out: Path | None
    resume: str
    folder: Path | None
    """The run to resume, or to read."""
    run: str
    """The reference to the run to read, as given."""

    def names(self, key: str) -> bool:
        """Whether this very command set a setting, not the run that it reads."""
        return self.origin.get(key, "default") not in ("default", RUN)


def command(  # noqa: PLR0913 - what a command is made of
    cls: type[Settings],
    sections: Sequence[str],
    *,
    train: bool | None,
    size: Callable[[Any], dict[str, Any]] | None = None,
    dropped: dict[str, str] | None = None,
    alias: str = "",
    reads: Sequence[str] = (),
    standalone: Sequence[str] = (),
    without: Sequence[str] = (),
    resumes: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Turn `function(request, …)` into a Typer command with options for the flagged fields.

    Args:
        cls: settings class of the system; its `env_prefix` names the system.
        sections: the tables whose flagged fields become options; or single fields, as `train.seed`.
        train: whether the command makes a run (`--name --out --resume`), or reads one (`--run`);
            None if neither.
        size: returns the size of the job for `--dry-run`.
        dropped: options of the original programs that are gone, with what replaced them.
        alias: another name of `--run` or `--name`, as an original program has it.
        reads: commands whose runs `latest` may be; any if there are none.
        standalone: parameters of the function that may name a file to read in place of a run, or
            do without a run if they have a value, as `policy=lut`.
        without: fields of these tables that do nothing here.
        resumes: whether the run that is made can be gone on with (`--resume`).
    """
    room = room_of(cls)
    flags = {
        key: info
        for key, info in fields(cls).items()
        if {key, key.split(".")[0]} & set(sections) and key not in without and flag_of(info)
    }

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        own = dict(list(inspect.signature(function).parameters.items())[1:])

        @functools.wraps(function)
        def run_command(**values: Any) -> None:
            common = {name: values[name] for name in COMMON & set(values)}
            values = {name: values[name] for name in values if name in own or name not in common}
            common["run"] = _reference(common, values, standalone) if train is False else ""
            given = {key: values.pop(python_name(key)) for key in flags}
            given = {key: value for key, value in given.items() if value is not None}
            console.setup(quiet=common["quiet"], as_json=common["json"])
            _warn(cls)
            verb = function.__name__.strip("_")
            request = _request(cls, room, verb, given, common, reads)
            if common["dry_run"]:
                _dry_run(request, size)
            else:
                _prepare(request)
                function(request, **values)

        of_run = train is False
        options = [field_option(key, info, of_run=of_run) for key, info in flags.items()]
        parameters = [*own.values(), *options, *common_options(room, train, alias, resumes)]
        run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run_command.dropped = dropped or {}  # type: ignore[attr-defined]
        return run_command

    return decorate


def _reference(
    common: Mapping[str, Any], values: Mapping[str, Any], standalone: Sequence[str]
) -> str:
    """Return the run to read: the newest, unless there is something to read instead."""
    instead = any(_stands_alone(values, entry) for entry in standalone)
    return common.get("run") or ("" if instead else "latest")


def _stands_alone(values: Mapping[str, Any], entry: str) -> bool:
    name, _, word = entry.partition("=")
    value = values.get(name) or ""
    if word:
        return bool(value == word)
    return isinstance(value, Path) or (bool(value) and is_file(Path(value)))


def _dry_run(request: Request, size: Callable[[Any], dict[str, Any]] | None) -> None:
    """Show the settings and the size of the job; without the data they are still worth showing."""
    try:
        found = size(request.settings) if size else {}
    except UserError as error:
        _show(request, {"size unknown": error.message})
        raise
    _show(request, found)


def _warn(cls: type[Settings]) -> None:
    prefix = str(cls.model_config.get("env_prefix", "")).upper()
    for name in unknown_variables([cls]):
        if name.upper().startswith(prefix):
            console.log.warning("%s sets nothing: no such table of settings", name)


def _request(
    cls: type[Settings],
    room: str,
    verb: str,
    given: dict[str, Any],
    common: dict[str, Any],
    reads: Sequence[str],
) -> Request:
    files = [presets.find(room, name).path for name in common["preset"]]
    default_name = "+".join(path.stem for path in files) or verb
    name = presets.check_name(common.get("name") or default_name.replace("+", "-")[:60], "run name")
    resume = common.get("resume") or ""
    folder = _resumed(room, name, verb, resume)
    if resume and common["out"]:
        raise UserError(
            "--resume and --out exclude each other", "--resume REF already names the folder"
        )
    if common["run"]:
        folder = _read(room, common["run"], reads)
    stored = folder / "settings.toml" if folder else None
    settings, origin = resolve(cls, given, common["set"], files, stored)
    if folder and resume:
        _refuse_other_command(folder, verb)
        _refuse_changes(cls, folder, settings, verb)
        if origin.get("train.max_time") == RUN:
            settings = _without_limit(settings)
    return Request(
        room=room,
        command=verb,
        settings=settings,
        origin=origin,
        name=name,
        cpu=common["cpu"],
        out=common.get("out"),
        resume=resume,
        folder=folder,
        run=common["run"],
    )


def _read(room: str, reference: str, reads: Sequence[str]) -> Path:
    from moectl.engine.references import find_run, split_reference
    from moectl.engine.run import read_record

    path = Path(reference)
    if is_file(path):
        if not is_file(path.parent / "settings.toml"):
            raise UserError(
                f"{path}: lies outside a run folder",
                f"moectl {room} --help lists what makes a run of it",
            )
        return find_run(str(path.parent), room)
    folder = find_run(split_reference(reference)[0], room, "finished", reads)
    made_by = read_record(folder).get("command", "")
    if reads and made_by not in reads:
        raise UserError(f"{folder}: made by {made_by}, expected a run of {' or '.join(reads)}")
    return folder


def _resumed(room: str, name: str, verb: str, resume: str) -> Path | None:
    from moectl.engine import references

    if resume == "auto":
        return references.newest_unfinished(room, name, verb)
    return references.find_run(resume, room, commands=(verb,)) if resume else None


def _refuse_changes(cls: type[Settings], folder: Path, settings: Settings, verb: str) -> None:
    """A resumed run keeps its settings, but for those that cannot change its result."""
    old, new = flatten(dump(from_toml(cls, folder / "settings.toml"))), flatten(dump(settings))
    changed = [key for key in new if new[key] != old.get(key)]
    marks = free(cls)
    refused = [key for key in changed if key not in marks]
    cosine = new.get("schedule.name") == "cosine" and not new.get("schedule.t_max")
    tied = cosine or settings.ties_epochs(verb)  # a curve over all epochs would be another one
    growing = [key for key in changed if key in marks and marks[key].grows]
    refused += [key for key in growing if tied or new[key] < old[key]]
    if refused:
        listed = ", ".join(
            f"{key} = {new[key]!r} (the run has {old.get(key)!r})" for key in refused
        )
        raise UserError(
            f"{folder}: cannot resume with other settings: {listed}", "start a new run for that"
        )


def _refuse_other_command(folder: Path, verb: str) -> None:
    from moectl.engine.run import read_record

    made_by = read_record(folder).get("command", verb)
    if made_by != verb:
        raise UserError(f"{folder}: made by {made_by}, so {verb} cannot go on with it")


def _without_limit(settings: Any) -> Any:
    """Drop the time limit of an earlier sitting: it was meant for that one."""
    train = settings.train.model_copy(update={"max_time": ""})
    return settings.model_copy(update={"train": train})


def _prepare(request: Request) -> None:
    """Set what must be set before torch is imported."""
    from moectl.engine.launch import choose_threads
    from moectl.engine.run import read_record

    train = getattr(request.settings, "train", None)
    threads = train.threads if train else 0
    if request.folder and not threads:  # the last digits depend on the threads: keep them
        threads = int(read_record(request.folder).get("threads", 0))
    choose_threads(threads)


def _show(request: Request, size: dict[str, Any]) -> None:
    """Print every setting with the place it came from, and the size of the job."""
    values = flatten(dump(request.settings))
    rows = [
        (key, shown(value) or "", request.origin.get(key, "default"))
        for key, value in values.items()
    ]
    rows += [(f"({name})", value, "computed") for name, value in size.items()]
    document = {
        "settings": {
            key: {"value": value, "from": request.origin.get(key, "default")}
            for key, value in values.items()
        },
        "size": size,
    }
    console.result(document, console.table(("setting", "value", "from"), rows))


def open_run(request: Request) -> Any:
    """Create the run that a training command asked for, or reopen the one it resumes."""
    from moectl.engine import run
    from moectl.engine.launch import build_accelerator

    settings: Any = request.settings
    folder: Path | None = request.folder
    precision = str(run.read_record(folder)["precision"]) if folder else ""
    accelerator = build_accelerator(settings.train, request.cpu, precision)
    if folder:
        return run.reopen(folder, settings, accelerator, auto=request.resume == "auto")
    return run.create(
        settings, accelerator, room=request.room, command=request.command,
        name=request.name, out=request.out, origin=request.origin,
    )  # fmt: skip


def show_run(run: Any, **more: Any) -> None:
    """Print the folder of a run that is done; as JSON its record, and more on top of that."""
    document = {**run.record, **more, "folder": str(run.folder)}
    console.result(document, str(run.folder))
