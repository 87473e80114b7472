"""MolmoE as a backbone, opened from a folder that `molmoe_convert` wrote.

Letters: D width of a feature, n crops with the view of the whole image, V vocabulary.
"""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moectl.controller import flops, tiling
from moectl.controller.apply import applied
from moectl.controller.backbone import Backbone, Inputs, View
from moectl.controller.molmoe_model import MODEL_TYPE, Config, MolmoeModel, config_from
from moectl.controller.plans import Plan, Space, top_k_choices
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

Experts = Literal["auto", "eager", "grouped_mm", "batched_mm"]

INDEX = "model.safetensors.index.json"
MARKS = {"start": "<im_start>", "end": "<im_end>", "part": "<im_patch>", "row": "<im_col>"}
"""How the tokenizer spells the marks of an image; their ids are its own affair."""

_STYLES = {"text_vqa": "text_vqa", "okvqa": "okvqa"}
"""Data sets that the network was taught under a name; other questions are asked like `vqa2`."""
_CAPTION = "Say in one short sentence what this image shows."
_QUESTION_TOKENS = 512


class Molmoe(Backbone):
    """MolmoE, or a smaller network of its kind.

    Args:
        model: the network; it is frozen.
        tokenizer: knows the marks of an image.
        name: under which it was opened.
    """

    def __init__(self, model: MolmoeModel, tokenizer: "PreTrainedTokenizerFast", name: str) -> None:
        config = model.config
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.space = _space(config)
        self.vision_dim, self.text_dim = config.feature, config.hidden
        self.device = model.head.weight.device
        self.end_tokens = frozenset({_end(tokenizer, name)})
        self.layers = list(model.text.layers)
        self._marks = _marks(tokenizer, config, name)
        self._blocks = [
            flops.Block(
                flops.linear(layer), flops.expert(layer, config.experts), flops.pair(config.hidden)
            )
            for layer in self.layers
        ]

    def prepare(self, image: "Image", question: str, style: str, tier: str) -> Inputs:
        """Tile the image as a tier asks and tokenise the question."""
        geometry = self.model.config.geometry
        chosen = next(known for known in self.space.tiers if known.name == tier)
        cut = tiling.choose(*image.size, chosen)
        of_image = tiling.token_ids(cut, geometry, self._marks)
        # The network has no mark of a beginning: the one of an end stands there.
        ids = [*self.end_tokens, *of_image, *self._words(prompt(question, style))]
        parts = [1 + place for place, one in enumerate(of_image) if one == self._marks.part]
        pixels, cover = tiling.cut(image, cut, geometry)
        tensors = {
            "ids": torch.tensor([ids]),
            "places": torch.tensor(parts),
            "windows": tiling.windows(cut, geometry),
            "cover": cover,
            "pixels": pixels.to(self._dtype),
        }
        return Inputs(
            {name: tensor.to(self.device) for name, tensor in tensors.items()},
            cut,
            vision_tokens=len(of_image),
            text_tokens=len(ids) - len(of_image),
        )

    def overview(self, image: "Image") -> Tensor:
        """Return the pixels of the whole image at low resolution; a batch of 1 crop."""
        pixels = tiling.overview(image, self.model.config.geometry)
        return pixels[None].to(self.device, self._dtype)

    @torch.no_grad()
    def glance(self, pixels: Tensor) -> View:
        """Encode what `overview` returned."""
        said = self.model.look(pixels)
        return View(said[0].float().mean(0), said)

    @torch.no_grad()
    def text_feature(self, question: str) -> Tensor:
        """Return the mean of the frozen input embeddings of the bare question, (D,)."""
        ids = self._words(question)[:_QUESTION_TOKENS]
        rows = self.model.text.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        return rows.float().sum(0) / max(1, len(ids))

    @torch.no_grad()
    def encode(self, inputs: Inputs, view: View | None = None) -> Tensor:
        """Return the vectors of the parts of the image, to be added to their places."""
        pixels = inputs.tensors["pixels"]
        if view is None:
            said = self.model.look(pixels)
        else:
            said = torch.cat([view.hidden, self.model.look(pixels[1:])])
        return self.model.project(said, inputs.tensors["cover"], inputs.tensors["windows"])

    def apply(self, plan: Plan) -> AbstractContextManager[None]:
        """Run the text network by a plan inside the context; afterwards it is as it was."""
        return applied(self.layers, plan, self.space)

    @torch.no_grad()
    def prefill(self, inputs: Inputs, vision: Tensor) -> tuple[Tensor, Any]:
        """Return the logits of the first token of the answer, (V,), and a cache for `step`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.text.config)
        places = inputs.tensors["places"]
        hidden = self.model(inputs.tensors["ids"], vision, places, cache=cache)
        return self.model.head(hidden[0, -1]), cache

    @torch.no_grad()
    def step(self, token: int, state: Any) -> Tensor:
        """Append a token to the answer and return the logits of the next, (V,)."""
        hidden = self.model(torch.tensor([[token]], device=self.device), cache=state)
        return self.model.head(hidden[0, -1])

    def gflop(self, plan: Plan, inputs: Inputs, new_tokens: int) -> float:
        """Return the 10⁹ floating-point operations of an answer of `new_tokens` tokens."""
        head = flops.linear(self.model.head)
        words = flops.text(self._blocks, head, plan, inputs.tokens, new_tokens)
        return (_vision_flop(self.model, inputs) + words) / 1e9

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.head.weight.dtype

    def _words(self, text: str) -> list[int]:
        # A question that spells a mark of the network's own stays text.
        read = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(read["input_ids"])


def prompt(question: str, style: str) -> str:
    """Return what the network is asked.

    Args:
        question: bare; of captions it does not matter.
        style: name of the data set.
    """
    asked = f"{_STYLES.get(style, 'vqa2')}: {question}"
    return f" User: {_CAPTION if style == 'coco_caption' else asked} Assistant:"


def open_molmoe(
    folder: Path, device: torch.device, dtype: torch.dtype, experts: Experts = "auto"
) -> Molmoe:
    """Open a converted network.

    Args:
        folder: that `molmoe_convert.convert` wrote.
        device: that computes.
        dtype: of the weights.
        experts: how they run; `auto` is one expert after another on a CPU, where only that gains
            from fewer experts, else what suits a GPU.

    Raises:
        UserError: if the folder does not hold such a network, or only a part of it.
    """
    from transformers import PreTrainedTokenizerFast

    model = _empty(_config(folder))
    _load(model, folder, device, dtype)
    if not is_file(folder / "tokenizer.json"):
        raise UserError(f"{folder}: has no tokenizer.json", "Convert the original network again.")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    automatic = "eager" if device.type == "cpu" else "grouped_mm"
    model.text.set_experts_implementation(automatic if experts == "auto" else experts)
    return Molmoe(model.to(device), tokenizer, str(folder))


def _config(folder: Path) -> Config:
    path = folder / "config.json"
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{path}: model_type is not {MODEL_TYPE}", "Convert the original network first."
        )
    try:
        return config_from(values)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}", "Convert the original network again.") from None


def _empty(config: Config) -> MolmoeModel:
    """Build a network whose weights take no memory yet."""
    from accelerate import init_empty_weights

    # Tables of the network that are no weights are in no file: they are computed here.
    with init_empty_weights(include_buffers=False):
        return MolmoeModel(config)


def _load(model: MolmoeModel, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Read the weights, one file after another."""
    from safetensors import SafetensorError, safe_open

    missing = set(model.state_dict())
    for name in _shards(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                found = {key: file.get_tensor(key).to(device, dtype) for key in file.keys()}  # noqa: SIM118
            model.load_state_dict(found, strict=False, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder / name}: cannot be read ({error})") from None
        if strange := set(found) - missing:
            raise UserError(f"{folder / name}: {min(strange)} is not expected there")
        missing -= set(found)
    if missing:
        raise UserError(f"{folder}: no weights for {min(missing)}, {len(missing)} in all missing")


def _shards(folder: Path) -> list[str]:
    index = read_json(folder / INDEX)
    try:
        return sorted(set(index["weight_map"].values()))
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{folder / INDEX}: weight_map: expected names of files") from None


def _space(config: Config) -> Space:
    return Space(
        blocks=config.blocks,
        mixtures=(True,) * config.blocks,
        default_top_k=config.top_k,
        top_k_choices=top_k_choices(config.top_k),
        always_on=(0,),
        min_active=math.ceil(0.75 * config.blocks),
        max_active=config.blocks,
        tiers=tiling.TIERS,
    )


def _end(tokenizer: "PreTrainedTokenizerFast", name: str) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(f"{name}: the tokenizer has no eos_token")
    return tokenizer.eos_token_id


def _marks(tokenizer: "PreTrainedTokenizerFast", config: Config, name: str) -> tiling.Marks:
    known = tokenizer.get_vocab()
    for token in MARKS.values():
        number = known.get(token)
        if number is None or number >= config.embeddings:
            raise UserError(
                f"{name}: the tokenizer has the id {number} for {token}:"
                f" expected one below {config.embeddings}",
                "Take the tokenizer that was published with the weights.",
            )
    return tiling.Marks(**{part: known[token] for part, token in MARKS.items()})


def _vision_flop(model: MolmoeModel, inputs: Inputs) -> int:
    """Operations of tower, pooling and projector."""
    config, pool = model.config, model.pool
    patches = config.geometry.side**2
    crop = flops.tower(model.tower.encoder.layers, config.image_hidden, patches + 1)
    crop += patches * flops.convolution(model.tower.embeddings.patch_embedding)
    asked = flops.linear(pool.q_proj) + flops.linear(pool.out_proj)
    read = flops.linear(pool.k_proj) + flops.linear(pool.v_proj) + flops.pair(config.image_hidden)
    parts, window = inputs.tensors["windows"].shape
    part = asked + window * read + flops.linear(model.projector)
    return (1 + inputs.crops) * crop + parts * part
