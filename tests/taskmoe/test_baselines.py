import math
import re

import pytest
import torch
from torch import Tensor

from moectl.common.calibration import fit_temperature
from moectl.taskmoe.baselines import dense_width, own_accuracy, routing, union_logits
from moectl.taskmoe.model import MergedMoE, Specialist

# Three specialists of 3, 2 and 4 classes; 2 is known to the first two, 5 to the first and the last.
ROWS = [[0, 2, 5], [2, 1], [3, 6, 4, 5]]
CLASSES = 7
OWNERS = torch.tensor([[float(c in own) for own in ROWS] for c in range(CLASSES)])
NAMES = ["oracle", "concatenated_logits", "concatenated_softmax", "max_probability", "entropy"]


def drawn(items: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that know something about labels, (N, E, C) and (N,)."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (items,), generator=draws)
    each = []
    for number, own in enumerate(ROWS):
        hit = torch.tensor([[float(label == c) for c in own] for label in labels.tolist()])
        noise = torch.randn(items, len(own), generator=draws, dtype=torch.float64)
        each.append((number + 1) * (noise + 1.5 * hit))
    return union_logits(each, ROWS, CLASSES), labels


def logs(rows: list[dict[int, float]], classes: int) -> Tensor:
    """Logits (1, E, C) of one image from each specialist's probabilities by class."""
    each = [torch.tensor([list(row.values())]).log() for row in rows]
    return union_logits(each, [[*row] for row in rows], classes)


def owned(logits: Tensor) -> Tensor:
    return logits[0].isfinite().T.long()


def slow(row: Tensor, label: int) -> dict[str, int]:
    """Every baseline for one image, (E, C), in plain Python."""
    logits = [{c: float(row[j, c]) for c in own} for j, own in enumerate(ROWS)]
    softmax = []
    for own in logits:
        total = sum(math.exp(value) for value in own.values())
        softmax.append({c: math.exp(value) / total for c, value in own.items()})
    entropies = [
        -sum(p * math.log(p) for p in own.values()) / math.log(len(own)) for own in softmax
    ]
    by_top = max(softmax, key=lambda own: max(own.values()))
    by_entropy = softmax[min(range(len(ROWS)), key=lambda j: entropies[j])]
    largest, mean, asked = {}, {}, {}
    experts = [own for own in softmax if label in own]
    for c in range(CLASSES):
        mine = [j for j, own in enumerate(ROWS) if c in own]
        largest[c] = max(logits[j][c] for j in mine)
        mean[c] = sum(softmax[j][c] for j in mine) / len(mine)
        asked[c] = sum(own.get(c, 0.0) for own in experts) / len(experts)
    votes = [asked, largest, mean, by_top, by_entropy]
    return {name: max(vote, key=vote.__getitem__) for name, vote in zip(NAMES, votes, strict=True)}


def test_logits_are_placed_at_their_classes() -> None:
    placed = union_logits([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])], [[2, 0], [2]], 4)
    gone = -math.inf
    assert placed.tolist() == [[[2.0, gone, 1.0, gone], [gone, gone, 3.0, gone]]]


def test_predictions_are_those_of_plain_loops() -> None:
    logits, labels = drawn()
    found = routing(logits, labels, OWNERS)
    assert list(found) == NAMES
    expected = [slow(row, int(label)) for row, label in zip(logits, labels, strict=True)]
    for name, predictions in found.items():
        assert predictions.dtype == torch.int64
        assert predictions.tolist() == [image[name] for image in expected]
    different = {tuple(predictions.tolist()) for predictions in found.values()}
    assert len(different) == len(NAMES)  # else the loops would prove little


def test_a_small_logit_can_be_a_large_probability() -> None:
    logits = union_logits(
        [torch.tensor([[5.0, 4.9]]), torch.tensor([[4.0, -9.0, -9.0]])], [[0, 1], [2, 3, 4]], 5
    )
    found = routing(logits, torch.tensor([0]), owned(logits))
    assert {name: int(value) for name, value in found.items()} == {
        "oracle": 0, "concatenated_logits": 0, "concatenated_softmax": 2, "max_probability": 2,
        "entropy": 2,
    }  # fmt: skip


def test_entropy_is_relative_to_the_number_of_classes() -> None:
    """0.67 of at most 0.69 nats is less sure than 0.70 of at most 1.10."""
    logits = logs([{0: 0.6, 1: 0.4}, {2: 0.519, 3: 0.48, 4: 0.001}], 5)
    found = routing(logits, torch.tensor([1]), owned(logits))
    assert int(found["entropy"]) == 2
    assert int(found["max_probability"]) == 0


@pytest.mark.parametrize(("label", "oracle"), [(0, 1), (1, 1), (2, 2)])
def test_owners_share_a_class(label: int, oracle: int) -> None:
    logits = logs([{0: 0.1, 1: 0.9}, {1: 0.2, 2: 0.8}], 3)
    found = routing(logits, torch.tensor([label]), owned(logits))
    assert int(found["concatenated_softmax"]) == 2  # 0.8 against the mean of 0.9 and 0.2
    assert int(found["max_probability"]) == 1
    assert int(found["oracle"]) == oracle
    assert int(found["concatenated_logits"]) == 1


def test_the_oracle_stays_with_the_owners() -> None:
    logits, labels = drawn()
    predictions = routing(logits, labels, OWNERS)["oracle"]
    assert bool(((OWNERS[predictions] * OWNERS[labels]).sum(1) > 0).all())


def test_perfect_specialists_are_perfect_under_the_oracle() -> None:
    labels = torch.arange(CLASSES).repeat(3)
    each = [
        torch.tensor([[9.0 * (label == c) for c in own] for label in labels.tolist()])
        for own in ROWS
    ]
    logits = union_logits(each, ROWS, CLASSES)
    found = routing(logits, labels, OWNERS, val_logits=logits, val_labels=labels)
    assert all(torch.equal(predictions, labels) for predictions in found.values())
    assert own_accuracy(logits, labels, OWNERS) == [1.0, 1.0, 1.0]


def test_disjoint_oracle_is_the_mean_of_the_specialists() -> None:
    rows = [[0, 1, 2], [3, 4, 5, 6]]
    owners = torch.tensor([[int(c in own) for own in rows] for c in range(CLASSES)])
    logits, labels = drawn()
    logits = logits.amax(1, keepdim=True).masked_fill(owners.T == 0, -math.inf)
    counts = owners[labels].sum(0).tolist()
    alone = own_accuracy(logits, labels, owners)
    assert None not in alone
    hits = sum(share * count for share, count in zip(alone, counts, strict=True) if share)
    right = routing(logits, labels, owners)["oracle"] == labels
    assert float(right.double().mean()) == pytest.approx(hits / len(labels))


def test_the_order_of_the_specialists_does_not_matter() -> None:
    (logits, labels), (val_logits, val_labels) = drawn(), drawn(seed=1)
    order = [2, 0, 1]
    found = routing(logits, labels, OWNERS, val_logits=val_logits, val_labels=val_labels)
    moved = routing(
        logits[:, order],
        labels,
        OWNERS[:, order],
        val_logits=val_logits[:, order],
        val_labels=val_labels,
    )
    for name, predictions in found.items():
        assert torch.equal(predictions, moved[name]), name
    assert own_accuracy(logits[:, order], labels, OWNERS[:, order]) == [
        own_accuracy(logits, labels, OWNERS)[number] for number in order
    ]


def test_temperatures_undo_the_scale_of_each_specialist() -> None:
    (logits, labels), (val_logits, val_labels) = drawn(), drawn(seed=1)
    scales = torch.tensor([4.0, 0.3, 1.0])[:, None]
    plain = routing(logits, labels, OWNERS, val_logits=val_logits, val_labels=val_labels)
    scaled = routing(
        logits * scales, labels, OWNERS, val_logits=val_logits * scales, val_labels=val_labels
    )
    assert torch.equal(plain["calibrated_softmax"], scaled["calibrated_softmax"])
    assert not torch.equal(plain["concatenated_softmax"], scaled["concatenated_softmax"])


def test_temperatures_are_those_of_each_specialist_alone() -> None:
    (logits, labels), (val_logits, val_labels) = drawn(), drawn(seed=1)
    votes = torch.zeros(len(labels), CLASSES, dtype=torch.float64)
    for number, own in enumerate(ROWS):
        mine = [i for i, label in enumerate(val_labels.tolist()) if label in own]
        answers = torch.tensor([own.index(int(val_labels[i])) for i in mine])
        temperature = fit_temperature(val_logits[mine, number][:, own], answers)
        votes[:, own] += (logits[:, number][:, own] / temperature).softmax(1)
    expected = (votes / OWNERS.sum(1)).argmax(1)
    found = routing(logits, labels, OWNERS, val_logits=val_logits, val_labels=val_labels)
    assert torch.equal(found["calibrated_softmax"], expected)
    foreign = OWNERS[val_labels, 2] == 0
    val_logits[foreign, 2] *= 100
    again = routing(logits, labels, OWNERS, val_logits=val_logits, val_labels=val_labels)
    assert torch.equal(again["calibrated_softmax"], expected)


def test_a_specialist_of_one_class_is_always_sure() -> None:
    logits = logs([{0: 0.99, 1: 0.01}, {2: 1.0}], 3)
    found = routing(logits, torch.tensor([0]), owned(logits))
    assert int(found["oracle"]) == 0
    others = ("max_probability", "entropy", "concatenated_softmax")
    assert [int(found[name]) for name in others] == [2, 2, 2]


def test_own_accuracy_looks_at_own_images_only() -> None:
    logits = union_logits(
        [torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), torch.zeros(4, 1), torch.zeros(4, 1)],
        [[0, 1], [1], [2]],
        3,
    )
    owners = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert own_accuracy(logits, torch.tensor([0, 1, 1, 0]), owners) == [0.5, 1.0, None]


@pytest.mark.parametrize("classes", [1, 5, 15])
@pytest.mark.parametrize("width", [1, 2, 16, 41, 64])
def test_a_specialist_has_the_width_of_its_own_size(width: int, classes: int) -> None:
    assert dense_width(count(Specialist(classes, width)), classes) == width


@pytest.mark.parametrize("width", [1, 7, 40])
def test_the_width_changes_half_way_between_two_sizes(width: int) -> None:
    below, above = (count(Specialist(5, each)) for each in (width, width + 1))
    middle = (below + above) // 2
    assert dense_width(middle - 1, 5) == width
    assert dense_width(middle + 1, 5) == width + 1


def test_the_dense_network_is_the_nearest_to_the_mixture() -> None:
    parameters = count(MergedMoE(classes=15))
    assert parameters == 2_280_274
    gaps = {width: abs(count(Specialist(15, width)) - parameters) for width in range(79, 85)}
    assert dense_width(parameters, 15) == min(gaps, key=lambda width: gaps[width]) == 81
    assert dense_width(1, 15) == 1


def count(model: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in model.parameters())


@pytest.mark.parametrize(
    ("logits", "rows", "message"),
    [
        ([], [], "logits of 0 specialists and 0 lists of rows"),
        ([torch.zeros(2, 1)], [[0], [1]], "logits of 1 specialists and 2 lists of rows"),
        ([torch.zeros(2, 3)], [[0, 1]], "shape (2, 3), expected (2, 2)"),
        (
            [torch.zeros(2, 1), torch.zeros(3, 1)],
            [[0], [1]],
            "specialist 2: logits of shape",
        ),
        ([torch.zeros(2, 2)], [[1, 1]], "classes [1, 1], expected different ones from 0 to 1"),
        ([torch.zeros(2, 2)], [[0, 2]], "classes [0, 2], expected different ones from 0 to 1"),
    ],
)
def test_logits_and_rows_must_fit(
    logits: list[Tensor], rows: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        union_logits(logits, rows, 2)


def test_routing_refuses_what_does_not_fit() -> None:
    logits, labels = drawn(20)
    nothing_known, wrong = OWNERS.clone(), OWNERS.clone()
    nothing_known[3] = 0
    wrong[0, 1] = 1
    for bad_logits, bad_labels, owners, message in (
        (logits, labels[:5], OWNERS, "expected (N, E, C), (N,), (C, E)"),
        (logits, labels, OWNERS.T, "expected (N, E, C), (N,), (C, E)"),
        (logits, labels, nothing_known, "owners leaves a class without specialist"),
        (logits, labels + 1, OWNERS, "labels must be class indices from 0 to 6"),
        (logits, labels, wrong, "finite where owners has a 1"),
        (logits.nan_to_num(math.nan, neginf=math.nan), labels, OWNERS, "-inf where it has a 0"),
    ):
        for function in (routing, own_accuracy):
            with pytest.raises(ValueError, match=re.escape(message)):
                function(bad_logits, bad_labels, owners)


def test_calibration_needs_validation_images_of_every_specialist() -> None:
    logits, labels = drawn(50)
    with pytest.raises(ValueError, match="both, or neither"):
        routing(logits, labels, OWNERS, val_logits=logits)
    few = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="specialist 2 has no validation images"):
        routing(logits, labels, OWNERS, val_logits=logits[:1], val_labels=few)


@pytest.mark.parametrize(("parameters", "classes"), [(0, 5), (1000, 0)])
def test_a_width_needs_a_size_and_classes(parameters: int, classes: int) -> None:
    with pytest.raises(ValueError, match="each must be at least 1"):
        dense_width(parameters, classes)
