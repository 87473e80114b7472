"""What the loop promises its caller. Stopping and resuming is in tests/faults."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moectl.engine.errors import UserError


def collect(into: list[Any]) -> Any:
    def note(step: Any, loss: Any) -> Any:
        into.append(step)
        return loss

    return note


def test_positions_and_progress(toy: ModuleType, tmp_path: Path) -> None:
    steps: list[Any] = []
    loop = toy.complete(tmp_path / "run", on_step=collect(steps))
    assert [step.index for step in steps] == list(range(16))
    assert [step.epoch for step in steps] == [epoch for epoch in range(4) for _ in range(4)]
    assert [step.ends_epoch for step in steps] == [False, False, False, True] * 4
    assert all(step.ends_update for step in steps)
    assert [step.progress for step in steps] == [index / 16 for index in range(16)]
    assert (loop.update, loop.epoch, loop.batch, loop.finished) == (16, 4, 0, True)


def test_the_learning_rate_follows_the_epochs(toy: ModuleType, tmp_path: Path) -> None:
    toy.complete(tmp_path / "run", train__log_every=1)
    rates = [float(row["lr"]) for row in toy.metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.025] * 4 + [0.05] * 8 + [0.005] * 4)


def plain() -> Any:
    """A network whose gradient is the mean over the samples, whatever the cut."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


def weights(toy: ModuleType, folder: Path, **changes: Any) -> tuple[torch.Tensor, list[float]]:
    net = plain()
    with toy.open_run(folder, toy.settings(train__log_every=1, **changes)) as run:
        toy.train(run, net=net)
    rows = toy.metrics(folder)
    losses = [float(row["running/loss"] or row["train/loss"]) for row in rows]
    assert rows[0]["lr"] == "0.025"
    return torch.cat([value.flatten() for value in net.parameters()]).detach(), losses


@pytest.mark.parametrize("accumulate", [2, 4])
def test_cutting_a_batch_changes_neither_rate_nor_gradient(
    toy: ModuleType, tmp_path: Path, accumulate: int
) -> None:
    # The last batch of an epoch has 6 samples: the parts are not of equal size.
    whole, losses = weights(toy, tmp_path / "a")
    cut, cut_losses = weights(toy, tmp_path / "b", train__accumulate=accumulate)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    assert cut_losses == pytest.approx(losses, rel=1e-5)


def test_only_the_last_part_of_a_batch_moves_the_weights(toy: ModuleType, tmp_path: Path) -> None:
    steps: list[Any] = []
    toy.complete(tmp_path / "run", on_step=collect(steps), train__accumulate=2, train__epochs=1)
    assert [step.ends_update for step in steps] == [False, True] * 4
    assert [step.index for step in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [step.ends_epoch for step in steps] == [False] * 7 + [True]


def test_a_batch_that_cannot_be_cut_evenly_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size = 8 does not divide by 1 processes"):
        toy.complete(tmp_path / "run", train__accumulate=3)


def test_rows_hold_means_over_their_window(toy: ModuleType, tmp_path: Path) -> None:
    losses: list[float] = []

    def note(step: Any, loss: Any) -> Any:
        losses.append(float(loss.detach()))
        return loss

    toy.complete(tmp_path / "run", on_step=note, train__epochs=1)
    first, last = toy.metrics(tmp_path / "run")
    assert float(first["running/loss"]) == pytest.approx(sum(losses[:2]) / 2)
    assert float(first["running/double"]) == pytest.approx(sum(losses[:2]))
    assert float(last["train/loss"]) == pytest.approx(sum(losses) / 4)
    assert first["train/loss"] == last["running/loss"] == ""
    assert float(last["val/score"]) < 0


def test_logging_at_epoch_ends_only(toy: ModuleType, tmp_path: Path) -> None:
    toy.complete(tmp_path / "run", train__log_every=0)
    assert [int(row["update"]) for row in toy.metrics(tmp_path / "run")] == [4, 8, 12, 16]


def scored(toy: ModuleType, folder: Path, scores: list[float | None], **changes: Any) -> Any:
    """Train with given scores at the ends of epochs; return the loop and which were best."""
    net, best = plain(), []
    with toy.open_run(folder, toy.settings(train__epochs=len(scores), **changes)) as run:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        loop = run.loop(net, toy.source(), optimizer, lambda _: 1.0, monitor="val/score")
        for step in loop:
            images, labels = step.batch
            step.update(torch.nn.functional.cross_entropy(loop.model(images), labels))
            if step.ends_epoch:
                best.append(step.score({"val/score": scores[step.epoch], "val/other": None}))
    return loop, best


def test_the_best_checkpoint_is_kept(toy: ModuleType, tmp_path: Path) -> None:
    loop, best = scored(toy, tmp_path / "run", [0.1, 0.5, 0.5, 0.4, 0.2])
    assert best == [True, True, False, False, False], "an equal score is not better"
    assert loop.best == {"name": "val/score", "value": 0.5, "update": 8}
    assert "update-00000008" in toy.checkpoints(tmp_path / "run")
    assert toy.checkpoints(tmp_path / "run")[-1] == "update-00000020"


def test_patience_stops_early(toy: ModuleType, tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.4, 0.3, 0.2, 0.9]
    loop, best = scored(toy, tmp_path / "run", scores, train__patience=2)
    assert len(best) == 4
    assert loop.finished
    assert loop.patience_ends
    assert toy.checkpoints(tmp_path / "run")[-1] == "update-00000016"


def test_a_score_that_was_not_computed_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="val/score was not computed"):
        scored(toy, tmp_path / "run", [None])


def test_a_break_saves_nothing_but_leaves_in_order(toy: ModuleType, tmp_path: Path) -> None:
    with toy.open_run(tmp_path / "run", toy.settings()) as run:
        net = plain()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for step in run.loop(net, toy.source(), optimizer, lambda _: 1.0):
            step.update(net(step.batch[0]).square().mean())
            break
    assert toy.status(tmp_path / "run")[0] == "finished"


def test_clipping_bounds_the_step(toy: ModuleType, tmp_path: Path) -> None:
    net = plain()
    before = [value.detach().clone() for value in net.parameters()]
    options = toy.settings(optim__clip_norm=0.5, train__epochs=1, train__batch_size=30)
    with toy.open_run(tmp_path / "run", options) as run:
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        loop = run.loop(net, toy.source(), optimizer, lambda _: 1.0)
        for step in loop:
            step.update(100 * loop.model(step.batch[0]).square().sum())
    moved = [(old - new).square().sum() for old, new in zip(before, net.parameters(), strict=True)]
    assert float(torch.stack(moved).sum().sqrt().detach()) == pytest.approx(0.5, rel=1e-4)


def test_evaluating_in_the_body_does_not_leave_eval_mode_behind(
    toy: ModuleType, tmp_path: Path
) -> None:
    modes: list[bool] = []
    net = toy.model()

    def note(step: Any, loss: Any) -> Any:
        modes.append(net.training)
        return loss

    with toy.open_run(tmp_path / "run", toy.settings(train__epochs=2)) as run:
        toy.train(run, note, net=net)
    assert modes == [True] * 8


def test_shared_layers_are_saved(toy: ModuleType, tmp_path: Path) -> None:
    net = plain()
    net.append(torch.nn.Linear(3, 3))
    net.append(net[-1])
    with toy.open_run(tmp_path / "run", toy.settings(train__epochs=1)) as run:
        toy.train(run, net=net)
    with toy.open_run(tmp_path / "run", toy.settings(train__epochs=2), resume="named") as run:
        toy.train(run, net=net)
    assert toy.status(tmp_path / "run")[0] == "finished"


def test_a_step_costs_no_draw_of_the_global_generator(toy: ModuleType, tmp_path: Path) -> None:
    def draws(folder: Path, waste: int) -> list[float]:
        seen: list[float] = []

        def note(step: Any, loss: Any) -> Any:
            seen.append(float(torch.rand(())))
            torch.rand(waste)
            return loss

        toy.complete(folder, on_step=note, train__epochs=1)
        return seen

    once, again = draws(tmp_path / "a", 0), draws(tmp_path / "b", 7)
    assert once == again, "each step starts from its own seed"
    assert len(set(once)) == 4
