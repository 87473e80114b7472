"""Small random LLaVA-NeXT networks that need no download, with a tokenizer of bytes.

Their text network is a twin of OLMoE, the decoder of MolmoE (Deitke et al. 2024), or of another
family. They know nothing until they are taught.

Letters: none.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from moectl.engine.seeding import key

if TYPE_CHECKING:
    from transformers import (
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        PreTrainedConfig,
        PreTrainedTokenizerFast,
    )

Name = Literal["tiny", "nano"]
Text = Literal["olmoe", "qwen3_moe", "dense"]

PAD, BEGIN, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
PATCH = 14
"""Pixels of an edge of what becomes one token."""
CROP = 84
"""Pixels of an edge of a crop: 36 tokens."""
MOST_CROPS = 12

_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}Q: {{ part['text'] }}\nA:{% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Size:
    """Size of a text network; the image tower has one size."""

    hidden: int
    inner: int
    """Width inside an expert."""
    blocks: int
    heads: int
    experts: int
    top_k: int


SIZES = {
    "tiny": Size(hidden=128, inner=128, blocks=16, heads=8, experts=64, top_k=8),
    "nano": Size(hidden=64, inner=32, blocks=6, heads=4, experts=16, top_k=8),
}


def build(
    name: Name, text: Text = "olmoe", seed: int = 0
) -> "tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]":
    """Return a random network in evaluation mode and its processor.

    The weights depend on the seed alone, and no generator is disturbed.

    Args:
        name: of one of `SIZES`.
        text: family of the text network; `dense` has no experts.
        seed: of the weights.
    """
    library = _library()
    processor = _processor()
    vision = library.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CROP,
        patch_size=PATCH,
    )
    config = library.LlavaNextConfig(
        vision_config=vision,
        text_config=_text_config(SIZES[name], text, processor.tokenizer),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=pinpoints(MOST_CROPS),
        image_seq_length=(CROP // PATCH) ** 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key(seed, "tiny", name, text))
        model = library.LlavaNextForConditionalGeneration(config)
    return model.eval(), processor


def prompt(question: str) -> str:
    """Return what these networks are asked: an answer and the end mark follow."""
    return f"{IMAGE}\nQ: {question}\nA:"


def pinpoints(most: int) -> list[list[int]]:
    """Return height and width of all tilings of at most so many crops, fewest crops first."""
    pairs = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    return [[r * CROP, c * CROP] for r, c in sorted(pairs, key=lambda pair: pair[0] * pair[1])]


def _processor() -> "LlavaNextProcessor":
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": CROP},
        crop_size={"height": CROP, "width": CROP},
        image_grid_pinpoints=pinpoints(MOST_CROPS),
    )
    return _library().LlavaNextProcessor(
        images,
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        num_additional_image_tokens=1,
    )


def _tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer whose tokens are bytes; the begin mark is put in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [PAD, BEGIN, END, IMAGE, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return _library().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _text_config(
    size: Size, text: Text, tokenizer: "PreTrainedTokenizerFast"
) -> "PreTrainedConfig":
    library = _library()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if text == "dense":
        return library.LlamaConfig(**common, intermediate_size=4 * size.hidden)
    experts = {"num_experts": size.experts, "num_experts_per_tok": size.top_k}
    if text == "qwen3_moe":
        return library.Qwen3MoeConfig(
            **common,
            **experts,
            head_dim=size.hidden // size.heads,
            intermediate_size=size.inner,
            moe_intermediate_size=size.inner,
            norm_topk_prob=True,
        )
    return library.OlmoeConfig(**common, **experts, intermediate_size=size.inner)


def _library() -> Any:
    """Return transformers, whose types say less than what it takes."""
    import transformers

    return transformers
