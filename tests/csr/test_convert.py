import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr.backbones import rebuild_backbone
from moectl.csr.convert import (
    VitShape,
    backbone_weights,
    convolution_weights,
    load_original,
    original_arguments,
    vit_weights,
)
from moectl.csr.model import CSRNet

WIDTH, LAYERS, PATCH, SIDE = 128, 2, 16, 32  # two heads
SHAPE = VitShape(WIDTH, LAYERS, 4 * WIDTH, PATCH, SIDE, 1e-6)


def timm_state(layers: int = LAYERS, width: int = WIDTH) -> dict[str, Tensor]:
    """Weights of an encoder as timm names them, none of them zero."""
    sizes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (SIDE // PATCH) ** 2, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for block in range(layers):
        for norm in ("norm1", "norm2"):
            sizes[f"blocks.{block}.{norm}.weight"] = sizes[f"blocks.{block}.{norm}.bias"] = (width,)
        for name, shape in linear.items():
            sizes[f"blocks.{block}.{name}.weight"] = shape
            sizes[f"blocks.{block}.{name}.bias"] = shape[:1]
    draws = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(size, generator=draws) for name, size in sizes.items()}


def timm_forward(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The encoder written out, (B, F, H, W), with heads of 64."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    patches = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH
    )
    size, width, height, columns = patches.shape
    tokens = patches.permute(0, 2, 3, 1).reshape(size, -1, width)
    x = torch.cat([state["cls_token"].expand(size, -1, -1), tokens], 1) + state["pos_embed"]
    for block in range(LAYERS):
        name = f"blocks.{block}"
        joint = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = joint.view(size, -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / 8).softmax(3) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(x.shape), f"{name}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(inner, f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 1:].view(size, height, columns, width).permute(0, 3, 1, 2)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers 4, from those of version 5."""
    table = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found = {}
    for name, value in state.items():
        old = name.replace("layers.", "encoder.layer.")
        for new, before in table.items():
            old = old.replace(f"{new}.", f"{before}.")
        found[old] = value
    return found


# Vision transformers


def test_a_converted_encoder_computes_what_the_original_formulas_do():
    state = timm_state()
    converted, shape = vit_weights(state)
    assert shape == SHAPE
    backbone = rebuild_backbone({"kind": "medmae", **shape._asdict()}).eval()
    backbone.load_state_dict({f"vit.{name}": value for name, value in converted.state.items()})
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = backbone(images)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, timm_forward(state, images), atol=1e-5, rtol=0)


def test_queries_keys_and_values_are_the_thirds_of_the_joint_matrix():
    state = timm_state()
    converted, _ = vit_weights(state)
    for place, letter in enumerate("qkv"):
        rows = slice(place * WIDTH, (place + 1) * WIDTH)
        for kind in ("weight", "bias"):
            joint = state[f"blocks.1.attn.qkv.{kind}"]
            found = converted.state[f"layers.1.attention.{letter}_proj.{kind}"]
            assert torch.equal(found, joint[rows])


def test_decoder_and_heads_are_left_out_and_told():
    extras = ["decoder_blocks.0.norm1.weight", "decoder_pos_embed", "mask_token", "head.weight"]
    extras += ["fc_norm.bias", "pooler.dense.weight", "decoder.decoder_norm.weight"]
    state = {**timm_state(), **{name: torch.zeros(1) for name in extras}}
    converted, _ = vit_weights(state)
    assert sorted(converted.left_out) == sorted(extras)
    assert converted.state.keys() == vit_weights(timm_state())[0].state.keys()


def test_unknown_names_are_not_left_out():
    converted, _ = vit_weights({**timm_state(), "blocks.0.ls1.gamma": torch.zeros(1)})
    assert "blocks.0.ls1.gamma" in converted.state  # for the strict loader to refuse
    assert not converted.left_out


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_names_of_both_versions_of_transformers_are_known(prefix):
    new = vit_weights(timm_state())[0].state
    for state in (new, old_names(new)):
        converted, shape = vit_weights({f"{prefix}{name}": value for name, value in state.items()})
        assert converted.state.keys() == new.keys()
        assert all(torch.equal(converted.state[name], new[name]) for name in new)
        assert shape == SHAPE._replace(eps=1e-12)


def test_old_names_differ():
    new = vit_weights(timm_state())[0].state
    old = old_names(new)
    assert "encoder.layer.0.attention.attention.query.weight" in old
    assert "encoder.layer.1.attention.output.dense.bias" in old
    assert "encoder.layer.1.output.dense.bias" in old


def test_size_follows_from_the_weights():
    assert vit_weights(timm_state(layers=3, width=64))[1] == VitShape(64, 3, 256, PATCH, SIDE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": None}, "lacks embeddings.patch_embeddings.projection.weight"),
        ({"pos_embed": torch.zeros(1, 4, WIDTH)}, "4 position embeddings"),
        ({"pos_embed": torch.zeros(1, 1, WIDTH)}, "1 position embeddings"),
        ({"patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}, "100 wide"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3)}, r"shape \(64, 3\)"),
        ({"blocks.0.attn.qkv.bias": torch.zeros(100)}, "qkv.bias has 100 rows"),
    ],
)
def test_what_is_no_vision_transformer_is_refused(change, message):
    state = {**timm_state(), **change}
    with pytest.raises(ValueError, match=message):
        vit_weights({name: value for name, value in state.items() if value is not None})


# What a file holds


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "backbone."])
def test_weights_are_found_where_they_lie(wrapper, prefix):
    state = {f"{prefix}conv1.weight": torch.ones(1), "module.fc.weight": torch.zeros(1)}
    payload = {wrapper: state, "epoch": 3} if wrapper else {**state, "epoch": 3}
    found = backbone_weights(payload)
    whole = "backbone" in prefix
    assert set(found) == ({"conv1.weight"} if whole else {"conv1.weight", "fc.weight"})


@pytest.mark.parametrize("payload", [{}, {"epoch": 3}, [1], torch.zeros(1), {"model": {"x": 1}}])
def test_a_file_without_weights_is_refused(payload):
    with pytest.raises(ValueError, match="holds no weights"):
        backbone_weights(payload)


def test_classifiers_of_convolutions_are_left_out():
    names = ["conv1.weight", "fc.weight", "features.denseblock1.denselayer12.norm.2.bias"]
    converted = convolution_weights({name: torch.zeros(1) for name in names})
    assert converted.left_out == ("fc.weight",)
    assert list(converted.state) == [
        "features.conv1.weight",
        "features.denseblock1.denselayer12.norm2.bias",
    ]


# Whole networks


def original_vit(old: bool) -> tuple[CSRNet, dict[str, Tensor]]:
    """A network, and its weights as an original checkpoint names them."""
    shape = SHAPE._replace(eps=1e-12)
    backbone = rebuild_backbone({"kind": "medmae", **shape._asdict()})
    net = CSRNet(backbone, concepts=3, prototypes=2, classes=4, projection=5)
    names = net.state_dict()
    vit = {name.removeprefix("backbone.vit."): value for name, value in names.items()}
    vit = {name: value for name, value in vit.items() if f"backbone.vit.{name}" in names}
    found = {f"backbone.vit.{name}": vit[name] for name in vit}
    if old:
        found = {f"backbone.vit.{name}": value for name, value in old_names(vit).items()}
    ours = ("backbone.", "task_mean", "task_std", "kept")
    found |= {name: value for name, value in names.items() if not name.startswith(ours)}
    found["backbone.vit.pooler.dense.weight"] = torch.zeros(WIDTH, WIDTH)
    return net.eval(), {f"module.{name}": value for name, value in found.items()}


@pytest.mark.parametrize("old", [True, False])
def test_an_original_checkpoint_gives_the_same_network(old):
    net, state = original_vit(old)
    converted = load_original(state)
    backbone, arguments = original_arguments(converted)
    assert arguments == {"concepts": 3, "prototypes": 2, "classes": 4, "projection": 5}
    copy = CSRNet(rebuild_backbone(backbone), **arguments).eval()
    copy.load_state_dict(converted)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(copy(images).logits, net(images).logits)


@pytest.mark.parametrize("kind", ["resnet18", "resnet34", "resnet50"])
def test_an_original_residual_network_fits_ours(kind):
    with torch.device("meta"):
        net = CSRNet(rebuild_backbone({"kind": kind}), concepts=3, prototypes=2, classes=4)
        numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
        state = {}
        for name, value in net.state_dict().items():
            if name not in ("task_mean", "task_std", "kept"):
                for layer, number in numbers.items():
                    name = name.replace(f"backbone.features.{layer}.", f"backbone.{number}.")
                state[name] = value
        assert "backbone.0.weight" in state
        converted = load_original(state)
        assert converted.keys() == net.state_dict().keys()
        assert original_arguments(converted)[0] == {"kind": kind}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module.prototypes": None}, "no prototypes of 4 dimensions"),
        ({"module.prototypes": torch.zeros(3, 2, 5)}, "no prototypes of 4 dimensions"),
        ({"module.prototypes": torch.zeros(7, 5, 1, 1)}, "7 prototypes of 3 concepts"),
        ({"module.concept_head.weight": None}, "no concept_head.weight"),
        ({"module.backbone.3.weight": torch.zeros(1)}, "no part 3"),
        ({"task_mean": torch.zeros(6)}, "has task_mean, so it is no original checkpoint"),
        ({"module.backbone.vit.embeddings.cls_token": None}, "neither a vision transformer"),
    ],
)
def test_what_is_no_original_checkpoint_is_refused(change, message):
    state = {**original_vit(old=True)[1], **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        original_arguments(load_original(state))
