"""Idefics3 and SmolVLM, networks without experts: tiers by the longest edge of the image.

Letters: S tokens of the sequence.
"""

from typing import TYPE_CHECKING, Any

import torch

from moectl.controller import flops
from moectl.controller.backbone import Inputs
from moectl.controller.plans import Tier
from moectl.controller.resized import Resized

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class SmolVlm(Resized):
    """Idefics3 or SmolVLM: a plan sets the tier and the blocks that run.

    The longest edge of an image becomes one, two, or as many crops as the network was made for;
    one crop is the view of the whole image alone.

    Args:
        model: Idefics3ForConditionalGeneration or SmolVLMForConditionalGeneration.
        processor: of the same family.
        name: under which it was opened.
        instruct: see `Native`.
    """

    _takes = ("pixel_values", "pixel_attention_mask")

    def __init__(self, model: Any, processor: Any, *, name: str, instruct: bool = True) -> None:
        images = processor.image_processor
        self._edge = images.max_image_size["longest_edge"]
        most = max(3, images.size["longest_edge"] // self._edge)
        self._along = {"low": 1, "medium": 2, "high": most}
        super().__init__(
            model,
            processor,
            name=name,
            text=model.model.text_model,
            tiers=(
                Tier("low", 0, 0, 0),
                Tier("medium", 2, 4, 4),
                # A photograph is about three quarters as high as wide.
                Tier("high", most, most * most, most * -(-3 * most // 4)),
            ),
            vision_dim=model.config.vision_config.hidden_size,
            instruct=instruct,
        )

    def _size(self, tier: Tier) -> dict[str, int]:
        return {"longest_edge": self._along[tier.name] * self._edge}

    def _tiling(self, image: "Image", tier: Tier) -> tuple[int, int]:
        _, rows, columns = self.processor.image_processor.get_number_of_image_patches(
            image.height, image.width, {"size": self._size(tier)}
        )
        return rows, columns

    def _positions(self, read: "dict[str, Tensor]") -> "Tensor":
        return torch.arange(read["input_ids"].shape[1], device=self.device)[None]

    def _vision_flop(self, inputs: Inputs) -> int:
        network, vision = self.model.model, self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        work = flops.tower(network.vision_model.encoder.layers, vision.hidden_size, patches)
        work += patches * flops.convolution(network.vision_model.embeddings.patch_embedding)
        return (1 + inputs.crops) * work + inputs.vision_tokens * flops.linear(network.connector)
