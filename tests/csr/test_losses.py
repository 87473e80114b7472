import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, tensor
from torch.autograd import gradcheck

from moectl.csr.losses import (
    asymmetric,
    box_masks,
    class_balanced_weights,
    concept_bce,
    cosines,
    diversity_loss,
    focal,
    info_nce,
    localisation_loss,
    pos_weights,
    present_pairs,
    soft_triple,
)

_SPEC = importlib.util.spec_from_file_location("slow", Path(__file__).with_name("slow_losses.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
slow: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(slow)

DOUBLE = torch.float64
MODES = ["subtract", "add", "numerator", "none"]


def exactly(expected):
    return pytest.approx(expected, abs=3e-12)


def counted(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=DOUBLE).view(shape)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# The tensors of the known answers
LOGITS = counted(2, 3).sin()
TARGETS = tensor([[1, 0, 0], [0, 1, 1]])
VECTORS = counted(2, 3, 4).sin()
PROTOTYPES = counted(3, 2, 4).cos()
PRESENT = tensor([[1, 0, 1], [0, 1, 0]])
PAIRS = present_pairs(VECTORS, PRESENT)


# Concepts and targets


def test_losses_of_single_targets_have_their_known_answers():
    weights = class_balanced_weights(tensor([10, 100, 1000], dtype=DOUBLE), 0.9999)
    assert weights.tolist() == pytest.approx([2.700382497, 0.271255102, 0.028362401], abs=5e-10)
    assert concept_bce(LOGITS, TARGETS).item() == exactly(1.055317992088)
    for loss, answer in (
        (concept_bce(LOGITS, TARGETS, tensor([2, 5, 0.5])), 1.824889971536),
        (focal(LOGITS, TARGETS, 0.25, 2), 0.237133057342),
        (focal(LOGITS, TARGETS, 0.75, 2), 0.231581566471),
        (asymmetric(LOGITS, TARGETS, 4, 1, 0.05), 0.413899643759),
        (focal(LOGITS, TARGETS, None, 2, weights), 0.233337118738),
    ):
        assert loss.item() == exactly(answer)


def test_without_powers_all_are_binary_cross_entropy():
    logits, targets = 3 * noise(5, 4), noise(5, 4, seed=1).sigmoid()
    bce = concept_bce(logits, targets).item()
    assert focal(logits, targets, None, 0).item() == exactly(bce)
    assert focal(logits, targets, 0.5, 0).item() == exactly(bce / 2)
    assert asymmetric(logits, targets, 0, 0, 0).item() == exactly(bce)
    squared = focal(logits, targets, None, 2).item()
    assert asymmetric(logits, targets, 2, 2, 0).item() == exactly(squared)
    assert asymmetric(tensor([[-5.0]]), tensor([[0.0]]), 0) == 0  # below the default clip


def test_focal_agrees_with_its_formula_on_soft_targets():
    logits, targets = noise(3, 2), noise(3, 2, seed=1).sigmoid()
    expected = slow.focal(logits.flatten().tolist(), targets.flatten().tolist(), 0.3, 1.5)
    assert focal(logits, targets, 0.3, 1.5).item() == exactly(expected)


def roots(logits: Tensor, targets: Tensor) -> Tensor:
    return focal(logits, targets, gamma=0.5) + asymmetric(logits, targets, 0.5, 0.5, 0)


@pytest.mark.parametrize("loss", [concept_bce, focal, asymmetric, roots])
def test_extreme_logits_keep_losses_and_gradients_finite(loss):
    logits = tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]] * 2, requires_grad=True)
    targets = tensor([[0.0] * 5, [1.0] * 5])
    value = loss(logits, targets)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [concept_bce, focal, asymmetric])
def test_half_precision_logits_are_widened(loss):
    found = loss(LOGITS.bfloat16(), TARGETS)
    assert found.dtype == torch.float32
    assert found == loss(LOGITS.bfloat16().float(), TARGETS)


def test_negatives_per_positive_are_capped():
    positives = tensor([13, 0, 7500, 15000])
    assert pos_weights(positives, 15_000).tolist() == [20, 20, 1, 0]
    bare = pos_weights(positives, 15_000, cap=0)
    assert bare.tolist() == pytest.approx([1152.84615, 15_000, 1, 0])


@pytest.mark.parametrize("positives", [[-1, 2], [1, 11]])
def test_more_positives_than_images_are_refused(positives):
    with pytest.raises(ValueError, match="between 0 and 10 positives"):
        pos_weights(tensor(positives), 10)


def test_class_balance_goes_from_equal_to_inverse_frequency():
    counts = tensor([0, 1, 10, 100])
    assert class_balanced_weights(counts, 0).tolist() == [1, 1, 1, 1]
    inverse = class_balanced_weights(counts, 1 - 1e-9)
    assert inverse.dtype == torch.float32
    assert (inverse * counts.clamp_min(1) / inverse[0]).tolist() == pytest.approx([1] * 4, rel=1e-5)
    for beta in (1, -0.1):
        with pytest.raises(ValueError, match="expected 0 or more, below 1"):
            class_balanced_weights(counts, beta)


# Boxes

CAMS = (counted(2, 3, 4, 4) / 5).cos()
BOXES = [[(0, 0.25, 0.25, 0.75, 0.5)], [(1, 0, 0.5, 0.5, 1)]]


def test_box_loss_has_its_known_answer():
    masks, exists = box_masks(BOXES, 3, (4, 4))
    assert exists.tolist() == [[True, False, False], [False, True, False]]
    bce = concept_bce(CAMS.amax((2, 3)), TARGETS)
    located = localisation_loss(CAMS, masks, exists)
    assert bce.item() == exactly(0.813227003184)
    # With 1e-6 added to the numbers of cells they would be 0.576545194079 and 1.101499600223.
    assert located.item() == exactly(0.576545307748)
    assert (bce + 0.5 * located).item() == exactly(1.101499657058)


@pytest.mark.parametrize("kind", ["mse", "hinge"])
def test_box_loss_agrees_with_loops(kind):
    cams = noise(3, 2, 3, 5)
    boxes = [
        [(0, 0.1, 0.1, 0.5, 0.6), (0, 0.4, 0.4, 0.9, 1.0)],
        [],
        [(1, 0.0, 0.0, 1.0, 1.0), (0, 0.5, 0.5, 0.5, 0.5)],
    ]
    masks, exists = box_masks(boxes, 2, (3, 5))
    groups = slow.localisation(cams.tolist(), boxes, kind)
    assert len(groups) == exists.sum() == 3
    found = localisation_loss(cams, masks, exists, kind)
    assert found.item() == exactly(sum(groups) / len(groups))
    assert localisation_loss(cams, masks, exists, kind, count=6).item() == exactly(found.item() / 2)


def test_boxes_of_a_concept_are_united():
    masks, _ = box_masks([[(0, 0, 0, 0.5, 1), (0, 0, 0, 1, 0.5)]], 1, (2, 2))
    assert masks.tolist() == [[[[True, True], [True, False]]]]


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ((0.30, 0.30, 0.45, 0.45), 1),  # both corners round down to the same cell
        ((0.5, 0.5, 0.5, 0.5), 1),  # on a line between cells
        ((1, 1, 1, 1), 1),
        ((0.25, 0.25, 0.5, 0.5), 1),
        ((0.24, 0.25, 0.5, 0.51), 4),
        ((0, 0, 1, 1), 16),
        ((0.25 - 1e-7, 0.25, 0.5 + 1e-7, 0.5), 1),  # off by rounding only
    ],
)
def test_every_box_owns_the_cells_it_touches(box, cells):
    masks, exists = box_masks([[(1, *box)]], 2, (4, 4))
    assert masks[0, 1].sum() == cells
    assert not masks[0, 0].any()
    assert exists.tolist() == [[False, True]]


def test_impossible_boxes_are_refused():
    outside = [(0, 0, 0, 1, 1.01), (0, -0.1, 0, 1, 1), (0, 0, math.nan, 1, 1)]
    for box in [(2, 0, 0, 1, 1), (-1, 0, 0, 1, 1), (0, 0.5, 0, 0.4, 1), *outside]:
        with pytest.raises(ValueError, match="of image 1 in the batch"):
            box_masks([[], [box]], 2, (4, 4))


def test_a_batch_without_boxes_gives_zero_gradients():
    cams = noise(2, 3, 4, 4).requires_grad_()
    loss = localisation_loss(cams, *box_masks([[], []], 3, (4, 4)))
    loss.backward()
    assert loss == 0
    assert not cams.grad.any()


def test_unknown_kinds_are_named():
    masks, exists = box_masks(BOXES, 3, (4, 4))
    with pytest.raises(ValueError, match="'iou'"):
        localisation_loss(CAMS, masks, exists, "iou")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'times'"):
        soft_triple(*PAIRS, PROTOTYPES, mode="times")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected, got"):
        cosines(VECTORS, PROTOTYPES)


# Prototypes


def test_cosines_have_their_known_answers():
    assert PAIRS[1].tolist() == [0, 2, 1]
    found = cosines(*PAIRS[:1], PROTOTYPES)[0].flatten().tolist()
    known = [-0.03254671, 0.69114390, -0.98323649, 0.42887010, 0.26284017, -0.87613362]
    assert found == pytest.approx(known, abs=5e-9)


@pytest.mark.parametrize(
    ("options", "answers"),
    [
        ((20, 1000, 0.1), (3.272767338141, 1.924658114887, 0.592337909857)),
        ((20, 20, 0.05), (2.929356432961, 2.257850080971, 1.592337842282)),
        ((10, 10, 0.1), (1.783395768044, 1.044850074340, 0.392674115077)),
        ((20, 10, 0), (2.592303198844,) * 3),
    ],
)
def test_soft_triple_has_its_known_answers(options, answers):
    scale, gamma, margin = options
    for mode, answer in zip(MODES, answers, strict=False):
        found = soft_triple(*PAIRS, PROTOTYPES, scale=scale, gamma=gamma, margin=margin, mode=mode)
        assert found.item() == exactly(answer), mode


def test_info_nce_has_its_known_answers():
    assert info_nce(*PAIRS, PROTOTYPES, temperature=0.1).item() == exactly(8.109470143807)
    assert info_nce(*PAIRS, PROTOTYPES, temperature=0.3).item() == exactly(3.181634143355)


def test_prototype_losses_agree_with_loops():
    concepts = tensor([0, 2, 2, 1, 0])
    inputs = noise(5, 6), concepts, noise(3, 4, 6, seed=1)
    lists = [part.tolist() for part in inputs]
    expected = slow.info_nce(*lists, temperature=0.2)
    assert info_nce(*inputs, temperature=0.2).item() == exactly(expected)
    for mode in MODES:
        options = {"scale": 7.0, "gamma": 30.0, "margin": 0.2, "mode": mode}
        found = soft_triple(*inputs, **options).item()
        assert found == exactly(slow.soft_triple(*lists, **options)), mode


def test_one_prototype_without_margin_is_cross_entropy():
    single = PROTOTYPES[:, :1]
    plain = F.cross_entropy(20 * cosines(PAIRS[0], single)[:, :, 0], PAIRS[1])
    assert plain.item() == exactly(15.212783474739)
    for mode in MODES:
        assert soft_triple(*PAIRS, single, margin=0, mode=mode) == plain


def test_margin_in_the_numerator_only_shifts_the_loss():
    shifted, plain = PROTOTYPES.clone().requires_grad_(), PROTOTYPES.clone().requires_grad_()
    loss = soft_triple(*PAIRS, shifted, margin=0.1, mode="numerator")
    bare = soft_triple(*PAIRS, plain, margin=0)
    loss.backward()
    bare.backward()
    assert loss.item() == exactly(bare.item() - 20 * 0.1)
    assert torch.equal(shifted.grad, plain.grad)


@pytest.mark.parametrize(("gamma", "reduced"), [(1e9, "amax"), (0, "mean")])
def test_large_gamma_takes_the_nearest_and_zero_the_mean(gamma, reduced):
    near = getattr(cosines(PAIRS[0], PROTOTYPES), reduced)(2)
    found = soft_triple(*PAIRS, PROTOTYPES, gamma=gamma, margin=0)
    assert found.item() == exactly(F.cross_entropy(20 * near, PAIRS[1]).item())


@pytest.mark.parametrize("num_prototypes", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_info_nce_is_at_least_log_m(num_prototypes, temperature):
    bound = math.log(num_prototypes)
    concepts = torch.arange(4).repeat(5)
    prototypes = noise(4, num_prototypes, 8)
    assert info_nce(noise(20, 8, seed=1), concepts, prototypes, temperature=temperature) > bound
    # Reached where a concept has one form, which all its prototypes show, far from the others.
    forms = torch.eye(4, 8, dtype=DOUBLE)
    same = forms[:, None].expand(-1, num_prototypes, -1)
    found = info_nce(forms[concepts], concepts, same, temperature=0.01)
    assert found.item() == exactly(bound)


@pytest.mark.parametrize("loss", [soft_triple, info_nce])
def test_the_order_of_a_concepts_prototypes_does_not_matter(loss):
    prototypes = noise(3, 3, 4)
    expected = loss(*PAIRS, prototypes).item()
    shuffled = prototypes.clone()
    shuffled[1] = prototypes[1, [2, 0, 1]]
    assert loss(*PAIRS, shuffled).item() == exactly(expected)
    shuffled[1], shuffled[0] = prototypes[0], prototypes[1]  # among concepts it does
    assert loss(*PAIRS, shuffled).item() != exactly(expected)


@pytest.mark.parametrize("loss", [soft_triple, info_nce])
def test_two_parts_with_the_common_count_are_the_whole(loss):
    whole, parts = PROTOTYPES.clone().requires_grad_(), PROTOTYPES.clone().requires_grad_()
    together = loss(*PAIRS, whole)
    together.backward()
    images = zip(VECTORS.split(1), PRESENT.split(1), strict=True)
    pairs = [present_pairs(*image) for image in images]
    added = sum(loss(*each, parts, count=PRESENT.sum()) for each in pairs)
    added.backward()
    assert added.item() == exactly(together.item())
    assert torch.allclose(whole.grad, parts.grad, rtol=1e-12)


@pytest.mark.parametrize("loss", [soft_triple, info_nce])
@pytest.mark.parametrize("count", [None, 0, 5, 5.0, tensor(0), tensor(5)])
def test_a_batch_without_pairs_gives_zero_gradients(loss, count):
    vectors, prototypes = VECTORS.clone().requires_grad_(), PROTOTYPES.clone().requires_grad_()
    found = loss(*present_pairs(vectors, torch.zeros(2, 3)), prototypes, count=count)
    assert found == 0
    found.backward()
    assert not vectors.grad.any()
    assert not prototypes.grad.any()


@pytest.mark.parametrize("loss", [soft_triple, info_nce])
def test_weights_hide_absent_concepts_without_changing_shapes(loss):
    vectors, static = VECTORS.clone().requires_grad_(), VECTORS.clone().requires_grad_()
    expected = loss(*present_pairs(vectors, PRESENT), PROTOTYPES)
    concepts = torch.arange(3).repeat(2)
    found = loss(static.flatten(0, 1), concepts, PROTOTYPES, weights=PRESENT.flatten())
    assert found.item() == exactly(expected.item())
    found.backward()
    expected.backward()
    assert torch.allclose(vectors.grad, static.grad, rtol=1e-12)


def test_weights_count_as_repetitions():
    repeated = torch.cat([PAIRS[0], PAIRS[0][:1]]), torch.cat([PAIRS[1], PAIRS[1][:1]])
    found = soft_triple(*PAIRS, PROTOTYPES, weights=tensor([2, 1, 1]))
    assert found.item() == exactly(soft_triple(*repeated, PROTOTYPES).item())


def test_pairs_are_those_of_present_concepts():
    targets = tensor([[0.5, 0.49, 1.0], [0.0, 0.0, 2 / 3]])
    vectors, concepts = present_pairs(VECTORS, targets)
    assert concepts.tolist() == [0, 2, 2]
    assert torch.equal(vectors, VECTORS[[0, 0, 1], [0, 2, 2]])


@pytest.mark.parametrize("loss", [soft_triple, info_nce])
def test_autocast_does_not_touch_the_cosines(loss):
    vectors, prototypes = PAIRS[0].float(), PROTOTYPES.float()
    expected = loss(vectors, PAIRS[1], prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(vectors, PAIRS[1], prototypes)
        spread = diversity_loss(prototypes)
    assert found.dtype == torch.float32
    assert found == expected
    assert spread == diversity_loss(prototypes)
    assert loss(vectors.bfloat16(), PAIRS[1], prototypes).dtype == torch.float32


def test_diversity_is_a_hinge_on_cosines_within_a_concept():
    prototypes = noise(3, 4, 5)
    assert diversity_loss(prototypes).item() == exactly(slow.diversity(prototypes.tolist(), 0.3))
    assert diversity_loss(torch.eye(4)[None]) == 0
    assert diversity_loss(torch.ones(2, 3, 4), 0.3).item() == pytest.approx(0.7)
    assert diversity_loss(noise(3, 1, 5)) == 0


def test_gradients_are_right():
    masks, exists = box_masks(BOXES, 3, (4, 4))
    logits, prototypes = noise(2, 3).requires_grad_(), noise(3, 2, 4, seed=3).requires_grad_()
    vectors = VECTORS.clone().requires_grad_()
    cams = noise(2, 3, 4, 4).requires_grad_()
    assert gradcheck(lambda z: focal(z, TARGETS, 0.25, 1.5), logits)
    assert gradcheck(lambda z: asymmetric(z, TARGETS, 3, 1, 0.05), logits)
    assert gradcheck(lambda x: localisation_loss(x, masks, exists), cams)
    assert gradcheck(lambda x: localisation_loss(x, masks, exists, "hinge"), cams)
    assert gradcheck(lambda p: diversity_loss(p, 0.1), prototypes)
    for mode in ("subtract", "add"):
        assert gradcheck(
            lambda v, p, mode=mode: soft_triple(
                *present_pairs(v, PRESENT), p, scale=5.0, gamma=10.0, mode=mode
            ),
            (vectors, prototypes),
        )
    assert gradcheck(lambda v, p: info_nce(*present_pairs(v, PRESENT), p), (vectors, prototypes))
