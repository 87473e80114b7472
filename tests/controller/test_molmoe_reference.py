"""The whole way, from the original's tensors to logits, against loops in NumPy."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.controller.molmoe import Molmoe, open_molmoe
from moectl.controller.molmoe_convert import convert
from moectl.controller.plans import Plan

_SPEC = importlib.util.spec_from_file_location(
    "molmo_reference", Path(__file__).with_name("molmo_reference.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
reference: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["molmo_reference"] = reference
_SPEC.loader.exec_module(reference)

SIZES = reference.Sizes()
WEIGHTS = SIZES.weights()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Molmoe:
    folder = tmp_path_factory.mktemp("molmoe")
    reference.write_original(folder / "original", SIZES, WEIGHTS)
    convert(folder / "original", folder / "converted")
    return open_molmoe(folder / "converted", torch.device("cpu"), torch.float64)


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def seen(inputs: Any) -> dict[int, np.ndarray]:
    """What the reference adds to the embeddings, by place, for what `prepare` made."""
    tensors = inputs.tensors
    pixels = tensors["pixels"].permute(0, 2, 3, 1).numpy()
    cells = reference.image_vectors(WEIGHTS, SIZES, pixels, tensors["cover"].numpy())
    side = SIZES.crop // SIZES.patch
    image = {}
    for place, window in zip(tensors["places"].tolist(), tensors["windows"].tolist(), strict=True):
        crop, patch = divmod(window[0], side * side)
        row, column = divmod(patch, side)
        image[place] = cells[crop, row // 2 * (side // 2) + column // 2]
    return image


def close(found: torch.Tensor, wanted: np.ndarray) -> None:
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "tier"), [((90, 31), "low"), ((40, 33), "medium")], ids=["wide", "padded"]
)
def test_logits_of_image_and_question_are_those_of_the_original(
    network: Molmoe, size: tuple[int, int], tier: str
) -> None:
    inputs = network.prepare(picture(*size), "how many?", "text_vqa", tier)
    assert (inputs.tensors["cover"] < 1).any()
    ids, vision = inputs.tensors["ids"], network.encode(inputs)
    wanted = reference.logits(WEIGHTS, SIZES, ids[0].tolist(), seen(inputs), [4] * 4)
    assert wanted[-1].std() > 0.5
    close(network.prefill(inputs, vision)[0], wanted[-1])
    hidden = network.model(ids, vision, inputs.tensors["places"])
    close(network.model.head(hidden)[0].detach(), wanted)


@pytest.mark.parametrize(
    "top_k", [(4, 2, 3, 4), (4, 0, 3, 2), (4, 4, 4, 0)], ids=["experts", "both", "skip"]
)
def test_a_plan_computes_what_the_original_would_with_fewer_experts_and_blocks(
    network: Molmoe, top_k: tuple[int, ...]
) -> None:
    inputs = network.prepare(picture(50, 20), "and here?", "vqa", "low")
    plan = Plan("low", tuple(map(bool, top_k)), tuple(one or 4 for one in top_k))
    with network.apply(plan):
        logits, state = network.prefill(inputs, network.encode(inputs))
        later = [network.step(token, state) for token in (7, 30)]
    ids, image = inputs.tensors["ids"][0].tolist(), seen(inputs)
    wanted = reference.logits(WEIGHTS, SIZES, [*ids, 7, 30], image, list(top_k))
    close(torch.stack([logits, *later]), wanted[-3:])
    full = reference.logits(WEIGHTS, SIZES, ids, image, [4] * 4)
    assert abs(full[-1] - wanted[-3]).max() > 0.05


def test_the_view_of_the_whole_has_the_features_of_the_original(network: Molmoe) -> None:
    image = picture(20, 50)
    view = network.look(image)
    pixels = network.prepare(image, "", "vqa", "low").tensors["pixels"][0]
    wanted = reference.crop_features(WEIGHTS, SIZES, pixels.permute(1, 2, 0).double().numpy())
    close(view.hidden[0], wanted)
    close(view.feature, wanted.mean(axis=0))


def test_a_crop_of_minus_one_says_nothing(network: Molmoe) -> None:
    pixels = torch.full((2, 3, 32, 32), -1.0)
    pixels[1, 0, 5, 5] = 0.5
    said = network.model.look(pixels).detach()
    assert not said[0].any()
    wanted = reference.crop_features(WEIGHTS, SIZES, pixels[1].permute(1, 2, 0).double().numpy())
    close(said[1], wanted)
