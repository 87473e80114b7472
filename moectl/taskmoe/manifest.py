"""What a task consists of: its specialists, their files, and the classes each of them knows."""

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from moectl.engine.errors import UserError
from moectl.engine.files import is_file, write_text
from moectl.engine.toml import parse_toml, read_toml

NAME = "manifest.toml"
_SMALLEST = 4  # pixels, of which the two max pools leave one
_Kinds = dict[str, type]
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "a table"}


@dataclass(frozen=True)
class ClassEntry:
    """A class as the data files know it."""

    id: int
    """Its label in the data files."""
    name: str


@dataclass(frozen=True)
class SpecialistEntry:
    """A classifier of some of the classes."""

    name: str
    train: str
    """Data file, relative to the folder of the manifest; empty for images made in memory."""
    test: str
    classes: tuple[ClassEntry, ...]
    """In the order of the rows of its classifier."""
    checkpoint: str = ""
    """Its weights, relative to the folder of the manifest; may be empty."""


@dataclass(frozen=True)
class Manifest:
    """A task: specialists whose classes together make the union."""

    task: str
    image_size: int
    """Side of the square images in pixels."""
    specialists: tuple[SpecialistEntry, ...]


def find_manifest(task: str, root: Path) -> tuple[Manifest, Path]:
    """Return the manifest of a task and the folder that its paths start from.

    The manifest of a task known by name is built in, unless its folder in `root` holds one.

    Args:
        task: "A", "B", "digits", "digits_overlap", or the path of a manifest.
        root: the folder with TaskA and TaskB.

    Raises:
        UserError: if the task is not known and no readable manifest either.
    """
    if task in {TASK_A.task, TASK_B.task}:
        folder = root / f"Task{task}"
        own = folder / NAME
        return (read_manifest(own) if is_file(own) else _NAMED[task]), folder
    if task in _NAMED:
        return _NAMED[task], root
    path = Path(task)
    if not is_file(path):
        known = ", ".join(_NAMED)
        raise UserError(
            f"data.task is {task!r}, which is no task and no file",
            f"one of {known}, or the path of a {NAME}",
        )
    return read_manifest(path), path.parent


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a task.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    return _manifest(read_toml(path), str(path))


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest that `read_manifest` reads back, whole or not at all.

    Raises:
        UserError: if it could not be read back, for a task without files among others.
    """
    import tomli_w

    table = asdict(manifest)
    table["specialist"] = table.pop("specialists")
    text = tomli_w.dumps(table)
    _manifest(parse_toml(text, str(path)), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def label_map(manifest: Manifest, kind: Literal["global", "offset"]) -> dict[int, int]:
    """Number the classes of the union.

    "global" goes by the original ids; "offset" goes through the specialists and the rows of each.

    Returns:
        Label 0..C-1 of every original id, in ascending order of the labels.

    Raises:
        UserError: for "offset" if a class belongs to two specialists.
    """
    ids = [entry.id for one in manifest.specialists for entry in one.classes]
    if kind == "global":
        ids = sorted(set(ids))
    shared = [id for id, count in Counter(ids).items() if count > 1]
    if shared:
        names = {entry.id: entry.name for one in manifest.specialists for entry in one.classes}
        raise UserError(
            "data.label_map is offset, but several specialists of task"
            f" {manifest.task} know {', '.join(names[id] for id in shared)}",
            "choose data.label_map = global",
        )
    return {id: label for label, id in enumerate(ids)}


def class_names(manifest: Manifest, labels: dict[int, int]) -> list[str]:
    """Return the names of the classes of the union in the order of their labels."""
    names = {entry.id: entry.name for one in manifest.specialists for entry in one.classes}
    return [names[id] for id in sorted(labels, key=labels.__getitem__)]


def owners(manifest: Manifest, labels: dict[int, int]) -> list[list[int]]:
    """Return for every class of the union, 0 or 1 for every specialist: whether it knows it."""
    known = [{entry.id for entry in one.classes} for one in manifest.specialists]
    order = sorted(labels, key=labels.__getitem__)
    return [[int(id in classes) for classes in known] for id in order]


def _manifest(table: dict[str, Any], where: str) -> Manifest:
    found = _fields(table, f"{where}: ", {"task": str, "image_size": int, "specialist": list})
    if found["image_size"] < _SMALLEST:
        raise UserError(
            f"{where}: image_size is {found['image_size']}, expected at least {_SMALLEST} pixels"
        )
    specialists = tuple(
        _specialist(entry, f"{where}: specialist[{number}]")
        for number, entry in enumerate(found["specialist"])
    )
    _refuse_repeats([one.name for one in specialists], f"{where}: specialist: the name")
    _refuse_contradictions(specialists, where)
    return Manifest(found["task"], found["image_size"], specialists)


def _specialist(entry: Any, where: str) -> SpecialistEntry:
    required: _Kinds = {"name": str, "train": str, "test": str, "classes": list}
    found = _fields(entry, f"{where}.", required, {"checkpoint": str})
    for key in ("train", "test", "checkpoint"):
        _refuse_escape(found.get(key, ""), f"{where}.{key}")
    classes = []
    for number, item in enumerate(found["classes"]):
        place = f"{where}.classes[{number}]."
        one = ClassEntry(**_fields(item, place, {"id": int, "name": str}))
        if one.id < 0:
            raise UserError(f"{place}id is {one.id}, expected a whole number from 0 on")
        classes.append(one)
    _refuse_repeats([one.id for one in classes], f"{where}.classes: the id")
    return SpecialistEntry(**{**found, "classes": tuple(classes)})


def _fields(
    table: Any, where: str, required: _Kinds, optional: _Kinds | None = None
) -> dict[str, Any]:
    """Return a table that has every required key, no unknown one, and values of their kinds."""
    kinds = {**required, **(optional or {})}
    if not isinstance(table, dict):
        raise UserError(f"{where.rstrip('.')}: {table!r} is not a table")
    for key in table:
        if key not in kinds:
            raise UserError(f"{where}{key} is not known", f"one of {', '.join(kinds)}")
    for key, kind in kinds.items():
        value = table.get(key, None if key in required else kind())
        if value is None:
            raise UserError(f"{where}{key} is missing")
        if type(value) is not kind:  # `true` is an int as well
            raise UserError(f"{where}{key} is {value!r}, expected {_KINDS[kind]}")
        if key in required and value in ("", []):
            raise UserError(f"{where}{key} is empty")
    return table


def _refuse_escape(text: str, where: str) -> None:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or not text.isprintable():
        raise UserError(
            f"{where}: {text!r} leads out of the folder of the manifest",
            "name a file in that folder, relative to it, with `/` between folders",
        )


def _refuse_repeats(values: list[Any], what: str) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"{what} {repeated[0]!r} occurs twice")


def _refuse_contradictions(specialists: tuple[SpecialistEntry, ...], where: str) -> None:
    entries = {entry for one in specialists for entry in one.classes}
    classes = sorted(entries, key=lambda entry: (entry.id, entry.name))
    for first, second in combinations(classes, 2):
        if first.id == second.id:
            raise UserError(
                f"{where}: specialist.classes: id {first.id} is named both"
                f" {first.name!r} and {second.name!r}"
            )
        if first.name == second.name:
            raise UserError(
                f"{where}: specialist.classes: {first.name!r} is the name of both"
                f" id {first.id} and id {second.id}"
            )


def _entry(name: str, train: str, test: str, classes: dict[int, str]) -> SpecialistEntry:
    entries = tuple(ClassEntry(id, label) for id, label in sorted(classes.items()))
    return SpecialistEntry(name, train, test, entries)


def _task_a(number: int, name: str, folder: str, classes: dict[int, str]) -> SpecialistEntry:
    stem = f"Model{number}_{folder}_superclass/model{number}"
    return _entry(name, f"{stem}_train_supercls.pth", f"{stem}_test_supercls.pth", classes)


def _task_b(number: int, name: str, classes: dict[int, str]) -> SpecialistEntry:
    stem = f"dataB_model_{number}.pth"
    return _entry(name, f"train_{stem}", f"val_{stem}", classes)


def _digits(task: str, *groups: str) -> Manifest:
    specialists = (
        _entry(group, "", "", {int(digit): digit for digit in group}) for group in groups
    )
    return Manifest(task, 16, tuple(specialists))


_HYENA = {34: "hyena"}
_CHIHUAHUA = {173: "Chihuahua"}
_WILD_DOG = {202: "African_hunting_dog"}

TASK_A = Manifest(
    "A",
    32,
    (
        _task_a(
            1,
            "trees",
            "trees",
            {47: "maple_tree", 52: "oak_tree", 56: "palm_tree", 59: "pine_tree", 96: "willow"},
        ),
        _task_a(
            2,
            "flowers",
            "flowers",
            {54: "orchid", 62: "poppy", 70: "rose", 82: "sunflower", 92: "tulip"},
        ),
        _task_a(
            3,
            "fruit and vegetables",
            "fruit+veg",
            {0: "apple", 51: "mushroom", 53: "orange", 57: "pear", 83: "sweet_pepper"},
        ),
    ),
)
"""Fifteen classes of CIFAR-100 under their fine labels, disjoint."""
TASK_B = Manifest(
    "B",
    64,
    (
        _task_b(
            1,
            "mammals",
            {**_HYENA, 137: "baboon", 159: "Arctic_fox", **_CHIHUAHUA, 201: "lynx"},
        ),
        _task_b(
            2,
            "African animals",
            {24: "African_elephant", **_HYENA, 80: "zebra", 135: "patas", **_WILD_DOG},
        ),
        _task_b(
            3,
            "canids",
            {124: "collie", 125: "golden_retriever", 130: "boxer", **_CHIHUAHUA, **_WILD_DOG},
        ),
    ),
)
"""Twelve classes of ImageNet at 64 x 64; every two specialists share one."""
DIGITS = _digits("digits", "012", "345", "678")
"""Nine of the digits that come with scikit-learn, disjoint."""
DIGITS_OVERLAP = _digits("digits_overlap", "0123", "3456", "6780")
"""The same digits; every two specialists share one."""
WORDNET = {
    24: "n02504458",
    34: "n02117135",
    80: "n02391049",
    124: "n02106030",
    125: "n02099601",
    130: "n02108089",
    135: "n02486261",
    137: "n02486410",
    159: "n02120079",
    173: "n02085620",
    201: "n02127052",
    202: "n02116738",
}
"""The ImageNet folders of the classes of task B."""

_NAMED = {manifest.task: manifest for manifest in (TASK_A, TASK_B, DIGITS, DIGITS_OVERLAP)}
