"""Curation files: written for a person, read with care."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moectl.csr import curation
from moectl.csr.backbones import build_backbone
from moectl.csr.model import CSRNet
from moectl.engine.errors import UserError

NAMES = ["Nodule/Mass", "Edema"]
Write = Callable[[str], Path]


def entry(concept: str = "Edema", index: object = 0, keep: str = "true", more: str = "") -> str:
    lines = (f'concept = "{concept}"', f"index = {index}", f"keep = {keep}", more)
    return "\n".join(["[[prototypes]]", *lines, ""])


@pytest.fixture
def file(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def small_network() -> CSRNet:
    backbone = build_backbone("tiny", "", pretrained=False, image_size=64, allow_pickle=False)
    return CSRNet(backbone, concepts=2, prototypes=3, classes=2, projection=4)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    kept = torch.tensor([[True, False, True], [False, True, True]])
    rows = [
        {"concept": name, "index": index, "keep": bool(kept[place, index]), "hits": 3}
        for place, name in enumerate(NAMES)
        for index in range(3)
    ]
    curation.write(tmp_path / "c.toml", rows, "abc")
    assert torch.equal(curation.read(tmp_path / "c.toml", NAMES, 3), kept)
    assert torch.equal(curation.read(tmp_path / "c.toml", NAMES, 3, "abc"), kept)


def test_a_person_is_told_what_the_atlas_knows(tmp_path: Path) -> None:
    known = {"hits": 7, "out_of_box": 0.8, "reliance": None, "suspect": True, "exemplars": [1]}
    curation.write(tmp_path / "c.toml", [{"concept": "Edema", "index": 1, "keep": True, **known}])
    text = (tmp_path / "c.toml").read_text()
    (table,) = tomllib.loads(text)["prototypes"]
    assert table == {"concept": "Edema", "index": 1, "keep": True, "hits": 7, "out_of_box": 0.8}
    assert "a shortcut?\n[[prototypes]]" in text
    assert "--curation" in text


def test_prototypes_that_are_not_listed_are_kept(file: Write) -> None:
    kept = curation.read(file(entry(index=2, keep="false")), NAMES, 3)
    assert kept.tolist() == [[True] * 3, [True, True, False]]
    assert curation.read(file(""), NAMES, 3).all()


def test_names_may_be_spelt_with_other_case_and_spaces(file: Write) -> None:
    kept = curation.read(file(entry("nodule / mass", 0, "false")), NAMES, 3)
    assert kept.tolist() == [[False, True, True], [True] * 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (entry("Oedema"), "prototypes[0].concept is 'Oedema', expected one of Nodule/Mass, Edema"),
        (entry() + entry(index=3), "prototypes[1].index is 3, expected 0 to 2"),
        (entry(index=-1), "prototypes[0].index is -1, expected 0 to 2"),
        (entry(index=1.0), "prototypes[0].index is 1.0, expected 0 to 2"),
        (entry(index="true"), "prototypes[0].index is True, expected 0 to 2"),
        (entry(keep="1"), "prototypes[0].keep is 1, expected true or false"),
        (entry(keep='"no"'), "prototypes[0].keep is 'no', expected true or false"),
        (entry() + entry("EDEMA"), "prototypes[1]: 'Edema' 0 is listed twice"),
        (entry(more="kept = true"), "prototypes[0].kept: no such field; there are concept, index"),
        ('[[prototypes]]\nconcept = "Edema"\nindex = 0', "prototypes[0]: has no keep, expected"),
        ("[prototypes]\n", "prototypes is no list, expected tables headed [[prototypes]]"),
        ("prototypes = [1]", "prototypes[0] is 1, expected a table"),
        ("network = 3", "network is 3, expected text"),
        ("prototype = []", "prototype: no such field; there are network, prototypes"),
        ("keep = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(file: Write, text: str, message: str) -> None:
    path = file(text)
    with pytest.raises(UserError) as caught:
        curation.read(path, NAMES, 3)
    assert str(path) in caught.value.message
    assert message in caught.value.message


def test_keeping_nothing_is_refused(file: Write) -> None:
    nothing = "".join(entry(name, index, "false") for name in NAMES for index in range(2))
    with pytest.raises(UserError, match="keeps no prototype at all"):
        curation.read(file(nothing), NAMES, 2)


@pytest.mark.parametrize("make", ["missing", "folder", "latin"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: str) -> None:
    path = tmp_path / "c.toml"
    if make == "folder":
        path.mkdir()
    elif make == "latin":
        path.write_bytes(b"# Gr\xf6sse")
    with pytest.raises(UserError, match=r"c\.toml: (cannot be read|not UTF-8)"):
        curation.read(path, NAMES, 3)


def test_decisions_about_another_network_are_refused(file: Write) -> None:
    path = file('network = "aaaa"\n' + entry(keep="false"))
    assert not curation.read(path, NAMES, 3, "aaaa").all()
    assert not curation.read(path, NAMES, 3).all(), "who asks for none takes any"
    with pytest.raises(UserError, match=r"prototypes of another network, aaaa…, expected .* bbbb"):
        curation.read(path, NAMES, 3, "bbbb")


def test_a_file_of_another_network_that_keeps_all_decides_nothing(file: Write) -> None:
    assert curation.read(file('network = "aaaa"\n' + entry()), NAMES, 3, "bbbb").all()


def test_many_prototypes_fit(tmp_path: Path) -> None:
    rows = [{"concept": "Edema", "index": index, "keep": index != 5} for index in range(2000)]
    curation.write(tmp_path / "c.toml", rows)
    assert curation.read(tmp_path / "c.toml", NAMES, 2000).sum() == 3999


def test_the_fingerprint_is_that_of_the_prototypes_and_not_of_the_verdict() -> None:
    model = small_network()
    before = curation.fingerprint(model)
    assert curation.fingerprint(small_network()) != before
    with torch.no_grad():
        model.task_head.weight.add_(1)
        model.task_mean.add_(1)
        model.kept[0, 0] = False
    assert curation.fingerprint(model) == before
    with torch.no_grad():
        model.prototypes[0, 0] += 1
    assert curation.fingerprint(model) != before
