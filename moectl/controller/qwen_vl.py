"""Qwen3-VL and Qwen3.5 with experts: tiers by the number of pixels.

Letters: S tokens of the sequence.
"""

from typing import TYPE_CHECKING, Any

from moectl.controller import flops
from moectl.controller.backbone import Inputs
from moectl.controller.plans import Tier
from moectl.controller.resized import Resized

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TIERS = (Tier("low", 1, 3, 3), Tier("medium", 4, 6, 6), Tier("high", 7, 12, 12))


class QwenVl(Resized):
    """Qwen3-VL or Qwen3.5 with experts.

    These networks do not cut an image up, but take it at any resolution. Every image is resized
    to a tier's number of pixels, large or small, so that the tokens of a tier are always about the
    same; a crop is so many tokens here. Features of inner layers of the image tower are added
    behind the first blocks of the text network, hence those blocks always run.

    Limit: the recurrence of linear attention is left out of the counted work.

    Args:
        model: with experts, for generation.
        processor: of the same family.
        name: under which it was opened.
        experts: see `Native`.
        instruct: see `Native`.
        crop_tokens: tokens that count as a crop.
    """

    _takes = ("pixel_values", "image_grid_thw")

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        experts: str = "auto",
        instruct: bool = True,
        crop_tokens: int = 144,
    ) -> None:
        vision = model.config.vision_config
        edge = vision.patch_size * vision.spatial_merge_size
        self._crop_pixels = crop_tokens * edge * edge
        super().__init__(
            model,
            processor,
            name=name,
            text=model.model.language_model,
            tiers=TIERS,
            vision_dim=vision.hidden_size,
            experts=experts,
            instruct=instruct,
            fixed=max(1, len(getattr(vision, "deepstack_visual_indexes", ()))),
        )

    def _size(self, tier: Tier) -> dict[str, int]:
        # The processor calls the fewest and the most pixels edges.
        pixels = tier.nominal * self._crop_pixels
        return {"shortest_edge": pixels, "longest_edge": pixels}

    def _tiling(self, image: "Image", tier: Tier) -> tuple[int, int]:  # noqa: ARG002
        return 1, tier.nominal

    def _positions(self, read: "dict[str, Tensor]") -> "Tensor":
        """Return (3, 1, S) positions in time, height and width."""
        positions, _ = self.model.model.get_rope_index(
            read["input_ids"], read["mm_token_type_ids"], image_grid_thw=read["image_grid_thw"]
        )
        return positions

    def _vision_flop(self, inputs: Inputs) -> int:
        tower = self.model.model.visual
        patches = int(inputs.tensors["image_grid_thw"].prod())
        work = flops.tower(tower.blocks, self.model.config.vision_config.hidden_size, patches)
        work += patches * flops.convolution(tower.patch_embed)
        mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
        return work + inputs.vision_tokens * sum(flops.linear(merger) for merger in mergers)
