"""How much each block matters to what a network computes, without any label.

Letters: L blocks, S tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.controller.backbone import Backbone, Inputs
from moectl.controller.plans import Plan


def block_influence(backbone: Backbone, inputs: Inputs, vision: Any) -> list[float]:
    """Return how much each block turns its input: 1 less the mean cosine over tokens, L of them.

    Args:
        backbone: the network, run as it is.
        inputs: of one question, in the finest tier.
        vision: what `Backbone.encode` gave for it.

    Source: Men et al. 2024 (ShortGPT).
    """
    found: list[float] = []

    def compare(_: nn.Module, given: tuple[Tensor, ...], kept: dict[str, Tensor], out: Any) -> None:
        before = given[0] if given else kept["hidden_states"]
        after = out if isinstance(out, Tensor) else out[0]
        found.append(1 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean()))

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in backbone.layers]
    try:
        with torch.inference_mode():
            backbone.prefill(inputs, vision)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def divergences(
    backbone: Backbone, inputs: Inputs, vision: Any, plans: Sequence[Plan]
) -> list[float]:
    """Return the divergence of the first token under each plan from that of the whole network.

    Args:
        backbone: the network.
        inputs: of one question.
        vision: what `Backbone.encode` gave for it.
        plans: of the tier of these inputs.
    """
    with torch.inference_mode():
        whole = backbone.prefill(inputs, vision)[0].float().log_softmax(-1)
        found = []
        for plan in plans:
            with backbone.apply(plan):
                less = backbone.prefill(inputs, vision)[0].float().log_softmax(-1)
            found.append(float(F.kl_div(less, whole, reduction="sum", log_target=True)))
    return found
