"""The order of samples, and the batches of tensors and of files."""

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moectl.engine.errors import UserError
from moectl.engine.sections import TrainSection
from moectl.engine.sources import FolderSource, Stream, TensorSource, stream_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(("samples", "batch"), [(30, 8), (32, 8), (3, 8), (1, 1), (9, 4)])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_an_epoch_is_the_order_dealt_out(
    samples: int, batch: int, world: int, accumulate: int
) -> None:
    if batch % (world * accumulate):
        return
    streams = [Stream(samples, batch, 7, rank, world, accumulate) for rank in range(world)]
    chunks = [list(stream.epoch(3)) for stream in streams]
    order = streams[0].order(3)
    assert sorted(order.tolist()) == list(range(samples))
    for number in range(streams[0].batches_per_epoch):
        parts = [part for hand in chunks for part in hand if part.batch == number]
        size = parts[0].size
        rows = torch.full((size,), -1)
        for part in parts:
            assert part.size == size
            assert len(part.rows) >= 1
            rows[part.slots] = part.rows
        whole = order[number * batch : (number + 1) * batch]
        assert rows[: len(whole)].tolist() == whole.tolist(), "each sample once, in its slot"
        assert set(rows.tolist()) == set(whole.tolist()), "padding repeats samples of the batch"
        assert size == max(len(whole), world * accumulate)
    for hand in chunks:
        ends = [part.ends_update for part in hand]
        assert ends == ([False] * (accumulate - 1) + [True]) * streams[0].batches_per_epoch


def test_a_stream_starts_anywhere() -> None:
    stream = Stream(30, 8, 1)
    whole = [(c.epoch, c.batch, c.rows.tolist()) for c in stream.chunks(0, 0, 3)]
    assert len(whole) == 12
    for place in range(12):
        epoch, batch = divmod(place, 4)
        rest = [(c.epoch, c.batch, c.rows.tolist()) for c in stream.chunks(epoch, batch, 3)]
        assert rest == whole[place:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(Stream(30, 8, seed).order(epoch).tolist()) for seed in (1, 2) for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("samples", "world", "accumulate", "batches"),
    [
        (24, 1, 1, 3),
        (25, 1, 1, 3),  # one sample is left
        (26, 1, 1, 4),
        (26, 2, 1, 3),
        (27, 2, 1, 3),  # two and one
        (28, 2, 1, 4),
        (27, 1, 2, 3),
        (28, 1, 2, 4),
        (31, 2, 2, 3),
        (32, 2, 2, 4),
    ],
)
def test_a_last_batch_with_a_chunk_below_the_smallest_is_left_out(
    samples: int, world: int, accumulate: int, batches: int
) -> None:
    for rank in range(world):
        stream = Stream(samples, 8, 7, rank, world, accumulate, smallest=2)
        chunks = list(stream.epoch(3))
        assert stream.batches_per_epoch == batches
        assert len(chunks) == batches * accumulate
        assert min(len(chunk.rows) for chunk in chunks) >= 2


def test_what_is_left_out_differs_between_epochs() -> None:
    stream = Stream(25, 8, 7, smallest=2)
    seen = [torch.cat([chunk.rows for chunk in stream.epoch(number)]) for number in range(4)]
    missing = [set(range(25)) - set(rows.tolist()) for rows in seen]
    assert all(len(rows) == 1 for rows in missing)
    assert len(set.union(*missing)) > 1


def test_a_smallest_of_one_leaves_nothing_out() -> None:
    for samples in range(1, 20):
        for rank in range(2):
            given = Stream(samples, 8, 7, rank, 2, smallest=1)
            plain = Stream(samples, 8, 7, rank, 2)
            assert given.batches_per_epoch == -(-samples // 8)
            assert [c.rows.tolist() for c in given.epoch(0)] == [
                c.rows.tolist() for c in plain.epoch(0)
            ]


def accelerator(rank: int, world: int) -> Any:
    return SimpleNamespace(num_processes=world, process_index=rank)


def test_every_process_gets_its_own_hand_of_the_same_order() -> None:
    train = TrainSection(batch_size=8, seed=3, accumulate=2)
    for rank in range(2):
        found = stream_of(29, train, accelerator(rank, 2), smallest=2)
        assert found == Stream(29, 8, 3, rank, 2, 2, smallest=2)


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"9 does not divide by 2 processes x train.accumulate = 1"):
        stream_of(29, TrainSection(batch_size=9), accelerator(0, 2))


def test_a_batch_must_leave_every_process_enough_samples() -> None:
    train = TrainSection(batch_size=2)
    assert stream_of(100, train, accelerator(0, 1), smallest=2).batches_per_epoch == 50
    with pytest.raises(UserError, match="2 leaves a process fewer than 2 samples"):
        stream_of(100, train, accelerator(0, 2), smallest=2)


def test_data_too_small_for_a_single_batch_is_refused() -> None:
    train = TrainSection(batch_size=8)
    assert stream_of(4, train, accelerator(1, 2), smallest=2).batches_per_epoch == 1
    with pytest.raises(UserError, match="3 training images are too few for 2 processes"):
        stream_of(3, train, accelerator(1, 2), smallest=2)
    assert stream_of(3, train, accelerator(1, 2)).batches_per_epoch == 1


class Noise:
    draws = 3

    def __call__(self, images: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        assert uniforms.shape == (len(images), 3)
        return images.float() + uniforms[:, 0].view(-1, 1, 1, 1)


def tensors(samples: int = 30) -> TensorSource:
    images = torch.arange(samples, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return TensorSource(images.clone(), torch.arange(samples), Noise(), lambda batch: batch / 2)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_a_sample_is_augmented_alike_however_the_batch_is_cut(world: int, accumulate: int) -> None:
    def gather(source: Any, world: int, accumulate: int) -> dict[tuple[int, int], torch.Tensor]:
        found = {}
        for rank in range(world):
            stream = Stream(30, 8, 7, rank, world, accumulate)
            chunks = list(stream.epoch(1))
            for chunk, (images, labels) in zip(
                chunks, source.batches(iter(chunks), 7, CPU), strict=True
            ):
                assert labels.tolist() == chunk.rows.tolist()
                for slot, image in zip(chunk.slots.tolist(), images, strict=True):
                    found[chunk.batch, slot] = image
        return found

    whole, cut = gather(tensors(), 1, 1), gather(tensors(), world, accumulate)
    assert all(torch.equal(whole[place], cut[place]) for place in whole)


def test_the_first_batch_after_a_resume_is_the_one_that_was_next() -> None:
    stream, source = Stream(30, 8, 7), tensors()
    whole = [images for images, _ in source.batches(stream.chunks(0, 0, 2), 7, CPU)]
    torch.rand(5)  # the global generator does not matter
    later = next(source.batches(stream.chunks(1, 1, 2), 7, CPU))[0]
    assert torch.equal(later, whole[5])


def test_without_augmentation_the_plain_transform_is_used() -> None:
    source = tensors()
    source.augment = None
    images, labels = next(source.batches(Stream(30, 8, 7).epoch(0), 7, CPU))
    assert images[:, 0, 0, 0].tolist() == (labels / 2).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once_in_order(world: int) -> None:
    for source in (tensors(7), folder(7, 0)):
        for rank in range(world):
            labels = torch.cat([y for _, y in source.ordered(2, CPU, rank, world)])
            assert labels.tolist() == list(range(7))[rank::world]


def test_labels_and_images_must_match() -> None:
    with pytest.raises(AssertionError, match="one label per image"):
        TensorSource(torch.zeros(2, 3, 1, 1), torch.zeros(3), None, lambda batch: batch)


def folder(samples: int, workers: int) -> FolderSource:
    def plain(path: str) -> torch.Tensor:
        return torch.full((1,), float(path))

    items = [(str(row), row) for row in range(samples)]
    return FolderSource(items, lambda path: plain(path) + torch.rand(1), plain, workers)


def test_more_workers_than_cores_are_no_reason_to_warn() -> None:
    assert sum(len(labels) for _, labels in folder(20, 64).ordered(8, CPU)) == 20


def test_loader_workers_give_the_same_batches_as_none() -> None:
    def batches(workers: int) -> list[Any]:
        torch.rand(workers)  # what was drawn before does not matter
        chunks = Stream(20, 8, 7).chunks(0, 1, 2)
        return [
            (images.tolist(), labels.tolist())
            for images, labels in folder(20, workers).batches(chunks, 7, CPU)
        ]

    alone = batches(0)
    assert len(alone) == 5
    assert batches(2) == alone
    drawn = {value for images, _ in alone for (value,) in images}
    assert len(drawn) == sum(len(labels) for _, labels in alone), "every sample draws its own"


def test_a_sample_draws_anew_in_every_epoch() -> None:
    source = folder(8, 0)
    epochs = [
        {label: image for images, labels in source.batches(Stream(8, 8, 7).epoch(epoch), 7, CPU)
         for image, label in zip(images.tolist(), labels.tolist(), strict=True)}
        for epoch in (0, 1)
    ]  # fmt: skip
    assert all(epochs[0][label] != epochs[1][label] for label in range(8))


def test_making_a_loader_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(islice(folder(8, 0).ordered(4, CPU), 0))
    source = folder(8, 2)
    next(source.batches(Stream(8, 4, 7).epoch(0), 7, CPU))
    assert torch.equal(torch.get_rng_state(), before)
