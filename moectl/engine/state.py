"""The training state as files: weights, optimiser, position. No pickle that could run code."""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn

from moectl.engine.artefact import safe_load
from moectl.engine.checkpoint import Content, Streamed


def pack(
    module: nn.Module, optimizer: Any, scaler: Any, tracked: Mapping[str, Any], position: Any
) -> dict[str, Content]:
    """Return the files of a checkpoint by name; write them before the state changes.

    Args:
        module: the network.
        optimizer: anything with a `state_dict` of tensors and plain types.
        scaler: the loss scaler of fp16, or None.
        tracked: further objects with a `state_dict`, by name.
        position: where the loop stands, as JSON types.
    """
    seen: set[int] = set()
    weights = {}
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        # Shared layers appear under several names; the format wants memory of their own for each.
        weights[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    moving = {
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
        "tracked": {name: item.state_dict() for name, item in tracked.items()},
    }
    return {
        "model.safetensors": safetensors.torch.save(weights),
        "optimizer.pt": Streamed(_bytes(moving), lambda file: torch.save(moving, file)),
        "loop.json": json.dumps(position, indent=2).encode(),
    }


def _bytes(value: Any) -> int:
    """Return the size of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def unpack(
    files: Mapping[str, bytes], where: str, module: nn.Module, optimizer: Any, scaler: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the files of a checkpoint into a network and its optimiser.

    Returns:
        The position, and the state of each tracked object.

    Raises:
        UserError: naming `where`, if the optimiser's file holds more than tensors and plain types.
    """
    moving = safe_load(files["optimizer.pt"], f"{where}/optimizer.pt")
    module.load_state_dict(safetensors.torch.load(files["model.safetensors"]))
    optimizer.load_state_dict(moving["optimizer"])
    if scaler and moving["scaler"]:
        scaler.load_state_dict(moving["scaler"])
    return json.loads(files["loop.json"]), moving["tracked"]
