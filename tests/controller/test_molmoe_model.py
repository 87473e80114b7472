import dataclasses

import pytest
import torch

from moectl.controller.molmoe_model import (
    Config,
    MolmoeModel,
    Projector,
    WindowAttention,
    config_from,
)
from moectl.controller.tiling import Geometry

CONFIG = Config(
    embeddings=30,
    outputs=26,
    hidden=16,
    blocks=2,
    experts=4,
    inner=5,
    crop=32,
    patch=4,
    image_hidden=12,
    image_inner=20,
    image_blocks=4,
    projector_inner=7,
    heads=2,
    top_k=3,
    image_heads=3,
    image_layers=(-2, -3),
    margin=2,
)


@pytest.fixture(scope="module")
def model() -> MolmoeModel:
    torch.manual_seed(0)
    network = MolmoeModel(CONFIG).eval().requires_grad_(False)
    network.padding.normal_()
    network.text.set_experts_implementation("eager")
    return network


def test_sizes_survive_json():
    assert config_from(CONFIG.plain()) == CONFIG
    assert CONFIG.plain()["model_type"] == "moectl_molmoe"
    assert CONFIG.geometry == Geometry(crop=32, patch=4, margin=2)
    assert CONFIG.feature == 24


def test_what_weights_do_not_show_is_molmoes_own():
    sizes = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(Config)[:12]}
    config = Config(**sizes)
    assert (config.heads, config.top_k, config.image_heads) == (16, 8, 16)
    assert (config.image_layers, config.rope_theta, config.margin) == ((-2, -9), 10000.0, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "hidden = 16: no multiple of heads"),
        ({"top_k": 5}, "top_k = 5: expected 1 to 4"),
        ({"image_layers": [-2, -9]}, "image_layers"),
        ({"margin": 3}, "margin = 3"),
        ({"colour": 1}, "colour is unknown"),
    ],
)
def test_sizes_that_no_network_has_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        config_from({**CONFIG.plain(), **change})


def test_a_missing_size_is_named():
    values = CONFIG.plain()
    del values["experts"]
    with pytest.raises(ValueError, match="experts is missing"):
        config_from(values)


def test_crops_are_looked_at_one_by_one(model):
    pixels = torch.randn(3, 3, 32, 32)
    said = model.look(pixels)
    assert said.shape == (3, 64, 24)
    torch.testing.assert_close(said[2:], model.look(pixels[2:]))


def test_two_layers_of_the_tower_are_put_side_by_side(model):
    pixels = torch.randn(1, 3, 32, 32)
    outputs = []
    handles = [
        layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
        for layer in model.tower.encoder.layers
    ]
    said = model.look(pixels)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(said, torch.cat([outputs[2], outputs[1]], -1)[:, 1:])


def test_the_last_layer_of_the_tower_does_not_matter(model):
    pixels = torch.randn(1, 3, 32, 32)
    before = model.look(pixels)
    weight = model.tower.encoder.layers[3].mlp.fc2.weight
    kept = weight.clone()
    weight.zero_()
    assert torch.equal(model.look(pixels), before)
    weight.copy_(kept)


def test_padding_is_marked_by_how_much_of_a_patch_it_is(model):
    """0 is padding altogether, above it and below 1 in part, and so are values below 0."""
    said, windows = torch.zeros(1, 64, 24), torch.arange(64).reshape(16, 4)
    cover = torch.tensor([1.0, 0.0, 0.3, -1.0]).repeat_interleave(16)[None]
    parts = model.project(said, cover, windows)
    pooled = [
        model.pool(vector.expand(1, 4, 24))
        for vector in (torch.zeros(24), model.padding[0], model.padding[1], model.padding[1])
    ]
    wanted = torch.cat([model.projector(one).expand(4, 16) for one in pooled])
    torch.testing.assert_close(parts, wanted)
    assert not torch.allclose(parts[4], parts[8])


def test_equal_patches_are_pooled_to_their_value():
    pool = WindowAttention(6, 4, 2)
    patch = torch.randn(3, 1, 6)
    torch.testing.assert_close(pool(patch.expand(3, 4, 6)), pool.out_proj(pool.v_proj(patch[:, 0])))


def test_pooling_does_not_care_for_the_order_of_a_window():
    pool, window = WindowAttention(6, 4, 2), torch.randn(3, 4, 6)
    torch.testing.assert_close(pool(window), pool(window.flip(1)))


def test_the_projector_is_gated_by_its_first_matrix():
    projector, pooled = Projector(4, 5, 3), torch.randn(2, 4)
    gate = torch.nn.functional.silu(projector.gate_proj(pooled))
    wanted = (gate * projector.up_proj(pooled)) @ projector.down_proj.weight.T
    torch.testing.assert_close(projector(pooled), wanted)


def test_vectors_are_added_to_the_embeddings_of_their_places(model):
    ids, places = torch.tensor([[3, 4, 4, 5]]), torch.tensor([1, 2])
    vectors = torch.randn(2, 16)
    table = model.text.embed_tokens.weight
    embedded = table[ids[0]].clone()
    embedded[1:3] += vectors
    wanted = model.text(inputs_embeds=embedded[None]).last_hidden_state
    torch.testing.assert_close(model(ids, vectors, places), wanted)
    zero = model(ids, torch.zeros(2, 16), places)
    assert torch.equal(zero, model(ids))
    assert not torch.allclose(zero, wanted)
