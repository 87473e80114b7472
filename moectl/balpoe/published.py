"""Figures that the paper reports, for comparison with a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAPER = "Sanchez Aimar et al. 2023"

Key = tuple[str, float, str, str]
"""Data set, imbalance ratio or 0, backbone, recipe: standard, strong (augmentation) or long."""


@dataclass(frozen=True)
class Published:
    """What the paper reports for one configuration, as fractions."""

    accuracy: float
    ece: float | None = None
    mce: float | None = None
    quoted: bool = False
    """Known only as a later work quotes it."""


# Balanced test sets, 3 experts. Source: Sanchez Aimar et al. 2023.
PUBLISHED: dict[Key, Published] = {
    ("cifar100", 10, "resnet32", "standard"): Published(0.648, quoted=True),
    ("cifar100", 50, "resnet32", "standard"): Published(0.563, quoted=True),
    ("cifar100", 100, "resnet32", "standard"): Published(0.520, ece=0.049, mce=0.113),
    ("cifar100", 10, "resnet32", "strong"): Published(0.663),
    ("cifar100", 50, "resnet32", "strong"): Published(0.587),
    ("cifar100", 100, "resnet32", "strong"): Published(0.547),
    ("cifar100", 10, "resnet32", "long"): Published(0.681),
    ("cifar100", 50, "resnet32", "long"): Published(0.601),
    ("cifar100", 100, "resnet32", "long"): Published(0.559),
    ("cifar10", 100, "resnet32", "long"): Published(0.868, quoted=True),
    ("imagenet_lt", 0, "resnext50", "standard"): Published(0.598),
    ("imagenet_lt", 0, "resnet50", "strong"): Published(0.597),
    ("imagenet_lt", 0, "resnext50", "strong"): Published(0.616),
    ("imagenet_lt", 0, "resnet50", "long"): Published(0.608),
    ("imagenet_lt", 0, "resnext50", "long"): Published(0.620),
    ("inat18", 0, "resnet50", "standard"): Published(0.750, quoted=True),
    ("inat18", 0, "resnet50", "strong"): Published(0.735),
    ("inat18", 0, "resnet50", "long"): Published(0.769),
}
EXPERTS = 3
EPOCHS = {"cifar10": 200, "cifar100": 200, "imagenet_lt": 180, "inat18": 100}
LONG_EPOCHS = 400

# Accuracy with an unknown and with a known test prior. Source: Sanchez Aimar et al. 2023.
PUBLISHED_SHIFTS: dict[Key, dict[tuple[str, float], tuple[float, float]]] = {
    ("cifar100", 100, "resnet32", "standard"): {
        ("forward", 50): (0.651, 0.703),
        ("forward", 5): (0.548, 0.593),
        ("uniform", 1): (0.520, 0.520),
        ("backward", 5): (0.446, 0.469),
        ("backward", 50): (0.361, 0.461),
    },
    ("imagenet_lt", 0, "resnext50", "standard"): {
        ("forward", 50): (0.676, 0.725),
        ("forward", 5): (0.633, 0.646),
        ("uniform", 1): (0.598, 0.598),
        ("backward", 5): (0.557, 0.572),
        ("backward", 50): (0.508, 0.569),
    },
}


def configuration(settings: Mapping[str, Any]) -> Key:
    """Return the key of this run in the tables of published figures."""
    dataset = settings.get("data.dataset", "")
    ratio = settings.get("data.imbalance_ratio", 0) if dataset.startswith("cifar") else 0
    recipe = "standard" if settings.get("data.augment") == "standard" else "strong"
    if recipe == "strong" and settings.get("train.epochs", 0) >= LONG_EPOCHS:
        recipe = "long"
    usual = settings.get("data.profile") == "exp"
    return (dataset if usual else "", ratio, settings.get("model.arch", ""), recipe)


def departures(settings: Mapping[str, Any], published: Published) -> str:
    """Say what the published figure stands for, and in what this run is different."""
    dataset, _, _, recipe = configuration(settings)
    epochs = LONG_EPOCHS if recipe == "long" else EPOCHS[dataset]
    text = f"The published figure is for {EXPERTS} experts and {epochs} epochs"
    text += ", as quoted by later work" if published.quoted else ""
    mine = (settings.get("model.experts"), settings.get("train.epochs"))
    if mine != (EXPERTS, epochs):
        text += f"; this run has {mine[0]} experts and {mine[1]} epochs"
    whole = "on all test images of the data set, this run's on those not used for validation"
    return f"{text}. It is measured {whole}."
