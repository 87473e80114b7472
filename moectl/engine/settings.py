"""One tree of settings per system: layers, where each value came from, and TOML in and out."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moectl.engine.errors import UserError
from moectl.engine.toml import parse_toml, read_toml

ENVIRONMENT = "MOECTL_"
MACHINE_NAMES = frozenset({"MOECTL_RUNS", "MOECTL_OFFLINE"})
"""Variables about the machine rather than about settings."""


class Flag:
    """Marks a field that has a typed option of its own on the command line.

    Args:
        names: option names such as "--lr"; the field's own name with hyphens if none is given.
    """

    def __init__(self, *names: str) -> None:
        self.names = names


class Free:
    """Marks a field that cannot change the result of a run, so that it may change on resume.

    A room that gives such a field another default need not mark it again.

    Args:
        grows: it may only be raised: the result so far stays, and more is added.
    """

    def __init__(self, *, grows: bool = False) -> None:
        self.grows = grows


class Section(BaseModel):
    """One table of settings, for instance `[optim]`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class Settings(BaseSettings):
    """The whole tree of one system; its fields are Sections."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        env_nested_delimiter="__",
        protected_namespaces=(),
    )

    def ties_epochs(self, command: str) -> bool:  # noqa: ARG002
        """Whether the number of epochs of a command shapes what it does before the last of them."""
        return False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values as given: `resolve` has laid the layers already."""
        return (init_settings,)


S = TypeVar("S", bound=Settings)

RUN = "run"
"""The origin of values that the settings.toml of a run has set."""


@dataclass(frozen=True)
class Layer:
    """Some values and the name of the place that set them."""

    name: str
    values: dict[str, Any]


def resolve(
    cls: type[S],
    flags: Mapping[str, Any],
    assignments: Sequence[str],
    files: Sequence[Path],
    stored: Path | None = None,
) -> tuple[S, dict[str, str]]:
    """Lay command line over environment over TOML files over those of a run over defaults.

    Args:
        cls: the settings class of the system.
        flags: values of typed options by dotted key.
        assignments: `key=value` texts of `--set`.
        files: TOML files, later ones win.
        stored: the settings.toml of the run that is read or gone on with.

    Returns:
        The settings, and for every dotted key the place its value came from.

    Raises:
        UserError: naming every key that is unknown or out of range, and where it was set.
    """
    layers = [Layer(RUN, read_toml(stored))] if stored else []
    layers += [Layer(path.name, read_toml(path)) for path in files]
    layers.append(_environment(cls))
    layers.extend(_command_line(cls, flags, assignments))
    tree = defaults(cls)
    origin = dict.fromkeys(flatten(tree), "default")
    for layer in layers:
        for key in flatten(layer.values):
            origin[key] = _variable(cls, key) if layer.name == "environment" else layer.name
        tree = merge(tree, layer.values)
    try:
        return cls(**tree), origin
    except ValidationError as error:
        places = {key: str(stored) if place == RUN else place for key, place in origin.items()}
        raise UserError(
            explain(cls, error, places), f"moectl presets show {room_of(cls)} lists every key"
        ) from None


def room_of(cls: type[Settings]) -> str:
    """Return the name of a system: its settings' variables begin with it."""
    prefix = str(cls.model_config.get("env_prefix", ""))
    return prefix.removeprefix(ENVIRONMENT).strip("_").lower()


def _environment(cls: type[Settings]) -> Layer:
    try:
        return Layer("environment", EnvSettingsSource(cls)())
    except SettingsError as error:
        section = next(name for name in cls.model_fields if f'"{name}"' in str(error))
        start = _variable(cls, section)
        names = ", ".join(sorted(name for name in os.environ if name.upper().startswith(start)))
        raise UserError(
            f"{names}: not readable ({error.__cause__})",
            "lists and whole tables are written as JSON",
        ) from None


def _command_line(
    cls: type[Settings], flags: Mapping[str, Any], assignments: Sequence[str]
) -> list[Layer]:
    known = fields(cls)
    seen = set(flags)
    layers = [Layer("flag", nest(flags))]
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise UserError(f"--set {text}: expected key=value, for instance --set optim.lr=0.05")
        if key not in known:
            raise UserError(f"--set {key}: no such setting{nearest(key, known)}")
        if key in seen:
            raise UserError(f"--set {key}: set twice on the command line")
        seen.add(key)
        layers.append(Layer("--set", nest({key: literal(value.strip(), f"--set {key}")})))
    return layers


def literal(text: str, where: str) -> Any:
    """Read `[`, `{` and quotes as TOML; leave anything else to the type of the field."""
    return (
        parse_toml(f"value = {text}", where)["value"] if text[:1] in ("[", "{", '"', "'") else text
    )


def from_toml(cls: type[S], path: Path) -> S:
    """Build settings from one TOML file over the defaults, without environment or flags.

    Raises:
        UserError: naming every wrong key in the file.
    """
    values = read_toml(path)
    try:
        return cls(**merge(defaults(cls), values))
    except ValidationError as error:
        raise UserError(explain(cls, error, dict.fromkeys(flatten(values), path.name))) from None


def defaults(cls: type[Settings]) -> dict[str, Any]:
    """Return the default tree of a system as plain dictionaries."""
    return {
        name: cast("BaseModel", field.get_default(call_default_factory=True)).model_dump()
        for name, field in cls.model_fields.items()
    }


def fields(cls: type[Settings]) -> dict[str, FieldInfo]:
    """Return every leaf field by dotted key, in order of declaration."""
    return {
        f"{section}.{name}": field
        for section, outer in cls.model_fields.items()
        for name, field in section_class(outer).model_fields.items()
    }


def free(cls: type[Settings]) -> dict[str, Free]:
    """Return the marks of the fields that may change when a run is resumed, by dotted key."""
    return {
        f"{section}.{name}": mark
        for section, outer in cls.model_fields.items()
        for base in reversed(section_class(outer).__mro__)
        if issubclass(base, BaseModel)
        for name, field in base.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Free)
    }


def flag_of(info: FieldInfo) -> Flag | None:
    """Return the mark of a field that has an option of its own."""
    return next((item for item in info.metadata if isinstance(item, Flag)), None)


def option_names(key: str, info: FieldInfo) -> list[str]:
    """Return the names of a flagged field's option, its own name first; none without a flag."""
    flag = flag_of(info)
    plain = f"--{key.rpartition('.')[2].replace('_', '-')}"
    return list(flag.names or (plain,)) if flag else []


def section_class(field: FieldInfo) -> type[Section]:
    """Return the Section class of a field of the root."""
    return cast("type[Section]", field.annotation)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested tables."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        table = tree
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    return tree


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree over another, table by table."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[name] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def nearest(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """Return `; did you mean X?` or nothing."""
    candidates = list(known)
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if not found:  # a bare name such as `lrr` is near `optim.lr` in its last part
        by_tail = {key.rpartition(".")[2]: key for key in candidates}
        tails = difflib.get_close_matches(name.rpartition(".")[2], list(by_tail), n=1, cutoff=0.6)
        found = [by_tail[tail] for tail in tails]
    return f"; did you mean {found[0]}?" if found else ""


def explain(cls: type[Settings], error: ValidationError, origin: Mapping[str, str]) -> str:
    """Turn pydantic's errors into one line each: place, key, value found, what was expected."""
    return "\n".join(_lines(cls, error, origin))


def _lines(cls: type[Settings], error: ValidationError, origin: Mapping[str, str]) -> Iterator[str]:
    known = fields(cls)
    entries = [(_key(entry["loc"]), entry) for entry in error.errors()]
    wrong_items = {key for key, entry in entries if _is_item(entry["loc"])}
    for key, entry in entries:
        place = _place(key, origin)
        start = f"{place}{key}"
        if place == "flag: ":
            place, start = "", _option(key, known)
        if entry["type"] == "extra_forbidden":
            choices = known if "." in key else list(cls.model_fields)
            yield f"{start}: no such setting{nearest(key, choices)}"
        elif entry["type"] == "value_error":
            # A rule over a whole section names its own keys.
            yield f"{start + ': ' if key in known else place}{entry['ctx']['error']}"
        elif entry["type"] != "too_short" or key not in wrong_items:
            yield f"{start} = {entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"


def _option(key: str, known: Mapping[str, FieldInfo]) -> str:
    return next(iter(option_names(key, known[key])), key) if key in known else key


def _key(location: Sequence[int | str]) -> str:
    """Return the dotted key of an error; that of the whole list for one of its items."""
    return ".".join(str(part) for part in location[: -1 if _is_item(location) else None])


def _is_item(location: Sequence[int | str]) -> bool:
    return isinstance(next(reversed(location), ""), int)


def _place(key: str, origin: Mapping[str, str]) -> str:
    """Return `PLACE: ` of where a key, or else something below it, was set."""
    below = (name for name in origin if name.startswith(f"{key}."))
    names = (key, ".".join(key.split(".")[:2]), *below)
    places = (origin.get(name, "default") for name in names)
    return next((f"{place}: " for place in places if place != "default"), "")


def _variable(cls: type[Settings], key: str) -> str:
    return f"{cls.model_config.get('env_prefix', '')}{key.replace('.', '__')}".upper()


def unknown_variables(classes: Sequence[type[Settings]]) -> list[str]:
    """Return the `MOECTL_…` environment variables that set nothing."""
    valid = {_variable(cls, key) for cls in classes for key in fields(cls)}
    valid |= {_variable(cls, name) for cls in classes for name in cls.model_fields} | MACHINE_NAMES
    return sorted(
        name
        for name in os.environ
        if name.upper().startswith(ENVIRONMENT) and name.upper() not in valid
    )


def dump(settings: Settings) -> dict[str, Any]:
    """Return the tree as plain types without the keys whose value is None: TOML has no null."""
    return settings.model_dump(mode="json", exclude_none=True)


def to_toml(settings: Settings) -> str:
    """Return settings as TOML that loads back to the same settings."""
    return tomli_w.dumps(dump(settings))


def to_annotated_toml(settings: Settings) -> str:
    """Return settings as TOML with every field's description above it."""
    tree = dump(settings)
    lines: list[str] = []
    for section, outer in type(settings).model_fields.items():
        lines.append(f"[{section}]")
        for name, field in section_class(outer).model_fields.items():
            lines.append(f"# {' '.join((field.description or '').split())}")
            known = name in tree.get(section, {})
            lines.append(
                tomli_w.dumps({name: tree[section][name]}).strip() if known else f"# {name} ="
            )
        lines.append("")
    return "\n".join(lines)
