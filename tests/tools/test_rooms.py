import pytest

from moectl import cli
from moectl.balpoe.settings import BalpoeSettings
from moectl.engine.errors import UserError
from moectl.tools import rooms


def test_the_systems_are_those_of_the_table_of_contents() -> None:
    tools = {"presets", "runs", "sweep", "doctor"}
    assert set(rooms.rooms()) == set(cli.CONTENTS) - tools


def test_every_system_has_its_settings() -> None:
    for room in rooms.rooms():
        prefix = rooms.settings_class(room).model_config.get("env_prefix")
        assert prefix == f"MOECTL_{room.upper()}__"
    assert rooms.settings_class("balpoe") is BalpoeSettings


@pytest.mark.parametrize("name", ["balpo", "engine", "tools", "", "../balpoe", "os"])
def test_an_unknown_system_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        rooms.settings_class(name)
    assert "no such system" in refusal.value.message
    assert "balpoe" in refusal.value.hint


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UserError, match="did you mean balpoe"):
        rooms.check_room("balpo")
