"""Figures that papers report, for comparison with a run."""

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

REJECTION_PAPER = "Narasimhan et al. 2024"


@dataclass(frozen=True)
class PublishedArea:
    """Mean normalised areas under errors over rejection rates, with half-widths of intervals.

    The intervals are those of 95 % over 5 trials.
    """

    balanced: float
    balanced_half_width: float
    worst: float
    worst_half_width: float


# Groups: tail classes have at most 20 training images. Source: Narasimhan et al. 2024.
PUBLISHED_AREAS: dict[tuple[str, float], dict[str, PublishedArea]] = {
    ("cifar100", 100): {
        "Chow": PublishedArea(0.509, 0.002, 0.883, 0.007),
        "CSS": PublishedArea(0.483, 0.002, 0.785, 0.003),
        "Chow [BCE]": PublishedArea(0.359, 0.017, 0.570, 0.030),
        "Chow [DRO]": PublishedArea(0.325, 0.004, 0.333, 0.003),
        "Plug-in [Balanced]": PublishedArea(0.292, 0.006, 0.416, 0.015),
        "Plug-in [Worst]": PublishedArea(0.287, 0.008, 0.321, 0.018),
    },
    ("imagenet_lt", 0): {
        "Chow": PublishedArea(0.409, 0.003, 0.685, 0.007),
        "CSS": PublishedArea(0.526, 0.002, 0.784, 0.003),
        "Chow [BCE]": PublishedArea(0.213, 0.001, 0.274, 0.003),
        "Chow [DRO]": PublishedArea(0.197, 0.001, 0.211, 0.004),
        "Plug-in [Balanced]": PublishedArea(0.205, 0.001, 0.248, 0.001),
        "Plug-in [Worst]": PublishedArea(0.198, 0.001, 0.213, 0.004),
    },
    ("inat18", 0): {
        "Chow": PublishedArea(0.131, 0.004, 0.162, 0.004),
        "CSS": PublishedArea(0.200, 0.005, 0.246, 0.006),
        "Chow [BCE]": PublishedArea(0.111, 0.003, 0.114, 0.003),
        "Chow [DRO]": PublishedArea(0.110, 0.001, 0.117, 0.002),
        "Plug-in [Balanced]": PublishedArea(0.108, 0.003, 0.118, 0.004),
        "Plug-in [Worst]": PublishedArea(0.108, 0.001, 0.113, 0.002),
    },
}
_CLASSIFIERS = {
    "cifar100": "a single ResNet-32 trained by cross-entropy for 256 epochs",
    "imagenet_lt": "a single network trained by cross-entropy for 200 epochs",
    "inat18": "a single network trained by cross-entropy",
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


def published_areas(settings: Mapping[str, Any]) -> Mapping[str, PublishedArea]:
    """Return method to published areas for the data of this run; empty if there are none."""
    return PUBLISHED_AREAS.get(configuration(settings)[:2], {})


def area_departures(settings: Mapping[str, Any]) -> str:
    """Say what the published areas stand for, and in what they differ from a run's."""
    classifier = _CLASSIFIERS[configuration(settings)[0]]
    return (
        f"Published: {REJECTION_PAPER}, mean ± half-width of the 95 percent interval over 5 trials."
        f" The classifier of Chow and the plug-in rules there is {classifier}, not an ensemble of"
        " balanced experts; BCE and DRO stand for other training losses, CSS for cost-sensitive"
        " softmax. Rules were fitted on 20 percent of the test images, re-weighted to the training"
        " prior; classes with at most 20 training images are the tail."
    )
