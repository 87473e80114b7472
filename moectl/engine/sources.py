"""Where batches come from: the order of the samples, and two ways to hold them.

Legend: N samples, B samples of one optimiser update over all processes, b of them in this chunk.
"""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moectl.engine.errors import UserError
from moectl.engine.launch import cores
from moectl.engine.seeding import key

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.engine.sections import TrainSection


class Chunk(NamedTuple):
    """The part of one update's batch that one process handles in one forward pass."""

    epoch: int
    batch: int
    """Number of the batch in its epoch."""
    rows: Tensor
    """(b,) positions in the data set."""
    slots: Tensor
    """(b,) positions inside the global batch."""
    size: int
    """B, the size of the global batch."""
    ends_update: bool
    """Whether this is the last chunk of the batch on this process."""


@dataclass(frozen=True)
class Stream:
    """The order of samples over all epochs, a pure function of (seed, epoch).

    Every batch of `batch_size` samples is dealt out like cards to `world` processes, and each hand
    is cut into `accumulate` chunks. The last, smaller batch of an epoch is kept, and padded by
    repeating its samples only if it has fewer of them than there are chunks. It is left out if a
    chunk would have fewer than `smallest` samples: batch norm has no variance of one.
    """

    samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    smallest: int = 1

    @property
    def batches_per_epoch(self) -> int:
        """Optimiser updates in one pass over the data."""
        whole, rest = divmod(self.samples, self.batch_size)
        needed = self.smallest * self.world * self.accumulate if self.smallest > 1 else 1
        return whole + (rest >= needed)

    def order(self, epoch: int) -> Tensor:
        """Return the permutation (N,) of an epoch."""
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Chunk]:
        """Yield this process's chunks of one epoch, from batch `start` on."""
        order = self.order(epoch)
        hands = self.world * self.accumulate
        for batch in range(start, self.batches_per_epoch):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if len(rows) < hands:
                rows = rows.repeat(-(-hands // len(rows)))[:hands]
            for part in range(self.accumulate):
                slots = torch.arange(self.rank + part * self.world, len(rows), hands)
                last = part == self.accumulate - 1
                yield Chunk(epoch, batch, rows[slots], slots, len(rows), last)

    def chunks(self, epoch: int, start: int, epochs: int) -> Iterator[Chunk]:
        """Yield the chunks of all epochs from a position to the end."""
        for number in range(epoch, epochs):
            yield from self.epoch(number, start if number == epoch else 0)


def stream_of(
    samples: int, train: "TrainSection", accelerator: "Accelerator", smallest: int = 1
) -> Stream:
    """Return the stream of this process.

    Raises:
        UserError: if the batch size does not divide over processes and micro-batches, or the data
            is too small for a single batch.
    """
    world = accelerator.num_processes
    if train.batch_size % (world * train.accumulate):
        raise UserError(
            f"train.batch_size = {train.batch_size} does not divide by {world} processes"
            f" x train.accumulate = {train.accumulate}"
        )
    if train.batch_size < smallest * world * train.accumulate:
        raise UserError(
            f"train.batch_size = {train.batch_size} leaves a process fewer than {smallest} samples"
        )
    rank = accelerator.process_index
    stream = Stream(samples, train.batch_size, train.seed, rank, world, train.accumulate, smallest)
    if not stream.batches_per_epoch:
        raise UserError(f"{samples} training images are too few for {world} processes")
    return stream


class Augment(Protocol):
    """A batched random transform, written as a pure function of uniform numbers."""

    draws: int
    """Uniform numbers per sample."""

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Map uint8 (b, C, H, W) and uniforms (b, draws) to float32 (b, C, H, W)."""
        ...


class Source(Protocol):
    """What the training loop and the evaluation need of a data set."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def batches(self, chunks: Iterator[Chunk], seed: int, device: torch.device) -> Iterator[Any]:
        """Yield the augmented (images, labels) of each chunk, on the device."""
        ...

    def ordered(
        self, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield plain (images, labels) in data-set order; a process sees every world-th sample."""
        ...


class TensorSource:
    """Images that fit in memory: uint8 on the device, augmented there a batch at a time.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        augment: random transform of the training batches.
        plain: the transform of evaluation batches, uint8 to float32.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augment: Augment | None,
        plain: Callable[[Tensor], Tensor],
    ) -> None:
        assert len(images) == len(labels), "one label per image"
        self.images, self.labels, self.augment, self.plain = images, labels, augment, plain

    def __len__(self) -> int:
        return len(self.labels)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.images.device != device:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self.images, self.labels

    def batches(
        self, chunks: Iterator[Chunk], seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented (images, labels) of each chunk, on the device."""
        images, labels = self._on(device)
        for chunk in chunks:
            rows = chunk.rows.to(device, non_blocking=True)
            picked = images[rows]
            if self.augment is None:
                yield self.plain(picked), labels[rows]
                continue
            # Drawn for the whole global batch on the CPU: the same for any number of
            # processes and any device.
            generator = torch.Generator().manual_seed(
                key(seed, "augment", chunk.epoch, chunk.batch)
            )
            uniforms = torch.rand(chunk.size, self.augment.draws, generator=generator)
            uniforms = uniforms[chunk.slots].to(device, non_blocking=True)
            yield self.augment(picked, uniforms), labels[rows]

    def ordered(
        self, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield plain (images, labels) in data-set order; a process sees every world-th sample."""
        images, labels = self._on(device)
        rows = torch.arange(rank, len(self), world, device=device)
        for part in torch.split(rows, batch_size):
            yield self.plain(images[part]), labels[part]


class Keyed(torch.utils.data.Dataset[Any]):
    """Seeds torch from (seed, epoch, index) before each item: workers change nothing.

    Augmentations must draw from torch alone, as torchvision's do.
    """

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Any], seed: int) -> None:
        self.items, self.load, self.seed = items, load, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        torch.default_generator.manual_seed(key(self.seed, "sample", epoch, index))
        return self.load(self.items[index])


def _calm_worker(_: int) -> None:
    """Let a worker outlive signals meant for the main process, which must still save."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that are left: Python asks with SIGTERM, which they ignore, and waits."""
    for child in multiprocessing.active_children():
        child.kill()


def _collate(samples: list[Any]) -> Any:
    """Stack samples; if one could not be read, pass its error on instead."""
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    return errors[0] if errors else torch.utils.data.default_collate(samples)


class FolderSource:
    """Images read from files by loader workers, one at a time.

    Args:
        items: (path, label) pairs.
        augment: loads and randomly transforms the image at a path, in training.
        plain: loads and transforms it in evaluation.
        workers: loader processes, at most one per core; 0 reads in the main process.
        finish: the last transform, of a whole batch on the device, so that workers may send bytes.
    """

    def __init__(
        self,
        items: Sequence[tuple[str, int]],
        augment: Callable[[str], Tensor],
        plain: Callable[[str], Tensor],
        workers: int,
        finish: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> None:
        self.items, self.augment, self.plain = items, augment, plain
        self.workers, self.finish = workers, finish

    def __len__(self) -> int:
        return len(self.items)

    def batches(
        self, chunks: Iterator[Chunk], seed: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the augmented (images, labels) of each chunk, on the device."""
        places = ([(chunk.epoch, row) for row in chunk.rows.tolist()] for chunk in chunks)
        yield from self._load(places, self.augment, seed, device)

    def ordered(
        self, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield plain (images, labels) in data-set order; a process sees every world-th sample."""
        rows = range(rank, len(self), world)
        places = (
            [(0, row) for row in rows[start : start + batch_size]]
            for start in range(0, len(rows), batch_size)
        )
        yield from self._load(places, self.plain, 0, device)

    def _load(
        self,
        places: Iterator[list[tuple[int, int]]],
        read: Callable[[str], Tensor],
        seed: int,
        device: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from accelerate.utils import send_to_device

        def load(item: tuple[str, int]) -> tuple[Tensor, int] | UserError:
            try:
                return read(item[0]), item[1]
            except UserError as error:
                return error  # raised in a worker, its message would drag a traceback along

        workers = min(self.workers, cores())  # torch warns of more
        loader = torch.utils.data.DataLoader(
            Keyed(self.items, load, seed),
            batch_sampler=places,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_calm_worker,
            # Workers never touch a GPU, and what they read with need not be picklable.
            multiprocessing_context="fork" if workers else None,
            # Building the loader must not touch the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = send_to_device(batch, device, non_blocking=True)
            yield self.finish(images), labels
