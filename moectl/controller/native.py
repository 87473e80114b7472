"""What the networks of transformers have in common: prompt, cache, plans, work.

Letters: D width of a feature, S tokens of the sequence, V vocabulary.
"""

import abc
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moectl.controller import flops
from moectl.controller.apply import applied, routers
from moectl.controller.backbone import Backbone, Inputs
from moectl.controller.plans import Plan, Space, Tier, top_k_choices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

_QUESTION_TOKENS = 512
_SHORT = "Reply with one word or a short phrase."
_CAPTION = "Reply with one short sentence that describes the image."


@dataclass
class State:
    """Where an answer stands."""

    cache: Any
    position: Tensor
    """Of the next token, in the shape that the network takes."""


class Native(Backbone):
    """A network of transformers with an image tower, a text network and an output head.

    Args:
        model: with `lm_head`; it is frozen.
        processor: its tokenizer and image processor.
        name: under which it was opened.
        text: its text network.
        tiers: of images, from the coarsest up.
        vision_dim: width of the image tower's patches.
        experts: implementation of the experts, in transformers' words; `auto` is one expert after
            another on a CPU, where that alone gains from fewer experts, else transformers' choice.
        instruct: ask for a short answer in the prompt; networks taught without it go without it.
        fixed: blocks at the beginning that always run.
    """

    def __init__(  # noqa: PLR0913 - what a family has to say of itself
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        text: Any,
        tiers: tuple[Tier, ...],
        vision_dim: int,
        experts: str = "auto",
        instruct: bool = True,
        fixed: int = 1,
    ) -> None:
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name
        self.device = model.device
        self.vision_dim, self.text_dim = vision_dim, text.config.hidden_size
        self.space = _space(text, tiers, fixed)
        self.end_tokens = _end_tokens(model, processor.tokenizer)
        self.layers, self._instruct = text.layers, instruct
        self._choose_experts(text, experts)
        self._blocks = [_block(layer, text.config) for layer in text.layers]
        self._head = flops.linear(model.lm_head)

    def _choose_experts(self, text: Any, experts: str) -> None:
        if experts == "auto":
            experts = "eager" if self.device.type == "cpu" else ""
        if experts and any(self.space.mixtures):
            text.set_experts_implementation(experts)

    def text_feature(self, question: str) -> Tensor:
        """Return the mean of the frozen input embeddings of the bare question, (D,)."""
        ids = self.processor.tokenizer(
            question, add_special_tokens=False, truncation=True, max_length=_QUESTION_TOKENS
        )["input_ids"]
        table = self.model.get_input_embeddings().weight
        with torch.no_grad():
            rows = table[torch.tensor(ids, dtype=torch.long, device=self.device)].float()
            return rows.sum(0) / max(1, len(ids))

    def apply(self, plan: Plan) -> AbstractContextManager[None]:
        """Run the text network by a plan inside the context; afterwards it is as it was."""
        return applied(self.layers, plan, self.space)

    @torch.no_grad()
    def prefill(self, inputs: Inputs, vision: Any) -> tuple[Tensor, State]:
        """Return the logits of the first token of the answer, (V,), and a state for `step`."""
        from transformers import DynamicCache

        positions = inputs.tensors["position_ids"]
        cache = DynamicCache(config=self.model.config)
        logits = self._logits(
            inputs.tensors["input_ids"], positions, cache, mm_encoder_outputs={"image": vision}
        )
        last = positions.amax().expand(*positions.shape[:-1], 1)
        return logits, State(cache, last + 1)

    @torch.no_grad()
    def step(self, token: int, state: State) -> Tensor:
        """Append a token to the answer and return the logits of the next, (V,)."""
        ids = torch.tensor([[token]], device=self.device)
        logits = self._logits(ids, state.position, state.cache)
        state.position = state.position + 1
        return logits

    def _logits(self, ids: Tensor, positions: Tensor, cache: Any, **more: Any) -> Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        return output.logits[0, -1]

    def gflop(self, plan: Plan, inputs: Inputs, new_tokens: int) -> float:
        """Return the 10⁹ floating-point operations of an answer of `new_tokens` tokens."""
        words = flops.text(self._blocks, self._head, plan, inputs.tokens, new_tokens)
        return (self._vision_flop(inputs) + words) / 1e9

    @abc.abstractmethod
    def _vision_flop(self, inputs: Inputs) -> int:
        """Operations of image tower and projector."""

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    def _read(self, image: "Image", question: str, style: str, **images: Any) -> dict[str, Tensor]:
        """Return what the processor makes of a question; `images` are for its image processor."""
        line = _CAPTION if style == "coco_caption" else _SHORT
        # A question that spells the image's mark would ask for a second image.
        question = question.replace(self.processor.image_token, "")
        words = f"{question}\n{line}" if self._instruct else question
        content = [{"type": "image", "image": image}, {"type": "text", "text": words}]
        read = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"images_kwargs": images},
        )
        return {name: value.to(self.device) for name, value in read.items()}

    def _inputs(
        self, tensors: dict[str, Tensor], positions: Tensor, tiling: tuple[int, int]
    ) -> Inputs:
        """Put together what `prepare` returns, and count the tokens."""
        ids = tensors["input_ids"]
        of_image = int((ids == self.model.config.image_token_id).sum())
        tensors = {**tensors, "position_ids": positions}
        return Inputs(tensors, tiling, of_image, ids.shape[1] - of_image)


def _space(text: Any, tiers: tuple[Tier, ...], fixed: int) -> Space:
    counts = [[vars(router)["top_k"] for router in routers(layer)] for layer in text.layers]
    top_k = next((some[0] for some in counts if some), 0)
    # A cache and its masks are measured at the first block of each kind of attention.
    kinds: Sequence[str] = getattr(text.config, "layer_types", None) or ["one"] * len(counts)
    always_on = tuple(sorted({*range(fixed), *(kinds.index(kind) for kind in kinds)}))
    return Space(
        blocks=len(counts),
        mixtures=tuple(bool(some) for some in counts),
        default_top_k=top_k,
        top_k_choices=top_k_choices(top_k) if top_k else (),
        always_on=always_on,
        min_active=max(math.ceil(0.75 * len(counts)), len(always_on)),
        max_active=len(counts),
        tiers=tiers,
    )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends)


def _block(layer: nn.Module, config: Any) -> flops.Block:
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", 0)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return flops.Block(
        dense=flops.linear(layer),
        expert=flops.expert(layer, experts) if experts else 0,
        pair=flops.pair(width) if hasattr(layer, "self_attn") else 0,
    )
