"""The questions: those to train on, to validate on and to evaluate on, without a shared image."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moectl.controller import hub, local
from moectl.controller.samples import Pool, Role, Sample
from moectl.controller.synth import EACH, draw
from moectl.engine.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from moectl.controller.settings import DataSection

__all__ = ["Data", "Sample", "load", "load_test"]

log = logging.getLogger(__name__)

# Validation first, so that it does not depend on how much is trained on.
_ROLES: tuple[Role, ...] = ("val", "train", "test")


@dataclass(frozen=True)
class Data:
    """Questions to train on and to validate on."""

    train: list[Sample]
    val: list[Sample]
    facts: dict[str, Any]
    """Plain values: dataset (names), samples (number of each), digest of ids and answers."""


def load(
    section: "DataSection",
    seed: int,
    splits: Sequence[Literal["train", "val"]] = ("train", "val"),
) -> Data:
    """Load the questions of the settings.

    Every data set that is named gives its share, and they come in turns. The same seed gives the
    same questions; those to validate on stay the same whatever is trained on.

    Args:
        section: names, places and numbers.
        seed: of the order.
        splits: what is wanted; the other stays empty.

    Raises:
        UserError: if files are missing or damaged, or a data set has nothing left to give.
    """
    drawn = _drawn(section, seed, "train" if "train" in splits else "val")
    train, val = (drawn[role] if role in splits else [] for role in ("train", "val"))
    listing = [[(one.id, one.answers) for one in part] for part in (train, val)]
    facts = {
        "dataset": list(section.dataset),
        "samples": {"train": len(train), "val": len(val)},
        "digest": hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16],
    }
    return Data(train, val, facts)


def load_test(section: "DataSection", seed: int) -> list[Sample]:
    """Load the questions to evaluate on.

    None is about an image of what `load` returns for the same section and seed. More of them can
    be asked for later: the first ones stay the same.

    Raises:
        UserError: as `load`.
    """
    return _drawn(section, seed, "test")["test"]


def images(section: "DataSection", seed: int) -> set[str]:
    """Return the ids of all images that `load` and `load_test` ask about.

    Raises:
        UserError: as `load`.
    """
    drawn = _drawn(section, seed, "test")
    return {sample.image_id for samples in drawn.values() for sample in samples}


def _drawn(section: "DataSection", seed: int, last: Role) -> dict[Role, list[Sample]]:
    """Draw what each role gets, up to the last one that is asked for."""
    pools: dict[str, Pool] = {name: _pool(section, name, seed) for name in section.dataset}
    counts = (section.val_samples, section.train_samples, section.test_samples)
    drawn: dict[Role, list[Sample]] = {}
    for role, count in zip(_ROLES, counts, strict=True):
        taken = {sample.image_id for samples in drawn.values() for sample in samples}
        drawn[role] = _share_out(pools, role, count, taken)
        if role == last:
            break
    return drawn


def _share_out(pools: dict[str, Pool], role: Role, count: int, taken: set[str]) -> list[Sample]:
    """Take as many questions from each data set as from any other, and let them take turns.

    Args:
        pools: by name of the data set.
        role: of the questions.
        count: of all of them.
        taken: images that have another role.
    """
    if count < len(pools):
        raise UserError(
            f"data.{role}_samples = {count} cannot be shared out among {', '.join(pools)}:"
            f" expected {len(pools)} or more"
        )
    shares = []
    for place, (name, pool) in enumerate(pools.items()):
        quota = (count + len(pools) - 1 - place) // len(pools)
        free = (sample for sample in pool(role) if sample.image_id not in taken)
        share = list(itertools.islice(free, quota))
        if not share:
            raise UserError(
                f"{name}: no questions for data.{role}_samples = {count} whose images are free"
            )
        if len(share) < quota:
            log.warning("%s: %d of %d %s questions, it has no more", name, len(share), quota, role)
        shares.append(share)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*shares))
    samples = [sample for sample in turns if sample is not None]
    _check_ids(samples)
    return samples


def _check_ids(samples: Sequence[Sample]) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise UserError(f"{sample.id}: two questions have this id")
        seen.add(sample.id)


def _pool(section: "DataSection", name: str, seed: int) -> Pool:
    match name:
        case "synth_vqa":
            return partial(_synthetic, seed)
        case "easy_vqa":
            return local.easy_vqa(section.root, seed)
        case "jsonl":
            return local.jsonl(section.file, section.root, seed)
    sources = dict(source.split("=", 1) for source in section.sources)
    return hub.pool(name, sources.get(name, hub.SOURCES[name]), seed)


def _synthetic(seed: int, role: Role) -> Iterator[Sample]:
    """Draw pictures without end; a picture of one role is never one of another."""
    for picture in itertools.count(_ROLES.index(role), len(_ROLES)):
        for index in range(EACH * picture, EACH * picture + EACH):
            drawn = draw(index, seed)
            yield Sample(
                id=f"synth_vqa/{index}",
                image_id=f"synth_vqa/{picture}",
                question=drawn.question,
                answers=(drawn.answer,),
                dataset="vqa",
                metric="vqa",
                open=partial(_picture, index, seed),
            )


def _picture(index: int, seed: int) -> "Image":
    return draw(index, seed).image
