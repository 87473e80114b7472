"""The atlas: exemplars, hits, reliance, out-of-box rates, and the files about them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moectl.csr.atlas import Nearest, _outside, nearest, peak_box, read_atlas, reliance
from moectl.csr.edits import Head, Norm, contributions
from moectl.csr.inference import Opened, open_network
from moectl.csr.metrics import f1_scores
from moectl.csr.settings import CsrSettings
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.settings import from_toml

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A copy of the tiny run with its atlas, and the document that was printed."""
    from moectl.cli import _run

    folder = tmp_path_factory.mktemp("atlas") / "run"
    shutil.copytree(finished_run, folder)
    assert _run(["csr", "atlas", "--run", str(folder), "--top", "3", "--cpu", "--quiet"]) == 0
    return folder, read_atlas(folder)


@pytest.fixture
def copy(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """A folder of its own."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def opened(folder: Path) -> Opened:
    settings = from_toml(CsrSettings, folder / "settings.toml")
    made: Any = {"room": "csr", "command": "atlas", "settings": settings, "origin": {}, "name": "a"}
    return open_network(
        Request(**made, cpu=True, out=None, resume="", folder=folder, run=str(folder))
    )


def test_exemplars_are_the_most_similar_training_images_with_the_concept(
    made: tuple[Path, Any],
) -> None:
    network, (_, atlas) = opened(made[0]), made
    part = network.data.train
    vectors = network.outputs(part, ("local_vectors",)).local_vectors
    found = {(one["concept"], one["index"]): one for one in atlas["prototypes"]}
    hits = torch.zeros(network.model.num_concepts, network.model.num_prototypes)
    for place, concept in enumerate(network.concepts):
        prototypes = network.model.prototype_vectors[place].detach()
        cosines = F.cosine_similarity(vectors[:, place, None], prototypes, dim=2)
        cosines[part.concepts[:, place] < 0.5] = -2
        for winner in cosines[part.concepts[:, place] >= 0.5].argmax(1).tolist():
            hits[place, winner] += 1
        for index in range(len(prototypes)):
            rows = cosines[:, index].argsort(descending=True)[:3].tolist()
            shown = found[concept, index]["exemplars"]
            assert [one["row"] for one in shown] == rows
            assert [one["image_id"] for one in shown] == [part.image_ids[row] for row in rows]
            similarities = [one["similarity"] for one in shown]
            assert similarities == pytest.approx(cosines[rows, index].tolist(), abs=1e-5)
    assert [one["hits"] for one in atlas["prototypes"]] == hits.flatten().tolist()
    assert [one["alive"] for one in atlas["prototypes"]] == (hits > 0).flatten().tolist()


def test_boxes_are_the_peaks_of_the_similarity_maps(made: tuple[Path, Any]) -> None:
    network, (_, atlas) = opened(made[0]), made
    maps = network.outputs(network.data.train, ("similarity_maps",)).similarity_maps
    for number, prototype in enumerate(atlas["prototypes"]):
        for one in prototype["exemplars"]:
            own = maps[one["row"]].flatten(0, 1)[number]
            x0, y0, x1, y1 = one["box"]
            assert (x1 - x0, y1 - y0) == (1 / 8, 1 / 8)
            assert own[int(8 * y0), int(8 * x0)] == pytest.approx(float(own.max()), abs=1e-5)


def test_the_files_belong_together(made: tuple[Path, Any]) -> None:
    folder, atlas = made
    sheets = sorted(path.name for path in (folder / "figures").glob("atlas_*"))
    assert sheets == [f"atlas_{name}.png" for name in ("plus", "ring", "square", "stripes")]
    text = (folder / "curation.toml").read_text()
    assert text.count("keep = true") == len(atlas["prototypes"]) == 20
    facts = json.loads((folder / "best_model_stage3.pth.json").read_text())
    assert atlas["weights"] == {"file": "best_model_stage3.pth", "sha256": facts["sha256"]}
    assert atlas["concepts"] == facts["concepts"]


def test_the_command_prints_a_table_and_says_where_things_are(csr: Call, copy: Path) -> None:
    code, out, err = csr("atlas", "--run", str(copy), "--cpu")
    assert code == 0, err
    assert "reliance" in out
    assert "stripes" in out
    assert str(copy / "curation.toml") in err
    assert str(copy / "figures") in err
    assert "curation" not in out


def test_json_is_the_atlas_and_where_it_lies(csr: Call, copy: Path) -> None:
    code, out, err = csr("atlas", "--run", str(copy), "--cpu", "--json", "--top", "2")
    assert code == 0, err
    document = json.loads(out)
    assert document["folder"] == str(copy)
    assert len(document["sheets"]) == 4
    assert {name: document[name] for name in ("weights", "concepts", "prototypes")} == read_atlas(
        copy
    )
    assert all(len(one["exemplars"]) == 2 for one in document["prototypes"])


def test_flags_of_a_person_stay(csr: Call, copy: Path) -> None:
    path = copy / "curation.toml"
    path.write_text("# mine\n" + path.read_text().replace("keep = true", "keep = false", 1))
    before = path.read_bytes()
    code, _, err = csr("atlas", "--run", str(copy), "--cpu")
    assert code == 0
    assert "stays as it is" in err
    assert path.read_bytes() == before


def test_decisions_about_other_prototypes_are_not_overwritten(csr: Call, copy: Path) -> None:
    path = copy / "curation.toml"
    text = path.read_text().replace("keep = true", "keep = false", 1)
    path.write_text(text.replace('network = "', 'network = "0'))
    atlas = (copy / "atlas.json").read_bytes()
    code, out, err = csr("atlas", "--run", str(copy), "--cpu", "--top", "1")
    assert (code, out) == (2, "")
    assert "leaves out prototypes of another network" in err
    assert "keep = false" in path.read_text()
    assert (copy / "atlas.json").read_bytes() == atlas


def test_a_file_that_keeps_all_is_written_again(csr: Call, copy: Path) -> None:
    path = copy / "curation.toml"
    before = path.read_text()
    path.write_text('network = "of something else"\n')
    assert csr("atlas", "--run", str(copy), "--cpu", "--top", "3")[0] == 0
    assert path.read_text() == before


def test_a_network_of_concepts_alone_has_no_atlas(csr: Call, copy: Path) -> None:
    code, out, err = csr("atlas", "--run", str(copy / "best_model_stage1.pth"), "--cpu")
    assert (code, out) == (2, "")
    assert "has no trained prototypes" in err


def test_before_there_is_a_verdict_nothing_relies_on_prototypes(csr: Call, copy: Path) -> None:
    weights = next(copy.glob("model_stage2_epoch*.pth"))
    code, out, err = csr("atlas", "--run", str(weights), "--cpu", "--json")
    assert code == 0, err
    assert {one["reliance"] for one in json.loads(out)["prototypes"]} == {None}


@pytest.mark.parametrize("top", ["0", "51"])
def test_the_number_of_exemplars_is_limited(csr: Call, made: tuple[Path, Any], top: str) -> None:
    code, _, err = csr("atlas", "--run", str(made[0]), "--top", top)
    assert code == 2
    assert "--top" in err


def test_without_an_atlas_there_is_none_to_read(tmp_path: Path) -> None:
    assert read_atlas(tmp_path) is None
    (tmp_path / "atlas.json").write_text("[]")
    with pytest.raises(UserError, match=r"atlas\.json: no atlas"):
        read_atlas(tmp_path)


def test_lengths_do_not_count_for_the_nearest() -> None:
    vectors = torch.tensor([[5.0, 5.0], [0.1, 0.0], [0.0, 9.0]])
    found = nearest(vectors, torch.tensor([[3.0, 0.0]]), torch.tensor([10, 20, 30]), 2)
    assert found.rows.tolist() == [[20, 10]]
    assert found.similarities.flatten().tolist() == pytest.approx([1, 0.5**0.5])


def test_a_concept_that_no_image_has_gets_no_exemplars() -> None:
    none = nearest(torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(0, dtype=torch.long), 5)
    assert none.rows.shape == none.similarities.shape == (3, 0)
    part: Any = None
    assert _outside(part, 0, none.rows, torch.zeros(3, 0, 2, 2)) == [(None, False)] * 3


def test_the_peak_is_a_cell_as_shares_of_the_image() -> None:
    own = torch.zeros(2, 4)
    own[1, 2] = 1
    assert peak_box(own) == [0.5, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("boxed", "rate", "suspect"), [(3, 1.0, True), (2, 1.0, False), (0, None, False)]
)
def test_a_shortcut_is_suspected_from_three_exemplars_with_boxes_on(
    boxed: int, rate: float | None, suspect: bool
) -> None:
    corner = [(0, 0.5, 0.5, 1.0, 1.0)]
    boxes = [corner] * boxed + [[(1, *corner[0][1:])]] * (4 - boxed)
    part: Any = SimpleNamespace(boxes=boxes)
    maps = torch.zeros(1, 4, 2, 2)
    maps[..., 0, 0] = 1
    found = Nearest(torch.arange(4)[None], torch.zeros(1, 4))
    assert _outside(part, 0, found.rows, maps) == [(rate, suspect)]


@pytest.mark.parametrize("task_input", ["all", "max"])
def test_reliance_is_the_f1_that_is_lost_without_a_prototype(task_input: str) -> None:
    draws = torch.Generator().manual_seed(3)
    scores = torch.rand(40, 2, 3, generator=draws)
    width = 6 if task_input == "all" else 2
    weight = 4 * torch.randn(2, width, generator=draws)
    shape = (2, 3) if task_input == "all" else (2, 1)
    kept = torch.tensor([[True, True, True], [True, False, True]])
    norm = Norm(torch.full(shape, 0.5), torch.full(shape, 0.3))
    head = Head(weight, torch.zeros(2), norm, kept)
    labels = (torch.rand(40, 2, generator=draws) > 0.5).float()

    def score(kept: torch.Tensor) -> float:
        logits = contributions(scores, weight, head.bias, norm, kept).logits
        return float(f1_scores((logits.sigmoid() > 0.4).numpy(), (labels > 0.5).numpy())[0].mean())

    found = reliance(scores, labels, head, torch.tensor([0.4, 0.4]))
    for concept in range(2):
        for index in range(3):
            fewer = kept.clone()
            fewer[concept, index] = False
            expected = score(kept) - score(fewer)
            assert found[concept][index] == pytest.approx(expected, abs=1e-9)
    assert found[1][1] == 0, "it has no say already"
    assert any(abs(value or 0) > 1e-3 for row in found for value in row)


def test_reliance_of_one_class_per_image() -> None:
    scores = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    head = Head(torch.eye(2), torch.tensor([0.0, 0.1]))
    assert reliance(scores, torch.tensor([0, 1]), head) == [[pytest.approx(2 / 3)], [0.0]]


def test_reliance_that_cannot_be_said_is_none() -> None:
    head = Head(torch.ones(1, 1), torch.zeros(1))
    assert reliance(torch.zeros(3, 1, 1), torch.zeros(3, 1), head) == [[None]]
