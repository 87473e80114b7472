"""Questions of the hub, read from folders that hold the same files; never the network."""

import itertools
import shutil
import socket

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from PIL import Image

from moectl.controller import hub
from moectl.engine.errors import UserError

QUESTION = {"question_id": 5, "image_id": 7, "question": "What?", "answers": ["a", "b"]}


@pytest.fixture(autouse=True)
def without_network(tmp_path, monkeypatch):
    """Keep the libraries' files in a folder of the test; refuse every connection."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def publish(tmp_path):
    """Write files of a data set, each a list of rows; every row gets an image."""

    def write(name="own", **files):
        for file, rows in files.items():
            path = tmp_path / name / f"{file.replace('__', '/')}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_list(rows)
            images = [Image.new("L", (3, 2), 10 * number) for number in range(len(rows))]
            feature = datasets.Image()
            encoded = [feature.encode_example(image) for image in images]
            table.add_column("image", encoded, feature=feature).to_parquet(path)
        return str(tmp_path / name)

    return write


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Serve a folder as somebody/set on a hub; return what was asked for."""
    asked = []

    def serve(folder, revision="main"):
        def listing(_, source, *, repo_type, revision):
            assert (source, repo_type) == ("somebody/set", "dataset")
            asked.append(("list", revision))
            found = folder.rglob("*.parquet") if revision == place else [folder / "script.py"]
            return [path.relative_to(folder).as_posix() for path in found]

        def download(source, file, *, repo_type, revision):
            assert (source, repo_type, revision) == ("somebody/set", "dataset", place)
            asked.append(("fetch", file))
            base = tmp_path / "hub" / "datasets--somebody--set"
            kept = base / "snapshots" / ("0" * 40) / file
            kept.parent.mkdir(parents=True, exist_ok=True)
            (base / "refs" / place).parent.mkdir(parents=True, exist_ok=True)
            (base / "refs" / place).write_text("0" * 40)
            return shutil.copy(folder / file, kept)

        place = revision
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return serve


def rows(numbers, **values):
    return [QUESTION | {"question_id": one, "image_id": one} | values for one in numbers]


def numbers(samples):
    return [int(one.id.rpartition("/")[2]) for one in samples]


def read(source, name="text_vqa", role="val", seed=1):
    return list(hub.pool(name, source, seed)(role))


def test_row_becomes_a_question(publish):
    source = publish(data__train=rows([3]), data__validation=rows([34602], image_id="0a1b"))
    (found,) = read(source)
    assert (found.id, found.image_id) == ("text_vqa/34602", "text_vqa/0a1b")
    assert (found.question, found.answers) == ("What?", ("a", "b"))
    assert (found.dataset, found.metric) == ("text_vqa", "vqa")
    image = found.open()
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert numbers(read(source, role="train")) == [3]


def test_images_belong_to_their_questions(publish):
    for one in read(publish(data__val=rows(range(20)))):
        assert one.open().getpixel((0, 0)) == (10 * int(one.image_id.rpartition("/")[2]),) * 3


@pytest.mark.parametrize(
    ("files", "train", "held"),
    [
        (["data/train-0", "data/validation-0", "data/test-0"], [0], [1]),
        (["data/val2014-00000-of-00002", "data/val2014-00001-of-00002"], [0, 1], [0, 1]),
        (["data/testdev-0", "data/validation-0", "data/test-0"], [1], [1]),
        (["data/test-0", "data/train-0"], [1], [1]),
        (["textvqa/test/0000", "textvqa/train/0000", "textvqa/validation/0000"], [1], [2]),
        (["0000", "0001", "test"], [0, 1], [0, 1]),
        (["data/restval-0", "data/val-0"], [1], [1]),
        (["data/all-0", "data/test-0"], [0], [0]),
        (["test-0"], [], []),
        ([], [], []),
    ],
)
def test_files_are_trained_on_or_held_out_by_their_names(files, train, held):
    assert hub._parts(files) == ([files[one] for one in train], [files[one] for one in held])


def test_order_is_shuffled_within_files_and_files_follow_one_another(publish):
    source = publish(data__val_1=rows(range(20, 40)), data__val_0=rows(range(20)))
    found = numbers(read(source))
    assert sorted(found[:20]) == list(range(20))
    assert sorted(found[20:]) == list(range(20, 40))
    assert found[:20] != list(range(20))
    assert [one + 20 for one in found[:20]] != found[20:]
    assert numbers(read(source)) == found
    assert numbers(read(source, seed=2)) != found


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["x", "", "x"], ("x", "", "x")),
        ("x", ("x",)),
        ([{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}], ("x", "y")),
        ([{"answer": "run", "raw_answer": "running"}], ("running",)),
        ({"answer": ["x", "y"], "answer_id": [1, 2]}, ("x", "y")),
    ],
)
def test_answers_come_in_many_forms(publish, answers, expected):
    (found,) = read(publish(val=rows([1], answers=answers)), "okvqa")
    assert found.answers == expected


def test_captions_are_answers_to_a_question_of_ours(publish):
    line = {"question_id": "COCO_val2014_000000000042.jpg", "question": "Please caption.", "id": 3}
    (found,) = read(publish(val=[line | {"answer": ["A dog.", "Dogs."]}]), "coco_caption")
    assert found.id == "coco_caption/COCO_val2014_000000000042.jpg"
    assert found.image_id == "coco/42"
    assert found.question == "Describe the image."
    assert (found.answers, found.metric) == (("A dog.", "Dogs."), "caption")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("coco_2014_vqa", {"question_id": 262148003, "image_id": 262148}),
        ("coco_2014_vqa", {"question_id": 262148003, "image_id": "262148"}),
        ("coco_2014_vqa", {"question_id": 262148003}),
        ("okvqa", {"question_id": "2621485"}),
        ("coco_caption", {"question_id": "COCO_val2014_000000262148.jpg"}),
        ("coco_caption", {"id": 5, "file_name": "COCO_val2014_000000262148.jpg"}),
    ],
)
def test_image_of_coco_has_one_name_in_all_sets(publish, name, values):
    (found,) = read(publish(val=[{"question": "What?", "answers": ["a"]} | values]), name)
    assert found.image_id == "coco/262148"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("text_vqa", {"answers": ["", " "]}, "row 0: no answers"),
        ("text_vqa", {"question": " "}, "row 0: no question"),
        ("text_vqa", {"image_id": None}, "row 0: no image_id"),
        (
            "okvqa",
            {"image_id": "cat.jpg"},
            "row 0: image_id = cat.jpg: expected the number of an image",
        ),
    ],
)
def test_row_that_lacks_something_is_named(publish, name, change, words):
    with pytest.raises(UserError, match=rf"val\.parquet: {words}"):
        read(publish(val=[QUESTION | change]), name)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("question", "no column question, it has question_id, image_id, answers, image"),
        ("question_id", "no column question_id or id"),
        ("image_id", "no column image_id or file_name"),
        ("answers", "no column answers or answer or captions or caption"),
    ],
)
def test_table_that_lacks_a_column_is_named(publish, lacking, words):
    row = {name: value for name, value in QUESTION.items() if name != lacking}
    with pytest.raises(UserError, match=rf"val\.parquet: {words}"):
        read(publish(val=[row]))


def test_table_without_images_is_named(tmp_path):
    datasets.Dataset.from_list([QUESTION]).to_parquet(tmp_path / "val.parquet")
    with pytest.raises(UserError, match="no column image, it has"):
        read(str(tmp_path))


def test_damaged_files_are_named(publish, tmp_path):
    (tmp_path / "val.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"val\.parquet: no readable parquet file \("):
        read(str(tmp_path))
    table = datasets.Dataset.from_list([QUESTION | {"image": {"bytes": b"no", "path": None}}])
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "val.parquet")
    (found,) = read(str(tmp_path / "set"))
    with pytest.raises(UserError, match=r"val\.parquet: row 0: not a readable image"):
        found.open()


def test_folder_without_files_says_where_they_belong(tmp_path):
    with pytest.raises(UserError, match=r"text_vqa: .* has no files to train or") as caught:
        read(str(tmp_path))
    assert "a folder that data.sources names" in caught.value.hint


def test_only_the_files_that_are_needed_are_fetched(publish, online, tmp_path, caplog):
    folder = tmp_path / "own"
    publish(data__val_0=rows(range(3)), data__val_1=rows(range(3, 6)), data__train_0=rows([9]))
    asked = online(folder)
    pool = hub.pool("text_vqa", "somebody/set", 1)
    found = pool("val")
    assert sorted(numbers(next(found) for _ in range(3))) == [0, 1, 2]
    assert asked == [("list", "main"), ("fetch", "data/val_0.parquet")]
    assert "fetching data/val_0.parquet of somebody/set from the hub" in caplog.text
    assert numbers([next(found)])[0] >= 3
    assert asked[2:] == [("fetch", "data/val_1.parquet")]


def test_file_that_is_kept_is_not_announced_again(publish, online, tmp_path, caplog):
    publish(data__val_0=rows(range(3)))
    online(tmp_path / "own")
    first = numbers(read("somebody/set"))
    caplog.clear()
    assert numbers(read("somebody/set")) == first
    assert not caplog.records


def test_set_that_is_only_a_script_is_read_from_its_conversion(publish, online, tmp_path):
    publish(textvqa__train__0000=rows([1]), textvqa__validation__0000=rows([2]))
    asked = online(tmp_path / "own", "refs/convert/parquet")
    assert numbers(read("somebody/set")) == [2]
    assert asked[:2] == [("list", "main"), ("list", "refs/convert/parquet")]


@pytest.mark.parametrize("place", ["main", "refs/convert/parquet"])
@pytest.mark.parametrize("way", ["MOECTL_OFFLINE", "HF_HUB_OFFLINE", "none"])
def test_what_was_fetched_is_read_without_a_network(
    publish, online, tmp_path, monkeypatch, caplog, way, place
):
    publish(data__val_0=rows(range(3)), data__val_1=rows(range(3, 6)))
    asked = online(tmp_path / "own", place)
    pool = hub.pool("text_vqa", "somebody/set", 1)
    expected = [one.id for one in itertools.islice(pool("val"), 3)]
    shutil.rmtree(tmp_path / "own")
    asked.clear()
    caplog.clear()

    def fail(*_, **__):
        asked.append("hub")
        raise OSError("unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    if way == "MOECTL_OFFLINE":
        monkeypatch.setenv("MOECTL_OFFLINE", "1")
    elif way == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [one.id for one in read("somebody/set")] == expected
    assert asked == (["hub"] if way == "none" else [])
    assert ("fetched before (unreachable)" in caplog.text) == (way == "none")


@pytest.mark.parametrize("network", [True, False])
def test_set_that_is_nowhere_is_one_sentence(monkeypatch, network):
    asked = []

    def fail(*_, **__):
        asked.append(1)
        raise OSError("unreachable\n today")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    if not network:
        monkeypatch.setenv("MOECTL_OFFLINE", "1")
    kept = "it was not fetched before, and MOECTL_OFFLINE forbids to fetch it"
    words = "unreachable today" if network else kept
    with pytest.raises(UserError, match=rf"text_vqa: some/set could .* \({words}\)$") as caught:
        hub.pool("text_vqa", "some/set", 1)
    assert bool(asked) == network
    assert "hf download some/set --repo-type dataset" in caught.value.hint


def test_broken_fetch_names_the_file(publish, online, tmp_path, monkeypatch):
    publish(data__val_0=rows(range(3)))
    online(tmp_path / "own")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"data/val_0\.parquet was not fetched \(disk full\)"):
        read("somebody/set")
