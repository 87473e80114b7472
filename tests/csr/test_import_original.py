"""Weights of the original program, as a run of ours."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moectl.csr.backbones import rebuild_backbone
from moectl.csr.convert import VitShape
from moectl.csr.import_original import read_original
from moectl.csr.inference import open_network
from moectl.csr.settings import CsrSettings
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.settings import from_toml

Call = Callable[..., tuple[int, str, str]]
WIDTH, SIDE = 64, 64
K, M, C, D = 4, 2, 3, 6  # of the glyphs: concepts and targets
SHAPE = VitShape(WIDTH, 1, 4 * WIDTH, 16, SIDE, 1e-12)
DATA = (
    *("--dataset", "synthetic", "--set", "data.image_size=64", "--set", "data.workers=0"),
    *("--set", "data.synthetic_images=30", "--set", "train.precision=no", "--quiet", "--cpu"),
)
VERSION_4 = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
    "vit.layers.": "vit.encoder.layer.",
}


def encoder() -> Any:
    torch.manual_seed(3)
    return rebuild_backbone({"kind": "medmae", **SHAPE._asdict()}).eval()


def original(concepts: int = K, classes: int = C) -> dict[str, Tensor]:
    """Weights of an original network as transformers 5 and accelerate name them."""
    draws = torch.Generator().manual_seed(4)
    sizes = {
        "concept_head.weight": (concepts, WIDTH, 1, 1),
        "concept_head.bias": (concepts,),
        "projector.0.weight": (WIDTH, WIDTH, 1, 1),
        "projector.0.bias": (WIDTH,),
        "projector.2.weight": (D, WIDTH, 1, 1),
        "projector.2.bias": (D,),
        "prototypes": (concepts * M, D, 1, 1),
        "task_head.weight": (classes, concepts * M),
        "task_head.bias": (classes,),
        "backbone.vit.pooler.dense.weight": (WIDTH, WIDTH),
        "backbone.vit.pooler.dense.bias": (WIDTH,),
    }
    state = {f"backbone.{name}": value for name, value in encoder().state_dict().items()}
    state |= {name: 0.3 * torch.randn(size, generator=draws) for name, size in sizes.items()}
    return {f"module.{name}": value for name, value in state.items()}


def version_4(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for new, old in VERSION_4.items():
            name = name.replace(new, old)
        found[name] = value
    return found


def by_hand(state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The original's head written out: logits of concepts and of targets."""
    head = {name.removeprefix("module."): value for name, value in state.items()}
    features = encoder()(images)
    cams = F.conv2d(features, head["concept_head.weight"], head["concept_head.bias"])
    inner = F.conv2d(features, head["projector.0.weight"], head["projector.0.bias"]).relu()
    cells = F.conv2d(inner, head["projector.2.weight"], head["projector.2.bias"])
    cells, prototypes = F.normalize(cells, dim=1), F.normalize(head["prototypes"], dim=1)
    scores = F.conv2d(cells, prototypes).flatten(2).max(2).values
    return cams.flatten(2).max(2).values, scores @ head["task_head.weight"].T + head[
        "task_head.bias"
    ]


@pytest.fixture
def save(isolated: Path) -> Callable[..., Path]:
    def write(payload: Any, name: str = "old.pth") -> Path:
        torch.save(payload, isolated / name)
        return isolated / name

    return write


def request(folder: Path) -> Request:
    settings = from_toml(CsrSettings, folder / "settings.toml")
    return Request(
        room="csr", command="eval", settings=settings, origin={}, name="x", cpu=True, out=None,
        resume="", folder=folder, run=str(folder),
    )  # fmt: skip


@pytest.mark.parametrize("naming", [version_4, dict], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_a_converted_network_says_what_the_original_said(
    csr: Call, save: Callable[..., Path], naming: Any, wrapper: str | None
) -> None:
    state = naming(original())
    save({wrapper: state, "epoch": 3} if wrapper else state)
    code, out, err = csr("convert", "old.pth", "--out", "run", *DATA, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["command"], document["status"]) == ("convert", "finished")
    assert (document["tensors"], document["used"]) == (len(state), len(state) - 2)
    assert len(document["left_out"]) == 2
    opened = open_network(request(Path("run")))
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    found = opened.ask(images, ("concept_logits", "logits"))
    with torch.no_grad():
        concepts, logits = by_hand(original(), images)
    assert logits.std() > 0.05
    torch.testing.assert_close(found.concept_logits, concepts, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits, logits, atol=1e-5, rtol=0)


def test_the_run_can_be_measured_and_says_where_it_comes_from(
    csr: Call, save: Callable[..., Path], finished_run: Path, parsed: Callable[[Path], Any]
) -> None:
    path = save(original())
    code, out, err = csr("convert", "old.pth", "--out", "run", *DATA)
    assert (code, out) == (0, "run\n"), err
    record = json.loads(Path("run/run.json").read_text())
    assert record["parents"] == [{"path": "old.pth", "sha256": artefact.load(path).sha256}]
    assert record["parents"][0]["sha256"] in parsed(Path("run/report.html")).words
    sidecars = [
        json.loads((folder / "best_model_stage3.pth.json").read_text())
        for folder in (Path("run"), finished_run)
    ]
    own, trained = sidecars
    learned = {"score_statistics", "thresholds"}  # from training images, which nobody asked for
    assert set(trained) - set(own) <= learned
    assert set(own) <= set(trained)
    for name in ("model", "stage", "concepts", "targets"):
        assert own[name] == trained[name]
    settings = from_toml(CsrSettings, Path("run/settings.toml")).model
    form = (settings.backbone_type, settings.projector, settings.concept_pool, settings.local_order)
    assert form == ("medmae", "mlp", "max", "project_first")
    assert (settings.task_norm, settings.num_prototypes, settings.projection) == ("none", M, D)
    code, out, err = csr("eval", "--run", "run", "--bootstrap", "0", "--cpu", "--quiet", "--json")
    assert code == 0, err
    assert json.loads(out)["weights"]["file"] == "best_model_stage3.pth"


def test_how_many_tensors_were_used_is_said(csr: Call, save: Callable[..., Path]) -> None:
    state = original()
    save(state)
    code, out, err = csr("convert", "old.pth", "--out", "run", *DATA[:-2], "--cpu")
    assert (code, out) == (0, "run\n")
    assert f"{len(state) - 2} of {len(state)} tensors used, left out: backbone.vit.pooler" in err


def test_a_residual_network_is_converted(save: Callable[..., Path]) -> None:
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    backbone = rebuild_backbone({"kind": "resnet18"})
    state = {}
    for name, value in backbone.state_dict().items():
        layer, _, rest = name.removeprefix("features.").partition(".")
        state[f"backbone.{numbers[layer]}.{rest}"] = value
    heads = {name.removeprefix("module."): value for name, value in original().items()}
    wide = {"concept_head.weight": (K, 512, 1, 1), "projector.0.weight": (512, 512, 1, 1)}
    wide |= {"projector.0.bias": (512,), "projector.2.weight": (D, 512, 1, 1)}
    heads |= {name: torch.zeros(size) for name, size in wide.items()}
    state |= {name: value for name, value in heads.items() if not name.startswith("backbone.")}
    found = read_original(save(state), CsrSettings())
    assert found.settings.model.backbone_type == "resnet18"
    assert (found.tensors, found.left_out) == (len(state), ())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 3), "knows 5 concepts, but .* has 4: square, ring, plus, stripes"),
        ((4, 2), "knows 2 targets, but .* has 3"),
    ],
)
def test_numbers_that_do_not_fit_the_table_are_refused(
    csr: Call, save: Callable[..., Path], sizes: tuple[int, int], message: str
) -> None:
    save(original(*sizes))
    code, out, err = csr("convert", "old.pth", "--out", "run", *DATA)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2
    assert re.search(message, err)
    assert not list(Path("run").glob("*.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module.prototypes": None}, "has no prototypes of 4 dimensions"),
        ({"module.projector.2.bias": None}, r"Missing key.*projector\.2\.bias"),
        ({"module.gate.weight": torch.zeros(1)}, r"Unexpected key.*gate\.weight"),
        ({"module.concept_head.bias": torch.zeros(9)}, "does not fit"),
        ({"module.kept": torch.zeros(1)}, "is no original checkpoint but one of csr train"),
    ],
)
def test_other_weights_are_refused_before_there_is_a_run(
    csr: Call, save: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    state = {**original(), **change}
    save({name: value for name, value in state.items() if value is not None})
    code, out, err = csr("convert", "old.pth", "--out", "run", *DATA)
    assert (code, out) == (2, "")
    assert re.search(f"old.pth: .*{message}", err), err
    assert not Path("run").exists()


def test_what_is_no_weights_file_is_refused(isolated: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: cannot be read"):
        read_original(isolated / "nowhere.pth", CsrSettings())
    torch.save({"epoch": 3}, isolated / "empty.pth")
    with pytest.raises(UserError, match=r"empty\.pth: holds no weights"):
        read_original(isolated / "empty.pth", CsrSettings())


def test_a_conversion_is_made_anew(csr: Call, save: Callable[..., Path]) -> None:
    save(original())
    assert csr("convert", "old.pth", "--out", "run", *DATA)[0] == 0
    code, _, err = csr("convert", "old.pth", "--resume", "run", *DATA)
    assert code == 2
    assert "No such option: --resume" in err
