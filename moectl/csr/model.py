"""The network: concepts seen on a feature grid, prototypes they resemble, and a linear verdict.

Letters: B batch, K concepts, M prototypes per concept, C classes, F backbone channels, D projection
width, H W feature grid. Prototype m of concept k is row k M + m. Whatever is compared or added up
is float32 at least, also under autocast.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moectl.common.precision import without_autocast
from moectl.csr.projector import Projector, build_projector

ConceptPool = Literal["max", "avg", "lse"]
LocalOrder = Literal["pool_first", "project_first"]
TaskInput = Literal["all", "max"]
Given = Literal["images", "features", "scores"]
Stage = Literal["concept", "prototype", "task"]
Need = Literal[
    "features",
    "cams",
    "concept_logits",
    "projected",
    "local_vectors",
    "prototypes",
    "similarity_maps",
    "similarity_scores",
    "logits",
]

_PARTS: Mapping[Stage, tuple[str, ...]] = {
    "concept": ("backbone", "concept_head"),
    "prototype": ("projector", "prototypes"),
    "task": ("task_head",),
}
_SHARPNESS = 5.0  # of the pool "lse"
_CHUNK = 2**24  # similarities held at a time where only their maxima are asked for
_LOGITS: tuple[Need, ...] = ("logits",)
_ABSENT: Any = None


class Backbone(nn.Module):
    """What turns images into features; see `backbones`."""

    def __init__(self, channels: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.channels = channels  # F
        self.arguments = arguments  # plain values from which one of the same form can be built
        self.loaded: Any = None  # which weights it started from; None for random ones

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Return H and W for images of a size, one side or height and width."""
        raise NotImplementedError


class Output(NamedTuple):
    """What was asked for; everything else is None."""

    features: Tensor = _ABSENT  # (B, F, H, W)
    cams: Tensor = _ABSENT  # (B, K, H, W) logits of a concept in each cell
    concept_logits: Tensor = _ABSENT  # (B, K)
    projected: Tensor = _ABSENT  # (B, D, H, W), not normalised
    local_vectors: Tensor = _ABSENT  # (B, K, D), a concept's looks in an image, not normalised
    prototypes: Tensor = _ABSENT  # (K, M, D), of length 1
    similarity_maps: Tensor = _ABSENT  # (B, K, M, H, W) in -1 to 1, weighed by importance
    similarity_scores: Tensor = _ABSENT  # (B, K, M), largest of each map
    logits: Tensor = _ABSENT  # (B, C)


class CSRNet(nn.Module):
    """Judge images by how much they resemble prototypes of named concepts.

    Args:
        backbone: gives the features.
        concepts: K.
        prototypes: M.
        classes: C.
        projection: D.
        concept_pool: what makes an image's concept logit of a map: its "max", its mean ("avg"), or
            the smooth maximum "lse", the log of the mean exponential at sharpness 5.
        projector: two convolutions of single cells ("mlp"), or three residual blocks ("ibn"),
            which learn batch statistics from whatever passes in training.
        local_order: "pool_first" averages a concept's features over its map, then projects;
            "project_first" projects the features of every cell, then averages.
        task_input: the task head sees the similarities to "all" prototypes, or the "max" of each
            concept.

    Raises:
        ValueError: if a number is below 1 or an option is unknown.

    Source: Huy et al. 2025.
    """

    prototypes: nn.Parameter  # (K M, D, 1, 1)
    task_mean: Tensor
    task_std: Tensor
    kept: Tensor
    """(K, M) bool: prototypes that have a say in the verdict."""

    def __init__(  # noqa: PLR0913
        self,
        backbone: Backbone,
        *,
        concepts: int,
        prototypes: int,
        classes: int,
        projection: int = 128,
        concept_pool: ConceptPool = "max",
        projector: Projector = "mlp",
        local_order: LocalOrder = "pool_first",
        task_input: TaskInput = "all",
    ) -> None:
        super().__init__()
        if min(concepts, prototypes, classes) < 1 or projection < 2:
            raise ValueError(
                f"concepts = {concepts}, prototypes = {prototypes}, classes = {classes}, projection"
                f" = {projection}: counts must be at least 1, the projection at least 2"
            )
        _check("concept_pool", concept_pool, ConceptPool)
        _check("projector", projector, Projector)
        _check("local_order", local_order, LocalOrder)
        _check("task_input", task_input, TaskInput)
        self.num_concepts, self.num_prototypes, self.num_classes = concepts, prototypes, classes
        self.concept_pool, self.local_order = concept_pool, local_order
        self.task_input = task_input
        self.stage: Stage | None = None
        self.backbone = backbone
        self.concept_head = nn.Conv2d(backbone.channels, concepts, 1)
        self.projector: nn.Module = build_projector(projector, backbone.channels, projection)
        # Of unit variance: small ones would all point the same way after a few updates.
        self.prototypes = nn.Parameter(torch.randn(concepts * prototypes, projection, 1, 1))
        inputs = concepts if task_input == "max" else concepts * prototypes
        self.task_head = nn.Linear(inputs, classes)
        self.register_buffer("task_mean", torch.zeros(inputs))
        self.register_buffer("task_std", torch.ones(inputs))
        self.register_buffer("kept", torch.ones(concepts, prototypes, dtype=torch.bool))

    @property
    def prototype_vectors(self) -> Tensor:
        """View of the parameter, (K, M, D), at the length that it has."""
        return self.prototypes.view(self.num_concepts, self.num_prototypes, -1)

    def forward(
        self,
        inputs: Tensor,
        importance: Tensor | None = None,
        needs: Collection[Need] = _LOGITS,
        *,
        given: Given = "images",
        detach_cams: bool = False,
    ) -> Output:
        """Look at images (B, 3, S, S), or go on from their features or scores.

        Args:
            inputs: images, features (B, F, H, W), or similarity scores (B, K, M).
            importance: see `from_features`.
            needs: see `from_features`; of scores, the logits alone.
            given: what the inputs are.
            detach_cams: see `from_features`.
        """
        if given == "scores":
            return Output(logits=self.classify(inputs))
        features = self.backbone(inputs) if given == "images" else inputs
        return self.from_features(features, importance, needs, detach_cams=detach_cams)

    def from_features(
        self,
        features: Tensor,
        importance: Tensor | None = None,
        needs: Collection[Need] = _LOGITS,
        *,
        detach_cams: bool = False,
    ) -> Output:
        """Compute what is asked for, and no more, from features.

        Args:
            features: (B, F, H, W) of the backbone.
            importance: (B, H, W) or (B, K, H, W) in 0 to 1, how much a cell may say. Below 1 it
                scales similarities, and negative ones become 0; at 1 they stay as they are.
            needs: fields of the output.
            detach_cams: local vectors send no gradient to the maps that weigh them.

        Raises:
            ValueError: if a need is unknown or the importance does not fit the features.
        """
        asked = set(needs)
        if not asked <= set(Output._fields):
            unknown = sorted(asked - set(Output._fields))
            raise ValueError(f"needs {unknown}: expected some of {', '.join(Output._fields)}")
        found = {"features": features}
        if asked & {"cams", "concept_logits", "local_vectors"}:
            found["cams"] = _wide(self.concept_head(features))
            found["concept_logits"] = self._pool(found["cams"])
        compares = bool(asked & {"similarity_maps", "similarity_scores", "logits"})
        pools = "local_vectors" in asked
        if compares or "projected" in asked or (pools and self.local_order == "project_first"):
            found["projected"] = _wide(self.projector(features))
        if pools:
            cams = found["cams"].detach() if detach_cams else found["cams"]
            found["local_vectors"] = self._local_vectors(cams, features, found.get("projected"))
        if compares or "prototypes" in asked:
            found["prototypes"] = _normalised(self.prototype_vectors, 2)
        if compares:
            found |= self._compare(found["projected"], found["prototypes"], importance, asked)
        return Output(**{name: value for name, value in found.items() if name in asked})

    def _pool(self, cams: Tensor) -> Tensor:
        cells = cams.flatten(2)
        match self.concept_pool:
            case "max":
                return cells.amax(2)
            case "avg":
                return cells.mean(2)
            case "lse":
                total = (_SHARPNESS * cells).logsumexp(2)
                return (total - math.log(cells.shape[2])) / _SHARPNESS

    def _local_vectors(self, cams: Tensor, features: Tensor, projected: Tensor | None) -> Tensor:
        """Average what each concept's map points at, (B, K, D)."""
        pooled = features if self.local_order == "pool_first" else projected
        assert pooled is not None
        with without_autocast(cams.device.type):
            pooled = _wide(pooled)
            weights = cam_weights(cams).to(pooled)
            vectors = torch.einsum("bkhw,bfhw->bfk", weights, pooled)
        if self.local_order == "pool_first":  # as a map of K x 1 cells
            vectors = _wide(self.projector(vectors[..., None])).squeeze(3)
        return vectors.mT

    def _compare(
        self, projected: Tensor, prototypes: Tensor, importance: Tensor | None, asked: set[Need]
    ) -> dict[str, Tensor]:
        """Return similarity scores, and maps or logits if they are asked for."""
        found: dict[str, Tensor] = {}
        unit = _normalised(projected, 1)
        size, _, height, width = unit.shape
        if importance is not None:
            importance = self._per_concept(importance, (size, height, width)).to(unit)
        step = self.num_concepts
        if "similarity_maps" not in asked:
            step = max(_CHUNK // (size * self.num_prototypes * height * width), 1)
        scores = []
        for first in range(0, self.num_concepts, step):
            part = slice(first, first + step)
            maps = similarity_maps(unit, prototypes[part])
            if importance is not None:
                maps = weigh(maps, importance[:, part])
            scores.append(maps.flatten(3).amax(3))
            if "similarity_maps" in asked:
                found["similarity_maps"] = maps
        found["similarity_scores"] = torch.cat(scores, 1)
        if "logits" in asked:
            found["logits"] = self.classify(found["similarity_scores"])
        return found

    def _per_concept(self, importance: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """Bring an importance to (B, K, H, W)."""
        wanted = (sizes[0], self.num_concepts, *sizes[1:])
        given = tuple(importance.shape)
        if given not in (sizes, wanted):
            raise ValueError(f"importance of shape {given}: expected {sizes} or {wanted}")
        return (importance[:, None] if given == sizes else importance).expand(wanted)

    def task_inputs(self, scores: Tensor) -> Tensor:
        """Map similarity scores (B, K, M) to what the task head weighs, (B, K M) or (B, K).

        Prototypes that are not kept contribute 0; of the highest scores they are never the highest.
        """
        if self.task_input == "max":
            inputs, said = scores.masked_fill(~self.kept, -1).amax(2), self.kept.any(1)
        else:
            inputs, said = scores.flatten(1), self.kept.flatten()
        return (_wide(inputs) - self.task_mean) / self.task_std * said

    def classify(self, scores: Tensor) -> Tensor:
        """Map similarity scores (B, K, M) to logits (B, C)."""
        with without_autocast(scores.device.type):
            return self.task_head(self.task_inputs(scores))

    @torch.no_grad()
    def set_task_norm(self, mean: Tensor, std: Tensor) -> None:
        """Let the task head see scores less their mean, divided by their standard deviation.

        Both have the shape of its inputs, (K M,), or (K,) with task_input "max". Scores that hardly
        vary are not divided.
        """
        self.task_mean.copy_(mean)
        self.task_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def stage_parameters(self, stage: Stage) -> dict[str, list[nn.Parameter]]:
        """Return what a stage trains, by part: backbone, concept_head, projector, and so on."""
        _check("stage", stage, Stage)
        parts = {name: getattr(self, name) for name in _PARTS[stage]}
        return {
            name: [part] if isinstance(part, nn.Parameter) else list(part.parameters())
            for name, part in parts.items()
        }

    def freeze(self, stage: Stage | None) -> None:
        """Hold still all that a stage does not train, batch statistics too; None frees everything.

        Frozen parts stay in evaluation mode through later calls of `train`.
        """
        parts = self.stage_parameters(stage) if stage else {}
        self.stage = stage
        self.requires_grad_(stage is None)
        for parameters in parts.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the parts that are not frozen."""
        super().train(mode)
        for stage, names in _PARTS.items():
            for part in (getattr(self, name) for name in names):
                if self.stage not in (None, stage) and isinstance(part, nn.Module):
                    part.eval()
        return self


def cam_weights(cams: Tensor) -> Tensor:
    """Softmax of each map (B, K, H, W) over its cells."""
    return _wide(cams).flatten(2).softmax(2).view(cams.shape)


def similarity_maps(unit: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every cell (B, D, H, W) with every prototype (K, M, D), both of length 1.

    Returns:
        (B, K, M, H, W) in -1 to 1.
    """
    with without_autocast(unit.device.type):
        maps = F.conv2d(unit, prototypes.to(unit).flatten(0, 1)[:, :, None, None])
    return maps.clamp(-1, 1).reshape(-1, *prototypes.shape[:2], *unit.shape[2:])


def weigh(maps: Tensor, importance: Tensor) -> Tensor:
    """Scale similarity maps (B, K, M, H, W) by the importance of their cells, (B, K, H, W).

    Where it is below 1 negative similarities become 0, else scaling would raise them; where it is 1
    nothing changes. Limit: a map that is negative throughout has a maximum of 0 with any importance
    below 1, and a lower one, its own, with 1 everywhere.

    Source: Huy et al. 2025, eqs. 12-13.
    """
    importance = importance[:, :, None]
    return torch.where(importance < 1, importance * maps.relu(), maps)


def _normalised(values: Tensor, dimension: int) -> Tensor:
    return F.normalize(_wide(values), dim=dimension)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check(name: str, value: object, options: Any) -> None:
    if value not in get_args(options):
        expected = ", ".join(repr(option) for option in get_args(options))
        raise ValueError(f"{name} = {value!r}: expected one of {expected}")
