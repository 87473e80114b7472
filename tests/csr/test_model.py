import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor

from moectl.csr import model as module
from moectl.csr.backbones import build_backbone
from moectl.csr.model import Backbone, CSRNet, cam_weights, similarity_maps, weigh

DOUBLE = torch.float64
SIZES = {"concepts": 3, "prototypes": 2, "classes": 4, "projection": 8}
SHAPES = {
    "features": (2, 64, 4, 4),
    "cams": (2, 3, 4, 4),
    "concept_logits": (2, 3),
    "projected": (2, 8, 4, 4),
    "local_vectors": (2, 3, 8),
    "prototypes": (3, 2, 8),
    "similarity_maps": (2, 3, 2, 4, 4),
    "similarity_scores": (2, 3, 2),
    "logits": (2, 4),
}
EVERYTHING: Any = tuple(SHAPES)
STAGES: dict[Any, set[str]] = {
    "concept": {"backbone", "concept_head"},
    "prototype": {"projector", "prototypes"},
    "task": {"task_head"},
}
TRAINS: dict[Any, Any] = {
    "concept": "concept_logits",
    "prototype": "local_vectors",
    "task": "logits",
}


def network(**options: Any) -> CSRNet:
    torch.manual_seed(0)
    return CSRNet(build_backbone("tiny"), **{**SIZES, **options})


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def uniform(*shape: int, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def counted(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=DOUBLE).view(shape)


def saved(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


# Known answers


class Fixed(nn.Module):
    """A concept head that sees the same maps everywhere."""

    def forward(self, _features: Tensor) -> Tensor:
        return counted(1, 3, 2, 2).cos()


SINES = counted(1, 4, 2, 2).sin()
LOCAL = tensor(
    [
        [0.38357349, -0.66655972, 0.48781153, 0.02884994],
        [0.57589613, -0.15195072, -0.37725289, 0.64512861],
        [0.32294748, -0.18523039, -0.08079815, 0.29085678],
    ],
    dtype=DOUBLE,
)
SCORES = [[0.12539564, 0.17252647], [0.31652552, 0.04228287], [0.15733517, 0.27644815]]
WEIGHED = [[0.00034870, 0.17252647], [0.06330510, 0], [0.15733517, 0.05528963]]
IMPORTANCE = tensor([[[1, 0.2], [0.2, 0]]], dtype=DOUBLE)


def of_sines(**options: Any) -> CSRNet:
    net = CSRNet(Backbone(4, {}), concepts=3, prototypes=2, classes=1, projection=4, **options)
    net.projector, net.concept_head = nn.Identity(), Fixed()  # type: ignore[assignment]
    net.double().prototypes.data = counted(6, 4).cos()[:, :, None, None]
    return net


@pytest.mark.parametrize("order", ["pool_first", "project_first"])
def test_local_vectors_of_sines_are_known(order):
    found = of_sines(local_order=order).from_features(SINES, needs=["local_vectors"])
    torch.testing.assert_close(found.local_vectors[0], LOCAL, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("importance", "expected"), [(None, SCORES), (IMPORTANCE, WEIGHED)])
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_similarities_of_sines_are_known(importance, expected, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    found = of_sines().from_features(SINES, importance, ["similarity_scores"])
    wanted = tensor([expected], dtype=DOUBLE)
    torch.testing.assert_close(found.similarity_scores, wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("kind", "concepts", "counts"),
    [
        ("medmae", 14, (10_766, 689_024, 8_960, 426)),
        ("resnet50", 14, (28_686, 4_458_624, 8_960, 426)),
        ("medmae", 22, (16_918, 689_024, 14_080, 666)),
    ],
)
def test_parts_have_the_published_sizes(kind, concepts, counts):
    with torch.device("meta"):
        net = CSRNet(build_backbone(kind), concepts=concepts, prototypes=5, classes=6)
    parts = (net.concept_head, net.projector, net.task_head)
    head, projector, task = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert (head, projector, net.prototypes.numel(), task) == counts
    if (kind, concepts) == ("medmae", 14):
        trained = {
            stage: sum(p.numel() for part in net.stage_parameters(stage).values() for p in part)
            for stage in STAGES
        }
        assert trained == {"concept": 85_809_422, "prototype": 697_984, "task": 426}


# What is asked for


@pytest.mark.parametrize("need", EVERYTHING)
def test_only_what_is_asked_for_is_returned(need):
    net = network().eval()
    alone, all_of_it = net(pictures(), needs=[need]), net(pictures(), needs=EVERYTHING)
    assert [name for name in SHAPES if getattr(alone, name) is not None] == [need]
    assert getattr(alone, need).shape == SHAPES[need]
    assert torch.allclose(getattr(alone, need), getattr(all_of_it, need), atol=1e-6)


def test_cached_features_give_what_images_give():
    net = network().eval()
    first = net(pictures(), uniform(2, 4, 4), EVERYTHING)
    again = net.from_features(first.features, uniform(2, 4, 4), EVERYTHING)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_features_that_are_not_needed_further_cost_nothing():
    net = network()
    net.projector = net.task_head = None  # type: ignore[assignment]
    assert net(pictures(), needs=["cams", "concept_logits"]).cams.shape == SHAPES["cams"]
    net = network()
    net.concept_head = None  # type: ignore[assignment]
    assert net(pictures()).logits.shape == SHAPES["logits"]


@pytest.mark.parametrize(
    "options",
    [{"projector": "ibn"}, {"local_order": "project_first"}, {"concept_pool": "lse"}],
)
def test_two_images_at_once_are_two_images_one_by_one(options):
    net = network(**options).eval()
    importance = uniform(2, 3, 4, 4)
    both = net(pictures(), importance, EVERYTHING)
    for row in range(2):
        rows = slice(row, row + 1)
        alone = net(pictures()[rows], importance[rows], EVERYTHING)
        for name in set(SHAPES) - {"prototypes"}:
            assert torch.allclose(getattr(both, name)[rows], getattr(alone, name), atol=1e-5), name


def test_chunks_change_nothing(monkeypatch):
    net, importance = network(), uniform(2, 3, 4, 4)
    whole = net(pictures(), importance, EVERYTHING)
    monkeypatch.setattr(module, "_CHUNK", 2 * 2 * 4 * 4 * 2)  # two concepts, then one
    sizes = []
    original = module.similarity_maps

    def watched(unit: Tensor, prototypes: Tensor) -> Tensor:
        sizes.append(len(prototypes))
        return original(unit, prototypes)

    monkeypatch.setattr(module, "similarity_maps", watched)
    parts = net(pictures(), importance)
    assert sizes == [2, 1]
    assert torch.allclose(parts.logits, whole.logits, atol=1e-6)


def test_reduced_precision_leaves_comparisons_wide():
    net = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(pictures(), uniform(2, 4, 4), EVERYTHING)
    assert all(value.dtype == torch.float32 for value in found[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net(pictures(), needs=["cam"]), r"needs \['cam'\]"),
        (lambda net: net(pictures(), uniform(2, 1, 4, 4)), r"importance of shape \(2, 1, 4, 4\)"),
        (lambda net: net(pictures(), uniform(1, 4, 4)), r"expected \(2, 4, 4\) or \(2, 3, 4, 4\)"),
        (lambda net: net.freeze("first"), "stage = 'first'"),
        (lambda _: network(concepts=0), "concepts = 0"),
        (lambda _: network(projection=1), "projection = 1"),
        (lambda _: network(concept_pool="sum"), "concept_pool = 'sum': expected one of 'max'"),
        (lambda _: network(projector="linear"), "projector = 'linear'"),
        (lambda _: network(local_order="none"), "local_order = 'none'"),
        (lambda _: network(task_input="mean"), "task_input = 'mean'"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(network())


# Concepts


def test_weights_of_a_map_sum_to_one():
    weights = cam_weights(50 * uniform(2, 3, 4, 4))
    assert torch.allclose(weights.sum((2, 3)), torch.ones(2, 3))


def test_pools_lie_between_mean_and_maximum():
    found = {}
    for pool in ("max", "avg", "lse"):
        output = network(concept_pool=pool).eval()(pictures(), needs=["cams", "concept_logits"])
        found[pool], cams = output.concept_logits, output.cams
    assert torch.equal(found["max"], cams.amax((2, 3)))
    assert torch.allclose(found["avg"], cams.mean((2, 3)))
    assert torch.allclose(found["lse"], (5 * cams).exp().mean((2, 3)).log() / 5, atol=1e-6)
    assert (found["avg"] < found["lse"]).all()
    assert (found["lse"] < found["max"]).all()


@pytest.mark.parametrize("order", ["pool_first", "project_first"])
def test_local_vectors_follow_their_order(order):
    net = network(local_order=order).eval()
    found = net(pictures(), needs=EVERYTHING)
    weights = found.cams.flatten(2).softmax(2).view_as(found.cams)
    for image in range(2):
        for concept in range(3):
            if order == "pool_first":
                mean = (weights[image, concept] * found.features[image]).sum((1, 2))
                expected = net.projector(mean[None, :, None, None])[0, :, 0, 0]
            else:
                expected = (weights[image, concept] * found.projected[image]).sum((1, 2))
            assert torch.allclose(found.local_vectors[image, concept], expected, atol=1e-5)


def test_a_map_of_one_cell_makes_local_vectors_of_that_cell():
    for options in ({}, {"projector": "ibn"}, {"local_order": "project_first"}):
        net = network(**options).eval()
        nn.init.normal_(net.concept_head.weight, std=1e4)
        found = net(pictures(), needs=EVERYTHING)
        place = found.cams.flatten(2).argmax(2)
        cells = found.projected.flatten(2).mT  # (B, H W, D)
        expected = cells[torch.arange(2)[:, None], place]
        assert torch.allclose(found.local_vectors, expected, atol=1e-4)


@pytest.mark.parametrize("detach", [True, False])
def test_detached_maps_get_no_gradient_from_local_vectors(detach):
    net = network()
    net(pictures(), needs=["local_vectors"], detach_cams=detach).local_vectors.sum().backward()
    assert (net.concept_head.weight.grad is None) == detach
    assert net.projector[0].weight.grad.abs().sum() > 0  # type: ignore[index]


# Similarities


def test_similarities_are_cosines():
    net = network(projector="ibn").eval()
    found = net(pictures(), needs=EVERYTHING)
    flat = net.prototypes.flatten(1)
    for row in range(6):  # the prototype m of concept k is row k M + m
        k, m = divmod(row, 2)
        cosine = F.cosine_similarity(found.projected, flat[row][None, :, None, None], dim=1)
        assert torch.allclose(found.similarity_maps[:, k, m], cosine, atol=1e-6)
        assert torch.allclose(found.prototypes[k, m], flat[row] / flat[row].norm())
        assert torch.equal(net.prototype_vectors[k, m], flat[row])
    assert torch.equal(found.similarity_scores, found.similarity_maps.amax((3, 4)))


def test_convolution_with_prototypes_is_the_sum_over_their_coordinates():
    unit = F.normalize(uniform(2, 8, 4, 5) - 0.5, dim=1)
    prototypes = F.normalize(uniform(3, 2, 8, seed=3) - 0.5, dim=2)
    expected = torch.einsum("bdhw,kmd->bkmhw", unit, prototypes)
    assert torch.allclose(similarity_maps(unit, prototypes), expected, atol=1e-6)


def test_cosines_never_exceed_one():
    prototypes = F.normalize(uniform(40, 25, 8), dim=2)
    unit = torch.cat([prototypes, -prototypes]).view(2, 1000, 8).mT[..., None]
    maps = similarity_maps(unit, prototypes)
    assert maps.max() == 1
    assert maps.min() == -1


def test_prototypes_are_first_drawn_with_unit_variance():
    net = network(concepts=20, prototypes=20)
    prototypes = net.prototypes.detach()
    assert prototypes.std() == pytest.approx(1, abs=0.05)
    assert prototypes.mean() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 4, 4)])
def test_full_importance_changes_nothing(shape):
    net = network()
    plain, full = (net(pictures(), given, EVERYTHING) for given in (None, torch.ones(shape)))
    assert plain.similarity_maps.min() < 0
    assert torch.equal(plain.similarity_maps, full.similarity_maps)
    assert torch.equal(plain.logits, full.logits)


def test_without_importance_there_is_no_similarity():
    found = network()(pictures(), torch.zeros(2, 4, 4), EVERYTHING)
    assert not found.similarity_scores.any()
    assert not found.similarity_maps.any()


def test_importance_scales_what_is_positive_and_clips_what_is_not():
    maps, importance = 2 * uniform(2, 3, 2, 4, 4) - 1, uniform(2, 3, 4, 4).round(decimals=1)
    importance[:, :, 0] = 1
    found = weigh(maps, importance)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in maps.shape)).tolist():
        b, k, m, h, w = place
        weight, value = float(importance[b, k, h, w]), float(maps[b, k, m, h, w])
        expected = value if weight == 1 else weight * max(value, 0)
        assert float(found[b, k, m, h, w]) == pytest.approx(expected)


def test_a_larger_positive_box_never_lowers_a_score():
    maps = 2 * uniform(2, 3, 50, 4, 4) - 1
    maps[:, :, :25] -= 0.8  # mostly negative
    before = None
    for side in range(4):  # with cells left outside: everywhere 1 means no importance at all
        importance = torch.full((2, 3, 4, 4), 0.2)
        importance[:, :, :side, :side] = 1
        scores = weigh(maps, importance).amax((3, 4))
        assert before is None or (scores >= before).all()
        before = scores


def test_importance_of_one_concept_leaves_the_others_alone():
    importance = torch.ones(2, 3, 4, 4)
    importance[:, 1] = 0.2
    net = network()
    plain, changed = (
        net(pictures(), given, ["similarity_scores"]).similarity_scores
        for given in (None, importance)
    )
    assert torch.equal(plain[:, [0, 2]], changed[:, [0, 2]])
    assert not torch.equal(plain[:, 1], changed[:, 1])


# Verdict


def test_a_normed_head_sees_standard_scores():
    net, scores = network(), uniform(50, 3, 2)
    flat = scores.flatten(1)
    net.set_task_norm(flat.mean(0), flat.std(0))
    inputs = net.task_inputs(scores)
    assert torch.allclose(inputs.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(inputs.std(0), torch.ones(6), atol=1e-5)


def test_scores_that_never_vary_stay_finite():
    net, scores = network(), torch.full((5, 3, 2), 0.5)
    net.set_task_norm(scores.flatten(1).mean(0), scores.flatten(1).std(0))
    assert net.classify(scores).isfinite().all()


def test_the_head_may_see_the_best_prototype_of_each_concept():
    net = network(task_input="max").eval()
    found = net(pictures(), needs=["similarity_scores", "logits"])
    expected = net.task_head(found.similarity_scores.amax(2))
    assert torch.allclose(found.logits, expected)


def test_the_order_of_a_concepts_prototypes_does_not_matter():
    net = network(prototypes=5).eval()
    before = net(pictures()).logits
    order = tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        net.prototype_vectors[1] = net.prototype_vectors[1, order].clone()
        moved = net(pictures()).logits
        columns = torch.arange(15)
        columns[5:10] = 5 + order
        net.task_head.weight.copy_(net.task_head.weight[:, columns].clone())
    assert not torch.allclose(moved, before, atol=1e-3)
    assert torch.allclose(net(pictures()).logits, before, atol=1e-6)


# Projector


# Stages


def part_of(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("projector", ["mlp", "ibn"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_all_other_parts_bit_identical(stage, projector):
    net = network(projector=projector)
    net.freeze(stage)
    net.train()
    before = saved(net)
    learner = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        output = net(pictures(4), needs=[TRAINS[stage], "prototypes"])
        loss = getattr(output, TRAINS[stage]).square().sum()
        if stage == "prototype":
            loss = loss + output.prototypes.sum()
        learner.zero_grad()
        loss.backward()
        learner.step()
    changed = {name for name, value in saved(net).items() if not torch.equal(value, before[name])}
    assert {part_of(name) for name in changed} == STAGES[stage]
    trained = {name for name, _ in net.named_parameters() if part_of(name) in STAGES[stage]}
    assert trained <= changed
    assert any("running" in name for name in changed) == (
        stage == "concept" or (stage, projector) == ("prototype", "ibn")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_stay_in_evaluation_mode(stage):
    net = network()
    net.freeze(stage)
    for _ in range(2):
        net.train()
        for name in ("backbone", "concept_head", "projector", "task_head"):
            modes = {one.training for one in getattr(net, name).modules()}
            assert modes == {name in STAGES[stage]}
        assert net.training
        net.eval()
        assert not any(one.training for one in net.modules())


def test_stages_share_all_parameters_among_themselves():
    net = network()
    found = [
        parameter
        for stage in STAGES
        for part in net.stage_parameters(stage).values()
        for parameter in part
    ]
    assert {id(one) for one in found} == {id(one) for one in net.parameters()}
    assert len(found) == len([*net.parameters()])
    assert {stage: set(net.stage_parameters(stage)) for stage in STAGES} == STAGES


def test_another_stage_may_follow_and_everything_be_freed():
    net = network().eval()
    net.freeze("concept")
    net.freeze("task")
    trained = {part_of(name) for name, one in net.named_parameters() if one.requires_grad}
    assert trained == {"task_head"}
    assert not net.training
    net.freeze(None)
    net.train()
    assert all(one.requires_grad for one in net.parameters())
    assert all(one.training for one in net.modules())


def test_saved_weights_give_the_same_outputs():
    net = network(projector="ibn", task_input="max")
    net(pictures(4), needs=["local_vectors"])  # batch statistics that are not the first ones
    net.set_task_norm(uniform(3), uniform(3) + 0.1)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    again = network(projector="ibn", task_input="max")
    nn.init.normal_(again.prototypes)
    again.load_state_dict(torch.load(file, weights_only=True))
    first, second = (one.eval()(pictures(), needs=EVERYTHING) for one in (net, again))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
