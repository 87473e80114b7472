"""The size of a training, without doing it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl.csr.settings import CsrSettings
from moectl.csr.size import size


def settings(side: int = 64, **model: object) -> CsrSettings:
    data = {"dataset": "synthetic", "image_size": side, "synthetic_images": 100}
    return CsrSettings(data=data, model={"backbone_type": "tiny", **model})  # type: ignore[arg-type]


def test_the_numbers_are_those_of_the_formulas() -> None:
    found = size(settings(num_prototypes=7))
    assert [found[f"{name} images"] for name in ("training", "validation", "test")] == [90, 10, 33]
    assert found["parameters of stage prototype"] == (64 * 64 + 64) + (64 * 128 + 128) + 28 * 128
    assert found["parameters of stage task"] == (28 + 1) * 3
    assert found["updates per epoch"] == 6  # 90 in batches of 16; the last has 10
    assert found["updates"] == 6 * 30
    assert found["feature grid"] == "8x8"


def test_published_counts_of_the_usual_network() -> None:
    """For 14 concepts and 6 classes 697,984 and 426; here 4 and 3."""
    found = size(settings(224, backbone_type="medmae"))
    assert found["parameters of stage concept"] == 85_798_656 + 768 * 4 + 4
    assert found["parameters of stage prototype"] == 689_024 + 4 * 5 * 128
    assert found["parameters of stage task"] == (4 * 5 + 1) * 3


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_a_dry_run_shows_it_and_does_nothing(
    csr: Callable[..., tuple[int, str, str]], isolated: Path, option: str
) -> None:
    words = ("--dataset", "synthetic", "--backbone-type", "tiny", "--image-size", "64")
    code, out, _ = csr("train", *words, "--dry-run", option)
    assert code == 0
    if option == "--json":
        assert json.loads(out)["size"]["concepts"] == 4
    assert list(isolated.iterdir()) == []
