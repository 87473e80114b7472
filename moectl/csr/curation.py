"""The file in which a person says which prototypes may have a say in the verdict.

    network = "3f2a…"              # which prototypes these are

    [[prototypes]]
    concept = "Edema"
    index = 0
    keep = true
    hits = 12                      # what the atlas knows about it; not read

Letters: K concepts, M prototypes per concept.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from moectl.csr.columns import normalised
from moectl.csr.model import CSRNet
from moectl.engine.errors import UserError
from moectl.engine.files import read_text, write_text
from moectl.engine.toml import parse_toml

_READ = ("concept", "index", "keep")
_HELP = ("hits", "out_of_box", "reliance")
_INTRODUCTION = """\
# Set keep = false for a prototype that should have no say, then train the verdict again:
#     moectl csr train --stage task --from RUN --curation THIS_FILE
# hits: training images that it is nearest to. out_of_box: share of its exemplars on which it looks
# outside of the boxes of its concept. reliance: macro-F1 of validation images lost without it.
"""


def fingerprint(model: CSRNet) -> str:
    """Name the prototypes of a network, and what they are compared with.

    Training the verdict again changes nothing about it.
    """
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not name.startswith(("task_", "kept")):
            found.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def write(path: Path, rows: Iterable[Mapping[str, Any]], network: str = "") -> None:
    """Write a curation file.

    Args:
        path: the file.
        rows: of every prototype, with `concept index keep` and any of `hits out_of_box reliance`;
            what is None is left out. With a true `suspect` a comment says so.
        network: their `fingerprint`.
    """
    parts = [_INTRODUCTION + tomli_w.dumps({"network": network})]
    for row in rows:
        known = {name: row.get(name) for name in _READ + _HELP}
        table = tomli_w.dumps({name: one for name, one in known.items() if one is not None})
        remark = (
            "# It mostly looks outside of the boxes: a shortcut?\n" if row.get("suspect") else ""
        )
        parts.append(f"{remark}[[prototypes]]\n{table}")
    write_text(path, "\n".join(parts))


def read(path: Path, concepts: Sequence[str], prototypes: int, network: str = "") -> Tensor:
    """Read which prototypes are kept; those that are not listed are.

    Args:
        path: a curation file.
        concepts: names of the K concepts; case, spaces and underscores do not matter.
        prototypes: M.
        network: if given, the `fingerprint` of the prototypes that it is to be used for.

    Returns:
        (K, M) bool.

    Raises:
        UserError: naming the file, the entry, what is there and what was expected; and if nothing
            is kept, or the file leaves out prototypes of another network.
    """
    document = _document(path)
    kept = torch.ones(len(concepts), prototypes, dtype=torch.bool)
    seen: set[tuple[int, int]] = set()
    for number, table in enumerate(document.get("prototypes", [])):
        entry = f"{path}: prototypes[{number}]"
        concept, index, keep = _entry(entry, table, concepts, prototypes)
        if (concept, index) in seen:
            raise UserError(f"{entry}: {concepts[concept]!r} {index} is listed twice")
        seen.add((concept, index))
        kept[concept, index] = keep
    if not kept.any():
        raise UserError(
            f"{path}: keeps no prototype at all, expected at least one with keep = true"
        )
    written_for = document.get("network") or network
    if network and written_for != network and not kept.all():
        raise UserError(
            f"{path}: leaves out prototypes of another network, {written_for[:8]}…, expected those"
            f" of {network[:8]}…",
            "keep the file under another name, or give the run that it was written for",
        )
    return kept


def _document(path: Path) -> dict[str, Any]:
    document = parse_toml(read_text(path), str(path))
    if unknown := sorted(set(document) - {"network", "prototypes"}):
        raise UserError(f"{path}: {unknown[0]}: no such field; there are network, prototypes")
    if not isinstance(document.get("network", ""), str):
        raise UserError(f"{path}: network is {document['network']!r}, expected text")
    if not isinstance(document.get("prototypes", []), list):
        raise UserError(f"{path}: prototypes is no list, expected tables headed [[prototypes]]")
    return document


def _entry(
    entry: str, table: Any, concepts: Sequence[str], prototypes: int
) -> tuple[int, int, bool]:
    """Return concept, index, and whether the prototype is kept."""
    if not isinstance(table, Mapping):
        raise UserError(f"{entry} is {table!r}, expected a table")
    if unknown := sorted(set(table) - {*_READ, *_HELP}):
        fields = ", ".join(_READ + _HELP)
        raise UserError(f"{entry}.{unknown[0]}: no such field; there are {fields}")
    if missing := [name for name in _READ if name not in table]:
        raise UserError(f"{entry}: has no {missing[0]}, expected {', '.join(_READ)}")
    concept, index, keep = (table[name] for name in _READ)
    known = [normalised(name) for name in concepts]
    if not isinstance(concept, str) or normalised(concept) not in known:
        raise UserError(f"{entry}.concept is {concept!r}, expected one of {', '.join(concepts)}")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < prototypes:
        raise UserError(f"{entry}.index is {index!r}, expected 0 to {prototypes - 1}")
    if not isinstance(keep, bool):
        raise UserError(f"{entry}.keep is {keep!r}, expected true or false")
    return known.index(normalised(concept)), index, keep
