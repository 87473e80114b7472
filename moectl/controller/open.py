"""Open a vision-language network: a small one of our own, a folder, or a name on the hub."""

import logging
import re
from pathlib import Path
from typing import Any, cast

import torch

from moectl.controller import tiny
from moectl.controller.backbone import Backbone
from moectl.engine.errors import UserError
from moectl.engine.files import is_file, read_json
from moectl.engine.launch import offline

log = logging.getLogger(__name__)

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

FAMILIES = ("llava_next", "qwen3_vl_moe", "qwen3_5_moe", "idefics3", "smolvlm", "moectl_molmoe")
"""What `model_type` in a network's config.json may be; the last is a converted MolmoE."""

WEIGHTS, FACTS = "vlm.safetensors", "vlm.json"
"""A network that was taught here: its weights, and how it is built."""


def open_backbone(
    model: str, *, device: torch.device | str, dtype: str = "auto", experts: Any = "auto"
) -> Backbone:
    """Open a network, frozen, on a device.

    Args:
        model: `tiny` or `nano`, random; a folder of a network that was taught or converted here; a
            folder of transformers; or a name on the hub. No code of theirs is run, and weights are
            read from safetensors alone.
        device: that computes.
        dtype: of the weights; `auto` is float32 on a CPU and what they were saved in on a GPU.
        experts: how they run; `auto` is one after another on a CPU.

    Raises:
        UserError: if there is no such network, or it is of a family that is not known.
    """
    check_network(model)
    device = torch.device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    folder = Path(model).expanduser()
    if model in tiny.SIZES:
        return _small(model, tiny.build(cast("tiny.Name", model)), device, dtype, experts)
    if is_file(folder / FACTS):
        return _small(model, _taught(folder), device, dtype, experts)
    if is_file(folder / "config.json"):
        values = read_json(folder / "config.json")
        if isinstance(values, dict) and values.get("model_type") == "moectl_molmoe":
            from moectl.controller.molmoe import open_molmoe

            saved = "bfloat16" if dtype == "auto" else dtype
            return open_molmoe(folder, device, getattr(torch, saved), experts)
        return _native(str(folder), model, device, dtype, experts)
    if not offline():
        log.warning("fetching %s from the hub, if it is not kept already", model)
    return _native(model, model, device, dtype, experts)


def check_network(model: str) -> None:
    """Refuse what cannot be the name of a network; nothing of it is loaded or fetched.

    Args:
        model: see `open_backbone`.

    Raises:
        UserError: if there is no such folder nor such a name, or the folder says that it holds a
            network of a family that is not known.
    """
    folder = Path(model).expanduser()
    if model in tiny.SIZES or is_file(folder / FACTS):
        return
    if is_file(folder / "config.json"):
        values = read_json(folder / "config.json")
        kind = values.get("model_type", FAMILIES[0]) if isinstance(values, dict) else None
        if kind not in FAMILIES:
            raise UserError(f"{model}: a network of the family {kind}", _HINT)
    elif not _NAME.fullmatch(model):
        raise UserError(f"{model}: no such network", _HINT)


def _small(
    name: str, built: tuple[Any, Any], device: torch.device, dtype: str, experts: str
) -> Backbone:
    from moectl.controller.llava import LlavaNext

    model, processor = built
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model = model.to(device, wanted)
    return LlavaNext(model, processor, name=name, experts=experts, instruct=False)


def _taught(folder: Path) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    facts = read_json(folder / FACTS)
    try:
        model, processor = tiny.build(facts["size"], facts["text"])
    except (KeyError, TypeError):
        raise UserError(
            f"{folder / FACTS}: does not say how the network is built",
            f"expected size ({', '.join(tiny.SIZES)}) and text",
        ) from None
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS}: {_line(error)}") from None
    return model, processor


def _native(source: str, name: str, device: torch.device, dtype: str, experts: str) -> Backbone:
    import transformers

    # Their types say less than what they take and return.
    library: Any = transformers
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline()}
    try:
        kind = library.AutoConfig.from_pretrained(source, **safe).model_type
    except Exception as error:  # the library raises what its parts do
        kept = not offline() or Path(source).exists()
        why = _line(error) if kept else f"MOECTL_OFFLINE forbids to fetch it; {_line(error)}"
        raise UserError(f"{name}: no network of a known family ({why})", _HINT) from None
    if kind not in FAMILIES:
        raise UserError(f"{name}: a network of the family {kind}", _HINT)
    try:
        processor = library.AutoProcessor.from_pretrained(source, **safe)
        model, report = library.AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            device_map={"": device},
            output_loading_info=True,
            **safe,
        )
    except Exception as error:  # likewise
        raise UserError(f"{name}: cannot be opened ({_line(error)})") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} of its weights are missing, such as {missing[0]}")
    return _adapter(kind, model, processor, name, experts)


def _adapter(kind: str, model: Any, processor: Any, name: str, experts: str) -> Backbone:
    if kind == "llava_next":
        from moectl.controller.llava import LlavaNext

        return LlavaNext(model, processor, name=name, experts=experts)
    if kind.startswith("qwen"):
        from moectl.controller.qwen_vl import QwenVl

        return QwenVl(model, processor, name=name, experts=experts)
    from moectl.controller.smolvlm import SmolVlm

    return SmolVlm(model, processor, name=name)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


_HINT = (
    f"known families: {', '.join(FAMILIES)}; expected tiny, nano, a folder with vlm.json or"
    " config.json, or the name of a network on the hub, owner/name"
)
