"""What a network costs, and whether it works.

Letters: B images, E experts, K chosen experts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moectl.diffusion.blocks import MixtureBlock
from moectl.diffusion.model import UNet

_STEPS = 1000  # of the process; the embedding takes any


class Times(NamedTuple):
    """Median milliseconds of a batch."""

    forward_ms: float
    """Forward pass in evaluation."""
    step_ms: float
    """Forward and backward pass in training, without the optimiser."""


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _inputs(model: UNet, size: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images, steps and classes, the same on every device."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator)
    t = torch.randint(_STEPS, (batch,), generator=generator)
    c = torch.randint(model.num_classes, (batch,), generator=generator)
    return x.to(device), t.to(device), c.to(device)


def _mixtures(model: UNet) -> list[MixtureBlock]:
    return [part for part in model.modules() if isinstance(part, MixtureBlock)]


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def parameters(model: UNet) -> tuple[int, int]:
    """Count all parameters, and those that an image meets: K of E experts in every mixture."""
    total = _count(model)
    idle = sum(
        _count(block.experts) // block.experts.count * (block.experts.count - block.k_active)
        for block in _mixtures(model)
    )
    return total, total - idle


def macs(model: UNet, size: int) -> int:
    """Count the multiply-adds for one image of `size` x `size` pixels.

    Convolutions and matrix products are counted, the weighted sum of the experts among them; norms,
    activations and Fourier transforms are not.
    """
    counter = FlopCounterMode(display=False)
    inputs = _inputs(model, size, 1)
    with _mode(model, training=False), torch.no_grad(), counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def times(model: UNet, size: int, batch: int, repeats: int = 3) -> Times:
    """Measure a forward pass and a training step without its optimiser, after one warm-up each.

    Limit: the original's form moves its running averages.
    """
    x, t, c = _inputs(model, size, batch)
    noise = torch.randn_like(x)

    def step() -> None:
        torch.autograd.backward(F.mse_loss(model(x, t, c)[0], noise))
        model.zero_grad(set_to_none=True)

    with _mode(model, training=False), torch.no_grad():
        forward_ms = _median_ms(lambda: model(x, t, c), repeats, x.device)
    with _mode(model, training=True):
        return Times(forward_ms, _median_ms(step, repeats, x.device))


def _median_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1000 * (time.perf_counter() - start))
    return median(found[1:])  # the first is the warm-up


def shapes(model: UNet, size: int, batch: int) -> list[tuple[str, str]]:
    """Return what comes out of each stage, an encoder's after it was halved."""
    stages = {
        "input_proj": model.input_proj,
        **{
            f"encoder {i}": stage.get_submodule("downsample")
            for i, stage in enumerate(model.encoder)
        },
        "bottleneck": model.bottleneck,
        **{
            f"decoder {i}": stage.get_submodule("conv_block")
            for i, stage in enumerate(model.decoder)
        },
        "output_proj": model.output_proj,
    }
    found: dict[str, str] = {}

    def note(name: str, output: Any) -> None:
        images = output[0] if isinstance(output, tuple) else output
        found[name] = " x ".join(map(str, images.shape))

    handles = [
        part.register_forward_hook(lambda _part, _inputs, output, name=name: note(name, output))
        for name, part in stages.items()
    ]
    try:
        with _mode(model, training=False), torch.no_grad():
            model(*_inputs(model, size, batch))
    finally:
        for handle in handles:
            handle.remove()
    return [(name, found[name]) for name in stages]


def check(model: UNet, size: int, batch: int) -> dict[str, Any]:
    """Run a training step without its optimiser on random images, and say what was seen.

    Limit: the original's form moves its running averages.

    Returns:
        Plain values: `output` (shape), `router_logits` (how many), `router_shapes` (each shape that
        occurs), `experts_hit` (distinct ones in each mixture), `without_gradient` (names), `finite`
        (the noise, the logits and all gradients).
    """
    x, t, c = _inputs(model, size, batch)
    model.zero_grad(set_to_none=True)
    with _mode(model, training=True):
        found, logits = model(x, t, c)
        torch.autograd.backward(F.mse_loss(found, torch.randn_like(x)))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    seen = [found, *logits, *(grad for grad in grads.values() if grad is not None)]
    active = [block.k_active for block in _mixtures(model)]
    return {
        "output": list(found.shape),
        "router_logits": len(logits),
        "router_shapes": [list(shape) for shape in sorted({tuple(one.shape) for one in logits})],
        "experts_hit": [
            len(one.topk(k, dim=1).indices.unique()) for one, k in zip(logits, active, strict=False)
        ],
        "without_gradient": [name for name, grad in grads.items() if grad is None],
        "finite": all(bool(one.isfinite().all()) for one in seen),
    }
