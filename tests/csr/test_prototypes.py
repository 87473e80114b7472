import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr.losses import info_nce, soft_triple
from moectl.csr.prototypes import diagnostics, initial, renormalise_, revive, wins


def clusters(num_concepts: int = 2, forms: int = 5, each: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (K, forms, D) at right angles, vectors (P, D) around them, and their concepts."""
    centres = torch.eye(num_concepts * forms, 12).view(num_concepts, forms, 12)
    draws = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(num_concepts, forms, each, 12, generator=draws)
    vectors = 3 * F.normalize(centres[:, :, None] + noise, dim=3).flatten(0, 2)
    concepts = torch.arange(num_concepts).repeat_interleave(forms * each)
    order = torch.randperm(len(vectors), generator=draws)
    return centres, vectors[order], concepts[order]


# First values


@pytest.mark.parametrize("how", ["random", "sample", "kmeans"])
def test_first_prototypes_have_length_one_and_follow_from_the_seed(how):
    _, vectors, concepts = clusters()
    first = initial(vectors, concepts, 2, 4, how, seed=1)
    assert first.shape == (2, 4, 12)
    assert torch.allclose(first.norm(dim=2), torch.ones(2, 4))
    assert torch.equal(first, initial(vectors, concepts, 2, 4, how, seed=1))
    assert not torch.equal(first, initial(vectors, concepts, 2, 4, how, seed=2))


def test_samples_are_different_vectors_of_their_concept():
    _, vectors, concepts = clusters()
    found = initial(vectors, concepts, 2, 40, "sample")
    for concept in range(2):
        members = F.normalize(vectors[concepts == concept], dim=1)
        near = found[concept] @ members.T
        assert torch.allclose(near.amax(1), torch.ones(40))
        assert sorted(near.argmax(1).tolist()) == list(range(40))


def test_kmeans_finds_every_form():
    centres, vectors, concepts = clusters()
    found = initial(vectors, concepts, 2, 5, "kmeans")
    for concept in range(2):
        near = found[concept] @ centres[concept].T
        assert sorted(near.argmax(1).tolist()) == list(range(5))
        assert near.amax(1).min() > 0.99


@pytest.mark.parametrize("how", ["sample", "kmeans"])
def test_concepts_with_few_vectors_repeat_them_with_noise(how):
    vectors = torch.eye(3, 8)[[0, 0, 1, 2]]  # of the three of concept 0, two are the same
    found = initial(vectors, torch.tensor([0, 0, 0, 2]), 3, 5, how)
    assert torch.allclose(found.norm(dim=2), torch.ones(3, 5))
    for concept, forms in ((0, [0, 1]), (2, [2])):
        assert sorted(set(found[concept].argmax(1).tolist())) == forms
        assert found[concept].amax(1).min() > 0.99
        for one, other in combinations(found[concept], 2):
            assert not torch.equal(one, other)
    assert found[1] @ found[1].T == pytest.approx(torch.eye(5), abs=0.99)  # no two the same


def test_first_prototypes_keep_wide_types_only():
    _, vectors, concepts = clusters()
    assert initial(vectors.bfloat16(), concepts, 2, 3, "kmeans").dtype == torch.float32
    assert initial(vectors.double(), concepts, 2, 3, "kmeans").dtype == torch.float64


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match="'zeros'"):
        initial(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), 1, 1, "zeros")  # type: ignore[arg-type]


def test_renormalising_reaches_a_parameter_through_a_view():
    parameter = torch.nn.Parameter(torch.full((6, 4, 1, 1), 3.0))
    renormalise_(parameter.view(2, 3, 4))
    assert torch.equal(parameter, torch.full((6, 4, 1, 1), 0.5))
    assert parameter.requires_grad
    assert parameter.grad_fn is None


# Revival


def test_dead_prototypes_move_to_the_forms_that_nobody_covers():
    centres, vectors, concepts = clusters()
    prototypes = centres.clone()
    away = -F.normalize(centres[0].sum(0), dim=0)
    prototypes[0, 1:] = away  # one of five wins all of concept 0
    revived, moved = revive(prototypes, vectors, concepts)
    assert moved.tolist() == [[False] + [True] * 4, [False] * 5]
    assert torch.equal(revived[~moved], prototypes[~moved])
    assert torch.allclose(revived.norm(dim=2), torch.ones(2, 5))
    assert sorted((revived[0] @ centres[0].T).argmax(1).tolist()) == list(range(5))
    assert (prototypes[0, 1:] == away).all()  # what came in stays as it was
    assert diagnostics(prototypes, vectors, concepts).alive == 6
    assert diagnostics(revived, vectors, concepts).alive == 10


def test_a_new_place_is_a_vector_with_a_little_noise():
    centres, vectors, concepts = clusters(num_concepts=1, forms=2)
    away = -F.normalize(centres[0].sum(0), dim=0)
    prototypes = torch.stack([centres[0, 0], away])[None]
    revived, _ = revive(prototypes, vectors, concepts)
    near = revived[0, 1] @ F.normalize(vectors, dim=1).T
    worst = F.normalize(vectors, dim=1) @ centres[0, 0]
    assert near.argmax() == worst.argmin()
    assert 0.99 < near.max() < 1
    other, _ = revive(prototypes, vectors, concepts, seed=1)
    assert not torch.equal(other, revived)
    assert torch.equal(revive(prototypes, vectors, concepts)[0], revived)


def test_no_more_prototypes_come_alive_than_there_are_vectors():
    vectors, concepts = torch.eye(3, 8)[[0, 1, 2]], torch.tensor([0, 0, 1])
    prototypes = F.normalize(torch.ones(3, 4, 8), dim=2)
    _, moved = revive(prototypes, vectors, concepts)
    assert moved.sum(1).tolist() == [1, 0, 0]  # two vectors, one, and none


def test_nothing_moves_while_all_are_alive():
    centres, vectors, concepts = clusters()
    revived, moved = revive(centres, vectors, concepts)
    assert torch.equal(revived, centres)
    assert not moved.any()


def test_revival_leaves_no_trace_in_the_graph():
    centres, vectors, concepts = clusters()
    parameter = torch.nn.Parameter(-centres)
    assert not revive(parameter, vectors, concepts).prototypes.requires_grad


# Diagnostics


def test_diagnostics_agree_with_loops():
    draws = torch.Generator().manual_seed(0)
    vectors = torch.randn(30, 6, generator=draws)
    prototypes = torch.randn(3, 4, 6, generator=draws)
    concepts = torch.randint(3, (30,), generator=draws)
    units = F.normalize(prototypes, dim=2)
    right, covered, won = 0, 0.0, torch.zeros(3, 4)
    for vector, own in zip(F.normalize(vectors, dim=1), concepts.tolist(), strict=True):
        near = [[float(vector @ units[k, m]) for m in range(4)] for k in range(3)]
        right += max(range(3), key=lambda k, near=near: max(near[k])) == own
        covered += max(near[own])
        won[own, near[own].index(max(near[own]))] += 1
    within, across = [], []
    flat = [(k, units[k, m]) for k in range(3) for m in range(4)]
    for (i, one), (j, other) in combinations(flat, 2):
        (within if i == j else across).append(float(one @ other))
    assert torch.equal(wins(prototypes, vectors, concepts), won.long())
    found = diagnostics(prototypes, vectors, concepts)
    assert found._asdict() == {
        "accuracy": pytest.approx(right / 30),
        "coverage": pytest.approx(covered / 30),
        "alive": int((won > 0).sum()),
        "top_shares": pytest.approx((won.amax(1) / won.sum(1)).tolist()),
        "within_mean": pytest.approx(sum(within) / len(within), abs=1e-6),
        "within_max": pytest.approx(max(within)),
        "across_mean": pytest.approx(sum(across) / len(across), abs=1e-6),
        "across_max": pytest.approx(max(across)),
    }


def test_many_vectors_are_counted_chunk_by_chunk():
    centres, _, _ = clusters()
    vectors, concepts = centres.flatten(0, 1).repeat(250, 1), torch.arange(2).repeat_interleave(5)
    found = wins(centres, vectors, concepts.repeat(250))
    assert torch.equal(found, torch.full((2, 5), 250))


def test_what_cannot_be_said_is_nan():
    alone = torch.eye(1, 4)[None]
    found = diagnostics(alone, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert found.alive == 0
    unknown = [found.accuracy, found.coverage, *found.top_shares, *found[4:]]
    assert len(unknown) == 7
    assert all(math.isnan(value) for value in unknown)


def test_vectors_and_concepts_must_be_as_many():
    with pytest.raises(ValueError, match="3 vectors, but the concepts of 2"):
        wins(torch.eye(4)[None], torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))


# What the two losses make of concepts that have several forms


def fitted(loss) -> tuple[float, float]:
    """Mean cosine within concepts and coverage after fitting to 4 concepts of 5 clusters each."""
    draws = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 5, 32, generator=draws), dim=2)
    spread = 0.15 * torch.randn(4, 5, 12, 32, generator=draws)
    vectors = F.normalize(centres[:, :, None] + spread, dim=3).flatten(0, 2)
    concepts = torch.arange(4).repeat_interleave(5 * 12)
    prototypes = torch.randn(4, 5, 32, generator=draws).requires_grad_()
    renormalise_(prototypes)
    optimiser = torch.optim.Adam([prototypes], lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        loss(vectors, concepts, prototypes).backward()
        optimiser.step()
        renormalise_(prototypes)
    found = diagnostics(prototypes, vectors, concepts)
    return found.within_mean, found.coverage


def test_info_nce_collapses_where_soft_triple_covers_the_forms():
    collapsed, poorly = fitted(info_nce)
    spread, well = fitted(soft_triple)
    _, with_bonus = fitted(lambda *pairs: soft_triple(*pairs, mode="add"))
    # Means of vectors lie at 0.29 from them; margins lead nearer to the forms than bonuses.
    assert collapsed > 0.999
    assert spread < 0.25
    assert poorly < 0.32
    assert 0.45 < with_bonus < 0.53 < well
