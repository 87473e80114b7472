"""A small network that answers at random but not with one word, and a picture to ask about."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from moectl.controller.backbone import Inputs
    from moectl.controller.llava import LlavaNext
    from moectl.controller.native import Native
    from moectl.controller.qwen_vl import QwenVl
    from moectl.controller.smolvlm import SmolVlm


@pytest.fixture(scope="session")
def enliven() -> Callable[[Any], Any]:
    """Scale the matrices of a random network up, so that it does not repeat one word for ever."""

    def enlivened(model: Any) -> Any:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(4)
            model.get_input_embeddings().weight.mul_(12)
        return model

    return enlivened


@pytest.fixture(scope="session")
def picture() -> "Image":
    """Noise, wider than high."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (150, 260, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="session")
def nano(enliven: Callable[[Any], Any]) -> "LlavaNext":
    """A small LLaVA-NeXT with OLMoE; tests leave it as it is."""
    from moectl.controller import tiny
    from moectl.controller.llava import LlavaNext

    model, processor = tiny.build("nano")
    return LlavaNext(enliven(model), processor, name="nano", instruct=False)


@pytest.fixture(scope="session")
def own_answer() -> Callable[..., tuple[int, ...]]:
    """Answer as transformers does by itself, from the pixels on."""

    def answer(backbone: "Native", inputs: "Inputs", new_tokens: int) -> tuple[int, ...]:
        given = {name: value for name, value in inputs.tensors.items() if name != "position_ids"}
        ids = backbone.model.generate(
            **given,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=sorted(backbone.end_tokens),
            pad_token_id=0,
        )
        return tuple(ids[0, inputs.tokens :].tolist())

    return answer


@pytest.fixture(scope="session")
def uncached_logits() -> "Callable[..., Tensor]":
    """The logits behind the last of some tokens of an answer, all computed anew."""

    @torch.no_grad()
    def logits(backbone: "Native", inputs: "Inputs", tokens: Sequence[int]) -> "Tensor":
        ids, positions = inputs.tensors["input_ids"], inputs.tensors["position_ids"]
        steps = torch.arange(1, 1 + len(tokens)) + positions.max()
        later = steps.expand(*positions.shape[:-1], -1)
        return backbone.model(
            input_ids=torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], 1),
            position_ids=torch.cat([positions, later], -1),
            mm_encoder_outputs={"image": backbone.encode(inputs)},
            use_cache=False,
        ).logits[0, -1]

    return logits


def _tokenizer(*marks: str) -> Any:
    from moectl.controller import tiny

    tokenizer = tiny.build("nano")[1].tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CONTENT = (
    "{% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}\nA:"
)


@pytest.fixture(scope="session")
def qwen(enliven: Callable[[Any], Any]) -> "QwenVl":
    """A small Qwen3-VL with experts, 4 of whose tokens count as a crop."""
    from transformers import (
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from moectl.controller.qwen_vl import QwenVl

    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = _tokenizer(*marks)
    tokenizer.image_token = marks[0]
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(patch_size=4),
        tokenizer,
        Qwen3VLVideoProcessor(patch_size=4),
        chat_template=_CONTENT.replace("MARK", f"{marks[2]}{marks[0]}{marks[3]}"),
    )
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    experts["head_dim"] = 32  # twice a head's share of the width, as in the large ones
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    config = Qwen3VLMoeConfig(
        text_config={**_TEXT, **experts, "vocab_size": len(tokenizer), "rope_parameters": turns},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **dict(zip(names, tokenizer.convert_tokens_to_ids(list(marks)), strict=True)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enliven(Qwen3VLMoeForConditionalGeneration(config))
    return QwenVl(model, processor, name="qwen", instruct=False, crop_tokens=4)


@pytest.fixture(scope="session")
def idefics(enliven: Callable[[Any], Any]) -> "SmolVlm":
    """A small Idefics3, made for images of four crops along an edge."""
    return _of_family("Idefics3", enliven)


@pytest.fixture(scope="session")
def smol(enliven: Callable[[Any], Any]) -> "SmolVlm":
    """A small SmolVLM, likewise."""
    return _of_family("SmolVLM", enliven)


def _of_family(family: str, enliven: Callable[[Any], Any]) -> "SmolVlm":
    import transformers
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    from moectl.controller.smolvlm import SmolVlm

    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(4) for column in range(4)]
    tokenizer = _tokenizer("<fake_token_around_image>", "<global-img>", *places)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=_CONTENT.replace("MARK", "<image>"),
    )
    config = getattr(transformers, f"{family}Config")(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=4,
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enliven(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    return SmolVlm(model, processor, name=family, instruct=False)


_SIMULATED = {
    "backbone.model": "sim", "data.train_samples": 6, "data.val_samples": 4,
    "policy.hidden": 8, "policy.budget_dim": 8, "budget.low": 100, "budget.high": 340,
    "grpo.group_size": 3, "grpo.clone_steps": 2, "optim.lr": 0.01, "train.epochs": 2,
    "train.batch_size": 2, "train.tensorboard": False, "profile.samples": 3, "profile.plans": 12,
    "profile.what": ("importance", "grid", "latency"),
}  # fmt: skip


@pytest.fixture(scope="session")
def simulated() -> Callable[..., Any]:
    """Settings of a small training on the simulator, with changes such as train__epochs=4."""
    from moectl.controller.settings import ControllerSettings
    from moectl.engine.settings import resolve

    def settings(**values: Any) -> Any:
        given = _SIMULATED | {key.replace("__", "."): value for key, value in values.items()}
        return resolve(ControllerSettings, given, [], [])[0]

    return settings


@pytest.fixture(scope="session")
def open_sim(simulated: Callable[..., Any]) -> Callable[..., Any]:
    """Open a run of these settings in a folder, a new one or the one that is there."""
    from moectl.engine import run as module
    from moectl.engine.launch import build_accelerator

    def opened(folder: Path, command: str = "grpo", **values: Any) -> Any:
        settings = simulated(**values)
        accelerator = build_accelerator(settings.train, cpu=True)
        if folder.exists():
            return module.reopen(folder, settings, accelerator, auto=False)
        named = {"room": "controller", "command": command, "name": folder.name, "origin": {}}
        return module.create(settings, accelerator, out=folder, **named)

    return opened


@pytest.fixture(scope="session")
def train_sim(open_sim: Callable[..., Any]) -> Callable[..., Path]:
    """Train on the simulator in a folder, or go on there; no pictures."""
    from moectl.controller import train
    from moectl.engine.errors import Interrupted

    def call(folder: Path, *, stop_after: int = 0, **values: Any) -> Path:
        own = train._roll_out
        logging.getLogger("moectl").setLevel(logging.INFO)  # for log.txt

        def rolled(loop: Any, *given: Any) -> Any:
            if loop.update + 1 == stop_after:
                loop.run.stop.reason = "asked to"
            return own(loop, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "report", lambda _: None)
            patch.setattr(train, "_roll_out", rolled)
            with open_sim(folder, **values) as run:
                if stop_after:
                    with pytest.raises(Interrupted, match="asked to"):
                        train.train(run.settings, run)
                else:
                    train.train(run.settings, run)
        return folder

    return call


@pytest.fixture(scope="session")
def sim_run(tmp_path_factory: pytest.TempPathFactory, train_sim: Callable[..., Path]) -> Path:
    """A finished training of two epochs; tests leave it as it is."""
    return train_sim(tmp_path_factory.mktemp("sim") / "run")


@pytest.fixture(scope="session")
def profile_sim(open_sim: Callable[..., Any]) -> Callable[..., Path]:
    """Profile the simulator in a folder, or go on there; no pictures."""
    from moectl.controller import profile

    def call(folder: Path, **values: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(profile, "report", lambda _: None)
            with open_sim(folder, "profile", **values) as run:
                profile.run_profile(run)
        return folder

    return call


@pytest.fixture(scope="session")
def sim_tables(tmp_path_factory: pytest.TempPathFactory, profile_sim: Callable[..., Path]) -> Path:
    """The tables of a profile of the simulator; tests leave them as they are."""
    return profile_sim(tmp_path_factory.mktemp("sim") / "tables")


@pytest.fixture
def controller(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of controller in this process; return exit code, stdout and stderr."""
    from moectl.cli import _run

    def call(*words: str) -> tuple[int, str, str]:
        code = _run(["controller", *words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def nano_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of the network nano by formula; tests leave them as they are.

    The larger a plan, the more accurate, and 15 to 45 ms in the lookup table.
    """
    from itertools import product

    from moectl.controller.latency import STAGES, Estimator, Stage
    from moectl.controller.table import Row, Table
    from moectl.engine.files import write_json

    folder, order = tmp_path_factory.mktemp("nano") / "tables", [0, 3, 1, 5, 2, 4]
    folder.mkdir()
    rows = [
        Row(tier, k, count, (more + k + count) / 40, 6.0 + more + k + count, 4, 0.0, 0.0)
        for (tier, more), k, count in product(
            {"low": 0, "medium": 10, "high": 25}.items(), (4, 6, 8), (5, 6)
        )
    ]
    known = {"model": "nano", "order": order, "new_tokens": 3.2}
    write_json(folder / "lut.json", Table(tuple(rows), "total", "ms", known).plain())
    weights = {
        "vision": {"crops": 1.0, "fixed": 4.0},
        "prefill": {"blocks x tokens": 0.01, "experts x tokens": 0.001, "fixed": 1.0},
        "step": {"blocks": 0.5, "experts": 0.05, "fixed": 0.5},
    }
    stages = {
        name: Stage(dict.fromkeys(STAGES[name], 0.0) | known, "plain", 1.0, 0.0, 40)
        for name, known in weights.items()
    }
    shares = [number / 200 for number in range(40)]
    objectives = ("total", "ttft", "prefill", "per_token")
    fitted = Estimator(6, stages, dict.fromkeys(objectives, shares))
    write_json(folder / "latency.json", fitted.plain())
    write_json(folder / "overhead.json", {"controller_ms": 2.0})
    scores = {str(block): 1.0 - place / 10 for place, block in enumerate(order)}
    write_json(folder / "importance.json", {"importance_scores": scores})
    return folder


@pytest.fixture(scope="session")
def nano_run(tmp_path_factory: pytest.TempPathFactory, nano_tables: Path) -> Path:
    """A training of one epoch on answers of the network nano; tests leave it as it is."""
    from contextlib import redirect_stdout
    from io import StringIO

    from moectl.cli import _run
    from moectl.controller import train

    folder = tmp_path_factory.mktemp("nano") / "run"
    words = (
        "--model", "nano", "--dataset", "synth_vqa", "--clock", "cpu", "--max-new-tokens", "3",
        "--train-samples", "2", "--val-samples", "1", "--epochs", "1", "--group-size", "2",
        "--latency-source", "table", "--tables", str(nano_tables), "--budget-mode", "auto",
        "--hidden", "8", "--set", "policy.budget_dim=8", "--set", "train.tensorboard=false",
        "--warmup", "0", "--out", str(folder), "--quiet", "--cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train, "report", lambda _: None)
        assert _run(["controller", "grpo", *words]) == 0
    return folder


@pytest.fixture(scope="session")
def asked_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a picture to ask about."""
    from moectl.controller.synth import draw

    path = tmp_path_factory.mktemp("image") / "q.png"
    draw(1, 0).image.save(path)
    return path
