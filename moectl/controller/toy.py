"""Teach a small random network to answer, so that plans have something to trade.

The whole network learns, image tower included. It begins with the coarsest tier, whose short
sequences cost least and show most; after that every update draws a tier. Now and then blocks are
skipped or experts left out, so that the network stands plans that do the same.

Letters: B images, H W pixels, M crops, S tokens, V vocabulary, W last tokens.
"""

import logging
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl import __version__
from moectl.controller import tiny
from moectl.controller.data import Data, images, load
from moectl.controller.llava import LlavaNext
from moectl.controller.open import FACTS, WEIGHTS
from moectl.controller.plans import Plan, Space, Tier
from moectl.controller.report import report
from moectl.controller.synth import QUESTIONS
from moectl.controller.tiling import MEAN, STD, choose
from moectl.engine.errors import UserError
from moectl.engine.files import csv_text, write_bytes, write_json, write_text
from moectl.engine.seeding import key
from moectl.engine.sources import TensorSource

if TYPE_CHECKING:
    from PIL.Image import Image

    from moectl.controller.samples import Sample
    from moectl.controller.settings import ControllerSettings
    from moectl.engine.loop import Loop
    from moectl.engine.run import Run

log = logging.getLogger(__name__)

MONITOR = "val/accuracy"
TABLE = "toy.csv"
_BEGINNING = 0.3
"""Share of the training that sees the coarsest tier alone."""
_SHARES = (0.15, 0.5, 0.35)
"""Of the tiers after that: the one in the middle is the hardest to read, the last costs most."""
_FEWER_EXPERTS = 0.1
"""Probability that an update has random numbers of experts."""
_WARMUP = 0.05
"""Share of the training in which the learning rate rises."""
_BETAS = (0.9, 0.98)
_ENLIVEN = 5.0
"""Factor on random matrices, whose usual size suits wider networks."""
_TURNS = 4
"""Most questions about an image in one update."""
_AT_ONCE = 32
_NOTHING, _IMAGE, _PADDING = -100, -1, -2


class Batch(NamedTuple):
    """Images, each with questions and answers one after the other; all of one tier."""

    pixels: Tensor
    """(B, 1 + M, 3, H, W) the view of the whole image, then the crops."""
    sizes: Tensor
    """(B, 2) height and width of the image that was cut into crops."""
    ids: Tensor
    """(B, S) tokens: image, then W of questions and answers, padded at the end."""
    positions: Tensor
    """(B, S) of each token; every question begins right behind the image."""
    sees: Tensor
    """(B, 1, S, S) whether a token sees another: those before it of image and own question."""
    targets: Tensor
    """(B, W) the token after each of the last W, where it is of an answer; else -100."""


def train_toy(settings: "ControllerSettings", run: "Run[ControllerSettings]") -> None:
    """Teach the network that `settings.toy` describes, and measure what its plans are worth.

    Writes `vlm.safetensors` and `vlm.json`, the weights of the best epoch and how they are built,
    and `toy.csv`, the accuracy of plans by kind of question.

    Raises:
        UserError: if it runs in several processes, or the questions cannot be loaded.
    """
    if run.accelerator.num_processes > 1:
        raise UserError("toy teaches in one process", "start it without accelerate launch")
    toy = settings.toy
    data = load_apart(settings)
    run.keep_to({**data.facts, "images": data.facts["samples"]})
    backbone = build(settings, run.device)
    pictures = by_image(data.train)
    first = [samples for samples in pictures if "small" not in map(kind_of, samples)] or pictures
    loop = _loop(settings, run, backbone.model, len(pictures))
    facts = {
        "size": toy.size,
        "text": toy.text,
        "seed": settings.train.seed,
        **data.facts,
        "moectl": __version__,
    }
    log.info("%s: %d questions, %d to validate", run.folder, len(data.train), len(data.val))
    tiers = [full(backbone.space, tier) for tier in backbone.space.tiers]
    loop.rehearse(lambda: right(backbone, data.val[:1], tiers[-1]))

    for step in loop:
        dice = random.Random(key(settings.train.seed, "toy", step.index))
        plan = draw_plan(backbone.space, step.progress, toy.depth_drop, dice)
        shown = first if step.progress < _BEGINNING else pictures
        chosen = [shown[row % len(shown)] for row in step.batch[1].tolist()]
        turns = [dice.sample(samples, min(_TURNS, len(samples))) for samples in chosen]
        batch = read(backbone, turns, plan.tier)
        with backbone.apply(plan):
            logits = answers(loop.model, batch)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
        step.update(loss)
        if step.ends_epoch:
            found = {f"val/{plan.tier}": _mean(right(backbone, data.val, plan)) for plan in tiers}
            if step.score({MONITOR: statistics.mean(found.values()), **found}):
                _save(run, backbone.model, {**facts, "epoch": step.epoch + 1, **found})

    _finish(run, backbone, data.val)


def load_apart(settings: "ControllerSettings") -> Data:
    """Load questions to learn from about other images than the same settings give to the policy.

    Raises:
        UserError: if no other image is left, or as `load`.
    """
    section, toy, seed = settings.data, settings.toy, settings.train.seed
    taken = images(section, seed)
    counts = {
        "train_samples": section.train_samples + toy.train_samples,
        "val_samples": max(section.val_samples, toy.val_samples),
    }
    found = load(section.model_copy(update=counts), seed)
    train = [sample for sample in found.train if sample.image_id not in taken]
    train, val = train[: toy.train_samples], found.val[: toy.val_samples]
    if not train:
        raise UserError(
            f"{', '.join(section.dataset)}: no images but those of the policy's own questions",
            "ask for fewer of these: --train-samples, --val-samples",
        )
    return Data(train, val, {**found.facts, "samples": {"train": len(train), "val": len(val)}})


def build(settings: "ControllerSettings", device: torch.device) -> LlavaNext:
    """Return a random network that can be trained; its weights depend on the seed alone."""
    toy = settings.toy
    built: tuple[Any, Any] = tiny.build(toy.size, toy.text, settings.train.seed)
    model, processor = built[0].to(device), built[1]
    backbone = LlavaNext(model, processor, name="toy", instruct=False)
    model.requires_grad_(True)
    space = backbone.space
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                # Routers stay as they are drawn, nearly even: experts left out are then missed.
                weight.requires_grad_(False)
            elif weight.ndim > 1:
                weight.mul_(_ENLIVEN)
            if name.endswith("experts.down_proj"):
                weight.mul_(weight.shape[0] / math.sqrt(space.default_top_k))
    return backbone


def _loop(
    settings: "ControllerSettings", run: "Run[ControllerSettings]", model: nn.Module, count: int
) -> "Loop":
    toy = settings.toy
    train = settings.train.model_copy(
        update={"epochs": toy.epochs, "batch_size": toy.batch_size, "accumulate": 1}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=toy.lr, betas=_BETAS)
    rows = torch.arange(count)
    source = TensorSource(rows, rows, None, lambda numbers: numbers)

    def schedule(epochs: float) -> float:
        return rate(epochs / toy.epochs)

    return run.loop(model, source, optimizer, schedule, MONITOR, train=train)


def rate(progress: float) -> float:
    """Return the factor on the learning rate: up in a line, then down along a cosine."""
    return min(1.0, progress / _WARMUP) * (1 + math.cos(math.pi * progress)) / 2


def by_image(samples: "Sequence[Sample]") -> "list[list[Sample]]":
    """Put questions about the same image together."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.image_id, []).append(sample)
    return list(found.values())


def draw_plan(space: Space, progress: float, drop: float, dice: random.Random) -> Plan:
    """Draw the plan of an update.

    Args:
        space: of the network.
        progress: share of the training that is done.
        drop: probability of skipping a block; no more are skipped than the space allows.
        dice: what is drawn from.
    """
    tier = dice.choices(space.tiers, _SHARES)[0] if progress >= _BEGINNING else space.tiers[0]
    skipped = [block for block in space.optional if dice.random() < drop]
    most = space.blocks - space.min_active
    skipped = dice.sample(skipped, min(most, len(skipped)))
    top_k = space.uniform(space.default_top_k)
    if any(space.free) and dice.random() < _FEWER_EXPERTS:
        top_k = tuple(
            dice.choice(space.top_k_choices) if free else own
            for own, free in zip(top_k, space.free, strict=True)
        )
    return Plan(tier.name, tuple(block not in skipped for block in range(space.blocks)), top_k)


def full(space: Space, tier: Tier) -> Plan:
    """Return the plan of a tier that has all blocks and experts."""
    return Plan(tier.name, space.full.active, space.full.top_k)


def read(backbone: LlavaNext, turns: "Sequence[Sequence[Sample]]", tier: str) -> Batch:
    """Read images and tokenise questions and answers, as the network is asked them later.

    Images become squares, so that all have the same number of tokens. Questions about the same
    image share it, but none sees another.

    Args:
        backbone: the network.
        turns: questions about each of B images.
        tier: name of the tier that all of them get.
    """
    side = choose(1, 1, next(known for known in backbone.space.tiers if known.name == tier))[0]
    pixels = torch.stack([_pixels(samples[0].open(), side) for samples in turns])
    sizes = torch.full((len(turns), 2), side * tiny.CROP)
    parts = (pixels, sizes, *_tokens(backbone.processor, turns, side))
    return Batch(*(part.to(backbone.model.device) for part in parts))


def _pixels(image: "Image", side: int) -> Tensor:
    """Cut an image into side × side crops, behind a view of the whole: (1 + M, 3, H, W)."""
    from PIL import Image

    def resized(edge: int) -> Tensor:
        small = image.resize((edge, edge), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)

    crop = tiny.CROP
    cut = resized(side * crop).reshape(3, side, crop, side, crop).permute(1, 3, 0, 2, 4)
    crops = torch.cat([resized(crop)[None], cut.flatten(0, 1)]).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (crops - mean) / std


def _tokens(
    processor: Any, turns: "Sequence[Sequence[Sample]]", side: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tokens of a batch, their positions, what each sees, and what each asks for."""
    tokenizer = processor.tokenizer
    patches = tiny.CROP // tiny.PATCH
    places = patches**2 + side * patches * (side * patches + 1)
    image = tokenizer.convert_tokens_to_ids(tiny.IMAGE)
    begin = torch.tensor([tokenizer.bos_token_id] + [image] * places).expand(len(turns), -1)
    rows = [_words(tokenizer, samples) for samples in turns]
    words, targets, place, turn = (
        _padded([row[part] for row in rows], value)
        for part, value in enumerate((tokenizer.pad_token_id, _NOTHING, 0, _PADDING))
    )
    ids = torch.cat([begin, words], 1)
    of_image = begin.shape[1]
    positions = torch.cat([torch.arange(of_image).expand_as(begin), of_image + place], 1)
    turn = torch.cat([torch.full_like(begin, _IMAGE), turn], 1)
    own = (turn[:, None] == turn[:, :, None]) | (turn[:, None] == _IMAGE)
    return ids, positions, own.tril()[:, None], targets


def _words(tokenizer: Any, samples: "Sequence[Sample]") -> tuple[list[int], ...]:
    """Return W tokens, what each asks for, its place in its question and that question's number."""
    found: tuple[list[int], ...] = ([], [], [], [])
    for number, sample in enumerate(samples):
        text = tiny.prompt(sample.question).removeprefix(tiny.IMAGE)
        question = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(statistics.mode(sample.answers), add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        line = question + answer[:-1]
        asked = [_NOTHING] * (len(question) - 1) + answer
        for part, values in zip(
            found, (line, asked, range(len(line)), [number] * len(line)), strict=True
        ):
            part.extend(values)
    return found


def _padded(lines: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, lines))
    return torch.tensor([line + [value] * (longest - len(line)) for line in lines])


def answers(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of what follows the last W tokens, (B, W, V)."""
    return model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.sees,
        pixel_values=batch.pixels,
        image_sizes=batch.sizes,
        logits_to_keep=batch.targets.shape[1],
        use_cache=False,
    ).logits


@torch.inference_mode()
def right(backbone: LlavaNext, samples: "Sequence[Sample]", plan: Plan) -> list[bool]:
    """Return whether a plan would answer each question in exactly its answer's words."""
    backbone.model.eval()
    found: list[bool] = []
    for start in range(0, len(samples), _AT_ONCE):
        turns = [[sample] for sample in samples[start : start + _AT_ONCE]]
        batch = read(backbone, turns, plan.tier)
        with backbone.apply(plan):
            guesses = answers(backbone.model, batch).argmax(-1)
        # Greedy decoding makes the answer if and only if every token of it follows the others.
        fits = (guesses == batch.targets) | (batch.targets == _NOTHING)
        found.extend(fits.all(1).tolist())
    return found


def kind_of(sample: "Sample") -> str:
    """Return what a question is about, or the sort of its answer."""
    kinds = {question: kind for kind, question in QUESTIONS.items()}
    closed = "yes/no" if set(sample.answers) & {"yes", "no"} else "other"
    return kinds.get(sample.question, closed)


def plans_of(space: Space) -> Iterator[tuple[str, Plan]]:
    """Yield plans that differ from the full one in one respect, and what that is."""
    for tier in space.tiers:
        yield tier.name, full(space, tier)
    finest, everything = space.tiers[-1].name, space.full
    for top_k in space.top_k_choices[:-1]:
        yield f"top_k {top_k}", Plan(finest, everything.active, space.uniform(top_k))
    for block in space.optional:
        active = tuple(other != block for other in range(space.blocks))
        yield f"without block {block}", Plan(finest, active, everything.top_k)


def _finish(
    run: "Run[ControllerSettings]", backbone: LlavaNext, samples: "Sequence[Sample]"
) -> None:
    """Measure plans with the best weights, by kind of question."""
    from safetensors.torch import load_file

    backbone.model.load_state_dict(load_file(run.folder / WEIGHTS))
    kinds = [kind_of(sample) for sample in samples]
    rows: list[dict[str, Any]] = []
    for name, plan in plans_of(backbone.space):
        hits = right(backbone, samples, plan)
        of_kind = {
            kind: _mean([hit for hit, other in zip(hits, kinds, strict=True) if other == kind])
            for kind in sorted(set(kinds))
        }
        rows.append({"plan": name, "all": _mean(hits), **of_kind})
        shown = "  ".join(f"{kind} {share:.1%}" for kind, share in list(rows[-1].items())[1:])
        log.info("%-16s %s", name, shown)
    if run.is_main:
        write_text(run.folder / TABLE, csv_text(rows))
    run.note(scores={"accuracy": {row["plan"]: row["all"] for row in rows}})
    if run.is_main:
        report(run.folder)


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _save(run: "Run[ControllerSettings]", model: nn.Module, facts: dict[str, Any]) -> None:
    from safetensors.torch import save

    if run.is_main:
        state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        write_bytes(run.folder / WEIGHTS, save(state))
        write_json(run.folder / FACTS, facts)
