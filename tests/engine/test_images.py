"""Reading images from files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moectl.engine.errors import UserError
from moectl.engine.images import read_image


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
    with pytest.raises(UserError, match=rf"a\.png: {message}"):
        read_image(tmp_path / "a.png")
