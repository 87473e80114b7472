"""Features of images that stay the same, computed once and read from disk ever after.

Letters: N images, F channels, H W feature grid.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moectl.engine.errors import Interrupted, RunFailed
from moectl.engine.files import sync_folder
from moectl.engine.sources import Chunk, FolderSource

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moectl.csr.data import Part
    from moectl.csr.model import Backbone
    from moectl.engine.signals import StopRequest

log = logging.getLogger(__name__)

_SYNC_EVERY = 16  # batches between writes of what is done
_HINT = "--feature-cache DIR keeps features elsewhere, off computes them in every epoch"


class FeatureSource:
    """Batches ((features,), rows) of an array (N, F, H, W) on disk."""

    def __init__(self, features: NDArray[np.float32]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def batches(
        self,
        chunks: Iterator[Chunk],
        seed: int,  # noqa: ARG002 - as every source
        device: torch.device,
    ) -> Iterator[Any]:
        """Yield the features and rows of each chunk, on the device."""
        for chunk in chunks:
            yield self._at(chunk.rows, device)

    def ordered(
        self, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> Iterator[Any]:
        """Yield features and rows in order; a process sees every world-th image."""
        for rows in torch.split(torch.arange(rank, len(self), world), batch_size):
            yield self._at(rows, device)

    def _at(self, rows: Tensor, device: torch.device) -> tuple[tuple[Tensor], Tensor]:
        features = torch.from_numpy(self.features[rows.numpy()])
        return (features.to(device, non_blocking=True),), rows.to(device)


def features_of(  # noqa: PLR0913 - what makes features what they are
    root: Path,
    part: "Part",
    backbone: "Backbone",
    transform: Sequence[Any],
    accelerator: "Accelerator",
    batch_size: int,
    stop: "StopRequest | None" = None,
) -> FeatureSource:
    """Return the features of all images of a part, computing what is not there yet.

    Every process computes its share. What an interrupted call has computed is kept, and the next
    one goes on after it, with the same batches: the digits are those of a call that nothing
    disturbed.

    Args:
        root: a folder for the features of any networks and images.
        part: the images; their plain transform is used.
        backbone: in evaluation mode, on the device.
        transform: plain values that describe the transform.
        accelerator: devices and processes.
        batch_size: images per forward pass.
        stop: whether to stop early.

    Raises:
        RunFailed: if there is no space for them.
        Interrupted: if it was asked to stop; the next call goes on.
    """
    backbone.eval()
    name = cache_key(part, backbone, [*transform, str(accelerator.mixed_precision)])
    folder = root / name[:24]
    if accelerator.is_main_process and not (folder / "done.npy").exists():
        _reserve(folder, _shape(part, backbone, accelerator.device))
    accelerator.wait_for_everyone()
    for batch in _compute(folder, part, backbone, accelerator, batch_size):
        if stop and batch % _SYNC_EVERY == 0:
            raise Interrupted(f"{stop.reason} while features are computed", "--resume goes on")
    accelerator.wait_for_everyone()
    return FeatureSource(np.load(folder / "features.npy", mmap_mode="r"))


def cache_key(part: "Part", backbone: "Backbone", transform: Sequence[Any]) -> str:
    """Return a name that changes with the weights, the transform and any image."""
    digest = hashlib.sha256(json.dumps([list(transform), part.identities]).encode())
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _shape(part: "Part", backbone: "Backbone", device: torch.device) -> tuple[int, ...]:
    (images, _), _ = next(iter(_some(part, [0]).ordered(1, device)))
    return len(part.source), *backbone(images).shape[1:]


def _some(part: "Part", places: Sequence[int]) -> FolderSource:
    still = part.still
    items = [still.items[place] for place in places]
    return FolderSource(items, still.plain, still.plain, still.workers)


def _reserve(folder: Path, shape: tuple[int, ...]) -> None:
    """Make room for features, none of them done."""
    needed = 4 * int(np.prod(shape))
    new = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        free = shutil.disk_usage(new).free
        if free < needed:
            raise RunFailed(
                f"{folder.parent}: features take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are"
                f" free; {_HINT}"
            )
        np.lib.format.open_memmap(new / "features.npy", "w+", np.float32, shape)
        np.save(new / "done.npy", np.zeros(shape[0], np.uint8))
        new.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be written ({error.strerror}); {_HINT}") from None


def _compute(
    folder: Path, part: "Part", backbone: "Backbone", accelerator: "Accelerator", batch_size: int
) -> Iterator[int]:
    """Compute this process's share of what is not done; yields after every batch."""
    done = np.load(folder / "done.npy", mmap_mode="r+")
    rows = range(accelerator.process_index, len(done), accelerator.num_processes)
    shares = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    places = [row for share in shares if not all(done[list(share)]) for row in share]
    if not places:
        return
    log.info("features of %d images: computed once, kept in %s", len(places), folder)
    written: list[int] = []
    # Through a file, not the map: a full disk is an error there, and the end of the process here.
    with (folder / "features.npy").open("r+b") as file:
        start = _header(file)
        batches = _some(part, places).ordered(batch_size, accelerator.device)
        for number, ((images, _), found) in enumerate(batches, 1):
            with torch.no_grad(), accelerator.autocast():
                features = backbone(images).float().cpu().numpy()
            try:
                for row, values in zip(found.tolist(), features, strict=True):
                    file.seek(start + row * values.nbytes)
                    file.write(values.tobytes())
                    written.append(row)
                if number % _SYNC_EVERY == 0 or len(written) == len(places):
                    file.flush()
                    os.fsync(file.fileno())
                    done[written] = 1
                    done.flush()
            except OSError as error:
                raise RunFailed(
                    f"{folder}: cannot be written ({error.strerror}); {_HINT}"
                ) from None
            yield number


def _header(file: Any) -> int:
    """Return where the values of an .npy file begin."""
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return int(file.tell())
