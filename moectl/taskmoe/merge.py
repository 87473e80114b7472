"""How specialists become the start of a mixture, and what that start is worth.

Letters: N images, E experts, C classes, R rows of a specialist's classifier, D features, H W
pixels. Every network sees images that are normalised in one and the same way.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moectl.taskmoe.align import (
    GROUPS,
    Correlation,
    State,
    average,
    evaluating,
    match,
    permute,
    same_entries,
)
from moectl.taskmoe.model import LAYERS, MergedMoE, Specialist

Method = Literal["align", "average", "first", "none"]
Norm = Literal["recalibrate", "average", "pooled", "reset"]

_BATCH = 128
_MATCHED = 512  # images on which channels are matched
_OWNED_BIAS, _FOREIGN_BIAS = 2.0, -3.0  # of heads that see all classes but know only some
_RISE = 4.0  # of a gate logit from the mean image to the owner's, before the temperature


@dataclass(frozen=True)
class Report:
    """What a merge did."""

    correlations: list[dict[str, Correlation]]
    """Per specialist after the first and group of channels; empty unless aligned."""
    distances: dict[str, list[float]]
    """Per shared layer and specialist: distance of its weights to their mean, relative to that."""
    parameters: dict[str, int]
    """Per part of the mixture, in all, and of the specialists together."""


def recalibrate(model: MergedMoE, batches: Iterable[Tensor]) -> None:
    """Measure the running statistics of the shared layers anew, in one pass.

    Every batch counts the same, so they should be alike in size and in classes.

    Args:
        model: changed in place; modes and momenta are as before afterwards.
        batches: (B, 3, H, W) each.

    Raises:
        ValueError: if there are no batches.

    Source: Jordan et al. 2023.
    """
    _measure(model.feature_extractor, model.feature_extractor, batches)


@torch.no_grad()
def _measure(part: nn.Module, network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the batch norms of a part while batches go through the network around it."""
    norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    count = 0
    with evaluating(network):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for batch in batches:
            network(batch)
            count += 1
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("batch norm is measured on images, and none were given")


@torch.no_grad()
def assemble(  # noqa: PLR0913
    model: MergedMoE,
    specialists: Sequence[Specialist],
    owners: Tensor,
    rows: Sequence[Sequence[int]],
    *,
    method: Method = "average",
    bn: Norm = "recalibrate",
    classifier_init: Literal["assembled", "random"] = "assembled",
    gate_init: Literal["uniform", "prototype"] = "uniform",
    images: Tensor | None = None,
    labels: Tensor | None = None,
) -> Report:
    """Fill a mixture with its specialists; what no specialist knows stays as initialised.

    Args:
        model: changed in place.
        specialists: one per expert, in the experts' order.
        owners: (C, E), 1 where a specialist knows a class.
        rows: per specialist, the class of each row of its classifier.
        method: shared layers averaged, averaged with their channels matched, the first
            specialist's, or as initialised.
        bn: running statistics of the shared layers, see `average` and `recalibrate`.
        classifier_init: rows from the owners, or as initialised.
        gate_init: the gate as initialised, or pointing at the classes of each owner.
        images: (N, 3, H, W) of the union, for `align`, `recalibrate` and `prototype`.
        labels: (N,) of the images, for `prototype`.

    Raises:
        ValueError: if the arguments do not fit each other, or the images are missing.

    Source: Ainsworth et al. 2023; Stoica et al. 2024.
    """
    _check(model, specialists, owners, rows)
    needed = method == "align" or bn == "recalibrate" or gate_init == "prototype"
    if needed and images is None:
        raise ValueError("images are needed to align, to recalibrate and for gate prototypes")
    layers = [*LAYERS]
    depth = layers.index(model.shared_until) + 1
    shared = layers[:depth]
    states: list[State] = [specialist.state_dict() for specialist in specialists]
    correlations: list[dict[str, Correlation]] = []
    if method == "align" and images is not None:
        states, correlations = _align(specialists, shared, images)
    parts = [_layers(state, shared) for state in states]
    if method != "none":
        chosen = parts[:1] if method == "first" else parts
        merged = average(chosen, "average" if bn == "recalibrate" else bn)
        _load(model.feature_extractor, merged, "feature_extractor")
    for number, (expert, state) in enumerate(zip(model.experts, states, strict=True)):
        own = _layers(state, [*layers[depth:], "conv3"])
        _load(expert, own, f"experts.{number}")
    if classifier_init == "assembled":
        _assemble_classifier(model, states, owners, rows)
    if bn == "recalibrate" and images is not None:
        recalibrate(model, _alike(images))
        if model.shared_until != layers[-1]:  # the experts' own trunks follow a merged layer
            _measure(model.experts, model, _alike(images))
    if gate_init == "prototype":
        _point_gates(model, images, labels, owners)
    return Report(correlations, _distances(parts, shared), _parameters(model, specialists))


def _check(
    model: MergedMoE,
    specialists: Sequence[Specialist],
    owners: Tensor,
    rows: Sequence[Sequence[int]],
) -> None:
    experts = len(model.experts)
    if not len(specialists) == len(rows) == owners.shape[1] == experts:
        raise ValueError(
            f"{len(specialists)} specialists, {len(rows)} lists of rows and owners of shape"
            f" {tuple(owners.shape)} for {experts} experts"
        )
    for number, (specialist, classes) in enumerate(zip(specialists, rows, strict=True)):
        known = owners[:, number].nonzero().flatten().tolist()
        given = specialist.state_dict()["classifier.3.weight"].shape[0]
        if sorted(classes) != known or len(classes) != given:
            raise ValueError(
                f"specialist {number + 1}: classifier.3 has {given} rows, listed as classes"
                f" {list(classes)}, and owners gives it {known}"
            )
    if not owners.any(1).all():
        raise ValueError("owners leaves classes without any specialist")
    same_entries([_without_classifier(specialist) for specialist in specialists])


def _without_classifier(specialist: Specialist) -> State:
    return _layers(specialist.state_dict(), (*LAYERS, "conv3"))


def _layers(state: Mapping[str, Tensor], layers: Iterable[str]) -> State:
    """Return the entries of some layers, in the state's order."""
    prefixes = tuple(f"{layer}." for layer in layers)
    return {key: value for key, value in state.items() if key.startswith(prefixes)}


def _align(
    specialists: Sequence[Specialist], shared: Sequence[str], images: Tensor
) -> tuple[list[State], list[dict[str, Correlation]]]:
    """Bring the shared channels of all specialists into the order of the first's."""
    groups = [name for name, group in GROUPS.items() if group.layer.split(".")[0] in shared]
    sample = images[:: -(-len(images) // _MATCHED)]  # images may be sorted by class
    states, correlations = [specialists[0].state_dict()], []
    for specialist in specialists[1:]:
        permutations, gains = match(specialists[0], specialist, sample, groups)
        states.append(permute(specialist.state_dict(), permutations))
        correlations.append(gains)
    return states, correlations


def _load(module: nn.Module, entries: State, name: str) -> None:
    """Copy a specialist's entries into a module that has the same layers in the same order."""
    own = module.state_dict()
    for (key, value), (source, given) in zip(own.items(), entries.items(), strict=True):
        if value.shape != given.shape:
            raise ValueError(
                f"{source} of shape {tuple(given.shape)} does not fit {name}.{key} of shape"
                f" {tuple(value.shape)}"
            )
        value.copy_(given)


def _alike(images: Tensor) -> list[Tensor]:
    """Split images, sorted by class or not, into batches that are alike."""
    count = -(-len(images) // _BATCH)
    return [images[start::count] for start in range(count)]


def _assemble_classifier(
    model: MergedMoE, states: Sequence[State], owners: Tensor, rows: Sequence[Sequence[int]]
) -> None:
    weights, biases = (
        [state[f"classifier.3.{name}"] for state in states] for name in ("weight", "bias")
    )
    if model.combine == "logits":
        heads: Iterable[Any] = model.heads
        for head, weight, bias, classes in zip(heads, weights, biases, rows, strict=True):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias, _FOREIGN_BIAS)
            head.weight[list(classes)] = weight
            head.bias[list(classes)] = bias + _OWNED_BIAS
        return
    features = weights[0].shape[1]
    classifier = model.classifier
    classifier.weight.zero_()
    classifier.bias.zero_()
    for weight, bias, classes in zip(weights, biases, rows, strict=True):
        classifier.weight[list(classes), :features] += weight
        classifier.bias[list(classes)] += bias
    count = owners.sum(1).to(classifier.weight)
    classifier.weight.div_(count[:, None])
    classifier.bias.div_(count)


def _point_gates(
    model: MergedMoE, images: Tensor | None, labels: Tensor | None, owners: Tensor
) -> None:
    """Turn the last layer of the gate into a search for the nearest of the owners' means.

    Up to a common offset and factor, a gate logit is minus half the squared distance between the
    layer's input and the mean input of the expert's classes.
    """
    if images is None or labels is None:
        raise ValueError("gate prototypes are means over the classes: images and labels are needed")
    batches = _alike(images)
    _measure(model.gating_network, model, batches)
    last: Any = model.gating_network.gate_net[-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with evaluating(model):
        for batch in batches:
            model(batch)
    hook.remove()
    inputs = torch.cat(seen)
    known = owners.to(inputs)[torch.cat(_alike(labels)).to(owners.device)]  # (N, E)
    if not known.any(0).all():
        raise ValueError("gate prototypes need images of every specialist")
    overall = inputs.mean(0)
    means = known.T @ inputs / known.sum(0)[:, None]
    rises = means - overall
    scale = _RISE / rises.square().sum(1).mean().clamp(min=1e-12)
    last.weight.copy_(scale * rises)
    last.bias.copy_(-scale * (rises * (means + overall) / 2).sum(1))


def _distances(parts: Sequence[State], shared: Sequence[str]) -> dict[str, list[float]]:
    mean = average(parts)
    found = {}
    for layer in shared:
        keys = [
            key for key in _layers(mean, [layer]) if mean[key].ndim > 1
        ]  # kernels; those of batch norm are on another scale
        center = torch.cat([mean[key].flatten() for key in keys])
        each = [torch.cat([part[key].flatten() for key in keys]) for part in parts]
        found[layer] = [float((own - center).norm() / center.norm()) for own in each]
    return found


def _parameters(model: MergedMoE, specialists: Sequence[Specialist]) -> dict[str, int]:
    table = {name: _count(child) for name, child in model.named_children()}
    return {**table, "total": _count(model), "specialists": sum(map(_count, specialists))}


def _count(module: nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


@torch.no_grad()
def step_zero(
    model: MergedMoE, images: Tensor | Iterable[Tensor], labels: Tensor, owners: Tensor
) -> dict[str, Any]:
    """Measure a mixture before any training; to be read beside one with random weights.

    Args:
        model: evaluated as it is; its mode is as before afterwards.
        images: (N, 3, H, W), or batches of them.
        labels: (N,) in the order of the images.
        owners: (C, E).

    Returns:
        `union_accuracy` over all classes and, per specialist, `own_accuracy`: the best of its own
        classes with all gates on its expert, over the images of these classes; None without any.
        Chance stands beside both.
    """
    batches = torch.split(images, _BATCH) if isinstance(images, Tensor) else images
    experts = owners.shape[1]
    hits, own_hits, own_images, start = 0, [0] * experts, [0] * experts, 0
    with evaluating(model):
        for batch in batches:
            truth = labels[start : start + len(batch)].to(batch.device)
            start += len(batch)
            hits += int((model(batch).logits.argmax(1) == truth).sum())
            for expert in range(experts):
                known = owners[:, expert].bool().to(batch.device)
                chosen = known[truth]
                own_images[expert] += int(chosen.sum())
                own_hits[expert] += _own_hits(model, batch[chosen], truth[chosen], known, expert)
    return {
        "images": start,
        "union_accuracy": hits / start,
        "union_chance": 1 / len(owners),
        "own_accuracy": [
            own / count if count else None for own, count in zip(own_hits, own_images, strict=True)
        ],
        "own_chance": (1 / owners.sum(0)).tolist(),
    }


def _own_hits(model: MergedMoE, images: Tensor, labels: Tensor, known: Tensor, expert: int) -> int:
    if not len(images):
        return 0
    gates = one_hot(torch.full_like(labels, expert), len(model.experts)).to(images)
    logits = model(images, gates=gates).logits.masked_fill(~known, -torch.inf)
    return int((logits.argmax(1) == labels).sum())
