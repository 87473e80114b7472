import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr.edits import (
    MODES,
    Head,
    Norm,
    confirm,
    contributions,
    edited_maps,
    edited_scores,
    head_of,
    importance,
    margins,
    reject,
    set_value,
    statistics,
    statistics_from_plain,
    statistics_to_plain,
)
from moectl.csr.model import Backbone, CSRNet

BATCH, CONCEPTS, PROTOTYPES, CLASSES, GRID = 4, 3, 2, 5, (4, 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(shape, generator=draws, dtype=torch.float64) - 1


def maps(seed: int = 0) -> Tensor:
    return random(BATCH, CONCEPTS, PROTOTYPES, *GRID, seed=seed)


def scores(seed: int = 0) -> Tensor:
    return random(BATCH, CONCEPTS, PROTOTYPES, seed=seed)


def head(*, norm: bool = True) -> Head:
    mean, deviation = random(CONCEPTS, PROTOTYPES, seed=1), random(CONCEPTS, PROTOTYPES, seed=2) + 2
    weight = random(CLASSES, CONCEPTS * PROTOTYPES, seed=3)
    return Head(weight, random(CLASSES, seed=4), Norm(mean, deviation) if norm else None)


def known():
    present = torch.tensor([[1, 0, 0.5], [0, 1, 1], [0.4, 1, 0]]).repeat(7, 1)
    return statistics(random(21, CONCEPTS, PROTOTYPES, seed=5), present)


# Places


def test_known_scores_after_spatial_edits():
    features = torch.arange(16, dtype=torch.float64).sin().view(4, 4)  # (D, H W)
    rows = torch.arange(24, dtype=torch.float64).cos().view(6, 4)
    cosines = F.normalize(rows, dim=1) @ F.normalize(features, dim=0)
    similar = cosines.view(1, 3, 2, 2, 2)
    plain = [[0.12539564, 0.17252647], [0.31652552, 0.04228287], [0.15733517, 0.27644815]]
    edited = [[0.00034870, 0.17252647], [0.06330510, 0], [0.15733517, 0.05528963]]
    weights = torch.tensor([[1, 0.2], [0.2, 0]], dtype=torch.float64)
    assert edited_scores(similar, torch.ones(2, 2))[0].tolist() == [
        pytest.approx(row, abs=1e-8) for row in plain
    ]
    assert edited_scores(similar, weights)[0].tolist() == [
        pytest.approx(row, abs=1e-8) for row in edited
    ]


def test_weights_follow_the_boxes():
    positive, negative = [(0.0, 0.0, 0.5, 0.5)], [(0.3, 0.3, 1.0, 0.6)]
    assert importance(positive, negative, 0.2, (4, 4)).tolist() == [
        pytest.approx(row)
        for row in [[1, 1, 0.2, 0.2], [1, 0, 0, 0], [0.2, 0, 0, 0], [0.2, 0.2, 0.2, 0.2]]
    ]


def test_every_cell_that_a_box_touches_is_its_own():
    weights = importance([(0.30, 0.30, 0.45, 0.45)], [], 0.0, (4, 4))
    assert weights.nonzero().tolist() == [[1, 1]]
    weights = importance([(0.2, 0.2, 0.3, 0.3)], [], 0.0, (4, 4))
    assert weights.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_without_positive_boxes_the_rest_keeps_its_weight():
    assert importance([], [], 0.2, (2, 2)).tolist() == [[1, 1], [1, 1]]
    assert importance([], [(0.0, 0.0, 0.5, 0.5)], 0.2, (2, 2)).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("alpha", [-0.1, 1.0, math.nan])
def test_alpha_is_below_one(alpha):
    with pytest.raises(ValueError, match="alpha"):
        importance([], [], alpha, (2, 2))


def test_weights_of_one_change_nothing():
    assert torch.equal(edited_maps(maps(), torch.ones(GRID)), maps())
    assert torch.equal(edited_scores(maps(), importance([], [], 0.2, GRID)), maps().amax((3, 4)))


def test_weights_of_zero_leave_nothing():
    assert (edited_scores(maps() - 0.9, torch.zeros(GRID)) == 0).all()


def test_a_larger_positive_box_never_lowers_scores_above_zero():
    shifted = maps() - torch.tensor([0.0, 0.5, 2.0])[:, None, None, None]  # the last all negative
    for alpha in (0.0, 0.2, 0.7):
        before = torch.full((BATCH, CONCEPTS, PROTOTYPES), -1.0)
        for size in torch.linspace(0.05, 0.5, 19).tolist():
            box = (0.5 - size, 0.5 - size, 0.5 + size, 0.5 + size)
            after = edited_scores(shifted, importance([box], [], alpha, GRID)).relu()
            assert (after >= before).all()
            before = after
        assert torch.equal(before, shifted.amax((3, 4)).relu())


def test_a_larger_negative_box_never_raises_scores_above_zero():
    before = maps().amax((3, 4))
    for size in torch.linspace(0.05, 0.5, 10).tolist():
        box = (0.5 - size, 0.5 - size, 0.5 + size, 0.5 + size)
        after = edited_scores(maps(), importance([], [box], 0.2, GRID)).relu()
        assert (after <= before).all()
        before = after
    assert (before == 0).all()


def test_every_image_and_concept_has_its_own_weights():
    weights = (random(BATCH, CONCEPTS, *GRID, seed=7) + 1) / 2
    weights[weights > 0.7] = 1
    slow = torch.empty(maps().shape, dtype=torch.float64)
    for b in range(BATCH):
        for k in range(CONCEPTS):
            for y in range(GRID[0]):
                for x in range(GRID[1]):
                    a, cell = weights[b, k, y, x], maps()[b, k, :, y, x]
                    slow[b, k, :, y, x] = cell if a == 1 else a * cell.clamp_min(0)
    assert torch.equal(edited_maps(maps(), weights), slow)
    alone = [edited_maps(maps()[b, None], weights[b, 0]) for b in range(BATCH)]
    assert torch.equal(edited_maps(maps(), weights[:, 0]), torch.cat(alone))


def test_as_many_images_as_concepts_are_not_mixed_up():
    square = maps()[:CONCEPTS]
    weights = torch.stack([torch.full(GRID, value) for value in (0.1, 0.5, 0.9)])
    for b in range(CONCEPTS):
        alone = edited_scores(square[b, None], weights[b])[0]
        assert torch.equal(edited_scores(square, weights)[b], alone)


def test_weights_that_do_not_fit_are_refused():
    for shape in [(6, 4), (CONCEPTS, *GRID), (BATCH, 1, *GRID), (4,)]:
        with pytest.raises(ValueError, match="do not fit"):
            edited_maps(maps(), torch.ones(shape))


# Statistics


def test_statistics_are_those_of_images_without_and_with_a_concept():
    table, present = random(40, 2, 3, seed=6), random(40, 2, seed=7).abs()
    found = statistics(table, present)
    for k in range(2):
        for name, chosen in (("absent", present[:, k] < 0.5), ("present", present[:, k] >= 0.5)):
            rows = table[chosen, k].numpy()
            for part, wanted in (
                ("median", np.median(rows, 0)),
                ("mean", rows.mean(0)),
                ("low", np.percentile(rows, 5, axis=0)),
                ("high", np.percentile(rows, 95, axis=0)),
            ):
                assert getattr(found, f"{name}_{part}")[k].tolist() == pytest.approx(
                    wanted.tolist()
                )


def test_statistics_of_no_images_are_unknown_and_survive_json():
    found = statistics(random(5, 2, 3), torch.tensor([[1, 0]] * 5))
    assert found.absent_mean[0].isnan().all()
    assert found.present_high[1].isnan().all()
    again = statistics_from_plain(json.loads(json.dumps(statistics_to_plain(found))))
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first.float().nan_to_num(9), second.nan_to_num(9))


def test_tables_of_statistics_must_fit():
    with pytest.raises(ValueError, match=r"\(5, 2, 3\) and \(5, 3\)"):
        statistics(random(5, 2, 3), torch.ones(5, 3))


# Concepts


@pytest.mark.parametrize("mode", MODES)
def test_rejection_changes_one_concept_only(mode):
    before, table = scores(), known()
    after = reject(before, 1, mode, table, head().neutral)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert torch.equal(before, scores())
    wanted = {
        "zero": torch.zeros(PROTOTYPES),
        "absent-median": table.absent_median[1],
        "absent-mean": table.absent_mean[1],
        "clip": before[:, 1].minimum(table.absent_mean[1]),
        "drop": head().norm.mean[1],
    }[mode]
    assert torch.equal(after[:, 1], wanted.expand(BATCH, -1))


@pytest.mark.parametrize("norm", [False, True])
def test_dropping_a_concept_is_zeroing_its_columns(norm):
    full = head(norm=norm)
    dropped = contributions(reject(scores(), 1, "drop", neutral=full.neutral), *full)
    weight = full.weight.clone().view(CLASSES, CONCEPTS, PROTOTYPES)
    weight[:, 1] = 0
    zeroed = contributions(scores(), weight.flatten(1), full.bias, full.norm)
    assert torch.equal(dropped.logits, zeroed.logits)
    assert (dropped.values[:, :, 1] == 0).all()


def test_zero_scores_are_no_zero_contribution_after_standardising():
    found = contributions(reject(scores(), 1, "zero"), *head())
    assert (found.values[:, :, 1].abs() > 0.01).any()


def test_concepts_may_differ_from_image_to_image():
    chosen = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    found = reject(scores(), chosen, "absent-mean", known())
    for b in range(BATCH):
        alone = scores()[b, None]
        for k in chosen[b].nonzero()[:, 0].tolist():
            alone = reject(alone, k, "absent-mean", known())
        assert torch.equal(found[b], alone[0])


def test_confirmed_concepts_score_at_least_what_is_usual():
    found = confirm(scores(), 2, known())
    assert torch.equal(found[:, 2], scores()[:, 2].maximum(known().present_median[2]))
    assert torch.equal(found[:, :2], scores()[:, :2])
    assert torch.equal(confirm(found, 2, known()), found)


def test_set_concepts_have_one_value():
    found = set_value(scores(), 0, 0.3)
    assert (found[:, 0] == 0.3).all()
    assert torch.equal(found[:, 1:], scores()[:, 1:])
    with pytest.raises(ValueError, match="a cosine"):
        set_value(scores(), 0, 1.5)


def test_what_no_training_image_tells_is_refused():
    table = statistics(random(5, 3, 2), torch.tensor([[1, 0, 1]] * 5))
    with pytest.raises(ValueError, match=r"concepts \[0\]"):
        reject(scores(), 0, "absent-median", table)
    with pytest.raises(ValueError, match=r"concepts \[1\]"):
        confirm(scores(), 1, table)
    assert torch.isfinite(reject(scores(), 1, "clip", table)).all()
    with pytest.raises(ValueError, match="needs statistics"):
        reject(scores(), 0, "clip")
    with pytest.raises(ValueError, match="mode 'none'"):
        reject(scores(), 0, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 0 to 2"):
        reject(scores(), -1)


@pytest.mark.parametrize("norm", [False, True])
def test_prototypes_that_are_not_kept_contribute_nothing(norm):
    full = head(norm=norm)
    kept = torch.tensor([[True, False], [True, True], [False, False]])
    found = contributions(scores(), full.weight, full.bias, full.norm, kept).logits
    weight = full.weight * kept.flatten()
    assert torch.equal(found, contributions(scores(), weight, full.bias, full.norm).logits)


def test_prototypes_that_are_not_kept_are_not_the_highest():
    norm = Norm(torch.full((3, 1), 0.9), torch.ones(3, 1))
    kept = torch.tensor([[True, False], [True, True], [False, False]])
    found = contributions(scores(), torch.ones(1, 3), torch.zeros(1), norm, kept).values[:, 0]
    assert torch.allclose(found[:, 0], scores()[:, 0, 0] - 0.9)
    assert torch.allclose(found[:, 1], scores()[:, 1].amax(1) - 0.9)
    assert (found[:, 2] == 0).all()


# What follows


@pytest.mark.parametrize("norm", [False, True])
def test_contributions_and_bias_make_the_logits(norm):
    full = head(norm=norm)
    found = contributions(scores(), *full)
    inputs = scores()
    if full.norm is not None:
        inputs = (inputs - full.norm.mean) / full.norm.deviation
    wanted = F.linear(inputs.flatten(1), full.weight, full.bias)
    assert torch.equal(found.bias + found.values.sum(2), found.logits)
    assert torch.allclose(found.logits, wanted, rtol=0, atol=1e-12)
    for k in range(CONCEPTS):
        part = slice(k * PROTOTYPES, (k + 1) * PROTOTYPES)
        alone = inputs.flatten(1)[:, part] @ full.weight[:, part].T
        assert torch.allclose(found.values[:, :, k], alone)


@pytest.mark.parametrize("task_input", ["all", "max"])
def test_the_head_of_a_model_says_what_the_model_says(task_input):
    torch.manual_seed(0)
    model = CSRNet(
        Backbone(6, {}),
        concepts=CONCEPTS,
        prototypes=PROTOTYPES,
        classes=CLASSES,
        projection=4,
        task_input=task_input,
    )
    model.set_task_norm(torch.rand(model.task_mean.shape), torch.rand(model.task_mean.shape) + 0.1)
    features, weights = torch.randn(BATCH, 6, *GRID), torch.rand(BATCH, *GRID)
    needs = ("similarity_maps", "similarity_scores", "logits")
    with torch.no_grad():
        plain = model.from_features(features, needs=needs)
        weighed = model.from_features(features, weights, needs)
    full = head_of(model)
    for output, edited in (
        (plain, plain.similarity_scores),
        (weighed, edited_scores(plain.similarity_maps, weights)),
    ):
        found = contributions(edited, *full)
        assert torch.allclose(edited, output.similarity_scores, atol=1e-6)
        assert torch.allclose(found.logits, output.logits, atol=1e-5)
        assert found.values.shape == (BATCH, CLASSES, CONCEPTS)
    dropped = reject(plain.similarity_scores, 1, "drop", neutral=full.neutral)
    assert (contributions(dropped, *full).values[:, :, 1] == 0).all()


def test_margins_are_leads_or_distances_from_a_half():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]]).log()
    assert margins(logits, multilabel=False).tolist() == pytest.approx([0.2, 0], abs=1e-6)
    logits = torch.tensor([[0.9, 0.4], [0.99, 0.02]]).logit()
    assert margins(logits, multilabel=True).tolist() == pytest.approx([0.2, 0.96], abs=1e-6)
