"""Running a model over a whole data source, in order, over all processes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moectl.engine.launch import gather_rows
from moectl.engine.sources import Source

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor],
    source: Source,
    accelerator: "Accelerator",
    batch_size: int,
    batches: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return outputs (N, …) in fp32 and labels (N,), in order, on the CPU.

    Args:
        forward: from images to what is kept of a model's output; the same on every process.
        source: the data; dealt out over all processes.
        accelerator: devices and processes.
        batch_size: images per forward pass.
        batches: stop after so many; 0 takes all.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    kept, truth = [], []
    ordered = source.ordered(batch_size, accelerator.device, rank, world)
    for number, (images, labels) in enumerate(ordered, 1):
        with accelerator.autocast():
            outputs = forward(images)
        kept.append(outputs.float())
        truth.append(labels)
        if number == batches:
            break
    total = len(source)
    outputs = gather_rows(accelerator, torch.cat(kept), total).cpu()
    return outputs, gather_rows(accelerator, torch.cat(truth), total).cpu()
