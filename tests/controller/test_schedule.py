"""The fall of the learning rate, next to torch's own."""

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from moectl.controller.schedule import Plateau


def own(scores: list[float], factor: float, patience: int) -> list[float]:
    plateau = Plateau(factor, patience)
    found = []
    for score in scores:
        plateau.step(score)
        found.append(plateau.factor(0.0))
    return found


def walk(count: int, shift: float) -> list[float]:
    """Scores that climb, stay and fall."""
    generator = torch.Generator().manual_seed(0)
    steps = 0.2 * torch.randn(count, generator=generator).double()
    return (steps + torch.linspace(0, 1, count).double().clamp(max=0.4) + shift).tolist()


@pytest.mark.parametrize("shift", [0.0, 0.5, -3.0])
@pytest.mark.parametrize(("factor", "patience"), [(0.5, 5), (0.1, 0), (0.9, 2)])
def test_it_falls_as_torchs_does(shift: float, factor: float, patience: int) -> None:
    scores = walk(60, shift)
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=1.0)
    torchs = ReduceLROnPlateau(optimizer, "max", factor, patience, threshold_mode="abs")
    expected = []
    for score in scores:
        torchs.step(score)
        expected.append(optimizer.param_groups[0]["lr"])
    found = own(scores, factor, patience)
    assert found == expected
    assert len(set(found)) > 2


def test_it_waits_for_more_than_its_patience() -> None:
    assert own([1, 2, 1.9, 1.9, 1.9, 1.9, 1.9], 0.5, 2) == [1, 1, 1, 1, 0.5, 0.5, 0.5]
    assert own([1, 0, 2, 0, 3, 0], 0.5, 1) == [1] * 6


@pytest.mark.parametrize("score", [0.7, 0.0, -0.5, -8.2])
def test_the_same_score_again_is_no_better(score: float) -> None:
    assert own([score] * 9, 0.5, 2) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_the_position_plays_no_part() -> None:
    plateau = Plateau(0.5, 3)
    assert plateau.factor(0.0) == plateau.factor(17.5) == 1


@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_a_state_goes_on_as_if_nothing_had_happened(stop: int) -> None:
    scores = walk(40, 0.0)
    whole = own(scores, 0.5, 2)
    first, second = Plateau(0.5, 2), Plateau(0.5, 2)
    for score in scores[:stop]:
        first.step(score)
    state = first.state_dict()
    assert all(type(value) in (int, float) for value in state.values())
    second.load_state_dict(state)
    assert second.state_dict() == state
    found = []
    for score in scores[stop:]:
        second.step(score)
        found.append(second.factor(0.0))
    assert found == whole[stop:]
    assert first.state_dict() == state, "the second does not write into the first"
