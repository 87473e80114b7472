"""The prototype losses all at once against loops over images, concepts and prototypes.

Usage: python -m tests.benchmarks.csr_losses [--batch 16] [--width 128] [--rounds 5]

A step is the loss and its gradients. The loops hold what research code has: one small tensor
operation per image, concept and prototype. Vectors and prototypes are normalised before both.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr.losses import info_nce, present_pairs, soft_triple
from tests.benchmarks.rows import Row, in_seconds

QUICK = {"batch": 2, "rounds": 3}
SIZES = [(14, 5), (22, 100)]  # K, M
PRESENT = 0.15  # share of the concepts that an image shows

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def loop_soft_triple(vectors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    scale, gamma, margin = 20.0, 1000.0, 0.1
    losses = []
    for image, present in enumerate(targets):
        for own in range(len(present)):
            if present[own] == 0:
                continue
            logits = []
            for concept, rows in enumerate(prototypes):
                near = torch.stack([torch.dot(vectors[image, own], row) for row in rows])
                similar = ((gamma * near).softmax(0) * near).sum()
                logits.append(scale * (similar - margin * (concept == own)))
            losses.append(torch.stack(logits).logsumexp(0) - logits[own])
    return torch.stack(losses).mean()


def loop_info_nce(vectors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    losses = []
    for image, present in enumerate(targets):
        for own in range(len(present)):
            if present[own] == 0:
                continue
            logits = [
                [torch.dot(vectors[image, own], row) / 0.3 for row in rows] for rows in prototypes
            ]
            below = torch.stack([logit for concept in logits for logit in concept]).logsumexp(0)
            losses.append(torch.stack([below - logit for logit in logits[own]]).mean())
    return torch.stack(losses).mean()


def over_pairs(loss: Callable[..., Tensor]) -> Loss:
    return lambda vectors, targets, prototypes: loss(*present_pairs(vectors, targets), prototypes)


def over_all(loss: Callable[..., Tensor]) -> Loss:
    """With the same shapes in every batch: absent concepts have weight 0."""

    def weighted(vectors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
        concepts = torch.arange(targets.shape[1]).repeat(len(targets))
        return loss(vectors.flatten(0, 1), concepts, prototypes, weights=targets.flatten())

    return weighted


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[float, list[Tensor], float]:
    """Value, gradients of vectors and prototypes, and seconds."""
    vectors, targets, prototypes = inputs
    leaves = [vectors.clone().requires_grad_(), prototypes.clone().requires_grad_()]
    start = time.perf_counter()
    value = loss(leaves[0], targets, leaves[1])
    value.backward()
    seconds = time.perf_counter() - start
    return value.item(), [leaf.grad for leaf in leaves if leaf.grad is not None], seconds


def measured(batch: int = 16, width: int = 128, rounds: int = 5) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for num_concepts, num_prototypes in SIZES:
        draws = torch.Generator().manual_seed(0)
        vectors = torch.randn(batch, num_concepts, width, generator=draws)
        prototypes = torch.randn(num_concepts, num_prototypes, width, generator=draws)
        targets = (torch.rand(batch, num_concepts, generator=draws) < PRESENT).float()
        inputs = F.normalize(vectors, dim=2), targets, F.normalize(prototypes, dim=2)
        size = f"B={batch} K={num_concepts} M={num_prototypes}"
        print(f"{size}, {int(targets.sum())} pairs")
        for loss, loop in ((soft_triple, loop_soft_triple), (info_nce, loop_info_nce)):
            rows += compare(loss, loop, inputs, rounds, size)
    return rows


def compare(
    loss: Callable[..., Tensor], loop: Loss, inputs: tuple[Tensor, ...], rounds: int, size: str
) -> list[Row]:
    rows = []
    slow, slow_gradients, slow_seconds = step(loop, inputs)
    for form, vectorised in (("pairs", over_pairs(loss)), ("static", over_all(loss))):
        steps = [step(vectorised, inputs) for _ in range(rounds)]
        seconds = sorted(each[2] for each in steps)[rounds // 2]
        value, gradients, _ = steps[-1]
        for fast, expected in zip(gradients, slow_gradients, strict=True):
            # The loops do not differentiate through the length, so compare what is tangential.
            own = inputs[0] if fast.shape == inputs[0].shape else inputs[2]
            tangential = expected - (expected * own).sum(-1, keepdim=True) * own
            torch.testing.assert_close(fast, tangential, rtol=1e-3, atol=1e-4)
        assert abs(value - slow) < 1e-4 * abs(slow), (value, slow)
        print(
            f"  {loss.__name__:11} {form:6} {1e3 * seconds:8.2f} ms, loops {slow_seconds:6.2f} s,"
            f" ratio {slow_seconds / seconds:6.0f}, values {value:.6f} and {slow:.6f}"
        )
        work = f"csr: {loss.__name__}, {form}, {size}"
        rows.append(in_seconds(work, "loops over images and prototypes", slow_seconds, seconds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    measured(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
