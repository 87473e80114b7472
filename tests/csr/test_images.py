"""Images from files."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moectl.csr.boxes import Resize, read_resize_table
from moectl.csr.images import find_image, image_size, preprocess, read_image
from moectl.csr.tables import read_labels
from moectl.engine.errors import UserError


def ramp(bits):
    """All brightnesses, dark to bright."""
    side = 2 ** (bits // 2)
    return np.arange(2**bits).reshape(side, side).astype(np.uint16 if bits == 16 else np.uint8)


@pytest.fixture
def save(tmp_path):
    def file(pixels, name="x.png", **options):
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return file


@pytest.fixture(scope="session")
def real(root):
    """The folder of real data sets."""
    place = Path(os.environ.get("MOECTL_TEST_DATA") or root.parent / "shared" / "data")
    if not (place / "wbc").is_dir() or not (place / "chest").is_dir():
        pytest.skip(f"{place} has no wbc and chest; MOECTL_TEST_DATA names the folder of data sets")
    return place


@pytest.mark.parametrize(
    ("name", "table", "side"), [("wbc", "labels_val.csv", 128), ("chest", "labels_test.csv", 64)]
)
def test_real_images_are_found_and_read(real, name, table, side):
    folder = real / name / "images" / table.removeprefix("labels_").removesuffix(".csv")
    for image_id in read_labels(real / name / table).image_ids[::60]:
        path = find_image(folder, image_id)
        image = read_image(path, "rgb")
        assert image.shape == (3, side, side)
        assert image_size(path) == (side, side)
        assert image.std() > 0.02
        assert (name == "chest") == bool((image == image[0]).all())


def test_8_bits_are_divided_by_255(save):
    image = read_image(save(ramp(8)))
    assert image.shape == (3, 16, 16)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[0], ramp(8).astype(np.float32) / np.float32(255))
    assert (image == image[0]).all()


def test_16_bits_are_divided_by_65535_and_not_clipped(save):
    image = read_image(save(ramp(16)))
    np.testing.assert_array_equal(image[0], ramp(16).astype(np.float32) / np.float32(65535))
    assert (image.min(), image.max()) == (0, 1)
    assert len(np.unique(image)) == 65536


def test_16_bits_equal_their_twin_of_8_bits(save):
    fine, coarse = (read_image(save(pixels)) for pixels in (ramp(16), (ramp(16) >> 8).astype("u1")))
    assert np.abs(fine - coarse).max() < 1 / 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colour_is_kept_or_becomes_brightness(save, mode):
    pixels = np.full((4, 5, 3), (255, 51, 0), np.uint8)
    path = save(Image.fromarray(pixels).convert(mode), f"x.{'jpg' if mode == 'CMYK' else 'png'}")
    tolerance = 0.02 if mode == "CMYK" else 1e-6
    colour = read_image(path, "rgb")
    np.testing.assert_allclose(colour[:, 0, 0], [1, 0.2, 0], atol=tolerance)
    assert colour.shape == (3, 4, 5)
    np.testing.assert_allclose(read_image(path), 0.299 + 0.587 * 0.2, atol=tolerance)


def test_transparency_is_ignored(save):
    pixels = np.dstack([np.full((2, 2, 3), 102, np.uint8), np.array([[0, 255]] * 2, np.uint8)])
    np.testing.assert_allclose(read_image(save(pixels)), 0.4, atol=1e-6)
    np.testing.assert_allclose(read_image(save(pixels[..., 2:]), "rgb"), 0.4, atol=1e-6)
    palette = Image.fromarray(pixels[..., :3]).quantize(2)
    path = save(palette, transparency=b"\x00\xff")
    np.testing.assert_allclose(read_image(path), 0.4, atol=1e-6)


def test_grey_stored_as_colour_is_exact(save):
    grey = ramp(8)
    colour = save(np.dstack([grey] * 3), "colour.png")
    np.testing.assert_array_equal(read_image(colour), read_image(save(grey)))


def test_one_bit_is_black_and_white(save):
    image = read_image(save(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")))
    assert image[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_truncated_image_is_an_error_never_black(save, name):
    draws = np.random.default_rng(0)
    path = save(draws.integers(0, 255, (300, 300)).astype(np.uint8), name)
    content = path.read_bytes()
    for part in (0.0, 0.01, 0.3, 0.7, 0.99):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(UserError, match=rf"{name}: not a readable image"):
            read_image(path)


@pytest.mark.parametrize("pixels", [np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])])
def test_pixels_of_unknown_range_are_refused(save, pixels):
    with pytest.raises(UserError, match="not a readable image"):
        read_image(save(pixels, "x.tif"))


def test_text_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png: not a readable image"):
        read_image(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"y\.png: no such image"):
        image_size(tmp_path / "y.png")


def test_lookup_tries_suffixes_in_order(tmp_path):
    names = ["x.png", "x.jpg", "x.jpeg", "x.dicom", "x.dcm", "x"]
    for name in names:
        (tmp_path / name).touch()
    for name in names:
        assert find_image(tmp_path, "x").name == name
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="no image 'x'"):
        find_image(tmp_path, "x")


def test_lookup_knows_dots_capitals_and_whole_names(tmp_path):
    for name in ("1.2.840.png", "y.PNG"):
        (tmp_path / name).touch()
    assert find_image(tmp_path, "1.2.840").name == "1.2.840.png"
    assert find_image(tmp_path, "1.2.840.png").name == "1.2.840.png"
    assert find_image(tmp_path, "y").name == "y.PNG"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ""])
def test_id_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="is no name inside of"):
        find_image(tmp_path, name)


def test_preprocess_writes_squares_and_their_sizes(save, tmp_path):
    (tmp_path / "below").mkdir()
    save(ramp(16)[:128], "fine.png")
    save(np.full((30, 20, 3), (200, 100, 0), np.uint8), "below/skin.jpg")
    save(np.full((8, 8, 3), 77, np.uint8), "grey.png")
    (tmp_path / "notes.txt").write_text("x")
    out = tmp_path / "out"
    result = preprocess(tmp_path, out, size=16, bits=16)
    assert (result.written, result.skipped, result.unreadable) == (3, 0, [])
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "fine.png",
        "below/skin.png",
        "grey.png",
        "resize_factors.csv",
        "preprocess.json",
    }
    fine = read_image(out / "fine.png")
    assert fine.shape == (3, 16, 16)
    np.testing.assert_allclose(fine.mean(), read_image(tmp_path / "fine.png").mean(), atol=1e-4)
    for name in ("fine.png", "grey.png"):
        with Image.open(out / name) as image:
            assert image.mode == "I;16"
    np.testing.assert_allclose(read_image(out / "grey.png"), 77 / 255, atol=1e-5)
    skin = read_image(out / "below/skin.png", "rgb")
    np.testing.assert_allclose(skin[:, 3, 3], [200 / 255, 100 / 255, 0], atol=0.02)
    sizes = read_resize_table(result.table)
    assert sizes["fine"] == Resize((128, 256), (16, 16))
    assert sizes["below/skin"] == Resize((30, 20), (16, 16))
    assert (
        result.table.read_text().splitlines()[1] == "below/skin,30,20,16,16,0.5333333333333333,0.8"
    )


def test_shrinking_does_not_alias(save, tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    save(stripes, "in.png")
    preprocess(tmp_path, tmp_path / "out", size=8)
    inner = read_image(tmp_path / "out/in.png")[0, :, 1:-1]
    np.testing.assert_allclose(inner, 0.5, atol=0.02)


def test_preprocess_goes_on_where_it_stopped(save, tmp_path):
    for number in range(4):
        save(np.full((9, 9), 60 * number, np.uint8), f"{number}.png")
    out = tmp_path / "out"
    preprocess(tmp_path, out, size=8)
    (out / "0.png").unlink()
    (out / "1.png").write_bytes((out / "1.png").read_bytes()[:-20])
    shutil.copy(tmp_path / "2.png", out / "2.png")  # of another size
    times = (out / "3.png").stat().st_mtime_ns
    result = preprocess(tmp_path, out, size=8)
    assert (result.written, result.skipped) == (3, 1)
    assert (out / "3.png").stat().st_mtime_ns == times
    np.testing.assert_allclose(read_image(out / "1.png"), 60 / 255)
    assert set(read_resize_table(result.table)) == set("0123")
    assert preprocess(tmp_path, out, size=8).skipped == 4


@pytest.mark.parametrize("change", [{"size": 9}, {"bits": 16}, {"folder": "below"}])
def test_results_of_another_call_are_not_replaced(save, tmp_path, change):
    (tmp_path / "in/below").mkdir(parents=True)
    for name in ("in/x.png", "in/below/x.png"):
        save(ramp(8), name)
    out = tmp_path / "out"
    preprocess(tmp_path / "in", out, size=8)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options = {"size": 8, **change}
    folder = tmp_path / "in" / options.pop("folder", "")
    with pytest.raises(UserError, match=r"another folder, or with another size or depth"):
        preprocess(folder, out, **options)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_content_is_left_alone(save, tmp_path):
    (tmp_path / "in").mkdir()
    save(ramp(8), "in/x.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x.png").write_text("precious")
    for out, message in (("mine", "is not empty"), ("in", "holds the images themselves")):
        with pytest.raises(UserError, match=f"{out}: {message}"):
            preprocess(tmp_path / "in", tmp_path / out, size=8)
    assert (tmp_path / "mine/x.png").read_text() == "precious"
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["x.png"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written to"):
        preprocess(tmp_path / "in", tmp_path / "file", size=8)


def test_unreadable_images_are_listed_and_the_rest_is_written(save, tmp_path):
    save(ramp(8), "good.png")
    (tmp_path / "bad.png").write_text("x")
    result = preprocess(tmp_path, tmp_path / "out", size=8)
    assert result.written == 1
    assert len(result.unreadable) == 1
    assert "bad.png: not a readable image" in result.unreadable[0]
    assert not (tmp_path / "out/bad.png").exists()
    assert set(read_resize_table(result.table)) == {"good"}


def test_several_processes_write_the_same(save, tmp_path):
    for number in range(3):
        save(ramp(8) // (number + 1), f"{number}.png")
    (tmp_path / "bad.png").write_text("x")
    one = preprocess(tmp_path, tmp_path / "one", size=8)
    two = preprocess(tmp_path, tmp_path / "two", size=8, workers=2)
    # What the first run wrote is among the images of the second.
    assert two.written == one.written + 3
    for name in ("0.png", "1.png", "2.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not multiprocessing.active_children()


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="no image in it"):
        preprocess(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        preprocess(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(UserError, match=r"none of 1 images can be read: .*bad\.png"):
        preprocess(tmp_path, tmp_path / "out")


def test_missing_pydicom_is_said_once(save, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    save(ramp(8), "good.png")
    (tmp_path / "x.dcm").touch()
    with pytest.raises(UserError, match=r"x\.dcm: DICOM files need pydicom"):
        preprocess(tmp_path, tmp_path / "out")


def test_command_ends_with_1_if_some_cannot_be_read_and_can_go_on(csr, save, tmp_path):
    for number in range(3):
        save(ramp(16), f"{number}.png")
    (tmp_path / "bad.png").write_text("x")
    words = ("preprocess", str(tmp_path), "small", "--size", "16", "--bits", "16", "--workers", "1")
    code, out, err = csr(*words)
    assert code == 1
    unreadable, summary = out.splitlines()
    assert "bad.png: not a readable image" in unreadable
    assert summary == "3 images written, 0 were there, small/resize_factors.csv"
    assert err == "error: 1 of 4 images could not be read\n"
    (tmp_path / "bad.png").unlink()
    Path("small/1.png").unlink()
    code, out, err = csr(*words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "written": 1,
        "skipped": 2,
        "unreadable": [],
        "table": "small/resize_factors.csv",
    }
    with Image.open("small/1.png") as image:
        assert (image.size, image.mode) == ((16, 16), "I;16")


@pytest.mark.parametrize("words", ["nowhere out", ". out --bits 12", ". out --size 4", "."])
def test_command_refuses_what_cannot_be(csr, isolated, words):
    code, out, _ = csr("preprocess", *words.split())
    assert (code, out) == (2, "")
    assert list(isolated.iterdir()) == []


def test_workers_of_a_killed_run_end_and_another_run_goes_on(csr, start, save, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(300):
        save(ramp(16), f"in/{number}.png")
    words = ("csr", "preprocess", str(tmp_path / "in"), "out", "--size", "224", "--workers", "2")
    with start(*words) as program:
        deadline = time.monotonic() + 60
        while len(list(Path("out").glob("*.png"))) < 10:
            assert time.monotonic() < deadline
            assert program.poll() is None
            time.sleep(0.01)
        program.kill()
        program.communicate(timeout=60)  # ends once the workers, too, have closed their stderr
    before = len(list(Path("out").glob("*.png")))
    assert not Path("out/resize_factors.csv").exists()
    code, out, err = csr("preprocess", str(tmp_path / "in"), "out", "--json", "--workers", "1")
    assert code == 0, err
    document = json.loads(out)
    assert (document["skipped"], document["written"]) == (before, 300 - before)
