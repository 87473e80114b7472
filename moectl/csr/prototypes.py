"""What becomes of prototypes outside their loss: first values, unit length, revival, diagnostics.

Letters: K concepts, M prototypes per concept, D projection width, P present (image, concept) pairs
of the training images. A vector is won by the nearest prototype of its own concept; a prototype
that wins none is dead. Nothing here has a gradient, and every draw follows from a seed alone.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr.losses import cosines

Start = Literal["random", "sample", "kmeans"]

_JITTER = 0.01  # standard deviation per coordinate, so that no two prototypes stay the same
_CHUNK = 1024  # vectors compared with all prototypes at a time


class Revived(NamedTuple):
    """Prototypes after the dead ones have moved."""

    prototypes: Tensor
    """(K, M, D), a copy."""
    moved: Tensor
    """(K, M) bool; what an optimiser remembers of these rows no longer holds."""


class Diagnostics(NamedTuple):
    """How prototypes share the vectors among themselves; `nan` is what cannot be said."""

    accuracy: float
    """Share of the vectors whose nearest prototype of all belongs to their concept."""
    coverage: float
    """Mean cosine of the vectors with the prototypes that win them."""
    alive: int
    """Prototypes that win a vector, of K M."""
    top_shares: list[float]
    """Of each concept, the share of its vectors that its best prototype wins."""
    within_mean: float
    """Of the cosines between prototypes of the same concept; 1 when they have collapsed."""
    within_max: float
    across_mean: float
    """Of the cosines between prototypes of different concepts."""
    across_max: float


@torch.no_grad()
def initial(
    vectors: Tensor,
    concepts: Tensor,
    num_concepts: int,
    num_prototypes: int,
    how: Start = "random",
    seed: int = 0,
) -> Tensor:
    """First prototypes, (K, M, D), of length 1.

    Where a concept has fewer different vectors than M, they repeat with a little noise; where it
    has none, its prototypes are random.

    Args:
        vectors: (P, D); "random" looks at D only.
        concepts: (P,), the concept that each vector shows.
        num_concepts: K.
        num_prototypes: M.
        how: "random" directions, a "sample" of each concept's vectors, or their "kmeans" centres.
        seed: of all draws.

    Raises:
        ValueError: if it is none of these.
    """
    if how not in ("random", "sample", "kmeans"):
        raise ValueError(f"start {how!r}: expected 'random', 'sample' or 'kmeans'")
    draws = torch.Generator().manual_seed(seed)
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    prototypes = torch.randn(num_concepts, num_prototypes, vectors.shape[1], generator=draws)
    prototypes = F.normalize(prototypes.to(vectors), dim=2)
    if how == "random":
        return prototypes
    for concept in range(num_concepts):
        members = torch.unique(F.normalize(vectors[concepts == concept], dim=1), dim=0)
        members = members[torch.randperm(len(members), generator=draws).to(members.device)]
        centres = members[:num_prototypes]
        if how == "kmeans" and len(members) > num_prototypes:
            centres = _centres(members, num_prototypes, seed)
        if len(centres):
            repeats = centres.repeat(math.ceil(num_prototypes / len(centres)) - 1, 1)
            filled = torch.cat([centres, _jitter(repeats, draws)])
            prototypes[concept] = filled[:num_prototypes]
    return prototypes


def _centres(members: Tensor, count: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    found = KMeans(count, random_state=seed).fit(members.cpu().numpy())
    return F.normalize(torch.as_tensor(found.cluster_centers_).to(members), dim=1)


def _jitter(rows: Tensor, draws: torch.Generator) -> Tensor:
    noise = torch.randn(rows.shape, generator=draws).to(rows)
    return F.normalize(rows + _JITTER * noise, dim=-1)


@torch.no_grad()
def renormalise_(prototypes: Tensor) -> Tensor:
    """Bring prototypes (K, M, D) back to length 1, in place; a view of a parameter will do."""
    return prototypes.copy_(F.normalize(prototypes, dim=-1))


@torch.no_grad()
def revive(prototypes: Tensor, vectors: Tensor, concepts: Tensor, seed: int = 0) -> Revived:
    """Move dead prototypes, one by one, to the vector of their concept that is covered worst.

    The others stay as they are, and so do dead ones once a concept has as many prototypes in use as
    vectors.

    Args:
        prototypes: (K, M, D).
        vectors: (P, D).
        concepts: (P,), the concept that each vector shows.
        seed: of the noise on the new places.

    Source: Gonzalez 1985 (farthest point).
    """
    draws = torch.Generator().manual_seed(seed)
    won = wins(prototypes, vectors, concepts)
    revived = prototypes.detach().clone()
    moved = torch.zeros_like(won, dtype=torch.bool)
    for concept in range(len(prototypes)):
        members = vectors[concepts == concept].to(prototypes)
        alive = won[concept] > 0
        free = max(len(members) - int(alive.sum()), 0)
        dead = (~alive).nonzero()[:free, 0]
        if len(dead):
            revived[concept, dead] = _farthest(
                F.normalize(members, dim=1),
                F.normalize(prototypes[concept, alive], dim=1),
                len(dead),
                draws,
            )
            moved[concept, dead] = True
    return Revived(revived, moved)


def _farthest(members: Tensor, alive: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """`count` noisy members, each the least like those before it and those alive, (count, D)."""
    covered = (members @ alive.T).amax(1)
    places = []
    for _ in range(count):
        places.append(_jitter(members[covered.argmin()], draws))
        covered = covered.maximum(members @ places[-1])
    return torch.stack(places)


def wins(prototypes: Tensor, vectors: Tensor, concepts: Tensor) -> Tensor:
    """How many vectors (P, D) each prototype (K, M, D) wins, (K, M)."""
    return _count_wins(_assign(prototypes, vectors, concepts), concepts, prototypes)


class _Assigned(NamedTuple):
    guess: Tensor  # (P,) concept of the nearest prototype of all
    winner: Tensor  # (P,) nearest prototype of the own concept, 0 to M - 1
    cosine: Tensor  # (P,) with that winner


@torch.no_grad()
def _assign(prototypes: Tensor, vectors: Tensor, concepts: Tensor) -> _Assigned:
    if len(vectors) != len(concepts):
        raise ValueError(f"{len(vectors)} vectors, but the concepts of {len(concepts)}")
    parts = []
    chunks = torch.split(vectors, _CHUNK), torch.split(concepts, _CHUNK)
    for rows, own in zip(*chunks, strict=True):
        near = cosines(rows, prototypes)
        cosine, winner = near[torch.arange(len(own), device=own.device), own].max(1)
        parts.append((near.amax(2).argmax(1), winner, cosine))
    return _Assigned(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _count_wins(assigned: _Assigned, concepts: Tensor, prototypes: Tensor) -> Tensor:
    num_concepts, num_prototypes = prototypes.shape[:2]
    flat = concepts * num_prototypes + assigned.winner
    return flat.bincount(minlength=num_concepts * num_prototypes).view(num_concepts, -1)


@torch.no_grad()
def diagnostics(prototypes: Tensor, vectors: Tensor, concepts: Tensor) -> Diagnostics:
    """Measure how prototypes (K, M, D) fare on vectors (P, D) that show the concepts (P,)."""
    num_concepts, num_prototypes = prototypes.shape[:2]
    assigned = _assign(prototypes, vectors, concepts)
    won = _count_wins(assigned, concepts, prototypes)
    between = cosines(prototypes.flatten(0, 1), prototypes).flatten(1)  # (K M, K M)
    owner = torch.arange(num_concepts, device=between.device).repeat_interleave(num_prototypes)
    same = owner[:, None] == owner
    within = between[same & ~torch.eye(len(owner), dtype=torch.bool, device=same.device)]
    return Diagnostics(
        (assigned.guess == concepts).double().mean().item(),
        assigned.cosine.double().mean().item(),
        int((won > 0).sum()),
        (won.amax(1) / won.sum(1).double()).tolist(),
        *_mean_and_max(within),
        *_mean_and_max(between[~same]),
    )


def _mean_and_max(values: Tensor) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    return values.double().mean().item(), values.max().item()
