"""LLaVA-NeXT with any text network: tiers by the number of crops.

Letters: C channels, D width of the tower's patches, H W pixels, M crops, N patches of a crop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moectl.controller import flops
from moectl.controller.backbone import Inputs, View
from moectl.controller.native import Native
from moectl.controller.plans import Tier
from moectl.controller.tiling import choose

if TYPE_CHECKING:
    from PIL.Image import Image

TIERS = (Tier("low", 1, 3, 3), Tier("medium", 4, 6, 6), Tier("high", 7, 12, 12))


class LlavaNext(Native):
    """LLaVA-NeXT; the text network may have experts or not.

    Every image gets exactly one tiling, of this module's choice: the network's own list of tilings
    is set aside for the moment and comes back.

    Args:
        model: LlavaNextForConditionalGeneration.
        processor: LlavaNextProcessor.
        name: under which it was opened.
        experts: see `Native`.
        instruct: see `Native`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        experts: str = "auto",
        instruct: bool = True,
    ) -> None:
        config = model.config
        self._tower_layers = config.vision_feature_layer
        parts = 1 if isinstance(self._tower_layers, int) else len(self._tower_layers)
        super().__init__(
            model,
            processor,
            name=name,
            text=model.model.language_model,
            tiers=TIERS,
            vision_dim=parts * config.vision_config.hidden_size,
            experts=experts,
            instruct=instruct,
        )

    def prepare(self, image: "Image", question: str, style: str, tier: str) -> Inputs:
        """Tile the image as a tier asks and tokenise the question."""
        chosen = next(known for known in TIERS if known.name == tier)
        rows, columns = choose(*image.size, chosen)
        with self._pinpoint(rows, columns):
            read = self._read(image, question, style)
        positions = torch.arange(read["input_ids"].shape[1], device=self.device)[None]
        return self._inputs(read, positions, (rows, columns))

    def overview(self, image: "Image") -> Tensor:
        """Return the whole image at low resolution, (1, C, H, W)."""
        with self._pinpoint(1, 1):
            read = self.processor.image_processor(image, return_tensors="pt")
        pixels: Tensor = read["pixel_values"][0, :1]
        return pixels.to(self.device)

    def glance(self, pixels: Tensor) -> View:
        """Encode what `overview` returned."""
        hidden = self._tower(pixels)
        return View(hidden[0].float().mean(0), hidden)

    @torch.no_grad()
    def encode(self, inputs: Inputs, view: View | None = None) -> Any:
        """Return what the text network sees of the image: tower and projector, all crops."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pixels = inputs.tensors["pixel_values"][0]
        if view is None:
            hidden = self._tower(pixels)
        else:
            hidden = torch.cat([view.hidden, self._tower(pixels[1:])])
        network = self.model.model
        features = network.multi_modal_projector(hidden)
        with self._pinpoint(*inputs.tiling):
            packed, _ = network.pack_image_features(
                [features],
                inputs.tensors["image_sizes"],
                vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
                image_newline=network.image_newline,
            )
        return BaseModelOutputWithPooling(pooler_output=packed)

    @torch.no_grad()
    def _tower(self, pixels: Tensor) -> Tensor:
        """Encode crops (M, C, H, W) and return their patches (M, N, D)."""
        tower = self.model.model.vision_tower
        states = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states
        if isinstance(self._tower_layers, int):
            patches = states[self._tower_layers]
        else:
            patches = torch.cat([states[layer] for layer in self._tower_layers], -1)
        return patches[:, 1:] if self._drops_class_token else patches

    @property
    def _drops_class_token(self) -> bool:
        return self.model.config.vision_feature_select_strategy == "default"

    @contextmanager
    def _pinpoint(self, rows: int, columns: int) -> Iterator[None]:
        """Let network and processor know a single tiling, which they then must take."""
        edge = self.model.config.vision_config.image_size
        holders = (self.model.config, self.processor.image_processor)
        before = [holder.image_grid_pinpoints for holder in holders]
        try:
            for holder in holders:
                holder.image_grid_pinpoints = [[rows * edge, columns * edge]]
            yield
        finally:
            for holder, pinpoints in zip(holders, before, strict=True):
                holder.image_grid_pinpoints = pinpoints

    def _vision_flop(self, inputs: Inputs) -> int:
        network, config = self.model.model, self.model.config.vision_config
        patches = (config.image_size // config.patch_size) ** 2
        marks = 1 if self._drops_class_token else 0
        layers = network.vision_tower.encoder.layers
        crop = flops.tower(layers, config.hidden_size, patches + marks)
        crop += patches * flops.convolution(network.vision_tower.embeddings.patch_embedding)
        crop += patches * flops.linear(network.multi_modal_projector)
        return (1 + inputs.crops) * crop
