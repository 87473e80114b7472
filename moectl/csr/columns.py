"""CSV tables, and which columns of a label table are concepts and which are targets."""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from moectl.engine.errors import UserError
from moectl.engine.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

CONCEPT_SETS = {
    "vinbigdata14": (
        "Aortic enlargement",
        "Atelectasis",
        "Calcification",
        "Cardiomegaly",
        "Consolidation",
        "ILD",
        "Infiltration",
        "Lung Opacity",
        "Nodule/Mass",
        "Other lesion",
        "Pleural effusion",
        "Pleural thickening",
        "Pneumothorax",
        "Pulmonary fibrosis",
    ),
}
NO_FINDING = "nofinding"
"""The normalised name of the target that says that there is nothing."""
_DIAGNOSES = ("copd", "lungtumor", "pneumonia", "tuberculosis", NO_FINDING)
_NEITHER = {"", "imageid", "radid", "patientid", "split"}
_NAMED = {";": "semicolons", "\t": "tabs"}
_MISSING = {"", "nan", "na", "n/a", "none", "null"}


@dataclass(frozen=True)
class Columns:
    """What the columns of a label table mean.

    Lists given here win, then `concept_set`, then the JSON file, then a rule about names.
    """

    concepts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    """With `multiclass`: one column of class names, or several of which exactly one is 1."""
    concept_set: Literal["auto", "vinbigdata14"] = "auto"
    file: Path | None = None
    """JSON with the lists "concepts" and "targets"; None takes a columns.json beside the table."""
    task_mode: Literal["multilabel", "multiclass"] = "multilabel"
    image: str = "image_id"
    reader: str = "rad_id"
    patient: str = "patient_id"
    patient_pattern: str = ""
    """Where the table has no patient column: the start of an image's id that names the patient."""


USUAL = {
    "isic": Columns(
        concepts=("milia_like_cyst", "pigment_network", "negative_network", "streaks"),
        targets=("diagnosis",),
        task_mode="multiclass",
        image="image",
    ),
}
"""The columns of data sets that have others than VinDr-CXR.

Source: Codella et al. 2018 (ISIC 2017).
"""


class Table(NamedTuple):
    """The text of a CSV file."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    """The line of the file that a row ends on."""

    def column(self, name: str) -> int | None:
        """Return the position of a column by its normalised name."""
        names = [normalised(one) for one in self.header]
        return names.index(normalised(name)) if normalised(name) in names else None

    def needed(self, name: str) -> int:
        """Return the position of a column.

        Raises:
            UserError: if there is none.
        """
        place = self.column(name)
        if place is None:
            raise UserError(
                f"{self.path}: has no column {name!r}", f"its columns are {', '.join(self.header)}"
            )
        return place


def normalised(name: str) -> str:
    """Return a name without case, spaces and underscores; "Other diseases" is "Other disease"."""
    plain = re.sub(r"[\s_]+", "", name.casefold())
    return "otherdisease" if plain in {"otherdiseases", "otherdisease(s)"} else plain


def read_table(path: Path) -> Table:
    """Read a CSV file with a header.

    Raises:
        UserError: naming the file, and the line if one is wrong.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if len(header) == 1 and (other := re.search("[;\t]", header[0])):
                raise UserError(
                    f"{path}: its columns are separated by {_NAMED[other[0]]}, expected commas"
                )
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} values, but the header names"
                        f" {len(header)} columns"
                    )
                if row:
                    rows.append([cell.strip() for cell in row])
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a CSV file in UTF-8"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if not rows:
        raise UserError(f"{path}: holds no row below its header")
    counts = Counter(normalised(name) for name in header if name)
    twice = [name for name in header if counts[normalised(name)] > 1]
    if twice:
        raise UserError(
            f"{path}: two columns have the same name: {' and '.join(twice)}",
            "its first line must name the columns",
        )
    return Table(path, header, rows, lines)


class Roles(NamedTuple):
    """Positions of the columns of a table."""

    concepts: list[int]
    targets: list[int]
    origin: dict[str, str]
    """Of "concepts" and "targets": who decided."""


def roles(table: Table, columns: Columns) -> Roles:
    """Decide about the columns of a training table.

    Raises:
        UserError: if a column that is named is missing, or none is left for one of the roles.
    """
    beside = table.path.with_name("columns.json")
    file = columns.file or (beside if beside.is_file() else None)
    listed = _listed(file) if file else {"concepts": [], "targets": []}
    ruled = _by_rule(table, columns)
    given = {"concepts": columns.concepts, "targets": columns.targets}
    if not columns.concepts and columns.concept_set != "auto":
        given["concepts"] = CONCEPT_SETS[columns.concept_set]
    found: dict[str, list[int]] = {}
    origin: dict[str, str] = {}
    for role in ("concepts", "targets"):
        names: Sequence[str] = given[role] or listed[role]
        found[role] = [table.needed(name) for name in names] or ruled[role]
        origin[role] = "settings" if given[role] else str(file) if names else "rule"
    # A column has one role, unless the same kind of list names it for both.
    rank = ("rule", str(file), "settings")
    for role, other in (("concepts", "targets"), ("targets", "concepts")):
        if rank.index(origin[role]) < rank.index(origin[other]):
            found[role] = [place for place in found[role] if place not in found[other]]
        if not found[role]:
            raise UserError(
                f"{table.path}: no column is taken for one of the {role}",
                f"name them with data.{role[:-1]}_columns",
            )
    return Roles(found["concepts"], found["targets"], origin)


def _listed(file: Path) -> dict[str, list[str]]:
    document = read_json(file)
    listed = {}
    for role in ("concepts", "targets"):
        names = document.get(role) if isinstance(document, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file}: {role!r} is {names!r}, expected a list of column names")
        listed[role] = names
    return listed


def _by_rule(table: Table, columns: Columns) -> dict[str, list[int]]:
    """Take six diagnoses for targets by their names and all else for concepts."""
    special = (columns.image, columns.reader, columns.patient)
    neither = _NEITHER | {normalised(name) for name in special}
    found: dict[str, list[int]] = {"concepts": [], "targets": []}
    for place, name in enumerate(normalised(name) for name in table.header):
        words = ("disease",) if "other" in name else _DIAGNOSES
        if name not in neither:
            role = "targets" if any(word in name for word in words) else "concepts"
            found[role].append(place)
    return found
