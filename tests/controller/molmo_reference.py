"""MolmoE once more, written out in NumPy loops from the original's tensors; slow and obvious.

Nothing of the project and nothing of transformers computes here, so that neither can hide a slip.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sizes:
    """A tiny MolmoE in the original's terms."""

    hidden: int = 16
    heads: int = 2
    blocks: int = 4
    experts: int = 6
    top_k: int = 4
    inner: int = 5
    rows: int = 260
    new_rows: int = 8
    crop: int = 32
    patch: int = 4
    margin: int = 2
    width: int = 12
    image_heads: int = 3
    image_inner: int = 20
    image_blocks: int = 4
    image_layers: tuple[int, ...] = (-2, -3)
    projector_inner: int = 7

    def config(self) -> dict[str, Any]:
        """What the original's config.json says."""
        return {
            "model_type": "molmo",
            "n_heads": self.heads,
            "moe_top_k": self.top_k,
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_impl": "llama",
            "max_position_embeddings": 4096,
            "image_pooling_2d": "attention-meanq",
            "image_padding_embed": "pad_and_partial_pad",
            "vit_layers": list(self.image_layers),
            "overlap_margins": [self.margin, self.margin],
            "vision_backbone": {"image_num_heads": self.image_heads, "image_norm_eps": 1e-5},
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the original."""
        hidden, width, both = self.hidden, self.width, self.width * len(self.image_layers)
        vit, pool = "vision_backbone.image_vit", "vision_backbone.image_pooling_2d"
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.embedding": (self.rows, hidden),
            "transformer.wte.new_embedding": (self.new_rows, hidden),
            "transformer.ln_f.weight": (hidden,),
            "lm_head.weight": (self.rows, hidden),
            f"{vit}.patch_embedding.weight": (width, 3 * self.patch**2),
            f"{vit}.class_embedding": (width,),
            f"{vit}.positional_embedding": ((self.crop // self.patch) ** 2 + 1, width),
            f"{vit}.pre_ln.weight": (width,),
            f"{vit}.pre_ln.bias": (width,),
            "vision_backbone.pad_embed": (2, both),
            "vision_backbone.image_projector.w1.weight": (self.projector_inner, width),
            "vision_backbone.image_projector.w2.weight": (hidden, self.projector_inner),
            "vision_backbone.image_projector.w3.weight": (self.projector_inner, width),
        }
        for name, columns in (("wq", both), ("wk", both), ("wv", both), ("wo", width)):
            shapes |= {f"{pool}.{name}.weight": (width, columns), f"{pool}.{name}.bias": (width,)}
        for layer in range(self.image_blocks):
            at = f"{vit}.transformer.resblocks.{layer}"
            for name in ("wq", "wk", "wv", "wo"):
                shapes[f"{at}.attention.{name}.weight"] = (width, width)
                shapes[f"{at}.attention.{name}.bias"] = (width,)
            shapes[f"{at}.feed_forward.w1.weight"] = (self.image_inner, width)
            shapes[f"{at}.feed_forward.w1.bias"] = (self.image_inner,)
            shapes[f"{at}.feed_forward.w2.weight"] = (width, self.image_inner)
            shapes[f"{at}.feed_forward.w2.bias"] = (width,)
            for norm in ("attention_norm", "ffn_norm"):
                shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
        for block in range(self.blocks):
            at = f"transformer.blocks.{block}"
            shapes[f"{at}.attn.att_proj.weight"] = (3 * hidden, hidden)
            shapes[f"{at}.attn.attn_out.weight"] = (hidden, hidden)
            for name in ("attn.q_norm", "attn.k_norm", "attn.attn_norm", "mlp.ff_norm"):
                shapes[f"{at}.{name}.weight"] = (hidden,)
            shapes[f"{at}.mlp.gate.weight"] = (self.experts, hidden)
            for expert in range(self.experts):
                one = f"{at}.mlp.experts.{expert}"
                shapes[f"{one}.gate_proj.weight"] = (self.inner, hidden)
                shapes[f"{one}.up_proj.weight"] = (self.inner, hidden)
                shapes[f"{one}.down_proj.weight"] = (hidden, self.inner)
        return shapes

    def weights(self, seed: int = 0) -> Weights:
        """Random weights, large enough that every part of the network is felt."""
        random = np.random.default_rng(seed)
        weights = {}
        for name, shape in self.shapes().items():
            values = random.normal(size=shape) * 1.5 / math.sqrt(shape[-1])
            one = name.endswith(("norm.weight", "ln.weight", "ln_f.weight"))
            embedding = "embedding" in name and "patch" not in name
            values = 1 + values if one else values * 3 if embedding else values
            weights[name] = values.astype(np.float32)
        return weights


def write_original(
    folder: Path, sizes: Sizes, weights: Weights, *, prefix: str = "model.", files: int = 3
) -> None:
    """Write a folder as the original was published: weights in files, configuration, tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    for number in range(files):
        mine = sorted(weights)[number::files]
        named = {name if name == "lm_head.weight" else prefix + name: name for name in mine}
        save_file(
            {new: weights[old] for new, old in named.items()},
            folder / f"model-{number + 1:05d}-of-{files:05d}.safetensors",
        )
    (folder / "config.json").write_text(json.dumps(sizes.config()))
    tokenizer(sizes.rows).save_pretrained(folder)


def tokenizer(rows: int) -> Any:
    """A tokenizer of bytes; the marks of an image are the first ids after the embedding's rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters += [f"<unused{number}>" for number in range(rows - len(letters))]
    bytewise = Tokenizer(models.BPE({one: number for number, one in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    marks = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"]
    made.add_special_tokens({"additional_special_tokens": marks})
    return made


def image_vectors(
    weights: Weights, sizes: Sizes, pixels: np.ndarray, cover: np.ndarray
) -> np.ndarray:
    """(crops, cells, hidden) of crops (crops, height, width, 3); a cell is two by two patches."""
    side = sizes.crop // sizes.patch
    result = []
    for crop, shares in zip(pixels.astype(np.float64), cover, strict=True):
        said = crop_features(weights, sizes, crop)
        for patch, share in enumerate(shares):
            if share == 0:
                said[patch] += weights["vision_backbone.pad_embed"][0]
            elif share < 1:
                said[patch] += weights["vision_backbone.pad_embed"][1]
        said = said.reshape(side, side, -1)
        cells = []
        for row in range(0, side, 2):
            for column in range(0, side, 2):
                four = said[row : row + 2, column : column + 2].reshape(4, -1)
                cells.append(_cell(weights, sizes, four))
        result.append(np.stack(cells))
    return np.stack(result)


def crop_features(weights: Weights, sizes: Sizes, crop: np.ndarray) -> np.ndarray:
    """(patches, 2 x width) of one crop (height, width, 3), before padding is marked."""
    at, patch, side = "vision_backbone.image_vit", sizes.patch, sizes.crop // sizes.patch
    tokens = [weights[f"{at}.class_embedding"].astype(np.float64)]
    for row in range(side):
        for column in range(side):
            square = crop[row * patch :, column * patch :][:patch, :patch]
            tokens.append(weights[f"{at}.patch_embedding.weight"] @ square.reshape(-1))
    stream = np.stack(tokens) + weights[f"{at}.positional_embedding"]
    stream = _layer_norm(weights, f"{at}.pre_ln", stream)
    outputs = []
    for layer in range(sizes.image_blocks):
        one = f"{at}.transformer.resblocks.{layer}"
        normed = _layer_norm(weights, f"{one}.attention_norm", stream)
        stream = stream + _attention(weights, f"{one}.attention", sizes.image_heads, normed, normed)
        normed = _layer_norm(weights, f"{one}.ffn_norm", stream)
        inner = _affine(weights, f"{one}.feed_forward.w1", normed)
        inner = inner / (1 + np.exp(-1.702 * inner))
        stream = stream + _affine(weights, f"{one}.feed_forward.w2", inner)
        outputs.append(stream)
    said = np.concatenate([outputs[layer] for layer in sizes.image_layers], axis=-1)[1:]
    return said * 0 if (crop == -1).all() else said


def logits(
    weights: Weights,
    sizes: Sizes,
    ids: list[int],
    image: dict[int, np.ndarray],
    top_k: list[int],
) -> np.ndarray:
    """(tokens, rows) of a whole sequence.

    Args:
        weights: the original's.
        sizes: of the network.
        ids: tokens.
        image: vectors that are added to the embeddings, by place.
        top_k: experts of each block; 0: the block is skipped.
    """
    table = np.concatenate(
        [weights["transformer.wte.embedding"], weights["transformer.wte.new_embedding"]]
    ).astype(np.float64)
    stream = np.stack([table[number] for number in ids])
    for place, vector in image.items():
        stream[place] += vector
    for block in range(sizes.blocks):
        if top_k[block]:
            stream = _decoder_block(weights, sizes, block, stream, top_k[block])
    return _rms_norm(weights["transformer.ln_f.weight"], stream) @ weights["lm_head.weight"].T


def _decoder_block(
    weights: Weights, sizes: Sizes, block: int, stream: np.ndarray, top_k: int
) -> np.ndarray:
    at, hidden = f"transformer.blocks.{block}", sizes.hidden
    normed = _rms_norm(weights[f"{at}.attn.attn_norm.weight"], stream)
    fused = normed @ weights[f"{at}.attn.att_proj.weight"].T
    query = _rms_norm(weights[f"{at}.attn.q_norm.weight"], fused[:, :hidden])
    key = _rms_norm(weights[f"{at}.attn.k_norm.weight"], fused[:, hidden : 2 * hidden])
    value = fused[:, 2 * hidden :]
    width = hidden // sizes.heads
    seen = np.zeros_like(stream)
    for head in range(sizes.heads):
        span = slice(head * width, (head + 1) * width)
        turned = [
            (_turned(query[place, span], place), _turned(key[place, span], place))
            for place in range(len(stream))
        ]
        for now in range(len(stream)):
            scores = [turned[now][0] @ turned[then][1] for then in range(now + 1)]
            shares = _softmax(np.array(scores) / math.sqrt(width))
            for then in range(now + 1):
                seen[now, span] += shares[then] * value[then, span]
    stream = stream + seen @ weights[f"{at}.attn.attn_out.weight"].T
    normed = _rms_norm(weights[f"{at}.mlp.ff_norm.weight"], stream)
    return stream + np.stack([_mixture(weights, f"{at}.mlp", top_k, token) for token in normed])


def _mixture(weights: Weights, at: str, top_k: int, token: np.ndarray) -> np.ndarray:
    shares = _softmax(weights[f"{at}.gate.weight"] @ token)
    total = np.zeros_like(token)
    for expert in sorted(range(len(shares)), key=lambda expert: -shares[expert])[:top_k]:
        one = f"{at}.experts.{expert}"
        gate = weights[f"{one}.gate_proj.weight"] @ token
        up = weights[f"{one}.up_proj.weight"] @ token
        # The shares of the experts that are left do not add up to 1.
        total += shares[expert] * (
            weights[f"{one}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        )
    return total


def _turned(vector: np.ndarray, place: int) -> np.ndarray:
    half = len(vector) // 2
    result = np.empty_like(vector)
    for pair in range(half):
        angle = place / 10000 ** (2 * pair / len(vector))
        first, second = vector[pair], vector[half + pair]
        result[pair] = first * math.cos(angle) - second * math.sin(angle)
        result[half + pair] = second * math.cos(angle) + first * math.sin(angle)
    return result


def _cell(weights: Weights, sizes: Sizes, four: np.ndarray) -> np.ndarray:
    query = four.mean(axis=0, keepdims=True)
    pool = "vision_backbone.image_pooling_2d"
    pooled = _attention(weights, pool, sizes.image_heads, query, four)[0]
    at = "vision_backbone.image_projector"
    gate = weights[f"{at}.w1.weight"] @ pooled
    inner = gate / (1 + np.exp(-gate)) * (weights[f"{at}.w3.weight"] @ pooled)
    return weights[f"{at}.w2.weight"] @ inner


def _attention(
    weights: Weights, at: str, heads: int, asking: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    query = _affine(weights, f"{at}.wq", asking)
    key, value = _affine(weights, f"{at}.wk", asked), _affine(weights, f"{at}.wv", asked)
    width = query.shape[1] // heads
    seen = np.zeros_like(query)
    for head in range(heads):
        span = slice(head * width, (head + 1) * width)
        for row in range(len(query)):
            shares = _softmax(key[:, span] @ query[row, span] / math.sqrt(width))
            seen[row, span] = shares @ value[:, span]
    return _affine(weights, f"{at}.wo", seen)


def _affine(weights: Weights, at: str, rows: np.ndarray) -> np.ndarray:
    return rows @ weights[f"{at}.weight"].T + weights[f"{at}.bias"]


def _layer_norm(weights: Weights, at: str, rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{at}.weight"] + weights[f"{at}.bias"]


def _rms_norm(weight: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + 1e-5) * weight


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()
