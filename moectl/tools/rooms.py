"""The systems of this installation, and their settings."""

import importlib
from pathlib import Path

from moectl.engine.errors import UserError
from moectl.engine.settings import Settings, nearest


def rooms() -> list[str]:
    """Return the names of the systems: the packages that have both settings and commands."""
    package = Path(__file__).resolve().parent.parent
    return sorted(
        path.parent.name
        for path in package.glob("*/settings.py")
        if (path.parent / "cli.py").is_file()
    )


def check_room(room: str) -> str:
    """Return the name of a system.

    Raises:
        UserError: listing the names, if there is no such system.
    """
    known = rooms()
    if room not in known:
        raise UserError(
            f"{room}: no such system{nearest(room, known)}", f"there are: {', '.join(known)}"
        )
    return room


def settings_class(room: str) -> type[Settings]:
    """Import the settings of a system.

    Raises:
        UserError: listing the names, if there is no such system.
    """
    module = importlib.import_module(f"moectl.{check_room(room)}.settings")
    found: type[Settings] = getattr(module, f"{room.capitalize()}Settings")
    return found
