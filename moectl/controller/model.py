"""The controller: from features and a latency budget to scores of every part of a plan.

Letters: B samples, D width of the budget's code, H hidden width, L blocks, T tiers, N counts of
active blocks, O optional blocks, J numbers of experts.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SAME = 1e-6  # spread of a feature that does not vary


class Scores(NamedTuple):
    """Logits of the parts of a plan."""

    tier: Tensor
    """(B, T)."""
    count: Tensor  # type: ignore[assignment]  # tuples have a method of that name
    """(B, N) of the numbers of active blocks."""
    blocks: Tensor
    """(B, O) of the blocks that may be skipped."""
    top_k: Tensor
    """(B, L, J), or (B, 1, J) if all blocks share a number; rows of blocks without a choice are not
    used."""

    @property
    def shared(self) -> bool:
        """Whether all blocks share a number of experts."""
        return self.top_k.shape[1] == 1


class BudgetEncoder(nn.Module):
    """Code a latency budget.

    The budget's place between the ends is spread over `scale` radians: within one radian all codes
    look alike.

    Args:
        width: of the code that comes out.
        low: budget in milliseconds that is coded as 0; below it nothing changes.
        high: likewise as `scale`.
        dim: numbers of the sinusoid.
        scale: see above; the original has 1.
        sinusoidal: else one linear layer reads the place.
    """

    rates: Tensor

    def __init__(
        self,
        *,
        width: int = 2048,
        low: float = 50.0,
        high: float = 500.0,
        dim: int = 256,
        scale: float = 1000.0,
        sinusoidal: bool = True,
    ) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"budgets from {low} to {high}: expected a range")
        self.low, self.high, self.scale = low, high, scale
        rates = torch.exp(-math.log(10000.0) * torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.register_buffer("rates", rates, persistent=False)
        self.sinusoidal = sinusoidal
        if not sinusoidal:
            self.mlp: nn.Module = nn.Linear(1, width)
            return
        self.mlp = nn.Sequential(
            nn.Linear(dim, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )

    def place(self, budgets: Tensor) -> Tensor:
        """Return where budgets (B,) lie between the ends, 0 to 1."""
        return ((budgets.float() - self.low) / (self.high - self.low)).clamp(0, 1)

    def sinusoid(self, budgets: Tensor) -> Tensor:
        """Return sines and cosines in turn, (B, dim), of budgets (B,) in milliseconds."""
        angles = self.place(budgets)[:, None] * self.scale * self.rates
        return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)

    def forward(self, budgets: Tensor) -> Tensor:
        """Map budgets (B,) in milliseconds to codes (B, D)."""
        seen = self.sinusoid(budgets) if self.sinusoidal else self.place(budgets)[:, None]
        found: Tensor = self.mlp(seen)
        return found


def _projection(inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout)
    )


class Controller(nn.Module):
    """Choose tier, number of active blocks, blocks, and experts of each block, in one stage.

    Args:
        vision: width of the image's feature.
        language: width of the question's feature.
        budget: width of the budget's code.
        tiers: T.
        counts: N.
        optional: O.
        blocks: L, or 1 if all blocks share a number of experts.
        choices: J; 1 where there are no experts.
        hidden: H.
        dropout: in training.
    """

    vision_mean: Tensor
    vision_std: Tensor
    language_mean: Tensor
    language_std: Tensor

    def __init__(  # noqa: PLR0913
        self,
        *,
        vision: int,
        language: int,
        budget: int,
        tiers: int,
        counts: int,
        optional: int,
        blocks: int,
        choices: int,
        hidden: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.blocks, self.choices = blocks, choices
        for name, width in (("vision", vision), ("language", language)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.vision_proj = _projection(vision, hidden, dropout)
        self.language_proj = _projection(language, hidden, dropout)
        self.budget_proj = _projection(budget, hidden, dropout)
        self.fusion = nn.Sequential(
            *_projection(3 * hidden, hidden, dropout), nn.Linear(hidden, hidden)
        )
        self.tier_head = nn.Linear(hidden, tiers)
        self.count_head = nn.Linear(hidden, counts)
        self.block_head = nn.Linear(hidden, optional)
        self.top_k_head = nn.Linear(hidden, blocks * choices)

    def standardise(self, vision: Tensor, language: Tensor) -> None:
        """Measure features from now on by how they vary over questions, (N, ...) each.

        Means of embeddings are small numbers that differ little: beside the biases of the first
        layers they would hardly show.
        """
        for name, features in (("vision", vision), ("language", language)):
            spread = features.std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(features.mean(0))
            getattr(self, f"{name}_std").copy_(spread.where(spread > _SAME, 1.0))

    def forward(self, vision: Tensor, language: Tensor, budget: Tensor) -> Scores:
        """Map features (B, ...) and codes (B, D) to the logits of a plan's parts."""
        parts = [
            self.vision_proj((vision - self.vision_mean) / self.vision_std),
            self.language_proj((language - self.language_mean) / self.language_std),
            self.budget_proj(budget),
        ]
        fused = self.fusion(torch.cat(parts, 1))
        top_k = self.top_k_head(fused).view(-1, self.blocks, self.choices)
        return Scores(self.tier_head(fused), self.count_head(fused), self.block_head(fused), top_k)


class Policy(nn.Module):
    """Budget encoder and controller, trained together."""

    def __init__(self, budget_encoder: BudgetEncoder, controller: Controller) -> None:
        super().__init__()
        self.budget_encoder = budget_encoder
        self.controller = controller

    def forward(self, vision: Tensor, text: Tensor, budgets: Tensor) -> Scores:
        """Map features (B, ...) and budgets (B,) to the logits of a plan's parts."""
        scores: Scores = self.controller(vision, text, self.budget_encoder(budgets))
        return scores


def build(arguments: Mapping[str, Any]) -> Policy:
    """Build what a sidecar describes: arguments of the budget encoder and of the controller."""
    encoder = BudgetEncoder(**arguments["budget_encoder"])
    return Policy(encoder, Controller(**arguments["controller"]))
