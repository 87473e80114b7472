"""Presets: TOML files under `presets/<room>/`, each with a header that says what it is for."""

import re
from dataclasses import dataclass
from pathlib import Path

from moectl.engine.errors import UserError
from moectl.engine.files import is_file
from moectl.engine.settings import nearest

HEADER = ("command", "expected", "cost", "source")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)),
}


@dataclass(frozen=True)
class Preset:
    """A preset file and its header."""

    room: str
    name: str
    path: Path

    def header(self) -> dict[str, str]:
        """Return the header lines `# command: …`, `# expected: …`, `# cost: …`, `# source: …`."""
        found: dict[str, str] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            word, _, rest = line.lstrip("# ").partition(":")
            if word in HEADER:
                found[word] = rest.strip()
        return found


def check_name(name: str, what: str) -> str:
    """Return a name that is safe as a file name on every system.

    Raises:
        UserError: for anything but letters, digits, dots, hyphens and underscores, or a reserved
            name.
    """
    if not NAME.fullmatch(name) or ".." in name or name.split(".")[0].upper() in _RESERVED:
        raise UserError(
            f"{what} {name[:80]!r} is not a usable name",
            "use up to 64 letters, digits and . _ -, starting with a letter or digit",
        )
    return name


def roots() -> list[Path]:
    """Return the preset folders in order of preference: ./presets, then the shipped ones."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "presets"
    # A checkout keeps them beside the package, a wheel inside it.
    return [Path("presets"), shipped if shipped.is_dir() else package.parent / "presets"]


def available(room: str | None = None) -> list[Preset]:
    """List presets by room and name; a file in ./presets hides a shipped one of the same name."""
    found: dict[tuple[str, str], Preset] = {}
    for root in reversed(roots()):
        for path in root.glob("*/*.toml"):
            if room is None or path.parent.name == room:
                found[path.parent.name, path.stem] = Preset(path.parent.name, path.stem, path)
    return sorted(found.values(), key=lambda preset: (preset.room, _natural(preset.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def find(room: str | None, reference: str) -> Preset:
    """Find a preset by path, by name, or by `room/name`.

    Raises:
        UserError: if there is none, or the name is not one, or it is of another room.
    """
    path = Path(reference)
    if reference.endswith(".toml"):
        if not is_file(path):
            raise UserError(f"{reference}: no such preset file")
        return Preset(room or path.resolve().parent.name, path.stem, path)
    owner, slash, name = reference.partition("/")
    if slash and NAME.fullmatch(owner):
        if room not in (None, owner):
            raise UserError(f"{reference}: a preset of {owner}, expected one of {room}")
        room, reference = owner, name
    check_name(reference, "preset")
    presets = available(room)
    matches = [preset for preset in presets if preset.name == reference]
    if not matches:
        where = f" for {room}" if room else ""
        names = [preset.name for preset in presets]
        raise UserError(
            f"{reference}: no such preset{where}{nearest(reference, names)}",
            "moectl presets list shows them all",
        )
    if len(matches) > 1:
        names = [f"{preset.room}/{preset.name}" for preset in matches]
        raise UserError(
            f"{reference}: more than one preset has this name", f"say which: {', '.join(names)}"
        )
    return matches[0]
