"""Where 16 bits would not do."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Compute in the types of the operands for a while, whatever autocast would take.

    Args:
        device_type: of the operands, as in `tensor.device.type`.
    """
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device knows no autocast
