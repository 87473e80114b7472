import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.csr.edit_list import ALPHA, Edit, apply_edit
from moectl.csr.edits import MODES, Head, Norm, contributions, edited_scores, statistics
from moectl.csr.inference import Opened, open_network
from moectl.csr.oracle import Cases, compare, curve, oracle
from moectl.csr.settings import CsrSettings
from moectl.csr.study import (
    MARGINS,
    ORDERS,
    SEEDS,
    Asked,
    best,
    box_maps,
    box_study,
    cases_of,
    draw,
    study,
    true_boxes,
)
from moectl.engine.command import Request
from moectl.engine.settings import from_toml

IMAGES, CONCEPTS, PROTOTYPES = 80, 4, 2
Call = Callable[..., tuple[int, str, str]]


def world(seed: int = 0) -> tuple[Cases, Asked]:
    """Images whose class is the first of two concepts, with scores that are often wrong."""
    draws = torch.Generator().manual_seed(seed)
    concepts = (torch.rand(IMAGES, CONCEPTS, generator=draws) < 0.5).double()
    shape = (IMAGES, CONCEPTS, PROTOTYPES)
    noise = 0.8 * torch.randn(shape, generator=draws).double()
    scores = (concepts[..., None] - 0.5 + noise).clamp(-1, 1)
    weight = torch.zeros(2, CONCEPTS, PROTOTYPES).double()
    weight[0, 0], weight[1, 1] = 1, 1
    norm = Norm(torch.zeros(shape[1:]).double(), torch.full(shape[1:], 0.5).double())
    head = Head(weight.flatten(1), torch.zeros(2).double(), norm)
    labels = (concepts[:, 1] > concepts[:, 0]).long()
    known = statistics(scores, concepts)
    return Cases(scores, concepts, labels, 2 * scores.mean(2)), Asked(head, known, "contribution")


def opened(folder: Path) -> Opened:
    settings = from_toml(CsrSettings, folder / "settings.toml")
    return open_network(
        Request("csr", "intervene", settings, {}, "", True, None, "", folder, str(folder))
    )


@pytest.fixture
def run(finished_run: Path, isolated: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(finished_run, isolated / "run"))


def measured(words: tuple[str, ...], call: Call) -> dict[str, Any]:
    code, out, err = call("intervene", "--oracle", "--cpu", "--quiet", "--json", *words)
    assert code == 0, err
    return json.loads(out)


# What is chosen


def test_only_validation_images_choose() -> None:
    held, asked = world()
    cases, _ = world(1)
    misleading = cases._replace(labels=1 - cases.labels)
    found, other = study(asked, held, cases), study(asked, held, misleading)
    assert found["validation"] == other["validation"]
    chosen = found["validation"]["chosen"]
    assert chosen["net"] > 0
    table = [
        oracle(misleading, *asked[:2], mode=mode, margin=margin, order=asked.order)
        for mode in MODES
        for margin in MARGINS
    ]
    tuned = best(table)
    assert (tuned["mode"], tuned["margin"]) != (chosen["mode"], chosen["margin"])
    first = other["results"][0]
    assert (first["name"], first["mode"], first["margin"]) == (
        "chosen",
        chosen["mode"],
        chosen["margin"],
    )
    assert first["net"] < tuned["net"]


def test_every_mode_and_margin_is_a_candidate() -> None:
    held, asked = world()
    found = study(asked, held, held)
    table = found["validation"]["candidates"]
    assert [(one["mode"], one["margin"]) for one in table] == [
        (mode, margin) for mode in MODES for margin in MARGINS
    ]
    chosen = found["validation"]["chosen"]
    assert chosen in table
    assert chosen["net"] == max(one["net"] for one in table)
    absent = int((held.concepts == 0).any(1).sum())
    assert all(one["asked"] == absent for one in table if one["margin"] == MARGINS[-1])
    assert found["results"][0] == {"name": "chosen", **chosen}
    for name, mode in (("published", "zero"), ("default", "absent-median")):
        wanted = oracle(held, *asked[:2], mode=mode, margin=0.3, order="contribution")
        assert {"name": name, **wanted} in found["results"]


def test_a_mode_that_is_given_is_not_chosen() -> None:
    held, asked = world()
    found = study(asked._replace(modes=["drop"]), held, held)
    assert {one["mode"] for one in found["validation"]["candidates"]} == {"drop"}
    assert [one["mode"] for one in found["results"]] == ["drop", "zero", "absent-median"]
    wanted = curve(held, *asked[:2], order="similarity", mode="drop")
    assert found["curves"]["similarity"] == wanted


def test_equal_candidates_are_told_apart() -> None:
    def candidate(net: int, gain: float, asked: int) -> dict[str, Any]:
        return {"net": net, "true_probability": {"change": gain}, "asked": asked}

    table = [candidate(1, 0.2, 9), candidate(2, 0.1, 9), candidate(2, 0.3, 9), candidate(2, 0.3, 4)]
    assert best(table) == table[3]
    assert best(table[:2]) == table[1]


def test_random_curves_are_averaged() -> None:
    held, asked = world()
    found = study(asked, held, held)
    mode = found["validation"]["chosen"]["mode"]
    assert list(found["curves"]) == list(ORDERS)
    drawn = [curve(held, *asked[:2], order="random", mode=mode, seed=seed) for seed in range(5)]
    assert SEEDS == 5
    for place, point in enumerate(found["curves"]["random"]):
        assert point["corrected"] == place
        for name in ("net", "accuracy", "f1_macro", "true_probability"):
            mean = sum(points[place][name] for points in drawn) / 5
            assert point[name] == pytest.approx(mean)
    assert len({points[1]["accuracy"] for points in drawn}) > 1


# Boxes


def test_only_boxes_of_present_concepts_count() -> None:
    boxes = [[(0, 0.0, 0.0, 0.5, 0.5), (1, 0.0, 0.0, 1.0, 1.0)], [(1, 0.0, 0.0, 0.1, 0.1)]]
    concepts = torch.tensor([[1.0, 0.0], [1.0, 0.4]])
    assert true_boxes(boxes, concepts) == [[(0, 0.0, 0.0, 0.5, 0.5)], []]


def test_every_concept_is_weighed_by_its_own_boxes() -> None:
    boxes = [[(0, 0.0, 0.0, 0.5, 0.5), (2, 0.5, 0.5, 1.0, 1.0)], [(0, 0.5, 0.0, 1.0, 0.5)]]
    maps = 2 * torch.rand(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
    found = edited_scores(maps, box_maps(boxes, 3, (4, 4)))
    for image, drawn in enumerate(boxes):
        for concept in range(3):
            own = tuple(box[1:] for box in drawn if box[0] == concept)
            wanted = apply_edit(Edit(positive=own, alpha=ALPHA), maps[image, None])
            assert torch.equal(found[image, concept], wanted[0, concept])


def test_boxes_are_compared_on_the_images_that_have_some(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened(finished_run)
    part = one.part("test")
    cases = cases_of(one, part)
    found = box_study(one, part, cases, one.head)
    drawn = true_boxes(part.boxes, part.concepts)
    places = [place for place, boxes in enumerate(drawn) if boxes]
    assert found is not None
    assert 0 < found["images"] == len(places) < len(drawn)
    before, after = [], []
    for place in places:
        image = one.transform(part.pixels(place))[0]
        maps = one.ask(image[None], ("similarity_maps",)).similarity_maps
        scores = maps.amax((3, 4))
        before.append(contributions(scores, *one.head).logits)
        for concept in {box[0] for box in drawn[place]}:
            own = tuple(box[1:] for box in drawn[place] if box[0] == concept)
            edit = Edit(positive=own, alpha=0.2, only=concept)
            scores[:, concept] = apply_edit(edit, maps)[:, concept]
        after.append(contributions(scores, *one.head).logits)
    labels = part.targets[places]
    wanted = compare(torch.cat(before), torch.cat(after), labels, cases.thresholds)
    for name in ("decisions", "fixed", "broke", "net"):
        assert found[name] == wanted[name]
    for name in ("before", "after"):
        assert found["true_probability"][name] == pytest.approx(wanted["true_probability"][name])
    assert found["true_probability"]["change"] != 0
    nobody = cases._replace(concepts=torch.zeros_like(cases.concepts))
    assert box_study(one, part, nobody, one.head) is None


# The command


def test_a_study_is_written_and_printed(csr: Call, run: Path) -> None:
    found = measured(("--run", str(run)), csr)
    folder = run / "evals" / "test@best_model_stage3-oracle"
    assert found.pop("folder") == str(folder)
    assert json.loads((folder / "study.json").read_text()) == found
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["study.json", "study.png"]
    assert (found["split"], found["images"], found["validation"]["images"]) == ("test", 40, 12)
    assert found["weights"]["file"] == "best_model_stage3.pth"
    assert found["boxes"]["images"] > 0
    assert all(len(points) == 5 for points in found["curves"].values())
    assert all(one["order"] == "similarity" for one in found["results"])


def test_the_table_says_what_came_out(csr: Call, run: Path) -> None:
    words = ("--run", str(run), "--split", "val", "--mode", "drop", "--order", "uncertainty")
    code, out, err = csr("intervene", "--oracle", "--cpu", *words)
    assert code == 0, err
    assert "the very images that are measured" in err
    header = next(line for line in out.splitlines() if "asked" in line).split()
    assert header[:6] == ["asked", "fixed", "broke", "net", "p", "F1"]
    for start in ("chosen: drop, margin", "published: zero, margin 0.3", "default: ", "true boxes"):
        assert any(line.strip().startswith(start) for line in out.splitlines())
    document = json.loads(
        (run / "evals" / "val@best_model_stage3-oracle" / "study.json").read_text()
    )
    assert {one["order"] for one in document["validation"]["candidates"]} == {"uncertainty"}
    assert document["results"][0] == {"name": "chosen", **document["validation"]["chosen"]}


def test_a_study_needs_statistics_and_no_images(csr: Call, run: Path) -> None:
    words = ("intervene", "--oracle", "--run", str(run), "--cpu", "--quiet")
    for more in (("a.png",), ("--reject", "ring"), ("--id", "x"), ("--edits", "e.toml")):
        code, out, err = csr(*words, *more)
        assert (code, out) == (2, "")
        assert "--oracle takes no images and no edits" in err
    sidecar = run / "best_model_stage3.pth.json"
    facts = json.loads(sidecar.read_text())
    del facts["score_statistics"]
    sidecar.write_text(json.dumps(facts))
    code, out, err = csr(*words)
    assert (code, out) == (2, "")
    assert "comes without the scores of training images" in err
    assert not (run / "evals").exists()


def test_curves_are_drawn_with_gaps(isolated: Path) -> None:
    points = [{"corrected": place, "f1_macro": None} for place in range(3)]
    curves = dict.fromkeys(ORDERS, points)
    draw(isolated / "gaps.png", curves)
    points = [{"corrected": place, "f1_macro": math.sqrt(place)} for place in range(3)]
    draw(isolated / "lines.png", dict.fromkeys(ORDERS, points))
    assert (isolated / "gaps.png").read_bytes() != (isolated / "lines.png").read_bytes()
