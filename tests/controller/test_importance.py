"""Files of importance scores, orders of blocks, and the search for blocks to leave out."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moectl.controller.importance import (
    MOLMOE,
    Removal,
    beam_search,
    order_of,
    rank_correlation,
    read_importance,
    spearman,
    write_importance,
)
from moectl.engine.errors import UserError

FLAT = {"0": 0.5, "1": 0.1, "2": 0.3}
SCORES = {0: 0.5, 1: 0.1, 2: 0.3}


def written(folder: Path, document: Any) -> Path:
    path = folder / "scores.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "document",
    [
        FLAT,
        {"2": 0.3, "0": 0.5, "1": 0.1},
        {**FLAT, "baseline": 0.7, "note": "by hand"},
        {"merged_scores": FLAT},
        {"train_scores": FLAT, "other": {"0": 9}},
        {"importance_scores": {**FLAT, "mean": 0.3}, "meta": {}},
        {"importance_scores": {"0": 9}, "train_scores": {"0": 9}, "merged_scores": FLAT},
    ],
    ids=lambda document: ",".join(document),
)
def test_scores_are_read_flat_or_nested(tmp_path: Path, document: Any) -> None:
    path = written(tmp_path, document)
    assert read_importance(path, 3) == SCORES
    assert read_importance(path) == SCORES
    assert list(read_importance(path)) == [0, 1, 2]


def test_missing_blocks_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, {str(block): 0.1 for block in range(1, 15)})
    with pytest.raises(UserError, match=rf"{path}: no score of block 0, 15"):
        read_importance(path, 16)
    with pytest.raises(UserError, match=r"no score of block 0$"):
        read_importance(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**FLAT, "7": 0.1}, "a score of block 7: expected 0 to 2"),
        ({**FLAT, "1": "much"}, "block 1 has the score 'much'"),
        ({**FLAT, "1": True}, "block 1 has the score True"),
        ({**FLAT, "1": float("nan")}, "block 1 has the score nan"),
        ({"merged_scores": [0.5, 0.1, 0.3]}, "expected an object"),
        ([0.5, 0.1, 0.3], "expected an object"),
        ({}, "no score of block 0, 1, 2"),
    ],
)
def test_what_are_no_scores_is_refused(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_importance(written(tmp_path, document), 3)


def test_written_scores_are_read_from_both_files(tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    beam = [Removal((1,), 0.6, 0.1), Removal((1, 2), 0.2, 0.5)]
    write_importance(path, {2: 0.3, 0: 0.5, 1: 0.1}, {"model": "tiny", "n": 8}, beam)
    assert read_importance(path, 3) == read_importance(tmp_path / "importance_flat.json", 3)
    assert read_importance(path, 3) == SCORES
    assert json.loads(path.read_text()) == {
        "schema": "moectl.importance/1",
        "importance_scores": FLAT,
        "meta": {"model": "tiny", "n": 8},
        "beam": [
            {"removed": [1], "metric": 0.6, "drop": 0.1},
            {"removed": [1, 2], "metric": 0.2, "drop": 0.5},
        ],
    }
    assert json.loads((tmp_path / "importance_flat.json").read_text()) == FLAT


def test_released_scores_remove_blocks_in_the_known_order() -> None:
    assert sorted(MOLMOE) == list(range(16))
    assert order_of(MOLMOE, (0,))[::-1][:4] == [4, 13, 10, 2]
    assert order_of(MOLMOE, (0,))[0] == 0
    assert sum(MOLMOE.values()) == pytest.approx(1.2)


def test_blocks_that_always_run_come_first_whatever_their_score() -> None:
    scores = {0: -1.0, 1: 0.2, 2: 0.9, 3: 0.0, 4: 0.2}
    assert order_of(scores, (0, 3)) == [0, 3, 2, 1, 4]
    assert order_of(scores, (3, 0)) == [0, 3, 2, 1, 4]


def test_equal_scores_keep_the_order_of_the_blocks() -> None:
    assert order_of(dict.fromkeys([3, 1, 0, 2], 0.5), (0,)) == [0, 1, 2, 3]


def test_rank_correlation_follows_ranks_alone() -> None:
    cubed = {block: score**3 for block, score in MOLMOE.items()}
    turned = {block: -score for block, score in MOLMOE.items()}
    assert spearman(MOLMOE, cubed) == pytest.approx(1)
    assert spearman(MOLMOE, turned) == pytest.approx(-1)
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
    first = dict(enumerate([1.0, 2.0, 3.0, 4.0, 5.0]))
    second = dict(enumerate([20.0, 10.0, 40.0, 30.0, 50.0]))
    assert spearman(first, second) == pytest.approx(0.8)
    assert spearman(first, dict(reversed(second.items()))) == pytest.approx(0.8)


def test_pairs_correlate_by_their_ranks() -> None:
    assert rank_correlation([1, 2, 30, 4], [5, 6, 9, 8]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [7, 7, 7]) == 0


def test_equal_scores_correlate_with_nothing() -> None:
    assert spearman(SCORES, dict.fromkeys(SCORES, 0.2)) == 0.0


def test_scores_of_other_blocks_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different blocks"):
        spearman(SCORES, {0: 1.0, 1: 0.0, 3: 0.5})


def pair_costs(seed: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.random.default_rng(seed).normal(size=(6, 6))


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_is_a_complete_search(seed: int) -> None:
    costs = pair_costs(seed)

    def metric(removed: frozenset[int]) -> float:
        return 1.0 - float(sum(costs[a, b] for a in removed for b in removed))

    found = beam_search(metric, range(1, 6), beam=99, max_remove=3)
    expected = []
    for size in (1, 2, 3):
        sets = sorted(combinations(range(1, 6), size), key=lambda s: (-metric(frozenset(s)), s))
        expected += sets
    assert [removal.removed for removal in found] == expected
    for removal in found:
        assert removal.metric == metric(frozenset(removal.removed))
        assert removal.drop == pytest.approx(1.0 - removal.metric)


def test_a_narrow_beam_is_greedy_and_asks_for_each_set_once() -> None:
    asked: list[frozenset[int]] = []
    cost = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4}

    def metric(removed: frozenset[int]) -> float:
        asked.append(removed)
        return 1.0 - sum(cost[block] for block in removed)

    found = beam_search(metric, [1, 2, 3, 4], beam=1, max_remove=3)
    assert [removal.removed for removal in found] == [(2,), (2, 3), (1, 2, 3)]
    assert len(asked) == len(set(asked)) == 1 + 4 + 3 + 2


def test_a_wider_beam_finds_a_pair_that_a_greedy_search_misses() -> None:
    def metric(removed: frozenset[int]) -> float:
        known = {(): 1.0, (1,): 0.9, (2,): 0.8, (3,): 0.7, (2, 3): 0.95}
        return known.get(tuple(sorted(removed)), 0.1)

    assert beam_search(metric, [1, 2, 3], beam=1, max_remove=2)[-1].removed == (1, 2)
    wide = beam_search(metric, [1, 2, 3], beam=2, max_remove=2)
    assert [removal.removed for removal in wide] == [(1,), (2,), (2, 3), (1, 2)]


def test_the_search_ends_where_no_block_is_left() -> None:
    found = beam_search(len, [1, 2], beam=3, max_remove=4)
    assert [removal.removed for removal in found] == [(1,), (2,), (1, 2)]
    assert beam_search(len, [1, 2], max_remove=0) == []
