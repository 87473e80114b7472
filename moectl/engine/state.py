"""The training state as bytes: weights, optimiser, position. No pickle that could run code."""

import io
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn

from moectl.engine.artefact import safe_load


def pack(
    module: nn.Module, optimizer: Any, scaler: Any, tracked: Mapping[str, Any], position: Any
) -> dict[str, bytes]:
    """Return the files of a checkpoint by name.

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
    buffer = io.BytesIO()
    torch.save(moving, buffer)
    return {
        "model.safetensors": safetensors.torch.save(weights),
        "optimizer.pt": buffer.getvalue(),
        "loop.json": json.dumps(position, indent=2).encode(),
    }


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
