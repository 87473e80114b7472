"""What a training of the mixture starts from: a merge, a file, or folders of specialists."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moectl.engine.artefact import Artefact
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, is_folder, read_json, write_json
from moectl.engine.references import exact, find_weights, finished_runs
from moectl.engine.run import Run
from moectl.engine.settings import dump, flatten
from moectl.taskmoe.data import split_of
from moectl.taskmoe.settings import TaskmoeSettings
from moectl.taskmoe.stages import MERGED, SUBMODELS, announce, folder_name, merge
from moectl.taskmoe.weights import read_mixture

log = logging.getLogger(__name__)

_SIDECAR = ("file", "bytes", "sha256", "run", "epoch")


def begin(
    run: Run[TaskmoeSettings], merged: str, submodels: Path | None, checkpoint: Path | None
) -> Artefact | None:
    """Return the weights that a training starts from, and keep them in its run folder.

    Args:
        run: the run; one that goes on starts as it did.
        merged: the run of a merge, or `none` for random weights.
        submodels: folder of specialists to merge first.
        checkpoint: weights of a mixture to go on from.

    Raises:
        UserError: if several are given, none is found, or one is of another task or form.
    """
    options = (
        ("--merged", merged),
        ("--submodels-dir", submodels),
        ("--load-model-path", checkpoint),
    )
    asked = {name: str(value) for name, value in options if value}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other")
    if run.resuming and "start" in run.record:
        began = run.record["start"]
        if asked not in ({}, began):
            words = " ".join(f"{name} {value}" for name, value in began.items()) or "none of them"
            raise UserError(f"{run.folder}: began with {words}, not with {' '.join(asked)}")
        asked = began
    run.note(start=asked)
    own = run.folder / MERGED
    if run.resuming and is_file(own):
        return read_mixture(own, run.settings)
    if asked.get("--merged") == "none":
        return None
    folder = Path(asked["--submodels-dir"]) if "--submodels-dir" in asked else None
    path = None if folder else _find_start(run.settings, asked)
    if path is None:
        merge(run.settings, run, [], folder or SUBMODELS, best=False)
        return read_mixture(own, run.settings)
    return _kept(run, path)


def _kept(run: Run[TaskmoeSettings], path: Path) -> Artefact:
    """Copy the weights to start from, and the report on them, into a run."""
    start = read_mixture(path, run.settings)
    _check_form(start, run.settings)
    run.note(parents=[{"path": str(path.resolve()), "sha256": start.sha256}])
    facts = {name: value for name, value in start.facts.items() if name not in _SIDECAR}
    payload = {"model_state_dict": start.payload["model_state_dict"], **facts}
    run.save_weights(MERGED, {**payload, "epoch": 0, "format_version": 1}, facts, epoch=0)
    report = path.parent / "merge_report.json"
    if path.name == MERGED and is_file(report):
        document = read_json(report)
        if run.is_main:
            write_json(run.folder / report.name, document)
        announce(document)
    return start


def _find_start(settings: TaskmoeSettings, asked: Mapping[str, str]) -> Path | None:
    """Return the weights to start from; None if the original's folder of specialists is there."""
    if "--load-model-path" in asked:
        return Path(asked["--load-model-path"])
    if "--merged" in asked:
        return find_weights(exact(asked["--merged"]), "taskmoe")
    task = settings.data.task
    merges = finished_runs("taskmoe", "merge")
    found = [find_weights(f"{folder}@best", "taskmoe") for folder, _ in merges]
    facts = {path: read_json(path.with_name(f"{path.name}.json")) for path in found}
    own = [path for path in found if facts[path]["task"] == task]
    if own:
        same = [path for path in own if not _differences(facts[path], settings)]
        return same[0] if same else own[0]  # which says what differs
    if is_folder(SUBMODELS / folder_name(settings)):
        return None
    raise UserError(
        f"task {task}: no finished merge",
        "moectl taskmoe merge makes one; --submodels-dir DIR merges weights files, and"
        " --merged none starts from random weights",
    )


def _check_form(start: Artefact, settings: TaskmoeSettings) -> None:
    """Refuse weights of another task or network, or merged in another way than the settings say."""
    for name, (theirs, ours) in _differences(start.facts, settings).items():
        raise UserError(
            f"{start.path}: has {name} = {theirs}, the settings say {ours}",
            f"--set {name}={theirs}",
        )
    if start.facts.get("split") not in (None, split_of(settings.data)):
        log.warning("%s: was made with another choice of validation images", start.path)


def _differences(facts: Mapping[str, Any], settings: TaskmoeSettings) -> dict[str, tuple[Any, Any]]:
    """Return the settings that contradict what weights say of themselves: theirs and ours."""
    known = {"data.task": facts["task"], "data.label_map": facts["label_map"]}
    form = ("num_experts", "width", "combine", "gating_feature_dim", "shared_until")
    arguments = facts["arguments"]
    known |= {f"model.{name}": arguments[name] for name in form if name in arguments}
    known |= {f"merge.{name}": value for name, value in facts.get("merge", {}).items()}
    ours = flatten(dump(settings))
    return {key: (value, ours[key]) for key, value in known.items() if value != ours[key]}
