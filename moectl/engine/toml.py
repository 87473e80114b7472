"""Reading TOML that somebody else wrote: size and depth are checked before the parser sees it."""

import re
import tomllib
from pathlib import Path
from typing import Any

from moectl.engine.errors import UserError

MAX_BYTES = 64 * 1024
MAX_PARTS = 8
MAX_NESTING = 32

_STRING = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*+"|\'[^\'\n]*+\'')
_LONG_KEY = re.compile(rf"(?<![\w-])[\w-]++(?:[ \t]*+\.[ \t]*+[\w-]++){{{MAX_PARTS}}}")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file of bounded size, key length and nesting.

    The parser of the standard library needs memory quadratic in the parts of a dotted key, so a
    small file could exhaust the machine.

    Raises:
        UserError: if the file is missing, too large, too deep, not UTF-8 or not TOML.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES // 1024} KiB, too large for settings")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML text under the same bounds; `where` names it in errors."""
    bare = _STRING.sub("S", text)
    if _LONG_KEY.search(bare):
        raise UserError(f"{where}: a key has more than {MAX_PARTS} dotted parts")
    if _nesting(bare) > MAX_NESTING:
        raise UserError(f"{where}: brackets nested deeper than {MAX_NESTING}")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
