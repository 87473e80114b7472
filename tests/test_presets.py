"""Every preset that is shipped: it loads, says what it is for, and holds the published numbers."""

import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from moectl.engine.presets import HEADER, Preset
from moectl.engine.settings import Settings, defaults, flatten, from_toml, to_toml
from moectl.tools.rooms import settings_class

ROOT = Path(__file__).resolve().parent.parent / "presets"
FILES = sorted(ROOT.rglob("*.toml"))
PUBLISHED_TAUS = {  # Source: Sanchez Aimar et al. 2023
    "cifar": (0.0, 1.0, 2.0),
    "imagenet_lt": (0.0, 1.25, 2.5),
    "inat18": (-1.0, 1.0, 3.0),
    "digits": (0.0, 1.0, 2.0),
    "plugin": (0.0, 1.0, 2.0),
}


def load(path: Path) -> Settings:
    return from_toml(settings_class(path.parent.name), path)


def test_there_are_presets() -> None:
    assert len(FILES) >= 22
    assert {path.parent.parent for path in FILES} == {ROOT}, "presets/<room>/<name>.toml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestPreset:
    def test_it_loads_and_survives_a_round_trip(self, path: Path, tmp_path: Path) -> None:
        settings = load(path)
        copy = tmp_path / "copy.toml"
        copy.write_text(to_toml(settings), encoding="utf-8")
        assert from_toml(type(settings), copy) == settings

    def test_its_header_is_complete_and_first(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()[: len(HEADER)]
        assert [line.partition(":")[0] for line in lines] == [f"# {word}" for word in HEADER]
        header = Preset(path.parent.name, path.stem, path).header()
        assert all(header[word] not in ("", "TBD") for word in HEADER), header

    def test_its_command_names_it(self, path: Path) -> None:
        header = Preset(path.parent.name, path.stem, path).header()
        words = shlex.split(header["command"])
        assert words[:2] == ["moectl", path.parent.name]
        assert path.stem in [name for word, name in pairwise(words) if word == "--preset"]

    def test_it_says_only_what_differs_or_defines_it(self, path: Path) -> None:
        values = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
        known = flatten(defaults(type(load(path))))
        assert set(values) <= set(known)

    def test_its_drops_come_before_its_end(self, path: Path) -> None:
        settings = flatten(load(path).model_dump())
        if settings.get("schedule.name") == "multistep":
            epochs = settings["train.epochs"]
            assert settings["schedule.warmup"] <= settings["schedule.step1"] < epochs
            assert settings["schedule.step1"] < settings["schedule.step2"] < epochs


@pytest.mark.parametrize(
    "path", sorted((ROOT / "balpoe").glob("*.toml")), ids=lambda path: path.stem
)
def test_balpoe_presets_have_the_published_taus(path: Path) -> None:
    settings = load(path)
    expected = next(taus for name, taus in PUBLISHED_TAUS.items() if path.stem.startswith(name))
    assert settings.taus == pytest.approx(expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "balpoe").glob("*ir*.toml")), ids=lambda path: path.stem
)
def test_balpoe_presets_are_what_their_names_say(path: Path) -> None:
    values = flatten(load(path).model_dump())
    dataset, ratio = path.stem.removesuffix("_long").split("_ir")
    assert values["data.dataset"] == dataset
    assert values["data.imbalance_ratio"] == float(ratio)
    if path.stem.endswith("_long"):
        short = flatten(load(path.with_stem(path.stem.removesuffix("_long"))).model_dump())
        assert values["train.epochs"] > short["train.epochs"]
