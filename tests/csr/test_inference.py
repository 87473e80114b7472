"""Opening a network: which weights, and that every way of asking it gives the same answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from moectl.csr.edits import contributions
from moectl.csr.inference import Opened, gather, last_prototypes, last_stage, open_network
from moectl.csr.settings import CsrSettings
from moectl.engine import artefact
from moectl.engine.command import Request
from moectl.engine.errors import UserError
from moectl.engine.inference import predict
from moectl.engine.settings import from_toml

if TYPE_CHECKING:
    from moectl.csr.model import Need

Call = Callable[..., tuple[int, str, str]]


def asked(folder: Path, reference: str = "", **changes: int) -> Request:
    settings = from_toml(CsrSettings, folder / "settings.toml")
    section = settings.eval.model_copy(update=changes)
    settings = settings.model_copy(update={"eval": section})
    reference = reference or str(folder)
    return Request("csr", "eval", settings, {}, "", True, None, "", folder, reference)


@pytest.fixture
def opened(finished_run: Path) -> Opened:
    return open_network(asked(finished_run))


@pytest.fixture
def copy(finished_run: Path, isolated: Path) -> Path:
    return Path(shutil.copytree(finished_run, isolated / "run"))


# Which weights


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        ("{run}", "best_model_stage3.pth"),
        ("{run}@best", "best_model_stage3.pth"),
        ("{run}@last", "final_model.pth"),
        ("{run}@2", "model_stage2_epoch2.pth"),
        ("{run}/best_model_stage1.pth", "best_model_stage1.pth"),
        ("{run}/final_model.pth", "final_model.pth"),
    ],
)
def test_a_reference_says_which_weights(finished_run: Path, reference: str, file: str) -> None:
    found = open_network(asked(finished_run, reference.format(run=finished_run)))
    facts = json.loads((finished_run / f"{file}.json").read_text())
    assert found.weights == {"file": file, "sha256": facts["sha256"], "epoch": facts["epoch"]}
    assert (found.folder, found.tag) == (finished_run, file.removesuffix(".pth"))
    state = artefact.load(finished_run / file).payload
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert not found.model.training


def test_a_run_is_taken_as_far_as_it_has_come(copy: Path) -> None:
    for other in (11, 3):  # the newest epoch by number, not by name
        shutil.copy(copy / "model_stage2_epoch2.pth", copy / f"model_stage2_epoch{other}.pth")
    (copy / "model_stage2_epoch_old.pth").touch()
    assert last_stage(copy).name == "best_model_stage3.pth"
    (copy / "best_model_stage3.pth").unlink()
    assert last_stage(copy) == last_prototypes(copy) == copy / "model_stage2_epoch11.pth"
    for path in copy.glob("model_stage2*"):
        path.unlink()
    assert last_prototypes(copy) is None
    assert last_stage(copy).name == "best_model_stage1.pth"
    (copy / "best_model_stage1.pth").unlink()
    with pytest.raises(UserError, match="no weights of any stage"):
        last_stage(copy)


def test_weights_without_a_sidecar_are_refused(copy: Path) -> None:
    (copy / "best_model_stage3.pth.json").unlink()
    with pytest.raises(UserError, match=r"has no best_model_stage3\.pth\.json of csr beside it"):
        open_network(asked(copy))


# The data


@pytest.mark.parametrize("kind", ["concepts", "targets"])
def test_data_of_other_names_is_refused(copy: Path, kind: str) -> None:
    path = copy / "best_model_stage3.pth.json"
    facts = json.loads(path.read_text())
    facts[kind][0] = "renamed"
    path.write_text(json.dumps(facts))
    found = open_network(asked(copy))
    with pytest.raises(UserError, match=rf"knows the {kind} renamed, .* the tables have"):
        found.part("test")


def test_the_images_are_those_of_the_training(opened: Opened, finished_run: Path) -> None:
    split = json.loads((finished_run / "splits.json").read_text())
    assert {name: opened.part(name).image_ids for name in split} == split
    assert opened.data.concepts == opened.concepts
    assert opened.multilabel


# Asking


def test_asking_is_calling_the_network(opened: Opened) -> None:
    part = opened.part("test")
    images = torch.stack([opened.transform(part.pixels(place))[0] for place in range(3)])
    needs: tuple[Need, ...] = ("logits", "cams", "similarity_maps")
    importance = torch.rand(3, 8, 8)
    for given in (None, importance):
        found = opened.ask(images, needs, given)
        with torch.no_grad():
            expected = opened.model(images, given, needs)
        for name, one in found._asdict().items():
            if name in needs:
                assert torch.equal(one, getattr(expected, name))
            else:
                assert one is None
    assert not torch.equal(opened.ask(images, needs).logits, found.logits)


@pytest.mark.parametrize("size", [7, 64])
def test_answers_are_outputs_in_any_batches(finished_run: Path, size: int) -> None:
    found = open_network(asked(finished_run, batch_size=size))
    part = found.part("test")
    answers = found.answers(part)
    needs: tuple[Need, ...] = (
        *("concept_logits", "cams", "similarity_scores"),
        *("similarity_maps", "logits"),
    )
    plain = found.outputs(part, needs)
    count = len(part.image_ids)
    assert answers.scores.shape == (count, 4, 5)
    pairs = {
        "concept_logits": plain.concept_logits,
        "cams": plain.cams,
        "scores": plain.similarity_scores,
        "maps": plain.similarity_maps.amax(2),
        "logits": plain.logits,
    }
    for name, expected in pairs.items():
        torch.testing.assert_close(getattr(answers, name), expected, msg=name)
    first = torch.stack([found.transform(part.pixels(place))[0] for place in range(2)])
    alone = found.ask(first, ("logits",)).logits
    torch.testing.assert_close(answers.logits[:2], alone, rtol=1e-4, atol=1e-5)


def test_several_outputs_are_gathered_in_their_forms(opened: Opened) -> None:
    part = opened.part("val")

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return images.mean((2, 3)), images[:, :, :2, :3].double(), images.amax(1)

    found = gather(forward, part.still, opened.accelerator, 5)
    whole, _ = predict(lambda batch: batch[0], part.still, opened.accelerator, 64)
    for one, expected in zip(found, forward(whole), strict=True):
        torch.testing.assert_close(one, expected.float())


def test_the_head_makes_the_logits_of_scores(opened: Opened) -> None:
    found = opened.outputs(opened.part("val"), ("similarity_scores", "logits"))
    parts = contributions(found.similarity_scores, *opened.head)
    torch.testing.assert_close(parts.logits.float(), found.logits, rtol=1e-4, atol=1e-5)
    opened.model.kept[0] = False
    parts = contributions(found.similarity_scores, *opened.head)
    assert (parts.values[:, :, 0] == 0).all()
    assert (parts.values[:, :, 1] != 0).any()


def test_what_the_last_stage_measured_comes_with_it(finished_run: Path, opened: Opened) -> None:
    facts = json.loads((finished_run / "best_model_stage3.pth.json").read_text())
    for kind, count in (("concepts", 4), ("targets", 3)):
        found = opened.thresholds(kind)  # type: ignore[arg-type]
        assert found is not None
        assert found.tolist() == facts["thresholds"][kind]
        assert len(found) == count
    assert opened.known is not None
    assert opened.known.absent_median.shape == (4, 5)
    early = open_network(asked(finished_run, f"{finished_run}/best_model_stage1.pth"))
    assert (early.known, early.thresholds("targets")) == (None, None)
