"""Counts of images per expert: of an update, of an epoch, over processes."""

import pytest
import torch

from moectl.diffusion.losses import shares
from moectl.diffusion.usage import Usage, counts

LOGITS = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [4, 1, 3, 2]])


def random(images, blocks=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(blocks, images, 4, generator=generator))


def part(logits, rows):
    return [one[rows] for one in logits]


def test_counts_are_assignments():
    assert counts([LOGITS, LOGITS[:2]], 2).tolist() == [[2, 1, 2, 1], [1, 1, 1, 1]]
    assert counts([LOGITS], 1).tolist() == [[2, 0, 0, 1]]


def test_shares_sum_to_one_and_are_those_of_the_batch():
    logits = random(12)
    found = Usage((2, 4), 2, 1, 1).add(logits, ends_update=True)
    torch.testing.assert_close(found, [shares(one, 2) for one in logits])
    assert [one.sum().item() for one in found] == pytest.approx([1, 1])


def test_micro_batches_are_balanced_by_the_last_whole_update():
    first, second = random(12), random(12, seed=1)
    found = Usage((2, 4), 2, 1, cuts=2)
    own = found.add(part(first, slice(5)), ends_update=False)
    torch.testing.assert_close(own, [shares(one[:5], 2) for one in first])  # there is no last one
    found.add(part(first, slice(5, 12)), ends_update=True)
    for rows, ends in ((slice(5), False), (slice(5, 12), True)):
        own = found.add(part(second, rows), ends_update=ends)
        torch.testing.assert_close(own, [shares(one, 2) for one in first])
    own = found.add(part(first, slice(5)), ends_update=False)
    torch.testing.assert_close(own, [shares(one, 2) for one in second])


def test_processes_count_together(monkeypatch):
    logits = random(12)
    theirs = counts(part(logits, slice(7, 12)), 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda own: own.add_(theirs))
    found = Usage((2, 4), 2, processes=2, cuts=1)
    together = found.add(part(logits, slice(7)), ends_update=True)
    torch.testing.assert_close(together, [shares(one, 2) for one in logits])
    assert found.epoch.sum() == 2 * 12 * 2


def test_single_process_does_not_wait_for_others(monkeypatch):
    monkeypatch.delattr(torch.distributed, "all_reduce")
    Usage((1, 4), 2, 1, 1).add([LOGITS], ends_update=True)


def test_shares_are_without_gradient():
    logits = LOGITS.clone().requires_grad_()
    usage = Usage((1, 4), 2, 1, 1)
    (found,) = usage.add([logits], ends_update=True)
    assert not found.requires_grad
    assert not usage.epoch.requires_grad


def test_dense_network_has_nothing_to_count():
    assert Usage((0, 0), 2, 2, 1).add([], ends_update=True) == []


def test_summary_tells_of_the_worst_block_and_begins_anew():
    usage = Usage((2, 4), 1, 1, 2)
    even = torch.eye(4)
    lame = torch.eye(4)[[0, 0, 0, 1]]
    for ends in (False, True):
        usage.add([even, lame], ends_update=ends)
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    names = ["encoder 0", "decoder 0"]
    expected = {
        "load/largest": 3.0,
        "load/largest/encoder_0": 1.0,
        "load/largest/decoder_0": 3.0,
        "load/entropy": float(entropy / torch.tensor(4.0).log()),
        "load/dead": 2.0,
    }
    assert usage.summary(names) == pytest.approx(expected, rel=1e-6)
    assert not usage.epoch.any()
    usage.add([even, even], ends_update=True)
    even = dict.fromkeys(expected, 1) | {"load/dead": 0}
    assert usage.summary(names) == pytest.approx(even, rel=1e-6)


def test_counts_of_the_epoch_are_saved():
    usage, again = (Usage((2, 4), 2, 1, 2) for _ in range(2))
    usage.add(random(6), ends_update=True)
    again.load_state_dict(usage.state_dict())
    assert list(usage.state_dict()) == ["epoch", "last"]
    assert again.epoch.sum() == 2 * 6 * 2
    found = [one.add(random(5, seed=1), ends_update=True) for one in (usage, again)]
    torch.testing.assert_close(*found)
    assert usage.summary("ab") == again.summary("ab")
