"""What a step of the training minimises.

Letters: B questions, G plans of each, P = B x G, D width of a feature.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moectl.controller.losses import divergence, policy_loss
from moectl.controller.model import Policy
from moectl.controller.policy import entropies
from moectl.controller.rollout import Player, Rollout, features_of, repeat


class Objective:
    """The clipped surrogate of one rollout, less entropy, plus the way from a reference policy.

    Called once for each inner iteration. Ratios are taken to the first call, whose gradient is
    that of the mean of -A log p.

    Args:
        section: the table `grpo`.
        player: that made the rollout.
        rollout: what is learned from.
        reference: a frozen policy, or none.
    """

    def __init__(
        self, section: Any, player: Player, rollout: Rollout, reference: Policy | None
    ) -> None:
        self.section, self.player, self.rollout = section, player, rollout
        self.old: Tensor | None = None
        """(P,) log-probabilities of the plans at the first call."""
        first = slice(None, None, section.group_size)
        self.rows, self.budgets = rollout.rows[first], rollout.budgets[first]
        device = next(player.policy.parameters()).device
        self._seen = (
            *features_of(player.environment.features(), self.rows, device),
            self.budgets.to(device),
        )
        self._kept = None
        if reference is not None:
            with torch.no_grad():
                self._kept = self._log_probs(reference.eval())[0]

    def __call__(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the entropy of each head.

        Args:
            model: the policy, as the training loop has wrapped it.
        """
        log_probs, spread = self._log_probs(model)
        self.old = log_probs.detach() if self.old is None else self.old
        advantage = self.rollout.advantage.to(log_probs)
        loss = policy_loss(log_probs, self.old, advantage, self.section.clip)
        loss = loss - self.section.entropy_coef * torch.stack([*spread.values()]).sum()
        if self._kept is not None:
            loss = loss + self.section.kl_coef * divergence(log_probs, self._kept)
        return loss, {f"entropy_{name}": value for name, value in spread.items()}

    def _log_probs(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        scores = model(*self._seen)
        spread = entropies(scores, self.player.space, learned=not self.player.fixed)
        repeated = repeat(scores, self.section.group_size)
        return self.player.log_probs(repeated, self.rollout), spread
