"""Making images with a trained network: the command, its files, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moectl.diffusion.sample import _name, columns_of, labels_of
from moectl.engine import artefact
from moectl.engine.errors import UserError

FEW = ("--sampler", "ddim", "--steps", "2", "--quiet")


@pytest.fixture
def sample(diffusion, own_run):
    """Make few images with the copied run; return the document that is printed."""

    def call(*words):
        code, out, err = diffusion("sample", "--run", str(own_run), *FEW, "--json", *words)
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refused(diffusion, own_run):
    """Expect that the command is refused, and return what it says."""

    def call(*words):
        code, out, err = diffusion("sample", "--run", str(own_run), *FEW, *words)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        return err

    return call


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def image(folder, start):
    (path,) = folder.glob(f"{start}*.png")
    with Image.open(path) as found:
        assert found.mode == "RGB"
        return np.asarray(found)


def test_images_are_written_with_grid_and_record(sample, own_run, tmp_path):
    folder = tmp_path / "new" / "images"
    document = sample("--num", "12", "--save-dir", str(folder))
    names = [f"{place:05d}_{place % 10}.png" for place in range(12)]
    assert files(folder) == [*names, "grid.png", "samples.json"]
    assert image(folder, "00011").shape == (8, 8, 3)
    assert json.loads((folder / "samples.json").read_text()) == document
    assert document["run"] == str(own_run)
    assert document["folder"] == str(folder)
    assert document["weights"]["file"] == "checkpoint_epoch_2.pth"
    assert document["weights"]["ema"] is True
    expected = {
        "sampler": "ddim", "steps": 2, "eta": 0.0, "guidance": 1.0, "seed": 0, "num": 12,
        "classes": "all",
    }  # fmt: skip
    assert {key: document[key] for key in expected} == expected


def test_grid_shows_the_images_in_rows(sample):
    document = sample("--num", "12")
    with Image.open(document["grid"]) as found:
        grid = np.asarray(found)
    factor = grid.shape[1] // (10 * 10 + 2)
    small = grid[::factor, ::factor]
    assert small.shape == (2 * 10 + 2, 10 * 10 + 2, 3)
    folder = Path(document["folder"])
    for place in (0, 9, 10, 11):
        row, column = divmod(place, 10)
        top, left = 2 + 10 * row, 2 + 10 * column
        shown = small[top : top + 8, left : left + 8]
        assert np.array_equal(shown, image(folder, f"{place:05d}"))


def test_result_is_the_path_of_the_grid(diffusion, own_run):
    code, out, _ = diffusion("sample", "--run", str(own_run), *FEW, "--num", "1")
    folder = own_run / "samples" / "checkpoint_epoch_2_ddim2_cfg1_seed0"
    assert (code, out) == (0, f"{folder / 'grid.png'}\n")
    assert files(folder) == ["00000_0.png", "grid.png", "samples.json"]


def test_same_command_again_gets_a_folder_of_its_own_and_the_same_images(sample, own_run):
    found = []
    for name in ("", "-2", "-3"):
        document = sample("--num", "2", "--cfg-scale", "2.5")
        folder = own_run / "samples" / f"checkpoint_epoch_2_ddim2_cfg2.5_seed0{name}"
        assert document["folder"] == str(folder)
        assert len(files(folder)) == 4
        found.append(image(folder, "00001"))
    assert all(np.array_equal(one, found[0]) for one in found)


def test_averaged_and_last_weights_do_not_share_a_folder(sample, own_run):
    found = [sample("--num", "1", *words)["folder"] for words in ((), ("--no-ema",))]
    assert [name.rpartition("/")[2] for name in found] == [
        "checkpoint_epoch_2_ddim2_cfg1_seed0", "checkpoint_epoch_2_raw_ddim2_cfg1_seed0",
    ]  # fmt: skip


def test_array_is_laid_out_for_other_evaluators(sample, tmp_path):
    folder = tmp_path / "images"
    sample("--num", "5", "--classes", "3", "--npz", "--save-dir", str(folder))
    with np.load(folder / "samples.npz") as found:
        assert sorted(found.files) == ["arr_0", "arr_1"]
        images, labels = found["arr_0"], found["arr_1"]
    assert images.dtype == np.uint8
    assert images.shape == (5, 8, 8, 3)
    assert labels.tolist() == [3] * 5
    for place in range(5):
        assert np.array_equal(images[place], image(folder, f"{place:05d}"))


def test_image_follows_from_its_seed_and_class(sample, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    words = ("--sampler", "ddpm", "--steps", "3", "--batch", "4")
    sample("--num", "7", "--classes", "2", *words, "--save-dir", str(whole))
    sample("--num", "2", "--classes", "2", *words, "--sample-seed", "5", "--save-dir", str(part))
    assert np.array_equal(image(part, "00000"), image(whole, "00005"))
    assert np.array_equal(image(part, "00001"), image(whole, "00006"))
    assert not np.array_equal(image(part, "00000"), image(whole, "00006"))


def test_class_none_is_what_guidance_zero_makes(sample, tmp_path):
    sample("--num", "2", "--classes", "none", "--save-dir", str(tmp_path / "none"))
    sample("--num", "2", "--cfg-scale", "0", "--save-dir", str(tmp_path / "zero"))
    assert files(tmp_path / "none")[:2] == ["00000_none.png", "00001_none.png"]
    for name in ("00000", "00001"):
        assert np.array_equal(image(tmp_path / "none", name), image(tmp_path / "zero", name))


NAMES = ["cat", "dog", "7", "all"]


@pytest.mark.parametrize(
    ("classes", "num", "expected"),
    [
        ("all", 6, [0, 1, 2, 3, 0, 1]),
        ("dog", 3, [1, 1, 1]),
        ("dog,cat", 5, [1, 0, 1, 0, 1]),
        (" dog , 3 ", 2, [1, 3]),
        ("7", 1, [2]),
        ("0,0,1", 4, [0, 0, 1, 0]),
        ("all", 2, [0, 1]),
        ("none", 2, [4, 4]),
    ],
)
def test_classes_are_named_or_numbered_and_taken_in_turn(classes, num, expected):
    found = labels_of(classes, num, NAMES, guidable=True)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@pytest.mark.parametrize("classes", ["cow", "4", "-1", "cat,,dog", "", "cat,none"])
def test_unknown_classes_are_refused(classes):
    with pytest.raises(UserError, match=r"no such class") as caught:
        labels_of(classes, 3, NAMES, guidable=True)
    assert "cat, dog, 7, all" in caught.value.hint


def test_class_none_needs_a_network_that_knows_it():
    with pytest.raises(UserError, match=r"p_uncond = 0"):
        labels_of("none", 3, NAMES, guidable=False)


def test_refusals_name_what_is_wrong(refused, own_run, tmp_path):
    assert "--classes owl: no such class" in refused("--classes", "owl")
    assert "the process has 1000 steps" in refused("--steps", "1001")
    assert "sample.eta = 0.5 is for ddim, not dpmpp" in refused(
        "--eta", "0.5", "--sampler", "dpmpp"
    )
    assert not (own_run / "samples" / "checkpoint_epoch_2_ddim2_cfg1_seed0").exists()
    (tmp_path / "file").write_text("mine")
    assert "not an empty folder" in refused("--save-dir", str(tmp_path / "file"))
    assert "cannot be created" in refused("--save-dir", str(tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_with_files_is_left_alone(refused, sample, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    sample("--num", "1", "--save-dir", str(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = refused("--num", "1", "--sample-seed", "9", "--save-dir", str(folder))
    assert "exists and is not an empty folder" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_guidance_needs_a_network_that_knows_no_class(refused, own_run):
    path = own_run / "checkpoint_epoch_2.pth"
    found = artefact.load(path)
    changed = {
        name: {
            key: value[:-1] if key == "class_embed.weight" else value
            for key, value in found.payload[name].items()
        }
        for name in ("model_state_dict", "ema_state_dict")
    }
    arguments = found.facts["arguments"] | {"null_class": False}
    artefact.save(path, found.payload | changed, found.facts | {"arguments": arguments})
    assert "sample.guidance = 2: the network was trained with" in refused("--cfg-scale", "2")
    assert "sample.guidance = 0: the network was trained with" in refused("--cfg-scale", "0")
    assert "--classes none" in refused("--classes", "none")


def test_training_without_an_average_is_told(diffusion, own_run):
    path = own_run / "checkpoint_epoch_2.pth"
    found = artefact.load(path)
    artefact.save(
        path, {k: v for k, v in found.payload.items() if k != "ema_state_dict"}, found.facts
    )
    words = ("sample", "--run", str(own_run), *FEW[:-1], "--num", "1", "--json")
    code, out, err = diffusion(*words)
    assert code == 0
    assert "kept no averaged weights" in err
    assert json.loads(out)["weights"]["ema"] is False
    assert "averaged" not in diffusion(*words, "--no-ema")[2]


def test_files_stay_in_their_folder_whatever_the_classes_are_called(sample, own_run, tmp_path):
    names = ["../../up", "a/b", "C:\\x", "ä b", "..", *"56789"]
    path = own_run / "checkpoint_epoch_2.pth"
    found = artefact.load(path)
    artefact.save(path, found.payload, found.facts | {"class_names": names})
    folder = tmp_path / "images"
    sample("--num", "5", "--save-dir", str(folder))
    expected = ["00000_..-..-up", "00001_a-b", "00002_C--x", "00003_ä-b", "00004_.."]
    assert files(folder)[:5] == [f"{name}.png" for name in expected]
    assert len(files(folder)) == 7


def test_class_beyond_the_names_is_none():
    assert _name(["a"], 1) == "none"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (list(range(10)) * 3, 10),
        (list(range(4)) * 2 + [0], 4),
        ([0, 1, 2] * 5, 0),
        (list(range(25)) * 2, 0),
        ([1] * 6, 0),
        (list(range(10)), 0),
        ([5], 0),
    ],
)
def test_rows_begin_with_the_first_class_if_that_fits(labels, expected):
    assert columns_of(torch.tensor(labels)) == expected


def test_images_that_are_not_finite_are_refused(diffusion, own_run, monkeypatch):
    from moectl.diffusion import solvers

    monkeypatch.setattr(solvers, "denoise", lambda *given, **_: given[2] * float("nan"))
    code, out, err = diffusion("sample", "--run", str(own_run), *FEW, "--num", "4")
    assert (code, out) == (1, "")
    assert "images 0 to 3 hold other than finite numbers" in err


def test_images_are_written_as_they_are_made(own_run, diffusion, monkeypatch, tmp_path):
    from moectl.diffusion import solvers

    whole, calls = solvers.denoise, []

    def denoise(*given, **words):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*given, **words)

    monkeypatch.setattr(solvers, "denoise", denoise)
    folder = tmp_path / "made"
    words = ("--num", "12", "--batch", "4", "--save-dir", str(folder))
    assert diffusion("sample", "--run", str(own_run), *FEW, *words)[0] == 130
    assert len(files(folder)) == 8
