import json
import math

import pytest
import torch
from torch import Tensor

from moectl.taskmoe.analysis import (
    Examined,
    ablations,
    attribution,
    contribution,
    forced_accuracy,
    knock_out,
    matching,
    owner_alignment,
    per_class,
    routing_share,
    specialisation,
    summary,
    temperature_sweep,
)

OWNERS = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]])


def examined(items: int = 200, experts: int = 2, classes: int = 4, seed: int = 0) -> Examined:
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    gate_logits = normal(items, experts)
    return Examined(
        expert_logits=normal(items, experts, classes),
        by_pass=normal(items, classes) / 2,
        bias=normal(classes) / 2,
        gate_logits=gate_logits,
        gates=gate_logits.softmax(1),
        labels=torch.arange(items) % classes,
    )


def routed(gates: list[list[float]], labels: list[int], classes: int = 2) -> Examined:
    rows = torch.tensor(gates, dtype=torch.float64)
    zeros = torch.zeros(len(labels), rows.shape[1], classes, dtype=torch.float64)
    return Examined(
        zeros, zeros[:, 0], zeros[0, 0], rows.clamp_min(1e-9).log(), rows, torch.tensor(labels)
    )


def test_logits_are_the_sum_of_the_parts_image_by_image() -> None:
    found = examined(20)
    for row, logits in enumerate(found.logits()):
        expected = found.by_pass[row] + found.bias
        for gate, own in zip(found.gates[row], found.expert_logits[row], strict=True):
            expected = expected + gate * own
        torch.testing.assert_close(logits, expected)


def test_contributions_and_routing_by_hand() -> None:
    found = routed([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 0, 1])
    torch.testing.assert_close(contribution(found).tolist(), [[0.8, 0.2], [0.2, 0.8]])
    assert routing_share(found).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    torch.testing.assert_close(contribution(examined()).sum(0), torch.ones(4).double())


def test_a_class_without_images_is_undefined() -> None:
    found = routed([[0.9, 0.1]], [1])
    assert contribution(found)[:, 0].isnan().all()
    document = summary(found, torch.tensor([[1, 0], [0, 1]]))
    assert document["contribution"][0][0] is None
    assert document["owner_alignment"] == pytest.approx(0.1)


def test_forced_accuracy_sends_everything_to_one_expert() -> None:
    found = examined()
    for expert in range(2):
        gates = torch.zeros(2, dtype=torch.float64)
        gates[expert] = 1
        hits = found.logits(gates).argmax(1) == found.labels
        expected = [float(hits[found.labels == c].double().mean()) for c in range(4)]
        assert forced_accuracy(found)[expert].tolist() == pytest.approx(expected)


def test_forced_accuracy_among_own_classes() -> None:
    found = examined()
    own = forced_accuracy(found, OWNERS)
    assert own.isnan().tolist() == (OWNERS.T == 0).tolist()
    assert bool((own[OWNERS.T == 1] >= forced_accuracy(found)[OWNERS.T == 1]).all())


def test_knocking_out_what_has_no_gate_changes_nothing() -> None:
    found = examined(experts=3)
    gates = found.gates.clone()
    gates[:, 2] = 0
    gates = gates / gates.sum(1, keepdim=True)
    silent = Examined(**{**vars(found), "gates": gates})
    assert not knock_out(silent)[2].any()
    assert knock_out(silent)[:2].abs().sum() > 0


def test_knocking_out_the_only_expert_in_use_leaves_the_others_equal() -> None:
    found = examined(experts=3)
    gates = torch.zeros_like(found.gates)
    gates[:, 0] = 1
    alone = Examined(**{**vars(found), "gates": gates})
    equal = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    hits = (alone.logits().argmax(1) == found.labels).double()
    hits -= (alone.logits(equal).argmax(1) == found.labels).double()
    torch.testing.assert_close(knock_out(alone)[0], per_class(hits, found.labels, 4))


def test_attributions_sum_to_the_logit() -> None:
    parts = attribution(examined())
    total = parts["experts"].sum(1) + parts["by_pass"] + parts["bias"]
    torch.testing.assert_close(total, parts["logit"], rtol=0, atol=1e-9)


def test_specialisation_is_the_mutual_information() -> None:
    perfect = routed([[1, 0], [1, 0], [0, 1], [0, 1]], [0, 0, 1, 1])
    assert specialisation(perfect) == pytest.approx(math.log(2))
    assert specialisation(routed([[0.3, 0.7]] * 4, [0, 0, 1, 1])) == pytest.approx(0, abs=1e-12)
    assert owner_alignment(perfect, torch.tensor([[1, 0], [0, 1]])) == 1
    assert owner_alignment(perfect, torch.tensor([[0, 1], [1, 0]])) == 0
    assert matching(perfect, torch.tensor([[0, 1], [1, 0]])) == [1, 0]


def test_a_low_temperature_takes_the_largest_gate() -> None:
    found = examined()
    own, hard = temperature_sweep(found, [1.0, 1e-4])
    accuracies = ablations(found, OWNERS)
    assert own == pytest.approx(accuracies["full"])
    assert hard == pytest.approx(accuracies["top1_gate"])
    warm = temperature_sweep(found, [1e9])[0]
    assert warm == pytest.approx(accuracies["uniform_gate"])


def test_ablations_take_parts_away() -> None:
    found = examined()
    without = Examined(**{**vars(found), "by_pass": torch.zeros_like(found.by_pass)})
    assert ablations(found, OWNERS)["experts_only"] == ablations(without, OWNERS)["full"]
    silent = Examined(**{**vars(found), "expert_logits": torch.zeros_like(found.expert_logits)})
    assert ablations(found, OWNERS)["gating_only"] == ablations(silent, OWNERS)["full"]


def test_the_oracle_opens_the_gates_of_the_owners() -> None:
    found = examined()
    shares = OWNERS[found.labels] / OWNERS[found.labels].sum(1, keepdim=True)
    hits = [
        int((gates @ experts + by_pass + found.bias).argmax()) == label
        for gates, experts, by_pass, label in zip(
            shares.double(), found.expert_logits, found.by_pass, found.labels.tolist(), strict=True
        )
    ]
    oracle = ablations(found, OWNERS)["oracle_gate"]
    assert oracle == pytest.approx(sum(hits) / len(hits))
    assert oracle != ablations(found, OWNERS)["full"]


def test_a_single_expert_is_always_used() -> None:
    found = examined(experts=1)
    document = summary(found, torch.ones(4, 1))
    assert document["effective_experts"] == pytest.approx(1)
    assert document["owner_alignment"] == pytest.approx(1)
    assert document["specialisation"] == pytest.approx(0, abs=1e-12)


def test_attributions_are_the_means_over_each_class() -> None:
    found = examined(experts=3)
    parts = attribution(found)
    for c in range(4):
        mine = [row for row, label in enumerate(found.labels.tolist()) if label == c]
        for expert in range(3):
            own = [found.gates[i, expert] * found.expert_logits[i, expert, c] for i in mine]
            assert float(parts["experts"][c, expert]) == pytest.approx(float(sum(own)) / len(mine))
        by_pass = sum(float(found.by_pass[i, c]) for i in mine) / len(mine)
        assert float(parts["by_pass"][c]) == pytest.approx(by_pass)
        assert float(parts["bias"][c]) == float(found.bias[c])


def test_forced_accuracy_among_own_classes_is_that_of_a_plain_loop() -> None:
    found = examined()
    own = forced_accuracy(found, OWNERS)
    for expert, classes in enumerate(([0, 1, 3], [2, 3])):
        for c in classes:
            mine = [row for row, label in enumerate(found.labels.tolist()) if label == c]
            gates = torch.eye(2, dtype=torch.float64)[expert]
            logits = [dict(enumerate(row)) for row in found.logits(gates).tolist()]
            hits = sum(max(classes, key=logits[row].__getitem__) == c for row in mine)
            assert float(own[expert, c]) == pytest.approx(hits / len(mine))


def test_specialisation_weighs_classes_by_their_images() -> None:
    """Against the sum over the joint table of class and expert."""
    found = routed([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]], [0, 0, 0, 1])
    joint = [[0.75 * 0.8, 0.75 * 0.2], [0.25 * 0.1, 0.25 * 0.9]]
    experts = [joint[0][j] + joint[1][j] for j in range(2)]
    expected = sum(
        joint[c][j] * math.log(joint[c][j] / (share * experts[j]))
        for c, share in enumerate((0.75, 0.25))
        for j in range(2)
    )
    assert specialisation(found) == pytest.approx(expected)


def test_the_order_of_the_experts_only_reorders_the_rows() -> None:
    found, order = examined(experts=3), [2, 0, 1]
    moved = Examined(
        found.expert_logits[:, order],
        found.by_pass,
        found.bias,
        found.gate_logits[:, order],
        found.gates[:, order],
        found.labels,
    )
    owners = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    plain, other = summary(found, owners), summary(moved, owners[:, order])
    for name in ("contribution", "routing_share", "forced_accuracy", "knock_out", "usage"):
        expected = torch.tensor(plain[name], dtype=torch.float64)[order]
        torch.testing.assert_close(torch.tensor(other[name], dtype=torch.float64), expected)
    for name in ("specialisation", "owner_alignment", "effective_experts", "ablations"):
        assert other[name] == pytest.approx(plain[name])


def test_a_summary_is_fit_for_a_file() -> None:
    found = routed([[1, 0], [0.5, 0.5], [0.5, 0.5]], [0, 1, 1], classes=3)
    document = summary(found, torch.tensor([[1, 0], [0, 1], [0, 1]]))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["usage"] == pytest.approx([2 / 3, 1 / 3])
    assert document["effective_experts"] == pytest.approx((1 + 2 + 2) / 3)
    assert document["owner_alignment"] == pytest.approx((1 + 0.5) / 2)
    assert document["forced_accuracy_own"][0][1:] == [None, None]
