"""Which classes count as one group when errors are balanced over groups.

Nothing here needs torch until the shots are asked for.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.engine.errors import UserError
from moectl.engine.files import read_json
from moectl.engine.settings import nearest
from moectl.engine.toml import read_toml

KINDS = ("head_tail", "shots", "class", "quantile:Q")
_SHOTS = {
    "many": "more than 100 training images",
    "medium": "from 20 to 100",
    "few": "fewer than 20",
}


@dataclass(frozen=True)
class Groups:
    """A division of C classes; every group has a class and every class one group."""

    names: tuple[str, ...]
    """For instance ("head", "tail")."""
    of_class: tuple[int, ...]
    """(C,) index of each class's group."""


def class_groups(
    kind: str, class_counts: Sequence[int], class_names: Sequence[str], tail_threshold: int = 20
) -> Groups:
    """Divide the classes by training images, by hand, or not at all.

    Args:
        kind: `head_tail` (tail: at most `tail_threshold` training images), `shots` (many above 100,
            few below 20, medium between), `class` (each alone), `quantile:Q` (tail: the share Q of
            classes with fewest training images; of equals the later ones first), or a .json or
            .toml file such as `{"head": ["car", 3], "tail": ["cat"]}` with names or indices.
        class_counts: (C,) training images.
        class_names: (C,).
        tail_threshold: of `head_tail`.

    Raises:
        UserError: for an unknown kind, a wrong file or an empty group.
    """
    assert len(class_counts) == len(class_names)
    if kind == "head_tail":
        return _head_tail(class_counts, tail_threshold)
    if kind == "shots":
        return _shots(class_counts)
    if kind == "class":
        return Groups(_distinct(class_names), tuple(range(len(class_names))))
    if kind.startswith("quantile:"):
        return _quantile(kind, class_counts)
    if Path(kind).suffix.lower() in {".json", ".toml"}:
        return _from_file(Path(kind), class_names)
    raise UserError(
        f"plugin.groups is {kind}, expected {', '.join(KINDS)} or a .json or .toml file"
        f"{nearest(kind, KINDS)}"
    )


def _head_tail(class_counts: Sequence[int], threshold: int) -> Groups:
    of_class = tuple(int(count <= threshold) for count in class_counts)
    if len(set(of_class)) == 1:
        amount = f"{threshold} training images or fewer"
        which, empty, way = (
            (f"every class has {amount}", "head", "lower")
            if of_class[0]
            else (f"no class has {amount}", "tail", "raise")
        )
        raise UserError(
            f"plugin.groups is head_tail, but {which}, so the group {empty} is empty",
            f"{way} plugin.tail_threshold, or set plugin.groups to shots, class or quantile:0.3",
        )
    return Groups(("head", "tail"), of_class)


def _shots(class_counts: Sequence[int]) -> Groups:
    from moectl.common.scores import shot_groups

    members = shot_groups(class_counts)
    empty = [name for name in members if not members[name]]
    if empty:
        rules = " or ".join(f"{_SHOTS[name]} ({name})" for name in empty)
        what = f"the group {empty[0]} is" if len(empty) == 1 else f"{' and '.join(empty)} are"
        raise UserError(
            f"plugin.groups is shots, but no class has {rules}, so {what} empty",
            "set plugin.groups to head_tail, class or quantile:0.3",
        )
    of_class = {index: place for place, name in enumerate(members) for index in members[name]}
    return Groups(tuple(members), tuple(of_class[index] for index in range(len(class_counts))))


def _distinct(class_names: Sequence[str]) -> tuple[str, ...]:
    """Tell classes of one name apart by their index."""
    times = Counter(class_names)
    return tuple(
        name if times[name] == 1 else f"{name} ({index})" for index, name in enumerate(class_names)
    )


def _quantile(kind: str, class_counts: Sequence[int]) -> Groups:
    classes = len(class_counts)
    try:
        share = float(kind.removeprefix("quantile:"))
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(
            f"plugin.groups is {kind}, expected a share of the classes above 0 and below 1,"
            " for instance quantile:0.3"
        )
    if classes < 2:
        raise UserError(f"plugin.groups is {kind}, but a single class has no head and tail")
    size = min(max(round(share * classes), 1), classes - 1)
    tail = set(sorted(range(classes), key=lambda index: (class_counts[index], -index))[:size])
    return Groups(("head", "tail"), tuple(int(index in tail) for index in range(classes)))


def _from_file(path: Path, class_names: Sequence[str]) -> Groups:
    table = read_toml(path) if path.suffix.lower() == ".toml" else read_json(path)
    example = '{"head": ["car", 3], "tail": ["cat"]}'
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a table of groups such as {example}")
    of_class: dict[int, int] = {}
    names = tuple(table)
    for place, (name, members) in enumerate(table.items()):
        if not isinstance(members, list):
            raise UserError(f"{path}: {name} is {members!r}, expected a list of classes")
        if not members:
            raise UserError(f"{path}: the group {name} is empty")
        for member in members:
            index = _class_index(member, class_names, f"{path}: {name}")
            if index in of_class:
                both = (
                    f"{names[of_class[index]]} and {name}"
                    if of_class[index] != place
                    else f"{name} twice"
                )
                raise UserError(f"{path}: class {class_names[index]} is in {both}")
            of_class[index] = place
    missing = [label for index, label in enumerate(class_names) if index not in of_class]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise UserError(
            f"{path}: {len(missing)} of {len(class_names)} classes are in no group ({shown})"
        )
    return Groups(names, tuple(of_class[index] for index in range(len(class_names))))


def _class_index(member: object, class_names: Sequence[str], place: str) -> int:
    last = len(class_names) - 1
    if isinstance(member, str):
        times = class_names.count(member)
        if times > 1:
            raise UserError(f"{place}: {times} classes are named {member}, give their indices")
        if times == 0:
            raise UserError(f"{place}: no class is named {member}{nearest(member, class_names)}")
        return class_names.index(member)
    if isinstance(member, bool) or not isinstance(member, int) or not 0 <= member <= last:
        raise UserError(
            f"{place}: {member!r} is neither a class name nor an index from 0 to {last}"
        )
    return member
