"""Explanations of images, from answers to printed lines."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.csr.edits import Head, Norm, contributions
from moectl.csr.explain import Choice, Known, explain, lines, run_explain, what_is_known
from moectl.csr.inference import Opened, open_network
from moectl.csr.model import Output
from moectl.csr.settings import CsrSettings
from moectl.csr.synthetic import glyphs
from moectl.engine.command import Request
from moectl.engine.errors import RunFailed, UserError
from moectl.engine.settings import resolve
from tests.faults import odd_images

Call = Callable[..., tuple[int, str, str]]

CONCEPTS, TARGETS = ["a", "b", "c"], ["yes", "no"]


def known(**changes: Any) -> Known:
    norm = Norm(torch.full((3, 2), 0.1).double(), torch.full((3, 2), 0.5).double())
    weight = torch.arange(12).view(2, 6).double() / 7 - 0.6
    head = Head(weight, torch.tensor([0.25, -0.5]).double(), norm)
    kept = torch.ones(3, 2, dtype=torch.bool)
    plain: dict[str, Any] = {
        "concepts": CONCEPTS,
        "targets": TARGETS,
        "multilabel": True,
        "head": head._replace(kept=changes.pop("kept", kept)),
        "concept_thresholds": torch.full((3,), 0.5),
        "target_thresholds": torch.full((2,), 0.5),
        "exemplars": {},
        "top_k": 5,
    }
    return Known(**(plain | changes))


def answer(scores: Any, facts: Known, logits: Any = None) -> Output:
    """What a network says that has these scores (B, 3, 2) in cell 3 of a 2 x 3 grid."""
    scores = torch.tensor(scores).float()
    maps = torch.full((*scores.shape, 2, 3), -1.0)
    maps[..., 1, 0] = scores
    if logits is None:
        logits = contributions(scores.double(), *facts.head).logits
    return Output(
        concept_logits=torch.tensor([[2.0, -2.0, 0.1]]).expand(len(scores), -1),
        similarity_maps=maps,
        similarity_scores=scores,
        logits=torch.as_tensor(logits).float(),
    )


SCORES = [[[0.2, 0.1], [0.9, 0.3], [-0.4, 0.5]], [[0.0, 0.7], [0.1, 0.2], [0.6, 0.6]]]


def explained(scores: Any = SCORES, **changes: Any) -> list[dict[str, Any]]:
    facts = known(**changes)
    return explain(answer(scores, facts), [f"i{n}" for n in range(len(scores))], facts)


def adds_up(row: dict[str, Any]) -> None:
    for target, logit in row["logits"].items():
        total = row["bias"][target] + math.fsum(row["contributions"][target].values())
        assert total == pytest.approx(logit, abs=1e-4)


@pytest.mark.parametrize("several", [True, False])
def test_bias_and_contributions_are_the_logit(several: bool) -> None:
    for row in explained(multilabel=several):
        adds_up(row)
        assert list(row["contributions"]) == TARGETS
        for one in row["concepts"]:
            for target in TARGETS:
                found = one["contributions"][target]
                assert found == row["contributions"][target][one["name"]]


def test_logits_that_do_not_add_up_are_an_error() -> None:
    facts = known()
    for wrong in ([[9.0, 9.0]], [[math.nan, 0.0]]):
        with pytest.raises(RunFailed, match="add up"):
            explain(answer(SCORES[:1], facts, wrong), ["i"], facts)


def test_most_similar_concepts_come_first_and_no_more_than_asked_for() -> None:
    first, second = explained()
    assert [one["name"] for one in first["concepts"]] == ["b", "c", "a"]
    assert [one["name"] for one in second["concepts"]] == ["a", "c", "b"]
    assert [one["similarity"] for one in first["concepts"]] == pytest.approx([0.9, 0.5, 0.2])
    assert [one["prototype"] for one in first["concepts"]] == [0, 1, 0]
    assert [one["name"] for one in explained(top_k=2)[0]["concepts"]] == ["b", "c"]


def test_equal_similarities_stay_in_the_order_of_the_concepts() -> None:
    (row,) = explained([[[0.5, 0.5]] * 3])
    assert [one["name"] for one in row["concepts"]] == CONCEPTS


def test_peak_is_the_highest_cell_as_shares_of_the_image() -> None:
    assert explained()[0]["concepts"][0]["peak"] == pytest.approx([0, 0.5, 1 / 3, 1])


def test_prototypes_that_are_not_kept_never_win() -> None:
    kept = torch.tensor([[True, True], [False, True], [False, False]])
    (row,) = explained(SCORES[:1], kept=kept, exemplars={("b", 0): {}, ("b", 1): {"n": 1}})
    assert [one["name"] for one in row["concepts"]] == ["b", "a", "c"]
    first, _, last = row["concepts"]
    assert (first["prototype"], first["exemplar"]) == (1, {"n": 1})
    assert first["similarity"] == pytest.approx(0.3)
    gone = [last[name] for name in ("similarity", "prototype", "peak", "exemplar")]
    assert gone == [None] * 4
    assert set(last["contributions"].values()) == {0}
    adds_up(row)
    json.loads(lines([row]))


def test_concepts_are_present_above_their_own_thresholds() -> None:
    sure = torch.tensor([2.0, -2.0, 0.1]).sigmoid().tolist()
    by_name = {one["name"]: one for one in explained()[0]["concepts"]}
    assert [by_name[name]["present"] for name in CONCEPTS] == [True, False, True]
    assert [by_name[name]["probability"] for name in CONCEPTS] == pytest.approx(sure)
    tuned = torch.tensor([0.9, 0.1, 0.6])
    by_name = {one["name"]: one for one in explained(concept_thresholds=tuned)[0]["concepts"]}
    assert [by_name[name]["present"] for name in CONCEPTS] == [False, True, False]


@pytest.mark.parametrize(
    ("limits", "predicted"), [((0.5, 0.5), ["yes"]), ((0.9, 0.1), ["no"]), ((0.9, 0.9), [])]
)
def test_targets_above_their_thresholds_are_predicted(
    limits: tuple[float, float], predicted: list[str]
) -> None:
    facts = known(target_thresholds=torch.tensor(limits))
    facts = known(
        target_thresholds=facts.target_thresholds,
        head=Head(torch.zeros(2, 6).double(), torch.tensor([1.0, -1.0]).double()),
    )
    (row,) = explain(answer(SCORES[:1], facts), ["i"], facts)
    assert row["prediction"] == predicted
    assert row["probabilities"]["yes"] == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize(("gap", "review"), [(0.61, True), (0.63, False), (-0.5, True)])
def test_images_near_to_another_class_need_review(gap: float, review: bool) -> None:
    head = Head(torch.zeros(2, 6).double(), torch.tensor([gap, 0.0]).double())
    (row,) = explained(SCORES[:1], head=head, multilabel=False)
    assert row["prediction"] == ("yes" if gap > 0 else "no")
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    top, other = sorted(row["probabilities"].values(), reverse=True)
    assert row["margin"] == pytest.approx(top - other)
    assert row["needs_review"] is review


def request(folder: Path, **changes: Any) -> Request:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    settings, origin = resolve(CsrSettings, named, [], [folder / "settings.toml"])
    return Request(
        room="csr",
        command="explain",
        settings=settings,
        origin=origin,
        name="explain",
        cpu=True,
        out=None,
        resume="",
        folder=folder,
        run=str(folder),
    )


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny training."""
    return shutil.copytree(finished_run, tmp_path / "runs" / "csr" / "t")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five glyphs as 16-bit PNG files, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for number, pixels in enumerate(glyphs(5, 43).images):
        values = (pixels[0] * 65535).round().astype(np.uint16)
        Image.fromarray(values).save(folder / "deep" / f"g{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_lines_and_the_document_say_what_the_network_says(
    csr: Call, finished_run: Path, images: Path
) -> None:
    words = ("explain", str(images), "--run", str(finished_run), "--cpu")
    code, out, err = csr(*words)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [f"{images}/deep/g{n}.png" for n in range(5)]
    opened = open_network(request(finished_run))
    pixels = torch.stack([opened.transform(one)[0] for one in glyphs(5, 43).images])
    with torch.no_grad():
        expected = opened.model(pixels).logits
    found = torch.tensor([[row["logits"][name] for name in opened.targets] for row in rows])
    # Files are rounded to 16 bits.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    for row in rows:
        adds_up(row)
        assert len(row["concepts"]) == 4
    code, out, _ = csr("infer", *words[1:], "--top-k", "2", "--json")
    document = json.loads(out)
    assert code == 0
    assert set(document) == {"folder", "weights", "images"}
    cut = [row | {"concepts": row["concepts"][:2]} for row in rows]
    assert document["images"] == cut


def test_small_batches_and_curated_prototypes_change_nothing_that_they_should_not(
    run: Path, images: Path
) -> None:
    choice = Choice((images,))
    (found, _), (expected, _) = (
        run_explain(request(run, eval__batch_size=size), choice) for size in (2, 64)
    )
    for one, other in zip(found["images"], expected["images"], strict=True):
        assert one["logits"] == pytest.approx(other["logits"], abs=1e-5)
        assert [c["name"] for c in one["concepts"]] == [c["name"] for c in other["concepts"]]
    opened = open_network(request(run))
    opened.model.kept[1, :3] = False
    pixels = opened.transform(opened.read(images / "deep" / "g0.png"))[0][None]
    needs: Any = ("concept_logits", "similarity_maps", "similarity_scores", "logits")
    (row,) = explain(opened.ask(pixels, needs), ["g0"], what_is_known(opened, 4))
    adds_up(row)
    by_name = {one["name"]: one["prototype"] for one in row["concepts"]}
    assert by_name[opened.concepts[1]] >= 3
    assert row["logits"] != expected["images"][0]["logits"]


def test_files_need_no_data(
    finished_run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Opened, "data")
    document, unreadable = run_explain(request(finished_run), Choice((images,)))
    assert (len(document["images"]), unreadable) == (5, 0)


def test_images_of_the_data_go_by_their_ids(csr: Call, finished_run: Path) -> None:
    words = ("explain", "--run", str(finished_run), "--cpu", "--id")
    code, out, _ = csr(*words, "glyph_000003", "--id", "glyph_000001", "--id", "glyph_000003")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, [row["image"] for row in rows]) == (0, ["glyph_000003", "glyph_000001"])
    opened = open_network(request(finished_run))
    logits = opened.outputs(opened.part("test"), ("logits",)).logits[[3, 1]]
    for row, expected in zip(rows, logits.tolist(), strict=True):
        assert list(row["logits"].values()) == pytest.approx(expected, abs=1e-5)
    code, out, err = csr(*words, "glyph_000999")
    assert (code, out) == (2, "")
    assert "'glyph_000999': not among the 40 test images" in err
    name = open_network(request(finished_run)).part("val").image_ids[0]
    assert csr(*words, name, "--split", "val")[0] == 0


def test_one_broken_file_does_not_keep_back_the_others(
    csr: Call, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(images, tmp_path / "some")
    for name in odd_images.BROKEN:
        odd_images.write(folder / "deep", name)
    (folder / "deep" / "g1.png").write_bytes(b"broken")
    words = ("explain", str(folder), "--run", str(finished_run), "--cpu")
    code, out, err = csr(*words, "--set", "eval.batch_size=2")
    names = [Path(json.loads(line)["image"]).name for line in out.splitlines()]
    assert (code, names) == (1, ["g0.png", "g2.png", "g3.png", "g4.png"])
    said = {f"warning: {folder}/deep/{name}: {text}" for name, text in odd_images.BROKEN.items()}
    assert {*said, f"warning: {folder}/deep/g1.png: not a readable image"} < {*err.splitlines()}
    broken = 1 + len(odd_images.BROKEN)
    assert f"{broken} of {broken + 4} images could not be read" in err
    code, out, err = csr("explain", f"{folder}/deep/g1.png", *words[2:], "--json")
    assert (code, out) == (1, "")


def test_16_bits_are_scaled_and_not_cut(finished_run: Path, images: Path, tmp_path: Path) -> None:
    values = np.asarray(Image.open(images / "deep" / "g0.png")) // 257
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((values * 257).astype(np.uint16)).save(tmp_path / "16.png")
    rows = run_explain(request(finished_run), Choice((tmp_path,)))[0]["images"]
    assert [Path(row.pop("image")).name for row in rows] == ["16.png", "8.png"]
    assert rows[0]["logits"] == pytest.approx(rows[1]["logits"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to explain"),
        (("nowhere.png",), "nowhere.png: no such image or folder"),
        (("empty",), "empty: no image in it"),
        (("--top-k", "0"), "top-k"),
        (("--threshold", "1.5"), "threshold"),
        (("here", "--panel", "here/notes.txt"), "here/notes.txt: no folder"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: tuple[str, ...],
    message: str,
    csr: Call,
    finished_run: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    code, out, err = csr("explain", *words, "--run", str(finished_run), "--cpu")
    assert (code, out) == (2, "")
    assert message in err


def test_a_network_without_verdict_has_nothing_to_explain(
    csr: Call, finished_run: Path, images: Path
) -> None:
    weights = finished_run / "model_stage2_epoch2.pth"
    code, out, err = csr("explain", str(images), "--run", str(weights), "--cpu")
    assert (code, out) == (2, "")
    assert "of stage prototype" in err


def test_thresholds_are_those_given_or_the_tuned_ones(run: Path, images: Path) -> None:
    path = run / "best_model_stage3.pth.json"
    facts = json.loads(path.read_text())
    facts["thresholds"] = {"targets": [1.0, 0.0, 1.0], "concepts": [0.0, 1.0, 0.0, 1.0]}
    path.write_text(json.dumps(facts))
    rows = run_explain(request(run), Choice((images,)))[0]["images"]
    for row in rows:
        assert row["prediction"] == [facts["targets"][1]]
        present = {one["name"]: one["present"] for one in row["concepts"]}
        assert [present[name] for name in facts["concepts"]] == [True, False, True, False]
    rows = run_explain(request(run), Choice((images,), threshold=0.0))[0]["images"]
    assert all(row["prediction"] == facts["targets"] for row in rows)


def test_a_threshold_means_nothing_with_one_class_per_image(
    finished_run: Path, images: Path
) -> None:
    wanted = request(finished_run)
    data = wanted.settings.data.model_copy(update={"task_mode": "multiclass"})  # type: ignore[attr-defined]
    wanted = replace(wanted, settings=wanted.settings.model_copy(update={"data": data}))
    with pytest.raises(UserError, match="one target each"):
        run_explain(wanted, Choice((images,), threshold=0.4))


def test_exemplars_are_those_of_the_atlas_of_the_same_weights(
    csr: Call, run: Path, images: Path
) -> None:
    words = ("explain", f"{images}/deep/g0.png", "--run", str(run), "--cpu")
    _, out, err = csr(*words)
    assert [one["exemplar"] for one in json.loads(out)["concepts"]] == [None] * 4
    assert err.count("moectl csr atlas makes it") == 1
    csr("atlas", "--run", str(run), "--cpu")
    atlas = json.loads((run / "atlas.json").read_text())
    best = {(one["concept"], one["index"]): one["exemplars"][0] for one in atlas["prototypes"]}
    _, out, err = csr(*words)
    for one in json.loads(out)["concepts"]:
        expected = best[one["name"], one["prototype"]]
        del expected["row"]
        assert one["exemplar"] == expected
    assert "csr atlas" not in err
    atlas["weights"]["sha256"] = "another"
    (run / "atlas.json").write_text(json.dumps(atlas))
    _, out, err = csr(*words)
    assert [one["exemplar"] for one in json.loads(out)["concepts"]] == [None] * 4
    assert "no exemplars" in err
