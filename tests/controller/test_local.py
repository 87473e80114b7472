"""Questions from files: what is read of a line, and what is said about a wrong one."""

import json

import pytest
from PIL import Image

from moectl.controller import local
from moectl.engine.errors import UserError

LINE = {"id": 1, "image": "a.png", "question": "What?", "answers": ["this", "that"]}


@pytest.fixture
def root(tmp_path):
    """A folder with two images."""
    for name, colour in (("a.png", (255, 0, 0)), ("in/b.png", (0, 0, 255))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), colour).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def read(root):
    """Read lines, objects or raw text, as a file of questions; return them by id."""

    def call(*lines, name="q.jsonl", seed=1):
        file = root / name
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file.write_text(text, encoding="utf-8")
        return {one.id: one for one in local.jsonl(file, root, seed)("train")}

    return call


def without(key):
    return {name: value for name, value in LINE.items() if name != key}


def test_line_becomes_a_question(read):
    found = read(LINE | {"id": "x/7", "image": "./in/b.png"})["jsonl/x/7"]
    assert found.image_id == "file/in/b.png"
    assert (found.question, found.answers) == ("What?", ("this", "that"))
    assert found.dataset == "vqa"
    image = found.open()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), (0, 0, 255))


@pytest.mark.parametrize(
    ("change", "metric", "dataset"),
    [
        ({"answers": ["one"]}, "vqa", "vqa"),
        ({"answers": ["one"] * 10}, "vqa", "vqa"),
        ({"answers": ["one", "two"]}, "exact", "vqa"),
        ({"answers": ["one", "two"], "metric": "anls"}, "anls", "vqa"),
        ({"answers": ["one", "two"], "metric": "caption"}, "caption", "coco_caption"),
    ],
)
def test_metric_is_given_or_goes_with_the_answers(read, change, metric, dataset):
    found = read(LINE | change)["jsonl/1"]
    assert (found.metric, found.dataset) == (metric, dataset)


@pytest.mark.parametrize("key", ["captions", "caption"])
def test_captions_need_no_question(read, key):
    line = without("question")
    del line["answers"]
    given = ["A dog.", "Dogs."] if key == "captions" else "A dog."
    found = read(line | {key: given})["jsonl/1"]
    assert found.answers == (("A dog.", "Dogs.") if key == "captions" else ("A dog.",))
    assert (found.metric, found.dataset) == ("caption", "coco_caption")
    assert found.question == "Describe the image."
    assert read(line | {key: given, "question": "Why?"})["jsonl/1"].question == "Why?"


def test_file_may_have_a_mark_in_front_blank_lines_and_other_separators(read, root):
    line = json.dumps(LINE | {"question": "a\u2028b"}, ensure_ascii=False)
    found = read("\ufeff", line, "", "  ", json.dumps(LINE | {"id": 2}))
    assert sorted(found) == ["jsonl/1", "jsonl/2"]
    assert found["jsonl/1"].question == "a\u2028b"


def test_answer_and_question_id_are_accepted(read):
    line = {"question_id": 0, "image": "a.png", "question": "what?", "answer": "red"}
    assert read(line)["jsonl/0"].answers == ("red",)
    assert list(read(line | {"id": 5})) == ["jsonl/5"]


def test_order_goes_with_the_seed(read):
    lines = [LINE | {"id": number} for number in range(30)]
    first = list(read(*lines))
    assert sorted(first) == sorted(f"jsonl/{number}" for number in range(30))
    assert list(read(*lines)) == first
    assert list(read(*lines, seed=2)) != first


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", r"no JSON \(Expecting property name.* at column 2\)"),
        ("[1]", r"\[1\]: expected an object"),
        (without("id"), "no id"),
        (without("image"), "no image"),
        (without("question"), "no question"),
        (without("answers"), r"no answers \(or captions\)"),
        (LINE | {"id": True}, "id = true: expected a text"),
        (LINE | {"id": 1.5}, r"id = 1\.5: expected a text"),
        (LINE | {"image": 3}, "image = 3: expected a text"),
        (LINE | {"question": " "}, 'question = " ": expected a text'),
        (LINE | {"answers": []}, "answers is empty"),
        (LINE | {"answers": ["", " "]}, "answers is empty"),
        (LINE | {"answers": None}, "answers = null: expected a text, or a list of texts"),
        (LINE | {"answers": ["a", 1]}, r'answers = \["a", 1\]: expected a text, or a list'),
        (LINE | {"metric": "bleu"}, 'metric = "bleu": expected vqa, exact, anls, caption'),
        (LINE | {"metric": ["vqa"]}, r'metric = \["vqa"\]: expected vqa'),
        (LINE | {"image": "../q.png"}, r'image = "\.\./q\.png": expected a path within /'),
        (LINE | {"image": "in/../../q.png"}, "expected a path within"),
        (LINE | {"image": "/etc/passwd"}, "expected a path within"),
        (LINE | {"image": "c.png"}, r"c\.png: no such image"),
        (LINE | {"image": "in"}, "in: no such image"),
        (LINE | {"image": "a\0.png"}, "no such image"),
        (LINE | {"image": "x" * 300}, r"cannot be read \(File name too long\)"),
        (LINE | {"id": 99}, "the id of line 1 again"),
    ],
)
def test_wrong_line_is_named(read, line, words):
    with pytest.raises(UserError, match=rf"q\.jsonl: line 3: .*{words}") as caught:
        read(LINE | {"id": 99}, "", line)
    assert '"answers": ["this"]' in caught.value.hint


def test_long_values_are_cut(read):
    with pytest.raises(UserError) as caught:
        read(LINE | {"metric": "x" * 500})
    assert "…" in caught.value.message
    assert len(caught.value.message.partition("line 1")[2]) < 150


def test_file_that_cannot_be_read_is_named(root):
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read \(No such file"):
        local.jsonl(root / "no.jsonl", root, 1)
    (root / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8 text \(byte 8\)"):
        local.jsonl(root / "latin.jsonl", root, 1)
    with pytest.raises(UserError, match=r"jsonl needs data\.file"):
        local.jsonl(None, root, 1)


def test_damaged_image_is_named_when_it_is_opened(read, root):
    (root / "bad.png").write_bytes(b"no image")
    found = read(LINE | {"image": "bad.png"})["jsonl/1"]
    with pytest.raises(UserError, match=r"bad\.png: not a readable image"):
        found.open()


def easy(root, train, test):
    for part, images in (("train", train), ("test", test)):
        lines = [
            {"question_id": number, "image": image, "question": "what?", "answer": "red"}
            for number, image in enumerate(images)
        ]
        (root / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_easy_folder_trains_on_one_file_and_holds_out_the_other(root):
    easy(root, ["a.png"] * 3, ["in/b.png"] * 2)
    pool = local.easy_vqa(root, 1)
    assert sorted(one.id for one in pool("train")) == [f"easy_vqa/train/{n}" for n in range(3)]
    for role in ("val", "test"):
        assert sorted(one.id for one in pool(role)) == [f"easy_vqa/test/{n}" for n in range(2)]
    assert {one.metric for one in pool("train")} == {"vqa"}
    assert {one.dataset for one in pool("val")} == {"vqa"}


def test_easy_folder_with_a_shared_image_is_refused(root):
    easy(root, ["a.png"], ["in/b.png", "./a.png"])
    with pytest.raises(UserError, match=r"a\.png is in train\.jsonl and in test\.jsonl"):
        local.easy_vqa(root, 1)


def test_missing_easy_folder_is_named(root):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        local.easy_vqa(root / "nowhere", 1)
    with pytest.raises(UserError, match=r"train\.jsonl: cannot be read"):
        local.easy_vqa(root, 1)
