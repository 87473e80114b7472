"""Randomness as a function of coordinates, so that no generator state is ever stored."""

import hashlib
import random


def key(*coordinates: int | str) -> int:
    """Mix coordinates such as (seed, "step", 17) into 63 bits, equal on every machine.

    Source: the counter-based seeding of Karras et al. 2024 (EDM2), with BLAKE2 as the mixer.
    """
    digest = hashlib.blake2b(repr(coordinates).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*coordinates: int | str) -> None:
    """Seed Python, NumPy and torch (every device in use) from coordinates."""
    import numpy
    import torch

    value = key(*coordinates)
    random.seed(value)
    numpy.random.seed(value % 2**32)  # noqa: NPY002 - for libraries that draw from the global generator
    # `torch.manual_seed` also visits accelerators that are absent: 100 times slower.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)
