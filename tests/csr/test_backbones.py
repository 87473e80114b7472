import argparse
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moectl.csr.backbones import build_backbone, rebuild_backbone
from moectl.csr.convert import VitShape
from moectl.csr.model import Backbone
from moectl.engine.errors import UserError

PARAMETERS = {
    "medmae": 85_798_656,
    "vit": 85_798_656,
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "densenet121": 6_953_856,
    "convnext_tiny": 27_818_592,
}
CHANNELS = {
    "medmae": 768,
    "vit": 768,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "densenet121": 1024,
    "convnext_tiny": 768,
    "tiny": 64,
}
SMALL = {"kind": "medmae", **VitShape(64, 2, 128, 16, 32, 1e-12)._asdict()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small() -> Backbone:
    """A vision transformer with position embeddings that are not near zero."""
    torch.manual_seed(0)
    backbone = rebuild_backbone(SMALL).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def pictures(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# Form


@pytest.mark.parametrize("kind", CHANNELS)
def test_sizes_are_the_published_ones(kind):
    with torch.device("meta"):
        backbone = build_backbone(kind)
        assert backbone.channels == CHANNELS[kind]
        assert kind == "tiny" or count(backbone) == PARAMETERS[kind]
        side = {"medmae": 14, "vit": 14, "tiny": 28}.get(kind, 7)
        assert backbone.grid(224) == (side, side)
        for size in ((224, 224), (96, 160)):
            features = backbone(torch.zeros(2, 3, *size))
            assert features.shape == (2, backbone.channels, *backbone.grid(size))
    assert backbone.loaded is None


@pytest.mark.parametrize("kind", ["resnet18", "densenet121", "convnext_tiny", "tiny"])
@pytest.mark.parametrize("size", [(65, 97), (100, 127), (64, 130)])
def test_odd_sizes_give_the_grid_that_is_told(kind, size):
    with torch.device("meta"):
        backbone = rebuild_backbone({"kind": kind})
        assert backbone(torch.zeros(2, 3, *size)).shape[2:] == backbone.grid(size)


def test_a_small_vision_transformer_of_medical_images_has_its_published_size():
    with torch.device("meta"):
        shape = VitShape(width=384, hidden=4 * 384)
        assert count(rebuild_backbone({"kind": "medmae", **shape._asdict()})) == 21_665_664


def test_arguments_rebuild_the_same_form():
    for backbone in (small(), build_backbone("tiny")):
        again = rebuild_backbone(backbone.arguments)
        assert again.arguments == backbone.arguments
        again.load_state_dict(backbone.state_dict())
        assert torch.equal(again.eval()(pictures()), backbone.eval()(pictures()))


def test_there_is_no_pooler():
    assert not [name for name in small().state_dict() if "pooler" in name]


# Vision transformers


def test_features_are_the_patch_tokens_row_by_row():
    backbone: Any = small()
    with torch.no_grad():
        tokens = backbone.vit(pictures()).last_hidden_state
        features = backbone(pictures())
    for row in range(2):
        for column in range(2):
            assert torch.equal(features[:, :, row, column], tokens[:, 1 + 2 * row + column])


def test_nothing_is_masked_at_random():
    backbone = small().train()
    assert torch.equal(backbone(pictures()), backbone(pictures()))


def test_rectangles_have_rows_and_columns_of_their_own():
    features = small()(pictures(32, 64))
    assert features.shape == (2, 64, 2, 4)
    turned = small()(pictures(32, 64).mT)
    assert turned.shape == (2, 64, 4, 2)


def test_position_embeddings_are_interpolated():
    backbone: Any = small()
    backbone.vit.embeddings.patch_embeddings.projection.weight.data.zero_()
    backbone.vit.embeddings.position_embeddings.data[:, 1:] = 0.3  # the same everywhere
    with torch.no_grad():
        features = backbone(pictures(64, 48))
    assert features.shape[2:] == (4, 3)
    torch.testing.assert_close(features, features[:, :, :1, :1].expand_as(features))


def test_parts_of_patches_are_refused():
    with pytest.raises(ValueError, match="40 x 32 pixels: expected multiples of 16"):
        small()(pictures(40, 32))


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("tiny", 8, "8 x 8 pixels have only 1 x 1 features"),
        ("resnet18", 32, "only 1 x 1 features"),
        ("medmae", 40, "expected multiples of 16"),
    ],
)
def test_image_sizes_without_a_grid_are_refused(kind, size, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_backbone(kind, image_size=size)


# Files


def encoder(backbone: Backbone) -> dict[str, Tensor]:
    return {name.removeprefix("vit."): value for name, value in backbone.state_dict().items()}


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_a_weights_file_is_read_whatever_its_format(file):
    given = small()
    state = {**encoder(given), "decoder_embed.weight": torch.zeros(2)}
    if file.endswith(".pth"):
        torch.save({"model": state, "epoch": 7}, file)
    else:
        save_file(state, file)
    backbone = build_backbone("medmae", file)
    assert torch.equal(backbone(pictures()), given(pictures()))
    assert backbone.arguments == SMALL
    assert backbone.loaded.left_out == ("decoder_embed.weight",)
    assert backbone.loaded.percent == 100
    text = "38 of 38 tensors of the backbone (100 %), 1 others left out"
    assert str(backbone.loaded) == f"{file}: {text}"


@pytest.mark.parametrize("name", ["layers.1.mlp.fc2.bias", "layernorm.weight"])
def test_a_single_missing_tensor_is_an_error(name):
    state = encoder(small())
    del state[name]
    torch.save(state, "weights.pth")
    message = f"^weights.pth: lacks vit.{name}; only 37 of 38 tensors"
    with pytest.raises(UserError, match=message):
        build_backbone("medmae", "weights.pth")


def test_tensors_of_another_network_are_an_error():
    torch.save({**encoder(small()), "layers.0.scale": torch.ones(1)}, "weights.pth")
    with pytest.raises(UserError, match=r"has vit.layers.0.scale, which is no part"):
        build_backbone("medmae", "weights.pth")


def test_tensors_of_another_shape_are_an_error():
    state = {**encoder(small()), "layernorm.bias": torch.ones(65)}
    torch.save(state, "weights.pth")
    with pytest.raises(UserError, match=r"layernorm.bias has shape \(65,\), expected \(64,\)"):
        build_backbone("medmae", "weights.pth")


def test_weights_of_another_kind_are_an_error():
    torch.save(build_backbone("tiny").state_dict(), "tiny.pth")
    with pytest.raises(UserError, match=r"^tiny\.pth: lacks embeddings.patch_embeddings"):
        build_backbone("medmae", "tiny.pth")
    with pytest.raises(UserError, match=r"lacks features\.conv1\.weight; only 0 of"):
        build_backbone("resnet18", "tiny.pth")


@pytest.mark.parametrize("prefix", ["features.", "backbone.features.", "module.backbone.features."])
def test_weights_of_convolutions_are_read(prefix):
    given = build_backbone("tiny")
    state = {f"{prefix}{name}": value for name, value in given.features.state_dict().items()}  # type: ignore[union-attr]
    if "backbone" in prefix:
        state[prefix.replace("backbone.features.", "concept_head.weight")] = torch.zeros(1)
    # Files of old versions of torch lack the counters.
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    torch.save(state, "weights.pth")
    backbone = build_backbone("tiny", "weights.pth")
    assert torch.equal(backbone.eval()(pictures()), given.eval()(pictures()))
    assert backbone.loaded[1:] == (20, 20, ())


def test_files_with_more_than_tensors_need_trust():
    given = small()
    torch.save({"model": encoder(given), "args": argparse.Namespace(lr=1.0)}, "weights.pth")
    with pytest.raises(UserError, match="is not read for safety") as refusal:
        build_backbone("medmae", "weights.pth")
    assert "--allow-pickle" in refusal.value.hint
    backbone = build_backbone("medmae", "weights.pth", allow_pickle=True)
    assert torch.equal(backbone(pictures()), given(pictures()))


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_damaged_and_missing_files_are_named(file):
    with pytest.raises(UserError, match=f"{file}: cannot be read"):
        build_backbone("medmae", file)
    save = torch.save if file.endswith(".pth") else save_file
    save(encoder(small()), file)
    Path(file).write_bytes(Path(file).read_bytes()[:2000])
    with pytest.raises(UserError, match=f"{file}: not a"):
        build_backbone("medmae", file)


# Public weights


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("resnet50", "facebook/vit-mae-base", "does not apply to the backbone resnet50"),
        ("medmae", "facebook/vit-mae-large", "not asked for"),
        ("resnet101", "", "'resnet101': expected one of medmae, vit"),
    ],
)
def test_names_that_mean_nothing_are_refused(kind, name, message):
    with pytest.raises(UserError, match=message):
        build_backbone(kind, name)


def test_the_usual_name_alone_downloads_nothing(monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.cached_file", None)
    with torch.device("meta"):
        assert build_backbone("medmae", "facebook/vit-mae-base").loaded is None


def test_tiny_has_no_public_weights():
    with pytest.raises(UserError, match="there are no pretrained weights"):
        build_backbone("tiny", pretrained=True)


def test_a_folder_of_the_hub_is_read():
    given: Any = small()
    given.vit.save_pretrained("folder")
    backbone = build_backbone("vit", "folder", pretrained=True)
    assert torch.equal(backbone(pictures()), given(pictures()))
    assert backbone.loaded[:3] == ("folder", 38, 38)


def test_no_network_means_no_download_from_the_hub(monkeypatch):
    asked = []

    def missing(name: str, file: str, local_files_only: bool) -> str:
        asked.append((name, file, local_files_only))
        raise OSError("not there\nsecond line")

    monkeypatch.setattr("transformers.utils.hub.cached_file", missing)
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError, match=r"facebook/vit-mae-base: .*MOECTL_OFFLINE") as refusal:
        build_backbone("medmae", pretrained=True)
    assert "model.safetensors" in refusal.value.hint
    assert {local for *_, local in asked} == {True}
    monkeypatch.delenv("MOECTL_OFFLINE")
    with pytest.raises(UserError, match=r"could not be downloaded \(not there\)"):
        build_backbone("medmae", pretrained=True)
    assert ("facebook/vit-mae-base", "pytorch_model.bin", False) in asked


def test_no_network_means_no_download_from_torchvision(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth not found, and MOECTL") as refusal:
        build_backbone("resnet18", pretrained=True)
    assert "https://download.pytorch.org" in refusal.value.hint

    def unreachable(*_words: object, **_options: object) -> None:
        raise URLError("no route")

    monkeypatch.delenv("MOECTL_OFFLINE")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"could not be downloaded or read .*no route"):
        build_backbone("resnet18", pretrained=True)


def test_the_cache_of_torchvision_serves_without_network(monkeypatch, tmp_path):
    from torchvision.models import densenet121

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MOECTL_OFFLINE", "1")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    given = densenet121().eval()
    state = {}
    for name, value in given.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            if "denselayer" in name:  # as that file has them
                name = name.replace("norm1", "norm.1").replace("conv2", "conv.2")
            state[name] = value
    torch.save(state, folder / "densenet121-a639ec97.pth")
    backbone = build_backbone("densenet121", pretrained=True).eval()
    with torch.no_grad():
        ours = backbone(pictures(64, 64)).mean((2, 3))
        assert torch.allclose(given.classifier(ours), given(pictures(64, 64)), atol=1e-5)
    assert backbone.loaded.left_out == ("classifier.weight", "classifier.bias")
