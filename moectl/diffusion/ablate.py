"""Training of a network and its variants on equals, and their comparison."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moectl.diffusion import profile
from moectl.diffusion.data import Data, load
from moectl.diffusion.eval import evaluate, write_evaluation
from moectl.diffusion.inference import Opened, open_weights
from moectl.diffusion.pictures import write_strip
from moectl.diffusion.reference import Reference, check_reference, reference_of
from moectl.diffusion.report import report
from moectl.diffusion.sample import check
from moectl.diffusion.settings import DiffusionSettings
from moectl.diffusion.train import train
from moectl.diffusion.variants import Changes, changed
from moectl.engine.errors import Interrupted, RunFailed, UserError
from moectl.engine.files import csv_text, is_file, write_json, write_text
from moectl.engine.launch import agree
from moectl.engine.run import Run, create, read_record, reopen
from moectl.engine.tracking import loads_or_none

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

_RESULT = "result.json"


def settings_of(settings: DiffusionSettings, own: Changes) -> DiffusionSettings:
    """Return the settings that a variant is trained with.

    Raises:
        UserError: if they do not go together.
    """
    train = settings.train.model_copy(update={"max_time": ""})  # the limit is for all together
    return changed(settings.model_copy(update={"train": train}), own)


def ablate(run: Run[DiffusionSettings], wanted: dict[str, Changes]) -> dict[str, Any]:
    """Train and measure each variant that is not done yet, and compare them all.

    All begin with the same seed: images, order, noise and steps are the same for each.

    Args:
        run: the folder of the comparison; each variant is a run of its own below it.
        wanted: the variants; those that a resumed comparison began with must be the same.

    Raises:
        UserError: if they are others, or one of them cannot be.
    """
    settings = {name: settings_of(run.settings, own) for name, own in wanted.items()}
    wanted = {name: wanted[name] for name in distinct(settings)} if wanted else {}
    kept = run.record.get("variants")
    if kept is not None and wanted not in ({}, kept):
        raise UserError(
            f"{run.folder}: compares {', '.join(kept)}, not {', '.join(wanted)}",
            "start a new comparison for those",
        )
    wanted = kept or wanted
    settings = {name: settings_of(run.settings, own) for name, own in wanted.items()}
    data = load(run.settings.data)
    _check(run.settings, data)
    reference = cache(lambda: _reference(run, data))
    run.note(variants=wanted)
    rows = [_row(run, name, settings[name], own, reference) for name, own in wanted.items()]
    document = {"folder": str(run.folder), "variants": rows}
    if run.is_main:
        write_json(run.folder / "ablation.json", document)
        write_text(run.folder / "ablation.csv", csv_text(rows))
        report(run.folder)
    return document


def distinct(settings: Mapping[str, DiffusionSettings]) -> list[str]:
    """Return the variants whose networks are not those of earlier ones.

    Raises:
        UserError: if none is left but the first.
    """
    found: dict[str, str] = {}
    for name, one in settings.items():
        unused = {"num_experts", "k_active", "dispatch"} if not one.model.moe else set()
        network = one.model.model_dump_json(exclude=unused)
        if network in found:
            log.warning("%s is the same network as %s: left out", name, found[network])
        else:
            found[network] = name
    if len(found) == 1:
        raise UserError("nothing to compare with: every variant is the same network")
    return list(found.values())


def _check(settings: DiffusionSettings, data: Data) -> None:
    """Refuse what could not be measured, before anything is trained.

    Raises:
        UserError: saying what.
    """
    if settings.eval.features != "none":
        check(settings.sample, settings.process.steps, settings.loss.p_uncond > 0)
    check_reference(settings.eval, data)


def _reference(run: Run[DiffusionSettings], data: Data) -> Reference | None:
    wanted, batch = run.settings.eval, run.settings.sample.batch_size
    if wanted.features == "none":
        return None
    return reference_of(wanted, data, run.accelerator, batch)


def _row(
    run: Run[DiffusionSettings],
    name: str,
    settings: DiffusionSettings,
    own: Changes,
    reference: Callable[[], Reference | None],
) -> dict[str, Any]:
    """Return what is known of a variant, after training and measuring it if need be."""
    folder = run.folder / "variants" / name
    path = folder / _RESULT
    done = agree(run.accelerator, lambda: loads_or_none(path))
    if isinstance(done, dict):
        log.info("%s: done already", name)
        return done
    try:
        _train(run, name, folder, settings)
        found = {"name": name, "changes": own, **_measured(run, folder, settings, reference())}
    except (RunFailed, torch.OutOfMemoryError) as error:
        if run.accelerator.num_processes > 1 and not isinstance(error, RunFailed):
            raise  # the others know nothing of it and wait
        log.warning("%s failed: %s", name, error)
        return {"name": name, "changes": own, "failed": str(error)}
    except Interrupted as error:
        raise Interrupted(f"{name}: {error}", f"--resume {run.folder} goes on from here") from None
    if run.is_main:
        write_json(path, found)
    run.accelerator.wait_for_everyone()
    return found


def _train(
    run: Run[DiffusionSettings], name: str, folder: Path, settings: DiffusionSettings
) -> None:
    """Train a variant in a run of its own, or go on with it."""
    accelerator = run.accelerator
    status = agree(accelerator, lambda: _status(folder))
    if status == "finished":
        return
    if status:
        own = reopen(folder, settings, accelerator, auto=run.resuming != "named")
    else:
        own = create(
            settings, accelerator, room="diffusion", command="train", name=name, out=folder,
            origin={},
        )  # fmt: skip
        # The images of the first variant, or the training refuses.
        own.note(parents=[{"path": str(run.folder.resolve())}], data=run.record.get("data"))
    own.stop.deadline = run.stop.deadline
    try:
        with own, _fresh_scaler(accelerator):
            train(settings, own)
    finally:
        accelerator.free_memory()
        run.stop.reason = run.stop.reason or own.stop.reason  # asked too late for it to hear
    run.note(data=own.record["data"])


@contextmanager
def _fresh_scaler(accelerator: "Accelerator") -> Iterator[None]:
    """Give back the loss scaler of fp16 as it was: each training begins with the same."""
    state = accelerator.scaler.state_dict() if accelerator.scaler else {}
    yield
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state)


def _status(folder: Path) -> str:
    """Return the status of a run; empty, and nothing is left of it, if it hardly began."""
    if is_file(folder / "run.json"):
        return str(read_record(folder)["status"])
    if folder.exists():
        shutil.rmtree(folder)
    return ""


def _measured(
    run: Run[DiffusionSettings],
    folder: Path,
    settings: DiffusionSettings,
    reference: Reference | None,
) -> dict[str, Any]:
    """Return what a trained variant costs and what it is worth."""
    if run.stop:
        raise Interrupted(f"{run.stop.reason} before it was measured")
    record = read_record(folder)
    opened = open_weights(folder / record["weights"][-1]["file"], settings, run.accelerator)
    document, images = evaluate(opened, reference)
    if run.is_main:
        write_evaluation(folder / "evals" / opened.tag, document, images)
        if images is not None:
            write_strip(folder / "strip.png", images)
        report(folder)
    return {**_cost(opened), **_worth(document), "wall_seconds": record["wall_seconds"]}


def _cost(opened: Opened) -> dict[str, Any]:
    total, used = profile.parameters(opened.model)
    batch = max(1, opened.settings.train.batch_size // opened.settings.train.accumulate)
    with opened.accelerator.autocast():
        times = profile.times(opened.model, opened.image_size, batch)
    opened.model.eval()
    return {
        "parameters": total,
        "parameters_used": used,
        "macs": profile.macs(opened.model, opened.image_size),
        "step_ms": round(times.step_ms, 3),
        "images_per_second": round(1000 * batch / times.step_ms, 2),
    }


def _worth(document: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of an evaluation that are compared."""
    found = {"loss": document["loss"], "dead_experts": document.get("dead_experts")}
    if "distances" in document:
        best = document["distances"][0]
        found |= {
            "distance": document["distance"],
            "frechet": best["frechet"],
            "kid": best["kid"],
            "precision": best["precision"],
            "recall": best["recall"],
            "sample_accuracy": document.get("sample_accuracy"),
        }
    return found
