"""How much each block matters: files of scores, orders of blocks, and which to leave out.

Letters: L blocks.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moectl.engine.errors import UserError
from moectl.engine.files import read_json, write_json

MOLMOE = dict(
    enumerate(
        (
            *(0.56, 0.08, 0.004, 0.03, 0.001, 0.08, 0.04, 0.05),
            *(0.07, 0.06, 0.003, 0.04, 0.06, 0.002, 0.06, 0.06),
        )
    )
)
"""Scores by block as released for MolmoE-1B; set by hand so that 4, 13, 10 and 2 go first."""

_NESTED = ("merged_scores", "train_scores", "importance_scores")


class Removal(NamedTuple):
    """What leaving out some blocks costs."""

    removed: tuple[int, ...]
    metric: float
    drop: float
    """Metric of the whole network less this one."""


def read_importance(path: Path, blocks: int | None = None) -> dict[int, float]:
    """Read scores by block: flat, or under one of the names that the original uses.

    Keys that are not whole numbers are passed over.

    Args:
        path: of a JSON file.
        blocks: L; all of them and no others are expected.

    Raises:
        UserError: if a block is missing or one too many, or a score is no finite number.
    """
    document = read_json(path)
    if isinstance(document, dict):
        document = next((document[key] for key in _NESTED if key in document), document)
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected an object of scores by block")
    scores = {int(key): document[key] for key in document if key.isdecimal()}
    wanted = range(max(scores, default=0) + 1 if blocks is None else blocks)
    if missing := [str(block) for block in wanted if block not in scores]:
        raise UserError(f"{path}: no score of block {', '.join(missing)}")
    if len(scores) > len(wanted):
        raise UserError(f"{path}: a score of block {max(scores)}: expected 0 to {wanted[-1]}")
    for block, score in scores.items():
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score):
            raise UserError(f"{path}: block {block} has the score {score!r}: expected a number")
    return {block: float(scores[block]) for block in wanted}


def write_importance(
    path: Path,
    scores: Mapping[int, float],
    meta: Mapping[str, Any],
    beam: Sequence[Removal] = (),
) -> None:
    """Write scores, and beside them `<name>_flat.json` with nothing but the scores.

    Args:
        path: ends in `.json`.
        scores: by block.
        meta: model, data, metric and so on.
        beam: of `beam_search`.
    """
    flat = {str(block): scores[block] for block in sorted(scores)}
    document = {
        "schema": "moectl.importance/1",
        "importance_scores": flat,
        "meta": dict(meta),
        "beam": [{**removal._asdict(), "removed": list(removal.removed)} for removal in beam],
    }
    write_json(path, document)
    write_json(path.with_name(f"{path.stem}_flat.json"), flat)


def order_of(scores: Mapping[int, float], always_on: Collection[int]) -> list[int]:
    """Return all blocks: those that always run, then by falling score, the first of equals first.

    Args:
        scores: by block.
        always_on: blocks; they keep their own order.
    """
    rest = sorted(scores.keys() - set(always_on), key=lambda block: (-scores[block], block))
    return [*sorted(always_on), *rest]


def spearman(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Return the rank correlation of two sets of scores, 0 where one set is all the same.

    Raises:
        ValueError: if they are not of the same blocks.

    Source: Spearman 1904.
    """
    if first.keys() != second.keys():
        raise ValueError("scores of different blocks have no rank correlation")
    return rank_correlation(list(first.values()), [second[block] for block in first])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's correlation of pairs, 0 where one side does not vary."""
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    if min(len(set(first)), len(set(second))) < 2:
        return 0.0
    return float(spearmanr(first, second).statistic)


def beam_search(
    metric: Callable[[frozenset[int]], float],
    candidates: Sequence[int],
    *,
    beam: int = 3,
    max_remove: int = 4,
) -> list[Removal]:
    """Search sets of blocks that can be left out at little cost.

    The best sets of each size are grown by one block. With a beam as wide as there are sets, the
    search is complete.

    Args:
        metric: of the network without some blocks; larger is better. Asked once for each set.
        candidates: blocks that may be left out.
        beam: sets of each size that are kept.
        max_remove: largest size.

    Returns:
        The kept sets, from small to large and within a size from good to bad; of equals the one
        with the earlier blocks first.
    """
    full = metric(frozenset())
    kept, found = [frozenset[int]()], []
    for _ in range(min(max_remove, len(candidates))):
        grown = {old | {block} for old in kept for block in candidates if block not in old}
        values = {removed: metric(removed) for removed in sorted(grown, key=sorted)}
        kept = sorted(values, key=lambda removed: -values[removed])[:beam]  # stable
        found += [Removal(tuple(sorted(s)), values[s], full - values[s]) for s in kept]
    return found
