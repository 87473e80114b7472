import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.csr.edit_list import Edit
from moectl.csr.edits import Head, Norm, contributions, statistics
from moectl.csr.intervene import Judge, compared, edit_table, verdict
from moectl.engine.errors import UserError

NAMES = ["square", "ring", "plus", "stripes"]
SIDECAR = "best_model_stage3.pth.json"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def images(isolated: Path) -> list[str]:
    """Files of several sizes."""
    draws = np.random.default_rng(0)
    sizes = {"a.png": (64, 64), "b.png": (40, 100), "c.png": (64, 64)}
    for name, size in sizes.items():
        Image.fromarray(draws.integers(0, 256, size, dtype=np.uint8)).save(isolated / name)
    return list(sizes)


@pytest.fixture
def intervene(csr: Call, finished_run: Path) -> Call:
    def call(*words: str, run: Path = finished_run) -> tuple[int, str, str]:
        return csr("intervene", "--run", str(run), "--cpu", "--quiet", *words)

    return call


def rows(answer: tuple[int, str, str]) -> list[dict[str, Any]]:
    code, out, err = answer
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def without_facts(run: Path, folder: Path, *names: str) -> Path:
    """A copy of a run whose weights say less."""
    shutil.copytree(run, folder)
    facts = json.loads((folder / SIDECAR).read_text())
    for name in names:
        facts.pop(name, None)
    (folder / SIDECAR).write_text(json.dumps(facts))
    return folder


# One image


def judge(*, several: bool = True, with_statistics: bool = True) -> Judge:
    draws = torch.Generator().manual_seed(0)
    norm = Norm(torch.rand(4, 2, generator=draws), torch.rand(4, 2, generator=draws) + 0.5)
    head = Head(torch.randn(3, 8, generator=draws), torch.randn(3, generator=draws), norm)
    scores, present = torch.rand(20, 4, 2, generator=draws), torch.rand(20, 4, generator=draws)
    known = statistics(scores, present.round()) if with_statistics else None
    limits = torch.tensor([0.5, 0.2, 0.8]) if several else None
    return Judge(head, known, NAMES, ["u", "v", "w"], limits)


def maps() -> torch.Tensor:
    return 2 * torch.rand(4, 2, 5, 6, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize(
    "edit",
    [Edit(), Edit(positive=((0, 0, 1, 1),)), Edit(positive=((0, 0, 60, 50),), alpha=0)],
    ids=["empty", "whole", "whole in pixels"],
)
def test_an_edit_that_changes_nothing_leaves_every_digit(edit: Edit) -> None:
    found = compared(judge(), maps(), edit, (50, 60))
    assert found["before"] == found["after"]
    assert found["changed"] == {}
    assert found["flipped"] is False


def test_a_dropped_concept_contributes_exactly_nothing() -> None:
    found = compared(judge(), maps(), Edit(reject=(1,), mode="drop"))
    before = contributions(maps().amax((2, 3))[None], *judge().head).values[0, :, 1].tolist()
    assert found["changed"] == {
        target: {"ring": [value, 0.0]} for target, value in zip("uvw", before, strict=True)
    }


def test_a_set_concept_contributes_what_its_value_says() -> None:
    found = compared(judge(), maps(), Edit(values={2: -0.25}))
    scores = maps().amax((2, 3))[None]
    scores[0, 2] = -0.25
    wanted = contributions(scores, *judge().head)
    assert {name: table["plus"][1] for name, table in found["changed"].items()} == dict(
        zip("uvw", wanted.values[0, :, 2].tolist(), strict=True)
    )
    assert all(list(table) == ["plus"] for table in found["changed"].values())
    assert found["after"] == verdict(judge(), wanted.logits)


def test_without_anything_to_look_at_no_prototype_is_similar() -> None:
    found = compared(judge(), maps(), Edit(negative=((0, 0, 1, 1),)))
    nothing = contributions(torch.zeros(1, 4, 2), *judge().head)
    assert found["after"] == verdict(judge(), nothing.logits)
    assert found["after"] != found["before"]


def test_only_contributions_that_changed_are_listed() -> None:
    full = judge()
    weight = full.head.weight.clone()
    weight[1, :2] = 1e-9
    found = compared(full._replace(head=full.head._replace(weight=weight)), maps(), Edit((), (0,)))
    assert set(found["changed"]) == {"u", "w"}


def test_several_targets_have_thresholds_of_their_own() -> None:
    found = verdict(judge(), torch.tensor([[0.9, 0.3, 0.6]]).logit())
    assert found["probabilities"] == pytest.approx({"u": 0.9, "v": 0.3, "w": 0.6})
    assert found["prediction"] == ["u", "v"]
    assert found["margin"] == pytest.approx(0.2)


def test_one_class_is_the_most_probable() -> None:
    found = verdict(judge(several=False), torch.tensor([[0.5, 0.3, 0.2]]).log())
    assert found["probabilities"] == pytest.approx({"u": 0.5, "v": 0.3, "w": 0.2})
    assert (found["prediction"], found["margin"]) == ("u", pytest.approx(0.2))


def test_a_verdict_flips_with_its_prediction() -> None:
    one = judge(several=False)
    plain = compared(one, maps(), Edit())["before"]["prediction"]
    found = [compared(one, maps(), Edit(values={k: v})) for k in range(4) for v in (-1.0, 1.0)]
    assert {row["flipped"] for row in found} == {True, False}
    for row in found:
        assert row["before"]["prediction"] == plain
        assert row["flipped"] == (row["after"]["prediction"] != plain)


# Options


def test_options_make_the_edit_that_people_write() -> None:
    found = edit_table(
        reject=["ring"], mode=None, set=["a=b=0.5"], positive=["0,0.5,1,1"], negative=[], alpha=0.0
    )
    assert found == {
        "reject": ["ring"],
        "set": {"a=b": 0.5},
        "positive": [[0, 0.5, 1, 1]],
        "alpha": 0,
    }
    for wrong in (["ring"], ["ring=1", "ring=0"]):
        with pytest.raises(UserError, match="each name once"):
            edit_table(set=wrong)


@pytest.mark.parametrize("form", ["toml", "json"])
def test_options_say_the_same_as_a_file(
    intervene: Call, images: list[str], isolated: Path, form: str
) -> None:
    edit = {
        "reject": ["ring", "Plus"],
        "mode": "absent-mean",
        "confirm": ["square"],
        "set": {"stripes": 0.3},
        "positive": [[0, 0.25, 0.5, 1.0]],
        "negative": [[0.5, 0.5, 1, 1]],
        "alpha": 0.1,
        "only": "ring",
    }
    toml = """
        [[edits]]
        reject = ["ring", "Plus"]
        mode = "absent-mean"
        confirm = ["square"]
        set = { stripes = 0.3 }
        positive = [[0, 0.25, 0.5, 1.0]]
        negative = [[0.5, 0.5, 1, 1]]
        alpha = 0.1
        only = "ring"
    """
    file = isolated / f"edits.{form}"
    file.write_text(toml if form == "toml" else json.dumps({"edits": [edit]}))
    flags = (
        *("--reject", "ring", "--reject", "Plus", "--mode", "absent-mean", "--confirm", "square"),
        *("--set-concept", "stripes=0.3", "--positive", "0,0.25,0.5,1.0"),
        *("--negative", "0.5,0.5,1,1", "--alpha", "0.1", "--only", "ring"),
    )
    found = rows(intervene(*images, *flags))
    assert found == rows(intervene(*images, "--edits", str(file)))
    assert [row["image"] for row in found] == images
    assert [row["edit"] for row in found] == [edit] * 3
    assert all(row["changed"] for row in found)


def test_json_is_one_document(intervene: Call, images: list[str]) -> None:
    words = (*images, "--reject", "ring", "--set", "eval.batch_size=2")
    code, out, err = intervene(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == rows(intervene(*words))
    for row in found:
        assert list(row) == ["image", "edit", "before", "after", "changed", "flipped"]
        assert list(row["before"]) == ["probabilities", "prediction", "margin"]


def test_files_need_no_tables(
    intervene: Call, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the data are not needed")

    monkeypatch.setattr("moectl.csr.inference.load", refuse)
    assert len(rows(intervene(*images, "--confirm", "ring"))) == 3


# Images


def test_images_of_a_split_go_by_their_ids(intervene: Call, csr: Call, finished_run: Path) -> None:
    everything = rows(intervene("--split", "val", "--reject", "ring"))
    assert len(everything) == 12
    chosen = [everything[7]["image"], everything[2]["image"]]
    words = ("--split", "val", "--id", chosen[0], "--id", chosen[1])
    found = rows(intervene(*words, "--reject", "ring"))
    assert [row["image"] for row in found] == chosen
    for row, wanted in zip(found, (everything[7], everything[2]), strict=True):
        assert row["after"]["prediction"] == wanted["after"]["prediction"]
        assert row["after"]["probabilities"] == pytest.approx(wanted["after"]["probabilities"])


def test_probabilities_before_are_those_of_the_network(intervene: Call, finished_run: Path) -> None:
    from moectl.csr.inference import open_network
    from moectl.csr.settings import CsrSettings
    from moectl.engine.command import Request
    from moectl.engine.settings import from_toml

    found = rows(intervene("--split", "test", "--reject", "ring"))
    settings = from_toml(CsrSettings, finished_run / "settings.toml")
    name = str(finished_run)
    opened = open_network(
        Request("csr", "intervene", settings, {}, "", True, None, "", finished_run, name)
    )
    logits = opened.outputs(opened.part("test"), ("logits",)).logits
    for row, wanted in zip(found, logits.sigmoid().tolist(), strict=True):
        assert list(row["before"]["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
    assert [row["image"] for row in found] == opened.part("test").image_ids


def test_edits_may_name_their_images(intervene: Call, images: list[str], isolated: Path) -> None:
    edits = [{"image": "./b.png", "reject": ["ring"]}, {}, {"image": "b.png", "confirm": ["plus"]}]
    (isolated / "e.json").write_text(json.dumps({"edits": edits}))
    found = rows(intervene(*images, "--edits", "e.json"))
    assert [(row["image"], row["edit"]) for row in found] == [
        ("a.png", {}),
        *(("b.png", edit) for edit in edits),
        ("c.png", {}),
    ]
    for row in found:
        assert bool(row["changed"]) == bool(row["edit"])
        assert (row["before"] == row["after"]) == (not row["edit"])


def test_images_without_an_edit_are_left_alone(
    intervene: Call, images: list[str], isolated: Path
) -> None:
    (isolated / "e.json").write_text('{"edits": [{"image": "a.png", "reject": ["ring"]}]}')
    found = rows(intervene("a.png", "missing.png", "--edits", "e.json"))
    assert [row["image"] for row in found] == ["a.png"]


def test_pixels_are_those_of_the_file(intervene: Call, images: list[str]) -> None:
    """b.png is 100 pixels wide and 40 high."""
    pixels = rows(intervene("b.png", "--positive", "25,10,75,30"))[0]
    shares = rows(intervene("b.png", "--positive", "0.25,0.25,0.75,0.75"))[0]
    assert pixels["changed"]
    assert pixels["after"] == shares["after"]
    code, out, err = intervene("b.png", "a.png", "--negative", "0,0,10,50")
    assert (code, out) == (2, "")
    assert "b.png: box (0.0, 0.0, 10.0, 50.0) leaves the image of 100 x 40 pixels" in err


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.png", "nothing to change"),
        ("a.png --mode zero --alpha 0.1", "nothing to change"),
        ("--reject ring", "no image given"),
        ("a.png --id x --reject ring", "images and --split or --id exclude each other"),
        ("--id x --reject ring", "--id x: not one of the 40 images of test"),
        ("missing.png --reject ring", "missing.png: no such image"),
        ("a.png --reject sqare", "'sqare', expected one of square, ring, plus, stripes; did you"),
        ("a.png --confirm rng", "edit.confirm[0]: 'rng', expected one of"),
        ("a.png --reject ring --confirm ring", "'ring' is named twice"),
        ("a.png --set-concept ring", "--set-concept 'ring': expected NAME=VALUE"),
        ("a.png --set-concept ring=high", "edit.set.ring: 'high', expected a number"),
        ("a.png --positive 0,0,1", "edit.positive[0]: [0.0, 0.0, 1.0], expected left, top"),
        ("a.png --positive 0,0,b,1", "edit.positive[0]: 'b', expected a number"),
        ("a.png --positive 0,0,1,1 --alpha 1", "edit.alpha: 1.0, expected below 1"),
        ("a.png --reject ring --only ring", "edit.only: needs positive or negative boxes"),
        ("a.png --reject ring --mode none", "--mode"),
        ("a.png --reject ring --edits e.json", "--reject and --edits exclude each other"),
        ("a.png --edits none.toml", "none.toml: cannot be read"),
        ("a.png --edits a.png", "a.png: expected a list of edits in a .toml or .json file"),
        ("a.png --edits list.json", "list.json: a list 'edits' and nothing else expected"),
        ("a.png --edits e.json", "e.json: edits[1].image: 'z.png', expected one of the 1 images"),
        ("--split val --edits e.json", "e.json: edits[1].image: 'z.png', expected one of the 12"),
        ("a.png --edits wrong.json", "wrong.json: edits[0].rejects: no such field"),
        ("a.png --reject ring --order random", "--order goes with --oracle"),
    ],
)
def test_mistakes_are_one_line_with_code_2(
    intervene: Call, images: list[str], isolated: Path, words: str, message: str
) -> None:
    (isolated / "e.json").write_text('{"edits": [{}, {"image": "z.png", "reject": ["ring"]}]}')
    (isolated / "wrong.json").write_text('{"edits": [{"rejects": []}]}')
    (isolated / "list.json").write_text("[{}]")
    code, out, err = intervene(*words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert len([line for line in err.splitlines() if not line.startswith("hint: ")]) == 1


def test_names_that_are_near_are_proposed(intervene: Call, images: list[str]) -> None:
    code, _, err = intervene("a.png", "--reject", "sqare")
    assert code == 2
    assert "; did you mean square or stripes?" in err


def test_without_statistics_only_they_are_missing(
    intervene: Call, images: list[str], isolated: Path, finished_run: Path
) -> None:
    run = without_facts(finished_run, isolated / "less", "score_statistics")
    for words in (("--confirm", "ring"), *(("--reject", "ring", "--mode", m) for m in
                  ("absent-median", "absent-mean", "clip"))):  # fmt: skip
        code, out, err = intervene("a.png", *words, run=run)
        assert (code, out) == (2, "")
        assert "needs the scores of training images" in err
        assert "best_model_stage3.pth" in err
    plain = rows(intervene("a.png", "--reject", "ring", run=run))
    zero = rows(intervene("a.png", "--reject", "ring", "--mode", "zero"))
    assert plain[0]["after"] == zero[0]["after"]
    assert rows(intervene("a.png", "--reject", "ring", "--mode", "drop", run=run))


def test_a_concept_that_every_training_image_has_cannot_be_rejected_by_statistics(
    intervene: Call, images: list[str], isolated: Path, finished_run: Path
) -> None:
    run = without_facts(finished_run, isolated / "less")
    facts = json.loads((run / SIDECAR).read_text())
    for name, table in facts["score_statistics"].items():
        if name.startswith("absent"):
            table[1] = [None] * len(table[1])
    (run / SIDECAR).write_text(json.dumps(facts))
    code, _, err = intervene("a.png", "--reject", NAMES[1], run=run)
    assert code == 2
    assert "edit.reject: no training image was without 'ring'" in err
    assert rows(intervene("a.png", "--reject", "ring", "--mode", "drop", run=run))
    assert rows(intervene("a.png", "--reject", "plus", "--confirm", "ring", run=run))
