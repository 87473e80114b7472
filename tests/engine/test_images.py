"""Reading images from files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moectl.engine.errors import UserError
from moectl.engine.images import check_image, read_image


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


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such image"), (b"x", "not a readable image")]
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content:
        (tmp_path / "a.png").write_bytes(content)
    for look in (read_image, check_image):
        with pytest.raises(UserError, match=rf"a\.png: {message}"):
            look(tmp_path / "a.png")


def test_a_look_at_a_file_decodes_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    check_image(path)
    with pytest.raises(UserError, match="not a readable image"):
        read_image(path)
