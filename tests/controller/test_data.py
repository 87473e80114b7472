"""How questions are shared out among training, validation and evaluation."""

import json
import os
import socket
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from moectl.controller import data as module
from moectl.controller.data import load, load_test
from moectl.controller.samples import Sample
from moectl.controller.settings import DataSection
from moectl.controller.synth import draw
from moectl.engine.errors import UserError


@pytest.fixture
def jsonl(tmp_path):
    """Write questions about so many images, several about each; return the settings."""

    def write(images=40, each=2, **values):
        lines = []
        for number in range(images):
            Image.new("RGB", (2, 2)).save(tmp_path / f"{number}.png")
            lines += [
                {"id": each * number + one, "image": f"{number}.png", "question": "What?",
                 "answers": f"answer {number}"}
                for one in range(each)
            ]  # fmt: skip
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        given = {"dataset": ("jsonl",), "file": tmp_path / "q.jsonl", "root": tmp_path}
        counts = {"train_samples": 20, "val_samples": 10, "test_samples": 8}
        return DataSection(**given | counts | values)

    return write


@pytest.fixture
def pools(monkeypatch):
    """Give each data set of these names the questions listed: image ids."""

    def put(**images):
        def pool(section, name, seed):
            return lambda _: (
                Sample(f"{name}/{number}", image, "?", ("a",), "vqa", "vqa", lambda: None)
                for number, image in enumerate(images[name])
            )

        monkeypatch.setattr(module, "_pool", pool)

    return put


def section(*names, train=20, val=10, test=8, **values):
    counts = {"train_samples": train, "val_samples": val, "test_samples": test}
    return DataSection(dataset=names, **counts | values)


def ids(samples):
    return [sample.id for sample in samples]


def images(samples):
    return {sample.image_id for sample in samples}


def test_no_image_has_two_uses(jsonl):
    for seed in range(5):
        settings = jsonl()
        found = load(settings, seed)
        test = load_test(settings, seed)
        assert [len(found.train), len(found.val), len(test)] == [20, 10, 8]
        assert not images(found.train) & images(found.val)
        assert not images(test) & (images(found.train) | images(found.val))


def test_same_seed_gives_the_same_questions_whatever_was_drawn_elsewhere(jsonl):
    settings = jsonl()
    torch.manual_seed(1)
    first, test = load(settings, 3), load_test(settings, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = load(settings, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(again.train) == ids(first.train)
    assert ids(again.val) == ids(first.val)
    assert again.facts == first.facts
    assert ids(load_test(settings, 3)) == ids(test)
    assert ids(load(settings, 4).val) != ids(first.val)


def test_validation_does_not_go_with_training(jsonl):
    first, more = load(jsonl(), 1), load(jsonl(train_samples=40), 1)
    assert ids(more.val) == ids(first.val)
    assert ids(more.train)[:20] == ids(first.train)
    assert len(more.train) == 40


def test_evaluation_on_more_begins_with_the_same(jsonl):
    first, more = load_test(jsonl(), 1), load_test(jsonl(test_samples=16), 1)
    assert ids(more)[:8] == ids(first)
    assert len(more) == 16


def test_splits_that_are_not_wanted_stay_empty(jsonl):
    settings = jsonl()
    whole = load(settings, 1)
    only = load(settings, 1, ("train",))
    assert (ids(only.train), only.val) == (ids(whole.train), [])
    assert only.facts["samples"] == {"train": 20, "val": 0}
    only = load(settings, 1, ("val",))
    assert (only.train, ids(only.val)) == ([], ids(whole.val))


def test_training_is_not_looked_at_when_only_validation_is_wanted(pools):
    pools(okvqa=["one", "two"])
    assert len(load(section("okvqa", train=5, val=2), 1, ("val",)).val) == 2
    with pytest.raises(UserError, match=r"okvqa: no questions for data\.train_samples = 5"):
        load(section("okvqa", train=5, val=2), 1)


def test_facts_name_sets_numbers_and_contents(jsonl):
    facts = load(jsonl(), 1).facts
    assert facts["dataset"] == ["jsonl"]
    assert facts["samples"] == {"train": 20, "val": 10}
    assert len(facts["digest"]) == 16
    int(facts["digest"], 16)
    json.dumps(facts)
    assert load(jsonl(), 2).facts["digest"] != facts["digest"]


def test_digest_goes_with_answers(jsonl):
    settings = jsonl()
    first = load(settings, 1).facts["digest"]
    settings.file.write_text(settings.file.read_text().replace("answer ", "reply "))
    assert load(settings, 1).facts["digest"] != first


def test_several_sets_take_turns_and_all_are_used(pools):
    names = ("okvqa", "jsonl", "text_vqa")
    pools(**{name: [f"{name}{number}" for number in range(20)] for name in names})
    found = load(section(*names, train=8, val=4), 1)
    assert [one.partition("/")[0] for one in ids(found.val)] == [*names, "okvqa"]
    assert Counter(one.partition("/")[0] for one in ids(found.train)) == {
        "okvqa": 3,
        "jsonl": 3,
        "text_vqa": 2,
    }
    assert found.facts["dataset"] == list(names)


def test_image_of_two_sets_has_one_use(pools):
    shared = [f"coco/{number}" for number in range(12)]
    pools(okvqa=shared, coco_2014_vqa=shared[::-1])
    settings = section("okvqa", "coco_2014_vqa", train=4, val=4, test=4)
    found = load(settings, 1)
    parts = [images(found.val), images(found.train), images(load_test(settings, 1))]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert len(set.union(*parts)) == 12


def test_too_few_questions_are_told(jsonl, caplog):
    found = load(jsonl(images=6, each=2, val_samples=4), 1)
    assert len(found.val) == 4
    assert 0 < len(found.train) < 20
    assert f"jsonl: {len(found.train)} of 20 train questions" in caplog.text


def test_short_set_leaves_turns_to_the_others(pools, caplog):
    pools(okvqa=["a", "b"], text_vqa=[f"t{number}" for number in range(9)])
    found = load(section("okvqa", "text_vqa", train=6, val=2), 1)
    assert ids(found.train) == ["okvqa/1", "text_vqa/1", "text_vqa/2", "text_vqa/3"]
    assert "okvqa: 1 of 3 train questions" in caplog.text


def test_empty_set_is_refused(jsonl, pools):
    with pytest.raises(UserError, match=r"jsonl: no questions for data\.val_samples = 10"):
        load(jsonl(images=0), 1)
    with pytest.raises(UserError, match=r"jsonl: no questions for data\.test_samples = 8"):
        load_test(jsonl(images=10, each=1, train_samples=5, val_samples=5), 1)
    pools(okvqa=["a"] * 9, text_vqa=[])
    with pytest.raises(UserError, match=r"text_vqa: no questions for data\.val_samples = 2"):
        load(section("okvqa", "text_vqa", val=2), 1)


def test_more_sets_than_questions_are_refused(pools):
    pools(okvqa=["a"], text_vqa=["b"], jsonl=["c"])
    with pytest.raises(UserError, match=r"data\.val_samples = 2 .* okvqa, text_vqa, jsonl: exp"):
        load(section("okvqa", "text_vqa", "jsonl", val=2), 1)


def test_same_id_twice_is_refused(pools, monkeypatch):
    twice = [Sample("okvqa/1", name, "?", ("a",), "okvqa", "vqa", lambda: None) for name in "ab"]
    monkeypatch.setattr(module, "_pool", lambda *_: lambda _: iter(twice))
    with pytest.raises(UserError, match="okvqa/1: two questions have this id"):
        load(section("okvqa", val=2), 1, ("val",))


def test_synthetic_pictures_have_one_use_whatever_the_numbers():
    settings = section("synth_vqa")
    found, test = load(settings, 5), load_test(settings, 5)
    more = load(section("synth_vqa", train=30, val=3), 5)
    assert ids(more.train)[:20] == ids(found.train)
    assert ids(more.val) == ids(found.val)[:3]
    assert ids(load_test(section("synth_vqa", train=90), 5)) == ids(test)
    assert not images(more.train) & images(found.val)
    assert len(images(found.train) | images(found.val) | images(test)) == 19


def test_synthetic_question_is_that_of_its_picture():
    for sample in load(section("synth_vqa"), 5).val:
        drawn = draw(int(sample.id.removeprefix("synth_vqa/")), 5)
        assert (sample.question, sample.answers) == (drawn.question, (drawn.answer,))
        assert sample.open().tobytes() == drawn.image.tobytes()
        assert (sample.metric, sample.dataset) == ("vqa", "vqa")


def test_set_of_the_hub_comes_from_the_place_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))
    datasets.disable_progress_bars()
    feature = datasets.Image()
    image = feature.encode_example(Image.new("RGB", (2, 2)))
    rows = [
        {"question_id": 10 * number, "question": "What?", "answers": ["a"]} for number in range(30)
    ]
    table = datasets.Dataset.from_list(rows).add_column("image", [image] * 30, feature=feature)
    (tmp_path / "ok").mkdir()
    table.to_parquet(tmp_path / "ok" / "val2014-00000.parquet")
    settings = section("okvqa", sources=(f"okvqa={tmp_path / 'ok'}", "text_vqa=some/other"))
    found, test = (
        load(settings, 1),
        load_test(section("okvqa", sources=settings.sources, train=5), 1),
    )
    datasets.enable_progress_bars()
    assert len(images(found.train) | images(found.val)) == 30
    assert len(test) == 8
    assert found.val[0].open().size == (2, 2)


def test_real_shapes_are_shared_out(root):
    place = Path(os.environ.get("MOECTL_TEST_DATA") or root.parent / "shared" / "data")
    folder = place / "vqa" / "easy"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing; MOECTL_TEST_DATA names the folder of data sets")
    settings = section("easy_vqa", train=200, val=50, test=100, root=folder)
    found, test = load(settings, 1), load_test(settings, 1)
    assert [len(found.train), len(found.val), len(test)] == [200, 50, 100]
    assert {one.image_id.split("/")[2] for one in found.train} == {"train"}
    assert {one.image_id.split("/")[2] for one in found.val + test} == {"test"}
    assert not images(found.val) & images(test)
    assert found.train[0].open().size == (64, 64)
