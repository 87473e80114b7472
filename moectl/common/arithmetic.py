"""What a network computes for an image, without computing it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def traced_outputs(
    model: nn.Module, size: int, note: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Say what every module of a network gives for one image.

    Nothing is computed and the model is left alone: a copy without storage is traced.

    Args:
        model: from images (B, 3, H, W).
        size: pixels of a side.
        note: is given name, module and output of each that gives a single tensor, as they run; the
            tensor, in evaluation mode and on the meta device, has a shape alone.
    """

    def heard(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            note(names[module], module, output)

    traced = copy.deepcopy(model).to("meta").eval()
    names = {module: name for name, module in traced.named_modules()}
    for module in names:
        module.register_forward_hook(heard)
    with torch.no_grad():
        traced(torch.zeros(1, 3, size, size, device="meta"))
