"""MolmoE from native parts: an image tower of CLIP, pooling, a projector, and OLMoE.

Equal to the published network, number by number, when its weights are converted.

Letters: n crops with the view of the whole image, N patches of a crop, C width of what the tower
says of a patch, V tokens that stand for a part of the image, p pooling, D width of the text
network, T tokens, K rows of the output head.

Source: Deitke et al. 2024 (Molmo); Muennighoff et al. 2024 (OLMoE).
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.controller.tiling import Geometry

if TYPE_CHECKING:
    from transformers import Cache, CLIPVisionModel, OlmoeModel

MODEL_TYPE = "moectl_molmoe"


@dataclass(frozen=True)
class Config:
    """Sizes of a network; those that weights do not show have MolmoE's values."""

    embeddings: int
    """Rows of the input embedding, those of the marks of an image included."""
    outputs: int
    """K."""
    hidden: int
    """D."""
    blocks: int
    experts: int
    """Of a block."""
    inner: int
    """Width inside an expert."""
    crop: int
    """Pixels of an edge of a crop."""
    patch: int
    """Pixels of an edge of a patch."""
    image_hidden: int
    """Width of the tower."""
    image_inner: int
    """Width inside a block of the tower."""
    image_blocks: int
    projector_inner: int
    heads: int = 16
    top_k: int = 8
    """Experts of a token."""
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    positions: int = 4096
    """Longest sequence."""
    image_heads: int = 16
    """Of the tower and of the pooling."""
    image_norm_eps: float = 1e-5
    image_layers: tuple[int, ...] = (-2, -9)
    """Blocks of the tower whose outputs are put side by side."""
    margin: int = 4
    pooling: int = 2

    @property
    def feature(self) -> int:
        """C."""
        return self.image_hidden * len(self.image_layers)

    @property
    def geometry(self) -> Geometry:
        """How images are cut."""
        return Geometry(self.crop, self.patch, self.margin, self.pooling)

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"model_type": MODEL_TYPE, **asdict(self), "image_layers": list(self.image_layers)}


def config_from(values: dict[str, Any]) -> Config:
    """Read what `Config.plain` wrote.

    Raises:
        ValueError: if values are missing or strange, or do not fit together.
    """
    names = {field.name for field in fields(Config)}
    found = {name: value for name, value in values.items() if name != "model_type"}
    if wrong := names ^ set(found):
        raise ValueError(f"{min(wrong)} is {'missing' if min(wrong) in names else 'unknown'}")
    config = Config(**{**found, "image_layers": tuple(found["image_layers"])})
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse sizes that no network has.

    Raises:
        ValueError: saying which.
    """
    _ = config.geometry
    for width, heads in (("hidden", "heads"), ("image_hidden", "image_heads")):
        if getattr(config, width) % getattr(config, heads):
            raise ValueError(f"{width} = {getattr(config, width)}: no multiple of {heads}")
    if not 1 <= config.top_k <= config.experts:
        raise ValueError(f"top_k = {config.top_k}: expected 1 to {config.experts}")
    if not all(-config.image_blocks <= layer < 0 for layer in config.image_layers):
        raise ValueError(
            f"image_layers = {config.image_layers}: expected numbers from"
            f" -{config.image_blocks} to -1"
        )


class WindowAttention(nn.Module):
    """Pool a window of patches into one vector: attention that asks with the window's mean.

    Args:
        width: C, of a patch.
        hidden: width of the result.
        heads: of the attention.
    """

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, hidden)
        self.k_proj = nn.Linear(width, hidden)
        self.v_proj = nn.Linear(width, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, patches: Tensor) -> Tensor:
        """Map windows (V, p², C) to (V, hidden)."""
        query = self._split(self.q_proj(patches.mean(1, keepdim=True)))
        key, value = self._split(self.k_proj(patches)), self._split(self.v_proj(patches))
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(pooled.flatten(1))

    def _split(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(*vectors.shape[:2], self.heads, -1).transpose(1, 2)


class Projector(nn.Module):
    """A gated unit from pooled vectors to the width of the text network.

    Args:
        width: of a pooled vector.
        inner: width inside.
        hidden: D.
    """

    def __init__(self, width: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (V, width) to (V, D)."""
        return self.down_proj(F.silu(self.gate_proj(pooled)) * self.up_proj(pooled))


class MolmoeModel(nn.Module):
    """The network, one question about one image at a time.

    Args:
        config: its sizes.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tower = _tower(config)
        self.padding = nn.Parameter(torch.zeros(2, config.feature))
        """What is added to patches that are padding altogether, and to those that are in part."""
        self.pool = WindowAttention(config.feature, config.image_hidden, config.image_heads)
        self.projector = Projector(config.image_hidden, config.projector_inner, config.hidden)
        self.text = _text(config)
        self.head = nn.Linear(config.hidden, config.outputs, bias=False)

    def look(self, pixels: Tensor) -> Tensor:
        """Return what the tower says of crops (n, 3, H, W), each by itself: (n, N, C).

        A crop that is -1 everywhere stands for none, and zero is said of it.
        """
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        said = torch.cat([states[layer] for layer in self.config.image_layers], dim=-1)
        # The tower's first vector stands for the crop as a whole.
        return said[:, 1:] * (pixels != -1).flatten(1).any(1)[:, None, None]

    def project(self, said: Tensor, cover: Tensor, windows: Tensor) -> Tensor:
        """Return the vectors of the parts of an image.

        Args:
            said: (n, N, C) of `look`.
            cover: (n, N) share of each patch that is image; below 0 counts as partly padded.
            windows: (V, p²) patches of each part, as `tiling.windows` numbers them.

        Returns:
            (V, D), to be added to the embeddings of the places of the parts.
        """
        empty = cover[..., None] == 0
        partial = (cover[..., None] < 1) & ~empty
        patches = said + empty * self.padding[0] + partial * self.padding[1]
        return self.projector(self.pool(patches.flatten(0, 1)[windows]))

    def forward(
        self,
        ids: Tensor,
        vectors: Tensor | None = None,
        places: Tensor | None = None,
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Return the hidden states after the last norm, (1, T, D); `head` maps them to logits.

        Args:
            ids: (1, T) tokens.
            vectors: (V, D) of `project`.
            places: (V,) where among the tokens they are added.
            cache: of the tokens before; these are appended.
        """
        embedded = self.text.embed_tokens(ids)
        if vectors is not None and places is not None:
            embedded = embedded.index_add(1, places, vectors[None].to(embedded.dtype))
        return self.text(
            inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state


def _tower(config: Config) -> "CLIPVisionModel":
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.image_hidden,
            intermediate_size=config.image_inner,
            num_hidden_layers=config.image_blocks,
            num_attention_heads=config.image_heads,
            image_size=config.crop,
            patch_size=config.patch,
            layer_norm_eps=config.image_norm_eps,
            hidden_act="quick_gelu",
        )
    )
    # Nobody reads its result, and the published weights have none for it.
    tower.post_layernorm = nn.Identity()  # type: ignore[assignment]
    return tower


def _text(config: Config) -> "OlmoeModel":
    from transformers import OlmoeConfig, OlmoeModel

    return OlmoeModel(
        OlmoeConfig(
            vocab_size=config.embeddings,
            hidden_size=config.hidden,
            intermediate_size=config.inner,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            max_position_embeddings=config.positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            num_experts=config.experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=False,
            # No id is special inside the network: padding would zero a row of the embedding.
            pad_token_id=None,
            eos_token_id=None,
        )
    )
