"""The diffusion process: from an image to noise, step by step.

Letters: B images, T steps. Alphas are cumulative products of 1 - beta, (T,).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from moectl.diffusion.losses import Prediction

Schedule = Literal["linear", "cosine"]

_LINEAR = (1e-4, 0.02)
_OFFSET, _LARGEST = 0.008, 0.999


def betas(schedule: Schedule, steps: int) -> Tensor:
    """Variance that each step adds, (T,) float64.

    That of "linear" is for 1000 steps; with fewer of them each adds more, so that all end in noise.

    Sources: Ho et al. 2020 (linear); Nichol and Dhariwal 2021 (cosine, and other numbers of steps).
    """
    if schedule == "linear":
        curve = torch.linspace(*_LINEAR, steps, dtype=torch.float64)
        return (curve * 1000 / steps).clamp(max=_LARGEST)
    places = torch.arange(steps + 1, dtype=torch.float64) / steps
    curve = ((places + _OFFSET) / (1 + _OFFSET) * math.pi / 2).cos().square()
    return (1 - curve[1:] / curve[:-1]).clamp(max=_LARGEST)


class GaussianDiffusion(nn.Module):
    """Noise images, and say what a network should predict.

    Args:
        schedule: of the variances.
        steps: T.
        prediction: the noise, or the velocity v.
    """

    alphas: Tensor
    """(T,) float32."""

    def __init__(
        self,
        schedule: Schedule = "linear",
        steps: int = 1000,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__()
        self.steps, self.prediction = steps, prediction
        self.betas = betas(schedule, steps)
        """(T,) float64, on the CPU."""
        self.register_buffer("alphas", (1 - self.betas).cumprod(0).float(), persistent=False)

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of image and noise at steps (B,), (B, 1, 1, 1)."""
        wide = torch.promote_types(like.dtype, torch.float32)
        alphas = self.alphas[t].view(-1, *[1] * (like.ndim - 1)).to(wide)
        return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return noised images.

        Args:
            x0: (B, …) images.
            t: (B,) steps, from 0 to T - 1.
            noise: like x0.

        Returns:
            Like x0.

        Source: Ho et al. 2020.
        """
        signal, rest = self._at(t, x0)
        return signal * x0 + rest * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what the network should predict.

        Args:
            x0: (B, …) images.
            t: (B,) steps.
            noise: like x0.

        Returns:
            Like x0.

        Source: Salimans and Ho 2022 (v).
        """
        if self.prediction == "epsilon":
            return noise
        signal, rest = self._at(t, x0)
        return signal * noise - rest * x0

    def clean(self, x: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """Return the images that predictions stand for.

        Args:
            x: (B, …) noised images.
            t: (B,) their steps.
            predicted: like x.

        Returns:
            Like x.

        Source: Ho et al. 2020; Salimans and Ho 2022 (v).
        """
        signal, rest = self._at(t, x)
        if self.prediction == "epsilon":
            return (x - rest * predicted) / signal
        return signal * x - rest * predicted

    def noise(self, x: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """Return the noise that predictions stand for.

        Args:
            x: (B, …) noised images.
            t: (B,) their steps.
            predicted: like x.

        Returns:
            Like x.

        Source: Salimans and Ho 2022 (v).
        """
        if self.prediction == "epsilon":
            return predicted
        signal, rest = self._at(t, x)
        return signal * predicted + rest * x
