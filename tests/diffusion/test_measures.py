"""Errors of the noise step by step, and whom the routers choose: known values, any batch size."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from moectl.common.images import Plain
from moectl.diffusion import measures
from moectl.diffusion.measures import Held, by_step, dead, measure, step_of, usage
from moectl.diffusion.process import GaussianDiffusion
from moectl.engine.seeding import key
from moectl.engine.sources import FolderSource

LEVEL = 51  # of the bytes: -0.6


def source(count=7):
    plain = Plain((0.5,) * 3, (0.5,) * 3)
    image = torch.full((3, 4, 4), LEVEL, dtype=torch.uint8)
    items = [(str(number), number % 3) for number in range(count)]
    return FolderSource(items, lambda _: image, lambda _: image, 0, plain)


def machine(rank=0, world=1):
    return SimpleNamespace(
        process_index=rank, num_processes=world, device=torch.device("cpu"), autocast=nullcontext
    )


class Network:
    """Two blocks of four experts: the first chooses by class, the second by the step."""

    k_active, num_experts = 2, 4
    blocks = ("first", "second")

    def __init__(self, say):
        self.say = say

    def __call__(self, x, t, c):
        wheel = torch.arange(4)
        logits = [-((wheel - place[:, None]) % 4).float() for place in (c, t)]
        return self.say(x, t), logits


class Dense(Network):
    blocks = ()

    def __call__(self, x, t, _):
        return self.say(x, t), []


def zero(x, _):
    return torch.zeros_like(x)


def knowing(diffusion):
    """Say what a network would that knows the image."""
    x0 = torch.full((1, 3, 4, 4), LEVEL / 127.5 - 1)

    def say(x, t):
        alpha = diffusion.alphas[t].view(-1, 1, 1, 1)
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return noise if diffusion.prediction == "epsilon" else (
            alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        )  # fmt: skip

    return say


def held(say=zero, network=Network, diffusion=None, rank=(0, 1), count=7, batch_size=3, **options):
    return measure(
        network(say), diffusion or GaussianDiffusion(), source(count), machine(*rank),
        batch_size=batch_size, **options,
    )  # fmt: skip


def test_error_of_nothing_is_the_square_of_the_noise():
    found = held(rounds=2)
    expected = [
        torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(key("held out", place)))
        for place in range(14)
    ]
    torch.testing.assert_close(found.errors, torch.stack(expected).square().mean((1, 2, 3)))
    assert found.t.tolist() == [step_of(place, 1000) for place in range(14)]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] * 2
    assert len(set(found.errors.tolist())) == 14


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_network_that_knows_the_image_has_no_error(prediction):
    diffusion = GaussianDiffusion(prediction=prediction)
    found = held(knowing(diffusion), diffusion=diffusion, rounds=3)
    assert found.errors.max() < 1e-6


def test_error_of_the_velocity_is_that_of_its_noise():
    diffusion = GaussianDiffusion(prediction="v_prediction")
    found = held(lambda x, t: knowing(diffusion)(x, t) + 0.5, diffusion=diffusion, rounds=3)
    expected = 0.25 * diffusion.alphas[found.t]
    torch.testing.assert_close(found.errors, expected, atol=1e-4, rtol=1e-4)


def test_chosen_are_those_of_the_largest_logits():
    found = held()
    assert found.chosen.shape == (7, 2, 2)
    for place in range(7):
        for block, first in enumerate([place % 3, found.t[place].item()]):
            assert set(found.chosen[place, block].tolist()) == {first % 4, (first + 1) % 4}


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_measurements_do_not_depend_on_the_batch_size(batch_size):
    for one, other in zip(held(rounds=2), held(rounds=2, batch_size=batch_size), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_processes_share_the_measurements(monkeypatch, world):
    whole, kept = held(rounds=2), []

    def keep(_, rows, total):
        assert total == 7
        kept.append(rows)
        return torch.zeros(1, rows.shape[1])

    monkeypatch.setattr(measures, "gather_rows", keep)
    for rank in range(world):
        held(rank=(rank, world), rounds=2)
        for number, rows in enumerate(kept):
            places = range(7 * number + rank, 7 * (number + 1), world)
            assert rows.shape == (len(places), 7)
            torch.testing.assert_close(rows[:, 2], whole.errors[list(places)])
            assert rows[:, 0].tolist() == whole.t[list(places)].tolist()
            chosen = whole.chosen[list(places)].flatten(1)
            assert torch.equal(rows[:, 3:].long(), chosen)
        kept.clear()


def test_limit_stops_after_that_many_images():
    whole = held(count=20)
    for limit, expected in [(1, 3), (3, 3), (4, 6), (20, 20), (0, 20)]:
        found = held(count=20, limit=limit)
        assert len(found.t) == expected
        torch.testing.assert_close(found.errors, whole.errors[:expected])


def test_dense_network_chooses_nobody():
    found = held(network=Dense)
    assert found.chosen.shape == (7, 0, 2)
    assert usage(found.chosen, found.labels, 3, 0) == []


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("first", [0, 17, 5000])
@pytest.mark.parametrize("count", [50, 1000])
def test_any_run_of_measurements_covers_the_steps_evenly(first, count, steps):
    found = torch.tensor([step_of(place, steps) for place in range(first, first + count)])
    assert found.min() >= 0
    assert found.max() < steps
    counts = (found * 10 // steps).bincount(minlength=10)
    assert counts.max() - counts.min() <= 3
    fine = (found * 100 // steps).bincount(minlength=100)
    if count == steps == 1000:
        assert fine.max() - fine.min() <= 4


def held_of(t, errors):
    t = torch.tensor(t)
    return Held(t, t * 0, torch.tensor(errors), torch.zeros(len(t), 1, 1))


def test_means_are_of_tenths_of_the_steps():
    found = by_step(held_of([0, 99, 100, 550, 999], [1.0, 3.0, 5.0, 7.0, 9.0]), 1000)
    assert found == [2.0, 5.0, None, None, None, 7.0, None, None, None, 9.0]
    assert by_step(held_of([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0]), 4) == [
        1.0, None, 2.0, None, None, 3.0, None, 4.0, None, None,
    ]  # fmt: skip


def test_usage_is_the_share_of_each_expert_in_each_group():
    chosen = torch.tensor([[[0, 1], [2, 1]], [[0, 2], [2, 0]], [[1, 2], [2, 1]]])
    found = usage(chosen, torch.tensor([0, 0, 2]), 3, 3)
    assert found == [
        [[0.5, 0, 0], [0.25, 0, 0.5], [0.25, 0, 0.5]],
        [[0.25, 0, 0], [0.25, 0, 0.5], [0.5, 0, 0.5]],
    ]
    for block in found:
        sums = torch.tensor(block).sum(0)
        assert sums.tolist() == [1, 0, 1]


def test_dead_experts_are_in_no_group():
    assert dead([[[0.5, 1.0], [0.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.1], [1.0, 0.9]]]) == 2
    assert dead([]) == 0
