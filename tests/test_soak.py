"""The soak test takes nothing away but what it made."""

import sys
from pathlib import Path

import pytest

from tests import soak


def test_a_folder_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr(soak, "prepare", Path.mkdir)
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "0", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == 0
    assert (tmp_path / "thesis.tex").exists()
