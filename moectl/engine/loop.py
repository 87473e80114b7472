"""The training loop: an iterator over batches that a system drives with a plain `for`."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moectl.engine import checkpoint, console, state
from moectl.engine.errors import Interrupted, RunFailed, UserError
from moectl.engine.launch import agree, any_process, gather_objects
from moectl.engine.seeding import seed_all
from moectl.engine.sources import Chunk, Source, stream_of
from moectl.engine.tracking import Means, MetricsFile, Trackers, mean_over

if TYPE_CHECKING:
    from moectl.engine.optim import Schedule
    from moectl.engine.run import Run
    from moectl.engine.sections import TrainSection

log = logging.getLogger(__name__)

_GPU_CHECK_EVERY = 20  # updates between reads of device flags; a read makes the host wait
_SAVE_FAILURES = 3


class Step:
    """Handle of the current batch."""

    def __init__(self, loop: "Loop", chunk: Chunk, batch: Any) -> None:
        self._loop, self._chunk = loop, chunk
        self.batch = batch
        """What the source gave: usually (images, labels)."""
        self.index = loop.update
        """Optimiser updates done before this one."""
        self.epoch = chunk.epoch
        """Epochs done before this one."""
        self.slots, self.size = chunk.slots, chunk.size
        """Positions of these samples inside the batch of this update, and its size."""
        self.share = len(chunk.rows) / chunk.size
        """Share of the batch of this update that is here."""
        self.ends_update = chunk.ends_update
        """Whether `update` will move the weights."""
        last = chunk.batch == loop.stream.batches_per_epoch - 1
        self.ends_epoch = chunk.ends_update and last
        """Whether this is the last batch of its epoch."""

    @property
    def progress(self) -> float:
        """Share of the training done before this update, in [0, 1)."""
        return self.index / self._loop.total_updates

    def update(self, loss: Tensor, **parts: Tensor | float) -> None:
        """Back-propagate a mean loss over the batch; at the end of the batch also move the weights.

        Args:
            loss: scalar, the mean over the samples of `batch`.
            parts: scalars to average and log beside the loss.
        """
        self._loop._backward(self._chunk, loss, parts)

    def log(self, **values: float | None) -> None:
        """Add values to the next row of metrics."""
        self._loop.extra.update(values)

    def score(self, metrics: Mapping[str, float | None]) -> bool:
        """Log validation scores, and return whether they are the best so far."""
        return self._loop._score(metrics)


class Loop:
    """Iterates over the batches of all epochs, from wherever the run stands.

    Around each step it keeps position, seeds, learning rate, metrics and checkpoints. All
    randomness is derived from the position, so a run that was killed and resumed ends in the same
    weights.

    Raises:
        UserError: if the batch size does not divide over processes and micro-batches, or the data
            is too small for a single batch.
        RunFailed: while iterating, if the loss or the weights stop being finite.
        Interrupted: while iterating, after everything is saved, if the run was asked to stop.
    """

    def __init__(  # noqa: PLR0913 - what a training is made of
        self,
        run: "Run[Any]",
        model: nn.Module,
        source: Source,
        optimizer: torch.optim.Optimizer,
        schedule: "Schedule",
        monitor: str = "",
        smallest: int = 1,
        stage: str = "",
        train: "TrainSection | None" = None,
    ) -> None:
        train = train or run.settings.train
        self.run, self.source, self.schedule, self.monitor = run, source, schedule, monitor
        self.settings, self.accelerator, self.stage = train, run.accelerator, stage
        self.stream = stream_of(len(source), train, self.accelerator, smallest)
        self.total_updates = train.epochs * self.stream.batches_per_epoch
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.says_epochs = True
        self.module = model
        """The bare network, for evaluation and saving."""
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if train.compile:
            self.module.compile()
        self.update = self.epoch = self.batch = self.stale_epochs = 0
        self.best: dict[str, Any] = {}
        self.grad_norm = torch.zeros(())  # of the newest gradient, before it is clipped
        self.extra: dict[str, float | None] = {}
        self.epoch_means, self.window = Means(), Means()
        self._tracked: dict[str, Any] = {}
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self.accelerator.device)
        self._failed_saves, self._saved_update, self._saved_at = 0, -1, run.elapsed_seconds
        self.root = run.folder / "checkpoints" / stage
        self.metrics = MetricsFile(run.folder / f"metrics{stage and f'_{stage}'}.csv")
        self._restore()

    def track(self, **objects: Any) -> None:
        """Save and restore more objects that have a `state_dict`; before the first step."""
        self._tracked.update(objects)
        if self._saved_update >= 0:
            for name, item in objects.items():
                item.load_state_dict(self._tracked_state[name])

    def rehearse(self, evaluation: Callable[[], object]) -> None:
        """Evaluate and write a throw-away checkpoint now: errors must not wait for the end."""
        evaluation()
        if self.run.is_main:
            folder = self.run.folder / "rehearsal"
            try:
                checkpoint.save(folder, 0, self._pack([]), {})
            except OSError as error:
                raise RunFailed(
                    f"a checkpoint cannot be written into {self.run.folder}: {error}"
                ) from None
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def evaluating(self) -> nn.Module:
        """Return the bare network in eval mode, with the same buffers on every process."""
        if self.accelerator.num_processes > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self.module.eval()

    def means(self, over: Literal["epoch", "window"]) -> dict[str, float]:
        """Return the means of loss and parts so far, over all processes."""
        found = self.epoch_means if over == "epoch" else self.window
        return mean_over(gather_objects(self.accelerator, found.state()))

    @property
    def patience_ends(self) -> bool:
        """Whether too many epochs have gone by without a better score."""
        return 0 < self.settings.patience <= self.stale_epochs

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience has run out."""
        return self.epoch >= self.settings.epochs or self.patience_ends

    def __iter__(self) -> Iterator[Step]:
        if self.finished:
            return
        device, seed = self.accelerator.device, self.settings.seed
        places = (self.epoch, self.batch, self.settings.epochs)
        batches = self.source.batches(self.stream.chunks(*places), seed, device)
        trackers = Trackers(self.run, self.update)
        try:
            with console.progress(self.total_updates, self.update) as bar:
                micro = 0
                for chunk, batch in zip(self.stream.chunks(*places), batches, strict=True):
                    step = self._begin(chunk, batch, micro)
                    hold = (
                        nullcontext() if chunk.ends_update else self.accelerator.no_sync(self.model)
                    )
                    with hold:
                        yield step
                    micro = 0 if chunk.ends_update else micro + 1
                    if chunk.ends_update:
                        self._after_update(step, trackers)
                        bar.update(self.update, f"epoch {step.epoch + 1}/{self.settings.epochs}")
                    if self.patience_ends:
                        log.info("stopped early: no better %s", self.monitor)
                        break
        finally:
            trackers.close()
        if self._saved_update != self.update:
            self._save()

    def _begin(self, chunk: Chunk, batch: Any, micro: int) -> Step:
        factor = self.schedule(chunk.epoch + chunk.batch / self.stream.batches_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        if not self.module.training:  # the wrapper of several processes has a flag of its own
            self.model.train()
        # After the batch was fetched: whatever loading draws must not matter here.
        seed_all(self.settings.seed, "step", self.update, micro, self.accelerator.process_index)
        return Step(self, chunk, batch)

    def _backward(self, chunk: Chunk, loss: Tensor, parts: Mapping[str, Tensor | float]) -> None:
        # This chunk's share of the batch: the gradient is the mean over the whole batch,
        # however it is cut.
        share = len(chunk.rows) / chunk.size
        world = self.accelerator.num_processes
        self.accelerator.backward(loss * (share * world) if share * world != 1 else loss)
        self._watch(loss)
        values = [loss.detach(), *(self._scalar(value) for value in parts.values())]
        stacked = torch.stack([value.to(torch.float64) for value in values])
        for means in (self.epoch_means, self.window):
            means.add(("loss", *parts), stacked, share)
        if chunk.ends_update:
            if limit := self.run.settings.optim.clip_norm:
                self.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                if self.accelerator.scaler is None:  # a scaler skips overflows by itself
                    self._watch(self.grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach()
        return torch.full((), value, device=self.accelerator.device)

    def _watch(self, value: Tensor) -> None:
        """Remember the first update whose loss or gradient norm was not finite, without a read."""
        bad = ~torch.isfinite(value.detach()) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, self.update)

    def _after_update(self, step: Step, trackers: Trackers) -> None:
        self.update += 1
        self.epoch, self.batch = (
            (step.epoch + 1, 0) if step.ends_epoch else (step.epoch, self.batch + 1)
        )
        every = self.settings.log_every
        if step.ends_epoch:
            self._log(step, "train", self.epoch_means, trackers)
            self.window.clear()
        elif every and self.update % every == 0:
            self._log(step, "running", self.window, trackers)
        on_gpu = self.accelerator.device.type == "cuda"
        if not on_gpu or step.ends_epoch or self.update % _GPU_CHECK_EVERY == 0:
            self._save_or_stop()

    def _save_or_stop(self) -> None:
        due = self.run.elapsed_seconds - self._saved_at >= self.settings.save_minutes * 60
        best_now = self.best.get("update") == self.update
        bad, stop, save = any_process(
            self.accelerator, int(self._first_bad) >= 0, bool(self.run.stop), due or best_now
        )
        if bad:
            self._refuse()
        written = self._save() if save or stop else True
        if stop:
            reason = self.run.stop.reason or "stopped by another process"
            note = "" if written else "; this update could not be saved, an earlier one was"
            raise Interrupted(
                f"{reason} after update {self.update} of {self.total_updates}{note}",
                f"--resume {self.run.folder} goes on from here",
            )

    def _refuse(self) -> None:
        first = min(
            first for first in gather_objects(self.accelerator, int(self._first_bad)) if first >= 0
        )
        epoch, batch = divmod(first, self.stream.batches_per_epoch)
        rate = self.base_rates[0] * self.schedule(epoch + batch / self.stream.batches_per_epoch)
        means = mean_over([self.window.state()])
        parts = ", ".join(f"{name} {console.cell(value)}" for name, value in means.items())
        raise RunFailed(
            f"loss or gradient not finite at update {first + 1} (epoch {epoch + 1},"
            f" batch {batch + 1}, learning rate {rate:.4g}; means since the last row:"
            f" {parts or 'none'}); the checkpoint before it is kept"
        )

    def _check_health(self, update: int) -> None:
        """Refuse to score or save weights that are not finite after an update."""
        total = nn.utils.get_total_norm(list(self.module.parameters()))
        if not math.isfinite(float(total)) and int(self._first_bad) < 0:
            self._first_bad.fill_(update)
        if any(any_process(self.accelerator, int(self._first_bad) >= 0)):
            self._refuse()

    def _score(self, metrics: Mapping[str, float | None]) -> bool:
        self._check_health(self.update)
        self.extra.update(metrics)
        value = metrics.get(self.monitor) if self.monitor else None
        if self.monitor and value is None:
            raise UserError(f"{self.monitor} was not computed, so no best epoch can be chosen")
        better = value is not None and value > self.best.get("value", -math.inf)
        self.stale_epochs = 0 if better else self.stale_epochs + 1
        if better:
            self.best = {"name": self.monitor, "value": value, "update": self.update + 1}
        return better

    def _log(self, step: Step, split: str, means: Means, trackers: Trackers) -> None:
        averages = mean_over(gather_objects(self.accelerator, means.state()))
        row = {
            "lr": self.optimizer.param_groups[0]["lr"],
            **{f"{split}/{name}": value for name, value in averages.items()},
            **self.extra,
        }
        means.clear()
        self.extra = {}
        if self.run.is_main:
            place = {"update": self.update, "epoch": step.epoch + 1}
            seconds = round(self.run.elapsed_seconds, 3)
            self.metrics.write({**place, "elapsed_seconds": seconds, **row})
            trackers.log({self._named(name): value for name, value in row.items()}, self.update)
            if step.ends_epoch and self.says_epochs:
                words = console.epoch_line(row)
                log.info("epoch %d/%d  %s", self.epoch, self.settings.epochs, words)

    def _named(self, name: str) -> str:
        """Name of a value for trackers, where the stages of a run stand side by side."""
        return f"{self.stage}/{name}" if self.stage else name

    def _save(self) -> bool:
        """Write the training state and return whether it is on the disk.

        A failure is only a warning; the third in a row ends the run.
        """
        self._check_health(self.update - 1)
        means = gather_objects(
            self.accelerator, {"epoch": self.epoch_means.state(), "window": self.window.state()}
        )
        failed = self.run.is_main and not self._write(means)
        # All wait for rank 0 and learn how it went.
        failed = any_process(self.accelerator, failed)[0]
        self._failed_saves = self._failed_saves + 1 if failed else 0
        if self._failed_saves == _SAVE_FAILURES:
            raise RunFailed(f"{_SAVE_FAILURES} checkpoints in a row could not be written")
        self._saved_at = self.run.elapsed_seconds
        self._saved_update = self._saved_update if failed else self.update
        return not failed

    def _write(self, means: list[Any]) -> bool:
        try:
            facts = {"processes": len(means)}
            folder = checkpoint.save(self.root, self.update, self._pack(means), facts)
        except OSError as error:
            log.warning("checkpoint at update %d could not be written: %s", self.update, error)
            return False
        best = self.best.get("update")
        self.run.note(checkpoint={"latest": folder.name, "best": best})
        checkpoint.prune(self.root, self.settings.keep, best)
        return True

    def _pack(self, means: list[Any]) -> dict[str, checkpoint.Content]:
        position = {
            "update": self.update,
            "epoch": self.epoch,
            "batch": self.batch,
            "best": self.best,
            "stale_epochs": self.stale_epochs,
            "extra": self.extra,
            "means": means,
        }
        scaler = self.accelerator.scaler
        return state.pack(self.module, self.optimizer, scaler, self._tracked, position)

    def _restore(self) -> None:
        """Continue where the newest checkpoint stands; from the start if there is none."""
        if not self.run.resuming:
            return
        fall_back = self.run.resuming == "auto"
        folder = agree(self.accelerator, lambda: checkpoint.choose(self.root, fall_back=fall_back))
        words = "no checkpoint yet: starting from the beginning"
        if folder.name:
            self._load(folder)
            words = f"resumed at update {self.update} of {self.total_updates}"
        log.info(words)
        self.run.write_settings()
        if self.run.is_main:
            self.metrics.keep_until(checkpoint.update_of(folder))

    def _load(self, folder: Path) -> None:
        accelerator = self.accelerator
        files, manifest = checkpoint.read(folder)
        if manifest["processes"] != accelerator.num_processes:
            raise UserError(
                f"{self.run.folder}: begun with {manifest['processes']} processes,"
                f" resumed with {accelerator.num_processes}"
            )
        position, self._tracked_state = state.unpack(
            files, str(folder), self.module, self.optimizer, accelerator.scaler
        )
        for name in ("update", "epoch", "batch", "best", "stale_epochs", "extra"):
            setattr(self, name, position[name])
        mine = position["means"][accelerator.process_index]
        self.epoch_means.restore(mine["epoch"], accelerator.device)
        self.window.restore(mine["window"], accelerator.device)
        self._saved_update = self.update
