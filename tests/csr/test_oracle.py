import json

import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from moectl.csr.edits import Head, Norm, confirm, contributions, margins, reject, statistics
from moectl.csr.oracle import Cases, compare, concept_order, curve, oracle

IMAGES, CONCEPTS, PROTOTYPES = 120, 4, 2
ORDERS = ["similarity", "contribution", "uncertainty", "random"]


def world(*, multilabel: bool = False, noise: float = 1.2):
    """Images whose class is the first of two concepts, with scores that are often wrong."""
    draws = torch.Generator().manual_seed(0)
    concepts = (torch.rand(IMAGES, CONCEPTS, generator=draws) < 0.5).double()
    shape = (IMAGES, CONCEPTS, PROTOTYPES)
    scores = concepts[..., None] - 0.5 + noise * torch.randn(shape, generator=draws).double()
    scores = scores.clamp(-1, 1)
    weight = torch.zeros(2, CONCEPTS, PROTOTYPES).double()
    weight[0, 0], weight[1, 1] = 1, 1
    head = Head(
        weight.flatten(1),
        torch.zeros(2).double(),
        Norm(torch.zeros(CONCEPTS, PROTOTYPES).double(), torch.full((CONCEPTS, PROTOTYPES), 0.5)),
    )
    labels = concepts[:, :2] if multilabel else (concepts[:, 1] > concepts[:, 0]).long()
    cases = Cases(scores, concepts, labels, 2 * scores.mean(2))
    return cases, head, statistics(scores, concepts)


# Comparison


def test_decisions_of_classes_are_counted():
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    after = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    labels = torch.tensor([1, 1, 1, 0])
    found = compare(before, after, labels)
    assert [found[name] for name in ("decisions", "fixed", "broke", "net")] == [4, 1, 1, 0]
    assert found["accuracy"] == {"before": 0.5, "after": 0.5, "change": 0}
    p = float(torch.tensor(2.0).sigmoid())
    assert found["true_probability"]["before"] == pytest.approx((2 * (1 - p) + 2 * p) / 4)
    wanted = f1_score(labels, after.argmax(1), average="macro")
    assert found["f1_macro"]["after"] == pytest.approx(wanted)
    json.dumps(found, allow_nan=False)


def test_decisions_of_findings_are_answers():
    before, after = torch.tensor([[2.0, -2.0], [0.5, 1.0]]), torch.tensor([[2.0, 2.0], [0.5, -1.0]])
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.5]])
    found = compare(before, after, labels)
    assert [found[name] for name in ("decisions", "fixed", "broke", "net")] == [4, 1, 1, 0]
    true = torch.tensor([2.0, 2.0, -0.5, -1.0]).sigmoid().mean().item()
    assert found["true_probability"]["after"] == pytest.approx(true)
    wanted = f1_score([[1, 1], [0, 1]], after > 0, average="macro")
    assert found["f1_macro"]["after"] == pytest.approx(wanted)
    strict = compare(before, after, labels, torch.tensor([0.7, 0.5]))
    assert strict["accuracy"]["before"] - found["accuracy"]["before"] == pytest.approx(0.25)


def test_images_gain_or_lose_as_a_whole():
    """Of 6 images 5 gain an answer each and 1 loses two."""
    labels = torch.ones(6, 2)
    before = torch.tensor([[-1.0, 1.0]] * 5 + [[1.0, 1.0]])
    after = torch.tensor([[1.0, 1.0]] * 5 + [[-1.0, -1.0]])
    found = compare(before, after, labels)
    assert (found["fixed"], found["broke"]) == (5, 2)
    assert found["p_value"] == pytest.approx(binomtest(5, 6).pvalue)
    assert compare(before, before, labels)["p_value"] == 1
    classes = torch.zeros(5).long()
    found = compare(torch.tensor([[0.0, 1.0]] * 5), torch.tensor([[1.0, 0.0]] * 5), classes)
    assert found["p_value"] == pytest.approx(2 * 0.5**5)


def test_no_change_changes_nothing():
    cases, head, _ = world()
    logits = contributions(cases.scores, *head).logits
    found = compare(logits, logits, cases.labels)
    assert found["fixed"] == found["broke"] == found["net"] == found["accuracy"]["change"] == 0


# Orders


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_names_every_concept_once(order):
    cases, head, _ = world()
    found = concept_order(cases, head, order, seed=1)
    assert torch.equal(found.sort(1).values, torch.arange(CONCEPTS).expand(IMAGES, -1))
    assert torch.equal(found, concept_order(cases, head, order, seed=1))


def test_orders_put_first_what_they_say():
    cases, head, _ = world()
    first = {order: concept_order(cases, head, order)[:, 0] for order in ORDERS}
    assert torch.equal(first["similarity"], cases.scores.amax(2).argmax(1))
    assert torch.equal(first["uncertainty"], cases.concept_logits.abs().argmin(1))
    full = contributions(cases.scores, *head)
    top = full.values[torch.arange(IMAGES), full.logits.argmax(1)]
    assert torch.equal(first["contribution"], top.abs().argmax(1))
    assert (first["random"].bincount(minlength=CONCEPTS) > IMAGES / 8).all()
    assert not torch.equal(first["random"], concept_order(cases, head, "random", seed=1)[:, 0])
    with pytest.raises(ValueError, match="order 'best'"):
        concept_order(cases, head, "best")  # type: ignore[arg-type]


def test_prototypes_without_a_say_make_no_concept_the_first():
    cases, head, _ = world()
    kept = torch.ones(CONCEPTS, PROTOTYPES, dtype=torch.bool)
    kept[2] = False
    first = concept_order(cases, head._replace(kept=kept), "similarity")
    assert (first[:, -1] == 2).all()


# The study


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("mode", ["zero", "absent-median", "drop"])
def test_the_study_rejects_the_strongest_absent_concept(multilabel, mode):
    cases, head, table = world(multilabel=multilabel)
    before = contributions(cases.scores, *head).logits
    near = margins(before, multilabel=multilabel)
    edited, asked = cases.scores.clone(), 0
    for image in range(IMAGES):
        absent = (cases.concepts[image] == 0).nonzero()[:, 0].tolist()
        if near[image] < 0.4 and absent:
            strongest = max(absent, key=lambda k: cases.scores[image, k].max().item())
            one = reject(edited[image, None], strongest, mode, table, head.neutral)
            edited[image], asked = one[0], asked + 1
    found = oracle(cases, head, table, mode=mode, margin=0.4)
    after = contributions(edited, *head).logits
    assert 0 < asked < IMAGES
    assert found == {
        "mode": mode,
        "margin": 0.4,
        "order": "similarity",
        "asked": asked,
        **compare(before, after, cases.labels),
    }


def test_knowing_what_is_absent_helps_here():
    cases, head, table = world()
    found = oracle(cases, head, table, margin=2, order="contribution")
    assert found["asked"] == (cases.concepts == 0).any(1).sum()
    assert found["net"] == found["fixed"] - found["broke"] > 0
    assert found["accuracy"]["change"] == pytest.approx(found["net"] / IMAGES)
    assert found["true_probability"]["change"] > 0


def test_nobody_is_asked_below_a_margin_of_zero():
    cases, head, table = world()
    found = oracle(cases, head, table, margin=0)
    assert found["asked"] == found["fixed"] == found["broke"] == 0


def test_concepts_without_statistics_stay_as_they_are():
    cases, head, _ = world()
    concepts = cases.concepts.clone()
    concepts[:, 0] = 1
    unknown = statistics(cases.scores, concepts)  # concept 0 was always present in training
    concepts[:, 1:], concepts[:, 0] = 1, 0
    only = cases._replace(concepts=concepts)
    assert oracle(only, head, unknown, margin=2)["asked"] == 0
    assert oracle(only, head, unknown, mode="zero", margin=2)["asked"] == IMAGES
    concepts[:, 0] = 0
    points = curve(cases._replace(concepts=1 - concepts), head, unknown, order="random")
    assert len(points) == CONCEPTS + 1


# Curves


@pytest.mark.parametrize("multilabel", [False, True])
def test_curves_start_and_end_at_the_same_points(multilabel):
    cases, head, table = world(multilabel=multilabel)
    points = {order: curve(cases, head, table, order=order) for order in ORDERS}
    before = contributions(cases.scores, *head).logits
    for found in points.values():
        assert [point["corrected"] for point in found] == list(range(CONCEPTS + 1))
        assert found[0]["net"] == 0
        assert found[0]["accuracy"] == compare(before, before, cases.labels)["accuracy"]["after"]
        assert found[-1] == points["random"][-1]
        assert found[-1]["accuracy"] > found[0]["accuracy"]


@pytest.mark.parametrize("order", ORDERS)
def test_points_are_those_of_correcting_one_by_one(order):
    cases, head, table = world()
    cases = Cases(*(part[:30] for part in cases[:4]))
    places = concept_order(cases, head, order)
    before = contributions(cases.scores, *head).logits
    scores = cases.scores.clone()
    for point in curve(cases, head, table, order=order):
        count = point["corrected"]
        for image in range(30) if count else ():
            concept = int(places[image, count - 1])
            one = scores[image, None]
            if cases.concepts[image, concept]:
                one = confirm(one, concept, table)
            else:
                one = reject(one, concept, "absent-median", table)
            scores[image] = one[0]
        wanted = compare(before, contributions(scores, *head).logits, cases.labels)
        assert point["net"] == wanted["net"]
        for name in ("accuracy", "f1_macro", "true_probability"):
            assert point[name] == wanted[name]["after"]


def test_correcting_what_matters_first_helps_sooner():
    cases, head, table = world()
    found = {order: curve(cases, head, table, order=order) for order in ("contribution", "random")}
    assert found["contribution"][1]["accuracy"] > found["random"][1]["accuracy"]
    # Only two concepts count, and they contribute most.
    assert found["contribution"][2]["net"] == found["contribution"][4]["net"]
