import random

import pytest
import torch

from moectl.taskmoe.rows import Rows, dedup, findings, held_out, joined


def pictures(*numbers):
    """One image per number, equal for equal numbers."""
    images = torch.zeros(len(numbers), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([number % 256 for number in numbers])
    images[:, 1, 0, 0] = torch.tensor([number // 256 for number in numbers])
    return images


def rows_of(*files):
    """Each file is a list of (class, picture)."""
    return joined(
        [
            (pictures(*(number for _, number in file)), torch.tensor([id for id, _ in file]))
            for file in files
        ]
    )


def pairs(rows):
    return list(zip(rows.ids, rows.images[:, 0, 0, 0].tolist(), strict=True))


@pytest.fixture
def rows():
    """Class 1 in both files: picture 10 in both, 11 in the first, 12 in the second alone."""
    return rows_of([(0, 1), (1, 10), (1, 11)], [(1, 10), (1, 12), (2, 20), (2, 20)])


def test_files_are_joined_specialist_after_specialist(rows):
    assert rows.specialists == [0, 0, 0, 1, 1, 1, 1]
    assert pairs(rows) == [(0, 1), (1, 10), (1, 11), (1, 10), (1, 12), (2, 20), (2, 20)]
    assert rows.digests[1] == rows.digests[3] != rows.digests[2]


def test_shared_classes_come_from_their_first_owner(rows):
    kept = dedup(rows, "owner")
    assert pairs(kept.rows) == [(0, 1), (1, 10), (1, 11), (2, 20), (2, 20)]
    assert kept.counts == [1, 2, 1, 1, 1]
    assert (kept.dropped, kept.unmatched) == (2, 1)


def test_equal_images_of_a_class_are_kept_once(rows):
    kept = dedup(rows, "content")
    assert pairs(kept.rows) == [(0, 1), (1, 10), (1, 11), (1, 12), (2, 20)]
    assert kept.counts == [1, 2, 1, 1, 2]
    assert (kept.dropped, kept.unmatched) == (2, 0)


def test_without_dedup_everything_stays(rows):
    kept = dedup(rows, "none")
    assert pairs(kept.rows) == pairs(rows)
    assert (kept.counts, kept.dropped, kept.unmatched) == ([1] * 7, 0, 0)


@pytest.mark.parametrize("how", ["owner", "content", "none"])
def test_counts_and_unmatched_images_add_up_to_the_files(rows, how):
    kept = dedup(rows, how)
    assert sum(kept.counts) + kept.unmatched == len(rows.ids)


def test_the_same_image_of_two_classes_is_a_conflict_and_stays():
    rows = rows_of([(0, 1), (1, 1)])
    assert len(dedup(rows, "content").rows.ids) == 2
    assert findings(rows, rows_of([(0, 2)]))["conflicts"] == {"train": 1, "test": 0}


def test_findings_count_repeats_and_leaks(rows):
    found = findings(rows, rows_of([(0, 1), (0, 5), (0, 5)], [(2, 20), (1, 30)]))
    assert found["duplicates"] == {"train": 2, "test": 1}
    assert found["leakage"] == 2


def many():
    return rows_of([(0, number) for number in range(100)] + [(1, n + 300) for n in range(51)])


def chosen(rows, fraction, seed):
    held = held_out(rows, fraction, seed)
    return {one for one, out in zip(rows.keys, held, strict=True) if out}


def test_a_share_of_every_class_validates():
    held = held_out(many(), 0.1, 0)
    assert (sum(held[:100]), sum(held[100:])) == (10, 5)
    assert not any(held_out(many(), 0.0, 0))
    assert held != held_out(many(), 0.1, 1)
    assert held == held_out(many(), 0.1, 0)


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 1), (3, 1), (5, 1)])
def test_a_class_never_validates_whole_and_never_goes_without(size, expected):
    rows = rows_of([(0, number) for number in range(size)])
    assert sum(held_out(rows, 0.1, 0)) == expected
    assert sum(held_out(rows, 0.99, 0)) == size - 1


def test_neither_order_nor_other_classes_decide_what_validates():
    whole = many()
    order = list(range(100))
    random.Random(0).shuffle(order)
    alone = whole.take(order)
    expected = {one for one in chosen(whole, 0.2, 3) if one[0] == 0}
    assert chosen(alone, 0.2, 3) == expected
    assert len(expected) == 20


def test_equal_images_stay_on_one_side():
    rows = rows_of([(0, number) for number in range(50)], [(0, number) for number in range(50)])
    held = held_out(rows, 0.3, 0)
    assert held[:50] == held[50:]
    assert sum(held) == 30


def test_rows_are_taken_in_the_order_asked_for(rows):
    taken = rows.take([4, 0])
    assert isinstance(taken, Rows)
    assert pairs(taken) == [(1, 12), (0, 1)]
    assert taken.specialists == [1, 0]
    assert taken.digests == [rows.digests[4], rows.digests[0]]
