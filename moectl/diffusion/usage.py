"""How many images each expert of each block gets.

Letters: B images, L blocks of experts, E experts, K chosen experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moectl.diffusion.losses import load, shares


def counts(logits: Sequence[Tensor], k_active: int) -> Tensor:
    """Return the assignments of every expert, (L, E), from the routers' logits (B, E) each."""
    found = [shares(one, k_active) * (len(one) * k_active) for one in logits]
    return torch.stack(found).round()


class Usage(nn.Module):
    """Counts assignments over all processes: of the update at hand, and of the epoch.

    Args:
        shape: L and E.
        k_active: K.
        processes: how many count.
        cuts: micro-batches of an update.
    """

    epoch: Tensor
    """(L, E) assignments of this epoch so far; saved with the training state."""
    last: Tensor
    """(L, E) assignments of the last whole update; saved too."""
    update: Tensor
    """(L, E) assignments of this update so far."""

    def __init__(self, shape: tuple[int, int], k_active: int, processes: int, cuts: int) -> None:
        super().__init__()
        self.k_active, self.processes, self.cuts = k_active, processes, cuts
        self.register_buffer("epoch", torch.zeros(shape))
        self.register_buffer("last", torch.zeros(shape))
        self.register_buffer("update", torch.zeros(shape), persistent=False)

    def add(self, logits: Sequence[Tensor], *, ends_update: bool) -> list[Tensor]:
        """Count a micro-batch, and return each block's shares (E,) to balance it by.

        Routing is per image: a part of a batch has too few of them for its own shares to say
        anything about the load. They are those of the whole update; where that is cut, those of the
        update before, as the rest of this one is not known yet.

        Source: Qiu et al. 2025 (balance over the global batch).
        """
        if not logits:
            return []
        own = counts(logits, self.k_active)
        if self.processes > 1:
            torch.distributed.all_reduce(own)
        self.epoch += own
        so_far = self.update + own
        known = so_far if self.cuts == 1 else self.last.where(self.last.sum() > 0, so_far)
        if ends_update:
            self.last = so_far
        self.update = torch.zeros_like(so_far) if ends_update else so_far
        return list(known / known.sum(1, keepdim=True))

    def summary(self, blocks: Sequence[str]) -> dict[str, float]:
        """Describe the epoch, and begin the next one.

        Args:
            blocks: (L,) names.

        Returns:
            Of the worst block: the largest share of an expert times E, and the entropy over log E;
            of all blocks the number of experts without an image; and that share of each block.
        """
        found = [load(one / one.sum()) for one in self.epoch]
        words = {
            "load/largest": float(torch.stack([one.largest for one in found]).max()),
            "load/entropy": float(torch.stack([one.entropy for one in found]).min()),
            "load/dead": float((self.epoch == 0).sum()),
        }
        for name, one in zip(blocks, found, strict=True):
            words[f"load/largest/{name.replace(' ', '_')}"] = float(one.largest)
        self.epoch.zero_()
        return words
