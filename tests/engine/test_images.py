"""Reading images from files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from moectl.engine.errors import UserError
from moectl.engine.images import check_image, read_image
from tests.faults import odd_images


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        Image.new(mode, (5, 3)).save(tmp_path / "a.png")
        assert (read_image(tmp_path / "a.png").mode, read_image(tmp_path / "a.png").size) == (
            "RGB",
            (5, 3),
        )


def test_16_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256, 25500, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.asarray(read_image(str(tmp_path / "a.png")))[0, :, 0].tolist() == [0, 0, 1, 99, 255]


@pytest.mark.parametrize(("name", "said"), (odd_images.BROKEN | odd_images.ABSENT).items())
def test_what_is_no_image_is_named(tmp_path: Path, name: str, said: str) -> None:
    path = odd_images.write(tmp_path, name)
    for look in (read_image, check_image):
        if (look, name) != (check_image, "cut.png"):
            with pytest.raises(UserError) as caught:
                look(path)
            assert caught.value.message == f"{path}: {said}"


@pytest.mark.parametrize("name", odd_images.UNUSUAL)
def test_unusual_images_are_read_without_a_word(tmp_path: Path, name: str) -> None:
    path = odd_images.write(tmp_path, name)
    check_image(path)
    assert (read_image(path).mode, read_image(path).size) == ("RGB", (24, 20))


@pytest.mark.parametrize("side", [12_000, 50_000])
def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, side: int) -> None:
    """Nothing of an image is decoded before its size is known to be harmless."""
    (tmp_path / "a.png").write_bytes(odd_images.promising(side))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it is decoded"))
        with pytest.raises(UserError, match="more than 90 million pixels") as caught:
            read_image(tmp_path / "a.png")
    assert caught.value.hint == "make it smaller"


def test_a_look_at_a_file_decodes_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    check_image(path)
    with pytest.raises(UserError, match="not a readable image"):
        read_image(path)
