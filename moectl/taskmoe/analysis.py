"""What experts and gates do: contributions, forced gates, knock-outs, attribution.

Letters: N images, E experts, C classes. Both ways of mixing have logits that are linear in the
gates, so one forward pass tells everything:

    logits = sum_j gates_j * expert_logits_j + by_pass + bias
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moectl.taskmoe.model import softmax_of_largest


@dataclass(frozen=True)
class Examined:
    """The parts of the logits of some images."""

    expert_logits: Tensor
    """(N, E, C) what each expert would add with a gate of 1."""
    by_pass: Tensor
    """(N, C) what the classifier takes from the gating features."""
    bias: Tensor
    """(C,)"""
    gate_logits: Tensor
    """(N, E) before temperature and softmax."""
    gates: Tensor
    """(N, E) rows with sum 1."""
    labels: Tensor
    """(N,)"""
    top_k: int = 0
    """Experts that act on an image; 0 for all."""

    def logits(self, gates: Tensor | None = None) -> Tensor:
        """Return the logits, (N, C), with these gates, (N, E) or (E,), or with the model's own."""
        gates = self.gates if gates is None else gates.expand_as(self.gates)
        mixed = torch.einsum("ne,nec->nc", gates, self.expert_logits)
        return mixed + self.by_pass + self.bias


def per_class(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of values, (N, …), over the images of each class, (C, …); nan without images."""
    sums = torch.zeros(classes, *values.shape[1:], dtype=torch.float64)
    sums.index_add_(0, labels, values.double())
    counts = torch.bincount(labels, minlength=classes).double()
    return sums / counts.view(-1, *[1] * (values.ndim - 1))


def contribution(examined: Examined) -> Tensor:
    """Mean gate of each expert on each class, (E, C); columns sum to 1."""
    classes = examined.expert_logits.shape[2]
    return per_class(examined.gates, examined.labels, classes).T


def routing_share(examined: Examined) -> Tensor:
    """Share of each class's images on which an expert has the largest gate, (E, C)."""
    classes = examined.expert_logits.shape[2]
    largest = torch.nn.functional.one_hot(examined.gates.argmax(1), examined.gates.shape[1])
    return per_class(largest, examined.labels, classes).T


def forced_accuracy(examined: Examined, owners: Tensor | None = None) -> Tensor:
    """Accuracy on each class with all images sent to one expert, (E, C).

    Args:
        examined: the parts of the logits.
        owners: (C, E) of 0 and 1; if given, an expert chooses among its own classes alone, and
            what it does not own is nan.
    """
    classes = examined.expert_logits.shape[2]
    logits = examined.expert_logits + (examined.by_pass + examined.bias)[:, None]
    if owners is not None:
        logits = logits.masked_fill(owners.T[None] == 0, -torch.inf)
    hits = logits.argmax(2) == examined.labels[:, None]  # (N, E)
    found = per_class(hits, examined.labels, classes).T
    return found if owners is None else found.masked_fill(owners.T == 0, torch.nan)


def knock_out(examined: Examined) -> Tensor:
    """Accuracy on each class less that without an expert, (E, C).

    The gates of the others are scaled up to sum 1; where they are all 0 they become equal.
    """
    classes, experts = examined.expert_logits.shape[2], examined.gates.shape[1]
    whole = examined.logits().argmax(1) == examined.labels
    rows = []
    for expert in range(experts):
        rest = examined.gates.clone()
        rest[:, expert] = 0
        total = rest.sum(1, keepdim=True)
        others = torch.ones(experts, dtype=rest.dtype)
        others[expert] = 0
        equal = others / max(experts - 1, 1)
        gates = torch.where(total > 1e-12, rest / total.clamp_min(1e-12), equal)
        without = examined.logits(gates).argmax(1) == examined.labels
        rows.append(per_class(whole.double() - without.double(), examined.labels, classes))
    return torch.stack(rows)


def attribution(examined: Examined) -> dict[str, Tensor]:
    """Split the logit of the true class exactly, as means over each class, (C, …).

    Returns:
        `experts` (C, E), `by_pass` (C,) and `bias` (C,), which sum to `logit` (C,).
    """
    labels, classes = examined.labels, examined.expert_logits.shape[2]
    rows = torch.arange(len(labels))
    experts = examined.gates * examined.expert_logits[rows, :, labels]
    by_pass = examined.by_pass[rows, labels]
    return {
        "experts": per_class(experts, labels, classes),
        "by_pass": per_class(by_pass, labels, classes),
        "bias": examined.bias.double(),
        "logit": per_class(examined.logits()[rows, labels], labels, classes),
    }


def specialisation(examined: Examined) -> float:
    """Mutual information of expert and class in nats: 0 without any division of labour."""
    contributions = contribution(examined)
    shares = torch.bincount(examined.labels, minlength=contributions.shape[1]).double()
    present = shares > 0
    shares = shares[present] / shares.sum()
    contributions = contributions[:, present]
    within = torch.special.entr(contributions).sum(0) @ shares
    return float(torch.special.entr(contributions @ shares).sum() - within)


def owner_alignment(examined: Examined, owners: Tensor) -> float:
    """Mean over classes of the gates of a class's owners, (C, E); 1 if experts keep their own."""
    kept = (contribution(examined) * owners.T).sum(0)
    return float(kept[~kept.isnan()].mean())


def matching(examined: Examined, owners: Tensor) -> list[int]:
    """Return for each expert the specialist whose classes it sees most, each taken once.

    Raises:
        ValueError: if there are not as many experts as specialists.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    seen = contribution(examined).nan_to_num(0.0) @ owners.double()  # (E, specialists)
    if seen.shape[0] != seen.shape[1]:
        raise ValueError(
            f"{seen.shape[0]} experts cannot be matched to {seen.shape[1]} specialists"
        )
    _, columns = linear_sum_assignment(seen.numpy(), maximize=True)
    return [int(column) for column in columns]


def temperature_sweep(examined: Examined, temperatures: Sequence[float]) -> list[float]:
    """Accuracy with the gates at each temperature."""
    found = []
    for temperature in temperatures:
        gates = softmax_of_largest(examined.gate_logits / temperature, examined.top_k)
        hits = examined.logits(gates).argmax(1) == examined.labels
        found.append(float(hits.double().mean()))
    return found


def ablations(examined: Examined, owners: Tensor) -> dict[str, float]:
    """Accuracy of parts of the model: what the by-pass, the experts and the gates do alone.

    `oracle_gate` shares the gates equally among the owners, (C, E), of the image's true class.
    """
    experts = examined.gates.shape[1]
    uniform = torch.full((experts,), 1 / experts, dtype=examined.gates.dtype)
    largest = torch.nn.functional.one_hot(examined.gates.argmax(1), experts)
    owned = owners[examined.labels].double()
    logits = {
        "full": examined.logits(),
        "gating_only": examined.by_pass + examined.bias,
        "experts_only": examined.logits() - examined.by_pass,
        "uniform_gate": examined.logits(uniform),
        "top1_gate": examined.logits(largest.to(examined.gates.dtype)),
        "oracle_gate": examined.logits((owned / owned.sum(1, keepdim=True)).to(examined.gates)),
    }
    return {
        name: float((values.argmax(1) == examined.labels).double().mean())
        for name, values in logits.items()
    }


def summary(examined: Examined, owners: Tensor) -> dict[str, Any]:
    """Collect everything as plain lists; what has no images is None."""
    document: dict[str, Any] = {
        "contribution": contribution(examined),
        "routing_share": routing_share(examined),
        "forced_accuracy": forced_accuracy(examined),
        "forced_accuracy_own": forced_accuracy(examined, owners),
        "knock_out": knock_out(examined),
        "attribution": attribution(examined),
        "specialisation": specialisation(examined),
        "owner_alignment": owner_alignment(examined, owners),
        "matching": matching(examined, owners),
        "usage": examined.gates.double().mean(0),
        "effective_experts": float((1 / examined.gates.double().square().sum(1)).mean()),
        "ablations": ablations(examined, owners),
    }
    return {name: _plain(value) for name, value in document.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
