"""The learning rate falls when validation stops improving."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau


class Plateau:
    """A factor on the learning rate, by torch's ReduceLROnPlateau on a score to be maximised.

    Args:
        factor: of each reduction.
        patience: epochs without a better score before one.
    """

    def __init__(self, factor: float, patience: int) -> None:
        # A stand-in: the training loop multiplies its own rates by the factor.
        self._rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        # Relative to a score below 0, even the same score again would count as better.
        self._plateau = ReduceLROnPlateau(self._rate, "max", factor, patience, threshold_mode="abs")

    def factor(self, _: float) -> float:
        """Return the factor; the position plays no part."""
        return float(self._rate.param_groups[0]["lr"])

    def step(self, score: float) -> None:
        """Take the score of an epoch."""
        self._plateau.step(score)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plateau = self._plateau
        return {
            "factor": self.factor(0), "best": float(plateau.best),
            "num_bad_epochs": plateau.num_bad_epochs, "last_epoch": plateau.last_epoch,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._rate.param_groups[0]["lr"] = state["factor"]
        for name in ("best", "num_bad_epochs", "last_epoch"):
            setattr(self._plateau, name, state[name])
